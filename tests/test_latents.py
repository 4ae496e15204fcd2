"""What the latents are used for, against PPCA's closed forms."""

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import kl_divergence
from twins import TWINS, draws, perturbed, randomise

from ppl_vae import PPCA, VAE, Conditional, exact_posterior, log_evidence
from ppl_vae.families import Bernoulli, MixtureNormal, Normal
from ppl_vae.latents import active_units, aggregate, codes, mmd, rate_distortion, rates
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


def test_a_site_that_does_not_factorise_is_refused() -> None:
    t = TWINS["full_prior"]()
    with pytest.raises(ValueError, match=r"Expected independent latents.*site 'z' of the (guide|model)"):
        rates(t.program, t.batch)
    vae = VAE(
        Conditional(MixtureNormal(2, components=3)),
        Conditional(Bernoulli(5), MLP(hidden=[4])),
        Conditional(Normal(2), MLP(hidden=[4])),
    )
    with pytest.raises(ValueError, match="site 'z' of the model is a Mixture"):
        rates(vae, (draws(3, 5) > 0).double())


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
    again = aggregate(vae, x)
    assert found == again
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
    z = exact.sample((400,)).flatten(0, 1)
    log_mixture = exact.log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(230)
    own = exact.log_prob(z.unflatten(0, (400, 230))).flatten()
    assert abs((own - log_mixture).mean().item() - found.mutual_information) < 5 * found.error
    for twin in ("two_level", "state_space", "inner_plate", "masked"):
        one = aggregate(TWINS[twin]().program, TWINS[twin]().batch)
        assert one.rate == pytest.approx(one.mutual_information + one.kl)
        assert one.mutual_information <= math.log(6) + 1e-9


def test_the_memory_of_scores_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppl_vae import latents

    vae, _ = small()
    x = vae.sample(150)
    expected = aggregate(vae, x)
    monkeypatch.setattr(latents, "_ENTRIES", 5000)
    sizes: list[int] = []
    original = latents.conditioned

    def spied(function: Any, values: Any, *rest: Any) -> Tensor:
        sizes.append(values["z"].numel())
        return original(function, values, *rest)

    monkeypatch.setattr(latents, "conditioned", spied)
    found = aggregate(vae, x)
    assert max(sizes) <= 5000
    assert found.mutual_information == pytest.approx(expected.mutual_information)


# MMD


def test_mmd_is_unbiased_with_an_honest_error() -> None:
    """Over 200 repeats of equal and of unequal distributions; the expectation by brute force."""
    generator = torch.Generator().manual_seed(0)

    def draw(shift: float, m: int = 60) -> tuple[Tensor, Tensor]:
        return (
            torch.randn(m, 2, generator=generator, dtype=torch.float64),
            torch.randn(m, 2, generator=generator, dtype=torch.float64) + shift,
        )

    for shift in (0.0, 1.0):
        found = torch.tensor([mmd(*draw(shift)) for _ in range(200)])
        expected = 0.0 if shift == 0 else mmd(*draw(shift, 3000))[0]
        assert abs(found[:, 0].mean().item() - expected) < 5 * found[:, 0].std().item() / 200**0.5 + 0.003
        assert found[:, 1].square().mean().sqrt().item() == pytest.approx(found[:, 0].std().item(), rel=0.3)
    a, b = draw(1.0, 6)
    both = torch.cat([a, b])
    width = torch.pdist(both).square().median()
    k = torch.exp(-torch.cdist(both, both).square() / (2 * width))
    by_hand = sum(k[i, j] + k[i + 6, j + 6] - k[i, j + 6] - k[j, i + 6] for i in range(6) for j in range(6) if i != j)
    assert mmd(a, b)[0] == pytest.approx(float(by_hand) / 30)


# Rate and distortion


def test_the_rate_distortion_curve_of_ppca() -> None:
    """With the noise s^2 held fixed at its optimum W: each active latent has the rate 1/2 ln(lambda / s^2)."""
    x, ppca, eigenvalues = digits()
    vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))[1].flip(1)[:, :10]

    def refit(scale: float) -> Any:
        weight = vectors * (eigenvalues[:10] - scale**2).clamp_min(0).sqrt()
        return PPCA(ppca.loc, weight, torch.tensor(scale)).to_vae()

    scales = [2.0, float(ppca.scale), 5.0, 9.0]
    found = rate_distortion(refit, scales, x, draws=20)
    for i, scale in enumerate(scales):
        active = eigenvalues[:10][eigenvalues[:10] > scale**2]
        rate = 0.5 * (active / scale**2).log().sum().item()
        # E|x - Wz - m|^2 under the exact posterior: s^2 for each active direction, the eigenvalue for the others
        error = (eigenvalues.sum() - active.sum()).item() + len(active) * scale**2
        distortion = 0.5 * error / scale**2 + 64 * math.log(scale * math.sqrt(2 * math.pi))
        assert abs(found.rate[i].item() - rate) < 5 * found.rate_error[i].item() + 1e-9 or scale == 2.0
        if scale**2 < ppca.scale**2:
            continue
        assert abs(found.distortion[i].item() - distortion) < 5 * found.distortion_error[i].item()
        assert abs(found.rate[i].item() - rate) < 5 * found.rate_error[i].item()
    assert (found.rate.diff() < 0).all()
    assert found.settings.tolist() == scales
    assert 0 < found.rate_error.max() < 0.05


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
    x = vae.sample(4)
    for call, message in (
        (lambda: rates(vae, x, draws=0), "Expected `draws` to be at least 1; got 0"),
        (lambda: codes(vae, x, 1), "Expected `draws` to be at least 2; got 1"),
        (lambda: aggregate(vae, x[:1]), "Expected at least two data and one draw; got 1 and 1"),
        (lambda: mmd(x, x[:2]), "Expected two sets of as many draws"),
        (lambda: rate_distortion(lambda s: vae, [], x), "Expected at least one setting and two draws; got 0 and 100"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
