import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from families.cases import CASES, near_start, unit_interval
from pyro.distributions.testing.gof import auto_goodness_of_fit
from torch.distributions import kl_divergence

from ppl_vae.families import ContinuousBernoulli, Kumaraswamy, TruncatedNormal
from ppl_vae.families.family import unconstrained

# p, the log of the constant C, the mean (A20)
A20 = [
    (0.5, 0.693147180560, 0.5),
    (0.499, 0.693148513896, 0.4996666663),
    (0.49, 0.693280537010, 0.4966663110),
    (0.3, 0.750587750880, 0.4302225011),
    (0.1, 1.010338559491, 0.3301196133),
    (0.01, 1.545197545513, 0.2074180986),
]


@pytest.mark.parametrize(("p", "constant", "mean"), A20)
def test_a20_constant_and_mean_of_the_continuous_bernoulli(p: float, constant: float, mean: float) -> None:
    for mirrored in (False, True):
        chance = 1 - p if mirrored else p
        logit = math.log(chance / (1 - chance))
        d: Any = ContinuousBernoulli(1).distribution(torch.tensor([logit]))
        x = 0.37
        ours = d.log_prob(torch.tensor([x])).item() - x * math.log(chance) - (1 - x) * math.log(1 - chance)
        assert ours == pytest.approx(constant, abs=1e-9)
        assert d.mean.item() == pytest.approx(1 - mean if mirrored else mean, abs=1e-10)
        mass, _ = scipy.integrate.quad(lambda x, logit=logit: math.exp(logit * x), 0, 1)
        assert d.log_prob(torch.zeros(1)).item() == pytest.approx(-math.log(mass), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_continuous_bernoulli_is_smooth_at_one_half(dtype: Any) -> None:
    """Where closed forms are 0 / 0: against quadrature, with gradients, on both sides of where the series ends."""
    logits = torch.tensor([0.0, 1e-9, -1e-6, 1e-3, -0.1, 0.199, 0.2001, -0.2, 2.0, 30.0], dtype=dtype).requires_grad_()
    family = ContinuousBernoulli(10)
    d: Any = family.distribution(logits)
    nodes, weights = unit_interval(1)
    exact = (logits.detach().double().unsqueeze(-1) * nodes).exp() * weights
    exact = exact / exact.sum(-1, keepdim=True)
    mean = exact @ nodes
    spread = (exact * (nodes - mean.unsqueeze(-1)) ** 2).sum(-1)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(d.mean.detach().double(), mean, **close)
    torch.testing.assert_close(d.variance.detach().double(), spread, rtol=10 * close["rtol"], atol=close["atol"])
    (gradient,) = torch.autograd.grad(d.log_prob(torch.zeros(10, dtype=dtype)), logits)
    torch.testing.assert_close(gradient.double(), -mean, **close)
    (slope,) = torch.autograd.grad(d.mean.sum(), logits)
    torch.testing.assert_close(slope.double(), spread, rtol=1e-3, atol=2e-4 if dtype == torch.float32 else 1e-8)


def _cdf_gradients(d: Any, x: torch.Tensor, raw: torch.Tensor, cdf: Any) -> None:
    """The gradient of a draw is -(dF / d parameter) / density, by differences of scipy's F."""
    x.sum().backward()
    density = d.log_prob(x.detach()).exp().item()
    for j in range(len(raw)):
        step = 1e-5 * max(1, abs(raw[j].item()))
        values = [raw.detach().numpy() + sign * step * np.eye(len(raw))[j] for sign in (1, -1)]
        slope = (cdf(x.item(), values[0]) - cdf(x.item(), values[1])) / (2 * step)
        assert raw.grad[j].item() == pytest.approx(-slope / density, rel=1e-4, abs=1e-7)


def _softplus(raw: Any) -> Any:
    return np.logaddexp(0, raw) + 1e-6


@pytest.mark.parametrize("logit", [0.0, 1e-4, 0.01, -0.3, 4.0, -30.0])
def test_draws_of_the_continuous_bernoulli_follow_its_parameter(logit: float) -> None:
    raw = torch.tensor([logit]).requires_grad_()
    d: Any = ContinuousBernoulli(1).distribution(raw)
    _cdf_gradients(d, d.rsample(), raw, lambda x, v: np.expm1(v[0] * x) / np.expm1(v[0]) if abs(v[0]) > 1e-7 else x)


@pytest.mark.parametrize("raw", [[0.3, -0.5], [-3.0, 2.0], [4.0, 20.0]])
def test_draws_of_kumaraswamy_follow_its_parameters(raw: list[float]) -> None:
    own = torch.tensor(raw).requires_grad_()
    d: Any = Kumaraswamy(1).distribution(own)
    _cdf_gradients(d, d.rsample(), own, lambda x, v: -np.expm1(_softplus(v[1]) * np.log1p(-(x ** _softplus(v[0])))))


def test_draws_stay_inside_in_single_precision() -> None:
    for name in ("Beta", "Kumaraswamy", "ContinuousBernoulli", "TruncatedNormal"):
        family = CASES[name].build(3).float()
        for shift in (-14.0, 0.0, 20.0):
            raw = (near_start(family, 2000) + shift).float().requires_grad_()
            d = family.distribution(raw)
            x = d.rsample()
            assert family.support.check(x).all(), name
            value = d.log_prob(x).sum()
            assert value.isfinite(), name
            assert all(bool(part.isfinite().all()) for part in torch.autograd.grad(value, raw)), name


# Truncated normals ----------------------------------------------------------------------------------------------------


def _truncated(loc: float, scale: float, low: float, high: float, dtype: Any = torch.float64) -> Any:
    raw = torch.cat([torch.tensor([loc]), unconstrained(torch.tensor([scale]))]).to(dtype).requires_grad_()
    return raw, TruncatedNormal(1, low=low, high=high).to(dtype).distribution(raw)


# loc, scale, bounds: inside, beyond either bound, far beyond, one-sided, wide and narrow against the interval
TRUNCATED = [
    (0.3, 0.2, 0.0, 1.0),
    (0.9, 0.2, 0.0, 1.0),
    (-1.0, 0.5, 0.0, 1.0),
    (3.0, 0.1, 0.0, 1.0),
    (-0.6, 0.1, 0.0, 1.0),
    (2.0, 1.0, 0.0, math.inf),
    (-8.0, 1.0, 0.0, math.inf),
    (25.0, 1.0, -math.inf, 2.0),
    (-30.0, 1.0, -math.inf, 2.0),
    (0.4, 40.0, 0.0, 1.0),
    (0.4, 0.001, 0.0, 1.0),
    (50.0, 0.05, 0.0, 1.0),
]


def _reference(loc: float, scale: float, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and masses by quadrature of the density relative to its largest, which no tail spoils."""
    peak = min(max(loc, low), high)
    rate = abs(peak - loc) / scale**2
    reach = 10 * scale if rate == 0 else min(10 * scale, 60 / rate)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    panels = [(max(low, peak - reach), peak), (peak, min(high, peak + reach))]
    x = np.concatenate([a + (b - a) * (nodes + 1) / 2 for a, b in panels if b > a])
    w = np.concatenate([(b - a) / 2 * weights for a, b in panels if b > a])
    density = np.exp(-(x - peak) * (x + peak - 2 * loc) / (2 * scale**2))
    return x, density * w


@pytest.mark.parametrize(("loc", "scale", "low", "high"), TRUNCATED)
def test_truncated_normals_hold_in_the_tails(loc: float, scale: float, low: float, high: float) -> None:
    x, masses = _reference(loc, scale, low, high)
    peak = min(max(loc, low), high)
    at = np.quantile(x, [0.1, 0.5, 0.8])
    expected = -(at - peak) * (at + peak - 2 * loc) / (2 * scale**2) - np.log(masses.sum())
    mean = (masses @ x) / masses.sum()
    spread = masses @ (x - mean) ** 2 / masses.sum()
    for dtype, rel in ((torch.float64, 1e-7), (torch.float32, 1e-3)):
        raw, d = _truncated(loc, scale, low, high, dtype)
        ours = d.log_prob(torch.tensor(at, dtype=dtype).unsqueeze(-1))
        np.testing.assert_allclose(ours.detach(), expected, rtol=rel, atol=20 * rel)
        assert d.mean.item() == pytest.approx(mean, rel=rel)
        assert d.variance.item() == pytest.approx(spread, rel=2 * rel)
        (gradient,) = torch.autograd.grad(ours.sum(), raw)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("loc", "scale", "low", "high"), TRUNCATED)
def test_draws_of_truncated_normals_have_the_density(loc: float, scale: float, low: float, high: float) -> None:
    for dtype in (torch.float64, torch.float32):
        _, d = _truncated(loc, scale, low, high, dtype)
        x = d.sample((5000,))
        assert ((low <= x) & (x <= high)).all()
        _, wide = _truncated(loc, scale, low, high)
        if wide.stddev < 1e-4 and dtype == torch.float32:  # of which single precision has too few numbers
            continue
        density = wide.log_prob(x.double()).exp()
        assert auto_goodness_of_fit(x.double() / wide.stddev, density * wide.stddev) > 2e-5


@pytest.mark.parametrize(("loc", "scale", "low", "high"), TRUNCATED[:10])
def test_draws_of_truncated_normals_follow_their_parameters(loc: float, scale: float, low: float, high: float) -> None:
    def cdf(x: float, v: Any) -> Any:
        s = _softplus(v[1])
        return scipy.stats.truncnorm.cdf(x, (low - v[0]) / s, (high - v[0]) / s, v[0], s)

    raw, d = _truncated(loc, scale, low, high)
    _cdf_gradients(d, d.rsample(), raw, cdf)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-math.inf, math.inf), (math.nan, 1.0)])
def test_bounds_in_disorder_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="Expected `low` below `high`, and one of them finite; got"):
        TruncatedNormal(2, low=low, high=high)


# Divergences ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Laplace", "LogNormal", "Gamma", "Beta", "ContinuousBernoulli", "TruncatedNormal",
                                  "TruncatedNormal(0, inf)"])  # fmt: skip
def test_divergences_within_a_family_are_analytic(name: str) -> None:
    family = CASES[name].build(1)
    q, p = (family.distribution(near_start(family, 3)) for _ in range(2))
    points, weights = CASES[name].nodes(family)
    axis = points.unsqueeze(1)
    log = q.log_prob(axis)
    inside = torch.where(log > -700, log.exp() * (log - p.log_prob(axis)), 0.0)
    torch.testing.assert_close(kl_divergence(q, p), weights @ inside, rtol=1e-4, atol=1e-5)


def test_a_divergence_to_a_narrower_support_is_infinite() -> None:
    _, wide = _truncated(0.5, 0.3, 0.0, 2.0)
    _, narrow = _truncated(0.5, 0.3, 0.0, 1.0)
    assert kl_divergence(wide, narrow).item() == math.inf
    assert 0 < kl_divergence(narrow, wide).item() < math.inf


@pytest.mark.parametrize("name", ["Logistic", "StudentT", "Kumaraswamy"])
def test_divergences_without_a_closed_form_are_left_to_sampling(name: str) -> None:
    family = CASES[name].build(2)
    with pytest.raises(NotImplementedError):
        kl_divergence(*(family.distribution(near_start(family)) for _ in range(2)))
