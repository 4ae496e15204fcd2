"""Mixtures."""

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.families.distributions import Mixture, elementwise
from ppl_vae.families.family import Centred, positive, unconstrained
from ppl_vae.families.full_normal import FullNormal


class MixtureNormal(Centred):
    r"""A mixture of diagonal normals, :math:`\sum_c \pi_c \prod_j N(x_j;\, \mathrm{loc}_{cj}, \mathrm{scale}_{cj}^2)`.

    Draws are reparameterised (Pathwise Derivatives for Multivariate Distributions, Jankowiak and Karaletsos 2018).

    Args:
        event: The size of an event, a vector; at least 2 for an approximate posterior.
        components: The number of components.

    Raises:
        ValueError: If there is not at least one component.
    """

    normals = "some"

    def __init__(self, event: int | tuple[int, ...], *, components: int = 10) -> None:
        super().__init__(event)
        self.components = check_int("components", components)
        self.reparameterised = self._vector() > 1

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        logits, rest = parameters[..., : self.components], parameters[..., self.components :]
        locs, raw = rest.unflatten(-1, (2, self.components, self.event_shape[0])).unbind(-3)
        scales = positive(raw)
        if mask is None:
            return Mixture(locs, scales, logits)
        each = elementwise(dist.Normal(locs, scales), 1, mask.unsqueeze(-2))
        weights = dist.Categorical(logits=logits.expand(each.batch_shape))
        return dist.MixtureSameFamily(weights, each, validate_args=False)  # which would refuse a NaN under the mask

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        raw = unconstrained(precision.diagonal(dim1=-2, dim2=-1).rsqrt())
        copies = [part.repeat(1, self.components) for part in (loc, raw)]
        return {"parameters": torch.cat([loc.new_zeros(len(loc), self.components), *copies], -1)}

    def pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Scatter the components about `loc`; equal components would never part."""
        locs = loc + scale * torch.randn(self.components, *self.event_shape).to(loc)
        scales = scale.expand_as(locs)
        return torch.cat([loc.new_zeros(self.components), locs.flatten(), unconstrained(scales).flatten()])


class MixtureFullNormal(Centred):
    r"""A mixture of normals with full covariance, :math:`\sum_c \pi_c N(x;\, \mathrm{loc}_c, L_c L_c^\top)`.

    Its draws have no gradient, so it can be a prior or a likelihood.

    Args:
        event: The size of an event, a vector.
        components: The number of components.

    Raises:
        ValueError: If there is not at least one component.
    """

    reparameterised = False

    def __init__(self, event: int | tuple[int, ...], *, components: int = 10) -> None:
        super().__init__(event)
        self.components = check_int("components", components)
        self.each = FullNormal(event)

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        logits, rest = parameters[..., : self.components], parameters[..., self.components :]
        rows = rest.unflatten(-1, (self.components, -1))
        each = self.each.distribution(rows, None if mask is None else mask.unsqueeze(-2))
        weights = dist.Categorical(logits=logits.expand(each.batch_shape))
        return dist.MixtureSameFamily(weights, each, validate_args=None if mask is None else False)

    def pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Scatter the components about `loc`; equal components would never part."""
        locs = loc + scale * torch.randn(self.components, *self.event_shape).to(loc)
        return torch.cat([loc.new_zeros(self.components), *(self.each.pack(one, scale) for one in locs)])
