"""The step of each objective of K draws beside that of Trace_ELBO with K particles, in turns, in processor time.

python benchmarks/objectives.py [--rounds 15] [--particles 5] [--out benchmarks/results/objectives.json]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from clock import pair, record
from torch import Tensor

from ppl_vae import Target
from ppl_vae.infer.gradients import EAGER, Gradients
from ppl_vae.infer.objectives import make_objective
from ppl_vae.infer.optimizers import make_optimizer
from ppl_vae.programs.param_store import scope

OBJECTIVES: dict[str, dict[str, Any]] = {
    "Trace_ELBO": {"elbo": "Trace_ELBO"},
    "ImportanceWeighted": {"elbo": "ImportanceWeighted"},
    "ImportanceWeighted, stl": {"elbo": "ImportanceWeighted", "gradient": "stl"},
    "ImportanceWeighted, dreg": {"elbo": "ImportanceWeighted", "gradient": "dreg"},
    "Renyi, dreg": {"elbo": "Renyi", "alpha": 0.5, "gradient": "dreg"},
}


def step_of(x: Tensor, sizes: Any, particles: int, capture: Any, options: dict[str, Any]) -> Callable[[], None]:
    """Give a function that takes one step of an objective on a batch."""
    program = pair(*sizes)
    target, learned = Target(program, x), list(program.parameters())
    objective = make_objective(target, learned, particles=particles, **options)
    gradients = Gradients(program, objective, learned, capture=capture)
    optimizer = make_optimizer("Adam", learned, 1e-3)

    def step() -> None:
        with scope(program, training=True), pyro.validation_enabled(False):
            found = gradients(target.batch, EAGER)[1]
        for tensor, gradient in zip(learned, found, strict=True):
            tensor.grad = gradient
        optimizer.step()

    return step


def ratios(x: Tensor, sizes: Any, particles: int, capture: Any, rounds: int, steps: int) -> dict[str, Any]:
    """Take some steps of each objective in turn, and relate their times to those of Trace_ELBO, round by round."""
    work = {name: step_of(x, sizes, particles, capture, options) for name, options in OBJECTIVES.items()}
    for step in work.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, step in work.items():
            began = time.process_time()
            for _ in range(steps):
                step()
            times[name].append((time.process_time() - began) / steps)
    base = times["Trace_ELBO"]
    found = {}
    for name, each in times.items():
        beside = sorted(one / other for one, other in zip(each, base, strict=True))
        found[name] = {
            "processor_microseconds": 1e6 * statistics.median(each),
            "ratio": statistics.median(beside),
            "least_and_largest": [beside[0], beside[-1]],
        }
    return found


def main() -> None:
    """Run all and print a table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--particles", type=int, default=5)
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for sizes in ((64, [200], 10), (784, [400], 20)):
        x = (torch.rand(100, sizes[0]) < 0.2).float()
        for capture in ("auto", "off"):
            how = "captured" if capture == "auto" else "by Pyro, step by step"
            title = f"{sizes[0]}-{sizes[1][0]}-{sizes[2]}, batch 100, K = {given.particles}, {how}"
            found[title] = ratios(x, sizes, given.particles, capture, given.rounds, 10)
            print(title)
            for name, row in found[title].items():
                print(f"  {name:<26} {row['processor_microseconds']:9.0f} us  {row['ratio']:5.2f} x Trace_ELBO")
    record(found, given.out)


if __name__ == "__main__":
    main()
