"""Modes of the posterior of each datum, and the Gaussians that touch it there."""

import itertools
import math

import torch
from torch import Tensor

from ppl_vae.infer.hmc import slope
from ppl_vae.programs.joint import Joint

_STARTS = 24  # of the search, per datum
_PRIOR, _GUIDE = 384, 64  # draws among which the starts are chosen


def points_of(size: int) -> int:
    """How many points per datum the search evaluates together, for so many latent variables."""
    return max(_STARTS * (1 + 2 * size), _PRIOR + _GUIDE + (3 * _STARTS // 4) * size)


def laplace(joint: Joint) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Climb to modes from the guide's mean, draws of guide and prior, and points that mix coordinates of several draws.

    Returns:
        The modes (s, n, z), the log mass of a Gaussian at each (s, n), none where an earlier one is the same mode, and
        its covariance (s, n, z, z); the draws (k, n, z), those of the prior first, and their log densities (k, n).
    """
    prior, guide = joint.draw("prior", _PRIOR), joint.draw("guide", _GUIDE)
    both = torch.cat([prior, guide])
    spread = both.std(0).clamp_min(1e-6)
    with torch.no_grad():
        heights = _heights(joint, both)
        if joint.size > 1:
            both, heights = _exchanged(joint, both, heights, spread)
    start = _peaks(heights, both, spread).unsqueeze(-1).expand(-1, -1, joint.size)
    u = torch.cat([guide.mean(0, keepdim=True), prior[: _STARTS - len(start) - 1], both.gather(0, start)])
    state = [u, *_look(joint, u, spread), torch.ones_like(u[..., 0])]  # and the radius within which to trust them
    live = torch.ones_like(u[..., 0], dtype=torch.bool)
    part, among = joint, live.any(0)
    for _ in range(40):
        if not bool(live.any()):
            break
        if bool((live.any(0) != among).any()):
            among = live.any(0)
            part = joint.rows(among)
        some = live[:, among].byte().topk(int(live.sum(0).amax()), 0).indices  # those that climb, and some others
        places = some, among.nonzero().squeeze(-1).expand_as(some)
        new, gain = _climb(part, [value[places] for value in state], spread[among])
        for value, replacement in zip(state, new, strict=True):
            value[places] = replacement
        live[places] &= (gain > 1e-4) & (new[-1] > 1e-6)
    u, height, _, bend, _ = state
    values, vectors = _curvature(bend, spread)
    values = values.clamp_min(1.0)  # a saddle has no width of its own
    apart = (vectors.mT @ ((u.unsqueeze(1) - u) / spread).unsqueeze(-1)).squeeze(-1)  # (s, s, n, z)
    first = torch.ones(_STARTS, _STARTS, device=u.device).tril(-1).bool()  # of two, the one that came before
    known = ((apart.square() * values).sum(-1).lt(0.01) & first.unsqueeze(-1)).any(1)
    mass = height.nan_to_num(-1e300) + spread.log().sum(-1) - 0.5 * values.log().sum(-1)
    scaled = spread.unsqueeze(-1) * vectors
    covariance = scaled @ (1 / values).diag_embed() @ scaled.mT
    return u, mass.masked_fill(known, -math.inf), covariance, both, heights


def _heights(joint: Joint, u: Tensor) -> Tensor:
    return torch.stack(joint.log_probs(u)).sum(0).nan_to_num(-math.inf)


def _exchanged(joint: Joint, draws: Tensor, heights: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The draws, and points that take each coordinate from the draw whose own suits the others best.

    So modes are found that lie far out in several coordinates at a time, which hardly any single draw does; and beside
    the best of them others that differ from it in one coordinate.
    """
    best = draws.gather(0, heights.argmax(0)[None, :, None].expand_as(draws[:1]))
    points, found = [draws], [heights]
    for turn, axis in itertools.product(range(2), range(joint.size)):
        mixed = best.expand_as(draws).clone()
        mixed[..., axis] = draws[..., axis]
        height = _heights(joint, mixed)
        best = mixed.gather(0, height.argmax(0)[None, :, None].expand_as(best))
        if turn:
            peaks = _peaks(height, mixed, spread)
            points.append(mixed.gather(0, peaks.unsqueeze(-1).expand(-1, -1, joint.size)))
            found.append(height.gather(0, peaks))
    return torch.cat(points), torch.cat(found)


def _peaks(height: Tensor, draws: Tensor, spread: Tensor) -> Tensor:
    """Numbers of the draws (k, n, z) that are far from any higher one, (s, n)."""
    falling = height.argsort(0, descending=True)
    place = (draws / spread).gather(0, falling.unsqueeze(-1).expand(draws.shape)).movedim(1, 0)
    apart = torch.cdist(place.float(), place.float())  # (n, k, k)
    far = apart.masked_fill_(torch.ones_like(apart[0]).triu().bool(), math.inf).amin(-1).T
    return falling.gather(0, far.topk(3 * _STARTS // 4, 0).indices)


def _look(joint: Joint, u: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log density (s, n), its gradient (s, n, z) and minus its Hessian, by differences of gradients, at u."""
    one = torch.eye(joint.size).to(u)
    shifts = 1e-4 * torch.cat([torch.zeros_like(one[:1]), one, -one])  # (1 + 2 z, z)
    points = (u + (shifts.unsqueeze(1) * spread).unsqueeze(1)).flatten(0, 1)
    with torch.enable_grad():
        points.requires_grad_()
        height = torch.stack(joint.log_probs(points)).sum(0)
        steep = slope(height, points).unflatten(0, (-1, len(u)))
    ahead, behind = steep[1:].unflatten(0, (2, -1))
    bend = ((behind - ahead) / (2e-4 * spread.T.unsqueeze(1).unsqueeze(-1))).movedim(0, -2)
    return height[: len(u)].detach(), steep[0], (bend + bend.mT) / 2


def _curvature(bend: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (s, n, z) and eigenvectors of minus the Hessian, in units of `spread`."""
    return torch.linalg.eigh(bend.nan_to_num() * spread.unsqueeze(-1) * spread.unsqueeze(-2))


def _climb(joint: Joint, at: list[Tensor], spread: Tensor) -> tuple[list[Tensor], Tensor]:
    """Take a Newton step within the radius, by the curvature's size; also the gain it promised without one, (s, n)."""
    u, height, steep, bend, radius = at
    values, vectors = _curvature(bend, spread)
    values = values.abs().clamp_min(1e-3)
    pull = (vectors.mT @ (steep.nan_to_num() * spread).unsqueeze(-1)).squeeze(-1)
    step = (vectors @ (pull / values).unsqueeze(-1)).squeeze(-1)
    step = step * (radius / step.norm(dim=-1).clamp_min(1e-12)).clamp(max=1).unsqueeze(-1)
    new = [u + spread * step, *_look(joint, u + spread * step, spread)]
    better = new[1] > height
    pairs = zip(at[:-1], new, strict=True)
    kept = [torch.where(better.reshape(better.shape + (1,) * (a.dim() - 2)), b, a) for a, b in pairs]
    radius = torch.where(better, 2 * radius, 0.25 * radius).clamp(max=10)
    return [*kept, radius], (pull.square() / values).sum(-1) / 2
