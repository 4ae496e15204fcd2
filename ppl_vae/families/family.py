r"""Families: from an unconstrained parameter tensor to a distribution. One final class per family, whatever its role.

The same `Normal` is a prior, a likelihood and an approximate posterior; which role a family can play follows from its
support and from whether it is reparameterised. A constructor's positional parameters are sizes and collaborators,
filled in by whoever builds the family; its keyword-only parameters are the keys of its table in a spec.
"""

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.networks.encoding import Word
from ppl_vae.networks.network import Free, Network

FLOOR = 1e-6


def positive(raw: Tensor) -> Tensor:
    """Map the reals to positive numbers: softplus plus a floor of 1e-6."""
    return nn.functional.softplus(raw) + FLOOR


def unconstrained(scale: Tensor) -> Tensor:
    """Invert `positive`; values up to twice the floor count as twice the floor."""
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


def refuse_constant(scale: Tensor, name: str = "scale", *, settable: bool = True) -> None:
    """Refuse features of standard deviation 0 if each feature has a parameter `name` of its own.

    Args:
        scale: Standard deviations, of any shape.
        name: The parameter.
        settable: Whether a user can set `name` to something else.
    """
    constant = (scale.flatten() == 0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
        raise ValueError(
            f"Expected features that vary, for a {name} of each feature; got {len(constant)} constant features "
            f"(columns {shown}), where the density grows without bound. "
            + (f'Use {name} = "shared" or a number, or leave these features out.' if settable else "Leave them out.")
        )


class Family(nn.Module, ABC):
    """A family of distributions over events of one shape.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.

    Attributes:
        support: The values that an entry of an event can take.
        reparameterised: Whether gradients flow through its draws.
        normals: Which of the members are normals, those that `nearest` finds.
        tied: The conditionals of other roles that it is made of; they are not registered a second time.
        encoding: How a guide sees such data, unless it is told otherwise.
        levels: How many values each entry of an event can take, 0 if that is not finite.

    Raises:
        ValueError: If the shape is empty or a size is below 1.
    """

    support: constraints.Constraint = constraints.real
    reparameterised = True
    normals: Literal["none", "some", "all"] = "none"
    tied: tuple[Any, ...] = ()
    encoding: Word = "plain"
    levels: tuple[int, ...] = ()

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = torch.Size([event] if isinstance(event, int) else event)
        if not self.event_shape or min(self.event_shape) < 1:
            raise ValueError(f"Expected the event of {type(self).__name__} to have positive sizes; got {event!r}.")

    @property
    def encodings(self) -> list[Word]:
        """Encoding of each entry of an event."""
        return [self.encoding] * self.event_shape.numel()

    @property
    def takes(self) -> tuple[str, ...]:
        """What `distribution` takes from the batch beside parameters and mask, such as `size_factor` and `total`."""
        return tuple(inspect.signature(self.distribution).parameters)[2:]

    @abstractmethod
    def start(self) -> Tensor:
        """Unconstrained parameters (p,) to begin with; their number is the size of the network's output."""

    @abstractmethod
    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        """Distribution with the batch shape of the parameters (*batch, p) and this event shape.

        A family that needs more of the batch than its parameters, such as each row's total, takes it as an optional
        keyword of this method; `Conditional.forward` passes on what it is given.

        Args:
            parameters: Unconstrained.
            mask: Boolean, broadcastable to (*batch, *event); entries where it is false do not count, whatever stands
                there, NaN included.
        """

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Parameters (p,) that start at the data `x`, shape (n, *event); parameters the family learns itself are set.

        Raises:
            ValueError: If the density of the data has no bound.
        """
        return self.start()

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:  # noqa: B027
        """Look at the training data `x`, shape (n, *features), before training."""

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        r"""Normal members closest to normals, by the smallest :math:`\mathrm{KL}(q \,\|\, N(\mathrm{loc}, P^{-1}))`.

        Args:
            loc: Means, shape (n, size of the event).
            precision: Inverse covariances P, shape (n, size, size).

        Returns:
            The unconstrained `parameters` (n, p), and by name the parameters that the family learns itself, (n, ...).

        Raises:
            NotImplementedError: If the family has no normals.
        """
        raise NotImplementedError

    def network(self) -> Network:
        """Network of a conditional that names none."""
        return Free()

    def _refuse(self, mask: Tensor | None, remedy: str = "Use FullNormal, LowRankNormal or a mixture.") -> None:
        """Refuse a mask: the marginal of the observed entries has no closed form."""
        if mask is not None:
            raise ValueError(
                f"Expected data without missing entries for {type(self).__name__}, whose entries depend on each other "
                f"in a way that has no marginals in closed form; got a mask. {remedy}"
            )

    def _vector(self, least: int = 1) -> int:
        """Size of an event, which must be a vector with some entries at least."""
        if len(self.event_shape) > 1 or self.event_shape[0] < least:
            raise ValueError(
                f"Expected {type(self).__name__} to have a vector{f' of {least} entries or more' * (least > 1)} for "
                f"its event; got shape {tuple(self.event_shape)}.{' Flatten it.' * (len(self.event_shape) > 1)}"
            )
        return self.event_shape[0]


class Centred(Family):
    """A family of vectors that starts at a mean and a standard deviation of each entry."""

    @abstractmethod
    def pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Parameters (p,) of the member with these moments, or near them."""

    def start(self) -> Tensor:
        return self.pack(torch.zeros(self._vector()), torch.ones(self._vector()))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        loc, scale = moments(x, mask)
        refuse_constant(scale)
        return self.pack(loc, scale)
