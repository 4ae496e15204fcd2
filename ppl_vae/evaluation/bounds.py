"""The importance-weighted bound over its number of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.evaluation.weights import weight_blocks
from ppl_vae.programs.target import Target


@dataclass(frozen=True)
class BoundCurve:
    r"""The importance-weighted bound over its number of samples, in nats, in double precision.

    Args:
        counts: numbers of samples K, rising, shape (c,).
        bound: the mean of :math:`\log \frac1K \sum_i w_i` over disjoint groups of K samples, shape (c, n): for each K
            an unbiased estimate of its expectation :math:`\mathcal L_K`, which is a lower bound of log p(x).
        error: its Monte Carlo standard error, shape (c, n), from the spread of the groups; NaN for a single group.
    """

    counts: Tensor
    bound: Tensor
    error: Tensor


@torch.no_grad()
def bound_curve(
    program: Any, x: Any = None, samples: int = 1000, *, counts: Sequence[int] | None = None, seed: int = 0
) -> BoundCurve:
    r"""Estimate the bound :math:`\mathcal L_K` for several K from one set of draws, those of `log_evidence`.

    It rises with K from the ELBO (K = 1) towards log p(x). The draws are streamed: for each K only the sum of the
    group that is not full yet is kept.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        samples: draws per datum in all.
        counts: the numbers of samples K; by default 1, 2, 5, 10, 20, ... and `samples`.
        seed: of the draws; the global random state is left alone.

    Returns:
        The bound of each K and datum.

    Raises:
        ValueError: If the counts are not integers that rise from at least 1 to at most `samples`, or as in
            `log_evidence`.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), theorem 1.
    """
    samples = check_int("samples", samples)
    if counts is None:
        steps = (base * 10**power for power in range(len(str(samples))) for base in (1, 2, 5))
        counts = [*(count for count in steps if count < samples), samples]
    chosen = [check_int(f"counts[{position}]", count) for position, count in enumerate(counts)]
    if not chosen or chosen != sorted(set(chosen)) or chosen[-1] > samples:
        raise ValueError(f"Expected `counts` to rise, from at least 1 to at most {samples}, the samples; got {chosen}.")
    parts = []
    for draws in weight_blocks(Target.of(program, x), samples, seed):
        groups = [_Groups(count) for count in chosen]
        for some in draws:
            for group in groups:
                group.add(some.weights)
        parts.append(torch.stack([group.bound() for group in groups], 1))
    return BoundCurve(torch.tensor(chosen), *torch.cat(parts, -1))


class _Groups:
    """Running mean and spread of the log mean weights of disjoint groups, datum by datum."""

    def __init__(self, count: int) -> None:
        self.count, self.groups, self.filled = count, 0, 0
        self.open = torch.tensor(-math.inf, dtype=torch.float64)  # log sum of the group that is not full yet
        self.mean = self.square = torch.zeros((), dtype=torch.float64)

    def add(self, weights: Tensor) -> None:
        if self.filled:
            first = self.count - self.filled
            self._grow(weights[:first])
            weights = weights[first:]
        whole = len(weights) // self.count * self.count
        if whole:
            self._close(weights[:whole].unflatten(0, (-1, self.count)).logsumexp(1))
        if whole < len(weights):
            self._grow(weights[whole:])

    def _grow(self, weights: Tensor) -> None:
        self.open, self.filled = torch.logaddexp(self.open, weights.logsumexp(0)), self.filled + len(weights)
        if self.filled == self.count:
            self._close(self.open.unsqueeze(0))
            self.open, self.filled = torch.full_like(self.open, -math.inf), 0

    def _close(self, sums: Tensor) -> None:
        """Merge the mean and the sum of squares about it with those of new groups."""
        new, m = sums - math.log(self.count), len(sums)
        mean, total = new.mean(0), self.groups + m
        apart = mean - self.mean
        self.square = self.square + ((new - mean).square().sum(0) + apart.square() * self.groups * m / total)
        self.mean, self.groups = self.mean + apart * m / total, total

    def bound(self) -> Tensor:
        """The mean of the groups and its standard error, (2, n)."""
        error = (self.square / max(self.groups - 1, 1) / self.groups).sqrt()
        return torch.stack([self.mean, error if self.groups > 1 else torch.full_like(error, math.nan)])
