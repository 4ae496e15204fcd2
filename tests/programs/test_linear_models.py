"""PCA, the linear autoencoder and factor analysis against the lectures, numpy and scikit-learn."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits, load_iris
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis
from torch import Tensor

from ppl_vae import PPCA, compare_posteriors, log_weights
from ppl_vae.programs.linear_models import PCA, FactorAnalysis, LinearAutoencoder

TABLE = torch.tensor([[-0.50, -0.40], [-0.40, -0.10], [0.10, 0.00], [0.30, 0.30], [0.50, 0.20]], dtype=torch.float64)


def digits() -> Tensor:
    x = torch.from_numpy(load_digits().data)
    return x[:, x.amin(0) != x.amax(0)]


def test_the_table_of_the_lectures() -> None:
    """A1."""
    pca = PCA.fit(TABLE, 1)
    np.testing.assert_allclose(pca.components[:, 0], [0.8578030806, 0.5139784770], atol=1e-9)
    codes = pca.encode(TABLE)
    np.testing.assert_allclose(codes[:, 0], [-0.634493, -0.394519, 0.085780, 0.411534, 0.531697], atol=1e-6)
    assert [f"{value:.2f}" for value in codes[:, 0]] == ["-0.63", "-0.39", "0.09", "0.41", "0.53"]
    decoded = pca.decode(codes)
    known = [(-0.54, -0.33), (-0.34, -0.20), (0.07, 0.04), (0.35, 0.21), (0.46, 0.27)]
    assert [tuple(round(value, 2) for value in row) for row in decoded.tolist()] == known
    assert (decoded - TABLE).square().sum().item() == pytest.approx(0.0423525864, abs=1e-9)
    assert pca.explained.item() == pytest.approx(0.9600447298, abs=1e-9)


@pytest.mark.parametrize("n", [20, 1797])
def test_pca_is_scikit_learns(n: int) -> None:
    x = digits()[:n]
    pca, other = PCA.fit(x, 7), SklearnPCA(7, svd_solver="full").fit(x.numpy())
    assert (np.abs(np.sum(pca.components.numpy().T * other.components_, 1)) > 1 - 1e-9).all()
    np.testing.assert_allclose(pca.variances, other.explained_variance_ * (n - 1) / n, rtol=1e-9)
    assert pca.explained.item() == pytest.approx(other.explained_variance_ratio_.sum())
    torch.testing.assert_close(pca.components.T @ pca.components, torch.eye(7))
    assert (pca.components.gather(0, pca.components.abs().argmax(0, keepdim=True)) > 0).all()
    assert PCA.fit(x.float(), 7).components.dtype == torch.float32


@pytest.mark.parametrize("latent", [1, 4])
def test_the_linear_autoencoder_spans_the_principal_components(latent: int) -> None:
    x = digits()[:400]
    state = torch.get_rng_state()
    found, pca = LinearAutoencoder.fit(x, latent), PCA.fit(x, latent)
    assert torch.equal(torch.get_rng_state(), state)
    cosines = torch.linalg.svdvals(torch.linalg.qr(found.decoder)[0].T @ pca.components)
    assert cosines.min() > 1 - 1e-8
    torch.testing.assert_close(found.decode(found.encode(x)), pca.decode(pca.encode(x)), rtol=0, atol=1e-3)
    assert found.errors[-1].item() == pytest.approx((pca.total - pca.variances.sum()).item(), rel=1e-8)
    assert (found.errors.diff() <= 1e-9).all()
    other = LinearAutoencoder.fit(x, latent, seed=1)
    assert (found.decoder - other.decoder).abs().max() > 1e-3  # the basis is anyone's
    few = LinearAutoencoder.fit(x, latent, iterations=1)
    assert few.errors[-1] > found.errors[-1] + 1


@pytest.mark.parametrize(
    ("latent", "known", "by_pca"),
    [
        (2, -132.70844202, -170.70341501),
        (5, -127.71887675, -162.40284193),
        (10, -123.15580004, -154.55138843),
    ],
)
def test_factor_analysis_of_the_digits(latent: int, known: float, by_pca: float) -> None:
    """A6: scikit-learn's, run to the same tolerance; PCA's score counts variances by n - 1, PPCA's by n."""
    x = digits()
    assert x.shape[1] == 61
    found = FactorAnalysis.fit(x, latent)
    evidence = found.log_evidence(x).mean().item()
    assert evidence == pytest.approx(known, abs=1e-6)
    other = SklearnFactorAnalysis(latent, svd_method="lapack", tol=1e-8, max_iter=10_000).fit(x.numpy())
    assert evidence == pytest.approx(other.score(x.numpy()), abs=1e-6)
    np.testing.assert_allclose(found.scale**2, other.noise_variance_, rtol=1e-3)
    covariance = found.weight @ found.weight.T + torch.diag(found.scale**2)
    np.testing.assert_allclose(covariance, other.get_covariance(), atol=1e-2)
    ppca = PPCA.fit(x, latent).log_evidence(x).mean().item()
    score = SklearnPCA(latent, svd_solver="full").fit(x.numpy()).score(x.numpy())
    assert score == pytest.approx(by_pca, abs=1e-7)
    assert 0 < ppca - score < 1e-5
    assert evidence > ppca + 10
    rough = FactorAnalysis.fit(x, latent, tolerance=1e-2)
    assert rough.iterations < found.iterations
    assert rough.log_evidence(x).mean().item() < evidence - 1e-6


def test_factor_analysis_is_a_maximum_of_the_likelihood() -> None:
    x = digits()[:300, :20]
    x = x[:, x.amin(0) != x.amax(0)]
    found = FactorAnalysis.fit(x, 3, tolerance=1e-13)
    for name in ("weight", "scale", "loc"):
        parts = {key: getattr(found, key).clone() for key in ("loc", "weight", "scale")}
        parts[name].requires_grad_()
        value = FactorAnalysis(**parts).log_evidence(x).mean()
        (slope,) = torch.autograd.grad(value, parts[name])
        free = slope if name != "scale" else slope[found.scale > 1e-3 * x.std(0)]
        assert free.abs().max() < 1e-4


def test_factor_analysis_reaches_a_maximum_at_the_boundary() -> None:
    """A Heywood case: the factor is petal length, on which the other features are regressed."""
    x = torch.from_numpy(load_iris().data)
    fitted = FactorAnalysis.fit(x, 1)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    residual = covariance.diagonal() - covariance[2] ** 2 / covariance[2, 2]
    residual[2] = covariance[2, 2]
    supremum = -0.5 * (4 * (1 + math.log(2 * math.pi)) + residual.log().sum())
    assert -1e-5 < fitted.log_evidence(x).mean() - supremum < 0
    assert fitted.scale[2] / x[:, 2].std() == pytest.approx(1e-3, rel=0.01)


def test_factor_analysis_does_not_care_for_units() -> None:
    x = digits()
    units = torch.logspace(-2, 2, x.shape[1])
    one, other = FactorAnalysis.fit(x, 2), FactorAnalysis.fit(x * units, 2)
    torch.testing.assert_close(other.scale, one.scale * units, rtol=1e-3, atol=0)
    apart = one.log_evidence(x) - other.log_evidence(x * units)
    torch.testing.assert_close(apart, units.log().sum().expand(len(x)), rtol=1e-3, atol=1e-3)


def test_factor_analysis_is_a_vae_with_an_exact_guide() -> None:
    x = digits()
    for data, tolerance in ((x, 1e-8), (x.float(), 2e-3)):
        found = FactorAnalysis.fit(data, 5)
        vae: Any = found.to_vae()
        assert {p.dtype for p in vae.parameters()} == {data.dtype} == {found.weight.dtype}
        weights = log_weights(vae, data[:50], 3)
        expected = found.log_evidence(data[:50]).double().expand(3, 50)
        torch.testing.assert_close(weights, expected, rtol=0, atol=tolerance * 20)
        assert compare_posteriors(vae, data[:50]).kl.abs().max() < tolerance
        posterior = found.posterior(data[:50])
        with torch.no_grad():
            torch.testing.assert_close(vae.approximate(data[:50]).loc, posterior.loc, rtol=1e-3, atol=1e-3)


# PPCA by EM -----------------------------------------------------------------------------------------------------------


def incomplete(n: int = 150, features: int = 6, latent: int = 2) -> tuple[Tensor, Tensor]:
    """Linear-Gaussian data far from zero, a third of them missing; some rows and a column have few entries."""
    weight, mask = torch.randn(features, latent), torch.rand(n, features) > 0.3
    x = torch.randn(n, latent) @ weight.T + 0.5 * torch.randn(n, features) + 40
    mask[:3], mask[3:100, 0] = False, False
    return x.masked_fill(~mask, math.nan), mask


def marginals(fitted: PPCA, x: Tensor, mask: Tensor) -> Any:
    """Log density of the observed entries of each row, by scipy."""
    covariance = (fitted.weight @ fitted.weight.T + fitted.scale**2 * torch.eye(len(fitted.loc))).numpy()
    scores = []
    for row, here in zip(x.numpy(), mask.numpy(), strict=True):
        part = covariance[np.ix_(here, here)]
        scores.append(multivariate_normal(fitted.loc.numpy()[here], part).logpdf(row[here]) if here.any() else 0.0)
    return np.array(scores)


def test_em_never_falls_and_says_the_evidence_of_the_observed_entries() -> None:
    x, mask = incomplete()
    fitted = PPCA.fit(x, 2, mask)
    path: Any = fitted.path
    assert (path.diff() >= -1e-12).all()
    assert len(path) > 10
    np.testing.assert_allclose(fitted.log_evidence(x, mask), marginals(fitted, x, mask), rtol=0, atol=1e-10)
    assert path[-1].item() == pytest.approx(marginals(fitted, x, mask).mean(), abs=1e-10)
    assert (fitted.log_evidence(x, mask)[:3] == 0).all()
    posterior = fitted.posterior(x, mask)
    torch.testing.assert_close(posterior.mean[:3], torch.zeros(3, 2))
    torch.testing.assert_close(posterior.covariance_matrix[:3], torch.eye(2).expand(3, 2, 2))


@pytest.mark.parametrize("latent", [0, 1, 2])
def test_em_reaches_what_scipy_reaches(latent: int) -> None:
    x, mask = incomplete()
    fitted = PPCA.fit(x, latent, mask, tolerance=1e-11)

    def climb(raw: Any) -> tuple[float, Any]:
        vector = torch.from_numpy(raw).requires_grad_()
        weight = vector[6:-1].reshape(6, latent)
        value = -PPCA(vector[:6], weight, vector[-1].exp()).log_evidence(x, mask).mean()
        return value.item(), torch.autograd.grad(value, vector)[0].numpy()

    rng = np.random.default_rng(1)
    starts = [np.concatenate([np.full(6, 40.0), rng.normal(size=6 * latent), [0.0]]) for _ in range(3)]
    options = {"maxiter": 3000, "maxfun": 9000, "ftol": 1e-14, "gtol": 1e-9}
    found = [optimize.minimize(climb, s, jac=True, method="L-BFGS-B", options=options) for s in starts]
    assert fitted.log_evidence(x, mask).mean().item() >= -min(one.fun for one in found) - 1e-7
    broken = PPCA(fitted.loc, fitted.weight, 1.01 * fitted.scale)
    assert broken.log_evidence(x, mask).mean().item() < -min(one.fun for one in found) - 1e-5


def test_em_with_nothing_missing_is_the_closed_form() -> None:
    x = torch.randn(80, 6) * torch.arange(1.0, 7) - 30
    exact = PPCA.fit(x, 3)
    alone = PPCA.fit(x, 3, torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(alone.log_evidence(x), exact.log_evidence(x), rtol=0, atol=1e-9)
    rows = torch.cat([x, torch.full((60, 6), math.nan)])  # rows with nothing observed move the start, not the end
    climbed = PPCA.fit(rows, 3, ~rows.isnan(), tolerance=1e-14)
    assert len(climbed.path) > 20  # type: ignore[arg-type]
    torch.testing.assert_close(climbed.loc, exact.loc)
    torch.testing.assert_close(climbed.scale, exact.scale, rtol=1e-5, atol=0)
    outer = [fitted.weight @ fitted.weight.T for fitted in (climbed, exact)]
    torch.testing.assert_close(*outer, rtol=1e-4, atol=1e-4)


def test_what_em_cannot_fit_is_refused() -> None:
    x, mask = incomplete()
    with pytest.raises(RuntimeError, match="settle to 1e-09 nats within 3 iterations"):
        PPCA.fit(x, 2, mask, iterations=3)
    with pytest.raises(ValueError, match=r"observed somewhere; got none of column 2 \(counted from 0\)"):
        PPCA.fit(x, 2, mask & (torch.arange(6) != 2))
    few = torch.arange(6).repeat(40, 1) < 2  # a plane passes through three points and any pair of entries
    few[:3] = True
    with pytest.raises(ValueError, match="Expected fewer latents than 2 for so few observed entries"):
        PPCA.fit(torch.randn(40, 6), 2, few)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(6, 4)
    for kind in (PCA, LinearAutoencoder):
        for latent in (0, 5, 1.5):
            with pytest.raises(ValueError, match=r"Expected `latent` to be from 1 to the smaller of n - 1 .*, 4; got"):
                kind.fit(x, latent)  # type: ignore[attr-defined]
    for latent in (0, 4):
        with pytest.raises(ValueError, match=r"Expected `latent` to be from 1 to the number of features less 1, 3"):
            FactorAnalysis.fit(x, latent)
    with pytest.raises(ValueError, match=r"Expected data of shape \(n, x\), n at least 2; got \(1, 4\)"):
        PCA.fit(x[:1], 1)
    with pytest.raises(ValueError, match="Expected finite numbers in `x`"):
        FactorAnalysis.fit(x.masked_fill(x > 1, float("nan")).index_fill(1, torch.tensor([0]), float("inf")), 1)
    x[:, 2] = 3.0
    with pytest.raises(
        ValueError,
        match=r"Expected features that vary.*noise scale.*got 1 constant features \(columns 2\)",
    ):
        FactorAnalysis.fit(x, 1)
    with pytest.raises(RuntimeError, match="Expected the likelihood to settle to 1e-10 nats within 2 iterations"):
        FactorAnalysis.fit(digits(), 2, iterations=2)
