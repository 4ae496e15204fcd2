r"""Running sums of importance weights, from which evidence and its error follow.

The draws themselves are not kept, only the largest weights of each datum, for the shape of their tail (Pareto Smoothed
Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry 2024) and for the jackknife.
"""

import math

import torch
from torch import Tensor

from ppl_vae.evaluation.pareto import pareto_k, shape_error, tail_length

_ROUNDING = 64  # steps of the floating type within which weights count as equal
_LEFT_OUT = 64  # largest weights that the jackknife leaves out exactly, at the least


class WeightSums:
    """Running sums of weights in log space, and their largest, datum by datum.

    Args:
        samples: weights of each datum in all, k.
        dtype: in which they were computed.
    """

    def __init__(self, samples: int, dtype: torch.dtype) -> None:
        self.samples, self.rounding = samples, _ROUNDING * torch.finfo(dtype).eps
        self.tail = max(tail_length(samples) + 1, _LEFT_OUT)
        self.started = False

    def add(self, weights: Tensor, likelihood: Tensor, bounds: Tensor) -> None:
        """Count more draws: their log weights, log likelihoods and what averages to the ELBO, (draws, n) each."""
        if not self.started:
            self.started = True
            self.origin = bounds.mean(0).nan_to_num(0.0, 0.0, 0.0)
            self.log_powers = torch.full_like(self.origin, -math.inf).expand(4, -1)  # of the sums of w, ..., w^4
            self.total = self.square = self.likelihood = torch.zeros_like(self.origin)
            self.largest, self.least = weights[:0], torch.full_like(self.origin, math.inf)
        powers = torch.stack([(power * weights).logsumexp(0) for power in range(1, 5)])
        self.log_powers = torch.logaddexp(self.log_powers, powers)
        self.total = self.total + (bounds - self.origin).sum(0)
        self.square = self.square + (bounds - self.origin).square().sum(0)
        self.likelihood = self.likelihood + likelihood.sum(0)
        both = torch.cat([self.largest, weights])
        self.largest = both.topk(min(self.tail, len(both)), 0).values
        self.least = torch.minimum(self.least, weights.amin(0))

    def figures(self) -> dict[str, Tensor]:
        """The fields of `Evidence` without rounding, (n,) each."""
        k = self.samples
        unbiased = k / (k - 1) if k > 1 else math.nan
        ess = (2 * self.log_powers[0] - self.log_powers[1]).exp().clamp(max=k)
        chi2 = (k / ess - 1).clamp_min(0) * unbiased
        variance = (self.square / k - (self.total / k) ** 2).clamp_min(0) * unbiased
        tolerance = self.rounding * self.largest[0].nan_to_num(0.0, 0.0, 0.0).abs().clamp_min(1)
        equal = self.largest[0] - self.least <= tolerance
        shape = torch.where(equal, math.nan, pareto_k(self.largest, k, tolerance.clamp_min(1e-9)))
        value, error = self.log_powers[0] - math.log(k), (chi2 / k).sqrt()
        return {
            "log_evidence": value,
            "elbo": torch.minimum(self.origin + self.total / k, value),
            "mc_se": error,
            "bias": -chi2 / (2 * k),
            "ess": ess,
            "pareto_k": shape,
            "elbo_mc_se": (variance / k).sqrt(),
            "distortion": -self.likelihood / k,
            "jackknife": self._jackknife(value) if k > 1 else torch.full_like(value, math.nan),
            "shift": self._shift(shape, error, ess),
        }

    def _shift(self, shape: Tensor, error: Tensor, ess: Tensor) -> Tensor:
        """What bad data may lie below log p(x), 0 for the others (see `Evidence.kind`)."""
        doubt = shape_error(shape, self.samples)
        share = (self.largest[0] - self.log_powers[0]).exp()
        shift = torch.log1p(share / (1 - shape - doubt).clamp_min(0))
        unknown = ~(error <= 0.5) | (shape.isnan() & (self.samples < 25) & (ess < self.samples * (1 - 1e-3)))
        return torch.where(unknown, math.inf, torch.where(shape - 3 * doubt > 0.5, shift, 0.0))

    def _jackknife(self, value: Tensor) -> Tensor:
        r"""Leave out each sample: :math:`L_k - (k - 1) [\frac1k \sum_i \log(1 - u_i) - \log(1 - 1 / k)]`.

        :math:`u_i` is the weight's share of the sum. The largest are left out exactly, the others, each at most one in
        `_LEFT_OUT`, to the fourth power.
        """
        k = self.samples
        shares = (self.largest - self.log_powers[0]).exp()
        left = torch.log1p(-shares).sum(0)
        for power, log_power in enumerate(self.log_powers, 1):
            rest = (log_power - power * self.log_powers[0]).exp() - shares.pow(power).sum(0)
            left -= rest.clamp_min(0) / power
        return value - (k - 1) * (left / k - math.log1p(-1 / k))
