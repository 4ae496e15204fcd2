"""Distributions that Pyro lacks: full covariance with its KL, mixtures with moments, and masks that hold NaN at bay."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence, register_kl


class Mixture(dist.MixtureOfDiagNormals):
    """Pyro's mixture, with moments, and with samples of any shape where there is a batch."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if not sample_shape:
            return super().rsample()  # type: ignore[no-any-return]
        return self.expand(torch.Size(sample_shape) + self.batch_shape).rsample()

    @property
    def mean(self) -> Tensor:
        return (self.categorical.probs.unsqueeze(-1) * self.locs).sum(-2)

    @property
    def variance(self) -> Tensor:
        spread = self.coord_scale**2 + (self.locs - self.mean.unsqueeze(-2)) ** 2
        return (self.categorical.probs.unsqueeze(-1) * spread).sum(-2)


class Filled(MaskedDistribution):
    """A masked distribution whose hidden entries are filled first: a NaN under a mask would poison gradients."""

    _mask: Any

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Filled":
        batch_shape = torch.Size(batch_shape)
        return Filled(self.base_dist.expand(batch_shape), self._mask.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(torch.where(self._mask, value, 0.0))


def elementwise(base: TorchDistribution, event_dims: int, mask: Tensor | None) -> TorchDistribution:
    """Make an event of elementwise distributions, under a mask where there is one. Zero is in every support here."""
    return (base if mask is None else Filled(base, mask)).to_event(event_dims)


class FullCovariance(dist.MultivariateNormal):
    """A multivariate normal that has its analytic KL to independent normals, which Pyro lacks."""


class Marginal(FullCovariance):
    """The marginal of the entries in `mask`; the others stand apart with a density of one where they are filled."""

    observed: Tensor

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Marginal":
        new = super().expand(batch_shape, self._get_checked_instance(Marginal, _instance))
        new.observed = self.observed.expand(torch.Size(batch_shape) + self.event_shape)
        return new  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(torch.where(self.observed, value, self.loc))


def marginal(loc: Tensor, scale_tril: Tensor, mask: Tensor) -> Marginal:
    """Give the marginal of a normal's observed entries; hidden ones stand apart with a density of one."""
    shape = torch.broadcast_shapes(loc.shape, mask.shape)
    mask = mask.expand(shape)
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    apart = torch.diag_embed((~mask).to(loc.dtype) / (2 * math.pi))
    covariance = torch.where(both, scale_tril @ scale_tril.mT, 0.0) + apart
    found = Marginal(loc.expand(shape), scale_tril=torch.linalg.cholesky(covariance))
    found.observed = mask
    return found


@register_kl(FullCovariance, dist.Independent)
def _kl_full_independent(q: FullCovariance, p: Any) -> Tensor:
    base = p.base_dist
    if not isinstance(base, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return kl_divergence(
        torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril, validate_args=False),
        torch.distributions.MultivariateNormal(base.loc, scale_tril=torch.diag_embed(base.scale), validate_args=False),
    )
