"""Distributions that Pyro lacks: masks that keep NaN out, mixtures with moments, covariances with their KL."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all, lazy_property

from ppl_vae.families.supports import value_inside

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


def elementwise(base: Any, event_dims: int, mask: Tensor | None, support: Any = None) -> TorchDistribution:
    """Turn the last dimensions of independent entries into an event, and hide those where `mask` is false."""
    inside = base.support if support is None else support
    return (base if mask is None else Filled(base, mask, value_inside(inside))).to_event(event_dims)  # type: ignore[no-any-return]


class Filled(MaskedDistribution):
    """A masked distribution that first fills hidden entries by `inside`: a NaN under a mask would poison gradients."""

    _mask: Any

    def __init__(self, base: Any, mask: Tensor, inside: float) -> None:
        super().__init__(base, mask)
        self.inside = inside

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Filled":
        batch_shape = torch.Size(batch_shape)
        return Filled(self.base_dist.expand(batch_shape), self._mask.expand(batch_shape), self.inside)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(torch.where(self._mask, value, self.inside))


def draw_hidden(fn: Any, value: Tensor, seen: Tensor) -> Tensor:
    """Draw the entries that a distribution's mask hides, given those that it shows.

    Args:
        fn: a likelihood under a mask.
        value: an event of each batch, hidden entries as they may be.
        seen: boolean, as `value`; the mask that is expected.

    Returns:
        As `value`; only hidden entries are of use.

    Raises:
        NotImplementedError: If the mask is another, or nothing is known of the hidden entries given the others.
    """
    if hasattr(fn, "draw_hidden"):
        return fn.draw_hidden(value, seen)  # type: ignore[no-any-return]
    if isinstance(fn, torch.distributions.Independent):
        return draw_hidden(fn.base_dist, value, seen)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        place = value.dim() - len(fn.event_shape)
        wide, shown = value.unsqueeze(place), seen.unsqueeze(place)
        weights = fn.mixture_distribution.logits + fn.component_distribution.log_prob(wide)
        chosen = torch.distributions.Categorical(logits=weights).sample()
        shape = (*value.shape[:place], weights.shape[-1], *fn.event_shape)
        each = draw_hidden(fn.component_distribution, wide.expand(shape), shown.expand(shape))
        chosen = chosen.reshape(*chosen.shape, 1, *(1,) * len(fn.event_shape))
        return each.take_along_dim(chosen, place).squeeze(place)
    if isinstance(fn, MaskedDistribution) and not fn.base_dist.event_shape and isinstance(fn._mask, Tensor):
        if torch.equal(fn._mask.expand(seen.shape), seen):
            return fn.base_dist.sample().expand(value.shape)  # type: ignore[no-any-return]
    raise NotImplementedError


class Entry(TorchDistribution):
    """A distribution of one number; `arg_constraints` names its parameters. A subclass writes `log_density`."""

    def __init__(self, validate_args: bool | None = None, **parameters: Any) -> None:
        for name, value in zip(parameters, broadcast_all(*parameters.values()), strict=True):
            setattr(self, name, value)
        super().__init__(value.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Entry":
        batch_shape = torch.Size(batch_shape)
        values = {name: getattr(self, name).expand(batch_shape) for name in self.arg_constraints}
        new = type(self)(**values, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @abstractmethod
    def log_density(self, value: Tensor) -> Tensor:
        """Log density of a value of the support."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_density(value)

    def uniform(self, sample_shape: Any) -> Tensor:
        """Uniform numbers between 0 and 1, without the bounds, for draws of this shape."""
        like = getattr(self, next(iter(self.arg_constraints)))
        info = torch.finfo(like.dtype)
        return like.new_empty(self._extended_shape(sample_shape)).uniform_().clamp(info.tiny, 1 - info.eps / 2)


def thin(value: Tensor) -> Tensor:
    """An expanded tensor with one entry where it repeats itself, so that what is made of it is computed once."""
    return value[tuple(slice(1) if step == 0 else slice(None) for step in value.stride())]


class SameFamily(dist.MixtureSameFamily):
    """Pyro's mixture, whose weights are not normalised a second time."""

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.component_distribution.log_prob(self._pad(value)) + self.mixture_distribution.logits).logsumexp(-1)


class Mixture(dist.MixtureOfDiagNormals):
    """Pyro's mixture of diagonal normals, with moments, and with draws of any shape under any batch."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if not sample_shape:
            return super().rsample()
        return self.expand(torch.Size(sample_shape) + self.batch_shape).rsample()

    @property
    def mean(self) -> Tensor:
        return (self.categorical.probs.unsqueeze(-1) * self.locs).sum(-2)

    @property
    def variance(self) -> Tensor:
        spread = self.coord_scale**2 + (self.locs - self.mean.unsqueeze(-2)) ** 2
        return (self.categorical.probs.unsqueeze(-1) * spread).sum(-2)


class FullCovariance(dist.MultivariateNormal):
    """A multivariate normal with an analytic KL to independent normals."""


class Marginal(FullCovariance):
    """The marginal of the observed entries; hidden ones are filled, and add a density of one."""

    observed: Tensor
    whole: FullCovariance

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Marginal":
        new = super().expand(batch_shape, self._get_checked_instance(Marginal, _instance))
        return _seeing(new, self.observed, self.whole)

    def draw_hidden(self, value: Tensor, seen: Tensor) -> Tensor:
        """Draw hidden entries given the others, as the function of this name."""
        return _condition(self, value, seen)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(torch.where(self.observed, value, self.loc))


def full_covariance(loc: Tensor, scale_tril: Tensor, mask: Tensor | None) -> FullCovariance:
    """Multivariate normal, or the marginal of its observed entries under a mask."""
    if mask is None:
        return FullCovariance(loc, scale_tril=scale_tril)
    mask = mask.expand(torch.broadcast_shapes(loc.shape, mask.shape))
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    apart = torch.diag_embed((~mask).to(loc.dtype) / (2 * math.pi))
    covariance = torch.where(both, scale_tril @ scale_tril.mT, 0.0) + apart
    marginal = Marginal(loc.expand(mask.shape), scale_tril=torch.linalg.cholesky(covariance))
    return _seeing(marginal, mask, FullCovariance(loc, scale_tril=scale_tril, validate_args=False))  # type: ignore[no-any-return]


def _seeing(marginal: Any, observed: Tensor, whole: Any) -> Any:
    """A marginal that knows which entries are observed, and the normal that it is of."""
    shape = marginal.batch_shape
    marginal.observed, marginal.whole = observed.expand(shape + marginal.event_shape), whole.expand(shape)
    return marginal


def _condition(fn: Any, value: Tensor, seen: Tensor) -> Tensor:
    r"""Draw a normal given its entries o: a free draw u plus :math:`\Sigma_{\cdot o} \Sigma_{oo}^{-1} (x_o - u_o)`."""
    if not torch.equal(fn.observed.expand(seen.shape), seen):
        raise NotImplementedError
    free = fn.whole.sample()
    apart = torch.where(seen, value - free, 0.0).unsqueeze(-1)
    moved = torch.cholesky_solve(apart, fn.scale_tril) if isinstance(fn, Marginal) else fn.precision_matrix @ apart
    return free + (fn.whole.covariance_matrix @ moved).squeeze(-1)  # type: ignore[no-any-return]


class LowRank(dist.LowRankMultivariateNormal):
    """A normal with a low-rank covariance, or the marginal of its observed entries, as `Marginal` has it."""

    observed: Tensor | None = None
    whole: Any = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRank":
        new = super().expand(batch_shape, self._get_checked_instance(LowRank, _instance))
        return new if self.observed is None else _seeing(new, self.observed, self.whole)

    def draw_hidden(self, value: Tensor, seen: Tensor) -> Tensor:
        """Draw hidden entries given the others, as the function of this name."""
        if self.observed is None:
            raise NotImplementedError
        return _condition(self, value, seen)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value if self.observed is None else torch.where(self.observed, value, self.loc))


def low_rank(loc: Tensor, factor: Tensor, diagonal: Tensor, mask: Tensor | None) -> LowRank:
    """Normal with covariance `factor @ factor.T + diag(diagonal)`, or the marginal of its observed entries."""
    if mask is None:
        return LowRank(loc, factor, diagonal)
    mask = mask.expand(torch.broadcast_shapes(loc.shape, mask.shape))
    whole = LowRank(loc, factor, diagonal, validate_args=False)
    diagonal = torch.where(mask, diagonal, 1 / (2 * math.pi))
    marginal = LowRank(loc.expand(mask.shape), torch.where(mask.unsqueeze(-1), factor, 0.0), diagonal)
    return _seeing(marginal, mask, whole)  # type: ignore[no-any-return]


@register_kl(FullCovariance, dist.Independent)
@register_kl(LowRank, dist.Independent)
def _kl_to_independent(q: FullCovariance | LowRank, p: Any) -> Tensor:
    base = p.base_dist
    if not isinstance(base, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return 0.5 * (q.variance / base.scale**2).sum(-1) - base.log_prob(q.loc).sum(-1) - q.entropy()


@register_kl(dist.Independent, LowRank)
def _kl_from_independent(q: Any, p: LowRank) -> Tensor:
    base = q.base_dist
    if not isinstance(base, torch.distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    precision = p.precision_matrix.diagonal(dim1=-2, dim2=-1)
    return 0.5 * (base.variance * precision).sum(-1) - p.log_prob(base.loc) - q.entropy()


class Pushed(TorchDistribution):
    """Normals pushed through an invertible map; mean and variance are averages over 512 fixed draws.

    Args:
        base: Independent normals.
        there: From a value of the base to one of this distribution, and the log of the volume that the map adds.
        back: The other way.
        size: Of an event.
    """

    arg_constraints = {}
    support: Any = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Any, there: Map, back: Map, size: int) -> None:
        self.base, self.there, self.back = base, there, back
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, torch.Size([size]))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Pushed":
        new = type(self)(self.base.expand(batch_shape), self.there, self.back, self.event_shape[0])
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = self.base.rsample(torch.Size(sample_shape))
        value, volume = self.there(noise)
        self._drawn = value, self.base.log_prob(noise) - volume
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._drawn is not None and value is self._drawn[0]:
            if value.grad_fn is not None or not torch.is_grad_enabled():  # else the value is to be held fixed
                return self._drawn[1]
        noise, volume = self.back(value)
        return self.base.log_prob(noise) + volume

    @lazy_property
    def _values(self) -> Tensor:
        noise = quasi_normal(self.base.event_shape[0], self.base.mean)
        noise = noise.reshape(len(noise), *(1,) * len(self.batch_shape), -1)
        return self.there(self.base.mean + self.base.stddev * noise)[0]

    @property
    def mean(self) -> Tensor:
        return self._values.mean(0)

    @property
    def variance(self) -> Tensor:
        return self._values.var(0, correction=0)


def quasi_normal(size: int, like: Tensor) -> Tensor:
    """Draws of a standard normal of this size, (512, size), always the same; their mean is 0, their variance 1."""
    uniform = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(256, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    both = torch.cat([half, -half])
    return (both / both.std(0, correction=0)).to(like)
