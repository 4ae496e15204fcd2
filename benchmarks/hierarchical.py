"""Evidence of a hierarchical regression beside its bare log densities, written by hand in PyTorch.

python benchmarks/hierarchical.py [--rounds 7] [--draws 1000] [--out benchmarks/results/hierarchical.json]

10,000 rows in 200 groups, y = a_g + b x + noise, with global slope, mean and scale and a level for each group. `joint`
takes one draw of all latents for each weight, `nested` 20 of the levels for each draw of the globals. The bare
densities are those of as many draws from the same guide; all else, Pyro included, is overhead. They are timed in blocks
as large as the library's and in smaller ones that fit a processor's cache, in turns, in processor time. `ratio` is to
the fastest of them, `ratio_same_block` to blocks as large.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from clock import record
from torch import Tensor

from ppl_vae import Program, Target, log_evidence
from ppl_vae.evaluation.weights import block_size

GROUPS, ROWS, INNER = 200, 50, 20
NOISE, SPREAD = 0.8, 0.7
GLOBALS = {"m": (0.5, 0.06), "b": (1.2, 0.009), "s": (math.log(NOISE), 0.0075)}  # the guide's, `s` a logarithm
LEVEL = NOISE / ROWS**0.5


def simulate() -> dict[str, Tensor]:
    """Draw x and y, (rows, groups)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, GROUPS, generator=generator)
    levels = 0.5 + SPREAD * torch.randn(GROUPS, generator=generator)
    return {"x": x, "y": levels + 1.2 * x + NOISE * torch.randn(ROWS, GROUPS, generator=generator)}


def model(x: Tensor, y: Tensor) -> None:
    """The regression."""
    m, b = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", GROUPS, dim=-1):
        a = pyro.sample("a", dist.Normal(m, SPREAD))
        with pyro.plate("rows", ROWS, dim=-2):
            pyro.sample("y", dist.Normal(a + b * x, s), obs=y)


def guide(x: Tensor, y: Tensor) -> None:
    """Independent latents, close to the posterior."""
    for name, moments in GLOBALS.items():
        pyro.sample(name, (dist.LogNormal if name == "s" else dist.Normal)(*moments))
    with pyro.plate("groups", GROUPS, dim=-1):
        pyro.sample("a", dist.Normal((y - 1.2 * x).mean(0), LEVEL))


def normal(value: Tensor, loc: Any, scale: Any, log_scale: Any) -> Tensor:
    """Log density."""
    return -0.5 * ((value - loc) / scale) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


def bare(x: Tensor, y: Tensor, draws: int, inner: int, block: int) -> float:
    """Log evidence by hand."""
    parts, centre = [], (y - 1.2 * x).mean(0)
    for start in range(0, draws, block):
        k = min(block, draws - start)
        m, b, s = (loc + scale * torch.randn(k, 1, 1, 1) for loc, scale in GLOBALS.values())
        a = centre + LEVEL * torch.randn(k, inner, 1, GROUPS)
        outer = sum(normal(value, 0, 1, 0) for value in (m, b, s))
        outer = outer - sum(normal(v, *q, math.log(q[1])) for v, q in zip((m, b, s), GLOBALS.values(), strict=True))
        local = normal(a, m, SPREAD, math.log(SPREAD)) - normal(a, centre, LEVEL, math.log(LEVEL))
        local = local[:, :, 0] + normal(y, a + b * x, s.exp(), s).sum(2)  # (k, inner, groups)
        parts.append(outer.flatten() + (local.logsumexp(1) - math.log(inner)).sum(-1))
    return float(torch.cat(parts).logsumexp(0) - math.log(draws))


def compare(target: Target, draws: int, inner: int, rounds: int) -> dict[str, Any]:
    """Time both in turns."""
    block, values = block_size(target, inner), {}

    def clocked(name: str, work: Callable[[], float]) -> float:
        began = time.process_time()
        values[name] = work()
        return time.process_time() - began

    def ours() -> float:
        return float(log_evidence(target, samples=draws, inner=inner).log_evidence)

    def by_hand(size: int) -> float:
        return bare(target.batch["x"], target.batch["y"], draws, inner, size)

    ours(), by_hand(block)
    blocks = sorted({max(1, 25 // inner), max(1, 100 // inner), block})
    times: dict[int, list[float]] = {size: [] for size in [0, *blocks]}  # 0 is the library
    for _ in range(rounds):
        times[0].append(clocked("log_evidence", ours))
        for size in blocks:
            times[size].append(clocked("log_evidence_by_hand", lambda size=size: by_hand(size)))  # type: ignore[misc]
    medians = {size: statistics.median(each) for size, each in times.items()}
    best = min(blocks, key=medians.__getitem__)
    ratios = {size: statistics.median(a / b for a, b in zip(times[0], times[size], strict=True)) for size in blocks}
    shape = {"draws": draws, "inner": inner, "block": block, "bare_block": best}
    seconds = {"seconds": medians[0], "bare_seconds": medians[best]}
    return shape | values | seconds | {"ratio": ratios[best], "ratio_same_block": ratios[block]}


def main() -> None:
    """Run both, print the ratios, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    target = Target(Program(model, guide), simulate())
    results = {
        "joint": compare(target, given.draws, 1, given.rounds),
        "nested": compare(target, max(1, given.draws // INNER), INNER, given.rounds),
    }
    print(json.dumps(results, indent=2))
    record(results, given.out)


if __name__ == "__main__":
    main()
