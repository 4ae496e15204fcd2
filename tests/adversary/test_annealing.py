"""Annealing under attack: where it says that it has settled, log p(x) is within five stated errors.

Each case has one to three latents with independent priors (normal, Student t with 2 to 10 degrees of freedom, or a
mixture of two normals up to 12 deviations apart) and an observation of each latent through one of: the identity with
noise from 0.02 to 2 (narrow and wide posteriors), z^2 (two modes), |z| (a fold), or sin(w z) with w from 1 to 6 (many
modes). The truth is a product of one-dimensional sums over 200,001 points. A case settles or not as a whole.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae import Program
from ppl_vae.infer.annealing import annealed_importance

POINTS = 200_001


def case(seed: int) -> tuple[Program, Tensor, float]:
    """A program, one datum (1, z) and log p(x)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    size = 1 + seed % 3
    parts: list[tuple[Any, Any, float]] = []
    for number in range(size):
        kind, seen = (seed // 3 + number) % 3, (seed // 9 + number) % 4
        freedom, apart, share = uniform(2, 10), uniform(1, 6), uniform(0.2, 0.8)
        prior: Any = dist.Normal(0.0, 1.0)
        if kind == 1:
            prior = dist.StudentT(freedom, 0.0, 1.0)
        if kind == 2:
            prior = dist.MixtureSameFamily(
                dist.Categorical(torch.tensor([share, 1 - share])), dist.Normal(torch.tensor([-apart, apart]), 1.0)
            )
        frequency, noise = uniform(1, 6), math.exp(uniform(math.log(0.02), math.log(2.0)))
        maps = [lambda z: z, lambda z: z**2, lambda z: z.abs(), lambda z, w=frequency: torch.sin(w * z)]
        parts.append((prior, maps[seen], noise))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = torch.stack([prior.sample() for prior, _, _ in parts])
        x = torch.stack([dist.Normal(f(one), noise).sample() for (_, f, noise), one in zip(parts, z, strict=True)])
    grid = torch.linspace(-40, 40, POINTS)
    step = math.log(80 / (POINTS - 1))
    truth = sum(
        float((prior.log_prob(grid) + dist.Normal(f(grid), noise).log_prob(one)).logsumexp(0)) + step
        for (prior, f, noise), one in zip(parts, x, strict=True)
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for number, (prior, f, noise) in enumerate(parts):
                z = pyro.sample(f"z{number}", prior)
                pyro.sample(f"x{number}", dist.Normal(f(z), noise), obs=x[:, number])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for number in range(size):
                pyro.sample(f"z{number}", dist.Normal(x.new_zeros(len(x)), 1.0))

    return Program(model, guide), x.unsqueeze(0), truth


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """Share of cases that settle, and of these beyond five and fifty stated errors plus 1e-9."""
    settled, beyond = 0, {5: 0, 50: 0}
    for number in range(seed, seed + count):
        program, x, truth = case(number)
        annealing = annealed_importance(program, x, chains=32, temperatures=200, leapfrog=5, seed=number)
        if bool(annealing.settled.all()):
            settled += 1
            off = abs(float(annealing.log_evidence) - truth)
            for limit in beyond:
                beyond[limit] += int(off > limit * float(annealing.error) + limit / 5 * 1e-9)
    return {"cases": count, "settled": settled, "beyond_5": beyond[5], "beyond_50": beyond[50]}
