r"""Networks: from a context to an unconstrained parameter tensor.

A network says how a distribution's parameters depend on what it is conditioned on. `Free` depends on nothing (a
learnable prior), `Linear` and `MLP` are amortized, `Table` keeps one row a datum. A network is written as a recipe,
with its settings alone; its sizes follow from the family and the context when a `Conditional` builds it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["MLP", "Free", "Linear", "Table"]

Activation = Literal["tanh", "relu", "elu", "gelu", "silu", "softplus", "sigmoid"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}


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


class _Given(Network):
    """The context itself, for a family that reads its parameters off it; entries that are not observed are marked."""

    def build(self, context: int, start: Tensor) -> None:
        self.features = context

    def restart(self, start: Tensor) -> None:
        pass

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        if observed is None:
            return context
        return torch.cat([torch.where(observed, context, 0.0), observed.to(context.dtype)], -1)


class _Amortized(Network):
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


class Linear(_Amortized):
    r"""An affine map, :math:`W\,(c - \mathrm{shift}) / \mathrm{scale} + b`.

    As the network of a `Normal` likelihood whose scale does not come from the network, this is the linear-Gaussian
    model; `weight` is then of shape (x, z).
    """

    def build(self, context: int, start: Tensor) -> None:
        self.register_buffer("shift", torch.zeros(context))
        self.register_buffer("scale", torch.ones(()))
        self.weight = nn.Parameter(torch.empty(start.numel(), context))
        self.bias = nn.Parameter(start.clone())
        nn.init.uniform_(self.weight, -1 / math.sqrt(max(context, 1)), 1 / math.sqrt(max(context, 1)))

    def restart(self, start: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(start)

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        return nn.functional.linear(self._standardise(context, observed), self.weight, self.bias)


class MLP(_Amortized):
    """Fully connected layers with one activation between them.

    Args:
        hidden: the widths of the hidden layers, at least one.
        activation: `tanh`, `relu`, `elu`, `gelu`, `silu`, `softplus` or `sigmoid`.

    Raises:
        ValueError: for no or non-positive widths, or an unknown activation.
    """

    def __init__(self, *, hidden: list[int], activation: Activation = "tanh") -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise ValueError(
                f"Expected `hidden` to list one or more positive widths; got {hidden!r}. For no hidden layer use "
                f"Linear."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"Expected `activation` to be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        self.hidden = list(hidden)
        self.activation = activation

    def build(self, context: int, start: Tensor) -> None:
        self.register_buffer("shift", torch.zeros(context))
        self.register_buffer("scale", torch.ones(()))
        layers: list[nn.Module] = []
        for wide, narrow in zip([context, *self.hidden], self.hidden, strict=False):
            layers += [nn.Linear(wide, narrow), ACTIVATIONS[self.activation]()]
        self.layers = nn.Sequential(*layers, nn.Linear(self.hidden[-1], start.numel()))
        self.restart(start)

    def restart(self, start: Tensor) -> None:
        with torch.no_grad():
            self.layers[-1].bias.copy_(start)  # type: ignore[union-attr, operator]

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        return self.layers(self._standardise(context, observed))  # type: ignore[no-any-return]


class Table(Network):
    """One row of parameters a datum: no amortization. Its context is the datum's index in the data set.

    Args:
        rows: the number of data.

    Raises:
        ValueError: for fewer than one row.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"Expected `rows` to be the number of data, at least 1; got {rows}.")
        self.rows = rows

    def build(self, context: int, start: Tensor) -> None:
        self.value = nn.Parameter(start.repeat(self.rows, 1))

    def restart(self, start: Tensor) -> None:
        with torch.no_grad():
            self.value.copy_(start)

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        return self.value[context]
