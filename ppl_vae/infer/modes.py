"""Modes of the posterior of each datum, and the Gaussians that touch it there."""

import math

import torch
from torch import Tensor

from ppl_vae.programs.joint import Joint

_STARTS = 24  # of the search, a datum
_PRIOR, _GUIDE = 256, 64  # draws among which they are chosen


def points_of(size: int) -> int:
    """Give the points a datum that the search looks at together, for so many latent variables."""
    return max(_STARTS * (1 + 2 * size), _PRIOR + _GUIDE)


def laplace(joint: Joint) -> tuple[Tensor, Tensor, Tensor]:
    """Climb to modes (s, n, z) from the guide's mean and draws of guide and prior.

    Gives the log mass of a Gaussian there, (s, n), none where the same mode was found before, and its covariance.
    """
    size = joint.size
    prior, guide = joint.draw("prior", _PRIOR), joint.draw("guide", _GUIDE)
    both = torch.cat([prior, guide])
    spread = both.std(0).clamp_min(1e-6)
    start = _peaks(joint, both, spread).unsqueeze(-1).expand(-1, -1, size)
    u = torch.cat([guide.mean(0, keepdim=True), prior[: _STARTS - len(start) - 1], both.gather(0, start)])
    found = [u, *_look(joint, u, spread), torch.ones_like(u[..., 0])]  # and the radius within which to trust them
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
        old = [value[places] for value in found]
        new, gain = _climb(part, old, spread[among])
        for value, replacement in zip(found, new, strict=True):
            value[places] = replacement
        live[places] &= (gain > 1e-4) & (new[-1] > 1e-6)
    u, height, _, bend, _ = found
    values, vectors = torch.linalg.eigh(bend.nan_to_num() * spread.unsqueeze(-1) * spread.unsqueeze(-2))
    values = values.clamp_min(1.0)  # a saddle has no width of its own
    apart = (vectors.mT @ ((u.unsqueeze(1) - u) / spread).unsqueeze(-1)).squeeze(-1)  # (s, s, n, z)
    near = (apart.square() * values).sum(-1) < 0.01
    first = torch.ones(_STARTS, _STARTS, device=u.device).tril(-1).bool()  # of two, the one that came before
    known = (near & first.unsqueeze(-1)).any(1)
    mass = height.nan_to_num(-1e300) + spread.log().sum(-1) - 0.5 * values.log().sum(-1)
    scaled = spread.unsqueeze(-1) * vectors
    return u, mass.masked_fill(known, -math.inf), scaled @ (1 / values).diag_embed() @ scaled.mT


@torch.no_grad()
def _peaks(joint: Joint, draws: Tensor, spread: Tensor) -> Tensor:
    """Choose among draws (k, n, z) those that are far from any higher one, (s, n)."""
    height = torch.stack(joint.log_probs(draws)).sum(0).nan_to_num(-math.inf)
    falling = height.argsort(0, descending=True)
    place = (draws / spread).gather(0, falling.unsqueeze(-1).expand(-1, -1, joint.size)).movedim(1, 0)
    apart = torch.cdist(place, place)  # (n, k, k)
    higher = torch.ones_like(apart[0]).tril(-1).bool()
    far = apart.masked_fill(~higher, math.inf).amin(-1).T
    return falling.gather(0, far.topk(3 * _STARTS // 4, 0).indices)


def _look(joint: Joint, u: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give log density (s, n), its gradient (s, n, z) and minus its Hessian, by differences of gradients, at u."""
    one = torch.eye(joint.size).to(u)
    shifts = 1e-4 * torch.cat([torch.zeros_like(one[:1]), one, -one])  # (1 + 2 z, z)
    points = (u + (shifts.unsqueeze(1) * spread).unsqueeze(1)).flatten(0, 1)
    with torch.enable_grad():
        points.requires_grad_()
        height = torch.stack(joint.log_probs(points)).sum(0)
        slope = torch.autograd.grad(height.sum(), points, allow_unused=True)[0] if height.requires_grad else None
    slope = (torch.zeros_like(points) if slope is None else slope).unflatten(0, (-1, len(u))).detach()
    ahead, behind = slope[1:].unflatten(0, (2, -1))
    bend = ((behind - ahead) / (2e-4 * spread.T.unsqueeze(1).unsqueeze(-1))).movedim(0, -2)
    return height[: len(u)].detach(), slope[0], (bend + bend.mT) / 2


def _climb(joint: Joint, at: list[Tensor], spread: Tensor) -> tuple[list[Tensor], Tensor]:
    """Take a step of Newton's within the radius, by the curvature's size; give the gain it promised without, (s, n)."""
    u, height, slope, bend, radius = at
    values, vectors = torch.linalg.eigh(bend.nan_to_num() * spread.unsqueeze(-1) * spread.unsqueeze(-2))
    values = values.abs().clamp_min(1e-3)
    pull = (vectors.mT @ (slope.nan_to_num() * spread).unsqueeze(-1)).squeeze(-1)
    step = (vectors @ (pull / values).unsqueeze(-1)).squeeze(-1)
    step = step * (radius / step.norm(dim=-1).clamp_min(1e-12)).clamp(max=1).unsqueeze(-1)
    new = [u + spread * step, *_look(joint, u + spread * step, spread)]
    better = new[1] > height
    pairs = zip(at[:-1], new, strict=True)
    kept = [torch.where(better.reshape(better.shape + (1,) * (a.dim() - 2)), b, a) for a, b in pairs]
    radius = torch.where(better, 2 * radius, 0.25 * radius).clamp(max=10)
    return [*kept, radius], (pull.square() / values).sum(-1) / 2
