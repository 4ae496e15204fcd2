"""Normals with full covariance."""

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import MultivariateNormal

from ppl_vae.families.distributions import full_covariance
from ppl_vae.families.family import Centred, positive, unconstrained


class FullNormal(Centred):
    r"""A normal with full covariance, :math:`N(\mathrm{loc}, L L^\top)`. The parameters are loc and the triangle L."""

    normals = "all"
    row: Tensor
    column: Tensor

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event)
        row, column = torch.tril_indices(self._vector(), self._vector())
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("column", column, persistent=False)

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        size = self.event_shape[0]
        loc, raw = parameters[..., :size], parameters[..., size:]
        lower = parameters.new_zeros(*parameters.shape[:-1], size, size)
        lower[..., self.row, self.column] = raw
        scale_tril = lower.tril(-1) + torch.diag_embed(positive(lower.diagonal(dim1=-2, dim2=-1)))
        return full_covariance(loc, scale_tril, mask)

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        width = precision.diagonal(dim1=-2, dim2=-1).rsqrt().unsqueeze(-1)
        unit = precision * width * width.mT
        singular = torch.linalg.cholesky_ex(unit).info > 0  # to rounding
        unit = unit + 1e-10 * singular.reshape(-1, 1, 1) * torch.eye(len(unit[0])).to(unit)
        tril = width * MultivariateNormal(loc, precision_matrix=unit, validate_args=False).scale_tril
        scale = tril.diagonal(dim1=-2, dim2=-1)
        raw = tril - torch.diag_embed(scale - unconstrained(scale))
        return {"parameters": torch.cat([loc, raw[..., self.row, self.column]], -1)}

    def pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([loc, torch.diag(unconstrained(scale))[self.row, self.column]])
