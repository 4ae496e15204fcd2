"""NUTS under attack: where it says that a datum has converged, its mean lies within five of its errors.

Cases 0 to 7 by turns; ranges are uniform, those with a factor of ten or more uniform in the logarithm. The guide is
often wrong: it is N(m, 0.1) with m from -3 to 3, so that a sampler that starts there sees one mode.

- square: z ~ N(0, 1), x ~ N(z^2, s) with s from 0.1 to 3, whose modes are equal;
- fold: the same with |z|;
- sine: x ~ N(sin(w z), s) with w from 0.5 to 6 and s from 0.1 to 1;
- mixture: z ~ two normals, 1 to 12 apart, of scales 0.2 to 2 and shares 0.1 to 0.9, x ~ N(z, s) with s from 1 to 10;
- tails: z ~ Student t(v) with v from 2 to 10, x ~ N(z, s) with s from 0.1 to 3 and x from 0 to 10;
- pole: z ~ Gamma(a, 1), x ~ Poisson(z) with a from 0.1 to 3;
- gaussian: z ~ N(0, I) in two to twelve dimensions, x ~ N(W z, s) with entries of W standard normal and s from 0.01;
- banana: z ~ N(0, I) in two dimensions, x ~ N(z_2 - b z_1^2, s) with b from 0.2 to 2 and s from 0.05 to 1.

The truth is known in closed form, or by sums over 200,001 points.
"""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import special, stats
from torch import Tensor
from twins import single

from ppl_vae import Program
from ppl_vae.infer.reference import reference_posterior

KINDS = 8


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _pair(prior: Any, likelihood: Any, guide_loc: float, positive: bool = False) -> Program:
    """The pair of one latent number and one observation, with a guide that is narrow and often wrong."""
    return single(prior, likelihood, (dist.LogNormal if positive else dist.Normal)(_double(guide_loc), 0.1))


def _vector(size: int, mean: Any, s: float) -> Program:
    """The pair z ~ N(0, I), x ~ N(mean(z), s)."""
    one = _double(1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0 * one, one).expand([size]).to_event(1))
            pyro.sample("x", dist.Normal(mean(z), s * one).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(one, 0.1).expand([size]).to_event(1))

    return Program(model, guide)


def case(seed: int) -> tuple[Program, Tensor, np.ndarray]:
    """A program, one datum and the posterior mean."""
    random, kind = np.random.default_rng(seed), seed % KINDS

    def draw(low: float, high: float) -> float:
        if low > 0 and high >= 10 * low:
            return float(np.exp(random.uniform(np.log(low), np.log(high))))
        return float(random.uniform(low, high))

    def known(log_prior: Any, log_likelihood: Any, reach: float = 40.0) -> np.ndarray:
        z = np.linspace(-reach, reach, 200_001)
        return np.array([special.softmax(log_prior(z) + log_likelihood(z)) @ z])

    wrong = draw(-3.0, 3.0)
    normal = dist.Normal(_double(0.0), 1.0)
    if kind < 3:
        s, w = draw(0.1, 3.0 if kind < 2 else 1.0), draw(0.5, 6.0)
        f = (torch.square, torch.abs, lambda z: (w * z).sin())[kind]
        x = float(f(_double(random.normal()))) + s * random.normal()
        mean = known(stats.norm.logpdf, lambda z: stats.norm.logpdf(x, f(_double(z)).numpy(), s))
        return _pair(normal, lambda z: dist.Normal(f(z), s), wrong), _double([[x]]), mean
    if kind == 3:
        apart, s, share = draw(1.0, 12.0), draw(1.0, 10.0), draw(0.1, 0.9)
        scales, places = np.array([draw(0.2, 2.0), draw(0.2, 2.0)]), np.array([-apart / 2, apart / 2])
        shares, x = np.array([share, 1 - share]), float(random.choice(places) + 2 * random.normal())
        log = np.log(shares) + stats.norm(places, np.hypot(scales, s)).logpdf(x)
        means = (places * s**2 + x * scales**2) / (s**2 + scales**2)
        parts = dist.Normal(_double(places), _double(scales))
        prior = dist.MixtureSameFamily(dist.Categorical(_double(shares)), parts)
        mean = np.array([special.softmax(log) @ means])
        return _pair(prior, lambda z: dist.Normal(z, s), wrong), _double([[x]]), mean
    if kind == 4:
        v, s, x = draw(2.0, 10.0), draw(0.1, 3.0), draw(0.0, 10.0)
        mean = known(stats.t(v).logpdf, lambda z: stats.norm.logpdf(x, z, s))
        return _pair(dist.StudentT(_double(v), 0.0, 1.0), lambda z: dist.Normal(z, s), wrong), _double([[x]]), mean
    if kind == 5:
        a = draw(0.1, 3.0)
        k = int(random.poisson(random.gamma(a)))
        program = _pair(dist.Gamma(_double(a), _double(1.0)), lambda z: dist.Poisson(z), wrong, positive=True)
        return program, _double([[float(k)]]), np.array([(a + k) / 2])
    if kind == 6:
        size, s = int(random.integers(2, 13)), draw(0.01, 1.0)
        weight = random.normal(size=(6, size))
        x = weight @ random.normal(size=size) + s * random.normal(size=6)
        mean = np.linalg.solve(np.eye(size) + weight.T @ weight / s**2, weight.T @ x / s**2)
        return _vector(size, lambda z: z @ _double(weight).mT, s), _double(x).unsqueeze(0), mean
    b, s = draw(0.2, 2.0), draw(0.05, 1.0)
    x = random.normal() - b * random.normal() ** 2 + s * random.normal()
    z = np.linspace(-9, 9, 200_001)
    share = special.softmax(stats.norm.logpdf(z) + stats.norm.logpdf(x, -b * z**2, np.hypot(1, s)))
    mean = np.array([0.0, share @ ((x + b * z**2) / (1 + s**2))])
    return _vector(2, lambda z: z[..., 1:] - b * z[..., :1] ** 2, s), _double([[x]]), mean


def miss(seed: int, **settings: int) -> tuple[float, bool]:
    """The miss of a case in its own errors, and whether NUTS says that it has converged; 0 if it does not."""
    program, x, mean = case(seed)
    reference = reference_posterior(program, x, "nuts", seed=seed, **settings)
    apart = (reference.loc - _double(mean)).abs() / (reference.diagnostics["mcse_mean"] + 2e-10)
    return float(apart.max()) if reference.converged else 0.0, reference.converged


def rates(count: int, seed: int = 0, **settings: int) -> dict[str, float]:
    """How many cases converge, and how many of these miss by more than five and fifty of their errors."""
    misses, settled = zip(*(miss(number, **settings) for number in range(seed, seed + count)), strict=True)
    beyond = {limit: sum(not value <= limit for value in misses) for limit in (5, 50)}
    return {"cases": count, "settled": sum(settled), "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_nuts_that_converged_is_right() -> None:
    told = {number: miss(number, draws=400, warmup=150) for number in (0, 4, 5)}  # two equal modes and one mode each
    assert all(value <= 5 for value, _ in told.values())
    assert [converged for _, converged in told.values()] == [False, True, True]


def test_draws_of_the_prior_contradict_chains_that_miss_a_mode() -> None:
    """Two chains, both in nine tenths of the mass, agree with each other."""
    shares, places = _double([0.9, 0.1]), _double([0.0, 8.0])
    prior = dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(places, 0.5))
    program, x = _pair(prior, lambda z: dist.Normal(z, 30.0), 0.0), _double([[0.0]])
    reference = reference_posterior(program, x, "nuts", draws=500, warmup=100, chains=2)
    assert float(reference.diagnostics["r_hat"]) < 1.01
    assert bool(reference.diagnostics["contradicted"])
    assert not reference.converged
