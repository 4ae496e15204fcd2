r"""Evidence: importance-weighted estimates of log p(x), with their error.

With weights :math:`w_i = p(x, z_i) / q(z_i \mid x)`, :math:`z_i \sim q`, the estimate
:math:`\log \frac1k \sum_i w_i` is on average a lower bound of log p(x) that rises with k (Importance Weighted
Autoencoders, Burda, Grosse and Salakhutdinov 2016). Its error and bias follow from the weights' relative variance
:math:`\chi^2` (Debiasing Evidence Approximations, Nowozin 2018). The largest weights show whether that variance exists
at all (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry 2024).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.evaluation.pareto import pareto_k, tail_length
from ppl_vae.programs.target import BLOCK, Target

_ENTRIES = 2**23  # numbers that one block of draws of the data may hold
_LEFT_OUT = 64  # largest weights that the jackknife leaves out exactly, at the least


@dataclass(frozen=True)
class Evidence:
    r"""Evidence of each datum, in nats: tensors of shape (n,), in double precision.

    Args:
        log_evidence: :math:`\log \frac1k \sum_i w_i`.
        elbo: :math:`\frac1k \sum_i \log w_i`, from the same weights, so never above `log_evidence`.
        mc_se: Monte Carlo standard error of `log_evidence`, :math:`\sqrt{\chi^2 / k}`.
        bias: its bias to first order, :math:`-\chi^2 / 2k`.
        ess: effective sample size, :math:`(\sum w)^2 / \sum w^2`.
        pareto_k: shape of the weights' upper tail; NaN below 25 samples and where all weights are equal to rounding.
        elbo_mc_se: Monte Carlo standard error of `elbo`.
        distortion: :math:`-\frac1k \sum_i \log p(x \mid z_i)`, from the same draws; `elbo` is -(rate + distortion).
        jackknife: the estimate freed of its first-order bias by leaving out each sample in turn,
            :math:`k L_k - (k - 1) \frac1k \sum_i L_{k-1}^{(-i)}`. It is no bound, and noisier than `log_evidence`.
        samples: k.
    """

    log_evidence: Tensor
    elbo: Tensor
    mc_se: Tensor
    bias: Tensor
    ess: Tensor
    pareto_k: Tensor
    elbo_mc_se: Tensor
    distortion: Tensor
    jackknife: Tensor
    samples: int

    @property
    def rate(self) -> Tensor:
        r""":math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))` of each datum, from the same draws."""
        return -self.elbo - self.distortion

    @property
    def kind(self) -> Literal["estimate", "lower bound"]:
        r"""Whether the mean over the data is an estimate or a lower bound.

        It is a lower bound if more than 1 % of the data are doubtful. A datum is doubtful if its weights may have no
        variance, so that an error bar would mean nothing, or if there are too few samples to tell: the tail shape
        :math:`\hat k` of the M largest weights and its standard error over :math:`\sqrt n` exceed one half,
        :math:`\hat k + (1 + \hat k) / \sqrt{M n} > \frac12`. A single datum needs the whole margin; in a set of n the
        worst decide.

        References:
            Estimating Tails of Probability Distributions (Smith 1987), for the error of :math:`\hat k`.
        """
        error = (1 + self.pareto_k) / math.sqrt(tail_length(self.samples) * len(self.pareto_k))
        unknown = self.pareto_k.isnan() & ~(self.ess >= self.samples * (1 - 1e-3))
        doubtful = (self.pareto_k + error > 0.5) | unknown | (self.samples < 2)
        return "lower bound" if bool(doubtful.double().mean() > 0.01) else "estimate"

    def summary(self) -> dict[str, Any]:
        """Means in nats per datum, with standard errors over data (`se`) and of the estimate (`mc_se`)."""
        n = len(self.log_evidence)

        def over_data(values: Tensor, errors: Tensor) -> dict[str, float | None]:
            spread = float(values.std()) / math.sqrt(n) if n > 1 else None
            return {"mean": float(values.mean()), "se": spread, "mc_se": float(errors.square().sum().sqrt()) / n}

        shapes = self.pareto_k[~self.pareto_k.isnan()]
        tail: dict[str, float | None] = dict.fromkeys(("median", "max", "above_0.5", "above_0.7"))
        if len(shapes):
            above = {f"above_{limit}": float((shapes > limit).double().sum()) / n for limit in (0.5, 0.7)}
            tail = {"median": float(shapes.median()), "max": float(shapes.max()), **above}
        evidence = over_data(self.log_evidence, self.mc_se)
        return {
            "n": n,
            "samples": self.samples,
            "elbo": over_data(self.elbo, self.elbo_mc_se),
            "log_evidence": {**evidence, "bias": float(self.bias.mean()), "kind": self.kind},
            "rate": float(self.rate.mean()),
            "distortion": float(self.distortion.mean()),
            "ess": {"median": float(self.ess.median()), "min": float(self.ess.min())},
            "pareto_k": tail,
        }


@torch.no_grad()
def log_weights(program: Any, x: Any = None, samples: int = 1000, *, seed: int = 0) -> Tensor:
    r"""Log importance weights :math:`\log p(x, z_i) - \log q(z_i \mid x)`, read off traces of model and guide.

    Sites count unscaled and with their masks, summed over all dimensions but particles and data. Draws come in fixed
    blocks keyed by (seed, block).

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        samples: draws per datum, k.
        seed: of the draws; the global random state is left alone.

    Returns:
        Nats, shape (k, n), in double precision, without gradients.

    Raises:
        ValueError: If `samples` is below 1, the data do not fit, or the program breaks the contract.
    """
    blocks = weight_blocks(Target.of(program, x), check_int("samples", samples), seed)
    return torch.cat([torch.cat([weights for weights, _ in draws]) for draws in blocks], 1)


@torch.no_grad()
def log_evidence(program: Any, x: Any = None, samples: int = 1000, *, seed: int = 0) -> Evidence:
    r"""Estimate log p(x) of each datum, with its error, by importance sampling from the guide.

    Streams over fixed blocks of data and samples. Between blocks it keeps only the largest weights of each datum, whose
    number grows with the square root of the samples.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        samples: draws per datum, k.
        seed: of the draws; the global random state is left alone.

    Returns:
        The evidence, from the same weights that `log_weights` returns.

    Raises:
        ValueError: If `samples` is below 1, the data do not fit, or the program breaks the contract.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), equation 8.
    """
    target, samples = Target.of(program, x), check_int("samples", samples)
    rounding = 64 * torch.finfo(target.dtype or torch.get_default_dtype()).eps
    parts = []
    for draws in weight_blocks(target, samples, seed):
        sums = _Sums(samples, rounding)
        for weights, likelihood in draws:
            sums.add(weights, likelihood)
        parts.append(sums.figures())
    return Evidence(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, samples=samples)


def weight_blocks(target: Target, samples: int, seed: int) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Log weights and log likelihoods, (k, n) each, in blocks of data and, within these, of draws."""
    first = next(iter(target.batch.values()))
    size = max(1, min(BLOCK, _ENTRIES // (BLOCK * max(first[0].numel(), 1))))
    for number, block in enumerate(target.blocks()):
        yield _weigh(block, samples, size, (seed, number))


def _weigh(target: Target, samples: int, size: int, key: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    for k, model, guide in trace_blocks(target, samples, size, *key):
        likelihood = target.log_density(model, k, model.observation_nodes)
        prior = target.log_density(model, k, model.stochastic_nodes)
        yield prior + likelihood - target.log_density(guide, k), likelihood


def trace_blocks(target: Target, samples: int, size: int, *key: int | str) -> Iterator[tuple[int, Trace, Trace]]:
    """Traces of model and guide with at most `size` particles each, and how many they have."""
    for number, start in enumerate(range(0, samples, size)):
        k = min(size, samples - start)
        yield k, *target.traces(k, *key, number)


class _Sums:
    """Running sums of weights in log space, and their largest, datum by datum."""

    def __init__(self, samples: int, rounding: float) -> None:
        self.samples, self.rounding = samples, rounding
        self.tail = max(tail_length(samples) + 1, _LEFT_OUT)
        self.started = False

    def add(self, weights: Tensor, likelihood: Tensor) -> None:
        if not self.started:
            self.started = True
            self.origin = weights.mean(0).nan_to_num(0.0, 0.0, 0.0)
            self.log_powers = torch.full_like(self.origin, -math.inf).expand(4, -1)  # of the sums of w, ..., w^4
            self.total = self.square = self.likelihood = torch.zeros_like(self.origin)
            self.largest, self.least = weights[:0], torch.full_like(self.origin, math.inf)
        powers = torch.stack([(power * weights).logsumexp(0) for power in range(1, 5)])
        self.log_powers = torch.logaddexp(self.log_powers, powers)
        self.total = self.total + (weights - self.origin).sum(0)
        self.square = self.square + (weights - self.origin).square().sum(0)
        self.likelihood = self.likelihood + likelihood.sum(0)
        both = torch.cat([self.largest, weights])
        self.largest = both.topk(min(self.tail, len(both)), 0).values
        self.least = torch.minimum(self.least, weights.amin(0))

    def figures(self) -> dict[str, Tensor]:
        """The fields of `Evidence`, (n,) each."""
        k = self.samples
        unbiased = k / (k - 1) if k > 1 else math.nan
        ess = (2 * self.log_powers[0] - self.log_powers[1]).exp().clamp(max=k)
        chi2 = (k / ess - 1).clamp_min(0) * unbiased
        variance = (self.square / k - (self.total / k) ** 2).clamp_min(0) * unbiased
        equal = self.largest[0] - self.least <= self.rounding * self.largest[0].abs().clamp_min(1)
        value = self.log_powers[0] - math.log(k)
        return {
            "log_evidence": value,
            "elbo": torch.minimum(self.origin + self.total / k, value),
            "mc_se": (chi2 / k).sqrt(),
            "bias": -chi2 / (2 * k),
            "ess": ess,
            "pareto_k": torch.where(equal, math.nan, pareto_k(self.largest, k)),
            "elbo_mc_se": (variance / k).sqrt(),
            "distortion": -self.likelihood / k,
            "jackknife": self._jackknife(value) if k > 1 else torch.full_like(value, math.nan),
        }

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
