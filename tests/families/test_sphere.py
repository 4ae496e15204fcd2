import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from families.cases import near_start, sphere, sphere_points
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae import VAE, Conditional
from ppl_vae.families import HypersphericalUniform, LogisticNormal, Normal, StandardNormal, VonMisesFisher
from ppl_vae.families.bessel import debye, log_bessel
from ppl_vae.families.sphere import Fisher
from ppl_vae.infer.reference import reference_posterior
from ppl_vae.networks import Linear


def _kappas() -> Tensor:
    return torch.logspace(-8, 4, 25)


def _fisher(loc: Tensor, kappa: Tensor) -> Any:
    """By direction and concentration, however small."""
    family = VonMisesFisher(loc.shape[-1])
    value = log_bessel(kappa, loc.shape[-1], family.series.to(kappa))
    return Fisher(loc, kappa, *value, family.nodes.to(kappa))


def _pole(size: int) -> Tensor:
    return torch.nn.functional.normalize(torch.arange(1.0, size + 1), dim=0)


def _log_ive(size: int, kappa: Any) -> Any:
    """log I_nu(kappa), where scipy does not underflow."""
    return np.log(np.maximum(scipy.special.ive(size / 2 - 1, kappa), 1e-300)) + kappa


@pytest.mark.parametrize("size", [2, 3, 4, 5, 10, 41, 42, 50, 100])
def test_the_normaliser_is_that_of_scipy(size: int) -> None:
    kappas = _kappas()
    kappa = kappas.clone().requires_grad_()
    value, length = log_bessel(kappa, size, debye(size))
    nu, k = size / 2 - 1, kappas.numpy()
    known = _log_ive(size, k) > -600  # scipy's function underflows at small arguments
    expected = scipy.special.gammaln(nu + 1) + nu * np.log(2 / k) + _log_ive(size, k)
    np.testing.assert_allclose(value.detach()[known], expected[known], rtol=1e-11, atol=1e-11)
    ratio = scipy.special.ive(nu + 1, k) / np.maximum(scipy.special.ive(nu, k), 1e-300)
    known &= scipy.special.ive(nu + 1, k) > 1e-290
    np.testing.assert_allclose(length.detach()[known], ratio[known], rtol=1e-11)
    np.testing.assert_allclose(length.detach()[:8], k[:8] / size, rtol=1e-6)  # A(k) = k / d + O(k^3)
    (slope,) = torch.autograd.grad(value.sum(), kappa, retain_graph=True)
    torch.testing.assert_close(slope, length.detach(), rtol=1e-11, atol=0)
    (bend,) = torch.autograd.grad(length.sum(), kappa)
    truth = 1 - length**2 - (size - 1) * length / kappa
    torch.testing.assert_close(bend, truth.detach(), rtol=1e-7, atol=1e-8)
    narrow = log_bessel(kappas.float(), size, debye(size).float())
    torch.testing.assert_close(narrow[0].double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(narrow[1].double(), length.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("size", "kappa", "expected"),
    [
        (3, 10.0, 1.9957323168),
        (3, 1.0, 0.1515959239),
        (3, 100.0, 4.2983173665),
        (10, 50.0, 8.3918992178),
        (2, 5.0, 1.1622339094),
    ],
)
def test_a22_divergence_from_the_uniform(size: int, kappa: float, expected: float) -> None:
    uniform = HypersphericalUniform(size).distribution(torch.zeros(0))
    ours = kl_divergence(_fisher(_pole(size), torch.tensor(kappa)), uniform)
    assert ours.item() == pytest.approx(expected, abs=1e-9)


def test_a22_divergence_on_the_sphere_is_in_closed_form_at_all_concentrations() -> None:
    uniform = HypersphericalUniform(3).distribution(torch.zeros(0))
    ours = kl_divergence(_fisher(_pole(3).expand(25, 3), _kappas()), uniform)
    small, big = np.split(_kappas().numpy(), [15])
    closed = big / np.tanh(big) - 1 + np.log(2 * big) - big - np.log1p(-np.exp(-2 * big))
    np.testing.assert_allclose(ours[15:], closed, rtol=1e-9)
    np.testing.assert_allclose(ours[:15], small**2 / 6, rtol=2e-3, atol=1e-15)
    assert ours.isfinite().all()


@pytest.mark.parametrize("size", [2, 3])
def test_divergence_between_two_is_that_of_the_integral(size: int) -> None:
    family = VonMisesFisher(size)
    q, p = family.distribution(near_start(family)), family.distribution(near_start(family))
    points, weights = sphere(family)
    log_q, log_p = q.log_prob(points), p.log_prob(points)
    expected = (weights * log_q.exp() * (log_q - log_p)).sum()
    assert kl_divergence(q, p).item() == pytest.approx(expected.item(), rel=1e-9)
    assert kl_divergence(q, q).abs().item() < 1e-14


@pytest.mark.parametrize("size", [2, 3, 10, 100])
def test_draws_have_the_mean_resultant_length_and_follow_the_law_of_the_cosine(size: int) -> None:
    n, pole = 20_000, _pole(size)
    for kappa in (1e-8, 0.5, 7.0, 300.0, 1e4):
        d = _fisher(pole, torch.tensor(kappa))
        x = d.sample((n,))
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(n), rtol=1e-12, atol=0)
        cosine, across = x @ pole, x - (x @ pole).unsqueeze(-1) * pole
        assert abs(cosine.mean() - d.length).item() < 5 * cosine.std().item() / math.sqrt(n)
        assert (across.mean(0).abs() < 5 * across.std(0) / math.sqrt(n) + 1e-12).all()
        assert ((x - d.mean).square().mean(0) / d.variance - 1).abs().max() < 0.15
        angle = np.arccos(cosine.numpy().clip(-1, 1))
        t = np.linspace(0, np.pi, 400_001)
        log = kappa * (np.cos(t) - 1) + (size - 2) * np.log(np.maximum(np.sin(t), 1e-300))
        law = np.cumsum(np.exp(log - log.max()))
        assert scipy.stats.kstest(np.interp(angle, t, law / law[-1]), "uniform").pvalue > 2e-5


@pytest.mark.parametrize("size", [2, 3, 5, 20, 100])
def test_at_least_65_percent_of_the_proposals_are_accepted(size: int) -> None:
    """So of 20 proposals all are refused with a probability below 1e-9."""
    m = size - 1
    for kappa in (1e-6, 0.1, 1.0, 3.0, 10.0, 100.0, 1e4, 1e6):
        b = m / (2 * kappa + math.hypot(2 * kappa, m))
        x0, law = (1 - b) / (1 + b), scipy.stats.beta(m / 2, m / 2)

        def accepted(u: float, kappa: float = kappa, b: float = b, x0: float = x0, law: Any = law) -> float:
            e = law.ppf(u)
            w = (1 - (1 + b) * e) / (1 - (1 - b) * e)
            return math.exp(kappa * (w - x0) + m * math.log((1 - x0 * w) / (1 - x0**2)))

        rate = np.mean([accepted(u) for u in (np.arange(400) + 0.5) / 400])
        assert rate > 0.655
    assert 0.345**20 < 1e-9


@pytest.mark.parametrize("size", [2, 3, 10, 100])
@pytest.mark.parametrize("kappa", [0.01, 2.0, 1e3])
def test_gradients_of_draws_are_those_of_the_mean(size: int, kappa: float) -> None:
    """E[x] = A(kappa) loc, so its derivative in concentration and direction is known."""
    n, way = 20_000, sphere_points(StandardNormal(size))
    raw = (3 * _pole(size)).requires_grad_()
    k = torch.full((n,), kappa, requires_grad=True)
    rows = raw.expand(n, size).detach().requires_grad_()
    draws = _fisher(rows / rows.norm(dim=-1, keepdim=True), k).rsample()
    by_k, by_rows = torch.autograd.grad((draws @ way).sum(), [k, rows])
    one = torch.tensor(kappa, requires_grad=True)
    truth = (_fisher(raw / raw.norm(), one).mean * way).sum()
    exact_k, exact_rows = torch.autograd.grad(truth, [one, raw])
    assert abs(by_k.mean() - exact_k).item() < 5 * by_k.std().item() / math.sqrt(n)
    assert ((by_rows.mean(0) - exact_rows).abs() < 5 * by_rows.std(0) / math.sqrt(n) + 1e-10).all()


@pytest.mark.parametrize("size", [2, 3, 20])
def test_evidence_of_a_conjugate_pair_is_in_closed_form(size: int) -> None:
    """log p(x) = log C(k0) + log C(k) - log C(|k0 m0 + k x|), and the exact posterior weighs every draw alike."""

    def log_c(kappa: Tensor) -> Tensor:
        area = math.log(2) + size / 2 * math.log(math.pi) - math.lgamma(size / 2)
        return -log_bessel(kappa, size, debye(size))[0] - area

    m0, x = sphere_points(StandardNormal(size), 2)
    for k0 in (1e-8, 1e-3, 2.0, 50.0, 1e4):
        for k in (1e-8, 0.3, 10.0, 1e4):
            first, second = torch.tensor(k0), torch.tensor(k)
            sharp = k0 * m0 + k * x
            q = _fisher(sharp / sharp.norm(), sharp.norm())
            z = q.sample((10,))
            weights = _fisher(m0, first).log_prob(z) + _fisher(z, second.expand(10)).log_prob(x) - q.log_prob(z)
            truth = log_c(first) + log_c(second) - log_c(sharp.norm())
            torch.testing.assert_close(weights, truth.expand(10), rtol=1e-9, atol=1e-9)


def test_the_start_follows_the_data() -> None:
    truth = _fisher(_pole(5), torch.tensor(20.0))
    family = VonMisesFisher(5)
    d: Any = family.distribution(family.fit_start(truth.sample((20_000,))))
    assert (d.loc @ _pole(5)).item() > 0.9999
    assert d.concentration.item() == pytest.approx(20, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_direction_of_any_length_is_one(dtype: torch.dtype) -> None:
    family = VonMisesFisher(3).to(dtype)
    for length in (0.0, 1e-38, 1e-6, 1e6, 1e38):
        raw = torch.tensor([length, -length, 0.0, 1.0], dtype=dtype, requires_grad=True)
        d: Any = family.distribution(raw)
        assert d.loc.norm().item() == pytest.approx(1, abs=1e-6)
        (gradient,) = torch.autograd.grad(d.log_prob(d.rsample()), raw)
        assert gradient.isfinite().all() or length == 1e-38


@pytest.mark.parametrize("make", [VonMisesFisher, HypersphericalUniform, LogisticNormal])
def test_one_entry_is_too_few(make: Any) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__} to have a vector of 2 entries or more for its event; got"):
        make(1)


def test_data_off_the_sphere_are_refused_by_name() -> None:
    vae = VAE(
        Conditional(StandardNormal(2)), Conditional(VonMisesFisher(3), Linear()), Conditional(Normal(2), Linear())
    )
    x = sphere_points(StandardNormal(3), 6)
    vae.check({"x": x.float().double()})
    x[4] *= 1.01
    with pytest.raises(ValueError, match="in the support of VonMisesFisher, the unit sphere, .* at row 4"):
        vae.check({"x": x})


def test_references_refuse_what_has_no_unconstrained_coordinates() -> None:
    vae = VAE(
        Conditional(VonMisesFisher(3)), Conditional(Normal(4), Linear()), Conditional(VonMisesFisher(3), Linear())
    )
    with pytest.raises(ValueError, match="latent sites with unconstrained coordinates"):
        reference_posterior(vae, torch.randn(2, 4), "quadrature")
