"""Running moments of latent variables, by a guide's draws and by their importance weights."""

import math

import torch
from torch import Tensor

from ppl_vae.evaluation.weights import Draws


class WeightedMoments:
    """Running moments of a block of data, by the guide and by weights, about the first draw."""

    def add(self, draws: Draws) -> None:
        """Count more draws of the same data."""
        first, second, local, local_second = draws.moments()
        if not hasattr(self, "origin"):
            self.origin, self.count = first[0], 0
            self.top = torch.full_like(draws.weights[0], -math.inf)
            self.plain, self.weighted, self.squared = (torch.zeros(m, *first[0].shape).to(first) for m in (5, 3, 3))
            self.powers = torch.zeros(4, len(self.top)).to(first)
        top = torch.maximum(self.top, draws.weights.amax(0)).nan_to_num(0.0, neginf=-1e300)
        share = (draws.weights - top).exp().unsqueeze(-1)
        apart, near = first - self.origin, local - self.origin
        shift = self.origin * (2 * first - self.origin), self.origin * (2 * local - self.origin)
        powers = [apart, second - shift[0], apart**2, apart**3, apart**4]
        self.plain += torch.stack([power.sum(0) for power in powers])
        sums = [share.expand_as(near).sum(0), (share * near).sum(0), (share * (local_second - shift[1])).sum(0)]
        twice = [(share**2 * near**power).sum(0) for power in range(3)]
        lower = (self.top - top).exp().unsqueeze(-1)
        self.weighted = self.weighted * lower + torch.stack(sums)
        self.squared = self.squared * lower**2 + torch.stack(twice)
        order = torch.arange(1, 5, device=top.device).unsqueeze(-1)
        self.powers = self.powers * lower[:, 0] ** order
        self.powers += torch.stack([(share[..., 0] ** power).sum(0) for power in range(1, 5)])
        self.top, self.count = top, self.count + len(first)

    def divergence(self) -> Tensor:
        r""":math:`\chi^2` of posterior and guide with three of its standard errors, (n,), by the delta method."""
        mean = self.powers[0] / self.count
        two, three, four = (self.powers[p - 1] / self.count / mean**p for p in (2, 3, 4))
        variance = four - 4 * two * three + 4 * two**3 - two**2
        variance = torch.where(variance > 64 * torch.finfo(four.dtype).eps * four, variance, 0.0)  # else rounding
        return two - 1 + 3 * (variance / self.count).sqrt()

    def figures(self) -> tuple[Tensor, ...]:
        """Mean and deviation by guide and weights, the guide's fourth moment, the weighted mean's error, (n, z)."""
        mean, second, square, cube, fourth = self.plain / self.count
        total, near, near_second = self.weighted
        near, near_second = near / total, near_second / total
        scales = [(a - b.square()).clamp_min(0).sqrt() for a, b in ((second, mean), (near_second, near))]
        central = fourth - 4 * mean * cube + 6 * mean.square() * square - 3 * mean**4
        spread = self.squared[2] - 2 * near * self.squared[1] + near.square() * self.squared[0]
        error = spread.clamp_min(0).sqrt() / total
        return self.origin + mean, scales[0], self.origin + near, scales[1], central.clamp_min(0), error
