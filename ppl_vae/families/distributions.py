"""Distributions that Pyro lacks: masks that keep NaN out, mixtures with moments, full covariance with its KL."""

import math
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

from ppl_vae.families.supports import value_inside


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

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Marginal":
        new = super().expand(batch_shape, self._get_checked_instance(Marginal, _instance))
        new.observed = self.observed.expand(torch.Size(batch_shape) + self.event_shape)
        return new

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
    marginal.observed = mask
    return marginal


@register_kl(FullCovariance, dist.Independent)
def _kl_full_independent(q: FullCovariance, p: Any) -> Tensor:
    base = p.base_dist
    if not isinstance(base, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    full = torch.distributions.MultivariateNormal(
        base.loc, scale_tril=torch.diag_embed(base.scale), validate_args=False
    )
    return kl_divergence(q, full)
