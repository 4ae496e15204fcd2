"""Speed beside stock Pyro, NumPyro and hand-written PyTorch, in one run, as ratios of interleaved medians.

python benchmarks/speed.py [--rounds 8] [--numpyro .bench/bin/python] [--out results.json] [--page page.md --also ...]
    [--data ../shared/data]

All of it is on one thread, but for the last part. NumPyro runs in an environment of its own, and is left out without.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from clock import WARM_UP, in_turn, pair, ratios, record, show
from growth import growth, table
from pyro.infer import SVI, Trace_ELBO
from sklearn.decomposition import PCA
from torch import Tensor, nn

from ppl_vae import PPCA, load_spec, log_evidence
from ppl_vae.infer.gradients import Gradients
from ppl_vae.infer.objectives import make_objective
from ppl_vae.infer.optimizers import make_optimizer, take_step
from ppl_vae.programs.target import Target

BATCHES = 20  # in an epoch
linear = torch.ops.mkldnn._linear_pointwise


class Plain(nn.Module):
    """The same mathematics in hand-written PyTorch."""

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, features))

    def loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO of a batch per datum."""
        return -weights(self.encoder, self.decoder, x, 1).mean()


def weights(encoder: nn.Module, decoder: nn.Module, x: Tensor, samples: int) -> Tensor:
    """Give log p(x, z) - log q(z|x), shape (samples, n)."""
    loc, raw = encoder(x).chunk(2, -1)
    scale = nn.functional.softplus(raw) + 1e-6
    noise = torch.randn(samples, *loc.shape)
    z = loc + scale * noise
    log_q = -0.5 * (noise**2).sum(-1) - scale.log().sum(-1)
    logits = decoder(z)
    likelihood = -nn.functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    return likelihood - 0.5 * (z**2).sum(-1) - log_q


class NumPyro:
    """Steps of NumPyro on the same sizes, in a process of its own."""

    def __init__(self, python: str, *sizes: int) -> None:
        script = str(Path(__file__).with_name("numpyro_step.py"))
        self.process = subprocess.Popen(
            [python, script, *map(str, sizes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self(1)

    def __call__(self, steps: int) -> tuple[float, float]:
        """Take some steps; returns seconds on the wall and of the processor."""
        self.process.stdin.write(f"{steps}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        wall, cpu = self.process.stdout.readline().split()  # type: ignore[union-attr]
        return float(wall), float(cpu)


def training(
    sizes: tuple[int, int, int], batch: int, numpyro: str, rounds: int, capture: str, precision: Any = "full"
) -> dict[str, Any]:
    """Time a training step: this library, stock Pyro's SVI on the same program, NumPyro, and PyTorch by hand."""
    features, hidden, latent = sizes
    x = (torch.rand(BATCHES * batch, features) < 0.13).float()
    ours, stock = pair(features, [hidden], latent), pair(features, [hidden], latent)
    svi = SVI(stock.model, stock.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    batches = x.split(batch)

    def by_stock() -> None:
        for part in batches:
            svi.step(part)

    def by_hand(compiled: bool) -> Callable[[], None]:
        plain = Plain(features, hidden, latent)
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
        function = torch.compile(plain.loss) if compiled else plain.loss

        def run() -> None:
            for part in batches:
                loss = function(part)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return run

    peers: dict[str, Any] = {}
    if capture == "auto":
        peers["its bare steps, on a batch"] = bare_steps(pair(features, [hidden], latent), batches[0], precision)
        peers["stock Pyro"] = by_stock
    else:
        peers["PyTorch by hand, compiled"] = by_hand(True)
    if numpyro:
        steps = NumPyro(numpyro, *sizes, batch)
        peers["NumPyro"] = lambda: steps(BATCHES)
    for library in ("MKL", "oneDNN"):
        peers[f"products alone, by {library}"] = products(batch, sizes, library)
    peers["memory traffic alone"] = traffic(ours)
    peers["PyTorch by hand"] = by_hand(False)
    return in_turn(ours, x, peers, batch, rounds, capture, precision)


def bare_steps(
    program: Any, x: Tensor, precision: Any, elbo: Any = "Trace_ELBO", steps: int = BATCHES
) -> Callable[[], None]:
    """The captured steps of an epoch on one batch, without the epoch around them."""
    learned = [*program.parameters()]
    objective = make_objective(Target(program, x), learned, elbo=elbo)
    gradients = Gradients(program, objective, learned, precision=precision)
    optimizer = make_optimizer("Adam", learned, 1e-3)

    def run() -> None:
        for _ in range(steps):
            take_step(optimizer, learned, gradients({"x": x}, WARM_UP)[1])

    return run


def epoch_of(file: str, root: str, rounds: int) -> dict[str, Any]:
    """Time the epochs of a spec, which draws its data anew, beside as many of its captured steps on one batch."""
    spec = load_spec(file, {"data.root": str(Path(root).resolve())})
    x, size, elbo = spec.load_data(), spec.training["batch_size"], spec.training["elbo"]
    first, steps = x.train["x"][:size], -(-len(x.train["x"]) // size)
    peers = {"its bare steps, on a batch": bare_steps(spec.build(), first, "full", elbo, steps)}
    return in_turn(spec.build(), x, peers, size, rounds, "auto", elbo=elbo)


def products(batch: int, sizes: tuple[int, int, int], library: str) -> Callable[[], None]:
    """The matrix products of an epoch: what no step can be faster than with that library."""
    features, hidden, latent = sizes
    work = []
    for inputs, outputs in ((features, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, features)):
        a, w, g = torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(batch, outputs)
        work += [(a, w.t()), (g.t(), a)] + ([] if inputs == features else [(g, w)])

    def by_mkl() -> None:
        for one, other in work * BATCHES:
            torch.mm(one, other)

    def by_onednn() -> None:
        for one, other in work * BATCHES:
            linear(one, other.t(), None, "none", [], "")

    return by_mkl if library == "MKL" else by_onednn


def traffic(program: nn.Module) -> Callable[[], None]:
    """Memory moved as Adam must at the least: parameter, two moments and gradient, read and written once a step."""
    given = torch.randn(4 * sum(one.numel() for one in program.parameters()))
    out = torch.empty_like(given)

    def run() -> None:
        for _ in range(BATCHES):
            out.copy_(given)

    return run


def evidence(n: int, samples: int, rounds: int) -> dict[str, Any]:
    """Time the evidence of n images by 784-200-200-50: this library, stock Pyro, PyTorch by hand, the products."""
    x, ours = (torch.rand(n, 784) < 0.13).float(), pair(784, [200, 200], 50)
    layers = [one for one in ours.likelihood.modules() if isinstance(one, nn.Linear)]
    inputs = [torch.randn(10_000, one.in_features) for one in layers]
    stock = pyro.infer.RenyiELBO(alpha=0, num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    blocks = n * samples // 10_000
    guide = nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 100))
    decoder = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    @torch.no_grad()
    def by_stock() -> None:
        for _ in range(samples // 100):
            for part in x.split(100):
                stock.loss(ours.model, ours.guide, part)

    @torch.no_grad()
    def by_hand() -> None:
        for part in x.split(100):
            for _ in range(samples // 100):
                weights(guide, decoder, part, 100).logsumexp(0)

    @torch.no_grad()
    def by_mkl() -> None:
        for _ in range(blocks):
            for layer, given in zip(layers, inputs, strict=True):
                layer(given)

    @torch.no_grad()
    def by_onednn() -> None:
        for _ in range(blocks):
            for layer, given in zip(layers, inputs, strict=True):
                linear(given, layer.weight, layer.bias, "none", [], "")

    # One weight a datum and sample in each; stock Pyro's is the bound of 100 samples, averaged over blocks.
    work = {
        "ppl_vae": lambda: log_evidence(ours, x, samples),
        "ppl_vae, bfloat16": lambda: log_evidence(ours, x, samples, precision="bfloat16"),
        "PyTorch by hand": by_hand,
        "products by MKL": by_mkl,
        "products by oneDNN": by_onednn,
        "stock Pyro": by_stock,
    }
    return ratios(work, rounds, samples * n, skipped=0)


def by_components(rounds: int) -> dict[str, Any]:
    """Time PPCA beside scikit-learn's PCA, with the log densities of all rows."""
    found: dict[str, Any] = {}
    for n, features, latent in ((1500, 64, 10), (10_000, 64, 10), (10_000, 784, 10), (10_000, 784, 50)):
        x = torch.randn(n, features) @ torch.randn(features, features)

        def ours(x: Tensor = x, latent: int = latent) -> None:
            PPCA.fit(x, latent).log_evidence(x)

        def theirs(x: Tensor = x, latent: int = latent) -> None:
            PCA(latent, svd_solver="covariance_eigh").fit(x.numpy()).score_samples(x.numpy())

        found[f"n = {n:,}, x = {features}, z = {latent}"] = ratios({"ppl_vae": ours, "scikit-learn": theirs}, rounds, 1)
    return found


def start_up(rounds: int) -> dict[str, Any]:
    """Time commands, and the first steps of `fit`, each in a process of its own."""
    spec = str(Path(__file__).parents[1] / "models" / "digits.toml")
    here = str(Path(__file__).parent)
    first = (
        f"import sys, time; sys.path.insert(0, {here!r}); import clock, torch; torch.set_num_threads(1); "
        "p = clock.pair(784, [400], 20); x = torch.rand(256, 784).round(); b = time.process_time(); "
        "clock.fit(p, x, epochs=3, batch_size=128, device='cpu', progress=False, capture='graph'); "
        "print(time.process_time() - b)"
    )
    words = {
        "ppl-vae --help": ["-m", "ppl_vae", "--help"],
        "ppl-vae check models/digits.toml": ["-m", "ppl_vae", "check", spec],
    }
    found: dict[str, Any] = {}
    for name, command in words.items():
        each = []
        for _ in range(rounds):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            each.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        found[name] = {"processor_seconds": statistics.median(each)}
    each = [
        float(subprocess.run([sys.executable, "-c", first], check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds)
    ]
    found["first steps of fit, with capture"] = {"processor_seconds": statistics.median(each)}
    return found


def processes() -> dict[str, Any]:
    """Time training by one process and by two, of one thread each, with 512 data a step in each."""
    script = str(Path(__file__).with_name("two_processes.py"))
    seconds = {}
    for count in (1, 2, 1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, script], env=env, check=True, capture_output=True, text=True)
        seconds.setdefault(count, []).append(float(done.stdout.split()[-1]))
    one, two = (min(seconds[count]) for count in (1, 2))
    return {"milliseconds_of_one": 1e3 * one, "milliseconds_of_two": 1e3 * two, "throughput": 2 * one / two}


def main() -> None:
    """Run all and print a table; write it as JSON and as a page where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--numpyro", help="a Python that has NumPyro")
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--page", help="a page of Markdown that marks where the figures go")
    parser.add_argument("--data", default="../shared/data", help="where MNIST lies; without it, it is left out")
    parser.add_argument("--also", nargs="*", default=[], help="JSON files of other machines, for the page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    few, found = max(given.rounds // 4, 1), {}
    for sizes, batch in (((784, 400, 20), 128), ((64, 200, 10), 100), ((784, 400, 20), 2048)):
        rounds = given.rounds if batch < 1000 else few
        for how in (("auto",), ("compile",), ("auto", "bfloat16")):
            title = f"training step, {'-'.join(map(str, sizes))}, batch {batch:,}, capture = {', '.join(how)}"
            found[title] = training(sizes, batch, given.numpyro, rounds, *how)
            show(title, found[title])
    if (Path(given.data) / "MNIST").is_dir():
        found["step in an epoch of models/mnist.toml"] = epoch_of("models/mnist.toml", given.data, given.rounds)
        show(*list(found.items())[-1])
    found["weight of evidence, 784-200-200-50, K = 5,000, n = 500"] = evidence(500, 5000, few)
    show(*list(found.items())[-1])
    for title, rows in by_components(few).items():
        found[f"PPCA, {title}"] = rows
        show(f"PPCA, {title}", rows)
    found["start-up"] = start_up(few)
    found["two processes, 784-400-20, batch 512 in each"] = processes()
    for title in list(found)[-2:]:
        print(title, json.dumps(found[title], indent=2))
    found["growth"] = growth()
    record(found, given.out)
    if given.page:
        others = [json.loads(Path(file).read_text()) for file in given.also]
        before, start, rest = Path(given.page).read_text().partition("<!-- figures -->\n")
        _, end, after = rest.partition("<!-- end -->")
        Path(given.page).write_text(before + start + sections([found, *others]) + end + after)


def sections(runs: list[dict[str, Any]]) -> str:
    """A section of the docs' page for each machine."""
    lines = []
    for found in runs:
        machine = found["machine"]
        title = f"## {machine['processor']}, family {machine['family'][1]}, torch {machine['torch']}"
        lines += [title, "", "| work | | microseconds | ratio | from | to |", "|---|---|---|---|---|---|"]
        for title, rows in found.items():
            if all(isinstance(one, dict) and "processor_ratio" in one for one in rows.values()):
                for name, one in rows.items():
                    ratio, (low, high) = one["processor_ratio"], one["processor_least_and_largest"]
                    cells = f"{one['processor_microseconds']:,.1f} | {ratio:.2f} | {low:.2f} | {high:.2f}"
                    lines.append(f"| {title} | {name} | {cells} |")
                    title = ""
        two = found["two processes, 784-400-20, batch 512 in each"]
        lines += ["", "| start-up | processor seconds |", "|---|---|"]
        lines += [f"| {name} | {one['processor_seconds']:.2f} |" for name, one in found["start-up"].items()]
        lines += [
            "",
            f"Two processes of one thread, with 512 data a step in each, train {two['throughput']:.2f} times as many",
        ]
        lines += ["data in a second as one.", ""]
        if "growth" in found:
            lines += [
                "How time and memory grow, for 784-200-200-z; memory is what the process held at most beyond what it"
            ]
            lines += ["held before:", "", *table(found["growth"]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
