"""The importance-weighted bound over its number of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.evaluation.evidence import weight_blocks
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

    It rises with K from the ELBO (K = 1) towards log p(x). Streams over the draws: of each K it keeps the group that
    is not full yet.

    Args:
        program: any program.
        x: data, a tensor (n, *x) or a batch dict.
        samples: draws a datum in all.
        counts: the numbers of samples K; by default 1, 2, 5, 10, 20, ... up to `samples`.
        seed: of the draws; the global random state is left alone.

    Returns:
        The bound of each K and datum.

    Raises:
        ValueError: for counts that are not whole or do not rise from at least 1 to at most `samples`, or as in
            `log_evidence`.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), theorem 1.
    """
    samples = check_int("samples", samples)
    steps = [base * 10**power for power in range(len(str(samples))) for base in (1, 2, 5)]
    if counts is None:
        counts = [count for count in steps if count <= samples]
    chosen = [check_int(f"counts[{position}]", count) for position, count in enumerate(counts)]
    if not chosen or chosen != sorted(set(chosen)) or chosen[-1] > samples:
        raise ValueError(f"Expected `counts` to rise, from at least 1 to at most {samples}, the samples; got {chosen}.")
    parts = []
    for draws in weight_blocks(Target.of(program, x), samples, seed):
        groups = [_Groups(count) for count in chosen]
        for weights, _ in draws:
            for group in groups:
                group.add(weights)
        parts.append([group.bound() for group in groups])
    bound, error = (torch.cat([torch.stack([row[which] for row in part]) for part in parts], 1) for which in (0, 1))
    return BoundCurve(torch.tensor(chosen), bound, error)


class _Groups:
    """Running mean and spread of the log mean weights of disjoint groups, datum by datum."""

    def __init__(self, count: int) -> None:
        self.count, self.groups, self.filled = count, 0, 0

    def add(self, block: Tensor) -> None:
        if not self.groups and not self.filled:
            self.open = torch.full_like(block[0], -math.inf)
            self.mean, self.square = torch.zeros_like(block[0]), torch.zeros_like(block[0])
        first = min(self.count - self.filled, len(block)) if self.filled else 0
        if first:
            self._grow(block[:first])
        whole = (len(block) - first) // self.count * self.count
        if whole:
            self._close(block[first : first + whole].unflatten(0, (-1, self.count)).logsumexp(1))
        if first + whole < len(block):
            self._grow(block[first + whole :])

    def _grow(self, block: Tensor) -> None:
        self.open, self.filled = torch.logaddexp(self.open, block.logsumexp(0)), self.filled + len(block)
        if self.filled == self.count:
            self._close(self.open.unsqueeze(0))
            self.open, self.filled = torch.full_like(self.open, -math.inf), 0

    def _close(self, sums: Tensor) -> None:
        """Merge the mean and the sum of squares about it with those of new groups."""
        new, m = sums - math.log(self.count), len(sums)
        mean, total = new.mean(0), self.groups + m
        apart = mean - self.mean
        self.square += (new - mean).square().sum(0) + apart.square() * self.groups * m / total
        self.mean, self.groups = self.mean + apart * m / total, total

    def bound(self) -> tuple[Tensor, Tensor]:
        if self.groups < 2:
            return self.mean, torch.full_like(self.mean, math.nan)
        return self.mean, (self.square / (self.groups - 1) / self.groups).sqrt()
