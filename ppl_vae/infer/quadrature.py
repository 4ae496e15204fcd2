"""Quadrature over up to three latent variables of each datum, on a lattice that finds its place and width."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import identity_transform
from torch.nn import functional

from ppl_vae.infer.modes import laplace
from ppl_vae.programs.joint import Joint

_FAR = 30.0  # largest |t| of a lattice
_FIRST = (4000, 17, 13)  # points per side of the first lattice, by the number of latent variables
_CACHED = 2**18  # numbers that the data of one evaluation may hold on a CPU, where more are slower
_APART = 5.0  # steps of the first lattice at the most, in widths of the narrowest mode known
_RESOLVED = 1e-2  # rounding of a latent variable, in units of u, beyond which its density is not known


def integrate(joint: Joint, points: int, tolerance: float, entries: int) -> tuple[Tensor, ...]:
    """Integrate the joint density of each datum; the arguments are those of `reference_posterior`'s quadrature.

    The first lattice holds all modes that a search finds, and the draws of prior and guide that matter, with steps that
    see any mode as wide as the narrowest found. With one latent variable it spans three times the range of these draws.
    Then each datum is refined until its own sum stands. Its error adds up three things: what the last refinement
    changed; half of what leaving out every other slab would change, as two sums may agree by chance; and estimates of
    what lies beyond the lattice or the floating-point numbers, was left out, or fits between its points.

    It can miss a mode that is much narrower than all others found, or that no draw of prior or guide leads to.

    Returns:
        Log p(x) (n,), its error (n,), mean (n, z), covariance (n, z, z), the error of these two in standard deviations
        (n,), and which data have settled (n,).
    """
    most = int(points ** (1 / joint.size) + 1e-9)
    waiting: list[tuple[Tensor, Lattice, LatticeSum | None]]
    waiting = [(torch.arange(joint.n, device=joint.device), _around(joint, tolerance, entries), None)]
    answers = []
    while waiting:
        rows, lattice, before = waiting.pop()
        sides = lattice.sides(2 * most // 3) if before is None else torch.full_like(rows, 3 * before.side // 2)
        side = int(sides.max())
        if len(rows) > 1 and (len(rows) * side**joint.size > entries or side > 2 * int(sides.min())):
            half = torch.zeros_like(rows, dtype=torch.bool).index_fill(0, sides.argsort()[: len(rows) // 2], True)
            parts = [(part, lattice.rows(part)) for part in (half, ~half)]
            waiting += [(rows[part], some, None if before is None else before.rows(part)) for part, some in parts]
            continue
        if before is None:
            waiting.append((rows, *lattice.fitted(lattice.sum(side))))
            continue
        after = lattice.sum(side, before)
        rounding = 4 * torch.finfo(joint.dtype).eps * after.log_mass.abs().clamp_min(1.0)
        unseen = (after.outside + after.dropped + lattice.cut + lattice.between(after.step)).clamp_max(1.0)
        error = (after.log_mass - before.log_mass).abs() + after.halved / 2 - torch.log1p(-unseen) + rounding
        in_one_point = after.shares.amax(-1) > 0.5  # two sums may agree by missing the rest alike
        error = torch.where(in_one_point | error.isnan() | (after.log_mass > 1e300), math.inf, error)
        moments, endless = after.change(before) + error, after.beyond > 0.1
        known = error < tolerance + rounding
        settled = known & (moments < max(1e-3, 10 * tolerance))
        done = settled | (known & endless) | (after.lost > tolerance) | (3 * side // 2 > most)
        if bool(done.any()):
            columns = after.log_mass, error, after.loc, after.covariance, moments, settled
            answers.append((rows[done], *(column[done] for column in columns)))
        if not bool(done.all()):
            waiting.append((rows[~done], *lattice.rows(~done).fitted(after.rows(~done))))
    order, *joined = (torch.cat(column) for column in zip(*answers, strict=True))
    return tuple(column[order.argsort()] for column in joined)


class _Rows:
    def rows(self, chosen: Tensor) -> Self:
        """The data for which `chosen`, (n,), is true."""
        if bool(chosen.all()):
            return self
        tensors = {name: part[chosen] for name, part in vars(self).items() if isinstance(part, Tensor)}
        joint = {name: part.rows(chosen) for name, part in vars(self).items() if isinstance(part, Joint)}
        return replace(self, **tensors, **joint)  # type: ignore[type-var]


@dataclass(frozen=True)
class LatticeSum(_Rows):
    """The joint density of each datum summed over a lattice.

    Args:
        step: of the lattice, (n, z).
        log_mass: logarithm of the sum, (n,).
        shares: of each point in the sum, (n, p).
        slabs: share of each slab of points, (n, z, side).
        spread: share of each slab in the variance, on average over the latent variables, (n, z, side).
        dropped: estimated share of the points that were left out, (n,).
        edge: share of the points next to those that floating-point numbers do not resolve, (n,).
        loc: mean of the latent variables themselves, (n, z).
        covariance: (n, z, z).
    """

    step: Tensor
    log_mass: Tensor
    shares: Tensor
    slabs: Tensor
    spread: Tensor
    dropped: Tensor
    edge: Tensor
    loc: Tensor
    covariance: Tensor

    @property
    def side(self) -> int:
        """Points along each axis."""
        return self.slabs.shape[-1]

    @property
    def margin(self) -> int:
        """Slabs at either end of an axis that tell what lies beyond it; one may lie between two modes."""
        return max(1, self.side // 20)

    @property
    def outside(self) -> Tensor:
        """Upper estimate of the share beyond the faces, (n,), for tails as light as Cauchy's or lighter."""
        return self._ends(self.slabs) + self.lost

    @property
    def lost(self) -> Tensor:
        """Estimated share where floating-point numbers cannot resolve the latent variables, (n,)."""
        return self.edge * (1 + 1 / self.step.amin(-1))

    @property
    def beyond(self) -> Tensor:
        """Estimated share in the variance of what lies beyond the faces, (n,)."""
        return self._ends(self.spread)

    def _ends(self, slabs: Tensor) -> Tensor:
        ends = slabs[..., : self.margin].sum(-1) + slabs[..., -self.margin :].sum(-1)
        return (ends * (1 + 1 / (self.margin * self.step))).sum(-1)

    @property
    def halved(self) -> Tensor:
        """What leaving out every other slab would change, in nats, added up over the axes, (n,)."""
        return (2 * self.slabs[..., ::2].sum(-1)).log().abs().sum(-1)

    def change(self, other: "LatticeSum") -> Tensor:
        """Largest change of mean or covariance from another sum, in standard deviations, and what lies beyond, (n,)."""
        scale = self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = scale.maximum(1e-14 * self.loc.abs()).clamp_min(1e-150)  # of constants, rounding is no change
        loc = ((self.loc - other.loc) / scale).abs().amax(-1)
        square = (self.covariance - other.covariance) / scale.unsqueeze(-1) / scale.unsqueeze(-2)
        return (loc + square.abs().amax((-2, -1)) + self.beyond).nan_to_num(math.inf)

    def put(self, chosen: Tensor, other: "LatticeSum") -> "LatticeSum":
        """Replace the data for which `chosen`, (n,), is true."""
        parts = vars(self).items()
        return LatticeSum(**{name: part.index_put((chosen,), getattr(other, name)) for name, part in parts})


@dataclass(frozen=True)
class Lattice(_Rows):
    r"""A box of points t, :math:`u = c + L \sinh t`, of each datum, with c and L the moments of the Laplace mixture.

    Near the centre this is the trapezoidal rule, which on smooth densities converges faster than any power; further
    out steps grow, so that tails of powers become exponential ones.

    Args:
        joint: of the data.
        tolerance: of the error, in nats.
        block: points times data that are looked at together.
        centre: c, (n, z).
        factor: L, (n, z, z).
        low: where the box begins, (n, z) in t.
        high: where it ends.
        cut: estimated share that shrinking the box cut off, (n,).
        share: of each of the mixture's components, (n, s).
        counts: which components matter at this tolerance, (n, s, 1).
        place: their means in t, (n, s, z).
        width: their covariances in t, (n, s, z, z).
    """

    joint: Joint
    tolerance: float
    block: int
    centre: Tensor
    factor: Tensor
    low: Tensor
    high: Tensor
    cut: Tensor
    share: Tensor
    counts: Tensor
    place: Tensor
    width: Tensor

    def sides(self, most: int) -> Tensor:
        """Points per side of a first lattice that misses no mode as wide as the narrowest that counts, (n,)."""
        narrow = torch.linalg.inv(self.width).diagonal(dim1=-2, dim2=-1).rsqrt()
        narrow = torch.where(self.counts, narrow, math.inf).amin(1)
        needed = ((self.high - self.low) / (_APART * narrow)).amax(-1).nan_to_num(0.0)
        needed = needed.clamp(_FIRST[self.joint.size - 1], 2 * most).long()
        return needed.clamp(max=most) // 2 * 2 if self.joint.size == 1 else needed.clamp(max=most)

    def reach(self, spreads: float, most: Tensor | float = math.inf) -> tuple[Tensor, Tensor]:
        """The box, (n, z) each, that holds so many standard deviations of each component that counts."""
        spread = (spreads * self.width.diagonal(dim1=-2, dim2=-1).sqrt()).clamp(max=most)
        low = torch.where(self.counts, self.place - spread, math.inf).amin(1)
        return low, torch.where(self.counts, self.place + spread, -math.inf).amax(1)

    def points(self, side: int, number: Tensor) -> tuple[Tensor, Tensor]:
        """Points (p, n) or (p, 1) as vectors u, (p, n, z), and the log volume that each stands for, (p, n)."""
        step = (self.high - self.low) / (side - 1)
        t = self.low + step * torch.stack(_axes(number, side, self.joint.size), -1).to(step)  # (p, n, z)
        volume = (step * self.factor.diagonal(dim1=-2, dim2=-1)).log() + t.cosh().log()
        return self.centre + torch.einsum("nyz,pnz->pny", self.factor, t.sinh()), volume.sum(-1)

    @torch.no_grad()
    def sum(self, side: int, before: LatticeSum | None = None) -> LatticeSum:
        """Sum the joint density over the lattice, only where a coarser sum over the same box had mass."""
        n, size = self.joint.n, self.joint.size
        number, dropped = torch.arange(side**size, device=self.low.device).unsqueeze(-1), torch.zeros_like(self.cut)
        if before is not None:
            number, dropped = self.around(side, before)
        parts = [self.look(side, some) for some in number.split(max(1, self.block // n))]
        log, z, lost = (torch.cat(part) for part in zip(*parts, strict=True))
        share = log.softmax(0)
        origin = self.joint.latents(self.centre.unsqueeze(0))
        apart = torch.where(share.unsqueeze(-1) > 0, z - origin, 0.0)
        loc = torch.einsum("pn,pnz->nz", share, apart)
        apart = torch.where(share.unsqueeze(-1) > 0, apart - loc, 0.0)
        covariance = torch.einsum("pn,pny,pnz->nyz", share, apart, apart)
        variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300)
        spread = share * (apart.square() / variance).mean(-1)
        shares, spread, lost = (
            value.new_zeros(n, side**size).scatter(1, number.expand_as(log).T, value.T)
            for value in (share, spread, lost.to(share))
        )
        edge = (shares * _grown(lost > 0, side, size)).sum(-1) if bool(lost.any()) else torch.zeros_like(self.cut)
        slabs, spread = _slabs(shares, side, size), _slabs(spread, side, size)
        step = (self.high - self.low) / (side - 1)
        return LatticeSum(step, log.logsumexp(0), shares, slabs, spread, dropped, edge, origin[0] + loc, covariance)

    def look(self, side: int, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log mass of points by their numbers (p, n), latent variables there, and which cannot be resolved (p, n)."""
        u, volume = self.points(side, number)
        z = self.joint.latents(u)
        lost = torch.zeros_like(volume, dtype=torch.bool)
        if any(transform != identity_transform for transform in self.joint.transforms.values()):
            lost = ~((self.joint.place(z.to(u)) - u).abs() < _RESOLVED).all(-1)
        log = sum(self.joint.log_probs(u)) + volume
        log = torch.where(lost, -math.inf, log.nan_to_num(-math.inf, neginf=-math.inf))
        return log, z, lost

    def around(self, side: int, before: LatticeSum) -> tuple[Tensor, Tensor]:
        """Numbers of the points that lie next to those of a coarser sum that matter, or to a mode, (k, n).

        Also the share of the others in that sum and those before, (n,).
        """
        size, old = self.joint.size, before.side
        matters = before.shares > 1e-2 * self.tolerance / before.shares.shape[1]
        nearest = ((self.place - self.low.unsqueeze(1)) / before.step.unsqueeze(1)).round().clamp(0, old - 1).long()
        modes = sum(nearest[..., axis] * old**axis for axis in range(size))
        matters = matters | (torch.zeros_like(before.shares).scatter_add(1, modes, self.counts[..., 0].double()) > 0)
        grown = _grown(matters, old, size)
        number = torch.arange(side**size, device=self.low.device)
        below = [torch.round(axis * ((old - 1) / (side - 1))).long() for axis in _axes(number, side, size)]
        kept = grown[:, sum(axis * old**place for place, axis in enumerate(below))]
        return _any(kept), before.dropped + (before.shares * ~grown).sum(-1)

    def between(self, step: Tensor) -> Tensor:
        r"""Relative error of the trapezoidal rule on the Laplace mixture, (n,).

        On a Gaussian of covariance :math:`\Sigma` it is at most :math:`\sum_{k \neq 0} e^{-2 \pi^2 k^\top \Sigma k}`
        over the integer vectors k, with steps of one. So a mode that fits between two points is not overlooked. One
        that does not count may be missed altogether.
        """
        k = torch.tensor([k for k in itertools.product(range(-3, 4), repeat=self.joint.size) if any(k)]).to(step)
        scaled = self.width / (step.unsqueeze(-1) * step.unsqueeze(-2)).unsqueeze(1)
        exponent = torch.einsum("ky,nsyz,kz->nsk", k, scaled, k)
        error = (-2 * math.pi**2 * exponent).exp().sum(-1)
        return (self.share * torch.where(self.counts[..., 0], error, 1.0)).sum(-1)

    def fitted(self, total: LatticeSum) -> tuple["Lattice", LatticeSum]:
        """Fit the box of each datum to its sum, and sum again where that changed much, until it stands."""
        lattice = self
        for number in range(60):
            lattice, changed = lattice.fit(total, shrink=number < 3)
            if not bool(changed.any()):
                break
            total = total.put(changed, lattice.rows(changed).sum(total.side))
        return lattice, total

    def fit(self, total: LatticeSum, *, shrink: bool) -> tuple["Lattice", Tensor]:
        """Enlarge the box where mass leaves it, shrink it where there is none; also which data that changed much."""
        width, side, margin = self.high - self.low, total.side, total.margin
        heavy = (total.slabs > 1e-2 * self.tolerance / side) | (total.spread > max(0.1 * self.tolerance, 1e-8) / side)
        places = torch.arange(side, device=width.device)
        first = torch.where(heavy, places, side).amin(-1)
        last = torch.where(heavy, places, -1).amax(-1)
        low, high, cut = self.low, self.high, torch.zeros_like(self.cut)
        if shrink:
            beyond = (places < first.unsqueeze(-1) - margin) | (places > last.unsqueeze(-1) + margin)
            cut = (total.slabs * beyond).sum((-2, -1))
            inner = self.reach(3.0, total.step.unsqueeze(1))  # where the points may have missed a mode
            low = torch.minimum(low + (first - margin).clamp_min(0) * total.step, inner[0]).maximum(low)
            high = torch.maximum(high - (side - 1 - margin - last).clamp_min(0) * total.step, inner[1]).minimum(high)
        low = torch.where(first < margin, self.low - width / 2, low).clamp_min(-_FAR)
        high = torch.where(last >= side - margin, self.high + width / 2, high).clamp_max(_FAR)
        moved = (low - self.low).abs() + (high - self.high).abs()
        changed = (moved > 0.2 * width).any(-1) & heavy.any(-1).all(-1)
        low, high = (torch.where(changed.unsqueeze(-1), *pair) for pair in ((low, self.low), (high, self.high)))
        return replace(self, low=low, high=high, cut=self.cut + cut * changed), changed


def _axes(number: Tensor, side: int, size: int) -> list[Tensor]:
    """Places along each axis of points by their numbers."""
    return [number // side**axis % side for axis in range(size)]


def _grown(chosen: Tensor, side: int, size: int) -> Tensor:
    """The points that are chosen, (n, p), and all their neighbours."""
    pool: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[size - 1]
    return pool(chosen.double().reshape(-1, 1, *[side] * size), 3, 1, 1).flatten(1) > 0  # type: ignore[no-any-return]


def _slabs(shares: Tensor, side: int, size: int) -> Tensor:
    """Sums of shares (n, p) over the slabs along each axis, (n, z, side)."""
    cube = shares.reshape(-1, 1, *[side] * size)  # the axis of length 1 is summed, so that there always is one
    axes = range(1, size + 2)
    return torch.stack([cube.sum([other for other in axes if other != axis]) for axis in range(size + 1, 1, -1)], 1)


def _any(kept: Tensor) -> Tensor:
    """Places of all that is true in (n, p), filled up with others where a datum has fewer, (k, n)."""
    return kept.byte().topk(max(1, int(kept.sum(1).amax())), 1, sorted=False).indices.T


def _around(joint: Joint, tolerance: float, entries: int) -> Lattice:
    """Lay a lattice around the modes of each datum."""
    modes, mass, covariances, draws, heights = laplace(joint)
    share = mass.softmax(0).unsqueeze(-1)  # (s, n, 1)
    centre = (share * modes).sum(0)
    apart = modes - centre
    pooled = (share.unsqueeze(-1) * (covariances + apart.unsqueeze(-1) * apart.unsqueeze(-2))).sum(0)
    factor = torch.linalg.cholesky(pooled)
    inside = torch.linalg.solve_triangular(factor, apart.unsqueeze(-1), upper=False).squeeze(-1)
    whitened = torch.linalg.solve_triangular(factor, covariances, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.mT, upper=False)
    bent = (1 + inside.square()) ** -0.5  # slope of asinh
    width = bent.unsqueeze(-1) * whitened * bent.unsqueeze(-2)
    numbers = min(entries, _CACHED) if joint.device.type == "cpu" else entries
    block = max(1, numbers // ((joint.target.features + joint.size) * joint.n)) * joint.n
    counts = (share > 1e-3 * tolerance).transpose(0, 1)
    parts = share[..., 0].T, counts, inside.asinh().transpose(0, 1), width.transpose(0, 1)
    lattice = Lattice(joint, tolerance, block, centre, factor, centre, centre, torch.zeros_like(centre[:, 0]), *parts)
    enough = math.log(1e4 / min(tolerance, 1.0))
    low, high = lattice.reach(math.sqrt(2 * enough))
    if joint.size == 1:
        first, last = draws.amin(0), draws.amax(0)
        ends = torch.stack([2 * first - last, 2 * last - first])
    else:
        matters = heights > heights.amax(0) - enough
        ends = torch.where(matters.unsqueeze(-1), draws, centre)
    ends = (
        torch.linalg.solve_triangular(factor, (ends.double() - centre).unsqueeze(-1), upper=False).squeeze(-1).asinh()
    )
    low, high = torch.minimum(low, ends.amin(0)), torch.maximum(high, ends.amax(0))
    return replace(lattice, low=low.clamp_min(-_FAR), high=high.clamp_max(_FAR))
