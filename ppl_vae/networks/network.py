r"""Networks: from a context to an unconstrained parameter tensor.

A network says how a distribution's parameters depend on what it is conditioned on. `Free` depends on nothing (a
learnable prior), `Linear` and `MLP` are amortized, `Table` keeps one row per datum. A network is written as a recipe,
with its settings alone; its sizes follow from the family and the context when a `Conditional` builds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn


def join(contexts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> Tensor:
    """Flatten the event of each context, broadcast the batches and concatenate.

    Args:
        contexts: Tensors of shapes `batch + shape`; their batches need only broadcast.
        shapes: The event shape of each context.

    Returns:
        A tensor of shape `(*batch, total size of the shapes)`.

    Raises:
        ValueError: If the number of contexts or an event shape differs from `shapes`.
    """
    if len(contexts) != len(shapes):
        known = ", ".join(str(tuple(shape)) for shape in shapes) or "none"
        raise ValueError(f"Expected {len(shapes)} contexts of shapes {known}; got {len(contexts)}.")
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


@contextmanager
def in_mode(*modules: nn.Module, training: bool = False) -> Iterator[None]:
    """Put modules in evaluation mode, or in training mode, and each part of them back into its own."""
    changed = [part for module in modules for part in module.modules() if part.training != training]
    for module in modules if changed else ():
        module.train(training)
    try:
        yield
    finally:
        for part in changed:
            part.training = not training


class Network(nn.Module, ABC):
    """A map from one joined context to the unconstrained parameters of a family.

    Attributes:
        wants: What to call it with: the `context`, the `index` of each datum in its data set, or nothing (None).
    """

    wants: ClassVar[Literal["context", "index"] | None] = "context"

    @abstractmethod
    def build(self, context: int, start: Tensor) -> None:
        """Make the learnable tensors.

        Args:
            context: The size of the joined context.
            start: The parameters (p,) to return before any training; their number is the size of the output.
        """

    @abstractmethod
    def restart(self, start: Tensor) -> None:
        """Set the output to `start`, shape (p,), by the bias alone."""

    @abstractmethod
    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        """Parameters (*batch, p) for a context (*batch, c).

        Args:
            context: What to condition on.
            observed: Boolean, as the context; an entry where it is false counts as the average.
        """


class Free(Network):
    """Parameters that depend on nothing: a learnable prior."""

    wants = None

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

    @torch.no_grad()
    def restart(self, start: Tensor) -> None:
        self.value.copy_(start)

    def forward(self, context: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        return self.value


class Identity(Network):
    """The context itself, for a family that reads its parameters off it.

    If `observed` is given, unobserved entries become 0, and the mask follows as further parameters of 0 and 1.
    """

    def build(self, context: int, start: Tensor) -> None: ...

    def restart(self, start: Tensor) -> None: ...

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        if observed is None:
            return context
        return torch.cat([torch.where(observed, context, 0.0), observed.to(context.dtype)], -1)


class Amortized(Network):
    """A network with a standardised input, (context - shift) / scale. A subclass writes layers that end in a bias.

    Attributes:
        others: How many of the context's last numbers are those of contexts after the first, such as a label.
    """

    shift: Tensor
    scale: Tensor
    others: int = 0

    def build(self, context: int, start: Tensor) -> None:
        self.register_buffer("shift", torch.zeros(context))
        self.register_buffer("scale", torch.ones(()))
        self.build_layers(context, start)

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        standard = (context - self.shift) / self.scale
        return self.apply_layers(standard if observed is None else torch.where(observed, standard, 0.0))

    @torch.no_grad()
    def restart(self, start: Tensor) -> None:
        self.bias.copy_(start)  # type: ignore[operator]

    def centre(self, shift: Tensor, scale: Tensor) -> None:
        """Set the input's shift (c,) and scale, one number or (c,); both are buffers, not learned."""
        self.shift.copy_(shift)
        self.scale.copy_(scale)

    @abstractmethod
    def build_layers(self, context: int, start: Tensor) -> None:
        """Make the learnable tensors, as `build` says."""

    @abstractmethod
    def apply_layers(self, standard: Tensor) -> Tensor:
        """Parameters (*batch, p) for a standardised context (*batch, c)."""
