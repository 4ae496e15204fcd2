"""Normals whose covariance is a diagonal and a few directions."""

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.families.distributions import low_rank
from ppl_vae.families.family import Centred, positive, unconstrained


class LowRankNormal(Centred):
    r"""A normal with a low-rank covariance, :math:`N(\mathrm{loc}, S (I + U U^\top) S)`. S is diag(scale).

    The parameters are loc, scale and the directions U, one column each, in units of the scale. Density and divergences
    need a Cholesky factor of a matrix as large as the rank alone (Woodbury's identity). With as many columns as entries
    it reaches every normal.

    Args:
        event: The size of an event, a vector.
        rank: The number of columns of U.

    Raises:
        ValueError: If the rank is below 1.

    References:
        Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott and Smith 2018), section 3.
    """

    normals = "some"

    def __init__(self, event: int | tuple[int, ...], *, rank: int = 2) -> None:
        super().__init__(event)
        self._vector()
        self.rank = check_int("rank", rank)

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        size = self.event_shape[0]
        loc, raw, flat = parameters.split([size, size, size * self.rank], -1)
        scale = positive(raw)
        return low_rank(loc, scale.unsqueeze(-1) * flat.unflatten(-1, (size, self.rank)), scale**2, mask)

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        """As `Family.nearest`, among the members whose entries are independent."""
        raw = unconstrained(precision.diagonal(dim1=-2, dim2=-1).rsqrt())
        return {"parameters": torch.cat([loc, raw, raw.repeat(1, self.rank).zero_()], -1)}

    def pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Start with small columns at random; at 0 they would have no gradient."""
        columns = 0.1 * torch.randn(self.event_shape[0] * self.rank).to(loc)
        return torch.cat([loc, unconstrained(scale), columns])
