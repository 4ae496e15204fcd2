"""References of programs whose latent variables lie on simplices, Cholesky factors, ordered vectors and the like."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, special, stats
from torch import Tensor

from ppl_vae import (
    VAE,
    Conditional,
    Program,
    check_guide,
    compare_posteriors,
    log_evidence,
    reference_posterior,
)
from ppl_vae.families import LogisticNormal, Normal
from ppl_vae.networks import Linear
from ppl_vae.programs.joint import Joint

A = np.array([2.0, 3.0, 1.5])
Y = torch.tensor([0, 0, 1, 2, 0, 2, 0])
COUNTS = np.bincount(Y, minlength=3)
POINTS = torch.tensor([[0.3, 0.5], [-1.0, -0.7], [1.2, 0.1]])


def with_prior(model: Callable[..., Any]) -> Program:
    """A program whose guide is the prior, with a latent site for each of the model's."""
    return Program(model, poutine.block(model, hide=["y"]))


def dirichlet(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor(A)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


POSTERIOR = stats.dirichlet(A + COUNTS)
TRUTH = special.gammaln(A.sum()) - special.gammaln((A + COUNTS).sum())
TRUTH += (special.gammaln(A + COUNTS) - special.gammaln(A)).sum()


def test_a_simplex_by_quadrature() -> None:
    reference = reference_posterior(with_prior(dirichlet), {"y": Y}, "quadrature")
    assert reference.converged
    assert reference.shapes == {"p": (3,)}
    assert float(reference.log_evidence) == pytest.approx(TRUTH, abs=1e-8)
    np.testing.assert_allclose(reference.loc[0], POSTERIOR.mean(), atol=1e-8)
    np.testing.assert_allclose(reference.covariance[0], POSTERIOR.cov(), atol=1e-8)
    np.testing.assert_allclose(reference.sites["p"], POSTERIOR.mean()[None], atol=1e-8)


def test_a_simplex_by_chains() -> None:
    program = with_prior(dirichlet)
    annealed = reference_posterior(program, {"y": Y}, "ais", chains=32, temperatures=20)
    assert annealed.converged
    assert abs(float(annealed.log_evidence) - TRUTH) < 5 * float(annealed.error) < 1
    sampled = reference_posterior(program, {"y": Y}, "nuts", draws=40, warmup=50, chains=16)
    error = sampled.diagnostics["mcse_mean"]
    assert ((sampled.loc[0] - torch.tensor(POSTERIOR.mean())).abs() < 5 * error[0]).all()
    assert float(error.max()) < 0.02
    torch.testing.assert_close(sampled.draws.sum(-1), torch.ones(640, 1))


def exact(scale: float) -> Callable[..., None]:
    def guide(y: Tensor) -> None:
        pyro.sample("p", dist.Dirichlet(torch.tensor(A + COUNTS) * scale))

    return guide


def test_a_guide_on_a_simplex_is_compared_in_its_own_entries() -> None:
    for scale in (1.0, 0.5):
        program = Program(dirichlet, exact(scale))
        reference = reference_posterior(program, {"y": Y}, "quadrature")
        compared = compare_posteriors(program, {"y": Y}, reference=reference, draws=2000)
        check = check_guide(program, {"y": Y}, reference=reference)
        if scale == 1:
            assert abs(float(compared.kl)) < 1e-6
            assert check.trusted == "guide"
        else:
            wide = stats.dirichlet((A + COUNTS) / 2)
            ratio = np.sqrt(wide.var() / POSTERIOR.var())
            assert float(compared.scale_ratio) == pytest.approx(np.exp(np.log(ratio).mean()), rel=0.1)
            assert check.trusted == "reference"


def lkj(y: Tensor) -> None:
    factor = pyro.sample("L", dist.LKJCholesky(2, 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)


def test_a_correlation_by_scipys_quadrature() -> None:
    def density(r: float, power: int = 0) -> float:
        prior = (1 - r**2) ** 0.5 / (2 ** (2 * 1.5 - 1) * special.beta(1.5, 1.5))
        likelihood = stats.multivariate_normal(np.zeros(2), [[1, r], [r, 1]]).logpdf(POINTS.numpy()).sum()
        return float(r**power * prior * np.exp(likelihood))

    mass, first = (integrate.quad(density, -1, 1, args=(power,), epsabs=1e-13)[0] for power in (0, 1))
    reference = reference_posterior(with_prior(lkj), {"y": POINTS}, "quadrature")
    assert reference.converged
    assert float(reference.log_evidence) == pytest.approx(math.log(mass), abs=1e-6)
    factor = reference.sites["L"][0]
    assert float(factor[1, 0]) == pytest.approx(first / mass, abs=1e-6)
    assert factor[0].tolist() == [1, 0]
    compared = compare_posteriors(with_prior(lkj), {"y": POINTS}, reference=reference)
    assert all(bool(each.isfinite()) for each in vars(compared).values())  # in spite of constant entries
    check = check_guide(with_prior(lkj), {"y": POINTS}, reference=reference)
    assert bool(check.sites["L"].loc_error.isfinite().all())
    assert check.sites["L"].scale_ratio[0, 0].tolist() == [1, 1]


def test_constant_entries_leave_the_mixing_of_chains_alone() -> None:
    reference = reference_posterior(with_prior(lkj), {"y": POINTS}, "nuts", draws=40, warmup=40, chains=8)
    assert float(reference.diagnostics["r_hat"]) < 1.2
    assert reference.diagnostics["mcse_mean"][0, :2].tolist() == [0, 0]
    assert not bool(reference.diagnostics["contradicted"])


@pytest.mark.filterwarnings("ignore:Singular sample detected")
def test_a_positive_definite_matrix_has_wisharts_evidence() -> None:
    scale, df = 0.3 * np.eye(2), 4.0

    def model(y: Tensor) -> None:
        precision = pyro.sample("W", dist.Wishart(torch.tensor(df), torch.tensor(scale)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=y)

    n, outer = len(POINTS), POINTS.numpy().T @ POINTS.numpy()
    after = np.linalg.inv(np.linalg.inv(scale) + outer)
    truth = special.multigammaln((df + n) / 2, 2) - special.multigammaln(df / 2, 2) - n * math.log(math.pi)
    truth += (df + n) / 2 * np.linalg.slogdet(after)[1] - df / 2 * np.linalg.slogdet(scale)[1]
    reference = reference_posterior(with_prior(model), {"y": POINTS}, "quadrature", tolerance=1e-4)
    assert reference.converged
    assert abs(float(reference.log_evidence) - truth) < float(reference.error)
    np.testing.assert_allclose(reference.sites["W"][0], (df + n) * after, rtol=2e-3)


class Ordered(dist.TorchDistribution):
    """Two normal numbers in rising order."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.ordered_vector

    def __init__(self, batch: Any = ()) -> None:
        super().__init__(torch.Size(batch), torch.Size([2]))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Ordered":
        return Ordered(batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, *self.batch_shape, 2).sort(-1).values

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(value).sum(-1) + math.log(2)


def cut_points(y: Tensor) -> None:
    cut = pyro.sample("cut", Ordered())
    with pyro.plate("data", len(y)):
        below = torch.sigmoid(cut)
        shares = torch.stack([below[..., 0], below[..., 1] - below[..., 0], 1 - below[..., 1]], -1)
        pyro.sample("y", dist.Categorical(shares), obs=y)


def intervals(y: Tensor) -> None:
    z = pyro.sample("z", dist.Uniform(torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 3.0])).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z[..., 0], z[..., 1]), obs=y)


def test_two_parameters_have_the_evidence_of_scipys_quadrature() -> None:
    answers = np.array([0, 1, 2, 1, 1])

    def ordered(b: float, a: float) -> float:
        low, high = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        return math.exp(-(a * a + b * b) / 2) / math.pi * low * (high - low) ** 3 * (1 - high)

    mass, _ = integrate.dblquad(ordered, -8, 8, lambda a: a, 8, epsabs=1e-11, epsrel=1e-8)
    reference = reference_posterior(with_prior(cut_points), {"y": torch.tensor(answers)}, "quadrature")
    assert float(reference.log_evidence) == pytest.approx(math.log(mass), abs=1e-6)
    data = np.array([0.4, 2.0, -1.1])

    def on_intervals(s: float, m: float) -> float:
        return math.exp(-sum((y - m) ** 2 for y in data.tolist()) / (2 * s * s)) / s**3 / (2 * math.pi) ** 1.5 / 7.5

    mass, _ = integrate.dblquad(on_intervals, -1, 2, 0.5, 3, epsabs=1e-11, epsrel=1e-8)
    reference = reference_posterior(with_prior(intervals), {"y": torch.tensor(data)}, "quadrature")
    assert float(reference.log_evidence) == pytest.approx(math.log(mass), abs=1e-6)


def test_each_datum_has_a_simplex_of_its_own() -> None:
    parts = Conditional(Normal(4), Linear()), Conditional(LogisticNormal(3), Linear())
    vae = VAE(Conditional(LogisticNormal(3)), *parts).double()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    reference = reference_posterior(vae, x, "quadrature")
    assert reference.converged
    assert reference.loc.shape == (3, 3)
    torch.testing.assert_close(reference.loc.sum(-1), torch.ones(3))
    evidence = log_evidence(vae, x, samples=4000)
    assert ((reference.log_evidence - evidence.log_evidence).abs() < 5 * evidence.mc_se + 1e-3).all()


def test_bounds_that_other_latents_set_are_refused() -> None:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"the bounds of 'z' depend on other latent variables. Sample it from fixed"):
        Joint(with_prior(model), {"y": torch.zeros(2)})
