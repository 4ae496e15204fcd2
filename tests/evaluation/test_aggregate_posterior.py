"""The aggregate posterior of guides that are known exactly, by numerical integrals, and the errors by their spread."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from ppl_vae import Program
from ppl_vae.evaluation.aggregate_posterior import aggregate, mmd

LOC, SCALE = np.array([-1.5, -0.2, 0.1, 0.9, 2.0]), np.array([0.4, 0.7, 0.3, 0.9, 0.5])


def known() -> tuple[Program, Tensor]:
    """Give a standard normal prior with a guide whose five answers are `LOC` and `SCALE`."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], x[:, 1]))

    return Program(model, guide), torch.from_numpy(np.stack([LOC, SCALE], -1))


def test_all_figures_are_the_integrals_that_define_them() -> None:
    parts = [stats.norm(m, s) for m, s in zip(LOC, SCALE, strict=True)]

    def expected(of: Any) -> float:
        """Average over the data the expectation of a function of z and the datum."""
        return np.mean([integrate.quad(lambda z, i=i: parts[i].pdf(z) * of(z, i), -9, 9)[0] for i in range(5)])

    def mixture(z: float, left_out: int | None = None) -> float:
        return np.log(np.mean([q.pdf(z) for i, q in enumerate(parts) if i != left_out]))

    wanted = {
        "rate": expected(lambda z, i: parts[i].logpdf(z) - stats.norm.logpdf(z)),
        "mutual_information": expected(lambda z, i: parts[i].logpdf(z) - mixture(z)),
        "upper": expected(lambda z, i: parts[i].logpdf(z) - mixture(z, i)),
        "kl": expected(lambda z, i: mixture(z) - stats.norm.logpdf(z)),
    }
    draws = 20_000
    found = aggregate(*known(), draws=draws)
    for name, value in wanted.items():
        assert abs(getattr(found, name) - value) < 5 * 3 / (5 * draws) ** 0.5, name  # no term spreads by more than 3
    assert wanted["upper"] - wanted["mutual_information"] > 0.2
    assert found.rate == pytest.approx(found.mutual_information + found.kl)


def test_the_error_is_the_spread_over_samples_of_data() -> None:
    """Of the largest of the four: here the rate's, as the answers are at a varying distance from the prior."""
    program, _ = known()
    generator = torch.Generator().manual_seed(0)
    figures, errors = [], []
    for seed in range(200):
        loc = 6 * torch.rand(40, 1, generator=generator, dtype=torch.float64) - 3
        found = aggregate(program, torch.cat([loc, torch.full_like(loc, 0.3)], 1), seed=seed)
        figures.append([found.rate, found.mutual_information, found.upper])
        errors.append(found.error)
    spread = np.std(figures, 0, ddof=1)
    assert spread.max() == spread[0]
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / spread[0] < 1.25


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_the_error_of_mmd_is_its_spread(shift: float) -> None:
    generator = torch.Generator().manual_seed(1)
    found = [mmd(*(torch.randn(2, 60, 2, generator=generator) + shift * torch.eye(2)[:, None])) for _ in range(600)]
    values, errors = np.array(found).T
    assert 0.85 < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 1.2
