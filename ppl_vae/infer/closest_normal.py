r"""Closest normal: the normal member of a family that has the highest bound, by Newton's method.

Averaged over the draws of a normal q, the gradient and curvature of log p(x, z) make a quadratic; the member closest to
it is the next q. At a fixed point :math:`E_q[\nabla \log p] = 0`, and the precision of q is
:math:`-E_q[\nabla^2 \log p]` as far as the family can follow: the conditions for a maximum of the bound (The
Variational Gaussian Approximation Revisited, Opper and Archambeau 2009, equations 8 and 9). If log p is quadratic, one
step leads there from anywhere.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_DRAWS = 64  # of each q, at least
_FINE = 4  # times as many draws for the last step and for what is left to gain
_STEPS = 40  # at most
_SETTLED = 0.01  # nats that a step is expected to gain, below which it is the last but one
_LEAST = 1e-10  # smallest eigenvalue of a curvature, relative to the largest

Density = Callable[[Tensor], tuple[Tensor, Tensor]]


class Members(Protocol):
    """A family with one member per datum."""

    def at(self, parameters: Tensor) -> Any:
        """The distributions with these parameters, batch shape (n,)."""

    def nearest(self, loc: Tensor, precision: Tensor) -> Tensor:
        """Parameters of the normal members closest to these normals."""


class Average:
    """The joint density averaged over one normal q per datum, in units of q: z = mean + L u, u ~ N(0, I).

    Args:
        density: log p(x, z), (k, n), and its gradient, (k, n, z), at z, (k, n, z).
        q: distributions that have a mean and a `scale_tril` or `stddev`.
        noise: values of u, (k, z).
    """

    def __init__(self, density: Density, q: Any, noise: Tensor) -> None:
        self.mean, self.root = q.mean.flatten(1).double(), _root(q)
        value, gradient = density(self.mean + torch.einsum("nij,kj->kni", self.root, noise))
        gradient = torch.einsum("knj,nji->kni", gradient, self.root)
        self.bound = value.mean(0) + _log_det(self.root)  # less a constant
        slope = gradient.mean(0)
        curvature = -torch.einsum("ki,knj->nij", noise, gradient) / len(noise)
        self.curvature = _definite((curvature + curvature.mT) / 2)
        lost = ~(self.bound.isfinite() & slope.isfinite().all(1))
        self.bound = torch.where(lost, -math.inf, self.bound)
        self.slope = torch.where(lost.unsqueeze(1), 0.0, slope)

    def toward(self, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and precision of the normals a part of the way, `rate` from 0 to 1, (n,), to the quadratic."""
        rate = rate.reshape(-1, 1, 1)
        eye = torch.eye(self.mean.shape[1], dtype=rate.dtype, device=rate.device)
        precision = (1 - rate) * eye + rate * self.curvature
        step = torch.linalg.solve(precision, rate * self.slope.unsqueeze(-1))
        inverse = torch.linalg.solve_triangular(self.root, eye, upper=False)
        precision = inverse.mT @ precision @ inverse
        return self.mean + (self.root @ step).squeeze(-1), (precision + precision.mT) / 2

    def gain(self, q: Any) -> Tensor:
        """Nats that the quadratic's bound of these normals is above its bound of the own ones, (n,)."""
        move = torch.linalg.solve_triangular(
            self.root, (q.mean.flatten(1).double() - self.mean).unsqueeze(-1), upper=False
        )
        root = torch.linalg.solve_triangular(self.root, _root(q), upper=False)
        eye = torch.eye(len(root[0]), dtype=root.dtype, device=root.device)
        bent = (self.curvature * (root @ root.mT + move @ move.mT - eye)).sum((1, 2))
        return (self.slope * move.squeeze(-1)).sum(1) - 0.5 * bent + _log_det(root)

    def widths(self) -> Tensor:
        """Standard deviation of each latent variable given the others, (n, z), by the curvature."""
        inverse = torch.linalg.solve_triangular(self.root, torch.eye(len(self.root[0])).to(self.root), upper=False)
        return (inverse.mT @ self.curvature @ inverse).diagonal(dim1=1, dim2=2).rsqrt()

    def where(self, which: Tensor, other: "Average") -> "Average":
        """This average for the data where `which`, (n,) boolean, is true, else the other."""
        return self._each(lambda name, value: torch.where(_like(which, value), value, vars(other)[name]))

    def take(self, which: Tensor) -> "Average":
        """The average for some of the data."""
        return self._each(lambda _, value: value[which])

    def _each(self, function: Callable[[str, Tensor], Tensor]) -> "Average":
        new = copy.copy(self)
        vars(new).update({name: function(name, value) for name, value in vars(self).items()})
        return new


def closest_normal(density: Callable[[Tensor], Density], members: Members, start: Tensor, steps: int) -> Tensor:
    """Parameters of the normal members of highest bound, to about 0.01 nats.

    A step that lowers the bound, by draws that stay the same, is taken back and shortened.

    Args:
        density: from indices of data to their log p(x, z), (k, n), and its gradient, (k, n, z), at z, (k, n, z).
        members: the family.
        start: parameters to begin with; their means and variances count.
        steps: largest number of steps.
    """
    rows, q = torch.arange(len(start), device=start.device), members.at(start)
    place = members.nearest(q.mean.flatten(1).double(), torch.diag_embed(q.variance.flatten(1).double().reciprocal()))
    best, joint, noise = place.clone(), density(rows), design(q.event_shape.numel(), _DRAWS, start.device)
    here, rate = Average(joint, members.at(place), noise), torch.ones_like(place[:, 0])
    slack = 10 * torch.finfo(start.dtype).eps
    for _ in range(min(steps, _STEPS)):
        trial = members.nearest(*here.toward(rate))
        gain = here.gain(members.at(trial))
        there = Average(joint, members.at(trial), noise)
        up = there.bound >= here.bound - slack * here.bound.abs()
        here, place = there.where(up, here), torch.where(up.unsqueeze(1), trial, place)
        best[rows] = place
        busy = ~(up & (gain < _SETTLED * rate) | (rate < _SETTLED))
        rate = torch.where(up, (2 * rate).clamp_max(1.0), rate / 4)
        if 2 * int(busy.sum()) <= len(busy):
            if not bool(busy.any()):
                break
            rows, place, rate, here = rows[busy], place[busy], rate[busy], here.take(busy)
            joint = density(rows)
    return best.to(start)


def polish(density: Density, members: Members, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A last step by more and new draws, and by draws newer still the nats left to gain and the posterior's widths.

    Returns:
        Parameters like `place`, nats (n,), and widths (n, z): standard deviations of each latent given the others.
    """
    whole = torch.ones(len(place), dtype=torch.float64, device=place.device)

    def look(place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = members.at(place.double())
        fine = Average(density, q, design(q.event_shape.numel(), _FINE * _DRAWS, place.device))
        best = members.nearest(*fine.toward(whole))
        return best, fine.gain(members.at(best)), fine.widths()

    best, gain, _ = look(place)
    place = torch.where((gain < 10 * _SETTLED).unsqueeze(1), best.to(place), place)
    _, left, widths = look(place)
    return place, left.clamp_min(0.0), widths


def design(size: int, least: int, device: torch.device) -> Tensor:
    """Draws of a standard normal of this size, at least `least`, (k, size), whose averages of cubics are exact.

    They lie along orthogonal directions, to both sides, at lengths that are quantiles of the normal's.
    """
    count = math.ceil(least / (2 * size))
    raw = torch.randn(count, size, size, dtype=torch.float64, device=device)
    square = torch.randn(count, 64, size, dtype=torch.float64, device=device).square().sum(-1).flatten().sort().values
    lengths = square.reshape(count, 64).mean(1)
    lengths = (lengths * size / lengths.mean()).sqrt()
    rays = (torch.linalg.qr(raw).Q * lengths.reshape(-1, 1, 1)).mT.flatten(0, 1)
    return torch.cat([rays, -rays])


def _root(q: Any) -> Tensor:
    """Lower triangular L, (n, z, z), with covariance L L' in double precision."""
    return (q.scale_tril if hasattr(q, "scale_tril") else torch.diag_embed(q.stddev.flatten(1))).double()


def _log_det(root: Tensor) -> Tensor:
    return root.diagonal(dim1=1, dim2=2).log().sum(1)


def _definite(matrix: Tensor) -> Tensor:
    """The matrices, (n, z, z), with eigenvalues made positive, in units in which their diagonals are 1.

    Eigenvalues keep their sizes, but none is much below the largest.
    """
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(matrix.isfinite().all(-1).all(-1).reshape(-1, 1, 1), matrix, eye)
    diagonal = matrix.diagonal(dim1=1, dim2=2).abs()
    unit = diagonal.maximum(1e-20 * diagonal.amax(1, keepdim=True)).clamp_min(1e-300).sqrt()
    both = unit.unsqueeze(1) * unit.unsqueeze(2)
    matrix = matrix / both
    bad = torch.linalg.cholesky_ex(matrix - _LEAST * eye).info > 0
    if bool(bad.any()):
        values, vectors = torch.linalg.eigh(matrix[bad])
        size = values.abs().maximum(_LEAST * values.abs().amax(1, keepdim=True))
        matrix = matrix.index_put((bad,), (vectors * size.unsqueeze(1)) @ vectors.mT)
    return matrix * both


def _like(which: Tensor, value: Tensor) -> Tensor:
    return which.reshape(-1, *(1,) * (value.dim() - 1))
