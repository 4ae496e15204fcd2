"""The verdict of calibration: exact guides of hard posteriors, few simulations and few draws, that try to fail.

Each case is a conjugate pair, whose guide is its exact posterior, with 20 to 400 simulations of 1 to 200 draws, at the
level 0.01. The pairs, with parameters that are uniform in their logarithm:

- `linear`: 1 to 6 latents and features, weights N(0, 1), noise from 0.01 to 10, with a full covariance.
- `beta`: Beta(a, b) and a binomial count of 1 to 50, a and b from 0.1 to 10: draws pile up at 0 and 1.
- `gamma`: Gamma(a, 1) and a Poisson count, a from 0.1 to 10.
- `precision`: Gamma(a, 1), a from 0.3 to 10, the precision of N(0, 1 / z): heavy tails.
- `discrete`: one of 2 to 6 values, and a normal about it: all ranks are ties.

An exact guide may be called miscalibrated in 1 % of the cases.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

from ppl_vae import Program
from ppl_vae.evaluation.calibration import Calibration, calibrate

KINDS = ("linear", "beta", "gamma", "precision", "discrete")
LEVEL = 0.01
FIVE, FIFTY = 2 * stats.norm.sf(5), 1e-300  # p-values of five standard errors, and of about fifty, or as far as they go


def pair(rng: np.random.Generator, kind: str, wrong: float = 1.0) -> tuple[Program, int]:
    """A program and how many features its data have; `wrong` scales the guide's spread or its information."""

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    a, b, count, features = between(0.1, 10), between(0.1, 10), int(rng.integers(1, 51)), 1
    if kind == "linear":
        latents, features, noise = int(rng.integers(1, 7)), int(rng.integers(1, 7)), between(0.01, 10)
        weight = torch.from_numpy(rng.normal(size=(features, latents)))
        covariance = torch.linalg.inv(torch.eye(latents) + weight.T @ weight / noise**2)
        factor = wrong * torch.linalg.cholesky((covariance + covariance.T) / 2)
        prior: Any = dist.Normal(torch.zeros(latents), 1.0).to_event(1)

        def observed(z: Tensor) -> Any:
            return dist.Normal(z @ weight.T, noise).to_event(1)

        def posterior(x: Tensor) -> Any:
            return dist.MultivariateNormal(x @ weight @ covariance / noise**2, scale_tril=factor)

    elif kind == "beta":
        prior = dist.Beta(a, b)

        def observed(z: Tensor) -> Any:
            return dist.Binomial(count, z)

        def posterior(x: Tensor) -> Any:
            return dist.Beta(a + x[:, 0] / wrong, b + (count - x[:, 0]) / wrong)

    elif kind == "gamma":
        prior = dist.Gamma(a, 1.0)

        def observed(z: Tensor) -> Any:
            return dist.Poisson(z)

        def posterior(x: Tensor) -> Any:
            return dist.Gamma(a + x[:, 0], 1 + 1 / wrong)

    elif kind == "precision":
        shape = max(a, 0.3)
        prior = dist.Gamma(shape, 1.0)

        def observed(z: Tensor) -> Any:
            return dist.Normal(0.0, z**-0.5)

        def posterior(x: Tensor) -> Any:
            return dist.Gamma(shape + 0.5 / wrong, 1 + 0.5 * x[:, 0] ** 2)

    else:
        loc = torch.from_numpy(rng.normal(size=int(rng.integers(2, 7))))
        logits, noise = torch.from_numpy(rng.normal(size=len(loc))), between(0.1, 3)
        prior = dist.Categorical(logits=logits)

        def observed(z: Tensor) -> Any:
            return dist.Normal(loc[z], noise)

        def posterior(x: Tensor) -> Any:
            return dist.Categorical(logits=logits + dist.Normal(loc, wrong * noise).log_prob(x[:, :1]))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            q = observed(pyro.sample("z", prior))
            pyro.sample("x", q, obs=x if q.event_shape else x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", posterior(x))

    return Program(model, guide), features


def cases(seed: int, count: int) -> Iterator[Calibration]:
    """Calibrations of exact guides of all kinds in turn."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        program, features = pair(rng, KINDS[number % len(KINDS)])
        simulations, draws = (int(10 ** rng.uniform(low, high)) for low, high in ((1.3, 2.6), (0, 2.3)))
        yield calibrate(
            program, torch.zeros(1, features), draws=draws, simulations=simulations, level=LEVEL, seed=seed + number
        )


def score(calibration: Calibration) -> float:
    """The p-value of all tests together."""
    return calibration.p_value


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """How many exact guides are called miscalibrated, and with a p-value as of five and of fifty standard errors."""
    counts = Counter(cases=0, false_alarms=0, beyond_5=0, beyond_50=0)
    for calibration in cases(seed, count):
        value = score(calibration)
        counts.update(
            cases=1, false_alarms=int(value < LEVEL), beyond_5=int(value < FIVE), beyond_50=int(value < FIFTY)
        )
    return dict(counts)


def test_exact_guides_seldom_fail() -> None:
    counts = rates(200, seed=1)
    assert counts["false_alarms"] <= stats.binom(200, LEVEL).ppf(0.999)
    assert counts["beyond_5"] == 0


def test_wrong_guides_fail() -> None:
    """Twice the spread, or half the information."""
    rng = np.random.default_rng(3)
    for kind in ("linear", "gamma", "precision"):
        program, features = pair(rng, kind, wrong=2.0)
        assert calibrate(program, torch.zeros(1, features), simulations=2000).verdict == "miscalibrated"


def main() -> None:
    """Print the rates of 1,000 cases."""
    print("calibration", rates(1000))  # noqa: T201


if __name__ == "__main__":
    main()
