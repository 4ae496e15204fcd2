"""Fully connected networks."""

from typing import Literal

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice
from ppl_vae.networks.network import Amortized

Activation = Literal["tanh", "relu", "elu", "gelu", "silu", "softplus", "sigmoid"]
_KINDS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid)
ACTIVATIONS = {kind.__name__.lower(): kind for kind in _KINDS}


class MLP(Amortized):
    """Fully connected layers with one activation between them.

    Args:
        hidden: The widths of the hidden layers, at least one.
        activation: `tanh`, `relu`, `elu`, `gelu`, `silu`, `softplus` or `sigmoid`.

    Raises:
        ValueError: If `hidden` is empty or a width is not positive, or the activation is unknown.
    """

    def __init__(self, *, hidden: list[int], activation: Activation = "tanh") -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise ValueError(
                f"Expected `hidden` to list one or more positive widths; got {hidden!r}. For no hidden layer use "
                f"Linear."
            )
        check_choice("activation", activation, ACTIVATIONS)
        self.hidden = list(hidden)
        self.activation = activation

    def build_layers(self, context: int, start: Tensor) -> None:
        layers: list[nn.Module] = []
        for wide, narrow in zip([context, *self.hidden], self.hidden, strict=False):
            layers += [nn.Linear(wide, narrow), ACTIVATIONS[self.activation]()]
        self.layers = nn.Sequential(*layers, nn.Linear(self.hidden[-1], start.numel()))
        self.restart(start)

    @torch.no_grad()
    def restart(self, start: Tensor) -> None:
        self.layers[-1].bias.copy_(start)  # type: ignore[union-attr, operator]

    def apply_layers(self, standard: Tensor) -> Tensor:
        return self.layers(standard)
