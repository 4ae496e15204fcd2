"""Fully connected networks."""

import math
from abc import abstractmethod
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice
from ppl_vae.networks.network import Amortized

Activation = Literal["tanh", "relu", "elu", "gelu", "silu", "softplus", "sigmoid"]
Normalization = Literal["none", "layer"]
_KINDS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid)
ACTIVATIONS = {kind.__name__.lower(): kind for kind in _KINDS}


class Residual(nn.Sequential):
    """Layers with a skip connection around them, h + layers(h)."""

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)  # type: ignore[no-any-return]


class Layered(Amortized):
    """Hidden layers of some widths and an affine one after them. A subclass writes a hidden layer."""

    def __init__(self, hidden: list[int]) -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise ValueError(
                f"Expected `hidden` to list one or more positive widths; got {hidden!r}. For no hidden layer use "
                f"Linear."
            )
        self.hidden = list(hidden)

    @abstractmethod
    def hidden_layer(self, size: int, width: int) -> list[nn.Module]:
        """Modules from (n, size) to (n, width), one after the other."""

    def build_layers(self, context: int, start: Tensor) -> None:
        hidden = [layer for pair in pairwise([context, *self.hidden]) for layer in self.hidden_layer(*pair)]
        self.layers = nn.Sequential(*hidden, nn.Linear(self.hidden[-1], start.numel()))
        self.restart(start)

    @torch.no_grad()
    def restart(self, start: Tensor) -> None:
        self.layers[-1].bias.copy_(start)  # type: ignore[union-attr, operator]

    def apply_layers(self, standard: Tensor) -> Tensor:
        return self.layers(standard)


class MLP(Layered):
    """Fully connected layers with one activation between them.

    A hidden layer is h -> dropout(activation(norm(W h + b))), with the parts that are asked for.

    Args:
        hidden: The widths of the hidden layers, at least one.
        activation: `tanh`, `relu`, `elu`, `gelu`, `silu`, `softplus` or `sigmoid`.
        normalization: `none`, or `layer` for layer normalisation before each activation.
        dropout: The share of the hidden units set to 0 in each training step. It acts in training mode alone: `fit`
            trains in that mode, and all that evaluates a program does so in evaluation mode.
        residual: Whether a layer as wide as the one before it is added to it, h + layer(h). Layers that change the
            width have no such skip connection.

    Raises:
        ValueError: If `hidden` is empty or a width is not positive, the activation or normalization is unknown,
            `dropout` is not in [0, 1), or `residual` has no effect.

    References:
        Layer Normalization (Ba, Kiros, Hinton 2016). Dropout: A Simple Way to Prevent Neural Networks from Overfitting
        (Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014). Deep Residual Learning for Image Recognition
        (He, Zhang, Ren, Sun 2016).
    """

    def __init__(
        self,
        *,
        hidden: list[int],
        activation: Activation = "tanh",
        normalization: Normalization = "none",
        dropout: float = 0.0,
        residual: bool = False,
    ) -> None:
        super().__init__(hidden)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("normalization", normalization, ("none", "layer"))
        if not 0 <= dropout < 1:
            raise ValueError(f"Expected `dropout` to be a number from 0 to below 1; got {dropout!r}.")
        if residual and all(a != b for a, b in pairwise(self.hidden)):
            raise ValueError(
                f"Expected neighbours of equal width in `hidden`, for `residual` to connect; got {self.hidden}."
            )
        self.activation, self.normalization = activation, normalization
        self.dropout, self.residual = dropout, residual

    def hidden_layer(self, size: int, width: int) -> list[nn.Module]:
        layer: list[nn.Module] = [nn.Linear(size, width)]
        layer += [nn.LayerNorm(width)] if self.normalization == "layer" else []
        layer += [ACTIVATIONS[self.activation]()]
        layer += [nn.Dropout(self.dropout)] if self.dropout else []
        return [Residual(*layer)] if self.residual and size == width else layer


class GatedMLP(Layered):
    r"""Fully connected layers with gates, :math:`h \to (A h + a) \odot \sigma(B h + b)`.

    The weights of the hidden layers begin as normals of variance 2 / (number of inputs).

    Args:
        hidden: The widths of the hidden layers, at least one.

    Raises:
        ValueError: If `hidden` is empty or a width is not positive.

    References:
        VAE with a VampPrior (Tomczak, Welling 2018), section 5. Delving Deep into Rectifiers (He, Zhang, Ren, Sun
        2015), for the initial weights. Language Modeling with Gated Convolutional Networks (Dauphin, Fan, Auli,
        Grangier 2017), for the gates.
    """

    def __init__(self, *, hidden: list[int]) -> None:
        super().__init__(hidden)

    def hidden_layer(self, size: int, width: int) -> list[nn.Module]:
        return [nn.Linear(size, 2 * width), nn.GLU()]  # A and B in one product

    def build_layers(self, context: int, start: Tensor) -> None:
        super().build_layers(context, start)
        for layer in list(self.layers)[:-1]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / max(layer.in_features, 1)))
