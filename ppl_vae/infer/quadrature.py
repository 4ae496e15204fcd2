"""Quadrature over up to three latent variables of each datum, on a lattice that finds its place and width."""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ppl_vae.infer.modes import laplace
from ppl_vae.programs.joint import Joint

_FAR = 30.0  # t at which the lattice ends at the latest
_FIRST = (33, 17, 13)  # points a side of the first lattice, by the number of latent variables
_CACHED = 2**18  # numbers that the data of one evaluation may hold on a CPU, where more are slower


def integrate(joint: Joint, points: int, tolerance: float, entries: int) -> tuple[Tensor, ...]:
    """Integrate the joint density of each datum; the arguments are those of `reference_posterior`'s quadrature.

    Each datum is refined until its own sum stands. Its error adds up what the last refinement changed; half of what
    leaving out every other slab would change, as two sums may agree by chance; and estimates of what lies beyond the
    lattice, was left out, or fits between its points.

    What it cannot know of is a mode that lies off all others, narrower than the first lattice's steps, to which no draw
    of prior or guide leads.

    Returns:
        Log p(x) (n,), its error (n,), mean (n, z), covariance (n, z, z), and which data have settled (n,).
    """
    most = int(points ** (1 / joint.size) + 1e-9)
    lattice = _around(joint, tolerance, entries)
    found = lattice.sum(min(_FIRST[joint.size - 1], 2 * most // 3))
    waiting = [(torch.arange(joint.n, device=joint.device), *lattice.fitted(found))]
    answers = []
    while waiting:
        rows, lattice, before = waiting.pop()
        side = 3 * before.side // 2
        if len(rows) > 1 and len(rows) * side**joint.size > entries:
            first = torch.arange(len(rows), device=rows.device) < len(rows) // 2
            waiting += [(rows[half], lattice.rows(half), before.rows(half)) for half in (first, ~first)]
            continue
        after = lattice.sum(side, before)
        rounding = 4 * torch.finfo(joint.dtype).eps * after.log_mass.abs().clamp_min(1.0)
        change = (after.log_mass - before.log_mass).abs() + after.halved / 2
        unseen = (after.outside + after.dropped + lattice.cut + lattice.between(after.step)).clamp_max(1.0)
        error = change - torch.log1p(-unseen) + rounding
        error = torch.where(after.missed | error.isnan() | (after.log_mass > 1e300), math.inf, error)
        settled = error < tolerance + rounding
        done = settled | (3 * side // 2 > most)
        if bool(done.any()):
            ready = after.rows(done)
            moments = lattice.rows(done).moments(ready)
            answers.append((rows[done], ready.log_mass, error[done], *moments, settled[done]))
        if not bool(done.all()):
            waiting.append((rows[~done], *lattice.rows(~done).fitted(after.rows(~done))))
    order, *found_ = (torch.cat(part) for part in zip(*answers, strict=True))
    return tuple(part[order.argsort()] for part in found_)


T = TypeVar("T", "_Sum", "_Lattice")


def _rows(given: T, chosen: Tensor, **other: Any) -> T:
    """Take the data for which `chosen`, (n,), is true."""
    for field in fields(given):
        if isinstance(value := getattr(given, field.name), Tensor):
            other[field.name] = value[chosen]
    return replace(given, **other)


@dataclass(frozen=True)
class _Sum:
    """One sum over the lattice.

    Args:
        step: (n, z).
        log_mass: its logarithm, (n,).
        shares: of each point, (n, p).
        slabs: of each slab of points, (n, z, side).
        dropped: an estimate of the share of points that were left out, (n,).
    """

    step: Tensor
    log_mass: Tensor
    shares: Tensor
    slabs: Tensor
    dropped: Tensor

    @property
    def side(self) -> int:
        return self.slabs.shape[-1]

    @property
    def outside(self) -> Tensor:
        """Give an upper estimate of the share beyond the faces, (n,), for tails as light as Cauchy's or lighter."""
        return (self.slabs[..., [0, -1]].sum(-1) * (1 + 1 / self.step)).sum(-1)

    @property
    def missed(self) -> Tensor:
        """Say where one point has it all, so that two sums may agree by missing the rest alike, (n,)."""
        return self.shares.amax(-1) > 0.5

    @property
    def halved(self) -> Tensor:
        """Give what leaving out every other slab would change, in nats, added up over the axes, (n,)."""
        return (2 * self.slabs[..., ::2].sum(-1)).log().abs().sum(-1)

    def rows(self, chosen: Tensor) -> "_Sum":
        """Take the data for which `chosen`, (n,), is true."""
        return _rows(self, chosen)

    def put(self, chosen: Tensor, other: "_Sum") -> "_Sum":
        """Replace the data for which `chosen` is true."""
        names = [field.name for field in fields(self)]
        return _Sum(*(getattr(self, name).index_put((chosen,), getattr(other, name)) for name in names))


@dataclass(frozen=True)
class _Lattice:
    r"""A box of points t, :math:`u = c + L \sinh t`, of each datum, with c and L the moments of the Laplace mixture.

    Near the centre this is the trapezoidal rule, which on smooth densities converges faster than any power; further
    out steps grow, so that tails of powers become exponential ones.

    Args:
        joint: of the data.
        tolerance: of the error, in nats.
        block: points that are looked at together.
        centre: c, (n, z).
        factor: L, (n, z, z).
        low: where the box begins, (n, z) in t.
        high: where it ends.
        cut: an estimate of the share that shrinking it cut off, (n,).
        share: of each of the mixture's components, (n, s).
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
    place: Tensor
    width: Tensor

    @property
    def counts(self) -> Tensor:
        """Say which components count, (n, s, 1)."""
        return (self.share > 1e-3 * self.tolerance).unsqueeze(-1)

    def rows(self, chosen: Tensor) -> "_Lattice":
        """Take the data for which `chosen`, (n,), is true."""
        if bool(chosen.all()):
            return self
        joint = self.joint.rows(chosen)
        return _rows(self, chosen, joint=joint, block=self.block * self.joint.n // joint.n)

    def reach(self, spreads: float, most: Tensor | float = math.inf) -> tuple[Tensor, Tensor]:
        """Give the box, (n, z) each, that holds so many standard deviations of each component that counts."""
        spread = (spreads * self.width.diagonal(dim1=-2, dim2=-1).sqrt()).clamp(max=most)
        low = torch.where(self.counts, self.place - spread, math.inf).amin(1)
        return low, torch.where(self.counts, self.place + spread, -math.inf).amax(1)

    def points(self, side: int, number: Tensor) -> tuple[Tensor, Tensor]:
        """Give points (p, n) or (p, 1) as vectors u, (p, n, z), and the log volume that each stands for, (p, n)."""
        step = (self.high - self.low) / (side - 1)
        t = self.low + step * torch.stack(_axes(number, side, self.joint.size), -1).to(step)  # (p, n, z)
        volume = (step * self.factor.diagonal(dim1=-2, dim2=-1)).log() + t.cosh().log()
        return self.centre + torch.einsum("nyz,pnz->pny", self.factor, t.sinh()), volume.sum(-1)

    @torch.no_grad()
    def sum(self, side: int, before: _Sum | None = None) -> _Sum:
        """Sum the joint density over the lattice, only where a coarser sum over the same box has found anything."""
        n, size = self.joint.n, self.joint.size
        number = torch.arange(side**size, device=self.low.device).unsqueeze(-1)
        dropped = torch.zeros_like(self.low[:, 0])
        if before is not None:
            kept, dropped = self.around(side, before)
            number = _any(kept)
        logs = []
        for some in number.split(self.block):
            u, volume = self.points(side, some)
            prior, likelihood = self.joint.log_probs(u)
            logs.append(prior + likelihood + volume)
        log = torch.cat(logs).nan_to_num(-math.inf, neginf=-math.inf)
        shares = log.new_zeros(n, side**size).scatter(1, number.expand_as(log).T, log.softmax(0).T)
        cube = shares.reshape(n, *[side] * size)
        slabs = [cube.sum([other for other in range(1, size + 1) if other != axis]) for axis in range(size, 0, -1)]
        slabs = slabs if size > 1 else [cube]
        return _Sum((self.high - self.low) / (side - 1), log.logsumexp(0), shares, torch.stack(slabs, 1), dropped)

    def around(self, side: int, before: _Sum) -> tuple[Tensor, Tensor]:
        """Say which points of a lattice lie next to those of a coarser sum that matter, or to a mode, (n, p).

        Gives also the share of the others in that sum and those before, (n,).
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
        return kept, before.dropped + (before.shares * ~grown).sum(-1)

    def between(self, step: Tensor) -> Tensor:
        r"""Give the relative error of the trapezoidal rule on the Laplace mixture, (n,).

        That on a Gaussian of covariance :math:`\Sigma` is at most :math:`\sum_{k \neq 0} e^{-2 \pi^2 k^\top \Sigma k}`
        over the integer vectors k, with steps of one. So a mode that fits between two points is not overlooked. One
        that does not count may be missed altogether.
        """
        near = [k for k in itertools.product(range(-3, 4), repeat=self.joint.size) if any(k)]
        k = torch.tensor(near).to(step)
        scaled = self.width / (step.unsqueeze(-1) * step.unsqueeze(-2)).unsqueeze(1)
        exponent = torch.einsum("ky,nsyz,kz->nsk", k, scaled, k)
        error = (-2 * math.pi**2 * exponent).exp().sum(-1)
        return (self.share * torch.where(self.counts[..., 0], error, 1.0)).sum(-1)

    def fitted(self, found: _Sum) -> tuple["_Lattice", _Sum]:
        """Fit the box of each datum to its sum, and sum again where that changed much, until it stands."""
        lattice = self
        for number in range(60):
            lattice, changed = lattice.fit(found, shrink=number < 3)
            if not bool(changed.any()):
                break
            found = found.put(changed, lattice.rows(changed).sum(found.side))
        return lattice, found

    def fit(self, found: _Sum, *, shrink: bool) -> tuple["_Lattice", Tensor]:
        """Enlarge the box where mass leaves it, shrink it where there is none; say for which data that changed much."""
        width, small = self.high - self.low, 1e-2 * self.tolerance / found.side
        heavy = found.slabs > small
        places = torch.arange(found.side, device=width.device)
        first = torch.where(heavy, places, found.side).amin(-1)
        last = torch.where(heavy, places, -1).amax(-1)
        low, high, cut = self.low, self.high, torch.zeros_like(self.cut)
        if shrink:
            beyond = (places < first.unsqueeze(-1) - 1) | (places > last.unsqueeze(-1) + 1)
            cut = (found.slabs * beyond).sum((-2, -1))
            inner = self.reach(3.0, found.step.unsqueeze(1))  # where the points may have missed a mode
            low = torch.minimum(low + (first - 1).clamp_min(0) * found.step, inner[0]).maximum(low)
            high = torch.maximum(high - (found.side - 2 - last).clamp_min(0) * found.step, inner[1]).minimum(high)
        low = torch.where(first == 0, self.low - width / 2, low).clamp_min(-_FAR)
        high = torch.where(last == found.side - 1, self.high + width / 2, high).clamp_max(_FAR)
        changed = (((high - low) / width).log().abs() > 0.2).any(-1) & heavy.any(-1).all(-1)
        low, high = (torch.where(changed.unsqueeze(-1), *pair) for pair in ((low, self.low), (high, self.high)))
        return replace(self, low=low, high=high, cut=self.cut + cut * changed), changed

    @torch.no_grad()
    def moments(self, found: _Sum) -> tuple[Tensor, Tensor]:
        """Give mean (n, z) and covariance (n, z, z) of the latent variables themselves."""
        origin = self.joint.latents(self.centre.unsqueeze(0))[0]
        loc, square = torch.zeros_like(origin), torch.zeros_like(self.factor)
        for some in _any(found.shares > 0).split(self.block):
            apart = self.joint.latents(self.points(found.side, some)[0]) - origin
            share = found.shares.gather(1, some.T)
            loc = loc + torch.einsum("np,pnz->nz", share, apart)
            square = square + torch.einsum("np,pny,pnz->nyz", share, apart, apart)
        return origin + loc, square - loc.unsqueeze(-1) * loc.unsqueeze(-2)


def _axes(number: Tensor, side: int, size: int) -> list[Tensor]:
    """Take the numbers of points apart into places along each axis."""
    return [number // side**axis % side for axis in range(size)]


def _any(kept: Tensor) -> Tensor:
    """Give the places of all that is true in (n, p), and of some others where a datum has fewer, (k, n)."""
    return kept.byte().topk(max(1, int(kept.sum(1).amax())), 1, sorted=False).indices.T


def _around(joint: Joint, tolerance: float, entries: int) -> _Lattice:
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
    features = joint.target.features + joint.size
    block = max(1, (min(entries, _CACHED) if joint.device.type == "cpu" else entries) // (features * joint.n))
    parts = share[..., 0].T, inside.asinh().transpose(0, 1), width.transpose(0, 1)
    lattice = _Lattice(joint, tolerance, block, centre, factor, centre, centre, torch.zeros_like(centre[:, 0]), *parts)
    low, high = lattice.reach(math.sqrt(2 * math.log(1e4 / min(tolerance, 1.0))))
    return replace(lattice, low=low, high=high)
