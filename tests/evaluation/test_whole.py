"""Programs with global latent variables: the whole data set counts as one datum."""

import math
from collections.abc import Callable
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import integrate, special, stats
from torch import Tensor

from ppl_vae import (
    Program,
    Target,
    compare_posteriors,
    exact_log_evidence,
    exact_posterior,
    fit,
    log_evidence,
    log_weights,
    reference_posterior,
)
from ppl_vae.evaluation import calibrate, pareto_k, to_datatree
from ppl_vae.infer.annealing import bidirectional

N, NOISE = 30, 0.5
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(N, 2))
Y = X @ [1.0, -2.0] + NOISE * GENERATOR.normal(size=N)
DATA = {"x": X, "y": Y}


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


def product(x: Tensor, y: Tensor) -> None:
    """The same, in a way that knows no particles."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def exact(x: Tensor, y: Tensor) -> None:
    precision = x.T @ x / NOISE**2 + torch.eye(2)
    loc = torch.linalg.solve(precision, x.T @ y / NOISE**2)
    pyro.sample("w", dist.MultivariateNormal(loc, precision_matrix=precision))


def wide(x: Tensor, y: Tensor) -> None:
    precision = x.T @ x / NOISE**2 + torch.eye(2)
    loc = torch.linalg.solve(precision, x.T @ y / NOISE**2)
    pyro.sample("w", dist.Normal(loc, 1.3 * precision.inverse().diagonal().sqrt()).to_event(1))


TRUTH = stats.multivariate_normal(np.zeros(N), X @ X.T + NOISE**2 * np.eye(N)).logpdf(Y)
PRECISION = X.T @ X / NOISE**2 + np.eye(2)
LOC = np.linalg.solve(PRECISION, X.T @ Y / NOISE**2)


@pytest.mark.parametrize("model", [regression, product])
def test_each_weight_of_the_exact_guide_is_the_evidence(model: Callable[..., Any]) -> None:
    target = Target(Program(model, exact), DATA)
    assert target.structure.whole
    assert target.structure.sequential == (model is product)
    assert target.n == 1
    weights = log_weights(target, samples=5)
    assert weights.shape == (5, 1)
    assert_allclose(weights, TRUTH, rtol=1e-10)
    if model is product:
        return
    assert_allclose(exact_log_evidence(target), TRUTH, rtol=1e-10)
    posterior = exact_posterior(target)
    assert_allclose(posterior.mean, LOC[None], rtol=1e-8)
    assert_allclose(posterior.covariance_matrix, np.linalg.inv(PRECISION)[None], rtol=1e-8)


@pytest.mark.parametrize("model", [regression, product])
def test_estimates_with_their_errors(model: Callable[..., Any]) -> None:
    target = Target(Program(model, wide), DATA)
    evidence = log_evidence(target, samples=200)
    assert evidence.kind == "estimate"
    assert abs(float(evidence.log_evidence) - TRUTH) < 5 * float(evidence.mc_se)
    assert_allclose(evidence.pareto_k, pareto_k(log_weights(target, samples=200)))
    if model is product:
        return
    compared = compare_posteriors(target)
    assert float(compared.error) == 0  # the guide is Gaussian too
    assert abs(float(compared.kl - (TRUTH - evidence.elbo))) < 5 * float(evidence.elbo_mc_se)


@pytest.mark.parametrize(("method", "settings"), [("quadrature", {}), ("ais", {}), ("nuts", {})])
def test_references_agree_with_the_closed_form(method: Any, settings: dict[str, Any]) -> None:
    reference = reference_posterior(Program(regression, wide), DATA, method, **settings)
    assert reference.shapes == {"w": (2,)}
    if method != "nuts":
        assert abs(float(reference.log_evidence) - TRUTH) < 5 * float(reference.error) + 1e-6
    else:
        assert reference.converged
    deviations = np.sqrt(np.linalg.inv(PRECISION).diagonal())
    near = 1e-5 if method == "quadrature" else 1.0 if method == "ais" else 0.1
    assert (np.abs(reference.loc.numpy() - LOC) < near * deviations).all()


def hierarchy(centred: bool) -> tuple[Program, dict[str, Any], float]:
    """y_j ~ N(a_j, 0.8), a_j ~ N(m, 0.5), m ~ N(0, 1): centred, or with a_j = m + 0.5 e_j; and the truth."""
    y = np.random.default_rng(1).normal(0.7, 1.0, 6)

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            a = pyro.sample("a", dist.Normal(m, 0.5)) if centred else m + 0.5 * pyro.sample("e", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a, 0.8), obs=y)

    def guide(y: Tensor) -> None:
        precision = 1 / 0.5**2 + 1 / 0.8**2
        total = 0.5**2 + 0.8**2
        inner = 1 + len(y) / total
        m = pyro.sample("m", dist.Normal(y.sum() / total / inner, inner**-0.5))
        with pyro.plate("groups", len(y)):
            loc = (m / 0.5**2 + y / 0.8**2) / precision
            loc, scale = (loc, precision**-0.5) if centred else ((loc - m) / 0.5, precision**-0.5 / 0.5)
            pyro.sample("a" if centred else "e", dist.Normal(loc, scale))

    covariance = np.ones((6, 6)) + (0.5**2 + 0.8**2) * np.eye(6)
    return Program(model, guide), {"y": y}, float(stats.multivariate_normal(np.zeros(6), covariance).logpdf(y))


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("centred", [True, False])
def test_a_hierarchy_has_one_evidence_however_it_is_written(centred: bool, inner: int) -> None:
    program, data, truth = hierarchy(centred)
    target = Target(program, data)
    assert target.structure.local == "groups"
    assert_allclose(log_weights(target, samples=4, inner=inner), truth, rtol=1e-10)
    assert_allclose(exact_log_evidence(target), truth, rtol=1e-9)
    assert target.draws(3).shape == (3, 1, 7)
    assert float(compare_posteriors(target).wasserstein) < 1e-6


def test_nested_weights_keep_their_variance_where_joint_ones_lose_it() -> None:
    m, generator = 200, torch.Generator().manual_seed(0)
    y = 0.7 + math.hypot(1.0, 0.8) * torch.randn(m, generator=generator)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", m):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.8), obs=y)

    def guide(y: Tensor) -> None:
        precision, total = 1 + 1 / 0.64, 1.64
        spread = 1 / (1 + m / total)
        mu = pyro.sample("mu", dist.Normal(spread * y.sum() / total, 1.05 * spread**0.5))
        with pyro.plate("groups", m):
            pyro.sample("z", dist.Normal((mu + y / 0.64) / precision + 0.05, 1.2 * precision**-0.5))

    target = Target(Program(model, guide), {"y": y})
    truth = float(dist.MultivariateNormal(torch.zeros(m), torch.ones(m, m) + 1.64 * torch.eye(m)).log_prob(y))
    joint, nested = (log_evidence(target, samples=500, inner=inner) for inner in (1, None))
    assert joint.kind == "lower bound"
    assert float(joint.pareto_k) > 0.7
    assert (nested.kind, nested.inner) == ("estimate", 20)
    assert float(nested.pareto_k) < 0.4
    assert abs(float(nested.log_evidence) - truth) < 5 * float(nested.mc_se) < 0.3
    assert abs(float(nested.elbo - joint.elbo)) < 5 * math.hypot(float(nested.elbo_mc_se), float(joint.elbo_mc_se))
    assert abs(float(nested.distortion - joint.distortion)) < 3


def test_inner_draws_are_refused_where_nothing_is_independent() -> None:
    with pytest.raises(ValueError, match=r"plate of latent sites that are independent.*inner = 5; got none"):
        log_evidence(Program(regression, wide), DATA, 10, inner=5)
    program, data, _ = hierarchy(True)

    def summed(y: Tensor) -> None:
        program.model(y)
        pyro.factor("late", torch.zeros(()))  # may depend on all groups together

    assert Target(Program(summed, program.guide), data).structure.local is None


def two_parameters(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, s), obs=y)


def test_evidence_of_two_parameters_equals_scipys_quadrature() -> None:
    y = np.random.default_rng(2).normal(1.0, 1.5, 12)

    def density(m: float, s: float) -> float:
        squares = ((y - y.mean()) ** 2).sum() + len(y) * (y.mean() - m) ** 2
        prior = -(m**2) / 8 - math.log(2) - 0.5 * math.log(2 * math.pi) + math.log(s) - s
        return math.exp(prior - squares / (2 * s**2) - len(y) * (math.log(s) + 0.5 * math.log(2 * math.pi)) + 20)

    truth = math.log(integrate.dblquad(density, 0.3, 15, -6, 8, epsabs=1e-12, epsrel=1e-9)[0]) - 20
    reference = reference_posterior(Program(two_parameters), {"y": y}, "quadrature")
    assert float(reference.log_evidence) == pytest.approx(truth, abs=1e-6)


CONJUGATE: dict[str, tuple[Any, Any, np.ndarray[Any, Any], float]] = {}


def conjugate(function: Callable[[], Any]) -> Callable[[], Any]:
    CONJUGATE[function.__name__] = function()
    return function


@conjugate
def beta_binomial() -> Any:
    y = np.array([1.0, 0, 1, 1, 0, 1, 1])

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("p", dist.Beta(2 + y.sum(), 3 + (1 - y).sum()))

    return model, guide, y, special.betaln(2 + 5, 3 + 2) - special.betaln(2, 3)


@conjugate
def gamma_poisson() -> Any:
    y = np.array([2.0, 0, 3, 1, 4])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(2 + y.sum(), 1.5 + len(y)))

    truth = 2 * math.log(1.5) - special.gammaln(2) + special.gammaln(12) - 12 * math.log(6.5)
    return model, guide, y, truth - special.gammaln(y + 1).sum()


@conjugate
def normal_inverse_gamma() -> Any:
    y = np.array([0.3, -1.2, 2.0, 0.8, 0.1, 1.4])
    n, a, b, k = len(y), 3.0, 2.0, 0.5
    b_after = b + 0.5 * ((y - y.mean()) ** 2).sum() + 0.5 * k * n * y.mean() ** 2 / (k + n)
    a_after, k_after, m_after = a + n / 2, k + n, n * y.mean() / (k + n)

    def model(y: Tensor) -> None:
        v = pyro.sample("v", dist.InverseGamma(torch.tensor(a), torch.tensor(b)))
        m = pyro.sample("m", dist.Normal(0.0, (v / k).sqrt()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, v.sqrt()), obs=y)

    def guide(y: Tensor) -> None:
        v = pyro.sample("v", dist.InverseGamma(torch.tensor(a_after), torch.tensor(b_after)))
        pyro.sample("m", dist.Normal(m_after, (v / k_after).sqrt()))

    truth = special.gammaln(a_after) - special.gammaln(a) + a * math.log(b) - a_after * math.log(b_after)
    return model, guide, y, truth + 0.5 * math.log(k / k_after) - n / 2 * math.log(2 * math.pi)


@pytest.mark.parametrize("name", CONJUGATE)
def test_conjugate_models_have_their_closed_form_in_each_weight(name: str) -> None:
    model, guide, y, truth = CONJUGATE[name]
    target = Target(Program(model, guide), {"y": y})
    assert_allclose(log_weights(target, samples=6), truth, rtol=1e-10)
    reference = reference_posterior(target, method="quadrature")
    assert abs(float(reference.log_evidence) - truth) < 10 * float(reference.error) + 1e-8


def test_data_of_several_lengths_and_keywords_that_are_no_data() -> None:
    def model(y: Tensor, edges: Tensor, scale: Tensor, K: int) -> None:  # noqa: N803
        with pyro.plate("parts", K):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m.sum(-1, keepdim=True) * edges.sum(), scale), obs=y)

    def guide(y: Tensor, K: int) -> None:  # noqa: N803
        with pyro.plate("parts", K):
            pyro.sample("m", dist.Normal(0.0, 1.0))

    data = {"y": np.ones(5), "edges": np.ones(2), "scale": np.array(1.5)}
    for given in (guide, "AutoNormal"):
        program = Program(model, given, static={"K": 3})
        fit(program, data, epochs=1, progress=False) if given != guide else None
        assert log_weights(program, data, 4).shape == (4, 1)
    apart = {"x": np.zeros((3, 1)), "y": np.zeros(2)}

    def per_datum(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[:, 0])

    def inside(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="share their leading size n; got shapes"):
        log_weights(Program(per_datum, inside), apart, 2)


@pytest.mark.parametrize("hard", [False, True])
def test_training_on_parts_that_a_plate_takes(hard: bool) -> None:
    def model(x: Tensor, y: Tensor, subsample_size: int | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y), subsample_size=10 if hard else subsample_size) as rows:
            pyro.sample("y", dist.Normal((x[rows] * w).sum(-1), NOISE), obs=y[rows])

    program = Program(model, "AutoMultivariateNormal")
    options: Any = {"learning_rate": 0.05, "schedule": "one-cycle", "particles": 5, "progress": False}
    epochs = 2 if hard else 300
    assert fit(program, DATA, epochs=epochs, batch_size=10, **options).steps == 3 * epochs
    if hard:
        with pytest.raises(ValueError, match="all data in plate 'data'.*`subsample_size=None` by keyword"):
            log_evidence(program, DATA, 10)
        return
    evidence = log_evidence(program, DATA, 1000)
    assert float(evidence.elbo) == pytest.approx(TRUTH, abs=0.1)
    assert abs(float(evidence.log_evidence) - TRUTH) < 5 * float(evidence.mc_se)


def test_a_guide_that_does_not_look_at_its_data_belongs_to_them() -> None:
    program = Program(regression, "AutoNormal")
    fit(program, DATA, epochs=2, progress=False)
    log_evidence(program, DATA, 2)
    with pytest.raises(ValueError, match="data that this program was fitted to; got others"):
        log_evidence(program, {"x": X, "y": Y + 1}, 2)
    with pytest.raises(ValueError, match="no validation data"):
        fit(program, DATA, epochs=1, validation=DATA, progress=False)
    amortized = Program(regression, exact)
    assert log_evidence(amortized, {"x": X, "y": Y + 1}, 2).log_evidence.shape == (1,)


def test_sizes_differ_between_model_and_guide() -> None:
    def inside(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def outside(x: Tensor, y: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'm' to have one size.*entries in the model and 1 in the guide"):
        log_evidence(Program(inside, outside), DATA, 2)

    def groups(count: int) -> Callable[..., None]:
        def model(x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("groups", count):
                pyro.sample("m", dist.Normal(0.0, 1.0))

        return model

    for sizes in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"plate 'groups' to have one size; it has {sizes[1]} in the guide"):
            log_evidence(Program(groups(sizes[0]), groups(sizes[1])), DATA, 2)


def test_arguments_that_the_data_lack_are_named() -> None:
    with pytest.raises(ValueError, match="run on data named y; one raised: .*missing 1 required positional.*'x'"):
        log_evidence(Program(regression, exact), {"y": Y}, 2)


@pytest.mark.parametrize("model", ["loop", "sum"])
def test_programs_that_know_no_particles_run_one_draw_at_a_time(model: str) -> None:
    """One has a site per observation, the other adds up all it has, particles too, without failing."""

    def loop(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"y{i}", dist.Normal((x[i] * w).sum(-1), NOISE), obs=y[i])

    def total(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), NOISE).log_prob(y).sum())

    target = Target(Program({"loop": loop, "sum": total}[model], exact), DATA)
    assert target.structure.sequential == (model == "sum")
    assert_allclose(log_weights(target, samples=5), TRUTH, rtol=1e-10)


def test_calibration_simulates_whole_data_sets_and_refuses_guides_that_do_not_read_them() -> None:
    def short(x: Tensor, y: Tensor) -> None:
        regression(x[:, :2], y)

    small = {"x": X[:4], "y": Y[:4]}
    found = calibrate(Program(short, exact), small, simulations=100, draws=9)
    assert found.ranks.shape == (100, 2)
    assert found.verdict == "no fault found"
    program = Program(regression)
    fit(program, DATA, epochs=1, progress=False)
    with pytest.raises(ValueError, match="a guide that reads the data; this one draws the same"):
        calibrate(program, DATA, simulations=10)


def test_latents_differ_between_model_and_guide() -> None:
    with pytest.raises(ValueError, match=r"same latent sites; only the model has \['w'\], only the guide has \['v'\]"):
        log_evidence(Program(regression, lambda x, y: pyro.sample("v", dist.Normal(0.0, 1.0))), DATA, 2)


@pytest.mark.parametrize("model", [regression, product])
def test_arviz_reads_global_sites_and_compares_by_loo(model: Callable[..., Any]) -> None:
    tree = to_datatree(Program(model, exact), DATA, draws=300)
    assert tree["posterior"]["w"].dims == ("chain", "draw", "w_dim_0")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "y_dim_0")
    assert tree["observed_data"]["y"].shape == (N,)
    assert tree["prior_predictive"]["y"].shape == (1, 300, N)
    assert_allclose(tree["sample_stats"]["log_weight"], TRUTH, rtol=1e-5)
    w = torch.from_numpy(tree["posterior"]["w"].values[0]).double()
    score = dist.Normal(w @ torch.from_numpy(X).T, NOISE).log_prob(torch.from_numpy(Y))
    assert_allclose(tree["log_likelihood"]["y"].values[0], score, rtol=1e-4, atol=1e-5)
    assert float(arviz.loo(tree).elpd_loo) < 0
    program, data, _ = hierarchy(True)
    assert to_datatree(program, data, draws=150)["posterior"]["m"].shape == (1, 150)  # a scalar


def test_what_is_deterministic_is_no_site_of_its_own() -> None:
    def model(x: Tensor) -> None:
        noise = pyro.deterministic("noise", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, noise), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x[:, 0], 0.2**0.5))

    target = Target(Program(model, guide), torch.tensor([[0.3], [-1.0]]))
    assert not target.structure.whole
    assert target.structure.observed == ("x",)
    assert_allclose(log_weights(target, samples=3), np.tile(stats.norm(0, 1.25**0.5).logpdf([0.3, -1.0]), (3, 1)))


def test_batches_with_scalars_are_simulated_and_bounded() -> None:
    def model(y: Tensor, top: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m * top, 1.0), obs=y)

    data = {"y": torch.zeros(4), "top": torch.tensor(2.0)}
    sandwich = bidirectional(Program(model), data, chains=8, temperatures=20)
    assert sandwich.batch["top"] == 2
    y = sandwich.batch["y"].numpy()
    truth = stats.multivariate_normal(np.zeros(4), 4 * np.ones((4, 4)) + np.eye(4)).logpdf(y)
    assert float(sandwich.lower) - 5 * float(sandwich.lower_error) < truth
    assert truth < float(sandwich.upper) + 5 * float(sandwich.upper_error)
    assert float(sandwich.gap) < 1
