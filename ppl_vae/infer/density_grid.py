r"""Densities over the plane of two latent variables, on a grid: the exact posterior, whatever its shape, and the guide.

A grid :math:`u = c + L t` stands around each datum, with c and the Cholesky factor L from a first guess of the moments.
It grows until it holds the mass, shrinks where there is none, and is refined until it resolves what is there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from ppl_vae.programs.joint import Joint

_SIDE, _MOST = 81, 321  # points along an axis, at first and at most
_WIDE = 5.0  # half the width of the first grid, in standard deviations
_ENTRIES = 2**22  # numbers that a block of points may hold
_COARSE = 0.12  # mass of one line of points above which they are too far apart; of a normal density, 0.3 sd
_EDGE, _EMPTY = 1e-6, 1e-9  # masses of a line at which the grid grows, and below which it is cut


@dataclass(frozen=True)
class DensityGrid:
    """A density over two latent variables for each datum, on a grid of its own, in double precision.

    Args:
        points: the latent variables, (n, rows, columns, 2).
        density: its value there, per unit of z0 times z1, (n, rows, columns).
        mass: the probability that each point stands for, (n, rows, columns).
        log_mass: log of the integral before it was normalised, in nats, (n,); of the joint density, log p(x).
    """

    points: Tensor
    density: Tensor
    mass: Tensor
    log_mass: Tensor

    def level(self, share: float) -> Tensor:
        """Value of the density above which the region of highest density holds that probability, (n,)."""
        density, order = self.density.flatten(1).sort(1, descending=True)
        within = self.mass.flatten(1).gather(1, order).cumsum(1)
        first = (within < share).sum(1, keepdim=True).clamp(1, within.shape[1] - 1)
        (low, high), (above, below) = ([one.gather(1, first - 1), one.gather(1, first)] for one in (within, density))
        part = ((share - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
        return (above + part * (below - above)).squeeze(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (n, 2) and covariance (n, 2, 2)."""
        loc = torch.einsum("nrc,nrcz->nz", self.mass, self.points)
        apart = self.points - loc[:, None, None]
        return loc, torch.einsum("nrc,nrcy,nrcz->nyz", self.mass, apart, apart)


def posterior_grid(joint: Joint, loc: Tensor, covariance: Tensor) -> DensityGrid:
    """Density of p(z|x) of a program with two latent variables, by quadrature on a grid.

    Args:
        joint: the log joint density of the program and its data.
        loc: a first guess of the posterior's mean, (n, 2).
        covariance: likewise, (n, 2, 2).

    Raises:
        ValueError: If there are not two latent variables, or the finest grid does not resolve the density.
    """
    return _density(joint, lambda u: torch.stack(joint.log_probs(u)).sum(0), loc, covariance)


def guide_grid(joint: Joint, loc: Tensor, covariance: Tensor) -> DensityGrid:
    """Density of q(z|x), likewise.

    Raises:
        ValueError: As for the posterior, and if the guide cannot score any z or has auxiliary sites.
    """
    if joint.auxiliary:
        raise ValueError(f"Expected a guide without auxiliary sites; got {joint.auxiliary[0]!r}.")
    return _density(joint, joint.log_guide, loc, covariance)


@torch.no_grad()
def _density(joint: Joint, score: Callable[[Tensor], Tensor], loc: Tensor, covariance: Tensor) -> DensityGrid:
    if joint.size != 2:
        raise ValueError(f"Expected two latent variables, for a plane; got {joint.size}.")
    if not joint.elementwise:
        raise ValueError("Expected latent variables on the line or on intervals, for a plane; got a vector on others.")
    grid = _Grid(joint, score, loc, covariance)
    with joint.target.running(0, "plane"), pyro.validation_enabled(False):
        for _ in range(30):
            log = grid.evaluate()
            mass = log.flatten(1).softmax(1).reshape(log.shape)
            if not bool(mass.isfinite().all()):
                break
            if not grid.refine(mass) and not grid.fit(mass):
                if max(float(line.max()) for line in _lines(mass)) > 2 * _COARSE:
                    break
                return grid.density(log, mass)
    raise ValueError(
        f"Expected a density of two latent variables that {_MOST} by {_MOST} points resolve; got one that is too rough."
    )


def _lines(mass: Tensor) -> tuple[Tensor, Tensor]:
    """The mass of each line of points, across each of the two axes, (n, side)."""
    return mass.sum(2), mass.sum(1)


class _Grid:
    """The box of t, and how it moves.

    Args:
        joint: the log joint density of the program and its data.
        score: the log density to evaluate, (k, n), at vectors u (k, n, 2).
        loc: a first guess of the mean, (n, 2).
        covariance: likewise, (n, 2, 2).
    """

    def __init__(self, joint: Joint, score: Callable[[Tensor], Tensor], loc: Tensor, covariance: Tensor) -> None:
        self.joint, self.score = joint, score
        self.centre = joint.place(loc.detach().double().unsqueeze(0))[0].double()
        slope = self.slope(self.centre.unsqueeze(0))[0]
        inside = covariance.detach().double() / slope.unsqueeze(-1) / slope.unsqueeze(-2)
        factor, failed = torch.linalg.cholesky_ex(inside)
        alone = inside.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt().diag_embed()
        self.factor = torch.where(failed[:, None, None] == 0, factor, alone)
        self.low, self.high = torch.full_like(self.centre, -_WIDE), torch.full_like(self.centre, _WIDE)
        self.sides = [_SIDE, _SIDE]

    def slope(self, u: Tensor) -> Tensor:
        """Derivative of each latent variable by its entry of u, at vectors u (k, n, 2)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            return torch.autograd.grad(self.joint.latents(u).sum(), u)[0]

    @property
    def step(self) -> Tensor:
        """Distance of the points in t, (n, 2)."""
        return (self.high - self.low) / (torch.tensor(self.sides) - 1).to(self.low)

    def points(self) -> Tensor:
        """The vectors u, (rows * columns, n, 2)."""
        number = torch.cartesian_prod(*(torch.arange(side).to(self.low) for side in self.sides)).unsqueeze(1)
        return self.centre + torch.einsum("nyz,pnz->pny", self.factor, self.low + number * self.step)

    def evaluate(self) -> Tensor:
        """The log density of u at all points, (n, rows, columns)."""
        size = max(1, _ENTRIES // ((self.joint.target.features + 2) * self.joint.n))
        log = torch.cat([self.score(block.to(self.joint.dtype)) for block in self.points().split(size)])
        return log.double().nan_to_num(-torch.inf, neginf=-torch.inf).T.unflatten(1, self.sides)

    def refine(self, mass: Tensor) -> bool:
        """Halve the step along an axis if one line of points has too much mass; return whether any was halved."""
        before = list(self.sides)
        for axis, line in enumerate(_lines(mass)):
            if bool((line > _COARSE).any()):
                self.sides[axis] = min(2 * self.sides[axis] - 1, _MOST)
        return self.sides != before

    def fit(self, mass: Tensor) -> bool:
        """Grow the box where mass reaches its edge, and cut it where there is none; return whether it changed."""
        low, high, step = self.low.clone(), self.high.clone(), self.step
        for axis, line in enumerate(_lines(mass)):
            side, grow = self.sides[axis], (self.low - self.high)[:, axis] / 2
            place = torch.arange(side, device=line.device)
            before = (torch.where(line > _EMPTY, place, side).amin(1) - 1).clamp_min(0)
            behind = (side - 2 - torch.where(line > _EMPTY, place, -1).amax(1)).clamp_min(0)
            low[:, axis] += torch.where(line[:, 0] > _EDGE, grow, before * step[:, axis])
            high[:, axis] -= torch.where(line[:, -1] > _EDGE, grow, behind * step[:, axis])
        changed = bool((((high - low) / (self.high - self.low)).log().abs() > 0.25).any())
        if changed:
            self.low, self.high, self.sides = low, high, [_SIDE, _SIDE]
        return changed

    def density(self, log: Tensor, mass: Tensor) -> DensityGrid:
        """Turn log densities of u into the density of the latent variables themselves."""
        u = self.points()
        volume = (self.factor.diagonal(dim1=-2, dim2=-1) * self.step).prod(-1)  # of u at a point, (n,)
        slopes = self.slope(u).prod(-1).T.reshape(mass.shape)
        points = self.joint.latents(u).transpose(0, 1).unflatten(1, self.sides)
        density = mass / (volume[:, None, None] * slopes)
        return DensityGrid(points, density, mass, log.flatten(1).logsumexp(1) + volume.log())
