"""The linear-Gaussian algebra and PPCA, against dense numpy, scipy and scikit-learn."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dct
from scipy.linalg import subspace_angles
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, FactorAnalysis
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, kl_divergence
from twins import Dense, array

from ppl_vae import PPCA, log_weights
from ppl_vae.data import load
from ppl_vae.families.linear_gaussian import LinearGaussian

LATENTS = (2, 5, 10, 20, 32)


@pytest.fixture
def digits() -> Tensor:
    return torch.from_numpy(load_digits().data)


def _random(x: int, z: int, seed: int = 0) -> tuple[LinearGaussian, Dense]:
    generator = np.random.default_rng(seed)
    root = np.tril(generator.normal(size=(z, z)), -1) + np.diag(generator.uniform(0.3, 2, z))
    loc, weight, bias = generator.normal(size=z), generator.normal(size=(x, z)), generator.normal(size=x)
    scale = generator.uniform(0.2, 2, x)
    pair = LinearGaussian(*(torch.from_numpy(part) for part in (loc, root, weight, bias, scale)))
    return pair, Dense(loc, root @ root.T, weight, bias, scale**2)


# The algebra


@pytest.mark.parametrize(("x", "z"), [(7, 3), (3, 7), (1, 1), (1, 4), (40, 2)])
def test_posterior_and_evidence_are_those_of_the_dense_joint_gaussian(x: int, z: int) -> None:
    pair, dense = _random(x, z)
    data = 2 * torch.randn(5, x)
    evidence, loc, covariance = dense.truth(data.numpy())
    posterior = pair.posterior(data)
    np.testing.assert_allclose(pair.log_evidence(data), evidence, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(posterior.loc, loc, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(posterior.covariance_matrix.expand(5, z, z), covariance, rtol=1e-9, atol=1e-10)


def test_masked_entries_are_left_out_whatever_stands_there() -> None:
    pair, dense = _random(6, 3)
    data, mask = torch.randn(8, 6), torch.rand(8, 6) > 0.4
    mask[0], mask[1] = False, True
    evidence, loc, covariance = dense.truth(data.numpy(), mask.numpy())
    holes = data.masked_fill(~mask, math.nan)
    posterior = pair.posterior(holes, mask)
    np.testing.assert_allclose(pair.log_evidence(holes, mask), evidence, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(posterior.loc, loc, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(posterior.covariance_matrix, covariance, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(posterior.loc[0], dense.loc, atol=1e-12)


def test_all_leading_dimensions_are_batch_dimensions() -> None:
    pair, _ = _random(5, 2)
    data, mask = torch.randn(3, 4, 5), torch.rand(3, 4, 5) > 0.3
    assert pair.log_evidence(data).shape == (3, 4)
    assert pair.posterior(data).batch_shape == (3, 4)
    one = pair.log_evidence(data[1, 2], mask[1, 2])
    torch.testing.assert_close(pair.log_evidence(data, mask)[1, 2], one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        pair.posterior(data).log_prob(torch.ones(2))[1, 2], pair.posterior(data[1, 2]).log_prob(torch.ones(2))
    )


def test_evidence_is_differentiable_and_its_gradient_right() -> None:
    parts = [part.clone().requires_grad_() for part in vars(_random(4, 2)[0]).values()]
    data = torch.randn(3, 4)
    assert torch.autograd.gradcheck(
        lambda *p: LinearGaussian(p[0], p[1].tril(), *p[2:]).log_evidence(data), tuple(parts)
    )


def test_factor_analysis_of_scikit_learn_has_the_same_score(digits: Tensor) -> None:
    varying = digits[:, digits.std(0) > 0].numpy()
    other = FactorAnalysis(5, tol=1.0).fit(varying)
    pair = LinearGaussian(
        torch.zeros(5),
        torch.eye(5),
        *(torch.from_numpy(p) for p in (other.components_.T, other.mean_, other.noise_variance_**0.5)),
    )
    assert pair.log_evidence(torch.from_numpy(varying)).mean().item() == pytest.approx(other.score(varying), abs=1e-8)


# PPCA (A2, A3, A4, A7)


@pytest.mark.parametrize(
    ("latent", "mean"),
    [(0, -184.64967492)]
    + list(zip(LATENTS, (-177.43997150, -168.53804154, -159.99373120, -150.16837829, -142.19865617), strict=True)),
)
def test_maximum_likelihood_of_the_digits(digits: Tensor, latent: int, mean: float) -> None:
    ppca = PPCA.fit(digits, latent)
    values = np.linalg.eigvalsh(np.cov(digits.numpy().T, bias=True))[::-1]
    variance = values[latent:].mean()
    closed = -0.5 * (
        64 * math.log(2 * math.pi) + np.log(values[:latent]).sum() + (64 - latent) * math.log(variance) + 64
    )
    evidence = ppca.log_evidence(digits)
    dense = ppca.weight @ ppca.weight.T + ppca.scale**2 * torch.eye(64)
    low_rank = LowRankMultivariateNormal(ppca.loc, ppca.weight, (ppca.scale**2).expand(64)) if latent else None
    assert ppca.scale.item() ** 2 == pytest.approx(variance, rel=1e-10)
    assert evidence.mean().item() == pytest.approx(mean, abs=1e-7)
    assert evidence.mean().item() == pytest.approx(closed, abs=1e-7)
    if low_rank is not None:
        torch.testing.assert_close(evidence, low_rank.log_prob(digits), rtol=0, atol=1e-7)
    by_scipy = multivariate_normal(ppca.loc.numpy(), dense.numpy()).logpdf(digits.numpy())
    np.testing.assert_allclose(evidence, by_scipy, rtol=0, atol=1e-7)


@pytest.mark.parametrize("latent", LATENTS)
def test_scikit_learn_has_the_same_subspace_and_up_to_its_divisor_the_same_score(digits: Tensor, latent: int) -> None:
    ppca, other = PPCA.fit(digits, latent), PCA(latent, svd_solver="full").fit(digits.numpy())
    inflate = math.sqrt(1797 / 1796)
    same = PPCA(ppca.loc, ppca.weight * inflate, ppca.scale * inflate)
    assert same.log_evidence(digits).mean().item() == pytest.approx(other.score(digits.numpy()), abs=1e-7)
    assert np.abs(subspace_angles(ppca.weight.numpy(), other.components_.T)).max() < 1e-7
    lengths = ((other.explained_variance_ - other.noise_variance_) * 1796 / 1797) ** 0.5
    np.testing.assert_allclose(ppca.weight.norm(dim=0), lengths, rtol=1e-8)


def test_no_other_noise_or_subspace_is_more_likely(digits: Tensor) -> None:
    best = PPCA.fit(digits, 5)
    top = best.log_evidence(digits).mean()
    for other in (
        PPCA(best.loc, best.weight, best.scale * 1.01),
        PPCA(best.loc, best.weight, best.scale / 1.01),
        PPCA(best.loc + 0.01, best.weight, best.scale),
        PPCA(best.loc, best.weight + 0.01 * torch.randn(64, 5), best.scale),
    ):
        assert other.log_evidence(digits).mean() < top - 1e-6


def test_rate_distortion_and_aggregate_posterior_at_the_maximum(digits: Tensor) -> None:
    ppca = PPCA.fit(digits, 10)
    posterior = ppca.posterior(digits)
    prior = torch.distributions.MultivariateNormal(torch.zeros(10), torch.eye(10))
    q = torch.distributions.MultivariateNormal(posterior.loc, posterior.covariance_matrix)
    rate = kl_divergence(q, prior).mean().item()
    values = np.linalg.eigvalsh(np.cov(digits.numpy().T, bias=True))[::-1]
    assert rate == pytest.approx(0.5 * np.log(values[:10] / values[10:].mean()).sum(), abs=1e-8)
    assert rate == pytest.approx(12.79614086, abs=1e-8)
    assert ppca.log_evidence(digits).mean().item() + rate == pytest.approx(-147.19759034, abs=1e-8)
    residual = digits - posterior.loc @ ppca.weight.T - ppca.loc
    spread = (ppca.weight @ posterior.covariance_matrix[0] @ ppca.weight.T).trace()
    distortion = 0.5 * (
        64 * torch.log(2 * math.pi * ppca.scale**2) + (residual.square().sum(1).mean() + spread) / ppca.scale**2
    )
    assert distortion.item() == pytest.approx(147.19759034, abs=1e-8)
    moments = posterior.covariance_matrix.mean(0) + posterior.loc.T @ posterior.loc / len(digits)
    torch.testing.assert_close(moments, torch.eye(10), rtol=0, atol=1e-12)
    torch.testing.assert_close(posterior.loc.mean(0), torch.zeros(10), rtol=0, atol=1e-12)
    explained = 1 - values[10:].mean() / values[:10]
    np.testing.assert_allclose(posterior.loc.var(0, correction=0), explained, rtol=0, atol=1e-10)


def test_posterior_covariance_is_the_inverse_and_not_the_precision(digits: Tensor) -> None:
    ppca = PPCA.fit(digits, 4)
    m = ppca.weight.T @ ppca.weight + ppca.scale**2 * torch.eye(4)
    posterior = ppca.posterior(digits[:3])
    covariance = posterior.covariance_matrix.expand(3, 4, 4)
    torch.testing.assert_close(covariance, (ppca.scale**2 * torch.linalg.inv(m)).expand(3, 4, 4), rtol=1e-9, atol=1e-12)
    assert (covariance - m / ppca.scale**2).abs().max() > 1
    torch.testing.assert_close(
        posterior.loc, (digits[:3] - ppca.loc) @ ppca.weight @ torch.linalg.inv(m), rtol=1e-9, atol=1e-10
    )


def test_rotated_mean_field_gap_by_determinants(digits: Tensor) -> None:
    """A8 by numpy: the optimal diagonal guide loses half of sum ln P_ii - ln det P."""
    for latent, gap in ((2, 0.00099605), (5, 0.13909394), (10, 0.81132250)):
        ppca = PPCA.fit(digits, latent)
        rotation = dct(np.eye(latent), norm="ortho", axis=0)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(latent), atol=1e-12)
        for weight, expected in ((array(ppca.weight) @ rotation.T, gap), (array(ppca.weight), 0.0)):
            precision = np.eye(latent) + weight.T @ weight / ppca.scale.item() ** 2
            loss = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
            assert loss == pytest.approx(expected, abs=1e-8)


# PPCA at the edges


@pytest.mark.parametrize(("n", "x"), [(12, 50), (50, 12), (20, 20)])
def test_few_data_and_constant_features_do_no_harm(n: int, x: int) -> None:
    data = torch.randn(n, x) @ torch.randn(x, x)
    data[:, 1], data[:, 4] = 3.0, 0.0
    ppca = PPCA.fit(data, 4)
    values = np.sort(np.linalg.eigvalsh(np.cov(data.numpy().T, bias=True)))[::-1]
    assert ppca.scale.item() ** 2 == pytest.approx(values[4:].mean(), rel=1e-9)
    covariance = (ppca.weight @ ppca.weight.T).numpy() + values[4:].mean() * np.eye(x)
    by_scipy = multivariate_normal(data.numpy().mean(0), covariance).logpdf(data.numpy())
    np.testing.assert_allclose(ppca.log_evidence(data), by_scipy, rtol=1e-9)
    low_rank = LowRankMultivariateNormal(ppca.loc, ppca.weight, (ppca.scale**2).expand(x)).log_prob(data)
    torch.testing.assert_close(ppca.log_evidence(data), low_rank, rtol=1e-9, atol=1e-9)
    assert np.abs(subspace_angles(ppca.weight.numpy(), PCA(4, svd_solver="full").fit(data).components_.T)).max() < 1e-6


def test_answers_do_not_depend_on_where_the_data_lie(digits: Tensor) -> None:
    near, far = PPCA.fit(digits, 5), PPCA.fit(digits + 1e5, 5)
    torch.testing.assert_close(far.scale, near.scale, rtol=1e-8, atol=0)
    torch.testing.assert_close(far.log_evidence(digits + 1e5), near.log_evidence(digits), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("n", "x", "rank"), [(10, 50, 9), (50, 6, 6), (8, 8, 7)])
def test_latents_at_or_above_the_rank_are_refused(n: int, x: int, rank: int) -> None:
    data = torch.randn(n, x)
    PPCA.fit(data, rank - 1)
    for latent in (rank, rank + 1, -1):
        with pytest.raises(ValueError, match=rf"(?s)Expected `latent`.*below the rank.*\b{rank}; got {latent}\b"):
            PPCA.fit(data, latent)
    flat = torch.cat([data, data[:, :1] * 2, torch.ones(n, 1)], 1)
    with pytest.raises(ValueError, match=rf"\b{min(n - 1, x)}; got {rank}\b"):
        PPCA.fit(flat, rank)


def test_constant_data_are_refused() -> None:
    with pytest.raises(ValueError, match="rank of the centred data, 0"):
        PPCA.fit(torch.ones(9, 3), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_not_finite_are_refused(value: float) -> None:
    data = torch.randn(10, 4)
    data[3, 2] = value
    with pytest.raises(ValueError, match=r"Expected finite numbers in `x`; got (nan|inf) in row 3, column 2"):
        PPCA.fit(data, 2)


@pytest.mark.parametrize("shape", [(10,), (4, 3, 2)])
def test_data_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape"):
        PPCA.fit(torch.randn(shape), 1)


def test_no_latents_at_all(digits: Tensor) -> None:
    ppca = PPCA.fit(digits, 0)
    assert ppca.weight.shape == (64, 0)
    spread = digits.var(0, correction=0).mean()
    expected = torch.distributions.Normal(digits.mean(0), spread.sqrt()).log_prob(digits).sum(1)
    torch.testing.assert_close(ppca.log_evidence(digits), expected, rtol=1e-12, atol=1e-9)


def test_numpy_integers_and_the_embedded_digits_are_data(digits: Tensor) -> None:
    whole = PPCA.fit(load_digits().data.astype(np.int64), 3)
    torch.testing.assert_close(whole.scale, PPCA.fit(digits, 3).scale)
    train = load("digits", dtype=torch.float64).train["x"]
    assert PPCA.fit(train, 3).weight.shape == (64, 3)


# PPCA as a VAE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_vae_has_the_same_parameters_and_precision(
    digits: Tensor, dtype: torch.dtype, default: torch.dtype
) -> None:
    torch.set_default_dtype(default)
    ppca = PPCA.fit(digits.to(dtype), 5)
    vae: Any = ppca.to_vae()
    assert {p.dtype for p in vae.parameters()} == {dtype} == {ppca.weight.dtype}
    assert vae.likelihood.network.weight.shape == (64, 5)
    tight = {"rtol": 1e-13 if dtype is torch.float64 else 1e-6, "atol": 0}
    torch.testing.assert_close(vae.likelihood.network.weight.detach(), ppca.weight, **tight)
    torch.testing.assert_close(vae.likelihood.network.bias.detach(), ppca.loc, **tight)
    torch.testing.assert_close(vae.likelihood.family.own_scale().detach(), ppca.scale, **tight)


def test_each_importance_weight_of_the_vae_is_the_evidence(digits: Tensor) -> None:
    ppca = PPCA.fit(digits, 10)
    weights = log_weights(ppca.to_vae(), digits, 3)
    torch.testing.assert_close(weights, ppca.log_evidence(digits).expand(3, -1), rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(weights.mean(), torch.tensor(-159.99373120), rtol=0, atol=1e-8)
