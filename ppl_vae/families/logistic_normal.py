"""Normals mapped to the simplex."""

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, kl_divergence, register_kl

from ppl_vae.families.distributions import Pushed
from ppl_vae.families.family import Family, moments, positive, refuse_constant, unconstrained


class LogisticNormal(Family):
    r"""Shares that sum to 1, as the softmax of normals, :math:`x = \mathrm{softmax}(V y)`. Each y is normal.

    The parameters are loc and scale of y. The columns of V are an orthonormal basis of the vectors that sum to 0, so y
    has one entry less than x, and a standard normal y treats all entries of x alike. Mean and variance are averages
    over 512 fixed draws of y. The density is one of all entries but the last, as is usual on the simplex.

    Args:
        event: The number of shares, at least 2.

    Raises:
        ValueError: If there are fewer than 2.

    References:
        Logistic-normal distributions: some properties and uses (Aitchison and Shen 1980); Isometric logratio
        transformations for compositional data analysis (Egozcue et al. 2003).
    """

    support = constraints.simplex
    basis: Tensor

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event)
        size = self._vector(2)
        row, column = torch.arange(size).unsqueeze(1), torch.arange(1.0, size)
        steps = (row < column).to(column) - column * (row == column)
        self.register_buffer("basis", steps / (column * (column + 1)).sqrt(), persistent=False)

    def start(self) -> Tensor:
        free = torch.zeros(self.event_shape[0] - 1)
        return torch.cat([free, unconstrained(torch.ones_like(free))])

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._refuse(mask)
        loc, scale = moments(self._back(x)[0])
        refuse_constant(scale)
        return torch.cat([loc, unconstrained(scale)])

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        loc, raw = parameters.chunk(2, -1)
        base = dist.Normal(loc, positive(raw)).to_event(1)
        return OnSimplex(base, self._there, self._back, self.event_shape[0])

    def _there(self, y: Tensor) -> tuple[Tensor, Tensor]:
        logs = (y @ self.basis.mT).log_softmax(-1)
        return logs.exp(), logs.sum(-1) + 0.5 * math.log(len(self.basis))

    def _back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse; shares below 1e-30 count as that."""
        y = x.clamp_min(1e-30).log() @ self.basis.to(x)
        return y, -self._there(y)[1]


class OnSimplex(Pushed):
    """The distribution of a `LogisticNormal`: any two of one size share their map."""

    support = constraints.simplex


@register_kl(OnSimplex, OnSimplex)
def _kl_on_simplex(q: OnSimplex, p: OnSimplex) -> Tensor:
    return kl_divergence(q.base, p.base)
