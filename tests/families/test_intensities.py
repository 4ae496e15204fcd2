from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from ppl_vae.families import DiscretizedLogistic, MixtureDiscretizedLogistic
from ppl_vae.families.family import unconstrained

# loc and log scale where 256 bins of width 1 / 256 tile [0, 1], and the mass that closed outer bins would leave (A19)
A19 = [
    (0.5, -2.0, 0.9514876119),
    (0.02, -2.0, 0.5361623040),
    (0.5, 0.0, 0.2449186624),
    (0.02, 0.0, 0.2321080497),
    (0.9, -4.5, 0.9998768166),
]


def _at(loc: float, scale: float, dtype: Any = torch.float64) -> Any:
    raw = torch.cat([torch.tensor([loc]), unconstrained(torch.tensor([scale]))])
    return DiscretizedLogistic(1, 256).distribution(raw.to(dtype))


@pytest.mark.parametrize(("loc", "log_scale", "closed"), A19)
def test_a19_masses_sum_to_one_by_the_open_bins(loc: float, log_scale: float, closed: float) -> None:
    ours = _at((256 * loc - 0.5) / 255, np.exp(log_scale) * 256 / 255)
    masses = ours.log_prob(torch.arange(256.0).unsqueeze(-1) / 255).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-10)
    edges = scipy.stats.logistic.cdf(np.arange(257) / 256, loc, np.exp(log_scale))
    np.testing.assert_allclose(masses[1:-1], np.diff(edges)[1:-1], rtol=1e-8)
    mass_if_closed = masses[1:-1].sum().item() + np.diff(edges)[[0, -1]].sum()
    assert mass_if_closed == pytest.approx(closed, abs=1e-10)
    assert masses[0].item() == pytest.approx(edges[1], rel=1e-8)
    assert masses[-1].item() == pytest.approx(1 - edges[-2], rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loc", [-3.0, 0.0, 0.25, 1.0, 3.0])
def test_masses_and_gradients_hold_for_any_parameters(loc: float, dtype: Any) -> None:
    x = (torch.arange(256.0) / 255).to(dtype).unsqueeze(-1)
    for log_scale in np.linspace(-7, 2, 10):
        raw = torch.cat([torch.tensor([loc]), unconstrained(torch.tensor([np.exp(log_scale)]))])
        raw = raw.to(dtype).requires_grad_()
        each = DiscretizedLogistic(1, 256).to(dtype).distribution(raw).log_prob(x)
        assert each.exp().sum().item() == pytest.approx(1, abs=1e-10 if dtype == torch.float64 else 2e-5)
        for value in (each[0], each[1], each[128], each[-1]):
            (gradient,) = torch.autograd.grad(value, raw, retain_graph=True)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("loc", "scale"), [(0.5, 0.05), (0.001, 0.3), (1.7, 0.01), (0.5, 1e-6), (-40.0, 5.0)])
def test_moments_are_sums_over_the_levels(loc: float, scale: float) -> None:
    d, levels = _at(loc, scale), torch.arange(256.0).unsqueeze(-1) / 255
    masses = d.log_prob(levels).exp()
    mean = masses @ levels.squeeze(-1)
    assert d.mean.item() == pytest.approx(mean.item(), rel=1e-9, abs=1e-12)
    spread = masses @ (levels.squeeze(-1) - mean) ** 2
    assert d.variance.item() == pytest.approx(spread.item(), rel=1e-7, abs=1e-12)
    assert _at(loc, scale, torch.float32).variance.item() == pytest.approx(spread.item(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_the_support_is_the_levels_in_either_precision(levels: int) -> None:
    support: Any = DiscretizedLogistic(1, levels).support
    for dtype in (torch.float32, torch.float64):
        inside = torch.arange(levels).to(dtype) / (levels - 1)
        assert support.check(inside).all()
        assert not support.check(inside + 0.3 / (levels - 1)).any()
        assert not support.check(torch.tensor([-1 / (levels - 1), 1 + 1 / (levels - 1)], dtype=dtype)).any()


def test_equal_components_are_one_logistic() -> None:
    loc, raw, x = torch.rand(6), torch.randn(6) - 2, torch.randint(256, (5, 6)) / 255
    one = DiscretizedLogistic(6, (256,) * 6).distribution(torch.cat([loc, raw]))
    parts = [torch.randn(4 * 6), loc.repeat(4), raw.repeat(4)]
    mixture = MixtureDiscretizedLogistic(6, 256, components=4)
    torch.testing.assert_close(mixture.distribution(torch.cat(parts)).log_prob(x), one.log_prob(x))
    weight = torch.cat([torch.full((6,), 50.0), torch.full((18,), -50.0)])
    others = [weight, torch.cat([loc, torch.randn(18)]), torch.cat([raw, torch.randn(18)])]
    torch.testing.assert_close(mixture.distribution(torch.cat(others)).log_prob(x), one.log_prob(x))


def test_a_mixture_starts_near_the_data_with_components_apart() -> None:
    x = torch.randint(256, (200, 3)) / 255
    family = MixtureDiscretizedLogistic(3, 256, components=4)
    raw = family.fit_start(x)
    d: Any = family.distribution(raw)
    assert ((d.mean - x.mean(0)).abs() < 0.02).all()
    assert (raw[12:24].reshape(4, 3).diff(dim=0) > 0.01).all()


@pytest.mark.parametrize("levels", [1, (256, 128), (), True])
def test_levels_must_be_one_number(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"[Ll]evels"):
        DiscretizedLogistic(2, levels)
