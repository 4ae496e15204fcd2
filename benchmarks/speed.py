"""Speed beside stock Pyro and hand-written PyTorch, in one run, as ratios of interleaved medians.

python benchmarks/speed.py [--rounds 15] [--out benchmarks/results/speed.json]
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from ppl_vae import VAE, Conditional, fit, log_evidence
from ppl_vae.data import load
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP

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

    def log_weights(self, x: Tensor, samples: int) -> Tensor:
        """Give log p(x, z) - log q(z|x), shape (samples, n)."""
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = nn.functional.softplus(raw) + 1e-6
        noise = torch.randn(samples, *loc.shape)
        z = loc + scale * noise
        log_q = -0.5 * (noise**2).sum(-1) - scale.log().sum(-1)
        log_p = -0.5 * (z**2).sum(-1)
        logits = self.decoder(z)
        likelihood = -nn.functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(
            -1
        )
        return likelihood + log_p - log_q


def training(x: Tensor, hidden: int, latent: int, rounds: int) -> dict[str, Any]:
    """Time a training step of batch 100: this library, stock Pyro's SVI on the same program, and PyTorch by hand."""
    features = x.shape[1]
    ours, stock, plain = (
        pair(features, [hidden], latent),
        pair(features, [hidden], latent),
        Plain(features, hidden, latent),
    )
    svi = SVI(stock.model, stock.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
    batches = x.split(100)

    def by_stock() -> None:
        for batch in batches:
            svi.step(batch)

    def by_hand() -> None:
        for batch in batches:
            loss = -plain.log_weights(batch, 1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return in_turn(ours, x, {"stock Pyro": by_stock, "PyTorch by hand": by_hand}, 100, rounds)


def in_turn(
    program: Any, x: Tensor, peers: dict[str, Callable[[], None]], batch_size: int, rounds: int
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
            run()
            add(name, since)
        began = clocks()

    options: dict[str, Any] = {"learning_rate": 1e-3, "device": "cpu", "progress": False}
    fit(program, x, epochs=skipped + rounds + 1, batch_size=batch_size, on_epoch=on_epoch, **options)
    wall, cpu = (
        {name: statistics.median(one[which] for one in each[-rounds:]) for name, each in times.items()}
        for which in (0, 1)
    )
    last = list(peers)[-1]
    return {
        name: {
            "microseconds": 1e6 * wall[name] / steps,
            "ratio": wall[name] / wall[last],
            "processor_microseconds": 1e6 * cpu[name] / steps,
            "processor_ratio": cpu[name] / cpu[last],
        }
        for name in times
    }


def clocks() -> tuple[float, float]:
    """Read the time on the wall and that of the processor, which other programs on the machine disturb less."""
    return time.perf_counter(), time.process_time()


def evidence(x: Tensor, hidden: int, latent: int, samples: int, rounds: int) -> dict[str, Any]:
    """Time the evidence of some data: this library, a loop over stock Pyro's Trace_ELBO, and PyTorch by hand."""
    features = x.shape[1]
    ours, plain = pair(features, [hidden], latent), Plain(features, hidden, latent)
    stock = pyro.infer.RenyiELBO(alpha=0, num_particles=100, vectorize_particles=True, max_plate_nesting=1)

    def by_library() -> None:
        log_evidence(ours, x, samples)

    @torch.no_grad()
    def by_stock() -> None:
        for _ in range(samples // 100):
            for start in range(0, len(x), 100):
                stock.loss(ours.model, ours.guide, x[start : start + 100])

    @torch.no_grad()
    def by_hand() -> None:
        for start in range(0, len(x), 100):
            parts = [plain.log_weights(x[start : start + 100], 100).logsumexp(0) for _ in range(samples // 100)]
            torch.stack(parts).logsumexp(0) - math.log(samples)

    # One weight a datum and sample, in all three; stock Pyro's is the bound of 100 samples, averaged over blocks.
    work = {"ppl_vae": by_library, "stock Pyro": by_stock, "PyTorch by hand": by_hand}
    return ratios(work, rounds, samples * len(x))


def ratios(work: dict[str, Callable[[], None]], rounds: int, units: int) -> dict[str, Any]:
    """Run each in turn, round after round, and relate their medians to the last one's."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians[list(work)[-1]]
    return {name: {"microseconds": 1e6 * median / units, "ratio": median / base} for name, median in medians.items()}


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
    """Run all and print a table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=50_000, help="of the memory measurement")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.manual_seed(0)
    digits = load("digits", binarization="static").train["x"]
    images = (torch.rand(2000, 784) < 0.13).float()
    found: dict[str, Any] = {
        "training step, digits 64-200-10": training(digits, 200, 10, given.rounds),
        "training step, images 784-400-20": training(images, 400, 20, given.rounds),
        "weight, digits 64-200-10, K = 1,000": evidence(digits[:100], 200, 10, 1000, given.rounds),
        "weight, images 784-400-20, K = 500": evidence(images[:100], 400, 20, 500, max(given.rounds // 3, 3)),
    }
    for title, rows in found.items():
        print(title)
        for name, figures in rows.items():
            cpu = f"  {figures['processor_ratio']:6.2f} x in processor time" if "processor_ratio" in figures else ""
            print(f"  {name:<16} {figures['microseconds']:10.2f} us  {figures['ratio']:6.2f} x PyTorch by hand{cpu}")
    found["memory"] = memory(given.samples)
    print(f"evidence of 100 images, 784-400-20, K = {given.samples:,}: {found['memory']}")
    record(found, given.out)


def record(found: dict[str, Any], out: str | None) -> None:
    """Add the machine, and write all as JSON where asked to."""
    found["machine"] = {
        "processor": platform.processor() or platform.machine(),
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
