"""Quadrature over up to three latent variables of each datum, on a lattice that finds its place and width."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vae.infer.modes import laplace
from ppl_vae.programs.joint import Joint

_FAR = 30.0  # largest |t| of a lattice
_FIRST = (33, 17, 13)  # points per side of the first lattice, by the number of latent variables
_CACHED = 2**18  # numbers that the data of one evaluation may hold on a CPU, where more are slower


def integrate(joint: Joint, points: int, tolerance: float, entries: int) -> tuple[Tensor, ...]:
    """Integrate the joint density of each datum; the arguments are those of `reference_posterior`'s quadrature.

    Each datum is refined until its own sum stands. Its error adds up three things: what the last refinement changed;
    half of what leaving out every other slab would change, as two sums may agree by chance; and estimates of what lies
    beyond the lattice, was left out, or fits between its points.

    It can miss a mode that is narrower than the first lattice's steps, lies off all others, and that no draw of prior
    or guide leads to.

    Returns:
        Log p(x) (n,), its error (n,), mean (n, z), covariance (n, z, z), and which data have settled (n,).
    """
    most = int(points ** (1 / joint.size) + 1e-9)
    lattice = _around(joint, tolerance, entries)
    side = min(_FIRST[joint.size - 1], 2 * most // 3)
    waiting = [(torch.arange(joint.n, device=joint.device), *lattice.fitted(lattice.sum(side)))]
    answers = []
    while waiting:
        rows, lattice, before = waiting.pop()
        side = 3 * before.side // 2
        if len(rows) > 1 and len(rows) * side**joint.size > entries:
            half = torch.arange(len(rows), device=rows.device) < len(rows) // 2
            waiting += [(rows[part], lattice.rows(part), before.rows(part)) for part in (half, ~half)]
            continue
        after = lattice.sum(side, before)
        rounding = 4 * torch.finfo(joint.dtype).eps * after.log_mass.abs().clamp_min(1.0)
        unseen = (after.outside + after.dropped + lattice.cut + lattice.between(after.step)).clamp_max(1.0)
        error = (after.log_mass - before.log_mass).abs() + after.halved / 2 - torch.log1p(-unseen) + rounding
        in_one_point = after.shares.amax(-1) > 0.5  # two sums may agree by missing the rest alike
        error = torch.where(in_one_point | error.isnan() | (after.log_mass > 1e300), math.inf, error)
        settled = error < tolerance + rounding
        done = settled | (3 * side // 2 > most)
        if bool(done.any()):
            moments = lattice.rows(done).moments(after.rows(done))
            answers.append((rows[done], after.log_mass[done], error[done], *moments, settled[done]))
        if not bool(done.all()):
            waiting.append((rows[~done], *lattice.rows(~done).fitted(after.rows(~done))))
    order, *columns = (torch.cat(column) for column in zip(*answers, strict=True))
    return tuple(column[order.argsort()] for column in columns)


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
        dropped: estimated share of the points that were left out, (n,).
    """

    step: Tensor
    log_mass: Tensor
    shares: Tensor
    slabs: Tensor
    dropped: Tensor

    @property
    def side(self) -> int:
        """Points along each axis."""
        return self.slabs.shape[-1]

    @property
    def outside(self) -> Tensor:
        """Upper estimate of the share beyond the faces, (n,), for tails as light as Cauchy's or lighter."""
        return (self.slabs[..., [0, -1]].sum(-1) * (1 + 1 / self.step)).sum(-1)

    @property
    def halved(self) -> Tensor:
        """What leaving out every other slab would change, in nats, added up over the axes, (n,)."""
        return (2 * self.slabs[..., ::2].sum(-1)).log().abs().sum(-1)

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
        logs = []
        for some in number.split(max(1, self.block // n)):
            u, volume = self.points(side, some)
            logs.append(sum(self.joint.log_probs(u)) + volume)
        log = torch.cat(logs).nan_to_num(-math.inf, neginf=-math.inf)
        shares = log.new_zeros(n, side**size).scatter(1, number.expand_as(log).T, log.softmax(0).T)
        cube = shares.reshape(n, 1, *[side] * size)  # the axis of length 1 is summed, so that there always is one
        slabs = [cube.sum([other for other in range(1, size + 2) if other != axis]) for axis in range(size + 1, 1, -1)]
        return LatticeSum((self.high - self.low) / (side - 1), log.logsumexp(0), shares, torch.stack(slabs, 1), dropped)

    def around(self, side: int, before: LatticeSum) -> tuple[Tensor, Tensor]:
        """Numbers of the points that lie next to those of a coarser sum that matter, or to a mode, (k, n).

        Also the share of the others in that sum and those before, (n,).
        """
        n, size, old = self.joint.n, self.joint.size, before.side
        matters = before.shares > 1e-2 * self.tolerance / before.shares.shape[1]
        nearest = ((self.place - self.low.unsqueeze(1)) / before.step.unsqueeze(1)).round().clamp(0, old - 1).long()
        modes = sum(nearest[..., axis] * old**axis for axis in range(size))
        matters = matters | (torch.zeros_like(before.shares).scatter_add(1, modes, self.counts[..., 0].double()) > 0)
        pool: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[size - 1]
        grown = pool(matters.double().reshape(n, 1, *[old] * size), 3, 1, 1).flatten(1) > 0
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
        width, side = self.high - self.low, total.side
        heavy = total.slabs > 1e-2 * self.tolerance / side
        places = torch.arange(side, device=width.device)
        first = torch.where(heavy, places, side).amin(-1)
        last = torch.where(heavy, places, -1).amax(-1)
        low, high, cut = self.low, self.high, torch.zeros_like(self.cut)
        if shrink:
            beyond = (places < first.unsqueeze(-1) - 1) | (places > last.unsqueeze(-1) + 1)
            cut = (total.slabs * beyond).sum((-2, -1))
            inner = self.reach(3.0, total.step.unsqueeze(1))  # where the points may have missed a mode
            low = torch.minimum(low + (first - 1).clamp_min(0) * total.step, inner[0]).maximum(low)
            high = torch.maximum(high - (side - 2 - last).clamp_min(0) * total.step, inner[1]).minimum(high)
        low = torch.where(first == 0, self.low - width / 2, low).clamp_min(-_FAR)
        high = torch.where(last == side - 1, self.high + width / 2, high).clamp_max(_FAR)
        changed = (((high - low) / width).log().abs() > 0.2).any(-1) & heavy.any(-1).all(-1)
        low, high = (torch.where(changed.unsqueeze(-1), *pair) for pair in ((low, self.low), (high, self.high)))
        return replace(self, low=low, high=high, cut=self.cut + cut * changed), changed

    @torch.no_grad()
    def moments(self, total: LatticeSum) -> tuple[Tensor, Tensor]:
        """Mean (n, z) and covariance (n, z, z) of the latent variables themselves."""
        origin = self.joint.latents(self.centre.unsqueeze(0))[0]
        loc, square = torch.zeros_like(origin), torch.zeros_like(self.factor)
        for some in _any(total.shares > 0).split(max(1, self.block // self.joint.n)):
            apart = self.joint.latents(self.points(total.side, some)[0]) - origin
            share = total.shares.gather(1, some.T)
            loc = loc + torch.einsum("np,pnz->nz", share, apart)
            square = square + torch.einsum("np,pny,pnz->nyz", share, apart, apart)
        return origin + loc, square - loc.unsqueeze(-1) * loc.unsqueeze(-2)


def _axes(number: Tensor, side: int, size: int) -> list[Tensor]:
    """Places along each axis of points by their numbers."""
    return [number // side**axis % side for axis in range(size)]


def _any(kept: Tensor) -> Tensor:
    """Places of all that is true in (n, p), filled up with others where a datum has fewer, (k, n)."""
    return kept.byte().topk(max(1, int(kept.sum(1).amax())), 1, sorted=False).indices.T


def _around(joint: Joint, tolerance: float, entries: int) -> Lattice:
    """Lay a lattice around the modes of each datum."""
    modes, mass, covariances = laplace(joint)
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
    low, high = lattice.reach(math.sqrt(2 * math.log(1e4 / min(tolerance, 1.0))))
    return replace(lattice, low=low, high=high)
