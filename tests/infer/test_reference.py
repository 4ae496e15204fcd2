"""Reference posteriors: closed form, quadrature, annealing and NUTS agree with the truth and with each other."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from twins import TWINS, array, randomise, single

from ppl_vae import VAE, Conditional, Program
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer import quadrature
from ppl_vae.infer.reference import Reference, reference_posterior, strongest
from ppl_vae.networks import MLP

FEW = sorted(set(TWINS) - {"feature_scale", "more_latents_than_features", "two_level", "state_space", "inner_plate"})


def nonlinear(family: str, latents: int = 2) -> tuple[VAE, Tensor]:
    """A small VAE with a tanh network, random weights, and data from it."""
    kind: Any = Bernoulli(12) if family == "Bernoulli" else Normal(12, scale="shared")
    likelihood, posterior = (Conditional(part, MLP(hidden=[8], activation="tanh")) for part in (kind, Normal(latents)))
    vae = VAE(Conditional(StandardNormal(latents)), likelihood, posterior).double()
    randomise(vae)
    return vae, vae.sample(2, seed=3)


@pytest.mark.parametrize("twin", TWINS)
def test_auto_takes_the_closed_form_of_every_twin(twin):
    truth = TWINS[twin]()
    reference = reference_posterior(truth.program, truth.batch, points=10)
    assert reference.method == strongest(truth.program, truth.batch) == "closed-form"
    assert reference.draws is None
    assert reference.converged
    assert torch.equal(reference.error, torch.zeros(6))
    np.testing.assert_allclose(array(reference.log_evidence), truth.log_evidence, atol=1e-9)
    np.testing.assert_allclose(array(reference.loc), truth.loc, atol=1e-9)
    np.testing.assert_allclose(array(reference.covariance), truth.covariance, atol=1e-9)


@pytest.mark.parametrize("twin", FEW)
def test_quadrature_meets_the_closed_form_of_the_twins(twin):
    truth = TWINS[twin]()
    reference = reference_posterior(truth.program, truth.batch, "quadrature")
    assert reference.method == "quadrature"
    assert reference.converged
    miss = np.abs(array(reference.log_evidence) - truth.log_evidence)
    assert (miss <= array(reference.error)).all()
    assert (reference.error < 1e-6).all()
    np.testing.assert_allclose(array(reference.loc), truth.loc, atol=1e-8)
    np.testing.assert_allclose(array(reference.covariance), truth.covariance, atol=1e-8)


@pytest.mark.parametrize(
    ("site", "shapes"),
    [
        ("two_level", {"top": (2,), "z": (3,)}),
        ("inner_plate", {"u": (), "z": (3,)}),
        ("state_space", {f"z_{t}": () for t in range(6)}),
    ],
)
def test_latent_sites_come_back_by_name(site, shapes):
    truth = TWINS[site]()
    reference = reference_posterior(truth.program, truth.batch)
    assert {name: tuple(value.shape) for name, value in reference.sites.items()} == {
        name: (6, *shape) for name, shape in shapes.items()
    }
    joined = torch.cat([value.reshape(6, -1) for value in reference.sites.values()], 1)
    np.testing.assert_allclose(array(joined), truth.loc, atol=1e-9)


def folded() -> Program:
    """The pair whose posterior has modes near x and -x, as narrow as the second number of the datum says."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.abs(), x[:, 1]), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return Program(model, guide)


def exact_folded(x: Tensor) -> Any:
    """Log p(x) of the folded pair: twice the half of a Gaussian that lies above nought."""
    value, scale = array(x).T
    whole = np.sqrt(1 + scale**2)
    return np.log(2) + stats.norm(0, whole).logpdf(value) + stats.norm.logcdf(value / (scale * whole))


MIXED = ((0.3, -2.0, 0.5), (0.7, 1.0, 1.5))  # weight, mean and scale of each component of a prior


def singles() -> dict[str, tuple[Program, list[float], Any]]:
    def contaminated(z: Tensor) -> Any:
        scales = torch.tensor([1.0, 1e-2])
        return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(z.unsqueeze(-1), scales))

    weights, means, scales = torch.tensor(MIXED).T
    mixed = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales))
    return {
        "gamma_poisson": (
            single(dist.Gamma(2.0, 1.0), dist.Poisson, dist.Gamma(2.0, 1.0)),
            [3.0, 0.0, 40.0],
            stats.nbinom(2, 0.5).logpmf,
        ),
        "beta_bernoulli": (
            single(dist.Beta(2.0, 1.0), dist.Bernoulli, dist.Beta(1.0, 1.0)),
            [0.0, 1.0],
            stats.bernoulli(2 / 3).logpmf,
        ),
        "uniform_bernoulli": (
            single(dist.Uniform(0.0, 2.0), lambda z: dist.Bernoulli(z / 2), dist.Uniform(0.0, 2.0)),
            [0.0, 1.0],
            stats.bernoulli(0.5).logpmf,
        ),
        "tails_of_cauchy": (
            single(dist.Cauchy(0.0, 1.0), lambda z: dist.Cauchy(z, 1.0), dist.Normal(0.0, 1.0)),
            [0.0, 4.0, -300.0],
            stats.cauchy(0, 2).logpdf,
        ),
        "far_from_guide_and_prior": (
            single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1e-4), dist.Normal(-3.0, 0.1)),
            [0.5, 12.0, -60.0],
            stats.norm(0, math.sqrt(1 + 1e-8)).logpdf,
        ),
        "two_modes": (
            single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z.abs(), 0.01), dist.Normal(0.0, 1.0)),
            [2.0, 0.7],
            lambda x: np.log(2) + stats.norm(0, math.sqrt(1 + 1e-4)).logpdf(x),
        ),
        "mixture_prior": (
            single(mixed, lambda z: dist.Normal(z, 0.5), dist.Normal(0.0, 2.0)),
            [0.5, -2.5],
            lambda x: np.log(sum(w * stats.norm(m, np.sqrt(s**2 + 0.25)).pdf(x) for w, m, s in MIXED)),
        ),
        "spike_on_a_hill": (
            single(dist.Normal(0.0, 1.0), contaminated, dist.Normal(0.0, 1.0)),
            [0.5, 1.7, -2.2],
            lambda x: np.log(sum(stats.norm(0, np.sqrt(1 + scale**2)).pdf(x) for scale in (1.0, 1e-2)) / 2),
        ),
    }


@pytest.mark.parametrize("name", singles())
def test_quadrature_finds_place_and_width_of_any_posterior(name):
    program, values, exact = singles()[name]
    x = torch.tensor(values).unsqueeze(-1)
    reference = reference_posterior(program, x, "quadrature")
    miss = np.abs(array(reference.log_evidence) - exact(np.array(values)))
    assert (miss < 2e-7).all()
    assert (miss <= array(reference.error) + 1e-13).all()
    assert reference.converged
    if name == "two_modes":
        np.testing.assert_allclose(array(reference.loc), 0, atol=1e-9)
        np.testing.assert_allclose(array(reference.covariance).ravel(), np.square(values), rtol=1e-3)
    if name == "gamma_poisson":
        np.testing.assert_allclose(array(reference.loc).ravel(), (np.array(values) + 2) / 2, rtol=1e-7)
        np.testing.assert_allclose(array(reference.covariance).ravel(), (np.array(values) + 2) / 4, rtol=1e-6)


def test_quadrature_short_of_points_says_so():
    program, values, _ = singles()["two_modes"]
    x = torch.tensor(values).unsqueeze(-1)
    reference, fine = (reference_posterior(program, x, "quadrature", points=points) for points in (40, 2**18))
    assert not reference.converged
    assert (reference.error > 1).all()
    assert ((reference.log_evidence - fine.log_evidence).abs() <= reference.error).all()


def test_blocks_of_quadrature_do_not_change_the_answer():
    truth = TWINS["fixed_scale"]()
    for entries in (12_000, 3_000):  # lattices that are looked at in pieces; blocks of two data
        reference = reference_posterior(truth.program, truth.batch, "quadrature", points=5000, entries=entries)
        np.testing.assert_allclose(array(reference.log_evidence), truth.log_evidence, atol=1e-8)


def test_a_datum_has_the_same_answer_alone_and_among_others():
    x = torch.tensor([[1.0, 1e-4], [0.5, 0.5], [0.2, 0.2], [2.0, 1e-3]], dtype=torch.float64)
    together = reference_posterior(folded(), x, "quadrature")
    assert together.diagnostics["settled"].tolist() == [True] * 4
    rounding = 1e-12  # of the density itself: z - x, in units of 1e-4
    assert (np.abs(array(together.log_evidence) - exact_folded(x)) <= array(together.error) + rounding).all()
    for row in range(4):
        alone = reference_posterior(folded(), x[row : row + 1], "quadrature")
        assert (
            abs(alone.log_evidence[0] - together.log_evidence[row]) <= alone.error[0] + together.error[row] + rounding
        )
        np.testing.assert_allclose(array(alone.covariance[0]), array(together.covariance[row]), rtol=1e-6)


def test_one_unsettled_datum_leaves_the_others_settled():
    x = torch.tensor([[1.0, 1e-4], [0.5, 0.5], [2.0, 1e-3], [0.2, 0.2]], dtype=torch.float64)
    reference = reference_posterior(folded(), x, "quadrature", points=500, tolerance=1e-5)
    assert reference.diagnostics["settled"].tolist() == [False, True, False, True]
    assert reference.diagnostics["settled"].dtype == torch.bool
    assert not reference.converged
    miss = np.abs(array(reference.log_evidence) - exact_folded(x))
    assert (miss <= array(reference.error)).all()
    assert (reference.error[reference.diagnostics["settled"]] < 1e-5).all()
    assert (reference.error[~reference.diagnostics["settled"]] > 1e-2).all()


def bent() -> tuple[VAE, Tensor]:
    """A VAE whose posteriors have several bent ridges, and data from it."""
    kinds: tuple[Any, Any] = Normal(3, scale=0.3), Normal(2)
    likelihood, posterior = (Conditional(kind, MLP(hidden=[12])) for kind in kinds)
    vae = VAE(Conditional(StandardNormal(2)), likelihood, posterior).double()
    randomise(vae)
    with torch.no_grad():
        next(vae.likelihood.parameters()).mul_(3)
    return vae, vae.sample(40, seed=3)


def test_the_stated_error_of_quadrature_covers_the_truth(monkeypatch):
    vae, x = bent()
    fine = reference_posterior(vae, x, "quadrature", tolerance=1e-10)
    assert fine.converged

    def excess(tolerance: float) -> Tensor:
        reference = reference_posterior(vae, x, "quadrature", tolerance=tolerance)
        assert reference.converged
        assert (reference.error < 1.01 * tolerance).all()
        return (reference.log_evidence - fine.log_evidence).abs() - reference.error - fine.error

    for tolerance in (1e-1, 1e-2, 1e-3, 1e-5):
        assert (excess(tolerance) <= 0).all()
    monkeypatch.setattr(quadrature.LatticeSum, "halved", 0.0)  # two sums agree by chance
    assert any((excess(tolerance) > 0).any() for tolerance in (1e-1, 1e-2, 1e-3, 1e-5))


@pytest.mark.parametrize("family", ["Bernoulli", "Normal"])
def test_quadrature_annealing_and_nuts_agree_on_a_nonlinear_pair(family):
    vae, x = nonlinear(family)
    lattice = reference_posterior(vae, x)
    assert lattice.method == strongest(vae, x) == "quadrature"
    assert lattice.converged
    axis = torch.linspace(-9, 9, 601)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = vae.prior().log_prob(grid) + vae.likelihood(grid.unsqueeze(1)).log_prob(x).T
        brute = log_joint.logsumexp(1) + 2 * math.log(18 / 600)
        shares = log_joint.softmax(1)
    np.testing.assert_allclose(array(lattice.log_evidence), array(brute), atol=1e-6)
    np.testing.assert_allclose(array(lattice.loc), array(shares @ grid), atol=1e-6)

    annealed = reference_posterior(vae, x, "ais", chains=200, temperatures=30, leapfrog=5)
    assert annealed.converged
    assert annealed.draws is not None
    assert annealed.draws.shape == (200, 2, 2)
    assert (annealed.log_evidence - lattice.log_evidence).abs().lt(5 * annealed.error).all()
    assert (annealed.error < 0.1).all()
    sampled = reference_posterior(vae, x, "nuts", draws=500, warmup=150)
    assert sampled.converged
    assert sampled.log_evidence.isnan().all()
    spread = lattice.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    for reference in (annealed, sampled):
        error = spread / reference.diagnostics["ess"].sqrt().unsqueeze(-1)
        assert (reference.loc - lattice.loc).abs().lt(5 * error).all()
        assert reference.draws is not None
        assert (reference.draws.mean(0) - lattice.loc).abs().lt(8 * error).all()
        ratio = (reference.covariance.diagonal(dim1=-2, dim2=-1) / spread.square()).log()
        assert ratio.abs().lt(8 * math.sqrt(2) * error / spread).all()


def test_nuts_meets_the_posterior_of_ppca():
    truth = TWINS["ppca_vae"]()
    rows = {key: value[:1] for key, value in truth.batch.items()}
    reference = reference_posterior(truth.program, rows, "nuts", draws=500, warmup=150)
    assert reference.converged
    assert reference.draws is not None
    assert reference.draws.shape == (4000, 1, 3)
    assert (reference.diagnostics["r_hat"] < 1.01).all()
    assert (reference.diagnostics["divergences"] == 0).all()
    exact = truth.covariance[:1]
    spread = np.sqrt(np.diagonal(exact, axis1=1, axis2=2))
    ess = array(reference.diagnostics["ess"])
    assert (np.abs(array(reference.loc) - truth.loc[:1]) < 4 * spread / np.sqrt(ess)[:, None]).all()
    variance = spread[:, :, None] ** 2 * spread[:, None] ** 2 + exact**2  # of a product, Gaussian
    assert (np.abs(array(reference.covariance) - exact) < 4 * np.sqrt(variance / ess[:, None, None])).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 2}, "at least 4; got 2"),
        ({"chains": 0}, "at least 1; got 0"),
        ({"warmup": -1}, "at least 1; got -1"),
        ({"chains": 1}, "`chains` to be at least 2 under method='nuts', whose R-hat"),
    ],
)
def test_settings_of_nuts_are_checked(settings, message):
    truth = TWINS["ppca_vae"]()
    with pytest.raises(ValueError, match=message):
        reference_posterior(truth.program, truth.batch, "nuts", **settings)


def test_nuts_that_did_not_mix_carries_its_failure():
    reference = reference_posterior(
        single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z.abs(), 0.01), dist.Normal(0.0, 1.0)),
        torch.full((1, 1), 2.0),
        "nuts",
        draws=40,
        warmup=40,
        chains=8,
    )
    assert not reference.converged
    assert float(reference.diagnostics["r_hat"].max()) > 1.01
    assert not reference.diagnostics["settled"].any()


def test_auto_anneals_many_latents_and_takes_only_its_settings():
    vae, x = nonlinear("Bernoulli", 4)
    reference = reference_posterior(vae, x, chains=4, temperatures=5, leapfrog=2, points=10)
    assert reference.method == strongest(vae, x) == "ais"
    assert reference.loc.shape == (2, 4)
    assert reference.covariance.shape == (2, 4, 4)


def test_the_answer_follows_from_the_seed_and_nothing_is_left_behind():
    vae, x = nonlinear("Bernoulli")
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    settings: dict[str, dict[str, Any]] = {
        "quadrature": {"points": 2000},
        "ais": {"chains": 5, "temperatures": 3},
        "nuts": {"draws": 10, "warmup": 5, "chains": 2},
    }

    def run(method: Any) -> Reference:
        return reference_posterior(vae, x, method, seed=2, **settings[method])

    for method in settings:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = run(method)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        assert torch.equal(run(method).loc, first.loc)
        assert first.loc.dtype == torch.float64
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())
    assert len(pyro.get_param_store()) == 0


def test_what_a_program_does_not_allow_is_refused_and_the_rest_is_named():
    vae, x = nonlinear("Bernoulli", 4)
    with pytest.raises(ValueError, match="at most 3 latent variables.* got 4. This program allows 'ais', 'nuts', and"):
        reference_posterior(vae, x, "quadrature")
    with pytest.raises(ValueError, match="not quadratic. This program allows 'ais', 'nuts'.$"):
        reference_posterior(vae, x, "closed-form")
    with pytest.raises(ValueError, match="'closed-form' if it is linear-Gaussian"):
        reference_posterior(vae, x, "quadrature")
    with pytest.raises(ValueError, match="one of 'auto', 'closed-form', 'quadrature', 'ais', 'nuts'; got 'laplace'"):
        reference_posterior(vae, x, "laplace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="settings of 'nuts' among chains, draws, warmup; got 'temperatures'"):
        reference_posterior(vae, x, "nuts", temperatures=3)
    with pytest.raises(ValueError, match="`points` to be at least 36, 6 along each of 2 axes; got 10"):
        reference_posterior(nonlinear("Bernoulli")[0], x, "quadrature", points=10)
    with pytest.raises(ValueError, match="`tolerance` to be positive; got 0"):
        reference_posterior(nonlinear("Bernoulli")[0], x, "quadrature", tolerance=0)
    discrete = single(dist.Poisson(1.0), lambda z: dist.Normal(z, 1.0), dist.Poisson(1.0))
    with pytest.raises(ValueError, match="got 'z', which is discrete"):
        reference_posterior(discrete, torch.ones(2, 1))
