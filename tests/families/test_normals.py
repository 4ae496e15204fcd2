import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from families.cases import (
    CASES,
    gaussian_moments,
    linear_pair,
    near_start,
    normal_scale,
    perturb,
    posterior_moments,
    softplus,
)
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae import VAE, Conditional
from ppl_vae.families import Bernoulli, ExactNormal, FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.families.exact_normal import linear_gaussian
from ppl_vae.families.family import positive, unconstrained
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.sites import structure


@pytest.mark.parametrize("make", [FullNormal, MixtureNormal])
def test_families_of_vectors_refuse_pictures(make: Any) -> None:
    with pytest.raises(ValueError, match=rf"{make.__name__} to have a vector.*got shape \(2, 3\). Flatten"):
        make((2, 3))


@pytest.mark.parametrize("event", [0, (), (3, 0), -1])
def test_empty_events_are_refused(event: Any) -> None:
    with pytest.raises(ValueError, match=f"event of Normal to have positive sizes; got {re.escape(repr(event))}"):
        Normal(event)


@pytest.mark.parametrize("scale", ["free", 0, -1.0, math.inf, math.nan, True, None])
def test_other_scales_are_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="`scale` to be network, shared, feature or a positive number; got"):
        Normal(2, scale=scale)


def test_a_mixture_without_components_is_refused() -> None:
    with pytest.raises(ValueError, match="`components` to be a whole number, at least 1; got 0"):
        MixtureNormal(2, components=0)


@pytest.mark.parametrize("components", [1, 3])
def test_mixture_gradients_by_sampling_are_those_of_the_exact_moments(components: int) -> None:
    """d/dtheta E[sum z^2] is known: sum_c pi_c (loc_c^2 + scale_c^2)."""
    family, n, blocks = MixtureNormal(2, components=components), 2_000, 25
    raw = near_start(family).requires_grad_()
    logits, rest = raw[:components], raw[components:].reshape(2, components, 2)
    exact = (logits.softmax(-1).unsqueeze(-1) * (rest[0] ** 2 + positive(rest[1]) ** 2)).sum()
    (truth,) = torch.autograd.grad(exact, raw)
    draws = [
        torch.autograd.grad(family.distribution(raw).rsample((n,)).square().sum(-1).mean(), raw)[0]
        for _ in range(blocks)
    ]
    estimate = torch.stack(draws)
    error = estimate.std(0) / blocks**0.5 + 1e-12
    assert ((estimate.mean(0) - truth).abs() < 5 * error).all()


STARTS = ["Normal(network)", "Normal(shared)", "Normal(feature)", "Normal(0.7)", "FullNormal", "MixtureNormal"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_fit_start_begins_at_the_data(name: str, masked: bool) -> None:
    family = CASES[name].build(3)
    x = torch.randn(200, 3) * torch.tensor([0.5, 2.0, 5.0]) + torch.tensor([1.0, -3.0, 0.0])
    mask = torch.rand(200, 3) < 0.7 if masked else None
    holes = x if mask is None else torch.where(mask, x, math.nan)
    loc, scale = np.nanmean(holes.numpy(), 0), np.nanstd(holes.numpy(), 0)
    raw = family.fit_start(holes, mask)
    assert raw.shape == family.start().shape
    d: Any = family.distribution(raw)
    if name == "MixtureNormal":
        weights, locs, scales = np.split(raw.numpy(), [3, 12])
        assert (weights == 0).all()
        np.testing.assert_allclose(softplus(scales.reshape(3, 3)), np.tile(scale, (3, 1)), rtol=1e-9)
        parted = (locs.reshape(3, 3) - loc) / scale
        assert np.abs(parted).max() < 5
        assert len(np.unique(parted)) == 9
        return
    np.testing.assert_allclose(d.mean, loc, rtol=1e-12, atol=1e-12)
    expected = {"Normal(shared)": np.full(3, np.sqrt((scale**2).mean())), "Normal(0.7)": np.full(3, 0.7)}
    np.testing.assert_allclose(d.stddev.detach(), expected.get(name, scale), rtol=1e-9)
    if name == "FullNormal":
        np.testing.assert_allclose(d.covariance_matrix, np.diag(scale**2), rtol=1e-9)


def test_start_is_a_standard_normal() -> None:
    for name in ("Normal(network)", "FullNormal", "StandardNormal"):
        family = CASES[name].make(3)
        d: Any = family.distribution(family.start())
        torch.testing.assert_close(d.mean, torch.zeros(3))
        torch.testing.assert_close(d.variance, torch.ones(3))
    for scale in ("shared", "feature"):
        torch.testing.assert_close(Normal(3, scale=scale).own_scale().expand(3), torch.ones(3))


@pytest.mark.parametrize("constant", [0.0, 7.0, 0.1, 1 / 3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["Normal(network)", "Normal(feature)", "FullNormal", "MixtureNormal"])
def test_constant_features_are_refused_where_each_has_its_scale(name: str, dtype: torch.dtype, constant: float) -> None:
    x = torch.randn(37, 4, dtype=dtype)
    x[:, [1, 3]] = constant
    with pytest.raises(
        ValueError, match=r"features that vary.*2 constant features \(columns 1, 3\).*scale = \"shared\""
    ):
        CASES[name].build(4).to(dtype).fit_start(x)


def test_long_lists_of_constant_features_are_cut() -> None:
    with pytest.raises(ValueError, match=r"12 constant features \(columns 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        Normal(12).fit_start(torch.zeros(5, 12))


def test_features_constant_where_they_are_observed_are_refused() -> None:
    x, mask = torch.randn(10, 3), torch.ones(10, 3, dtype=torch.bool)
    x[:5, 1], mask[5:, 1] = 2.0, False
    with pytest.raises(ValueError, match=r"columns 1\)"):
        Normal(3, scale="feature").fit_start(x, mask)


@pytest.mark.parametrize("scale", ["shared", 0.3])
def test_constant_features_are_welcome_under_one_scale(scale: Any) -> None:
    x = torch.randn(10, 4)
    x[:, 1] = 2.0
    family = Normal(4, scale=scale)
    np.testing.assert_allclose(family.fit_start(x), x.numpy().mean(0), rtol=1e-12)
    expected = np.sqrt(x.numpy().var(0).mean()) if scale == "shared" else 0.3
    assert family.own_scale().item() == pytest.approx(expected, rel=1e-9)


# Divergences ---------------------------------------------------------------------------------------------------------


def _kl(m: Any, s: Any, n: Any, t: Any) -> float:
    """KL(N(m, s) || N(n, t)) for covariances s and t, by numpy."""
    m, s, n, t = (np.asarray(a, float) for a in (m, s, n, t))
    inverse = np.linalg.inv(t)
    logs = np.linalg.slogdet(t)[1] - np.linalg.slogdet(s)[1]
    return float(0.5 * (np.trace(inverse @ s) + (n - m) @ inverse @ (n - m) - len(m) + logs))


def _full(loc: Any, covariance: Any) -> Any:
    """A `FullNormal` of that mean and covariance."""
    lower = np.linalg.cholesky(np.asarray(covariance, float))
    diagonal = np.diag_indices(len(lower))
    lower[diagonal] = unconstrained(torch.tensor(lower[diagonal])).numpy()
    raw = np.concatenate([loc, lower[np.tril_indices(len(lower))]])
    return FullNormal(len(lower)).distribution(torch.tensor(raw))


def _diagonal(loc: Any, scale: Any) -> Any:
    raw = torch.cat([torch.tensor(loc), unconstrained(torch.tensor(scale))])
    return Normal(len(loc)).distribution(raw)


def test_a12_divergence_to_the_standard_normal() -> None:
    p = StandardNormal(1).distribution(torch.zeros(0))
    for q in (Normal(1, scale=0.5).distribution(torch.ones(1)), _diagonal([1.0], [0.5]), _full([1.0], [[0.25]])):
        assert kl_divergence(q, p).item() == pytest.approx(0.8181471806, abs=1e-10)


def test_a13_divergences_of_full_covariances() -> None:
    a = [0.0, 0.0], [[1.0, 0.0], [0.0, 2.0]]
    b = [1.0, -1.0], [[2.0, 0.5], [0.5, 1.0]]
    assert _kl(*a, *b) == pytest.approx(1.5046628751, abs=1e-10)
    assert kl_divergence(_full(*a), _full(*b)).item() == pytest.approx(1.5046628751, abs=1e-9)
    assert kl_divergence(_full(*b), _full(*a)).item() == pytest.approx(1.0667656963, abs=1e-9)
    diagonal = _diagonal([0.0, 0.0], [1.0, 2**0.5])
    assert kl_divergence(_full(*b), diagonal).item() == pytest.approx(1.0667656963, abs=1e-9)


@pytest.mark.parametrize("prior", ["StandardNormal", "Normal(network)", "Normal(0.7)", "FullNormal", "LowRankNormal"])
@pytest.mark.parametrize("posterior", ["Normal(network)", "FullNormal", "ExactNormal", "LowRankNormal"])
def test_divergences_are_analytic_and_those_of_numpy(posterior: str, prior: str) -> None:
    q_family, p_family = CASES[posterior].build(3), CASES[prior].build(3)
    q_raw, p_raw = CASES[posterior].parameters(q_family, 2, 4), near_start(p_family)
    ours = kl_divergence(q_family.distribution(q_raw), p_family.distribution(p_raw))
    assert ours.shape == (2, 4)
    target = gaussian_moments(p_family, p_raw.numpy())
    for index in np.ndindex(2, 4):
        expected = _kl(*gaussian_moments(q_family, q_raw[index].numpy()), *target)
        assert ours[index].item() == pytest.approx(expected, rel=1e-9)


def test_divergence_to_what_is_no_vector_of_normals_is_left_to_sampling() -> None:
    q = FullNormal(2).distribution(FullNormal(2).start())
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Laplace(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))


def test_divergences_of_foreign_types_are_left_alone() -> None:
    q = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Normal(torch.zeros(2), 1.0).to_event(1))


KINDS = [
    ("Normal(network)", "StandardNormal", "analytic"),
    ("Normal(network)", "Normal(network)", "analytic"),
    ("FullNormal", "StandardNormal", "analytic"),
    ("FullNormal", "Normal(shared)", "analytic"),
    ("FullNormal", "FullNormal", "analytic"),
    ("LowRankNormal", "StandardNormal", "analytic"),
    ("LowRankNormal", "LowRankNormal", "analytic"),
    ("LowRankNormal", "FullNormal", "analytic"),
    ("FullNormal", "LowRankNormal", "analytic"),
    ("Normal(network)", "LowRankNormal", "analytic"),
    ("Flow(coupling)", "StandardNormal", "sampled"),
    ("Normal(network)", "MixtureFullNormal", "sampled"),
    ("MixtureNormal", "StandardNormal", "sampled"),
    ("Normal(network)", "MixtureNormal", "sampled"),
    ("FullNormal", "MixtureNormal", "sampled"),
]


@pytest.mark.parametrize(("posterior", "prior", "kind"), KINDS)
def test_the_mean_field_bound_takes_the_analytic_term(posterior: str, prior: str, kind: str) -> None:
    """With a likelihood that ignores z, the bound is log p(x) - KL, without noise where the KL is analytic."""
    vae = VAE(
        Conditional(CASES[prior].build(2)),
        Conditional(Normal(3), Linear()),
        Conditional(CASES[posterior].build(2), Linear()),
    )
    perturb(vae)
    torch.nn.init.zeros_(vae.likelihood.network.weight)
    x = torch.randn(4, 3)
    assert structure(vae, {"x": x}).kl == {"z": kind}
    p = vae.prior.family, vae.prior.unconstrained().detach()
    q = vae.posterior.family, vae.posterior.unconstrained(x).detach()
    reconstruction = vae.likelihood(torch.zeros(4, 2)).log_prob(x).sum().item()
    losses = [TraceMeanField_ELBO().loss(vae.model, vae.guide, x) for _ in range(3)]
    if kind == "sampled":
        assert len(set(losses)) == 3
        return
    kl = sum(_kl(*gaussian_moments(q[0], row.numpy()), *gaussian_moments(p[0], p[1].numpy())) for row in q[1])
    assert losses == pytest.approx([kl - reconstruction] * 3, rel=1e-10)


# The exact posterior -------------------------------------------------------------------------------------------------


def test_exact_posterior_of_ppca() -> None:
    """N(M^-1 W^T (x - mu), sigma^2 M^-1) with M = W^T W + sigma^2 I (Tipping and Bishop 1999)."""
    prior, likelihood = linear_pair(3, 6)
    x = torch.randn(5, 6)
    d: Any = Conditional(ExactNormal(prior, likelihood), context=6)(x)
    w, b = (t.detach().numpy() for t in (likelihood.network.weight, likelihood.network.bias))
    variance = softplus(likelihood.family.raw_scale.item()) ** 2
    m = w.T @ w + variance * np.eye(3)
    np.testing.assert_allclose(d.mean.detach(), (x.numpy() - b) @ w @ np.linalg.inv(m), rtol=1e-10)
    np.testing.assert_allclose(
        d.covariance_matrix.detach(), np.tile(variance * np.linalg.inv(m), (5, 1, 1)), rtol=1e-10
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["shared", "feature", 0.4])
@pytest.mark.parametrize("prior", ["StandardNormal", "Normal(network)", "Normal(feature)", "FullNormal"])
def test_exact_posterior_of_every_gaussian_prior(prior: str, scale: Any, masked: bool) -> None:
    first, second = linear_pair(2, 5, scale, CASES[prior].build(2))
    network: Any = second.network
    network.centre(torch.randn(2), torch.tensor(1.7))
    posterior = Conditional(ExactNormal(first, second), context=5)
    x, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    mask[0], mask[1] = True, False
    d: Any = posterior(torch.where(mask, x, math.nan), observed=mask) if masked else posterior(x)
    start, cov = gaussian_moments(first.family, first.unconstrained().detach().numpy())
    weight = network.weight.detach().numpy() / 1.7
    bias = network.bias.detach().numpy() - weight @ network.shift.numpy()
    noise = normal_scale(second.family, np.zeros(0))
    for row in range(6):
        seen = mask[row].numpy() if masked else np.ones(5, bool)
        loc, covariance = posterior_moments(start, cov, weight[seen], bias[seen], noise[seen], x[row].numpy()[seen])
        np.testing.assert_allclose(d.mean[row].detach(), loc, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(d.covariance_matrix[row].detach(), covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_evidence_of_the_linear_gaussian_pair_is_that_of_scipy(masked: bool) -> None:
    first, second = linear_pair(2, 5, "feature", FullNormal(2))
    x, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    ours = linear_gaussian(first, second, torch.zeros(0)).log_evidence(x, mask if masked else None)
    m, s = gaussian_moments(first.family, first.unconstrained().detach().numpy())
    w, b = second.network.weight.detach().numpy(), second.network.bias.detach().numpy()
    loc, covariance = w @ m + b, w @ s @ w.T + np.diag(normal_scale(second.family, np.zeros(0)) ** 2)
    for row in range(6):
        seen = mask[row].numpy() if masked else np.ones(5, bool)
        expected = scipy.stats.multivariate_normal.logpdf(
            x[row].numpy()[seen], loc[seen], covariance[np.ix_(seen, seen)]
        )
        assert ours[row].item() == pytest.approx(expected if seen.any() else 0.0, rel=1e-10, abs=1e-12)


def _tied() -> VAE:
    prior, likelihood = linear_pair(2, 5, "feature", Normal(2))
    return VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)))


def _spread(vae: VAE, x: Tensor) -> float:
    """Range of log p(x, z) - log q(z|x) over draws of z; it is zero for the exact posterior alone."""
    with torch.no_grad():
        q = vae.approximate(x)
        z = q.sample((50,))
        weights = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x) - q.log_prob(z)
    return (weights.max(0).values - weights.min(0).values).max().item()


def test_the_tie_holds_each_parameter_once() -> None:
    vae = _tied()
    names = [name for name, _ in vae.named_parameters(remove_duplicate=False)]
    assert sorted(names) == sorted(name for name, _ in vae.named_parameters())
    assert not [name for name in names if name.startswith("posterior")]
    assert not [name for name in vae.state_dict() if name.startswith("posterior")]


def test_the_tie_survives_deepcopy() -> None:
    vae, x = _tied(), torch.randn(4, 5)
    before = vae.approximate(x).mean
    twin = copy.deepcopy(vae)
    perturb(twin)
    assert torch.equal(vae.approximate(x).mean, before)
    assert not torch.allclose(twin.approximate(x).mean, before)
    assert _spread(vae, x) < 1e-11
    assert _spread(twin, x) < 1e-11


def test_the_tie_survives_casts_and_state_dicts() -> None:
    vae, x = _tied(), torch.randn(4, 5)
    before = vae.approximate(x).mean
    narrow = copy.deepcopy(vae).float()
    assert narrow.approximate(x.float()).mean.dtype == torch.float32
    torch.testing.assert_close(narrow.approximate(x.float()).mean.double(), before, rtol=1e-4, atol=1e-4)
    assert narrow.double().approximate(x).mean.dtype == torch.float64
    assert _spread(narrow, x) < 1e-11
    other = _tied()
    assert not torch.allclose(other.approximate(x).mean, before)
    other.load_state_dict(vae.state_dict(), strict=True)
    assert torch.equal(other.approximate(x).mean, before)
    assert _spread(other, x) < 1e-11


def test_the_tie_takes_pictures_for_data() -> None:
    prior = Conditional(StandardNormal(2))
    likelihood = Conditional(Normal((2, 3), scale="feature"), Linear(), context=2)
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)))
    perturb(vae)
    assert _spread(vae, torch.randn(4, 2, 3)) < 1e-11


def test_the_exact_posterior_gives_a_likelihood_its_sizes() -> None:
    prior, likelihood = Conditional(StandardNormal(2)), Conditional(Normal(5, scale="shared"), Linear())
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)))
    assert _spread(vae, torch.randn(4, 5)) < 1e-11


def test_the_exact_posterior_refuses_a_likelihood_of_another_size() -> None:
    prior, likelihood = Conditional(StandardNormal(2)), Conditional(Normal(5, scale="shared"), Linear(), context=3)
    with pytest.raises(ValueError, match=r"\(3,\)\].*got \[\(2,\)\]"):
        VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)))


REFUSALS: list[tuple[str, Callable[[], tuple[Conditional, Conditional]], str]] = [
    (
        "nonlinear",
        lambda: (
            Conditional(StandardNormal(2)),
            Conditional(Normal(5, scale="shared"), MLP(hidden=[4]), context=2),
        ),
        "likelihood on a Linear network, for a closed form; got MLP",
    ),
    (
        "scale",
        lambda: (Conditional(StandardNormal(2)), Conditional(Normal(5), Linear(), context=2)),
        "scale is shared, feature or a number, for a closed form; got Normal with a scale from the network",
    ),
    (
        "Bernoulli",
        lambda: (Conditional(StandardNormal(2)), Conditional(Bernoulli(5), Linear(), context=2)),
        "Expected a Normal likelihood .*; got Bernoulli",
    ),
    (
        "mixture",
        lambda: (
            Conditional(MixtureNormal(2)),
            Conditional(Normal(5, scale="shared"), Linear(), context=2),
        ),
        "Expected a Gaussian prior, for a closed form; got MixtureNormal",
    ),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_the_exact_posterior_refuses_what_is_not_linear_gaussian(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactNormal(*make())


def test_the_exact_posterior_refuses_a_picture_for_latent() -> None:
    prior = Conditional(StandardNormal((2, 2)))
    likelihood = Conditional(Normal(5, scale="shared"), Linear(), context=((2, 2),))
    with pytest.raises(ValueError, match=r"ExactNormal to have a vector.*got shape \(2, 2\)"):
        ExactNormal(prior, likelihood)
