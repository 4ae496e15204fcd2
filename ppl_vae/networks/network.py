r"""Networks: from a context to an unconstrained parameter tensor.

A network says how a distribution's parameters depend on what it is conditioned on. `Free` depends on nothing (a
learnable prior), `Linear` and `MLP` are amortized, `Table` keeps one row a datum. A network is written as a recipe,
with its settings alone; its sizes follow from the family and the context when a `Conditional` builds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def join(contexts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> Tensor:
    """Flatten the event of each context, broadcast their batches against each other and put them side by side.

    Args:
        contexts: tensors of shapes `batch + shape`; batches need only broadcast.
        shapes: the event shape of each context.

    Returns:
        A tensor of shape `(*batch, total size of the shapes)`.

    Raises:
        ValueError: where the number of contexts or an event shape differs from what was declared.
    """
    if len(contexts) != len(shapes):
        raise ValueError(f"Expected {len(shapes)} contexts of shapes {_shown(shapes)}; got {len(contexts)}.")
    flat = []
    for context, shape in zip(contexts, shapes, strict=True):
        batch = context.shape[: context.dim() - len(shape)]
        if context.dim() < len(shape) or context.shape[len(batch) :] != shape:
            raise ValueError(
                f"Expected a context whose trailing dimensions are {tuple(shape)}; got shape {tuple(context.shape)}."
            )
        flat.append(context.reshape(*batch, shape.numel()))
    if len(flat) == 1:
        return flat[0]
    batch = torch.broadcast_shapes(*(context.shape[:-1] for context in flat))
    return torch.cat([context.expand(*batch, context.shape[-1]) for context in flat], -1)


def _shown(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes) or "none"


class Network(nn.Module, ABC):
    """A map from one joined context to the unconstrained parameters of a family."""

    @abstractmethod
    def build(self, context: int, start: Tensor) -> None:
        """Make the learnable tensors.

        Args:
            context: the size of the joined context.
            start: the parameters `(p,)` to answer before any training; its length is the size of the answer.
        """

    @abstractmethod
    def restart(self, start: Tensor) -> None:
        """Let the answer begin at `start`, shape (p,), whatever the context."""

    @abstractmethod
    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        """Answer the parameters `(*batch, p)` for a context `(*batch, c)`.

        Args:
            context: what to condition on.
            observed: boolean, as the context; where false, the entry counts as standing at its average.
        """


class Free(Network):
    """Parameters that depend on nothing: a learnable prior."""

    def build(self, context: int, start: Tensor) -> None:
        if context:
            raise ValueError(
                f"Expected a network that takes a context of size {context}, such as Linear or MLP; got Free, which "
                f"takes none."
            )
        if start.numel():
            self.value = nn.Parameter(start.clone())
        else:
            self.register_buffer("value", start.clone(), persistent=False)

    def restart(self, start: Tensor) -> None:
        with torch.no_grad():
            self.value.copy_(start)

    def forward(self, context: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        return self.value


class Given(Network):
    """The context itself, for a family that reads its parameters off it; entries that are not observed are marked."""

    def build(self, context: int, start: Tensor) -> None:
        self.features = context

    def restart(self, start: Tensor) -> None:
        pass

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        if observed is None:
            return context
        return torch.cat([torch.where(observed, context, 0.0), observed.to(context.dtype)], -1)


class Amortized(Network):
    """A network with a standardised input: `(context - shift) / scale`."""

    shift: Tensor
    scale: Tensor

    def _standardise(self, context: Tensor, observed: Tensor | None) -> Tensor:
        standard = (context - self.shift) / self.scale
        return standard if observed is None else torch.where(observed, standard, 0.0)

    def centre(self, shift: Tensor, scale: Tensor) -> None:
        """Set the input's shift `(c,)` and scale, one number; both are buffers, not learned."""
        self.shift.copy_(shift)
        self.scale.copy_(scale)
