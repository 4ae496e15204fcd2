"""What the benchmarks share: a VAE, clocks, interleaved rounds and the record of a machine."""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae import VAE, Conditional, fit
from ppl_vae.data.loading import Data
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP
from ppl_vae.programs import products

WARM_UP = 60  # steps of `fit` before it is timed: by then a step has been captured


def pair(features: int, hidden: list[int], latent: int) -> VAE:
    """Give a VAE of binary data."""
    return VAE(
        prior=Conditional(StandardNormal(latent)),
        likelihood=Conditional(Bernoulli(features), MLP(hidden=hidden)),
        posterior=Conditional(Normal(latent), MLP(hidden=hidden)),
    )


def clocks() -> tuple[float, float]:
    """Read the time on the wall and that of the processor, which other programs on the machine disturb less."""
    return time.perf_counter(), time.process_time()


def in_turn(
    program: Any,
    x: Tensor | Data,
    peers: dict[str, Callable[[], Any]],
    batch_size: int,
    rounds: int,
    capture: str,
    precision: Any = "full",
    **settings: Any,
) -> dict[str, Any]:
    """Time the epochs of one call of `fit`, once it has warmed up, and between them an epoch of each peer."""
    steps = math.ceil(len(x.train["x"] if isinstance(x, Data) else x) / batch_size)
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

    options: dict[str, Any] = {"learning_rate": 1e-3, "device": "cpu", "progress": False}
    options |= {"capture": capture, "precision": precision, **settings}
    fit(program, x, epochs=skipped + rounds + 1, batch_size=batch_size, on_epoch=on_epoch, **options)
    return figures({name: each[-rounds:] for name, each in times.items()}, steps)


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
        "family": products.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(found, indent=2) + "\n")
