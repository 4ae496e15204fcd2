"""Speed beside stock Pyro, NumPyro and hand-written PyTorch, in one run, as ratios of interleaved medians.

python benchmarks/speed.py [--rounds 8] [--numpyro .bench/bin/python] [--out results.json] [--page docs/speed.md]

All of it is on one thread, but for the last part. NumPyro runs in an environment of its own, and is left out without.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.decomposition import PCA
from torch import Tensor, nn

from ppl_vae import PPCA, VAE, Conditional, fit, log_evidence
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP
from ppl_vae.programs import products as products_by

BATCHES = 20  # in an epoch
WARM_UP = 60  # steps of `fit` before it is timed: by then a step has been captured


def pair(features: int, hidden: list[int], latent: int) -> VAE:
    """Give a VAE of binary data."""
    return VAE(
        prior=Conditional(StandardNormal(latent)),
        likelihood=Conditional(Bernoulli(features), MLP(hidden=hidden)),
        posterior=Conditional(Normal(latent), MLP(hidden=hidden)),
    )


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
        peers["stock Pyro"] = by_stock
    else:
        peers["PyTorch by hand, compiled"] = by_hand(True)
    if numpyro:
        steps = NumPyro(numpyro, *sizes, batch)
        peers["NumPyro"] = lambda: steps(BATCHES)
    peers["products alone"] = products(batch, sizes)
    peers["PyTorch by hand"] = by_hand(False)
    return in_turn(ours, x, peers, batch, rounds, capture=capture, precision=precision)


def products(batch: int, sizes: tuple[int, int, int]) -> Callable[[], None]:
    """The matrix products of an epoch, by `mm`: what no step can be faster than with that library."""
    features, hidden, latent = sizes
    work = []
    for inputs, outputs in ((features, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, features)):
        a, w, g = torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(batch, outputs)
        work += [(a, w.t()), (g.t(), a)] + ([] if inputs == features else [(g, w)])

    def run() -> None:
        for one, other in work * BATCHES:
            torch.mm(one, other)

    return run


def in_turn(
    program: Any, x: Tensor, peers: dict[str, Callable[[], Any]], batch_size: int, rounds: int, **options: Any
) -> dict[str, Any]:
    """Time the epochs of one call of `fit`, once it has warmed up, and between them an epoch of each peer."""
    steps = math.ceil(len(x) / batch_size)
    skipped = WARM_UP // steps + 2
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ppl_vae", *peers)}
    began = clocks()

    def add(name: str, since: tuple[float, float]) -> None:
        times[name].append((clocks()[0] - since[0], clocks()[1] - since[1]))

    def on_epoch(epoch: int, state: Any) -> None:
        nonlocal began
        add("ppl_vae", began)
        for name, run in peers.items() if epoch >= skipped else ():
            since = clocks()
            own = run()  # of another process
            times[name].append(own) if own else add(name, since)
        began = clocks()

    options |= {"learning_rate": 1e-3, "device": "cpu", "progress": False}
    fit(program, x, epochs=skipped + rounds + 1, batch_size=batch_size, on_epoch=on_epoch, **options)
    return figures({name: each[-rounds:] for name, each in times.items()}, steps)


def clocks() -> tuple[float, float]:
    """Read the time on the wall and that of the processor, which other programs on the machine disturb less."""
    return time.perf_counter(), time.process_time()


def evidence(n: int, samples: int, rounds: int) -> dict[str, Any]:
    """Time the evidence of n images by 784-200-200-50: this library, stock Pyro, PyTorch by hand, the products."""
    x, ours = (torch.rand(n, 784) < 0.13).float(), pair(784, [200, 200], 50)
    layers = [one for one in ours.likelihood.modules() if isinstance(one, nn.Linear)]
    inputs = [torch.randn(10_000, one.in_features) for one in layers]
    stock = pyro.infer.RenyiELBO(alpha=0, num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    blocks = n * samples // 10_000
    guide = nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 100))
    decoder = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    linear = torch.ops.mkldnn._linear_pointwise

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
        f"import sys, time; sys.path.insert(0, {here!r}); import speed, torch; torch.set_num_threads(1); "
        "p = speed.pair(784, [400], 20); x = torch.rand(256, 784).round(); b = time.process_time(); "
        "speed.fit(p, x, epochs=3, batch_size=128, device='cpu', progress=False, capture='graph'); "
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


def ratios(work: dict[str, Callable[[], Any]], rounds: int, units: int, skipped: int = 1) -> dict[str, Any]:
    """Run each in turn, round after round, and relate their medians to the last one's."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for round_ in range(rounds + skipped):
        for name, run in work.items():
            began = clocks()
            run()
            ended = clocks()
            if round_ >= skipped:
                seconds[name].append((ended[0] - began[0], ended[1] - began[1]))
    return figures(seconds, units)


def figures(seconds: dict[str, list[tuple[float, float]]], units: int) -> dict[str, Any]:
    """Medians of times on the wall and of the processor, and their ratios to those of the last."""
    found: dict[str, Any] = {}
    for which, word in ((0, ""), (1, "processor_")):
        medians = {name: statistics.median(one[which] for one in each) for name, each in seconds.items()}
        base = seconds[list(seconds)[-1]]
        for name, each in seconds.items():
            beside = sorted(one[which] / other[which] for one, other in zip(each, base, strict=True))
            own = found.setdefault(name, {})
            own[f"{word}microseconds"] = 1e6 * medians[name] / units
            own[f"{word}ratio"] = medians[name] / medians[list(seconds)[-1]]
            own[f"{word}least_and_largest"] = [beside[0], beside[-1]]
    return found


def memory(samples: int) -> dict[str, Any]:
    """Measure the memory that the evidence of 100 images takes with many samples, beyond what the process held."""
    program, x = pair(784, [400], 20), (torch.rand(100, 784) < 0.13).float()
    log_evidence(program, x, 100)
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log_evidence(program, x, samples)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": samples,
        "peak_mib": after / 1024,
        "added_mib": (after - before) / 1024,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Run all and print a table; write it as JSON and as a page where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20_000, help="of the memory measurement")
    parser.add_argument("--numpyro", help="a Python that has NumPyro")
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--page", help="a page of Markdown")
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
    found["weight of evidence, 784-200-200-50, K = 5,000"] = evidence(200, 5000, few)
    show(*list(found.items())[-1])
    for title, rows in by_components(few).items():
        found[f"PPCA, {title}"] = rows
        show(f"PPCA, {title}", rows)
    found["start-up"] = start_up(few)
    found["memory"] = memory(given.samples)
    found["two processes, 784-400-20, batch 512 in each"] = processes()
    for title in list(found)[-3:]:
        print(title, json.dumps(found[title], indent=2))
    record(found, given.out)
    if given.page:
        Path(given.page).write_text(page(found))


def show(title: str, rows: dict[str, Any]) -> None:
    """Print the figures of one piece of work."""
    print(title)
    for name, one in rows.items():
        low, high = one["processor_least_and_largest"]
        print(
            f"  {name:<26} {one['processor_microseconds']:10.2f} us of the processor "
            f"{one['processor_ratio']:6.2f} x (from {low:.2f} to {high:.2f})",
            flush=True,
        )


def page(found: dict[str, Any]) -> str:
    """The page of the docs: one table of all."""
    machine = found["machine"]
    lines = [
        "# Speed",
        "",
        f"On one thread of {machine['processor']}, torch {machine['torch']}: time of the processor, medians of",
        "interleaved runs, and ratios to the last row of each piece of work, from the least to the largest round.",
        "`make bench` measures them anew.",
        "",
        "| work | | microseconds | ratio | from | to |",
        "|---|---|---|---|---|---|",
    ]
    for title, rows in found.items():
        if all(isinstance(one, dict) and "processor_ratio" in one for one in rows.values()):
            for name, one in rows.items():
                low, high = one["processor_least_and_largest"]
                cells = f"{one['processor_microseconds']:,.1f} | {one['processor_ratio']:.2f} | {low:.2f} | {high:.2f}"
                lines.append(f"| {title} | {name} | {cells} |")
                title = ""
    two = found["two processes, 784-400-20, batch 512 in each"]
    lines += ["", "| start-up | processor seconds |", "|---|---|"]
    lines += [f"| {name} | {one['processor_seconds']:.2f} |" for name, one in found["start-up"].items()]
    lines += [
        "",
        f"Two processes of one thread, with 512 data a step in each, train {two['throughput']:.2f} times as many data",
        "in a second as one.",
        "",
    ]
    return "\n".join(lines)


def record(found: dict[str, Any], out: str | None) -> None:
    """Add the machine, and write all as JSON where asked to."""
    found["machine"] = {
        "processor": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.machine(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor(),
        "family": products_by.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
