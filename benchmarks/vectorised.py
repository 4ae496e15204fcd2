"""Annealing and the gap's refinement beside the bare matrix products of their decoder, and beside a loop over data.

python benchmarks/vectorised.py [--rounds 3] [--out benchmarks/results/vectorised.json]

Every evaluation is counted with its number of rows; the bare products are those of the decoder for as many rows,
forward, and back to z where the gradient was asked for. All else, Pyro, likelihood, moves, is overhead. Where rows are
few the work is in the calls, and a loop over data makes as many calls for each datum as the library for all.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from clock import pair, record
from torch import Tensor, nn

from ppl_vae import VAE, inference_gap
from ppl_vae.infer.annealing import annealed_importance
from ppl_vae.programs.capture import Captured

LOOPED = 5  # data of the loop that are timed; the rest are taken to cost as much

Call = tuple[torch.Size, bool]  # vectors (k, n, z), and whether their gradient was asked for


@contextmanager
def counted() -> Iterator[list[Call]]:
    """Note each evaluation of a density."""
    calls: list[Call] = []
    plain = Captured.__call__

    def noted(self: Captured, u: Tensor) -> tuple[Tensor, ...]:
        found = plain(self, u)
        calls.append((u.shape, any(one.shape == u.shape for one in found)))
        return found

    Captured.__call__ = noted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Captured.__call__ = plain  # type: ignore[method-assign]


def products(program: VAE, calls: list[Call]) -> Callable[[], None]:
    """Give the bare matrix products of the decoder for these evaluations."""
    layers = [part for part in program.likelihood.modules() if isinstance(part, nn.Linear)]
    weights = [layer.weight.detach() for layer in layers]
    points = {shape: torch.randn(shape).flatten(0, 1) for shape, _ in calls}

    def bare() -> None:
        for shape, back in calls:
            value = points[shape]
            for weight in weights:
                value = value @ weight.T
            for weight in weights[::-1] if back else ():
                value = value @ weight

    return bare


def beside_products(program: VAE, work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Relate some work to its bare matrix products, in turns."""
    with counted() as calls:
        work()
    bare = products(program, calls)
    pairs = [(clocked(work), clocked(bare)) for _ in range(rounds)]
    whole, part = (statistics.median(times) for times in zip(*pairs, strict=True))
    rows = sum(shape[0] * shape[1] for shape, _ in calls)
    ratios = sorted(one / other for one, other in pairs)
    return {
        "evaluations": len(calls),
        "rows": rows,
        "seconds": whole,
        "bare_seconds": part,
        "ratio": statistics.median(ratios),
        "least_and_largest": [ratios[0], ratios[-1]],
    }


def beside_loop(work: Callable[[slice], Any], n: int, rounds: int) -> dict[str, Any]:
    """Relate some work on n data at once to a loop over them, in turns."""
    work(slice(0, 1))
    pairs = []
    for _ in range(rounds):
        at_once = clocked(lambda: work(slice(0, n)))
        looped = sum(clocked(lambda number=number: work(slice(number, number + 1))) for number in range(LOOPED))
        pairs.append((at_once, looped * n / LOOPED))
    whole, loop = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"data": n, "seconds": whole, "loop_seconds": loop, "times_less": loop / whole}


def clocked(work: Callable[[], Any]) -> float:
    """Give the seconds that some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Run all and print the ratios; write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=100, help="of an annealing; a refinement has a block of 250")
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=100)
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.manual_seed(0)
    digits = pair(64, [200], 10)
    y = digits.sample(100)
    annealing = {"chains": given.chains, "temperatures": given.temperatures}
    found: dict[str, Any] = {}
    for hidden, latent in (([400], 20), ([200, 200], 50)):
        images, name = pair(784, hidden, latent), "-".join(map(str, (784, *hidden, latent)))
        x, more = images.sample(given.images), images.sample(250)
        found[f"annealing, {name}, {len(x)} images, {given.chains} chains"] = beside_products(
            images, partial(annealed_importance, images, x, **annealing), given.rounds
        )
        found[f"refinement, {name}, {len(more)} images"] = beside_products(
            images, partial(inference_gap, images, more, draws=10), given.rounds
        )
    found["annealing, 64-200-10, one chain"] = beside_loop(
        lambda rows: annealed_importance(digits, y[rows], chains=1, temperatures=given.temperatures),
        len(y),
        given.rounds,
    )
    found["refinement, 64-200-10"] = beside_loop(lambda rows: inference_gap(digits, y[rows]), len(y), given.rounds)
    for title, row in found.items():
        if "ratio" in row:
            print(f"{title}: {row['ratio']:.2f} x the bare products of {row['rows']:,} rows; {row['seconds']:.1f} s")
        else:
            print(f"{title}: {row['times_less']:.0f} times less than a loop over data; {row['seconds']:.1f} s")
    record(found, given.out)


if __name__ == "__main__":
    main()
