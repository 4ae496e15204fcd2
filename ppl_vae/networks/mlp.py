"""Fully connected networks."""

from typing import Literal

import torch
from torch import Tensor, nn

from ppl_vae.networks.network import Amortized

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


class MLP(Amortized):
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
