"""Comparisons under attack: the KL of a guide to the exact posterior is within five of its stated errors.

Each case is a linear-Gaussian model of one to six latents, one to eight features and noise from 0.01 to 3, with one to
four data. The guide is independent over latents, of one of these laws: normal, Laplace, Student t with 5 to 50 degrees
of freedom, or a mixture of two normals up to eight deviations apart; it is off by up to five posterior deviations, with
scales from 0.05 to 20 of them. The truth: E log q is a one-dimensional sum over 200,001 points, and E log p needs the
guide's means and variances alone.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae import Program, compare_posteriors

POINTS = 200_001


def _law(kind: int, loc: Tensor, scale: Tensor, apart: float, freedom: float) -> Any:
    if kind == 0:
        return dist.Normal(loc, scale)
    if kind == 1:
        return dist.Laplace(loc, scale)
    if kind == 2:
        return dist.StudentT(freedom, loc, scale)
    shift = torch.tensor([-0.5, 0.5]) * apart
    parts = dist.Normal(loc.unsqueeze(-1) + shift * scale.unsqueeze(-1), scale.unsqueeze(-1).expand(*scale.shape, 2))
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7]).expand(*loc.shape, 2)), parts)


def case(seed: int) -> tuple[Program, Tensor, Tensor]:
    """A program, its data (n, x) and the KL of each datum, (n,)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    size, features, n, kind = 1 + seed % 6, 1 + seed % 8, 1 + seed % 4, (seed // 6) % 4
    noise = float(uniform(math.log(0.01), math.log(3.0)).exp())
    weight = torch.randn(features, size, generator=generator)
    x = torch.randn(n, features, generator=generator) * 2
    precision = torch.eye(size) + weight.T @ weight / noise**2
    encoder = weight @ torch.linalg.inv(precision) / noise**2
    width = precision.diagonal().rsqrt()
    shift = width * uniform(-5, 5, size)
    scale = width * uniform(math.log(0.05), math.log(20.0), size).exp()
    apart, freedom = float(uniform(0, 8)), float(uniform(5, 50))

    def approximate(x: Tensor) -> Any:
        return _law(kind, x @ encoder + shift, scale.expand(len(x), size), apart, freedom)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", approximate(x).to_event(1))

    steps = torch.linspace(-60, 60, POINTS)
    unit = _law(kind, torch.zeros(1), torch.ones(1), apart, freedom)
    log_q = unit.log_prob(steps.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_q.exp() * log_q).sum() * (120 / (POINTS - 1)) + scale.log()
    q = approximate(x)
    off = q.mean - x @ encoder
    spread = (precision.diagonal() * q.variance).sum(-1) + torch.einsum("ny,yz,nz->n", off, precision, off)
    log_p = 0.5 * torch.logdet(precision) - 0.5 * size * math.log(2 * math.pi) - 0.5 * spread
    return Program(model, guide), x, -entropy.sum() - log_p


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """Cases beyond five and fifty stated errors plus 1e-9 (relative to the KL, where that is above one)."""
    beyond = {5: 0, 50: 0}
    for number in range(seed, seed + count):
        program, x, truth = case(number)
        comparison = compare_posteriors(program, x, seed=number)
        off = (comparison.kl - truth).abs() / truth.clamp_min(1.0)
        for limit in beyond:
            beyond[limit] += int(bool((off > limit * comparison.error / truth.clamp_min(1.0) + limit / 5 * 1e-9).any()))
    return {"cases": count, "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_the_divergence_is_within_its_error() -> None:
    assert rates(30)["beyond_5"] == 0
