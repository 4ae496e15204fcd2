r"""Evidence: importance-weighted estimates of log p(x), with their error.

With weights :math:`w_i = p(x, z_i) / q(z_i \mid x)`, :math:`z_i \sim q`, the estimate
:math:`\log \frac1k \sum_i w_i` is on average a lower bound of log p(x) that rises with k (Importance Weighted
Autoencoders, Burda, Grosse and Salakhutdinov 2016). Its error and bias follow from the weights' relative variance
:math:`\chi^2` (Debiasing Evidence Approximations, Nowozin 2018). The largest weights show whether that variance exists
at all (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry 2024).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_int
from ppl_vae._progress import track
from ppl_vae.evaluation.nested import inner_draws
from ppl_vae.evaluation.pareto import shape_error
from ppl_vae.evaluation.weight_sums import WeightSums
from ppl_vae.evaluation.weights import Draws, weight_blocks
from ppl_vae.programs.parts import in_parts
from ppl_vae.programs.precision import Precision
from ppl_vae.programs.target import BLOCK, Target


@dataclass(frozen=True)
class Evidence:
    r"""Evidence of each datum, in nats: tensors of shape (n,), in double precision.

    Args:
        log_evidence: :math:`\log \frac1k \sum_i w_i`.
        elbo: :math:`\frac1k \sum_i \log w_i`, from the same weights, so never above `log_evidence`.
        mc_se: Monte Carlo standard error of `log_evidence`, :math:`\sqrt{\chi^2 / k}`, with `rounding` in it.
        bias: its bias to first order, :math:`-\chi^2 / 2k`.
        ess: effective sample size, :math:`(\sum w)^2 / \sum w^2`.
        pareto_k: shape of the weights' upper tail; NaN below 25 samples and where all weights are equal to rounding.
        elbo_mc_se: Monte Carlo standard error of `elbo`.
        distortion: :math:`-\frac1k \sum_i \log p(x \mid z_i)`, from the same draws; `elbo` is -(rate + distortion).
        jackknife: the estimate freed of its first-order bias by leaving out each sample in turn,
            :math:`k L_k - (k - 1) \frac1k \sum_i L_{k-1}^{(-i)}`. It is no bound, and noisier than `log_evidence`.
        shift: how far log p(x) may lie above `log_evidence` for weights that no draw showed: 0 for most data, infinite
            where the error cannot be known.
        rounding: error of `log_evidence` by the rounding of a program in single precision, 0 in double precision. Data
            share it, so that it does not average out.
        samples: their number k.
        inner: draws of local latents for each draw of the globals, 1 for plain weights (`ppl_vae.evaluation.nested`).
        lowered: of products in lower precision, what that adds to log p(x): the `mean` and the `largest` change over
            `n` data by `samples` draws, in nats; None of others.
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
    shift: Tensor
    rounding: Tensor
    samples: int
    inner: int = 1
    lowered: dict[str, Any] | None = None

    @property
    def rate(self) -> Tensor:
        r""":math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))` of each datum, from the same draws."""
        return -self.elbo - self.distortion

    @property
    def kind(self) -> Literal["estimate", "lower bound"]:
        r"""Whether the mean over the data is an estimate, with an `interval`, or only a lower bound.

        It is an estimate if the weights have a variance, so that an error bar means something, as far as the mean can
        tell:

        - No datum could move the mean by much. A datum is bad if its `mc_se` exceeds 1/2, if there are too few samples
          to tell, or if the tail shape :math:`\hat k` of its M largest weights exceeds 1/2 by three standard errors,
          :math:`3 (1 + \hat k) / \sqrt M`. The largest weight's share u of the sum says how far log p(x) may lie above
          its estimate, its `shift`: :math:`\log(1 + u / (1 - k))`, with k one error above :math:`\hat k`, infinite
          from :math:`k = 1` on and without a shape. Together the shifts may move the mean by half the width of the
          interval of the others at most.
        - The others have a variance on average: the mean of :math:`\hat k`, each weighted by its share of the variance
          of the mean, lies its standard error or more below 1/2. A single datum needs the whole margin, in a set of
          n the errors average out.

        References:
            Estimating Tails of Probability Distributions (Smith 1987), for the error of :math:`\hat k`.
        """
        return "lower bound" if self.interval is None else "estimate"

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean of log p(x) over the data, in nats; None for a lower bound.

        Its centre is the mean freed of its bias. Its half width is 1.96 standard errors, plus the bias, which is known
        to first order only, plus `rounding`, plus what bad data may add (see `kind`).
        """
        good = self.shift == 0
        shift = float(self.shift.mean())
        if not (shift <= self._half_width(good) and self._typical_shape(good) <= 0.5):
            return None
        centre, half = float((self.log_evidence - self.bias).mean()), self._half_width(torch.ones_like(good)) + shift
        return centre - half, centre + half

    def _half_width(self, which: Tensor) -> float:
        """1.96 standard errors, the bias and the rounding that some of the data bring to the mean."""
        error, known = self.mc_se[which].norm(), (self.rounding - self.bias)[which].sum()
        return float(1.96 * error + known) / len(which)

    def _typical_shape(self, which: Tensor) -> float:
        """One standard error above the mean tail shape of data, weighted by their share of the variance."""
        variance, shape = self.mc_se[which].square(), self.pareto_k[which].nan_to_num(0.0)
        variance = variance / variance.sum().clamp_min(torch.finfo(variance.dtype).tiny)
        error = (variance * shape_error(shape, self.samples)).norm()
        return float((variance * shape).sum() + error)

    def worst(self, most: int = 10) -> dict[str, Any]:
        """The data that could move the mean most, and the mean without them.

        Args:
            most: how many rows to name at most.

        Returns:
            `n`, the number of bad data (see `kind`); `rows`, the worst first, with the `pareto_k` and `mc_se` of each;
            `mean_without`, the mean of `log_evidence` over the others, in nats per datum.
        """
        bad = self.shift > 0
        order = torch.argsort(self.shift.nan_to_num(posinf=1e9) + self.mc_se.nan_to_num(1.0), descending=True)
        rows = order[bad[order]][:most]

        def known(values: Tensor) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values[rows].tolist()]

        return {
            "n": int(bad.sum()),
            "rows": rows.tolist(),
            "pareto_k": known(self.pareto_k),
            "mc_se": known(self.mc_se),
            "mean_without": None if bool(bad.all()) else float(self.log_evidence[~bad].mean()),
        }

    def summary(self) -> dict[str, Any]:
        """Means in nats per datum, with standard errors over data (`se`) and of the estimate (`mc_se`)."""
        n = len(self.log_evidence)

        def over_data(values: Tensor, errors: Tensor) -> dict[str, Any]:
            spread = float(values.std()) / math.sqrt(n) if n > 1 else None
            error = math.hypot(float(errors.norm()) / n, float(self.rounding.mean()))
            return {"mean": float(values.mean()), "se": spread, "mc_se": error}

        shapes = self.pareto_k[~self.pareto_k.isnan()]
        tail: dict[str, float | None] = dict.fromkeys(("median", "max", "above_0.5", "above_0.7"))
        if len(shapes):
            above = {f"above_{limit}": float((shapes > limit).double().sum()) / n for limit in (0.5, 0.7)}
            tail = {"median": float(shapes.median()), "max": float(shapes.max()), **above}
        interval = self.interval
        evidence = over_data(self.log_evidence, self.mc_se) | {
            "bias": float(self.bias.mean()),
            "kind": self.kind,
            "interval": None if interval is None else list(interval),
        }
        return {
            "n": n,
            "samples": self.samples,
            "elbo": over_data(self.elbo, self.elbo_mc_se),
            "log_evidence": evidence,
            "rate": float(self.rate.mean()),
            "distortion": float(self.distortion.mean()),
            "ess": {"median": float(self.ess.median()), "min": float(self.ess.min())},
            "pareto_k": tail,
            "worst": self.worst(),
            **({} if self.lowered is None else {"lowered": self.lowered}),
        }

    @classmethod
    def of(cls, log_weights: Tensor) -> "Evidence":
        """Evidence of given log weights, (k, n), such as those of `log_weights`; its distortion is NaN.

        Example:
            >>> import torch
            >>> weights = torch.tensor([[-3.0, -3.5], [-3.0, -2.5]], dtype=torch.float64)
            >>> torch.allclose(Evidence.of(weights).log_evidence.exp(), weights.exp().mean(0))
            True
        """
        weights = log_weights.double()
        sums = WeightSums(len(weights), log_weights.dtype)
        sums.add(weights, torch.full_like(weights, math.nan), weights)
        figures: dict[str, Any] = {**sums.figures()}
        return cls(**figures, rounding=torch.zeros_like(figures["bias"]), samples=len(weights))


@torch.no_grad()
def log_weights(program: Any, x: Any = None, samples: int = 1000, *, inner: int | None = None, seed: int = 0) -> Tensor:
    r"""Log importance weights :math:`\log p(x, z_i) - \log q(z_i \mid x)`, read off traces of model and guide.

    Sites count unscaled and with their masks, summed over all dimensions but particles and data. Draws come in blocks
    of 100 data, keyed by the seed and the block's number: data that begin a set have the same draws alone as within it.
    Other subsets have draws of their own, since a random stream for each datum would cost more than the weights. Where
    the whole data set counts as one datum, n is 1.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        samples: draws per datum, k.
        inner: draws of local latents for each draw of the globals, where locals are independent given the globals; 20
            by default of such programs, 1 of others.
        seed: of the draws; the global random state is left alone.

    Returns:
        Nats, shape (k, n), in double precision, without gradients.

    Raises:
        ValueError: If `samples` is below 1, the data do not fit, or the program breaks the contract.
    """
    target = Target.of(program, x)
    blocks = weight_blocks(target, check_int("samples", samples), seed, inner_draws(target, inner))
    return torch.cat([torch.cat([draws.weights for draws in block]) for block in blocks], 1)


@torch.no_grad()
def log_evidence(
    program: Any,
    x: Any = None,
    samples: int = 1000,
    *,
    inner: int | None = None,
    precision: Precision = "full",
    seed: int = 0,
) -> Evidence:
    r"""Estimate log p(x) of each datum, with its error, by importance sampling from the guide.

    Streams over fixed blocks of data and samples. Between blocks it keeps only the largest weights of each datum, whose
    number grows with the square root of the samples.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        samples: draws per datum, k.
        inner: draws of local latents for each draw of the globals, where locals are independent given the globals; 20
            by default of such programs, 1 of others.
        precision: of the factors of large matrix products on a CPU: `full`, that of the program, or `bfloat16`, which
            takes about half the time. What it changes is measured on the first data, reported as `lowered`, and part
            of `rounding`.
        seed: of the draws; the global random state is left alone.

    Returns:
        The evidence, from the same weights that `log_weights` returns.

    Raises:
        ValueError: If `samples` is below 1, the data do not fit, or the program breaks the contract.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), equation 8.
    """
    check_choice("precision", precision, get_args(Precision))
    return estimate_evidence(Target.of(program, x), samples, seed, inner, precision=precision)


@torch.no_grad()
def estimate_evidence(
    target: Target,
    samples: int,
    seed: int,
    inner: int | None,
    look: Callable[[int, Draws], None] | None = None,
    first: int = 0,
    precision: Precision = "full",
) -> Evidence:
    """What `log_evidence` returns, with a look at the draws of each block of data, by its number, in passing.

    Blocks are numbered from `first`, so that a part of a data set has the draws that it has within the whole.
    """
    samples, inner = check_int("samples", samples), inner_draws(target, inner)
    how = samples, seed, inner, precision
    alone = look is not None or first > 0
    made = [_figures(target, first, *how, look)] if alone else in_parts(target, _figures, BLOCK, *how)
    figures = {name: torch.cat([part[name] for part, _ in made]) for name in made[0][0]}
    figures["rounding"] = _rounding(target, figures["log_evidence"], seed)
    change: Any = None
    if (measured := made[0][1]) is not None:
        weights, lowered = measured
        figures["rounding"] = figures["rounding"].hypot(lowered.square().mean().sqrt())
        moved = weights.logsumexp(0) - (weights - lowered).logsumexp(0)
        change = {"mean": float(moved.mean()), "largest": float(moved.abs().amax())}
        change |= {"samples": len(weights), "n": len(moved)}
    elif precision != "full":
        warnings.warn(
            f"Products stay in full precision: {precision!r} takes a CPU and a program whose operations can be "
            "recorded, without enumerated or nested sites.",
            stacklevel=5,  # the caller of `log_evidence`
        )
    if target.structure.enumerated and not target.structure.latents:  # then nothing was drawn
        figures |= {name: torch.zeros_like(figures[name]) for name in ("mc_se", "bias", "elbo_mc_se", "shift")}
    figures["mc_se"] = figures["mc_se"].hypot(figures["rounding"])
    return Evidence(**figures, samples=samples, inner=inner, lowered=change)


@torch.no_grad()
def _figures(
    target: Target,
    first: int,
    samples: int,
    seed: int,
    inner: int,
    precision: Precision,
    look: Callable[[int, Draws], None] | None = None,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """The fields of `Evidence` without rounding, and log weights with what lower precision added to them, if it did."""
    parts, lowered = [], None
    blocked = enumerate(weight_blocks(target, samples, seed, inner, first, precision), first)
    what = f"evidence by {samples:,} samples each: {{}} blocks of data"
    for number, blocks in track(blocked, what, -(-target.n // BLOCK)):
        sums = WeightSums(samples, target.dtype or torch.get_default_dtype())
        for draws in blocks:
            sums.add(draws.weights, draws.likelihood, draws.bounds)
            lowered = lowered if draws.lowered is None else (draws.weights, draws.lowered)
            if look is not None:
                look(number, draws)
        parts.append(sums.figures())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, lowered


def _rounding(target: Target, log_evidence: Tensor, seed: int) -> Tensor:
    """Error of the log weights in single precision, (n,): that of two draws of the first block, in their size."""
    if target.dtype in (None, torch.float64):
        return torch.zeros_like(log_evidence)
    block = target.rows(slice(0, BLOCK))
    model, guide = block.traces(2, seed, "rounding")
    weights, z = block.log_weights(model, guide, 2), block.flatten(guide)
    typical = 4 * torch.finfo(target.dtype).eps * weights
    try:
        double = block.to_double()
        with double.running(seed, "rounding"):
            error = weights - (double.score("model", z) - double.score("guide", z))
        error = torch.where(error.isfinite(), error, typical)  # the points of an autoguide lie elsewhere in double
    except (RuntimeError, ValueError, TypeError, NotImplementedError):  # of programs that run in their precision alone
        error = typical
    size = weights.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return error.square().mean().sqrt() * torch.hypot(log_evidence / size, torch.ones_like(log_evidence))
