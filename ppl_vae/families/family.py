r"""Families: from an unconstrained parameter tensor to a distribution. One final class a family, whatever its role.

The same `Normal` is a prior, a likelihood and an approximate posterior; who may play which role follows from its
support and from its being reparameterised. A constructor's positional parameters are sizes and collaborators, filled
in by whoever builds; its keyword-only parameters are the keys of its table in a spec.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.networks.network import Free, Network

FLOOR = 1e-6


def positive(raw: Tensor) -> Tensor:
    """Map the reals to scales: softplus plus a floor of 1e-6."""
    return nn.functional.softplus(raw) + FLOOR


def unconstrained(scale: Tensor) -> Tensor:
    """Invert `positive`; scales at or below twice the floor count as that."""
    above = (scale - FLOOR).clamp_min(FLOOR)
    return above + torch.log(-torch.expm1(-above))


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1/n) of each feature over the observed entries of `x`, shape (n, *event).

    A feature that is never observed has mean 0 and standard deviation 1.
    """
    if mask is None:
        scale = torch.where(x.amin(0) == x.amax(0), 0.0, x.std(0, correction=0))
        return x.mean(0), scale
    seen = mask.to(x.dtype)
    filled = torch.where(seen > 0, x, 0.0)
    count = seen.sum(0)
    loc = filled.sum(0) / count.clamp_min(1)
    scale = (((filled - loc) ** 2 * seen).sum(0) / count.clamp_min(1)).sqrt()
    infinity = x.new_tensor(math.inf)
    constant = torch.where(seen > 0, x, infinity).amin(0) == torch.where(seen > 0, x, -infinity).amax(0)
    return loc, torch.where(constant, 0.0, torch.where(count > 0, scale, 1.0))


class Family(nn.Module, ABC):
    """A family of distributions over events of one shape.

    Args:
        event: the shape of an event; an int is short for a 1-tuple.

    Attributes:
        normals: which of the members are normals, so that `nearest` finds them.

    Raises:
        ValueError: for an empty shape or a size below 1.
    """

    support: constraints.Constraint = constraints.real
    reparameterised = True
    normals: Literal["none", "some", "all"] = "none"

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = torch.Size([event] if isinstance(event, int) else event)
        if not self.event_shape or min(self.event_shape) < 1:
            raise ValueError(f"Expected the event of {type(self).__name__} to have positive sizes; got {event!r}.")

    @abstractmethod
    def start(self) -> Tensor:
        """Give the unconstrained parameters `(p,)` to begin with; their number is the network's size."""

    @abstractmethod
    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        """Turn parameters `(*batch, p)` into a distribution with that batch shape and this event shape.

        Args:
            parameters: unconstrained.
            mask: boolean, broadcastable to `(*batch, *event)`; entries where it is false do not count, whatever stands
                there, NaN included.
        """

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give parameters `(p,)` that begin at the data `x`, shape (n, *event); set scales of one's own likewise."""
        return self.start()

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        r"""Normal members closest to normals, by the smallest :math:`\mathrm{KL}(q \,\|\, N(\mathrm{loc}, P^{-1}))`.

        Args:
            loc: means, shape (n, size of the event).
            precision: inverse covariances P, shape (n, size, size).

        Returns:
            The unconstrained `parameters` (n, p), and by name the parameters that the family learns itself, (n, ...).

        Raises:
            NotImplementedError: If the family has no normals.
        """
        raise NotImplementedError

    def network(self) -> Network:
        """Give the network of a conditional that names none."""
        return Free()

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Cut `(*batch, j * size)` into j tensors of shape `(*batch, *event)`."""
        parts = parameters.unflatten(-1, (-1, *self.event_shape))
        return parts.unbind(-1 - len(self.event_shape))

    def _vector(self) -> int:
        if len(self.event_shape) > 1:
            raise ValueError(
                f"Expected {type(self).__name__} to have a vector for its event; got shape "
                f"{tuple(self.event_shape)}. Flatten it."
            )
        return self.event_shape[0]


def refuse_constant(scale: Tensor, owner: str) -> None:
    constant = (scale.flatten() == 0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
        raise ValueError(
            f"Expected features that vary, for a scale {owner if owner.startswith('of') else f'of kind {owner}'}; "
            f"got {len(constant)} "
            f"constant features (columns {shown}), where the density grows without bound as the scale falls. "
            'Use scale = "shared" or a number, or leave these features out.'
        )
