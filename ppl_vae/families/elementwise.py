"""Families whose entries are independent given the parameters."""

import math
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.families.distributions import elementwise
from ppl_vae.families.family import Family, moments, positive, refuse_constant, unconstrained


class StandardNormal(Family):
    r"""Independent standard normals, :math:`N(0, I)`; no parameters."""

    def start(self) -> Tensor:
        return torch.zeros(0)

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        loc = parameters.new_zeros(()).expand(parameters.shape[:-1] + self.event_shape)
        return elementwise(dist.Normal(loc, torch.ones_like(loc)), len(self.event_shape), mask)


class Normal(Family):
    r"""Independent normals, :math:`\prod_j N(x_j;\, \mathrm{loc}_j, \mathrm{scale}_j^2)`.

    Args:
        event: the shape of an event.
        scale: where the standard deviation comes from: `network` (one a feature, from the context), `shared` (one
            learned number), `feature` (one learned number a feature), or a positive number that stays fixed.

    Raises:
        ValueError: for any other scale.
    """

    normals = "all"

    def __init__(
        self, event: int | tuple[int, ...], *, scale: Literal["network", "shared", "feature"] | float = "network"
    ) -> None:
        super().__init__(event)
        known = isinstance(scale, str) and scale in ("network", "shared", "feature")
        if not known and not (isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf):
            raise ValueError(f"Expected `scale` to be network, shared, feature or a positive number; got {scale!r}.")
        self.scale = scale
        one = unconstrained(torch.ones(()))
        if scale == "shared":
            self.raw_scale = nn.Parameter(one)
        elif scale == "feature":
            self.raw_scale = nn.Parameter(one.repeat(self.event_shape))
        elif not isinstance(scale, str):
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    def start(self) -> Tensor:
        loc = torch.zeros(self.event_shape.numel())
        return torch.cat([loc, unconstrained(torch.ones_like(loc))]) if self.scale == "network" else loc

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        loc, scale = moments(x, mask)
        if self.scale in ("network", "feature"):
            refuse_constant(scale, str(self.scale))
        if self.scale == "network":
            return torch.cat([loc.flatten(), unconstrained(scale).flatten()])
        if isinstance(self.scale, str):
            with torch.no_grad():
                self.raw_scale.copy_(unconstrained(scale.square().mean().sqrt() if self.scale == "shared" else scale))
        return loc.flatten()

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        each = precision.diagonal(dim1=-2, dim2=-1)
        if self.scale == "network":
            return {"parameters": torch.cat([loc, unconstrained(each.rsqrt())], -1)}
        if not isinstance(self.scale, str):
            return {"parameters": loc}
        scale = (each.mean(-1) if self.scale == "shared" else each.unflatten(-1, self.event_shape)).rsqrt()
        return {"parameters": loc, "raw_scale": unconstrained(scale)}

    def own_scale(self) -> Tensor:
        """Give the scale where it does not come from the network: shape () or the event's."""
        return positive(self.raw_scale) if isinstance(self.scale, str) else self.fixed_scale  # type: ignore[return-value]

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        loc, *raw = self._split(parameters)
        scale = positive(raw[0]) if raw else self.own_scale()
        return elementwise(dist.Normal(loc, scale), len(self.event_shape), mask)


class Bernoulli(Family):
    r"""Independent Bernoullis, :math:`\prod_j p_j^{x_j} (1 - p_j)^{1 - x_j}`, by their logits."""

    support = constraints.boolean
    reparameterised = False

    def start(self) -> Tensor:
        return torch.zeros(self.event_shape.numel())

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return moments(x, mask)[0].clamp(1e-3, 1 - 1e-3).logit().flatten()

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        (logits,) = self._split(parameters)
        return elementwise(dist.Bernoulli(logits=logits), len(self.event_shape), mask)
