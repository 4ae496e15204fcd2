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
