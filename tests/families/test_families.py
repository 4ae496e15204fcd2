import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy.special import expit, logsumexp
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from ppl_vae import VAE, Conditional, families
from ppl_vae.families import (
    Bernoulli,
    Elementwise,
    ExactNormal,
    Family,
    FullNormal,
    MixtureNormal,
    Normal,
    StandardNormal,
    same_support,
)
from ppl_vae.families.exact_normal import linear_gaussian
from ppl_vae.families.family import moments, positive, unconstrained
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.sites import structure

Array = npt.NDArray[np.float64]


def _pair(latent: int, features: int, scale: Any = "shared", prior: Family | None = None) -> tuple[Any, Any]:
    """A linear-Gaussian prior and likelihood with random parameters."""
    first = Conditional(StandardNormal(latent) if prior is None else prior)
    second = Conditional(Normal(features, scale=scale), Linear(), context=latent)
    _perturb(first)
    _perturb(second)
    return first, second


def _exact(size: int) -> ExactNormal:
    return ExactNormal(*_pair(size, size + 2))


FAMILIES: dict[str, Callable[[int], Family]] = {
    "StandardNormal": StandardNormal,
    "Normal(network)": Normal,
    "Normal(shared)": lambda size: Normal(size, scale="shared"),
    "Normal(feature)": lambda size: Normal(size, scale="feature"),
    "Normal(0.7)": lambda size: Normal(size, scale=0.7),
    "FullNormal": FullNormal,
    "MixtureNormal": lambda size: MixtureNormal(size, components=3),
    "Bernoulli": Bernoulli,
    "ExactNormal": _exact,
}
CONTINUOUS = [name for name in FAMILIES if name != "Bernoulli"]
BATCHES: list[list[int]] = [[], [3], [2, 3]]


def _perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))


def _make(name: str, size: int) -> Family:
    family = FAMILIES[name](size)
    _perturb(family)
    return family


def _width(family: Family) -> int:
    return _features(family) if isinstance(family, ExactNormal) else family.start().numel()


def _features(family: ExactNormal) -> int:
    return family.tied[1].family.event_shape[0]


def _parameters(family: Family, *batch: int) -> Tensor:
    """Random parameters; for `ExactNormal` these are the data."""
    around = 0.0 if isinstance(family, ExactNormal) else family.start()
    return around + 0.6 * torch.randn(*batch, _width(family))


def _point(family: Family, *shape: int) -> Tensor:
    x = torch.randn(*shape, *family.event_shape)
    return (x > 0).to(x.dtype) if isinstance(family, Bernoulli) else x


def _softplus(raw: Any) -> Array:
    return np.logaddexp(0.0, raw) + 1e-6


def _gaussian(family: Family, parameters: Array) -> tuple[Array, Array]:
    """Mean and covariance from unconstrained parameters, by numpy."""
    size = family.event_shape[0]
    if isinstance(family, StandardNormal):
        return np.zeros(size), np.eye(size)
    if isinstance(family, FullNormal):
        lower = np.zeros((size, size))
        lower[np.tril_indices(size)] = parameters[size:]
        lower[np.diag_indices(size)] = _softplus(lower.diagonal())
        return parameters[:size], lower @ lower.T
    if isinstance(family, ExactNormal):
        prior, likelihood = family.tied
        net = likelihood.network
        return _posterior(
            *_gaussian(prior.family, prior.unconstrained().detach().numpy()),
            net.weight.detach().numpy(),
            net.bias.detach().numpy(),
            _scale(likelihood.family, np.zeros(0)),
            parameters,
        )
    return parameters[:size], np.diag(_scale(family, parameters) ** 2)


def _scale(family: Any, parameters: Array) -> Array:
    size = family.event_shape[0]
    if family.scale == "network":
        return _softplus(parameters[size:])
    own = _softplus(family.raw_scale.detach().numpy()) if isinstance(family.scale, str) else family.scale
    return np.broadcast_to(own, (size,))


def _posterior(m: Array, s: Array, w: Array, b: Array, noise: Array, x: Array) -> tuple[Array, Array]:
    """Bishop 2.116: covariance (S^-1 + W^T D^-1 W)^-1."""
    covariance = np.linalg.inv(np.linalg.inv(s) + w.T @ np.diag(noise**-2) @ w)
    return m + covariance @ w.T @ ((x - b - w @ m) / noise**2), covariance


def _scipy(family: Family, parameters: Tensor, x: Tensor, seen: Any = None) -> float:
    """Log density of the entries in `seen` of one event, from unconstrained parameters, by scipy."""
    raw, value = parameters.detach().numpy(), x.detach().numpy()
    size = family.event_shape[0]
    keep = np.ones(size, bool) if seen is None else np.asarray(seen)
    if isinstance(family, Bernoulli):
        return float(scipy.stats.bernoulli.logpmf(value, expit(raw))[keep].sum())
    if isinstance(family, MixtureNormal):
        count = family.components
        locs, scales = raw[count:].reshape(2, count, size)
        each = scipy.stats.norm.logpdf(value[keep], locs[:, keep], _softplus(scales)[:, keep]).sum(-1)
        return float(logsumexp(each + raw[:count] - logsumexp(raw[:count])))
    if not keep.any():
        return 0.0
    loc, covariance = _gaussian(family, raw)
    return float(scipy.stats.multivariate_normal.logpdf(value[keep], loc[keep], covariance[np.ix_(keep, keep)]))


def test_the_table_holds_every_family() -> None:
    assert {type(make(2)).__name__ for make in FAMILIES.values()} == set(families.__all__)
    assert {f"Normal({kind})" for kind in ("network", "shared", "feature", "0.7")} <= set(FAMILIES)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_expand(name: str, batch: list[int]) -> None:
    family = _make(name, 4)
    d = family.distribution(_parameters(family, *batch))
    assert (d.batch_shape, d.event_shape) == (torch.Size(batch), torch.Size([4]))
    assert d.sample((5,)).shape == (5, *batch, 4)
    x = _point(family, *batch)
    assert d.log_prob(x).shape == torch.Size(batch)
    wide = d.expand([6, *batch])
    assert (wide.batch_shape, wide.event_shape) == ((6, *batch), (4,))
    assert wide.sample().shape == (6, *batch, 4)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x).expand(6, *batch), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "name", ["StandardNormal", "Normal(network)", "Normal(shared)", "Normal(feature)", "Bernoulli"]
)
def test_a_picture_is_its_flat_vector(name: str) -> None:
    make: Any = {
        "Normal(shared)": lambda s: Normal(s, scale="shared"),
        "Normal(feature)": lambda s: Normal(s, scale="feature"),
    }
    flat, picture = FAMILIES[name](6), make.get(name, type(FAMILIES[name](6)))((2, 3))
    for a, b in zip(flat.parameters(), picture.parameters(), strict=True):
        torch.nn.init.normal_(a)
        b.data.copy_(a.detach().reshape(b.shape))
    raw, x = _parameters(flat, 5), _point(flat, 5)
    mask = torch.rand(5, 6) < 0.5
    for hidden in (None, mask):
        d = picture.distribution(raw, None if hidden is None else hidden.reshape(5, 2, 3))
        assert d.event_shape == (2, 3)
        torch.testing.assert_close(
            d.log_prob(x.reshape(5, 2, 3)), flat.distribution(raw, hidden).log_prob(x), rtol=1e-13, atol=1e-13
        )


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


@pytest.mark.parametrize("name", FAMILIES)
def test_density_is_that_of_scipy(name: str) -> None:
    family = _make(name, 4)
    raw, x = _parameters(family, 2, 3), _point(family, 2, 3)
    ours = family.distribution(raw).log_prob(x)
    for index in np.ndindex(2, 3):
        assert ours[index].item() == pytest.approx(_scipy(family, raw[index], x[index]), rel=1e-10)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_density_integrates_to_one(name: str, size: int) -> None:
    family = _make(name, size)
    d = family.distribution(_parameters(family))
    axis = torch.arange(-18, 18, 0.03 if size == 1 else 0.06)
    grid = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    total = d.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** size
    assert total.item() == pytest.approx(1, abs=1e-9)


def test_bernoulli_sums_to_one() -> None:
    d = Bernoulli(3).distribution(2 * torch.randn(5, 3))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).unsqueeze(1)
    torch.testing.assert_close(d.log_prob(corners).exp().sum(0), torch.ones(5), rtol=1e-14, atol=0)


def test_bernoulli_holds_at_large_logits() -> None:
    d = Bernoulli(2).distribution(torch.tensor([800.0, -800.0]))
    assert d.log_prob(torch.tensor([0.0, 1.0])).item() == -1600
    assert d.log_prob(torch.tensor([1.0, 0.0])).item() == 0


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_samples_agree_with_the_density(name: str, size: int) -> None:
    family = _make(name, size)
    d = family.distribution(_parameters(family))
    x = d.sample((10_000,))
    assert auto_goodness_of_fit(x, d.log_prob(x).exp()) > 2e-5


def test_samples_of_bernoulli_agree_with_the_density() -> None:
    d = Bernoulli(3).distribution(torch.randn(3))
    x = d.sample((20_000,))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    counts = (x.unsqueeze(1) == corners).all(-1).sum(0)
    assert scipy.stats.chisquare(counts.numpy(), 20_000 * d.log_prob(corners).exp().numpy()).pvalue > 2e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_the_moments(name: str) -> None:
    family = _make(name, 3)
    d = family.distribution(_parameters(family, 2))
    n = 20_000
    x = d.sample((n,))
    deviation = x - d.mean
    assert (deviation.mean(0).abs() < 5 * (d.variance / n).sqrt()).all()
    fourth = deviation.pow(4).mean(0) - d.variance**2
    assert ((deviation.square().mean(0) - d.variance).abs() < 5 * (fourth / n).sqrt()).all()


@pytest.mark.parametrize("components", [1, 3])
def test_mixture_gradients_by_sampling_are_those_of_the_exact_moments(components: int) -> None:
    """d/dtheta E[sum z^2] is known: sum_c pi_c (loc_c^2 + scale_c^2)."""
    family, n, blocks = MixtureNormal(2, components=components), 2_000, 25
    raw = _parameters(family).requires_grad_()
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
        values.append(part if name in ("loc", "logits") else _softplus(part))
    return values


@pytest.mark.parametrize("name", WRITTEN)
def test_a_family_of_a_few_lines_has_the_density_of_scipy(name: str) -> None:
    make, oracle, data = WRITTEN[name]
    family = make(3)
    _perturb(family)
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


# Roles ---------------------------------------------------------------------------------------------------------------


def _roles(family: Family) -> list[str]:
    if isinstance(family, ExactNormal):
        return ["posterior"]
    sized = family.start().numel() > 0
    able = {
        "prior": same_support(family.support, constraints.real),
        "likelihood": sized,
        "posterior": sized and family.reparameterised,
    }
    return [role for role, can in able.items() if can]


ROLES = [(name, role) for name, make in FAMILIES.items() for role in _roles(make(2))]


def _vae(name: str, role: str) -> VAE:
    if name == "ExactNormal":
        prior, likelihood = _pair(2, 5, prior=Normal(2))
        return VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)))
    parts = {
        "prior": Conditional(_make(name, 2) if role == "prior" else StandardNormal(2)),
        "likelihood": Conditional(_make(name, 5) if role == "likelihood" else Normal(5), MLP(hidden=[4])),
        "posterior": Conditional(_make(name, 2) if role == "posterior" else Normal(2), MLP(hidden=[4])),
    }
    return VAE(**parts)


def test_roles_follow_from_support_and_reparameterisation() -> None:
    assert {role for name, role in ROLES if name == "Bernoulli"} == {"likelihood"}
    assert {role for name, role in ROLES if name == "StandardNormal"} == {"prior"}
    assert {role for name, role in ROLES if name == "FullNormal"} == {"prior", "likelihood", "posterior"}
    assert {role for name, role in ROLES if name == "MixtureNormal"} == {"prior", "likelihood", "posterior"}
    assert not MixtureNormal(1).reparameterised


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize(("name", "role"), ROLES)
def test_gradient_reaches_every_parameter(name: str, role: str, elbo: Any, dtype: torch.dtype) -> None:
    vae = _vae(name, role).to(dtype)
    x = _point(vae.likelihood.family, 7).to(dtype)
    loss = elbo().differentiable_loss(vae.model, vae.guide, x)
    assert loss.dtype == dtype
    loss.backward()
    assert dict(vae.named_parameters())
    for key, parameter in vae.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_density_are_those_of_finite_differences(name: str) -> None:
    family = _make(name, 3)
    raw, x = _parameters(family, 2).requires_grad_(), _point(family, 2)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    if raw.numel():
        assert torch.autograd.gradcheck(lambda raw: family.distribution(raw).log_prob(x), raw)
        assert torch.autograd.gradcheck(lambda raw: family.distribution(raw, mask).log_prob(x), raw)


@pytest.mark.parametrize("name", FAMILIES)
def test_density_agrees_between_precisions(name: str) -> None:
    family = _make(name, 4)
    raw, x = _parameters(family, 3), _point(family, 3)
    wide = family.distribution(raw).log_prob(x)
    if isinstance(family, ExactNormal):
        for part in family.tied:
            part.float()
    narrow = family.float().distribution(raw.float()).log_prob(x.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_density_is_that_of_the_observed_entries(name: str) -> None:
    family = _make(name, 4)
    raw, x = _parameters(family, 6), _point(family, 6)
    mask = torch.rand(6, 4) < 0.5
    mask[0], mask[1] = True, False
    d = family.distribution(raw, mask)
    assert (d.batch_shape, d.event_shape) == ((6,), (4,))
    ours = d.log_prob(torch.where(mask, x, 1.0))
    for row in range(6):
        assert ours[row].item() == pytest.approx(_scipy(family, raw[row], x[row], mask[row]), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(ours[0], family.distribution(raw[0]).log_prob(x[0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_nan_under_the_mask_does_no_harm(name: str) -> None:
    family = _make(name, 3)
    raw, x = _parameters(family, 5).requires_grad_(), _point(family, 5)
    mask = torch.rand(5, 3) < 0.5
    mask[0], mask[1] = True, False
    answers = []
    for hidden in (0.0, math.nan, math.inf, 1e30):
        value = family.distribution(raw, mask).log_prob(torch.where(mask, x, hidden))
        answers.append(value)
        own = [raw, *family.parameters()]
        if value.requires_grad:
            gradients = torch.autograd.grad(value.sum(), own, retain_graph=True)
            assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    for value in answers[1:]:
        assert torch.equal(value, answers[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_broadcast_against_particles_and_expand(name: str) -> None:
    family = _make(name, 3)
    raw, x, mask = _parameters(family, 4, 5), _point(family, 5), torch.rand(5, 3) < 0.5
    d = family.distribution(raw, mask)
    wide = d.expand([2, 4, 5])
    one = family.distribution(raw, mask[0])
    hidden = torch.where(mask, x, math.nan)
    assert (d.batch_shape, d.log_prob(hidden).shape) == ((4, 5), (4, 5))
    assert (wide.batch_shape, wide.log_prob(hidden).shape) == ((2, 4, 5), (2, 4, 5))
    torch.testing.assert_close(wide.log_prob(hidden)[1], d.log_prob(hidden))
    for k, n in np.ndindex(4, 5):
        assert d.log_prob(hidden)[k, n].item() == pytest.approx(_scipy(family, raw[k, n], x[n], mask[n]), abs=1e-9)
        assert one.log_prob(x)[k, n].item() == pytest.approx(_scipy(family, raw[k, n], x[n], mask[0]), abs=1e-9)


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_and_deepcopy_keep_the_density(name: str) -> None:
    family = _make(name, 3)
    raw, x = _parameters(family, 2), _point(family, 2)
    before = family.distribution(raw).log_prob(x)
    twin = copy.deepcopy(family)
    assert torch.equal(twin.distribution(raw).log_prob(x), before)
    if not isinstance(family, ExactNormal):  # which has no state of its own
        other = FAMILIES[name](3)
        other.load_state_dict(family.state_dict(), strict=True)
        assert torch.equal(other.distribution(raw).log_prob(x), before)
    for parameter in twin.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(family.distribution(raw).log_prob(x), before)
    if list(twin.parameters()):
        assert not torch.equal(twin.distribution(raw).log_prob(x), before)


# Scales and starting points ------------------------------------------------------------------------------------------


def test_positive_and_unconstrained_are_inverse() -> None:
    scale = torch.logspace(-5, 4, 400)
    torch.testing.assert_close(positive(unconstrained(scale)), scale, rtol=1e-10, atol=0)
    raw = torch.linspace(-8, 50, 400)
    torch.testing.assert_close(unconstrained(positive(raw)), raw, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(positive(raw).numpy(), _softplus(raw.numpy()), rtol=1e-10)
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("ExactNormal", "StandardNormal")])
def test_fit_start_begins_at_the_data(name: str, masked: bool) -> None:
    family = _make(name, 3)
    x = torch.randn(200, 3) * torch.tensor([0.5, 2.0, 5.0]) + torch.tensor([1.0, -3.0, 0.0])
    if name == "Bernoulli":
        x = (torch.rand(200, 3) < torch.tensor([0.3, 0.9, 0.0])).to(x.dtype)
    mask = torch.rand(200, 3) < 0.7 if masked else None
    holes = x if mask is None else torch.where(mask, x, math.nan)
    loc, scale = np.nanmean(holes.numpy(), 0), np.nanstd(holes.numpy(), 0)
    raw = family.fit_start(holes, mask)
    assert raw.shape == family.start().shape
    d: Any = family.distribution(raw)
    if name == "Bernoulli":
        clipped = loc.clip(1e-3, 1 - 1e-3)
        np.testing.assert_allclose(raw, np.log(clipped / (1 - clipped)), rtol=1e-12)
        np.testing.assert_allclose(d.mean, clipped, rtol=1e-12)
        return
    if name == "MixtureNormal":
        weights, locs, scales = np.split(raw.numpy(), [3, 12])
        assert (weights == 0).all()
        np.testing.assert_allclose(_softplus(scales.reshape(3, 3)), np.tile(scale, (3, 1)), rtol=1e-9)
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
        family = FAMILIES[name](3)
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
        _make(name, 4).to(dtype).fit_start(x)


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


@pytest.mark.parametrize("prior", ["StandardNormal", "Normal(network)", "Normal(0.7)", "FullNormal"])
@pytest.mark.parametrize("posterior", ["Normal(network)", "FullNormal", "ExactNormal"])
def test_divergences_are_analytic_and_those_of_numpy(posterior: str, prior: str) -> None:
    if posterior == "Normal(network)" and prior == "FullNormal":
        pytest.skip("torch has no such divergence, and the project registers those of its own types only")
    q_family, p_family = _make(posterior, 3), _make(prior, 3)
    q_raw, p_raw = _parameters(q_family, 2, 4), _parameters(p_family)
    ours = kl_divergence(q_family.distribution(q_raw), p_family.distribution(p_raw))
    assert ours.shape == (2, 4)
    target = _gaussian(p_family, p_raw.numpy())
    for index in np.ndindex(2, 4):
        expected = _kl(*_gaussian(q_family, q_raw[index].numpy()), *target)
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
    ("MixtureNormal", "StandardNormal", "sampled"),
    ("Normal(network)", "MixtureNormal", "sampled"),
    ("FullNormal", "MixtureNormal", "sampled"),
]


@pytest.mark.parametrize(("posterior", "prior", "kind"), KINDS)
def test_the_mean_field_bound_takes_the_analytic_term(posterior: str, prior: str, kind: str) -> None:
    """With a likelihood that ignores z, the bound is log p(x) - KL, without noise where the KL is analytic."""
    vae = VAE(
        Conditional(_make(prior, 2)),
        Conditional(Normal(3), Linear()),
        Conditional(_make(posterior, 2), Linear()),
    )
    _perturb(vae)
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
    kl = sum(_kl(*_gaussian(q[0], row.numpy()), *_gaussian(p[0], p[1].numpy())) for row in q[1])
    assert losses == pytest.approx([kl - reconstruction] * 3, rel=1e-10)


# The exact posterior -------------------------------------------------------------------------------------------------


def test_exact_posterior_of_ppca() -> None:
    """N(M^-1 W^T (x - mu), sigma^2 M^-1) with M = W^T W + sigma^2 I (Tipping and Bishop 1999)."""
    prior, likelihood = _pair(3, 6)
    x = torch.randn(5, 6)
    d: Any = Conditional(ExactNormal(prior, likelihood), context=6)(x)
    w, b = (t.detach().numpy() for t in (likelihood.network.weight, likelihood.network.bias))
    variance = _softplus(likelihood.family.raw_scale.item()) ** 2
    m = w.T @ w + variance * np.eye(3)
    np.testing.assert_allclose(d.mean.detach(), (x.numpy() - b) @ w @ np.linalg.inv(m), rtol=1e-10)
    np.testing.assert_allclose(
        d.covariance_matrix.detach(), np.tile(variance * np.linalg.inv(m), (5, 1, 1)), rtol=1e-10
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["shared", "feature", 0.4])
@pytest.mark.parametrize("prior", ["StandardNormal", "Normal(network)", "Normal(feature)", "FullNormal"])
def test_exact_posterior_of_every_gaussian_prior(prior: str, scale: Any, masked: bool) -> None:
    first, second = _pair(2, 5, scale, _make(prior, 2))
    network: Any = second.network
    network.centre(torch.randn(2), torch.tensor(1.7))
    posterior = Conditional(ExactNormal(first, second), context=5)
    x, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    mask[0], mask[1] = True, False
    d: Any = posterior(torch.where(mask, x, math.nan), observed=mask) if masked else posterior(x)
    start, cov = _gaussian(first.family, first.unconstrained().detach().numpy())
    weight = network.weight.detach().numpy() / 1.7
    bias = network.bias.detach().numpy() - weight @ network.shift.numpy()
    noise = _scale(second.family, np.zeros(0))
    for row in range(6):
        seen = mask[row].numpy() if masked else np.ones(5, bool)
        loc, covariance = _posterior(start, cov, weight[seen], bias[seen], noise[seen], x[row].numpy()[seen])
        np.testing.assert_allclose(d.mean[row].detach(), loc, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(d.covariance_matrix[row].detach(), covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_evidence_of_the_linear_gaussian_pair_is_that_of_scipy(masked: bool) -> None:
    first, second = _pair(2, 5, "feature", FullNormal(2))
    x, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    ours = linear_gaussian(first, second).log_evidence(x, mask if masked else None)
    m, s = _gaussian(first.family, first.unconstrained().detach().numpy())
    w, b = second.network.weight.detach().numpy(), second.network.bias.detach().numpy()
    loc, covariance = w @ m + b, w @ s @ w.T + np.diag(_scale(second.family, np.zeros(0)) ** 2)
    for row in range(6):
        seen = mask[row].numpy() if masked else np.ones(5, bool)
        expected = scipy.stats.multivariate_normal.logpdf(
            x[row].numpy()[seen], loc[seen], covariance[np.ix_(seen, seen)]
        )
        assert ours[row].item() == pytest.approx(expected if seen.any() else 0.0, rel=1e-10, abs=1e-12)


def _tied() -> VAE:
    prior, likelihood = _pair(2, 5, "feature", Normal(2))
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
    _perturb(twin)
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
    _perturb(vae)
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
