"""Affine networks."""

import math

import torch
from torch import Tensor, nn

from ppl_vae.networks.network import Amortized


class Linear(Amortized):
    r"""An affine map, :math:`W\,(c - \mathrm{shift}) / \mathrm{scale} + b`.

    As the network of a `Normal` likelihood whose scale does not come from the network, this is the linear-Gaussian
    model; `weight` is then of shape (x, z).
    """

    def build_layers(self, context: int, start: Tensor) -> None:
        self.weight = nn.Parameter(torch.empty(start.numel(), context))
        self.bias = nn.Parameter(start.clone())
        nn.init.uniform_(self.weight, -1 / math.sqrt(max(context, 1)), 1 / math.sqrt(max(context, 1)))

    def apply_layers(self, standard: Tensor) -> Tensor:
        return nn.functional.linear(standard, self.weight, self.bias)
