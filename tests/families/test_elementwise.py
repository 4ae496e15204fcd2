import copy
import math
import re
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from families.cases import CASES, near_start, perturb, softplus
from scipy.special import expit
from torch import Tensor
from torch.distributions import constraints

from ppl_vae import Conditional, families
from ppl_vae.families import (
    Bernoulli,
    Beta,
    Categorical,
    DiscretizedLogistic,
    Elementwise,
    Gamma,
    Laplace,
    LogNormal,
    NegativeBinomial,
    Normal,
    StandardNormal,
    StudentT,
    TruncatedNormal,
    same_support,
)
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


# A family written on `Elementwise` ------------------------------------------------------------------------------------


class Gumbel(Elementwise):
    def __init__(self, event: Any, *, scale: Any = "network") -> None:
        super().__init__(event, dist.Gumbel, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"loc": mean - 0.5772156649 * math.sqrt(6) / math.pi * scale, "scale": scale * math.sqrt(6) / math.pi}


@pytest.mark.parametrize("scale", ["network", "feature"])
def test_a_family_of_a_few_lines_has_the_density_of_scipy(scale: str) -> None:
    family = Gumbel(3, scale=scale)
    perturb(family)
    raw, x = near_start(family, 5), torch.randn(5, 3)
    own = raw[:, 3:].numpy() if scale == "network" else family.raw_scale.detach().numpy()
    each = scipy.stats.gumbel_r.logpdf(x.numpy(), raw[:, :3].numpy(), softplus(own))
    np.testing.assert_allclose(family.distribution(raw).log_prob(x).detach(), each.sum(-1), rtol=1e-10)
    mask = torch.rand(5, 3) < 0.5
    masked = family.distribution(raw, mask).log_prob(torch.where(mask, x, math.nan))
    np.testing.assert_allclose(masked.detach(), (each * mask.numpy()).sum(-1), rtol=1e-10)


# Starting points ------------------------------------------------------------------------------------------------------


# what data are drawn from, and which moments the start has: of those at the edge of a family, the mean alone
class _Ends:
    """Nearly 0 or nearly 1: no beta has a larger variance with that mean."""

    def rvs(self, size: Any, random_state: int) -> Any:
        return scipy.stats.bernoulli(0.3).rvs(size, random_state=random_state).clip(1e-12, 1 - 1e-12)


LAWS: dict[str, tuple[Any, Any, bool]] = {
    "Laplace": (families.Laplace, scipy.stats.laplace(2, 1.5), True),
    "StudentT": (families.StudentT, scipy.stats.t(9, 1, 2), True),
    "StudentT(4)": (partial(families.StudentT, df=4.0, scale="feature"), scipy.stats.t(9, 1, 2), True),
    "Logistic": (families.Logistic, scipy.stats.logistic(3, 2), True),
    "Gamma": (families.Gamma, scipy.stats.gamma(4, scale=0.5), True),
    "LogNormal": (families.LogNormal, scipy.stats.gamma(4, scale=0.5), True),
    "Beta": (families.Beta, scipy.stats.beta(2, 5), True),
    "Beta(0, 1)": (families.Beta, _Ends(), False),
    "Kumaraswamy": (families.Kumaraswamy, scipy.stats.beta(2, 5), True),
    "ContinuousBernoulli": (families.ContinuousBernoulli, scipy.stats.beta(2, 5), False),
    "TruncatedNormal": (families.TruncatedNormal, scipy.stats.beta(3, 5), True),
    "TruncatedNormal(0, inf)": (partial(families.TruncatedNormal, high=math.inf), scipy.stats.gamma(9), True),
    "Binomial": (partial(families.Binomial, trials=9), scipy.stats.binom(9, 0.2), False),
    "Poisson": (families.Poisson, scipy.stats.poisson(3.3), False),
    "NegativeBinomial": (families.NegativeBinomial, scipy.stats.nbinom(3, 0.4), True),
    "NegativeBinomial(Poisson)": (families.NegativeBinomial, scipy.stats.poisson(3.3), False),
    "ZeroInflatedPoisson": (families.ZeroInflatedPoisson, scipy.stats.nbinom(3, 0.4), True),
    "ZeroInflatedNegativeBinomial": (families.ZeroInflatedNegativeBinomial, scipy.stats.nbinom(3, 0.4), True),
    "DiscretizedLogistic": (partial(families.DiscretizedLogistic, levels=2), scipy.stats.bernoulli(0.4), False),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAWS)
def test_families_start_at_the_moments_of_the_data(name: str, masked: bool) -> None:
    make, law, both = LAWS[name]
    family = make(3)
    x = torch.as_tensor(law.rvs((400, 3), random_state=0), dtype=torch.float64)
    mask = torch.rand(400, 3) < 0.7 if masked else None
    holes = x if mask is None else torch.where(mask, x, math.nan)
    raw = family.fit_start(holes, mask)
    d: Any = family.distribution(raw)
    assert raw.shape == family.start().shape
    np.testing.assert_allclose(d.mean.detach(), np.nanmean(holes.numpy(), 0), rtol=0.2 if "Disc" in name else 1e-4)
    if both:
        np.testing.assert_allclose(d.stddev.detach(), np.nanstd(holes.numpy(), 0), rtol=1e-4)


FINITE = [name for name in LAWS if name.startswith(("Bin", "Poi", "Neg", "Zero", "Disc", "Cont"))]


@pytest.mark.parametrize("name", FINITE)
def test_constant_columns_have_a_finite_start_where_densities_are_bounded(name: str) -> None:
    family = LAWS[name][0](2)
    x = torch.tensor([0.0, 1.0]).expand(20, 2)
    raw = family.fit_start(x).requires_grad_()
    value = family.distribution(raw).log_prob(x).sum()
    assert value.isfinite()
    assert all(bool(part.isfinite().all()) for part in torch.autograd.grad(value, [raw, *family.parameters()]))


def test_constant_features_are_refused_if_a_density_has_no_bound_there() -> None:
    x = torch.rand(20, 2) + 0.5
    x[:, 1] = 1.0
    for family in (Gamma(2), LogNormal(2), Laplace(2, scale="feature"), StudentT(2, df="shared")):
        with pytest.raises(ValueError, match=r"features that vary, for a .* 1 constant features \(columns 1\)"):
            family.fit_start(x)
    Laplace(2, scale="shared").fit_start(x)
    StudentT(2, df="feature", scale="shared").fit_start(x)
    with pytest.raises(ValueError, match=r'a scale of each feature.* Use scale = "shared" or a number, or leave'):
        LogNormal(2).fit_start(x)
    with pytest.raises(ValueError, match=r"a concentration of each feature.* Leave them out\."):
        Gamma(2).fit_start(x)


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
        (Beta(1).support, TruncatedNormal(2).support),
        (Gamma(1).support, TruncatedNormal(2, high=math.inf).support),
        (constraints.integer_interval(0, 4), Categorical(2, (5, 3)).support),
        (constraints.boolean, DiscretizedLogistic(2, 2).support),
        (constraints.simplex, constraints.simplex),
        (copy.deepcopy(Normal(2)).support, StandardNormal(2).support),
    ]
    other = [
        (Gamma(2).support, Normal(2).support),
        (Gamma(2).support, NegativeBinomial(2).support),
        (constraints.boolean, DiscretizedLogistic(2, 256).support),
        (Gamma(2).support, TruncatedNormal(2, low=1, high=math.inf).support),
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
