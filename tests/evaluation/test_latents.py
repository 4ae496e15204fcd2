"""What the latents are used for, against PPCA's closed forms."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import kl_divergence
from twins import TWINS, draws, perturbed, randomise

from ppl_vae import PPCA, VAE, Conditional, Program, exact_posterior, log_evidence
from ppl_vae.evaluation.aggregate_posterior import aggregate, mmd
from ppl_vae.evaluation.latents import active_units, codes, rate_distortion, rates
from ppl_vae.families import Bernoulli, FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP


def digits() -> tuple[Tensor, PPCA, Tensor]:
    """Give the digits, their PPCA of 10 latents, and the eigenvalues of their covariance, falling."""
    x = torch.from_numpy(load_digits().data)
    return x, PPCA.fit(x, 10), torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)


# Rates and codes


def test_rates_of_the_digits() -> None:
    """A7: the mean rate of latent j is half the log of its eigenvalue over the noise; the sum is 12.796 nats."""
    x, ppca, eigenvalues = digits()
    found = rates(ppca.to_vae(), x)
    assert found.shape == (1797, 10)
    known = 0.5 * (eigenvalues[:10] / ppca.scale**2).log()
    np.testing.assert_allclose(found.mean(0), known, atol=1e-8)
    assert found.mean(0).sum().item() == pytest.approx(12.79614086, abs=1e-7)
    assert (found >= 0).all()
    torch.testing.assert_close(found, rates(ppca.to_vae(), x, draws=1, seed=5))


def test_codes_of_the_digits_have_the_variances_of_the_eigenvalues() -> None:
    """Mean posterior covariance and covariance of the means make one: the prior's, at the optimum."""
    x, ppca, eigenvalues = digits()
    mean, variance = codes(ppca.to_vae(), x, 50)
    share = 1 - ppca.scale**2 / eigenvalues[:10]
    assert ((mean.var(0) - (1 - share) / 50 - share).abs() < 5 * (4 / 50 / 1797) ** 0.5).all()
    assert ((variance.mean(0) - (1 - share)).abs() < 5 * (1 - share) * (2 / 49 / 1797) ** 0.5).all()


def test_active_units_are_counted_by_eigenvalues() -> None:
    """Lucas et al. 2019: with the noise held fixed, a latent collapses where the noise variance is the greater."""
    x, ppca, eigenvalues = digits()
    vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))[1].flip(1)[:, :10]
    for variance in (10.0, 30.0, 80.0):
        weight = vectors * (eigenvalues[:10] - variance).clamp_min(0).sqrt()
        vae = PPCA(ppca.loc, weight, torch.tensor(variance).sqrt()).to_vae()
        expected = eigenvalues[:10] > variance / 0.99
        assert torch.equal(active_units(vae, x), expected)
        assert torch.equal(rates(vae, x).mean(0) > 1e-3, expected)
    assert 0 < int(expected.sum()) < 10


@pytest.mark.parametrize("draws_", [1, 150])
def test_normal_rates_are_in_closed_form(draws_: int) -> None:
    vae = randomise(
        VAE(
            Conditional(Normal(3)),
            Conditional(Bernoulli(5), MLP(hidden=[4])),
            Conditional(Normal(3), MLP(hidden=[4])),
        )
    )
    x = (draws(130, 5) > 0).double()
    with torch.no_grad():
        expected = kl_divergence(vae.approximate(x).base_dist, vae.prior().base_dist)  # type: ignore[operator]
    torch.testing.assert_close(rates(vae, x, draws=draws_), expected)


@pytest.mark.parametrize("twin", ["state_space", "inner_plate"])
def test_rates_of_several_sites_add_up(twin: str) -> None:
    t = TWINS[twin]()
    wrong = perturbed(t.program, 1.2, 0.1)
    found = rates(wrong, t.batch, draws=3000)
    assert found.shape == t.loc.shape
    evidence = log_evidence(wrong, t.batch, 3000, seed=1)
    scale = 5 * 2 * (evidence.rate.abs() + 5) / 3000**0.5
    assert ((found.sum(1) - evidence.rate).abs() < scale).all()


def test_rates_of_correlated_latents_fall_short_by_the_total_correlation() -> None:
    """A7 and A8: a rotation of W leaves the rate of all as it was, and moves a part of it into correlations."""
    x, ppca, _ = digits()
    j = np.arange(10)
    rotation = np.sqrt(0.2) * np.cos(np.pi / 10 * np.outer(j, j + 0.5))
    rotation[0] /= np.sqrt(2)
    weight, variance = ppca.weight.numpy() @ rotation.T, ppca.scale.item() ** 2
    found = rates(PPCA(ppca.loc, torch.from_numpy(weight), ppca.scale).to_vae(), x)
    inverse = np.linalg.inv(weight.T @ weight + variance * np.eye(10))
    covariance, mean = variance * inverse, (x - ppca.loc).numpy() @ weight @ inverse
    own = covariance.diagonal()
    np.testing.assert_allclose(found, 0.5 * (own + mean**2 - 1 - np.log(own)), atol=1e-8)
    correlation = 0.5 * (np.log(own).sum() - np.linalg.slogdet(covariance)[1])
    whole = 0.5 * (own.sum() + (mean**2).sum(1) - 10 - np.linalg.slogdet(covariance)[1])
    np.testing.assert_allclose(found.sum(1) + correlation, whole, atol=1e-7)
    assert whole.mean() == pytest.approx(12.79614086, abs=1e-7)
    assert correlation > 0.5


GRID = np.linspace(-14, 14, 8001)


def one_dimensional(weights: Any, locs: Any, scales: Any) -> Any:
    """Give the density of a mixture of normals on the grid, by scipy."""
    parts = zip(np.atleast_1d(weights), np.atleast_1d(locs), np.atleast_1d(scales), strict=True)
    return sum(w * stats.norm(m, s).pdf(GRID) for w, m, s in parts)


def kl_on_the_grid(q: Any, p: Any) -> tuple[float, float]:
    """Give KL(q || p) and the standard deviation of log q / p under q, by the trapezoidal rule."""
    log_ratio = np.log(np.maximum(q, 1e-300)) - np.log(np.maximum(p, 1e-300))
    mean = np.trapezoid(q * log_ratio, GRID)
    return mean, math.sqrt(np.trapezoid(q * log_ratio**2, GRID) - mean**2)


def wide(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


WEIGHTS = wide([0.5, 0.2, 0.3])
LOCS = wide([[-1.5, 0.5], [1.0, -1.0], [0.2, 2.0]])
COVARIANCES = wide([[[0.5, 0.3], [0.3, 0.4]], [[0.1, 0.0], [0.0, 1.5]], [[0.3, -0.2], [-0.2, 0.9]]])
SPREAD = COVARIANCES.diagonal(dim1=-2, dim2=-1).sqrt()
SEVERAL, FIRST = (WEIGHTS, LOCS, SPREAD), (1.0, LOCS[:1], SPREAD[:1])
FACTOR, REST = wide([[0.6], [0.5]]), wide([0.14, 0.15])

# a distribution, and weights, means and scales of its marginals
STANDARD = dist.Normal(wide([0, 0]), 1.0).to_event(1), (1.0, torch.zeros(1, 2), torch.ones(1, 2))
ONE = dist.MultivariateNormal(LOCS[0], COVARIANCES[0]), FIRST
LOW_RANK = dist.LowRankMultivariateNormal(LOCS[0], FACTOR, REST), FIRST
DIAGONAL = dist.MixtureOfDiagNormals(LOCS, SPREAD, WEIGHTS.log()), SEVERAL
FULL = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.MultivariateNormal(LOCS, COVARIANCES)), SEVERAL


def fixed(q: Any, p: Any) -> Program:
    """Give a program whose guide and prior are these, whatever the data."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", q)

    return Program(model, guide)


@pytest.mark.parametrize(
    ("q", "p", "closed"),
    [
        pytest.param(ONE, STANDARD, True, id="full"),
        pytest.param(LOW_RANK, STANDARD, True, id="low rank"),
        pytest.param(LOW_RANK, ONE, True, id="both correlated"),
        pytest.param(DIAGONAL, STANDARD, False, id="mixture"),
        pytest.param(FULL, STANDARD, False, id="mixture of full"),
        pytest.param(ONE, DIAGONAL, False, id="mixture for a prior"),
        pytest.param(FULL, DIAGONAL, True, id="the same marginals"),
    ],
)
def test_rates_of_marginals_by_scipy(q: Any, p: Any, closed: bool) -> None:
    found = rates(fixed(q[0], p[0]), torch.zeros(1500, 2), draws=120)
    assert found.shape == (1500, 2)
    for latent in range(2):
        ours, theirs = (one_dimensional(w, m[:, latent], s[:, latent]) for w, m, s in (q[1], p[1]))
        known, spread = kl_on_the_grid(ours, theirs)
        error = spread / (1500 * 120) ** 0.5
        assert found[:, latent].mean().item() == pytest.approx(known, abs=1e-9 if closed else 5 * error)
        assert closed == bool(found[:, latent].std() < 1e-9)
        if q[1] is SEVERAL and p is STANDARD:  # a normal of the same moments is told from the mixture
            mean = np.trapezoid(GRID * ours, GRID)
            matched = one_dimensional(1.0, mean, np.trapezoid((GRID - mean) ** 2 * ours, GRID) ** 0.5)
            assert abs(kl_on_the_grid(matched, theirs)[0] - known) > 10 * error


def test_rates_of_the_families_with_correlations() -> None:
    """By their own moments, and by scipy for a mixture's parts, datum by datum."""
    x = (draws(12, 5) > 0).double()
    for family in (FullNormal(2), MixtureNormal(2, components=3)):
        likelihood, guide = Conditional(Bernoulli(5), MLP(hidden=[4])), Conditional(family, MLP(hidden=[4]))
        vae: Any = randomise(VAE(Conditional(StandardNormal(2)), likelihood, guide))
        found = rates(vae, x, draws=2000)
        with torch.no_grad():
            q = vae.approximate(x)
        if isinstance(family, FullNormal):
            own = q.covariance_matrix.diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(found, 0.5 * (own + q.mean**2 - 1 - own.log()))
            assert (own.log().sum(-1) - q.covariance_matrix.logdet() > 1e-3).any()
            continue
        for datum in range(0, 12, 4):
            parts = q.probs[datum], q.locs[datum], q.coord_scale[datum]
            for latent in range(2):
                ours = one_dimensional(parts[0], parts[1][:, latent], parts[2][:, latent])
                known, spread = kl_on_the_grid(ours, stats.norm.pdf(GRID))
                assert found[datum, latent].item() == pytest.approx(known, abs=5 * spread / 2000**0.5)


@pytest.mark.parametrize("kind", [dist.Normal, dist.Laplace])
def test_what_a_mask_hides_has_no_rate(kind: Any) -> None:
    keep = torch.tensor([[True, True, True], [True, False, True]]).T  # steps by data
    loc = draws(3, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 2, dim=-1), pyro.plate("steps", 3, dim=-2), poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x.new_zeros(3, 2), 1.0)), 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 2, dim=-1), pyro.plate("steps", 3, dim=-2), poutine.mask(mask=keep):
            pyro.sample("z", kind(loc, 0.5))

    program = Program(model, guide)
    found = rates(program, draws(2, 3))
    assert torch.equal(found == 0, ~keep.T)
    evidence = log_evidence(program, draws(2, 3), 4000)
    assert ((found.sum(1) - evidence.rate).abs() < 5 * 6 * (1 / 4000 + 1 / 100) ** 0.5).all()


def test_latents_whose_marginals_have_no_density_are_refused() -> None:
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.Planar(2)])
    shares = dist.Dirichlet(torch.ones(2))
    message = r"Expected latents whose marginals have a density.*site 'z' of the {} is a {}\. log_evidence\(.*\)\.rate"
    for q, p, role, name in ((flow, STANDARD[0], "guide", "Transformed"), (shares, shares, "guide", "Dirichlet")):
        with pytest.raises(ValueError, match=message.format(role, f"{name}.*")):
            rates(fixed(q, p), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=message.format("model", "Transformed.*")):
        rates(fixed(ONE[0], flow), torch.zeros(3, 2))


# The aggregate posterior


def small() -> tuple[Any, float]:
    """A linear pair of little information, and its mutual information 1/2 log det (I + W'W / s^2)."""
    weight = torch.tensor([[1.0, 0.0], [0.5, 0.8], [0.0, -0.6], [0.3, 0.3]])
    ppca = PPCA(torch.zeros(4), weight, torch.tensor(0.9))
    return ppca.to_vae(), 0.5 * torch.logdet(torch.eye(2) + weight.T @ weight / 0.81).item()


def test_mutual_information_of_a_linear_pair_lies_between_its_bounds() -> None:
    vae, information = small()
    x = vae.sample(2500, seed=1)
    found = aggregate(vae, x)
    assert found.n == 2500
    assert found.rate == pytest.approx(found.mutual_information + found.kl)
    assert abs(found.rate - information) < 5 * found.error
    assert found.mutual_information - 5 * found.error < information < found.upper + 5 * found.error
    assert found.mutual_information < found.upper
    assert found.upper - found.mutual_information < 0.1
    assert -5 * found.error < found.kl < 0.05  # with the exact posterior the aggregate is the prior
    assert abs(found.mmd) < 5 * found.mmd_error
    assert aggregate(vae, x[:300]) == aggregate(vae, x[:300])
    few = aggregate(vae, x[:5], draws=40)
    assert few.mutual_information <= math.log(5) + 1e-9
    assert few.kl > found.kl + 0.1


def test_an_aggregate_that_misses_the_prior_is_seen() -> None:
    vae, _ = small()
    x = vae.sample(600, seed=1)
    wrong = perturbed(vae, 1.0, 0.7)
    found = aggregate(wrong, x)
    assert found.kl - 5 * found.error > 0.2
    assert found.mmd > 5 * found.mmd_error
    exact = exact_posterior(vae, x)
    shifted = torch.distributions.MultivariateNormal(exact.loc + 0.7, exact.covariance_matrix)
    known = kl_divergence(shifted, torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))).mean()
    assert abs(found.rate - known.item()) < 5 * found.error


def test_the_aggregate_is_the_mixture_of_all_data() -> None:
    """By hand, over blocks, for a guide with a full covariance and several draws; the twins of several sites run."""
    t = TWINS["full_prior"]()
    batch = {"x": draws(230, 7)}
    found = aggregate(t.program, batch, draws=2, seed=3)
    exact = exact_posterior(t.program, batch)
    z = exact.sample((60,)).flatten(0, 1)
    log_mixture = exact.log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(230)
    own = exact.log_prob(z.unflatten(0, (60, 230))).flatten()
    assert abs((own - log_mixture).mean().item() - found.mutual_information) < 5 * found.error
    for twin in ("two_level", "state_space", "inner_plate", "masked"):
        one = aggregate(TWINS[twin]().program, TWINS[twin]().batch)
        assert one.rate == pytest.approx(one.mutual_information + one.kl)
        assert one.mutual_information <= math.log(6) + 1e-9


def test_the_memory_of_scores_is_bounded() -> None:
    """30,000 draws are scored under a block of 100 data some millions of numbers at a time, not six."""
    vae, _ = small()
    x, sizes = vae.sample(150), []

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            q = vae.approximate(x)
            sizes.append(pyro.sample("z", q).numel())

    found = aggregate(Program(vae.model, guide), x, draws=200)
    assert 2**21 < max(sizes) <= 2**22
    assert sum(sizes) > 150 * 30_000 * 2
    assert abs(found.mutual_information - aggregate(vae, x).mutual_information) < 5 * found.error


# MMD


def test_mmd_is_unbiased_with_an_honest_error() -> None:
    """Over 200 repeats of equal and of unequal normals, whose expected kernel is in closed form; by hand for six."""
    generator = torch.Generator().manual_seed(0)

    def draw(shift: float, m: int = 60) -> tuple[Tensor, Tensor]:
        return (
            torch.randn(m, 2, generator=generator, dtype=torch.float64),
            torch.randn(m, 2, generator=generator, dtype=torch.float64) + shift,
        )

    for shift in (0.0, 1.0):
        a, b = draw(shift, 1500)
        width = torch.pdist(torch.cat([a, b])).square().median().item()
        expected = 2 * width / (width + 2) * (1 - math.exp(-(shift**2) / (width + 2)))
        value, error = mmd(a, b)
        assert abs(value - expected) < 5 * error
        found = torch.tensor([mmd(*draw(shift)) for _ in range(200)])
        assert abs(found[:, 0].mean().item() - expected) < 5 * found[:, 0].std().item() / 200**0.5 + 0.003
        assert found[:, 1].square().mean().sqrt().item() == pytest.approx(found[:, 0].std().item(), rel=0.3)
    a, b = draw(1.0, 6)
    both = torch.cat([a, b])
    width = torch.pdist(both).square().median()
    k = torch.exp(-torch.cdist(both, both).square() / (2 * width))
    by_hand = sum(k[i, j] + k[i + 6, j + 6] - k[i, j + 6] - k[j, i + 6] for i in range(6) for j in range(6) if i != j)
    assert mmd(a, b)[0] == pytest.approx(float(by_hand) / 30)


# Rate and distortion


def best(scale: float) -> tuple[PPCA, Tensor, Tensor, Tensor]:
    """Give the digits' best PPCA of 10 latents for noise that is held fixed, the data, and known rate and error."""
    x, ppca, eigenvalues = digits()
    vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))[1].flip(1)[:, :10]
    weight = vectors * (eigenvalues[:10] - scale**2).clamp_min(0).sqrt()
    active = eigenvalues[:10][eigenvalues[:10] > scale**2]
    rate = 0.5 * (active / scale**2).log().sum()
    # E|x - Wz - m|^2 under the exact posterior: s^2 for each active direction, the eigenvalue for the others
    error = eigenvalues.sum() - active.sum() + len(active) * scale**2
    return PPCA(ppca.loc, weight, torch.tensor(scale)), x, rate, error


def test_the_rate_distortion_curve_of_ppca() -> None:
    """With the noise s^2 held fixed at its optimum W: each active latent has the rate 1/2 ln(lambda / s^2)."""
    scales = [2.0, 3.0, 5.0, 9.0, 16.0]
    found = rate_distortion(lambda scale: best(scale)[0].to_vae(), scales, best(1.0)[1], draws=20)
    for i, scale in enumerate(scales):
        _, _, rate, error = best(scale)
        distortion = 0.5 * error / scale**2 + 64 * math.log(scale * math.sqrt(2 * math.pi))
        assert abs(found.rate[i] - rate) <= 5 * found.rate_error[i] + 1e-6
        assert abs(found.distortion[i] - distortion) <= 5 * found.distortion_error[i] + 1e-6
    assert (found.rate.diff() < -0.4).all()
    assert found.rate[-1] < 1e-6  # the noise exceeds all eigenvalues
    assert found.settings.tolist() == scales
    assert 0 < found.rate_error.max() < 0.05


def test_the_rate_distortion_curve_of_beta() -> None:
    """At noise s, beta weighs the rate as noise beta s^2 does: W, guide and rate are those of that noise.

    Each point of the curve is the best of all under its own beta.
    """
    betas, scale = [0.5, 1.0, 2.0, 4.0, 8.0], 3.0

    def refit(beta: float) -> Any:
        ppca = best(scale * beta**0.5)[0]
        model = PPCA(ppca.loc, ppca.weight, torch.tensor(scale)).to_vae()
        return Program(model.model, ppca.to_vae().guide)

    found = rate_distortion(refit, betas, best(1.0)[1], draws=20)
    for i, beta in enumerate(betas):
        _, _, rate, error = best(scale * beta**0.5)
        distortion = 0.5 * error / scale**2 + 64 * math.log(scale * math.sqrt(2 * math.pi))
        assert abs(found.rate[i] - rate) <= 5 * found.rate_error[i]
        assert abs(found.distortion[i] - distortion) <= 5 * found.distortion_error[i]
        assert (beta * found.rate + found.distortion).argmin() == i
    assert (found.rate.diff() < 0).all()
    assert (found.distortion.diff() > 0).all()


def test_nothing_global_changes() -> None:
    vae, _ = small()
    x, other = vae.sample(20), TWINS["one_by_one"]().program
    state = torch.get_rng_state()
    for function in (aggregate, codes):
        function(vae, x)
    rates(other, draws(3, 1))
    rate_distortion(lambda scale: vae, [1.0], x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())


def test_settings_are_refused() -> None:
    vae, _ = small()
    x, whole = vae.sample(4), "Expected `{}` to be a whole number, at least {}; got {}"
    for call, message in (
        (lambda: rates(vae, x, draws=0), whole.format("draws", 1, 0)),
        (lambda: rates(vae, x, draws=2.5), whole.format("draws", 1, 2.5)),
        (lambda: codes(vae, x, 1), whole.format("draws", 2, 1)),
        (lambda: codes(vae, x, 2.5), whole.format("draws", 2, 2.5)),
        (lambda: active_units(vae, x, draws=2.5), whole.format("draws", 2, 2.5)),
        (lambda: aggregate(vae, x, draws=1.5), whole.format("draws", 1, 1.5)),
        (lambda: aggregate(vae, x[:1]), "Expected at least two data; got 1"),
        (lambda: mmd(x, x[:2]), "Expected two sets of as many draws"),
        (lambda: rate_distortion(lambda s: vae, [], x), "Expected at least one of `settings`; got none"),
        (lambda: rate_distortion(lambda s: vae, [1.0], x, draws=1), whole.format("draws", 2, 1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
