"""The exact posterior and evidence read off traces, and the comparison with the guide, against numpy and scipy."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.fft import dct
from scipy.linalg import sqrtm
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_digits
from torch import Tensor, nn
from twins import MODELS, TWINS, array, dense, draws, linear_vae, perturbed, randomise, single

from ppl_vae import (
    PPCA,
    VAE,
    Conditional,
    Program,
    compare_posteriors,
    exact_log_evidence,
    exact_posterior,
    fit,
    log_weights,
    reference_posterior,
)
from ppl_vae.families import Bernoulli, FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.program import load_program

twins = pytest.mark.parametrize("twin", TWINS)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


# The twins


@twins
def test_evidence_and_posterior_are_those_of_the_dense_joint_gaussian(twin: str) -> None:
    t = TWINS[twin]()
    posterior = exact_posterior(t.program, t.batch)
    assert posterior.batch_shape == (len(t.loc),)
    np.testing.assert_allclose(exact_log_evidence(t.program, t.batch), t.log_evidence, **CLOSE)
    np.testing.assert_allclose(posterior.loc, t.loc, **CLOSE)
    np.testing.assert_allclose(posterior.covariance_matrix, t.covariance, **CLOSE)


@twins
def test_the_truth_does_not_depend_on_the_guide(twin: str) -> None:
    t = TWINS[twin]()
    wrong = perturbed(t.program, 3.0, -2.0)
    np.testing.assert_allclose(exact_log_evidence(wrong, t.batch), t.log_evidence, **CLOSE)
    np.testing.assert_allclose(exact_posterior(wrong, t.batch).loc, t.loc, **CLOSE)


@twins
def test_an_exact_guide_is_at_no_distance(twin: str) -> None:
    t = TWINS[twin]()
    found = compare_posteriors(t.program, t.batch)
    for name, value in vars(found).items():
        expected, tolerance = (1.0, 1e-9) if name == "scale_ratio" else (0.0, 1e-6 if name == "wasserstein" else 1e-9)
        assert value.shape == (len(t.loc),)
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance, err_msg=name)


@twins
@pytest.mark.parametrize(("factor", "shift"), [(1.2, 0.1), (0.8, -0.2)])
def test_evidence_is_elbo_plus_kl(twin: str, factor: float, shift: float) -> None:
    """The mean log weight, by sampling, is the ELBO; the KL divergence is in closed form; their sum is dense."""
    t = TWINS[twin]()
    wrong = perturbed(t.program, factor, shift)
    comparison = compare_posteriors(wrong, t.batch)
    weights = log_weights(wrong, t.batch, 2000, seed=1)
    error = weights.std(0) / math.sqrt(2000)
    assert (comparison.kl > 0).all()
    truth = torch.from_numpy(t.log_evidence)
    assert ((weights.mean(0) + comparison.kl - truth).abs() < 5 * error).all()
    assert ((weights.mean(0) - truth).abs() > 5 * error).all()


@twins
def test_programs_leave_no_trace(twin: str) -> None:
    """Neither the random state, the program, its data nor Pyro's parameter store change."""
    t = TWINS[twin]()
    before = copy.deepcopy(t.program.state_dict()), torch.get_rng_state(), t.batch["x"].clone()
    compare_posteriors(t.program, t.batch)
    exact_log_evidence(t.program, t.batch)
    after = t.program.state_dict()
    assert all(torch.equal(before[0][key], after[key]) for key in before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(t.batch["x"].nan_to_num(), before[2].nan_to_num())
    assert not list(pyro.get_param_store().keys())
    assert all(p.grad is None for p in t.program.parameters())


def test_more_data_than_a_block() -> None:
    vae, x = linear_vae(FullNormal(3), Normal(7, scale="feature")), draws(230, 7)
    evidence, loc, _ = dense(vae).truth(array(x))
    np.testing.assert_allclose(exact_log_evidence(vae, x), evidence, **CLOSE)
    np.testing.assert_allclose(exact_posterior(vae, x).loc, loc, **CLOSE)


def test_single_precision_programs_are_computed_in_double() -> None:
    x = draws(6, 7).float()
    vae = linear_vae(FullNormal(3), Normal(7, scale="feature")).float()
    truth = dense(copy.deepcopy(vae).double())
    evidence, loc, covariance = truth.truth(array(x))
    posterior = exact_posterior(vae, x)
    assert exact_log_evidence(vae, x).dtype == posterior.loc.dtype == torch.float64
    np.testing.assert_allclose(exact_log_evidence(vae, x), evidence, **CLOSE)
    np.testing.assert_allclose(posterior.loc, loc, **CLOSE)
    np.testing.assert_allclose(posterior.covariance_matrix, covariance, **CLOSE)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


def test_single_precision_modules_behind_functions() -> None:
    """`Program` cannot see the modules that plain functions close over."""
    torch.set_default_dtype(torch.float32)
    vae = linear_vae(StandardNormal(2), Normal(5, scale="shared")).float()
    x = draws(4, 5).float()
    wrapped = Program(lambda x: vae.model(x), lambda x: vae.guide(x))
    expected = exact_log_evidence(vae, x)
    torch.testing.assert_close(exact_log_evidence(wrapped, x), expected, rtol=1e-4, atol=1e-4)


class _OwnParameter(nn.Module):
    """Half of what it learns is a module's parameter, half a `pyro.param`."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        pyro.module("own_parameter", self)
        offset = pyro.param("offset", torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.slope * z + offset, 1.0), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        total = 1 + self.slope**2
        moment = self.slope * (x[:, 0] - pyro.param("offset", torch.tensor(0.0)))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(moment / total, total**-0.5))


def test_what_a_program_learned_through_pyro_param_counts() -> None:
    program, x = _OwnParameter(), torch.randn(20, 1) + 5
    fit(program, x, epochs=60, learning_rate=0.1, batch_size=20, device="cpu", progress=False)
    weights = log_weights(program, x, 2)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(exact_log_evidence(program, x), weights[0], rtol=0, atol=1e-9)


# Refusals


def _vae(likelihood: Conditional, prior: Any = None) -> VAE:
    prior = Conditional(StandardNormal(2)) if prior is None else prior
    return VAE(prior, likelihood, Conditional(Normal(2), Linear()))


REFUSED: dict[str, Callable[[], Any]] = {
    "tanh": lambda: _vae(Conditional(Normal(5, scale="shared"), MLP(hidden=[16], activation="tanh"))),
    "relu": lambda: _vae(Conditional(Normal(5, scale="shared"), MLP(hidden=[16], activation="relu"))),
    "heteroscedastic": lambda: _vae(Conditional(Normal(5), Linear())),
    "bernoulli": lambda: _vae(Conditional(Bernoulli(5), Linear())),
    "mixture-prior": lambda: _vae(
        Conditional(Normal(5, scale="shared"), Linear()), Conditional(MixtureNormal(2, components=3))
    ),
    "two-level": lambda: load_program(str(MODELS / "two_level.py"))(5, 3, hidden=8),
    "state-space": lambda: load_program(str(MODELS / "state_space.py"))(5, hidden=8),
    "vae": lambda: load_program(str(MODELS / "vae.py"))(5, 2, hidden=8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_without_a_closed_form_are_refused(name: str) -> None:
    program, x = randomise(REFUSED[name]()), (torch.randn(8, 5) > 0).double()
    for function in (exact_log_evidence, exact_posterior, compare_posteriors):
        with pytest.raises(
            ValueError, match=r"(?s)Expected a linear-Gaussian model.*(not quadratic|is a mixture)"
        ) as caught:
            function(program, x)
        assert all(site in str(caught.value) for site in (("top", "z") if name == "two-level" else ("z",)))


def mixture_guide(components: int) -> VAE:
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Normal(5, scale="shared"), Linear()),
        Conditional(MixtureNormal(2, components=components), MLP(hidden=[4])),
    )
    randomise(vae)
    return vae


def test_a_guide_that_is_no_gaussian_is_compared_by_sampling() -> None:
    """Of three components against quadrature; of one, which is Gaussian whatever its form, in closed form."""
    x = torch.randn(4, 5)
    assert (compare_posteriors(mixture_guide(1), x).error == 0).all()
    vae: Any = mixture_guide(3)
    found, exact = compare_posteriors(vae, x, draws=20_000), exact_posterior(vae, x)
    assert all(value.shape == (4,) and value.dtype == torch.float64 for value in vars(found).values())
    with torch.no_grad():
        q = vae.approximate(x)
        centre, reach = q.mean, 12 * q.variance.sqrt().amax()
        line = torch.linspace(-1, 1, 601) * reach
        grid = torch.cartesian_prod(line, line).unsqueeze(1) + centre
        log_q, log_p = q.log_prob(grid), exact.log_prob(grid)
        cell = (line[1] - line[0]) ** 2
        assert ((log_q.exp().sum(0) * cell - 1).abs() < 1e-3).all()
        kl = (log_q.exp() * (log_q - log_p)).sum(0) * cell
    assert ((found.kl - kl).abs() < 5 * found.error + 1e-2 * kl).all()
    assert torch.equal(found.kl, found.gap)
    assert (found.error > 0).all()
    assert (found.kl > 5 * found.error).all()
    apart = ((q.mean - exact.loc) / exact.variance.sqrt()).norm(dim=-1)
    ratio = (q.variance / exact.variance).log().mean(-1).mul(0.5).exp()
    assert ((found.mean_error - apart).abs() < 0.1 * apart + 0.1).all()
    assert ((found.scale_ratio / ratio - 1).abs() < 0.05).all()
    again, other = (compare_posteriors(vae, x, draws=20_000, seed=seed) for seed in (0, 1))
    assert torch.equal(found.kl, again.kl)
    assert not torch.equal(found.kl, other.kl)
    with pytest.raises(ValueError, match="Expected `draws` to exceed the number of latents, 2, by two or more"):
        compare_posteriors(vae, x, draws=3)


def test_a_precise_linear_feature_does_not_hide_a_nonlinear_one() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("a", dist.Normal(z, 1e-4), obs=x[:, 0])
            pyro.sample("b", dist.Normal(torch.sin(2 * z), 0.3), obs=x[:, 1])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    with pytest.raises(ValueError, match="not quadratic"):
        exact_log_evidence(Program(model, guide), torch.tensor([[1.0, 0.9], [0.5, 0.2]]))


def test_a_precise_likelihood_is_no_reason_to_refuse() -> None:
    vae: Any = linear_vae(StandardNormal(3), Normal(7, scale=1e-4))
    x = vae.sample(6)
    np.testing.assert_allclose(exact_log_evidence(vae, x), dense(vae).truth(array(x))[0], rtol=1e-6, atol=1e-4)
    assert compare_posteriors(vae, x).kl.abs().max() < 1e-6


SHORT: dict[str, tuple[Callable[[], Program], float, str]] = {
    "uniform": (
        lambda: single(dist.Uniform(0.0, 100.0), lambda z: dist.Normal(z, 30.0), dist.Uniform(40.0, 60.0)),
        95.0,
        "the interval from 0 to 100",
    ),
    "half-normal": (
        lambda: single(dist.HalfNormal(100.0), lambda z: dist.Normal(z, 50.0), dist.Uniform(50.0, 150.0)),
        20.0,
        "the positive numbers",
    ),
    "scale": (
        lambda: single(dist.Gamma(2.0, 1.0), lambda z: dist.Normal(0.0, z), dist.LogNormal(0.0, 1.0)),
        1.0,
        "the positive numbers",
    ),
    "discrete": (
        lambda: single(
            dist.Categorical(torch.ones(3)), lambda z: dist.Normal(z.double(), 1.0), dist.Categorical(torch.ones(3))
        ),
        1.0,
        "the whole numbers from 0 to 2",
    ),
    "simplex": (
        lambda: single(
            dist.Dirichlet(torch.ones(2)), lambda z: dist.Normal(z[..., 0], 1.0), dist.Dirichlet(torch.ones(2))
        ),
        1.0,
        "shares that sum to 1",
    ),
}


@pytest.mark.parametrize("name", SHORT)
def test_sites_without_the_whole_real_line_are_refused_by_name(name: str) -> None:
    program, at, support = SHORT[name][0](), torch.tensor([[SHORT[name][1]]]), SHORT[name][2]
    known: list[Callable[..., Any]] = [exact_log_evidence, exact_posterior, compare_posteriors]
    if name not in ("discrete", "simplex"):
        known.append(lambda program, x: reference_posterior(program, x, "closed-form"))
    for function in known:
        with pytest.raises(ValueError, match=f"Expected a linear-Gaussian model.*whose site 'z' is on {support}"):
            function(program, at)
    with pytest.raises(ValueError, match="Expected a linear-Gaussian guide.*whose site 'z' is on "):
        gaussians(program, at, role="guide")


def test_a_guide_on_less_than_the_real_line_does_not_hide_the_closed_form() -> None:
    program = single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(2 * z, 1.0), dist.LogNormal(0.0, 0.5))
    x = torch.tensor([[1.0], [3.0]])
    np.testing.assert_allclose(exact_log_evidence(program, x), norm(0, 5**0.5).logpdf(x[:, 0]), **CLOSE)
    assert (compare_posteriors(program, x).error > 0).all()


@pytest.mark.parametrize("place", [50.0, 0.0, -400.0])
def test_two_far_pieces_that_are_each_quadratic_are_refused(place: float) -> None:
    """The mean of x folds at 0: as a model around either piece, and as a guide of two far components."""
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-40.0, 40.0]), 1.0))
    program = single(dist.Normal(0.0, 100.0), lambda z: dist.Normal(z.abs(), 10.0), dist.Normal(place, 1.0))
    with pytest.raises(ValueError, match="linear-Gaussian model.*not quadratic"):
        exact_log_evidence(program, torch.tensor([[50.0]]))
    guided = single(dist.Normal(0.0, 100.0), lambda z: dist.Normal(z, 10.0), mixture)
    with pytest.raises(ValueError, match="linear-Gaussian guide.*is a mixture"):
        gaussians(guided, torch.tensor([[place]]), role="guide")


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("noise", [1.0, 0.3, 0.1])
def test_a_small_bend_is_part_of_the_error_and_a_larger_one_refused(power: int, noise: float) -> None:
    """Of size 1e-8 it moves log p(x) by more than 1e-9 nats, and the error of log p(x) and of the KL says so."""
    x, z = torch.tensor([[0.3], [1.5], [-2.2]]), torch.linspace(-12, 12, 100_001)
    prior = dist.Normal(torch.zeros(()), 1.0)
    for size in (1e-8, 1e-5):

        def likelihood(z: Tensor, size: float = size) -> Any:
            return dist.Normal(z + size * z**power, noise)

        program = single(prior, likelihood, prior)
        if size == 1e-5:
            with pytest.raises(ValueError, match="not quadratic"):
                exact_log_evidence(program, x)
            continue
        sums = [(prior.log_prob(z) + likelihood(z).log_prob(one)).logsumexp(0) for one in x[:, 0]]
        exact, truth = gaussians(program, x, role="model"), torch.stack(sums) + math.log(24 / 100_000)
        miss = (exact.log_normaliser - truth).abs()
        assert miss.max() > 1e-9
        assert (miss <= exact.error + 1e-10).all()
        assert exact.error.max() < 1e-5
        assert torch.equal(compare_posteriors(program, x).error, exact.error)


@pytest.mark.parametrize("n", [1, 4, 40])
@pytest.mark.parametrize("centre", [-1.6, 1.5, 2.4])
def test_a_bump_far_off_the_posterior_is_refused(n: int, centre: float) -> None:
    """Ten posterior deviations off, z could explain x as well, by a bump of a hundredth of the prior's width."""
    prior, height = dist.Normal(torch.zeros(()), 1.0), -math.copysign(1.0, centre)

    def likelihood(z: Tensor) -> Any:
        return dist.Normal(0.27 * z + height * torch.exp(-0.5 * ((z - centre) / 0.01) ** 2), 0.045)

    x = 0.27 * centre + height * torch.linspace(0.5, 0.6, n).unsqueeze(-1)
    with pytest.raises(ValueError, match="not quadratic"):
        exact_log_evidence(single(prior, likelihood, prior), x)


def test_a_step_that_gradients_do_not_show_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.factor("step", 3.0 * (z > 4).double(), has_rsample=True)

    program = Program(model, single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0), dist.Normal(0, 0.1)).guide)
    with pytest.raises(ValueError, match="not quadratic"):
        exact_log_evidence(program, torch.tensor([[0.5]]))


def test_a_model_that_some_real_values_break_is_refused() -> None:
    program = single(dist.Normal(0.5, 0.5), lambda z: dist.Normal(0.0, z), dist.Normal(0.5, 0.1))
    with pytest.raises(ValueError, match="linear-Gaussian model.*not defined for all real values of z") as caught:
        exact_log_evidence(program, torch.tensor([[1.0]]))
    assert "scale" in str(caught.value.__cause__)


def test_decoders_of_one_or_two_kinks_are_refused_or_right() -> None:
    """Against sums over a grid of 40 standard deviations of the prior; some kinks lie beyond all mass."""
    grid = np.linspace(-40, 40, 100_001)
    prior = norm.logpdf(grid) + math.log(grid[1] - grid[0])
    right = refused = 0
    for hidden in (1, 2):
        for seed in range(40):
            likelihood = Conditional(Normal(2, scale="shared"), MLP(hidden=[hidden], activation="relu"))
            vae: Any = VAE(Conditional(StandardNormal(1)), likelihood, Conditional(Normal(1), Linear()))
            randomise(vae, seed)
            x = draws(2, 2, seed=seed)
            try:
                found = exact_log_evidence(vae, x)
            except ValueError:
                refused += 1
                continue
            with torch.no_grad():
                given = vae.likelihood(torch.from_numpy(grid).reshape(-1, 1, 1)).log_prob(x).numpy()
            np.testing.assert_allclose(found, logsumexp(given + prior[:, None], axis=0), rtol=0, atol=1e-9)
            right += 1
    assert right > 3
    assert refused > 40


@pytest.mark.parametrize("far", [0.0, 100.0])
@pytest.mark.parametrize("noise", [1e-4, 100.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_neither_scale_nor_distance_is_a_reason_to_refuse(scale: float, noise: float, far: float) -> None:
    """Latents of any scale, a precise or a vague likelihood far from 0, a guide far from prior and posterior."""
    generator = np.random.default_rng(0)
    for size in (1, 5):
        spread = scale * np.exp(generator.normal(size=size))
        loc = scale * generator.normal(size=size)
        weight = generator.normal(size=(size + 2, size)) / scale
        x = weight @ (loc + spread * generator.normal(size=size)) + 100 + noise * generator.normal(size=size + 2)
        m, s, w = (torch.from_numpy(one) for one in (loc, spread, weight))

        def model(x: Tensor, m: Tensor = m, s: Tensor = s, w: Tensor = w) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(m, s).to_event(1))
                pyro.sample("x", dist.Normal(z @ w.T + 100, noise).to_event(1), obs=x)

        def guide(x: Tensor, m: Tensor = m, s: Tensor = s) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(m + far * s, s).to_event(1))

        scaled, apart = weight * spread / noise, (x - weight @ loc - 100) / noise
        inner = np.eye(size) + scaled.T @ scaled
        mean = np.linalg.solve(inner, scaled.T @ apart)
        rest = np.concatenate([apart - scaled @ mean, mean])
        truth = norm.logpdf(rest).sum() + 0.5 * size * math.log(2 * math.pi) - (size + 2) * math.log(noise)
        program, given = Program(model, guide), torch.from_numpy(x).unsqueeze(0)
        found = exact_log_evidence(program, given).item()
        assert found == pytest.approx(truth - 0.5 * np.linalg.slogdet(inner)[1], rel=0, abs=1e-6)
        posterior = exact_posterior(program, given)
        covariance = np.linalg.inv(inner) * np.outer(spread, spread)
        np.testing.assert_allclose(posterior.covariance_matrix[0] / scale**2, covariance / scale**2, rtol=1e-5)
        wide = np.sqrt(covariance.diagonal())
        np.testing.assert_allclose((array(posterior.loc)[0] - loc - spread * mean) / wide, 0, atol=1e-5)


@pytest.mark.parametrize("function", [exact_log_evidence, exact_posterior, compare_posteriors])
def test_data_that_do_not_fit_are_refused(function: Callable[..., Any]) -> None:
    vae = linear_vae(StandardNormal(2), Normal(5, scale="shared"))
    with pytest.raises(ValueError, match=r"Expected data of shape \(n, 5\); got \(4, 6\)"):
        function(vae, torch.randn(4, 6))
    with pytest.raises(ValueError, match="Expected finite numbers in `x`"):
        function(vae, torch.full((4, 5), math.nan))


# The comparison


def _gaussians(vae: Any, x: Tensor) -> tuple[Any, Any, Any, Any]:
    _, loc, covariance = dense(vae).truth(array(x))
    q = vae.approximate(x)
    q_covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    return loc, covariance, array(q.mean), array(q_covariance)


@pytest.mark.parametrize("family", [Normal, FullNormal])
@pytest.mark.parametrize("z", [1, 2, 5])
def test_distances_are_those_of_numpy_and_scipy(family: Any, z: int) -> None:
    vae = VAE(
        Conditional(FullNormal(z)), Conditional(Normal(6, scale="feature"), Linear()), Conditional(family(z), Linear())
    )
    randomise(vae, seed=z)
    with torch.no_grad():
        vae.posterior.network.weight *= 0.2  # type: ignore[operator]
    x = draws(8, 6)
    found = compare_posteriors(vae, x)
    with torch.no_grad():
        sets = _gaussians(vae, x)
    for i, (m, s, mean, cov) in enumerate(zip(*sets, strict=True)):
        apart = mean - m
        kl = 0.5 * (
            np.trace(np.linalg.solve(s, cov))
            + apart @ np.linalg.solve(s, apart)
            - z
            + np.linalg.slogdet(s)[1]
            - np.linalg.slogdet(cov)[1]
        )
        root = np.real(sqrtm(s))
        cross = np.real(sqrtm(root @ cov @ root))
        w2 = math.sqrt(apart @ apart + np.trace(s + cov - 2 * cross))
        ratio = np.exp(0.5 * (np.log(np.diag(cov)) - np.log(np.diag(s))).mean())
        assert found.kl[i].item() == pytest.approx(kl, rel=1e-8)
        assert found.gap[i].item() == pytest.approx(kl, rel=1e-8, abs=1e-8)
        assert found.wasserstein[i].item() == pytest.approx(w2, rel=1e-6)
        assert found.mean_error[i].item() == pytest.approx(np.linalg.norm(apart / np.diag(s) ** 0.5), rel=1e-8)
        assert found.scale_ratio[i].item() == pytest.approx(ratio, rel=1e-8)


def test_known_divergences() -> None:
    """A13 in both directions, by programs whose data say nothing of z, and one of A21's distances."""
    first = torch.zeros(2), torch.diag(torch.tensor([1.0, 2.0]))
    second = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])

    def pair(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Any:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.MultivariateNormal(*p))
                pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]), obs=x[:, 0])

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.MultivariateNormal(*q))

        return compare_posteriors(Program(model, guide), torch.zeros(1, 1))

    forward, reverse = pair(second, first), pair(first, second)
    for found, kl in ((forward, 1.5046628751), (reverse, 1.0667656963)):
        assert found.kl.item() == pytest.approx(kl, abs=1e-9)
        assert found.gap.item() == pytest.approx(kl, abs=1e-9)
        assert found.wasserstein.item() ** 2 == pytest.approx(2.4352331992, abs=1e-8)
    commuting = pair((torch.zeros(2), torch.eye(2)), (torch.ones(2), torch.diag(torch.tensor([4.0, 9.0]))))
    assert commuting.wasserstein.item() ** 2 == pytest.approx(7.0, abs=1e-9)
    assert commuting.scale_ratio.item() == pytest.approx(math.sqrt(6), abs=1e-9)
    assert commuting.mean_error.item() == pytest.approx(math.sqrt(2), abs=1e-9)


@pytest.mark.parametrize(("latent", "gap"), [(2, 0.00099605), (5, 0.13909394), (10, 0.81132250)])
def test_gap_of_the_best_mean_field_guide_of_rotated_ppca(latent: int, gap: float) -> None:
    """A8: put in by hand, exact means and the precision's diagonal; nothing else diagonal is better."""
    digits = torch.from_numpy(load_digits().data)
    rotation = torch.from_numpy(dct(np.eye(latent), norm="ortho", axis=0))
    for turn, expected in ((rotation, gap), (torch.eye(latent), 0.0)):
        ppca = PPCA.fit(digits, latent)
        turned = PPCA(ppca.loc, ppca.weight @ turn.T, ppca.scale)
        precision = torch.eye(latent) + turned.weight.T @ turned.weight / turned.scale**2
        optimum = precision.diagonal() ** -0.5
        gain = torch.linalg.solve(precision, turned.weight.T / turned.scale**2)
        guided: Any = VAE(
            prior := Conditional(StandardNormal(latent)),
            likelihood := Conditional(Normal(64, scale="shared"), Linear()),
            Conditional(Normal(latent, scale="feature"), Linear()),
        )
        exact: Any = turned.to_vae()
        likelihood.load_state_dict(exact.likelihood.state_dict())
        assert guided.prior is prior
        network: Any = guided.posterior.network
        with torch.no_grad():
            network.weight.copy_(gain)
            network.bias.copy_(-gain @ turned.loc)
            guided.posterior.family.raw_scale.copy_((optimum - 1e-6).expm1().log())
        found = compare_posteriors(guided, digits[:150])
        torch.testing.assert_close(found.kl, torch.full((150,), expected), rtol=0, atol=1e-8)
        torch.testing.assert_close(found.gap, torch.full((150,), expected), rtol=0, atol=1e-8)
        assert found.mean_error.max() < 1e-9
        with torch.no_grad():
            guided.posterior.family.raw_scale += 0.01
        assert (compare_posteriors(guided, digits[:2]).kl > expected + 1e-6).all()


def test_the_closed_form_needs_no_gradients_from_its_caller():
    twin = (
        TWINS["two_level"]() if "two_level" in TWINS else next(make() for name, make in TWINS.items() if "two" in name)
    )
    with torch.no_grad():
        inside = exact_log_evidence(twin.program, twin.batch)
    assert torch.equal(inside, exact_log_evidence(twin.program, twin.batch))
