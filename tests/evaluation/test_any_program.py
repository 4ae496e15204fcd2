"""The gap of any program, draws resampled by their weights, and calibration of guides that are refitted."""

import math
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from scipy import stats
from torch import Tensor

from ppl_vae import Program, check_guide, fit, log_evidence
from ppl_vae.evaluation import calibrate, pareto_k, to_datatree
from ppl_vae.evaluation.gap import inference_gap
from ppl_vae.evaluation.pareto import pareto_smoothed

N, NOISE = 20, 0.5
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(N, 2))
X[:, 1] += 0.8 * X[:, 0]
Y = X @ [1.0, -2.0] + NOISE * GENERATOR.normal(size=N)
DATA = {"x": X, "y": Y}
PRECISION = X.T @ X / NOISE**2 + np.eye(2)
LOC = np.linalg.solve(PRECISION, X.T @ Y / NOISE**2)
SCALE = PRECISION.diagonal() ** -0.5  # of the best diagonal normal
FAMILY = 0.5 * (np.log(PRECISION.diagonal()).sum() - np.linalg.slogdet(PRECISION)[1])  # nats that it loses
TRUTH = stats.multivariate_normal(np.zeros(N), X @ X.T + NOISE**2 * np.eye(N)).logpdf(Y)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


def guided(shift: float = 0.0, factor: float = 1.0) -> Program:
    """The best diagonal normal, moved by so many of its standard deviations and widened."""

    def guide(x: Tensor, y: Tensor) -> None:
        loc, scale = torch.from_numpy(LOC), torch.from_numpy(SCALE)
        pyro.sample("w", dist.Normal(loc + shift * scale, factor * scale).to_event(1))

    return Program(regression, guide)


def close(value: Tensor, error: Tensor, truth: float, slack: float = 1e-6) -> bool:
    return abs(float(value) - truth) < 5 * float(error) + slack


def test_the_gap_of_a_guide_whose_family_is_given() -> None:
    """A diagonal guide moved by s standard deviations is s' P s / 2 nats worse than the best."""
    lost = 0.5 * 0.3**2 * float(SCALE @ PRECISION @ SCALE)
    gap = inference_gap(guided(0.3), DATA, family="Normal", draws=2000)
    assert (gap.family, gap.total.shape) == ("Normal", (1,))
    assert float(gap.log_evidence) == pytest.approx(TRUTH)
    assert close(gap.approximation, gap.approximation_error, FAMILY)
    assert close(gap.amortization, gap.amortization_error, lost)
    assert close(gap.total, gap.error, FAMILY + lost)
    assert float(gap.total) == pytest.approx(float(gap.approximation + gap.amortization))
    assert max(float(gap.error), float(gap.amortization_error)) < 0.1
    full = inference_gap(guided(0.3), DATA, family="FullNormal", draws=1000)
    assert abs(float(full.approximation)) < 1e-6
    assert close(full.amortization, full.amortization_error, FAMILY + lost)


def test_without_a_family_the_total_is_all_that_is_known() -> None:
    gap = inference_gap(guided(0.3), DATA)
    assert gap.family is None
    assert math.isnan(float(gap.approximation))
    assert math.isnan(float(gap.amortization))
    assert close(gap.total, gap.error, FAMILY + 0.5 * 0.3**2 * float(SCALE @ PRECISION @ SCALE))
    assert inference_gap(Program(regression, "AutoIAFNormal"), DATA, draws=5).family is None
    with pytest.raises(ValueError, match="`family` to be .*FullNormal.*; got 'Laplace'"):
        inference_gap(guided(), DATA, family="Laplace")


def autoguides(program: Any) -> Any:
    """The diagonal normal of each kind of autoguide, set to the best, moved by 0.3 standard deviations."""
    guide, loc = program.guide, torch.from_numpy(LOC + 0.3 * SCALE)
    guide(**{key: torch.from_numpy(value) for key, value in DATA.items()})
    with torch.no_grad():
        if hasattr(guide, "locs"):
            guide.locs.w_unconstrained.copy_(loc)
            guide.scales.w = torch.from_numpy(SCALE)
        else:
            guide.loc.copy_(loc)
            guide.scale = torch.from_numpy(SCALE)
            if hasattr(guide, "scale_tril"):
                guide.scale_tril = torch.eye(2)
    return program


@pytest.mark.parametrize(
    ("name", "family"),
    [("AutoNormal", "Normal"), ("AutoDiagonalNormal", "Normal"), ("AutoMultivariateNormal", "FullNormal")],
)
def test_an_autoguide_has_a_family_and_what_training_left(name: str, family: str) -> None:
    gap = inference_gap(autoguides(Program(regression, name)), DATA, draws=2000)
    lost, best = 0.5 * 0.3**2 * float(SCALE @ PRECISION @ SCALE), FAMILY if family == "Normal" else 0.0
    assert (gap.family, gap.amortized) == (family, False)
    assert close(gap.approximation, gap.approximation_error, best)
    assert close(gap.amortization, gap.amortization_error, FAMILY - best + lost)


def test_a_trained_autoguide_has_little_left_and_a_list_of_normals_is_one() -> None:
    program = autoguides(Program(regression, "AutoNormal"))
    fit(program, DATA, epochs=60, learning_rate=0.02, particles=10, schedule="one-cycle", progress=False)
    gap = inference_gap(program, DATA, draws=2000)
    assert float(gap.amortization) < 0.1
    listed = AutoGuideList(regression)
    listed.append(AutoNormal(regression))
    assert inference_gap(Program(regression, listed), DATA, draws=5, steps=1).family == "Normal"


def test_rows_of_an_autoguide_each_have_a_gap() -> None:
    """z ~ N(0, 1) and x ~ N(z, 1): AutoNormal in the data plate holds the posterior N(x / 2, 1 / 2) of each datum."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    x = torch.tensor([0.3, -1.0, 2.0])
    program: Any = Program(model)
    program.guide(x=x)
    with torch.no_grad():
        program.guide.locs.z_unconstrained.copy_(x / 2 + torch.tensor([0.0, 0.2, 0.4]))
        program.guide.scales.z = torch.full((3,), 0.5**0.5)
    gap = inference_gap(program, {"x": x}, draws=1000)
    assert_allclose(gap.approximation, 0, atol=1e-6)
    assert (abs(gap.amortization - torch.tensor([0.0, 0.04, 0.16])) < 5 * gap.amortization_error + 1e-6).all()


def test_smoothed_weights_are_arvizs() -> None:
    weights = torch.randn(600, 4) * torch.tensor([0.3, 1.0, 2.0, 3.0])
    smoothed = pareto_smoothed(weights)
    for j in range(4):
        known, k = arviz.psislw(weights[:, j].numpy())
        assert_allclose(smoothed[:, j] - smoothed[:, j].logsumexp(0), known, atol=1e-10)
        assert float(pareto_k(weights)[j]) == pytest.approx(float(k))
    equal = torch.zeros(30, 1)
    assert torch.equal(pareto_smoothed(equal), equal)


def test_resampled_draws_have_the_posteriors_moments() -> None:
    """For one datum and for each of several, whose guide is 0.4 standard deviations off and a third too wide."""
    tree = to_datatree(guided(0.4, 1.6), DATA, draws=4000)
    w = tree["reweighted"]["w"].values[0].astype(float)
    chosen = tree["sample_stats"]["resampled"].values[0]
    assert_allclose(w, tree["posterior"]["w"].values[0][chosen])
    shares = np.bincount(chosen, minlength=4000)
    effective = 4000**2 / (shares**2).sum()
    posterior = np.linalg.inv(PRECISION)
    assert (abs(w.mean(0) - LOC) < 5 * (posterior.diagonal() / effective) ** 0.5).all()
    assert_allclose(np.cov(w.T), posterior, rtol=0.25, atol=0.1 * posterior.max())
    assert abs(tree["posterior"]["w"].values[0].mean(0) - LOC)[0] > 5 * (SCALE[0] / 4000**0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.3, 0.9))

    x = torch.tensor([0.5, -2.0, 1.0])
    tree = to_datatree(Program(model, guide), {"x": x}, draws=4000)
    z = tree["reweighted"]["z"]
    assert z.dims == ("chain", "draw", "obs")
    assert (abs(z.values[0].mean(0) - x.numpy() / 2) < 5 * 0.5**0.5 / 2000**0.5).all()


def test_loo_by_arviz_is_the_exact_one() -> None:
    """log p(y_i | the others) of conjugate regression, against PSIS of the posterior's draws."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 2))
    y = x @ [1.0, -2.0] + 0.3 * NOISE * rng.normal(size=60)  # no row has much influence
    precision = x.T @ x / NOISE**2 + np.eye(2)

    def exact(x: Tensor, y: Tensor) -> None:
        loc = torch.linalg.solve(torch.from_numpy(precision), x.T @ y / NOISE**2)
        pyro.sample("w", dist.MultivariateNormal(loc, precision_matrix=torch.from_numpy(precision)))

    truth = 0.0
    for i in range(60):
        rest = precision - np.outer(x[i], x[i]) / NOISE**2
        loc = np.linalg.solve(rest, (x.T @ y - x[i] * y[i]) / NOISE**2)
        truth += stats.norm(x[i] @ loc, (NOISE**2 + x[i] @ np.linalg.solve(rest, x[i])) ** 0.5).logpdf(y[i])
    trees = [to_datatree(Program(regression, exact), {"x": x, "y": y}, draws=2000, seed=seed) for seed in range(5)]
    found = [float(arviz.loo(tree).elpd_loo) for tree in trees]
    assert abs(np.mean(found) - truth) < 5 * np.std(found, ddof=1) / 5**0.5
    assert np.std(found) < 0.3


REFIT = {"epochs": 60, "learning_rate": 0.2, "particles": 10, "schedule": "one-cycle", "capture": "off"}


@pytest.mark.parametrize("entries", ["apart", "summed"])
def test_a_refitted_mean_field_guide_passes_unless_the_posterior_is_correlated(entries: str) -> None:
    """Two latents, of which the data tell each, or the sum: then the best diagonal normal is far too narrow."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z if entries == "apart" else z.sum(-1, keepdim=True).expand(z.shape)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    found = calibrate(Program(model), {"x": torch.zeros(150, 2)}, simulations=160, draws=19, refit=REFIT)
    assert found.ranks.shape == (300, 2)  # whole data sets
    assert found.verdict == ("no fault found" if entries == "apart" else "miscalibrated")


def test_a_guide_of_a_whole_data_set_is_refitted_and_else_refused() -> None:
    def mean(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    program, data = Program(mean), {"y": torch.zeros(3)}
    fit(program, data, epochs=5, learning_rate=0.1, progress=False)
    before = [value.clone() for value in program.parameters()]
    found = calibrate(program, data, simulations=20, draws=9, refit={**REFIT, "epochs": 20})
    assert found.ranks.shape == (20, 1)
    assert found.verdict == "no fault found"
    assert all(map(torch.equal, before, program.parameters()))
    with pytest.raises(ValueError, match=r"Train it anew for each simulation, refit=\{\"epochs\": 500\}"):
        calibrate(program, data, simulations=10)


def test_what_a_model_learns_is_left_alone_by_a_refit() -> None:
    def learning(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(pyro.param("prior", lambda: torch.tensor(0.3)), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    program, data = Program(learning), {"y": torch.zeros(3)}
    fit(program, data, epochs=20, learning_rate=0.1, progress=False)
    seen: list[float] = []

    def watched(y: Tensor) -> None:
        learning(y)
        seen.append(float(pyro.param("prior").detach()))

    program.model = watched
    calibrate(program, data, simulations=2, draws=5, refit={**REFIT, "epochs": 5})
    assert len(set(seen)) == 1
    assert seen[0] != 0.3


def test_dims_without_a_plate_count_as_entries_of_a_site() -> None:
    """As Pyro's example of eight schools for NUTS has them, in small: y ~ N(m + e, 1), e and m ~ N(0, 1)."""
    y = torch.tensor([1.0, -0.5, 2.0])

    def model(y: Tensor) -> None:
        e = pyro.sample("e", dist.Normal(torch.zeros(3), torch.ones(3)))
        m = pyro.sample("m", dist.Normal(torch.zeros(1), torch.ones(1)))
        pyro.sample("y", dist.Normal(m + e, torch.ones(3)), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("e", dist.Normal(y / 3, 0.8 * torch.ones(3)))
        pyro.sample("m", dist.Normal(y.mean().reshape(1) / 2, 0.8 * torch.ones(1)))

    program, data = Program(model, guide), {"y": y}
    truth = float(dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 2 * torch.eye(3)).log_prob(y))
    check = check_guide(program, data, samples=30, reference="closed-form")
    assert check.sites["e"].loc.shape == (1, 3)
    assert float(check.reference.log_evidence) == pytest.approx(truth)  # type: ignore[union-attr]
    assert check.reference.shapes["e"] == (3,)  # type: ignore[union-attr]
    assert abs(float(check.evidence.log_evidence) - truth) < 5 * float(check.evidence.mc_se)


def test_a_model_that_asserts_its_shapes_is_read_on_all_of_the_data() -> None:
    """As Pyro's latent Dirichlet allocation does, whose data have no leading size of the documents."""

    def model(y: Tensor) -> None:
        assert y.shape == (4, 2)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 2), pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y.reshape(4, 2))

    def guide(y: Tensor) -> None:
        pyro.sample("m", dist.Normal(y.sum() / 9, 1 / 3))

    y = torch.arange(8.0).reshape(4, 2) / 4
    truth = float(dist.MultivariateNormal(torch.zeros(8), torch.ones(8, 8) + torch.eye(8)).log_prob(y.flatten()))
    assert float(log_evidence(Program(model, guide), {"y": y}, 5).log_evidence) == pytest.approx(truth)
