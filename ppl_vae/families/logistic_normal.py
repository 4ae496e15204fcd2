"""Normals mapped to the simplex."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.utils import lazy_property

from ppl_vae.families.distributions import quasi_normal
from ppl_vae.families.family import Family, moments, positive, refuse_constant, unconstrained


class LogisticNormal(Family):
    r"""Shares that sum to 1, :math:`x = \mathrm{softmax}(V y)` with y independent normals of loc and scale.

    The columns of V are an orthonormal basis of the vectors that sum to 0, so y has one entry less than x, and a
    standard normal y treats all entries of x alike. Mean and variance are averages over 512 fixed draws of y. The
    density is one of all entries but the last, as is usual on the simplex.

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
        size = self._vector()
        if size < 2:
            raise ValueError(f"Expected LogisticNormal to have 2 shares or more; got {size}.")
        row, column = torch.arange(size).unsqueeze(1), torch.arange(1.0, size)
        steps = (row < column).to(column) - column * (row == column)
        self.register_buffer("basis", steps / (column * (column + 1)).sqrt(), persistent=False)

    def start(self) -> Tensor:
        free = torch.zeros(self.event_shape[0] - 1)
        return torch.cat([free, unconstrained(torch.ones_like(free))])

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._refuse(mask)
        loc, scale = moments(Shares(self.basis.to(x)).inv(x))
        refuse_constant(scale)
        return torch.cat([loc, unconstrained(scale)])

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        loc, raw = parameters.chunk(2, -1)
        return OnSimplex(dist.Normal(loc, positive(raw)).to_event(1), [Shares(self.basis, cache_size=1)])


class Shares(Transform):
    """From y to x of a `LogisticNormal`; shares below 1e-30 count as that."""

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def __init__(self, basis: Tensor, cache_size: int = 0) -> None:
        self.basis = basis
        super().__init__(cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shares) and self.basis.shape == other.basis.shape

    __hash__ = Transform.__hash__

    def with_cache(self, cache_size: int = 1) -> "Shares":
        return Shares(self.basis, cache_size)

    def _call(self, y: Tensor) -> Tensor:
        return (y @ self.basis.mT).softmax(-1)

    def _inverse(self, x: Tensor) -> Tensor:
        return x.clamp_min(1e-30).log() @ self.basis

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # torch's names: from x to y
        return (x @ self.basis.mT).log_softmax(-1).sum(-1) + 0.5 * math.log(len(self.basis))

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])


class OnSimplex(dist.TransformedDistribution):
    """A transformed normal with moments, by fixed draws."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OnSimplex":
        return super().expand(batch_shape, self._get_checked_instance(OnSimplex, _instance))

    @lazy_property
    def _values(self) -> Tensor:
        normal = self.base_dist
        noise = quasi_normal(normal.event_shape[0], normal.mean)
        noise = noise.reshape(len(noise), *(1,) * len(self.batch_shape), -1)
        return self.transforms[0]._call(normal.mean + normal.stddev * noise)

    @property
    def mean(self) -> Tensor:
        return self._values.mean(0)

    @property
    def variance(self) -> Tensor:
        return self._values.var(0, correction=0)
