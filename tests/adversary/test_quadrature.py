"""Quadrature under attack: log p(x) and the posterior mean lie within five of their stated errors.

Cases 0 to 8 by turns; ranges are uniform, those with a factor of ten or more uniform in the logarithm:

- sine: z ~ N(0, 1), x ~ N(sin(w z), s) with w from 1 to 60 and s from 0.03 to 0.5;
- bounded: z ~ Beta(a, b), x ~ Binomial(m, z) with a and b from 0.1 to 5 and m from 1 to 40; x is at 0 or m in half;
- pole: z ~ Gamma(a, 1), x ~ Poisson(z) with a from 0.03 to 1; x is 0 in half of the cases;
- tails: z ~ Student t(v), x ~ Cauchy(z, s) with v from 1 to 10, s from 0.1 to 10 and x from 0.1 to 1,000;
- mixture: z ~ two normals, 1 to 20 apart, of scales 0.02 to 2 and shares 0.02 to 0.98, x ~ N(z, s), s from 0.1 to 10;
- fold: z ~ N(0, 1), x ~ N(f(z), s) with f one of |z|, z^2, e^z, s from 0.001 to 2;
- banana: z ~ N(0, I) in two dimensions, x ~ N(z_2 - b z_1^2, s) with b from 0.2 to 4 and s from 0.02 to 1;
- ring: z ~ N(0, I) in two or three dimensions, x ~ N(|z|, s) with x from 0.5 to 4 and s from 0.03 to 1;
- product: two or three independent latents, each with a likelihood of its own from the sines (w up to 6), folds and
  mixtures above (s from 0.1 up).

The truth is known in closed form, or by sums over 400,001 points along one axis. A miss of 1e-9 nats, or of 1e-7
standard deviations of the mean, is always allowed.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from ppl_vae import Program
from ppl_vae.infer.reference import reference_posterior

KINDS = 9
Part = tuple[Any, Callable[[Tensor], Any], float, float, float]  # prior, likelihood, x, log p(x), E[z|x]


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _by_sum(prior: Any, likelihood: Callable[[Tensor], Any], x: float, points: int = 400_001) -> tuple[float, float]:
    """Log p(x) and E[z|x] by an even sum in t with z = 3 sinh t, from -1.6e6 to 1.6e6, and again about its mode."""
    limits = -14.0, 14.0
    for _ in range(3):
        t = torch.linspace(*limits, points, dtype=torch.float64)
        z = 3 * t.sinh()
        log = prior.log_prob(z) + likelihood(z).log_prob(_double(x)) + (3 * t.cosh()).log()
        heavy = (log > log.max() - 60).nonzero().flatten()
        first, last = max(int(heavy[0]) - 9, 0), min(int(heavy[-1]) + 9, points - 1)
        span, limits = limits, (float(t[first]), float(t[last]))
    step = (span[1] - span[0]) / (points - 1)
    return float(log.logsumexp(0)) + math.log(step), float((log.softmax(0) * z).sum())


class _Ranges:
    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def __call__(self, low: float, high: float) -> float:
        if low > 0 and high >= 10 * low:
            return float(math.exp(self.random.uniform(math.log(low), math.log(high))))
        return float(self.random.uniform(low, high))


def _sine(draw: _Ranges, most: float = 60.0, least: float = 0.03) -> Part:
    w, s = draw(1.0, most), draw(least, 0.5)
    x = math.sin(w * draw.random.normal()) + s * draw.random.normal()
    prior = dist.Normal(_double(0.0), 1.0)

    def likelihood(z: Tensor) -> Any:
        return dist.Normal((w * z).sin(), s)

    return prior, likelihood, x, *_by_sum(prior, likelihood, x)


def _bounded(draw: _Ranges) -> Part:
    a, b, m = draw(0.1, 5.0), draw(0.1, 5.0), int(draw(1, 41))
    k = int(draw.random.choice([0, m])) if draw.random.random() < 0.5 else int(draw.random.integers(m + 1))
    truth = float(stats.betabinom(m, a, b).logpmf(k))
    prior, likelihood = dist.Beta(_double(a), _double(b)), lambda z: dist.Binomial(m, z)
    return prior, likelihood, k, truth, (a + k) / (a + b + m)


def _pole(draw: _Ranges) -> Part:
    a = draw(0.03, 1.0)
    k = 0 if draw.random.random() < 0.5 else int(draw.random.integers(5))
    truth = float(special.gammaln(a + k) - special.gammaln(a) - special.gammaln(k + 1) - (a + k) * math.log(2))
    return dist.Gamma(_double(a), _double(1.0)), lambda z: dist.Poisson(z), k, truth, (a + k) / 2


def _tails(draw: _Ranges) -> Part:
    v, s, x = draw(1.0, 10.0), draw(0.1, 10.0), draw(0.1, 1000.0)
    prior = dist.StudentT(_double(v), 0.0, 1.0)

    def likelihood(z: Tensor) -> Any:
        return dist.Cauchy(z, s)

    return prior, likelihood, x, *_by_sum(prior, likelihood, x)


def _mixture(draw: _Ranges, least: float = 0.1) -> Part:
    apart, scales = draw(1.0, 20.0), np.array([draw(0.02, 2.0), draw(0.02, 2.0)])
    share, s = draw(0.02, 0.98), draw(least, 10.0)
    shares, places = np.array([share, 1 - share]), np.array([-apart / 2, apart / 2])
    x = float(draw.random.choice(places) + 2 * draw.random.normal())
    log = np.log(shares) + stats.norm(places, np.hypot(scales, s)).logpdf(x)
    means = (places * s**2 + x * scales**2) / (s**2 + scales**2)
    prior = dist.MixtureSameFamily(dist.Categorical(_double(shares)), dist.Normal(_double(places), _double(scales)))
    return prior, lambda z: dist.Normal(z, s), x, float(special.logsumexp(log)), float(special.softmax(log) @ means)


def _fold(draw: _Ranges, least: float = 0.001) -> Part:
    s, f = draw(least, 2.0), (torch.abs, torch.square, torch.exp)[draw.random.integers(3)]
    x = float(f(_double(draw.random.normal()))) + s * draw.random.normal()
    prior = dist.Normal(_double(0.0), 1.0)

    def likelihood(z: Tensor) -> Any:
        return dist.Normal(f(z), s)

    return prior, likelihood, x, *_by_sum(prior, likelihood, x)


def _product(parts: list[Part]) -> tuple[Program, Tensor, float, list[float]]:
    """The program of independent latents, each with its own observation."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for number, (prior, likelihood, *_) in enumerate(parts):
                z = pyro.sample(f"z_{number}", prior)
                pyro.sample(f"x_{number}", likelihood(z), obs=x[:, number])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for number, (prior, *_) in enumerate(parts):
                pyro.sample(f"z_{number}", prior)

    x = _double([[float(part[2]) for part in parts]])
    return Program(model, guide), x, sum(part[3] for part in parts), [part[4] for part in parts]


def _curve(size: int, f: Callable[[Tensor], Tensor], s: float, x: float) -> tuple[Program, Tensor]:
    """The pair z ~ N(0, I), x ~ N(f(z), s)."""
    one = _double(1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0 * one, one).expand([size]).to_event(1))
            pyro.sample("x", dist.Normal(f(z), s * one), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0 * one, one).expand([size]).to_event(1))

    return Program(model, guide), _double([[x]])


def _banana(draw: _Ranges) -> tuple[Program, Tensor, float, list[float]]:
    """Given z_1, x is normal with mean -b z_1^2 and variance 1 + s^2, and z_2 has a normal posterior."""
    b, s = draw(0.2, 4.0), draw(0.02, 1.0)
    x = draw.random.normal() - b * draw.random.normal() ** 2 + s * draw.random.normal()
    z = np.linspace(-9, 9, 400_001)
    log = stats.norm.logpdf(z) + stats.norm.logpdf(x, -b * z**2, math.hypot(1, s))
    second = float(special.softmax(log) @ ((x + b * z**2) / (1 + s**2)))
    truth = float(special.logsumexp(log)) + math.log(z[1] - z[0])
    program, data = _curve(2, lambda z: z[..., 1] - b * z[..., 0] ** 2, s, x)
    return program, data, truth, [0.0, second]


def _ring(draw: _Ranges) -> tuple[Program, Tensor, float, list[float]]:
    """The distance r = |z| has a chi distribution; the mean is 0."""
    size, x, s = int(draw.random.integers(2, 4)), draw(0.5, 4.0), draw(0.03, 1.0)
    r = np.linspace(1e-9, x + 12, 400_001)
    log = stats.chi(size).logpdf(r) + stats.norm.logpdf(x, r, s)
    truth = math.log(integrate.simpson(np.exp(log - log.max()), x=r)) + float(log.max())
    program, data = _curve(size, lambda z: z.norm(dim=-1), s, x)
    return program, data, truth, [0.0] * size


def case(seed: int) -> tuple[Program, Tensor, float, list[float]]:
    """A program, one datum, log p(x) and the posterior mean."""
    draw, kind = _Ranges(seed), seed % KINDS
    if kind < 6:
        return _product([(_sine, _bounded, _pole, _tails, _mixture, _fold)[kind](draw)])
    if kind < 8:
        return (_banana, _ring)[kind - 6](draw)
    makers: list[Callable[[], Part]]
    makers = [lambda: _sine(draw, 6.0, 0.1), lambda: _fold(draw, 0.1), lambda: _mixture(draw)]
    return _product([makers[draw.random.integers(3)]() for _ in range(draw.random.integers(2, 4))])


def miss(seed: int) -> tuple[float, bool]:
    """The miss of a case in its own errors, the larger of evidence and mean (in standard deviations), if it settled."""
    program, x, truth, loc = case(seed)
    reference = reference_posterior(program, x, "quadrature", seed=seed)
    allowed = float(reference.error) + 2e-10
    off = abs(float(reference.log_evidence) - truth) / allowed
    scale = reference.covariance[0].diagonal().sqrt()
    apart = float(((reference.loc[0] - _double(loc)).abs() / scale).max())
    shift = apart / (float(reference.diagnostics["moment_error"]) + 2e-8)
    return max(off, 0.0 if math.isnan(shift) else shift), reference.converged


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """How many cases settle, and how many miss by more than five and fifty of their stated errors."""
    misses, settled = zip(*(miss(number) for number in range(seed, seed + count)), strict=True)
    beyond = {limit: sum(not value <= limit for value in misses) for limit in (5, 50)}
    return {"cases": count, "settled": sum(settled), "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_quadrature_stays_within_its_errors() -> None:
    told = rates(36)
    assert told["beyond_5"] == 0
    assert told["settled"] >= 27


@pytest.mark.parametrize("seed", [1002734, 1002968])
def test_modes_are_found_that_lie_far_out_in_several_coordinates(seed: int) -> None:
    """Of mixtures of shares 0.03 and 0.08, and 0.04 and 0.02, the posterior is where few draws of the prior are."""
    assert miss(seed)[0] < 5
