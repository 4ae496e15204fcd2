"""Quadrature's moments, rounding and memory; what it answers is held against closed forms in test_reference.py."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from twins import single

from ppl_vae import Program
from ppl_vae.infer.reference import reference_posterior
from ppl_vae.programs.joint import Joint


def curved(scale: float) -> Program:
    """Pair with z ~ N(0, I), x ~ N(exp z_0 + z_1^2, scale)."""

    def model(x: Tensor) -> None:
        one = torch.ones((), dtype=x.dtype)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0 * one, one).expand([2]).to_event(1))
            mean = z[..., :1].exp() + z[..., 1:] ** 2
            pyro.sample("x", dist.Normal(mean, scale * one).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0).expand([2]).to_event(1))

    return Program(model, guide)


def brute(x: np.ndarray, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Log p(x), mean and covariance by an even sum of 1,601 x 1,601 points, in double precision."""
    axis = np.linspace(-8, 8, 1601)
    first, second = np.meshgrid(axis, axis, indexing="ij")
    log = stats.norm.logpdf(first) + stats.norm.logpdf(second)
    log = log + sum(stats.norm.logpdf(value, np.exp(first) + second**2, scale) for value in x)
    share = np.exp(log - log.max())
    z = np.stack([first.ravel(), second.ravel()])
    return (
        log.max() + np.log(share.sum() * (axis[1] - axis[0]) ** 2),
        np.average(z, 1, share.ravel()),
        np.cov(z, aweights=share.ravel(), ddof=0),
    )


def test_moments_of_a_curved_posterior() -> None:
    """Its mean is not where its mode is, nor is it in the middle of the lattice."""
    x = torch.tensor([[0.5], [2.5]], dtype=torch.float64)
    reference = reference_posterior(curved(0.4), x, "quadrature")
    for row in range(2):
        log_evidence, loc, covariance = brute(x[row].numpy(), 0.4)
        assert float(reference.log_evidence[row]) == pytest.approx(log_evidence, abs=1e-6)
        np.testing.assert_allclose(reference.loc[row], loc, atol=1e-5)
        np.testing.assert_allclose(reference.covariance[row], covariance, atol=1e-5)
    assert float(reference.loc[1, 0].abs()) > 0.05


def test_the_error_covers_the_rounding_of_large_log_densities() -> None:
    """The sums agree better than the densities themselves are known."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 400), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.1))

    x = 3 + 10 * torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    reference = reference_posterior(Program(model, guide), x, "quadrature")
    wide = x.numpy().astype(np.longdouble)  # of N(0, I / 4 + 11'), by Sherman and Morrison's formula
    quadratic = 4 * (wide**2).sum(1) - 16 * wide.sum(1) ** 2 / 1601
    exact = (-0.5 * (quadratic + 400 * np.log(np.pi / 2) + np.log(np.longdouble(1601)))).astype(float)
    assert exact.max() < -5e4
    miss = np.abs(reference.log_evidence.numpy() - exact)
    assert (miss < reference.error.numpy()).all()
    assert (reference.error.numpy() > 4e-16 * np.abs(exact)).all()
    assert reference.error.max() < 1e-6


def test_no_evaluation_holds_more_than_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = Joint.log_probs

    def noted(self: Joint, u: Tensor) -> Any:
        sizes.append(u.shape[0] * u.shape[1] * (1 + u.shape[2]))
        return plain(self, u)

    monkeypatch.setattr(Joint, "log_probs", noted)
    x = torch.linspace(0.5, 3.0, 12, dtype=torch.float64).unsqueeze(-1)
    whole = reference_posterior(curved(0.4), x, "quadrature")
    assert max(sizes) > 20_000
    sizes.clear()
    few = reference_posterior(curved(0.4), x, "quadrature", entries=5000)
    assert max(sizes) <= 5000
    assert ((whole.log_evidence - few.log_evidence).abs() < whole.error + few.error).all()


def test_a_low_mode_that_draws_of_the_prior_reach_is_not_left_out() -> None:
    """One in seven of the posterior's mass lies where all densities are lower than at most draws."""
    weights, places = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.0, 6.0]).double()
    prior = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(places, torch.tensor([0.5, 2.0]).double()))
    program = single(prior, lambda z: dist.Normal(z, 8.0), dist.Normal(torch.zeros(()).double(), 0.5))
    x = torch.linspace(-8, 12, 9, dtype=torch.float64).unsqueeze(-1)
    reference = reference_posterior(program, x)
    assert reference.method == "quadrature"  # a mixture is not taken for linear-Gaussian
    exact = np.log(sum(w * stats.norm(m, np.hypot(s, 8)).pdf(x[:, 0]) for w, m, s in ((0.9, 0, 0.5), (0.1, 6, 2))))
    assert (np.abs(reference.log_evidence.numpy() - exact) <= reference.error.numpy()).all()
    assert reference.error.max() < 1e-7


def test_a_density_that_is_infinite_somewhere_has_no_figure_to_rely_on() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.full((len(x),), 0.1).double(), 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma(0.1 + x[:, 0], 2.0))

    reference = reference_posterior(Program(model, guide), torch.zeros(1, 1).double(), "quadrature")
    exact = 0.1 * np.log(0.5)
    assert not reference.converged or abs(float(reference.log_evidence) - exact) <= float(reference.error)
