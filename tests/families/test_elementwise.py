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
from families.cases import CASES, Array, near_start, perturb, softplus
from scipy.special import expit
from torch import Tensor
from torch.distributions import constraints

from ppl_vae import Conditional
from ppl_vae.families import Bernoulli, Elementwise, Normal, StandardNormal, same_support
from ppl_vae.families.family import moments, positive, unconstrained
from ppl_vae.networks import Linear


@pytest.mark.parametrize(
    "name", ["StandardNormal", "Normal(network)", "Normal(shared)", "Normal(feature)", "Bernoulli"]
)
def test_a_picture_is_its_flat_vector(name: str) -> None:
    make: Any = {
        "Normal(shared)": lambda s: Normal(s, scale="shared"),
        "Normal(feature)": lambda s: Normal(s, scale="feature"),
    }
    flat, picture = CASES[name].make(6), make.get(name, type(CASES[name].make(6)))((2, 3))
    for a, b in zip(flat.parameters(), picture.parameters(), strict=True):
        torch.nn.init.normal_(a)
        b.data.copy_(a.detach().reshape(b.shape))
    raw, x = near_start(flat, 5), CASES[name].points(flat, 5)
    mask = torch.rand(5, 6) < 0.5
    for hidden in (None, mask):
        d = picture.distribution(raw, None if hidden is None else hidden.reshape(5, 2, 3))
        assert d.event_shape == (2, 3)
        torch.testing.assert_close(
            d.log_prob(x.reshape(5, 2, 3)), flat.distribution(raw, hidden).log_prob(x), rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("event", [0, (), (3, 0), -1])
def test_empty_events_are_refused(event: Any) -> None:
    with pytest.raises(ValueError, match=f"event of Normal to have positive sizes; got {re.escape(repr(event))}"):
        Normal(event)


@pytest.mark.parametrize("scale", ["free", 0, -1.0, math.inf, math.nan, True, None])
def test_other_scales_are_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="`scale` to be network, shared, feature or a positive number; got"):
        Normal(2, scale=scale)


def test_bernoulli_holds_at_large_logits() -> None:
    d = Bernoulli(2).distribution(torch.tensor([800.0, -800.0]))
    assert d.log_prob(torch.tensor([0.0, 1.0])).item() == -1600
    assert d.log_prob(torch.tensor([1.0, 0.0])).item() == 0


# Families written on `Elementwise` ------------------------------------------------------------------------------------


class Laplace(Elementwise):
    def __init__(self, event: Any, *, scale: Any = "network") -> None:
        super().__init__(event, dist.Laplace, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"loc": mean, "scale": scale / math.sqrt(2)}


class StudentT(Elementwise):
    def __init__(self, event: Any, *, df: Any = "shared", scale: Any = "network") -> None:
        super().__init__(event, dist.StudentT, df=df, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"df": torch.full_like(mean, 5.0), "loc": mean, "scale": scale * math.sqrt(0.6)}


class Gamma(Elementwise):
    def __init__(self, event: Any, *, concentration: Any = "network") -> None:
        super().__init__(event, dist.Gamma, concentration=concentration, rate="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"concentration": (mean / scale) ** 2, "rate": mean / scale**2}


class LogNormal(Elementwise):
    def __init__(self, event: Any, *, scale: Any = "network") -> None:
        super().__init__(event, dist.LogNormal, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        variance = (scale / mean).square().log1p()
        return {"loc": mean.log() - variance / 2, "scale": variance.sqrt()}


class Beta(Elementwise):
    def __init__(self, event: Any) -> None:
        super().__init__(event, dist.Beta, concentration1="network", concentration0="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        total = mean * (1 - mean) / scale**2 - 1
        return {"concentration1": mean * total, "concentration0": (1 - mean) * total}


class NegativeBinomial(Elementwise):
    def __init__(self, event: Any, *, total_count: Any = "feature") -> None:
        super().__init__(event, dist.NegativeBinomial, total_count=total_count, logits="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        total = mean**2 / (scale**2 - mean).clamp_min(1e-2 * mean)
        return {"total_count": total, "logits": (mean / total).log()}


def _gamma(concentration: Any, rate: Any) -> Any:
    return scipy.stats.gamma(concentration, scale=1 / rate)


# family, scipy's distribution from the values of its parameters, and the one that data are drawn from
WRITTEN: dict[str, tuple[Callable[[Any], Elementwise], Callable[..., Any], Any]] = {
    "Laplace": (Laplace, scipy.stats.laplace, scipy.stats.laplace(2, 1.5)),
    "StudentT": (StudentT, scipy.stats.t, scipy.stats.t(9, 1, 2)),
    "StudentT(4)": (lambda event: StudentT(event, df=4.0, scale="feature"), scipy.stats.t, scipy.stats.t(9, 1, 2)),
    "Gamma": (Gamma, _gamma, _gamma(4, 2)),
    "LogNormal": (LogNormal, lambda loc, scale: scipy.stats.lognorm(scale, scale=np.exp(loc)), _gamma(4, 2)),
    "Beta": (Beta, scipy.stats.beta, scipy.stats.beta(2, 5)),
    "NegativeBinomial": (
        NegativeBinomial,
        lambda count, logits: scipy.stats.nbinom(count, 1 - expit(logits)),
        scipy.stats.nbinom(3, 0.4),
    ),
}


def _values(family: Elementwise, raw: Tensor) -> list[Array]:
    """Parameters of the class in the family's order, by numpy, from those of the network and those learned."""
    parts, values = iter(raw.unflatten(-1, (-1, *family.event_shape)).unbind(-2)), []
    state: Any = dict(family.named_parameters())
    for name, source in family.sources.items():
        if not isinstance(source, str):
            values.append(np.asarray(source))
            continue
        part = (next(parts) if source == "network" else state[f"raw_{name}"]).detach().numpy()
        values.append(part if name in ("loc", "logits") else softplus(part))
    return values


@pytest.mark.parametrize("name", WRITTEN)
def test_a_family_of_a_few_lines_has_the_density_of_scipy(name: str) -> None:
    make, oracle, data = WRITTEN[name]
    family = make(3)
    perturb(family)
    raw = (family.start() + 0.3 * torch.randn(5, family.start().numel())).requires_grad_()
    x = torch.as_tensor(data.rvs((5, 3), random_state=0), dtype=torch.float64)
    truth = oracle(*_values(family, raw))
    each = (truth.logpmf if family.support.is_discrete else truth.logpdf)(x.numpy())
    np.testing.assert_allclose(family.distribution(raw).log_prob(x).detach(), each.sum(-1), rtol=1e-8)
    mask = torch.rand(5, 3) < 0.5
    for hidden in (math.nan, -1e30):
        masked = family.distribution(raw, mask).log_prob(torch.where(mask, x, hidden))
        np.testing.assert_allclose(masked.detach(), (each * mask.numpy()).sum(-1), rtol=1e-8)
        for gradient in torch.autograd.grad(masked.sum(), [raw, *family.parameters()]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_family_of_a_few_lines_starts_at_the_moments_of_the_data(name: str, masked: bool) -> None:
    make, _, data = WRITTEN[name]
    family = make(3)
    x = torch.as_tensor(data.rvs((400, 3), random_state=0), dtype=torch.float64)
    mask = torch.rand(400, 3) < 0.7 if masked else None
    holes = x if mask is None else torch.where(mask, x, math.nan)
    raw = family.fit_start(holes, mask)
    d: Any = family.distribution(raw)
    assert raw.shape == family.start().shape
    np.testing.assert_allclose(d.mean.detach(), np.nanmean(holes.numpy(), 0), rtol=1e-5)
    if name != "StudentT(4)":
        np.testing.assert_allclose(d.stddev.detach(), np.nanstd(holes.numpy(), 0), rtol=1e-5)


def test_constant_features_are_refused_if_a_density_has_no_bound_there() -> None:
    x = torch.rand(20, 2) + 0.5
    x[:, 1] = 1.0
    for family in (Gamma(2), LogNormal(2), Laplace(2, scale="feature")):
        with pytest.raises(ValueError, match=r"features that vary, for a .* 1 constant features \(columns 1\)"):
            family.fit_start(x)
    Laplace(2, scale="shared").fit_start(x)


def test_a_family_takes_more_of_the_batch_than_its_parameters() -> None:
    class Share(Bernoulli):
        def distribution(self, parameters: Tensor, mask: Tensor | None = None, total: Tensor | None = None) -> Any:
            assert total is not None
            return dist.Binomial(total.unsqueeze(-1), logits=parameters).to_event(1)

    conditional, z, total = Conditional(Share(3), Linear(), context=2), torch.randn(5, 2), torch.arange(1.0, 6.0)
    x = (total.unsqueeze(-1) * torch.rand(5, 3)).round()
    p = expit(conditional.unconstrained(z).detach().numpy())
    expected = scipy.stats.binom.logpmf(x.numpy(), total.numpy()[:, None], p).sum(-1)
    np.testing.assert_allclose(conditional(z, total=total).log_prob(x).detach(), expected, rtol=1e-10)
    with pytest.raises(TypeError, match="total"):
        Conditional(Bernoulli(3), Linear(), context=2)(z, total=total)


def test_supports_are_compared_by_kind_and_bounds() -> None:
    equal = [
        (Gamma(2).support, LogNormal(3).support),
        (constraints.real, constraints.real_vector),
        (constraints.boolean, constraints.integer_interval(0, 1)),
        (constraints.integer_interval(0, 4), dist.Categorical(torch.ones(5)).support),
        (constraints.interval(0, 1), Beta(1).support),
        (constraints.simplex, constraints.simplex),
        (copy.deepcopy(Normal(2)).support, StandardNormal(2).support),
    ]
    other = [
        (Gamma(2).support, Normal(2).support),
        (Gamma(2).support, NegativeBinomial(2).support),
        (constraints.boolean, constraints.unit_interval),
        (constraints.interval(0, 1), constraints.interval(0, 2)),
        (dist.Categorical(torch.ones(5)).support, dist.Categorical(torch.ones(6)).support),
        (constraints.simplex, constraints.real_vector),
        (constraints.simplex, constraints.lower_cholesky),
    ]
    for a, b in equal:
        assert same_support(a, b)
        assert same_support(b, a)
    for a, b in other:
        assert not same_support(a, b)
        assert not same_support(b, a)


# Scales and starting points ------------------------------------------------------------------------------------------


def test_positive_and_unconstrained_are_inverse() -> None:
    scale = torch.logspace(-5, 4, 400)
    torch.testing.assert_close(positive(unconstrained(scale)), scale, rtol=1e-10, atol=0)
    raw = torch.linspace(-8, 50, 400)
    torch.testing.assert_close(unconstrained(positive(raw)), raw, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(positive(raw).numpy(), softplus(raw.numpy()), rtol=1e-10)
    assert positive(torch.tensor(-1e9)).item() == 1e-6
    torch.testing.assert_close(positive(unconstrained(torch.tensor([0.0, 1e-6]))), torch.tensor([2e-6, 2e-6]))


def test_moments_are_those_of_numpy() -> None:
    x = torch.randn(40, 3, 2) * 3 + 1
    loc, scale = moments(x)
    np.testing.assert_allclose(loc, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale, x.numpy().std(0), rtol=1e-12)
    mask = torch.rand(40, 3, 2) < 0.6
    holes = torch.where(mask, x, math.nan)
    for hidden in (x, holes):
        loc, scale = moments(hidden, mask)
        np.testing.assert_allclose(loc, np.nanmean(holes.numpy(), 0), rtol=1e-12)
        np.testing.assert_allclose(scale, np.nanstd(holes.numpy(), 0), rtol=1e-12)


def test_moments_of_a_feature_never_observed() -> None:
    mask = torch.tensor([[True, False]]).repeat(4, 1)
    loc, scale = moments(torch.tensor([[1.0, math.nan]]).repeat(4, 1), mask)
    assert loc.tolist() == [1, 0]
    assert scale.tolist() == [0, 1]
