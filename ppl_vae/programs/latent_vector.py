"""Vectors of latent variables: how the values of several sites lie side by side in one vector per datum."""

import torch
from torch import Tensor


class Layout:
    """The packing of latent sites into one vector per datum.

    Args:
        sites: name, a value `(k, *inner plates, n, *event)` and the number of event dimensions of each site, in order.
        n: the number of data; 1 where the whole data set counts as one datum, and all plates are inner ones.
    """

    def __init__(self, sites: list[tuple[str, Tensor, int]], n: int) -> None:
        self.n = n
        self.discrete = {name: value.dtype for name, value, _ in sites if not value.is_floating_point()}
        self.sites = [
            (name, value.shape[1 : value.dim() - event], value.shape[value.dim() - event :])
            for name, value, event in sites
        ]

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Put the sites side by side, shape (k, n, z)."""
        flat = []
        for name, _, event in self.sites:
            value = values[name].reshape(len(values[name]), -1, self.n, event.numel())
            flat.append(value.transpose(1, 2).flatten(2))
        return torch.cat(flat, -1)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Take a vector (k, n, z) apart, site by site."""
        inner = [batch.numel() // self.n for _, batch, _ in self.sites]
        sizes = [plates * event.numel() for plates, (_, _, event) in zip(inner, self.sites, strict=True)]
        values = {}
        for (name, batch, event), plates, part in zip(self.sites, inner, vector.split(sizes, -1), strict=True):
            value = part.unflatten(-1, (plates, event.numel())).transpose(1, 2)
            values[name] = value.reshape(len(vector), *batch, *event)
        return values
