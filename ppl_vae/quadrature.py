"""Quadrature over up to three latent variables of each datum, on a lattice that finds its place and width."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.joint import Joint, Path

__all__ = ["integrate"]

_FAR = 30.0  # t at which the lattice ends at the latest
_STARTS = 16  # of the search for modes, a datum


def integrate(joint: Joint, points: int, tolerance: float, entries: int) -> tuple[Tensor, ...]:
    """Integrate the joint density of each datum; the arguments are those of `reference_posterior`'s quadrature."""
    lattice = _Lattice(joint, entries)
    most = int(points ** (1 / joint.size) + 1e-9)
    side = min(max(17, lattice.fine()), 2 * most // 3)
    before = lattice.sum(side)
    blurred = (before.step > 1.1 * lattice.narrow).any(-1)
    for _ in range(60):
        if not lattice.fit(before, tolerance):
            break
        before = lattice.sum(side)
    while True:
        side = 3 * side // 2
        after = lattice.sum(side)
        rounding = 4 * torch.finfo(joint.dtype).eps * after.log_mass.abs().clamp_min(1.0)
        error = (after.log_mass - before.log_mass).abs() + after.outside + rounding
        error = torch.where(after.missed | blurred | error.isnan(), math.inf, error)
        settled = error < tolerance + rounding
        if bool(settled.all()) or 3 * side // 2 > most:
            return after.log_mass, error, *lattice.moments(after), settled
        before = after


@dataclass(frozen=True)
class _Sum:
    """One sum over the lattice: steps (n, z), its log (n,), each point's share (p, n), those of slabs (n, z, side)."""

    side: int
    step: Tensor
    log_mass: Tensor
    shares: Tensor
    slabs: Tensor

    @property
    def outside(self) -> Tensor:
        """Give an upper estimate of the share beyond the faces, (n,), for tails as light as Cauchy's or lighter."""
        return (self.slabs[..., [0, -1]].sum(-1) * (1 + 1 / self.step)).sum(-1)

    @property
    def missed(self) -> Tensor:
        """Say where one point has it all, so that two sums may agree by missing the rest alike, (n,)."""
        return self.shares.amax(0) > 0.5


class _Lattice:
    r"""A box of points t, :math:`u = c + L \sinh t`, of each datum, with c and L the moments of the Laplace mixture.

    Near the centre this is the trapezoidal rule, which on smooth densities converges faster than any power; further
    out steps grow, so that tails of powers become exponential ones.
    """

    def __init__(self, joint: Joint, entries: int) -> None:
        self.joint = joint
        features = sum(value[0].numel() for value in joint.batch.values()) + joint.size
        self.rows = max(1, entries // (features * joint.n))
        modes, heights, hessians = _modes(joint)
        values, vectors = torch.linalg.eigh(hessians)
        covariances = vectors @ (1 / values.clamp_min(1e-8)).diag_embed() @ vectors.mT
        mass = heights + 0.5 * torch.logdet(covariances)
        share = mass.softmax(0).unsqueeze(-1)  # (s, n, 1)
        self.centre = (share * modes).sum(0)
        apart = modes - self.centre
        pooled = (share.unsqueeze(-1) * (covariances + apart.unsqueeze(-1) * apart.unsqueeze(-2))).sum(0)
        self.factor = torch.linalg.cholesky(pooled)
        inside = torch.linalg.solve_triangular(self.factor, apart.unsqueeze(-1), upper=False).squeeze(-1)
        whitened = torch.linalg.solve_triangular(self.factor, covariances, upper=False)
        whitened = torch.linalg.solve_triangular(self.factor, whitened.mT, upper=False)
        spread = 8 * whitened.diagonal(dim1=-2, dim2=-1).sqrt()
        counts = share > 1e-13
        self.low = torch.where(counts, inside - spread, math.inf).amin(0).asinh()  # (n, z)
        self.high = torch.where(counts, inside + spread, -math.inf).amax(0).asinh()
        curvature = (self.factor.mT @ hessians @ self.factor).diagonal(dim1=-2, dim2=-1).clamp_min(1e-8)
        self.narrow = torch.where(counts, (curvature * (1 + inside.square())) ** -0.5, math.inf).amin(0)  # in t

    def fine(self) -> int:
        """Give the points a side that leave no mode between them."""
        return int(((self.high - self.low) / self.narrow).amax().clamp(max=1e6).ceil()) + 1

    def points(self, side: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Give some of the points as vectors u, (p, n, z), and the log volume that each stands for, (p, n)."""
        flat = torch.arange(begin, end, device=self.low.device)
        axes = [flat // side**axis % side for axis in range(self.joint.size)]
        step = (self.high - self.low) / (side - 1)
        t = self.low + step * torch.stack(axes, -1).to(self.low).unsqueeze(1)  # (p, n, z)
        volume = (step * self.factor.diagonal(dim1=-2, dim2=-1)).log() + t.cosh().log()
        return self.centre + torch.einsum("nyz,pnz->pny", self.factor, t.sinh()), volume.sum(-1)

    def blocks(self, side: int) -> list[tuple[int, int]]:
        """Give the ranges of points that are looked at together."""
        total = side**self.joint.size
        return [(begin, min(begin + self.rows, total)) for begin in range(0, total, self.rows)]

    @torch.no_grad()
    def sum(self, side: int) -> _Sum:
        """Sum the joint density over the lattice."""
        logs = []
        for block in self.blocks(side):
            u, volume = self.points(side, *block)
            prior, likelihood = self.joint.log_probs(u)
            logs.append(prior + likelihood + volume)
        log = torch.cat(logs).nan_to_num(-math.inf, neginf=-math.inf)
        shares = log.softmax(0)
        cube = shares.T.reshape(self.joint.n, *[side] * self.joint.size)
        axes = range(1, self.joint.size + 1)
        slabs = [cube.sum([other for other in axes if other != axis]) if len(axes) > 1 else cube for axis in axes]
        step = (self.high - self.low) / (side - 1)
        return _Sum(side, step, log.logsumexp(0), shares, torch.stack(slabs[::-1], 1))

    def fit(self, found: _Sum, tolerance: float) -> bool:
        """Enlarge the box where mass leaves it, shrink it where there is none; say whether that changed much."""
        width, small = self.high - self.low, tolerance / 1e4 / found.side
        step = width / (found.side - 1)
        heavy = found.slabs > small
        places = torch.arange(found.side, device=width.device)
        first = torch.where(heavy, places, found.side).amin(-1)
        last = torch.where(heavy, places, -1).amax(-1)
        low = torch.where(first == 0, self.low - width / 2, self.low + (first - 1).clamp_min(0) * step)
        high = torch.where(
            last == found.side - 1, self.high + width / 2, self.high - (found.side - 2 - last).clamp_min(0) * step
        )
        low, high = torch.where(heavy.any(-1), low, self.low), torch.where(heavy.any(-1), high, self.high)
        low, high = low.clamp_min(-_FAR), high.clamp_max(_FAR)
        changed = bool((((high - low) / width).log().abs() > 0.2).any())
        if changed:
            self.low, self.high = low, high
        return changed

    @torch.no_grad()
    def moments(self, found: _Sum) -> tuple[Tensor, Tensor]:
        """Give mean (n, z) and covariance (n, z, z) of the latent variables themselves."""
        origin = self.joint.latents(self.centre.unsqueeze(0))[0]
        loc, square = torch.zeros_like(origin), torch.zeros_like(self.factor)
        for begin, end in self.blocks(found.side):
            apart = self.joint.latents(self.points(found.side, begin, end)[0]) - origin
            share = found.shares[begin:end]
            loc = loc + torch.einsum("pn,pnz->nz", share, apart)
            square = square + torch.einsum("pn,pny,pnz->nyz", share, apart, apart)
        return origin + loc, square - loc.unsqueeze(-1) * loc.unsqueeze(-2)


def _modes(joint: Joint) -> tuple[Tensor, Tensor, Tensor]:
    """Climb to modes (s, n, z) from the guide's mean and draws of guide and prior; give heights and -Hessians too."""
    path, size = Path(joint), joint.size
    prior, guide = joint.draw("prior", 256), joint.draw("guide", 64)
    both = torch.cat([prior, guide])
    with torch.no_grad():
        top = sum(joint.log_probs(both)).nan_to_num(-math.inf).topk(_STARTS // 4, 0).indices  # type: ignore[union-attr]
    best = both.gather(0, top.unsqueeze(-1).expand(-1, -1, size))
    u = torch.cat([guide.mean(0, keepdim=True), best, prior[: _STARTS - len(best) - 1]])
    spread = both.std(0).clamp_min(1e-6)
    shifts = 1e-4 * torch.cat([torch.zeros(1, size), torch.eye(size), -torch.eye(size)]).to(u)  # (1 + 2 z, z)

    def look(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = path.at((u + (shifts.unsqueeze(1) * spread).unsqueeze(1)).flatten(0, 1))
        height = (state.base + state.tilt).unflatten(0, (-1, len(u)))[0]
        slope = (state.base_slope + state.tilt_slope).unflatten(0, (-1, len(u)))
        bend = (slope[1 + size :] - slope[1 : 1 + size]) / (2e-4 * spread.T.unsqueeze(1).unsqueeze(-1))
        bend = bend.movedim(0, -2)
        return height, slope[0], (bend + bend.mT) / 2

    height, slope, bend = look(u)
    radius = torch.ones_like(height)
    for _ in range(40):
        values, vectors = torch.linalg.eigh(bend.nan_to_num() * spread.unsqueeze(-1) * spread.unsqueeze(-2))
        pull = vectors.mT @ (slope.nan_to_num() * spread).unsqueeze(-1)
        step = (vectors @ (pull / values.abs().clamp_min(1e-3).unsqueeze(-1))).squeeze(-1)
        step = step * (radius / step.norm(dim=-1).clamp_min(1e-12)).clamp(max=1).unsqueeze(-1)
        other = look(u + spread * step)
        better = other[0] > height
        u = torch.where(better.unsqueeze(-1), u + spread * step, u)
        height = torch.where(better, other[0], height)
        slope = torch.where(better.unsqueeze(-1), other[1], slope)
        bend = torch.where(better[..., None, None], other[2], bend)
        radius = torch.where(better, 2 * radius, 0.25 * radius).clamp(max=10)
    floor = 1e-4 / spread.square()
    return u, height.nan_to_num(-1e300), bend.nan_to_num() + floor.diag_embed()
