"""Vectors of latent variables: how the values of several sites lie side by side in one vector per datum."""

import torch
from torch import Tensor


class Layout:
    """The packing of latent sites into one vector per datum.

    Args:
        sites: name, a value `(k, *inner plates, n, *event)` and the number of event dimensions of each site, in order.
        nesting: how many plates enclose a site at the most.
    """

    def __init__(self, sites: list[tuple[str, Tensor, int]], nesting: int) -> None:
        self.nesting = nesting
        self.discrete = {name: value.dtype for name, value, _ in sites if not value.is_floating_point()}
        self.sites = [
            (name, value.shape[1 : value.dim() - event], value.shape[value.dim() - event :])
            for name, value, event in sites
        ]

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Put the sites side by side, shape (k, n, z)."""
        flat = []
        for name, batch, event in self.sites:
            value = values[name].reshape(len(values[name]), -1, batch[-1], event.numel())
            flat.append(value.transpose(1, 2).flatten(2))
        return torch.cat(flat, -1)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Take a vector (k, n, z) apart, site by site."""
        sizes = [batch[:-1].numel() * event.numel() for _, batch, event in self.sites]
        values = {}
        for (name, batch, event), part in zip(self.sites, vector.split(sizes, -1), strict=True):
            inner = part.unflatten(-1, (batch[:-1].numel(), event.numel())).transpose(1, 2)
            values[name] = inner.reshape(len(vector), *batch, *event)
        return values
