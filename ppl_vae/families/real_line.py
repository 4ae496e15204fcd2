"""Families on the real line whose tails are heavier than a normal's."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae.families.elementwise import Elementwise, Source


class Laplace(Elementwise):
    r"""Independent Laplaces, :math:`\prod_j e^{-|x_j - \mathrm{loc}_j| / \mathrm{scale}_j} / (2\, \mathrm{scale}_j)`.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        scale: Where the scale comes from: `network` (one per feature, from the context), `shared` (one learned number),
            `feature` (one learned number per feature), or a positive number that stays fixed. The standard deviation
            is :math:`\sqrt 2` times the scale.
    """

    def __init__(self, event: int | tuple[int, ...], *, scale: Source = "network") -> None:
        super().__init__(event, dist.Laplace, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"loc": mean, "scale": scale / math.sqrt(2)}


class StudentT(Elementwise):
    r"""Independent Student's t, :math:`\prod_j t_{\mathrm{df}_j}((x_j - \mathrm{loc}_j) / \mathrm{scale}_j)`.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        df: Where the degrees of freedom come from, as `scale`; they begin at 5.
        scale: Where the scale comes from: `network` (one per feature, from the context), `shared` (one learned number),
            `feature` (one learned number per feature), or a positive number that stays fixed.
    """

    blunt = ("df",)

    def __init__(self, event: int | tuple[int, ...], *, df: Source = "shared", scale: Source = "network") -> None:
        self.spread = math.sqrt((df - 2) / df) if isinstance(df, int | float) and df > 2 else math.sqrt(0.6)
        super().__init__(event, dist.StudentT, df=df, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"df": torch.full_like(mean, 5.0), "loc": mean, "scale": scale * self.spread}


class _Logistic(dist.Logistic):
    """Pyro's logistic distribution, with moments."""

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return (self.scale * math.pi).square() / 3


class Logistic(Elementwise):
    r"""Independent logistics, :math:`P(x_j \le a) = 1 / (1 + e^{-(a - \mathrm{loc}_j) / \mathrm{scale}_j})`.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        scale: Where the scale comes from: `network` (one per feature, from the context), `shared` (one learned number),
            `feature` (one learned number per feature), or a positive number that stays fixed. The standard deviation
            is :math:`\pi / \sqrt 3` times the scale.
    """

    def __init__(self, event: int | tuple[int, ...], *, scale: Source = "network") -> None:
        super().__init__(event, _Logistic, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"loc": mean, "scale": scale * math.sqrt(3) / math.pi}
