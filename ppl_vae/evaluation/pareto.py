"""The tail shape of importance weights."""

import math

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny
_LOG_TINY = math.log(_TINY)


def tail_length(samples: int) -> int:
    """How many of the weights count as their tail."""
    return math.ceil(min(samples / 5, 3 * math.sqrt(samples)))


def shape_error(shape: Tensor, samples: int) -> Tensor:
    """Standard error of `pareto_k` to first order, (1 + k) / sqrt(M) for a tail of M weights (Smith 1987)."""
    return (1 + shape) / math.sqrt(tail_length(samples))


def pareto_k(log_weights: Tensor, samples: int | None = None, tolerance: Tensor | float = 1e-9) -> Tensor:
    r"""Estimate the shape k of the generalised Pareto tail of weights; their moments of order below 1/k exist.

    It is the posterior mean under the profile likelihood of the largest :math:`\min(k/5, 3\sqrt{k})` weights (A New and
    Efficient Estimation Method for the Generalized Pareto Distribution, Zhang and Stephens 2009), shrunk weakly towards
    one half.

    Weights that underflow beside the largest are left out of the tail, as those of draws where the density is nought;
    five are kept at the least.

    Weights of discrete latents come in copies. The copies of a value are spread evenly, in logs, over the gap down to
    the next lower one, so that a largest value seen often makes a light tail, and a rare one far above the others a
    heavy tail.

    Args:
        log_weights: shape (k, n); only the largest are read.
        samples: how many weights these are the largest of; all of them by default.
        tolerance: nats within which weights are copies, a number or (n,).

    Returns:
        The shape of each datum, (n,); NaN below 25 samples, or if the tail is constant.

    References:
        Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry 2024), section 3 and appendix C.
    """
    return _tail(log_weights, len(log_weights) if samples is None else samples, tolerance)[0]


def pareto_smoothed(log_weights: Tensor) -> Tensor:
    """Log weights (k, n) whose largest are replaced by the quantiles of their generalised Pareto tail, in their order.

    They are as they were below 25 samples, if the tail is constant, or if some of it underflows.

    References:
        Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry 2024), section 2.
    """
    samples, length = len(log_weights), tail_length(len(log_weights))
    shape, scale = _tail(log_weights, samples, 1e-9)
    top = log_weights.double().topk(min(length + 1, samples), 0)
    levels = (torch.arange(len(top.values) - 1, 0, -1, device=shape.device).double().unsqueeze(-1) - 0.5) / length
    excess = scale * torch.expm1(-shape * torch.log1p(-levels)) / shape
    tail = ((top.values[-1] - top.values[0]).exp() + excess).log().clamp_max(0.0) + top.values[0]
    return torch.where(scale.isnan(), log_weights.double(), log_weights.double().scatter(0, top.indices[:-1], tail))


def _tail(log_weights: Tensor, samples: int, tolerance: Tensor | float) -> Tensor:
    """Shape of the tail of each datum and its scale relative to the largest weight, (2, n)."""
    n = log_weights.shape[1]
    if samples < 25:
        return log_weights.new_full((2, n), math.nan)
    length = tail_length(samples)
    top = log_weights.topk(length + 1, 0).values
    top = (top - top[0]).double().clamp_min(_LOG_TINY - 1)
    weights = _spread(top, tolerance).exp()
    excess = (weights[:-1] - weights[-1]).flip(0).T  # (n, tail), ascending
    constant = excess[:, -1] <= 0
    counts = (excess > _TINY).sum(-1).clamp_min(min(5, length))
    excess = torch.where(constant.unsqueeze(-1), 1.0, excess.clamp_min(_TINY))
    found = torch.zeros_like(excess[:, :2].T)
    for count in counts.unique().tolist():
        found[:, counts == count] = _fit(excess[counts == count, -count:])
    found[1, counts < length] = math.nan
    return torch.where(constant, math.nan, found)


def _fit(excess: Tensor) -> Tensor:
    """Shape and scale, (2, n), of each row's generalised Pareto distribution, of ascending excesses (n, tail)."""
    length = excess.shape[1]
    grid = 30 + int(math.sqrt(length))
    quartile = excess[:, int(length / 4 + 0.5) - 1].unsqueeze(-1)
    steps = 1 - (grid / (torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device) - 0.5)).sqrt()
    theta = steps / (3 * quartile) + 1 / excess[:, -1:]  # (n, grid)
    shape = torch.stack([torch.log1p(-one.unsqueeze(-1) * excess).mean(-1) for one in theta.T], -1)
    profile = length * (torch.log(-theta / shape) - shape - 1)
    best = (torch.softmax(profile, -1) * theta).sum(-1, keepdim=True)
    k = torch.log1p(-best * excess).mean(-1)
    return torch.stack([(length * k + 10 * 0.5) / (length + 10), -k / best.squeeze(-1)])


def _spread(top: Tensor, tolerance: Tensor | float) -> Tensor:
    """Falling log weights (k, n), the copies of each value spread evenly over the gap to the next lower value.

    The lowest value may have more copies below: they are as dense as those of the next higher one.
    """
    values = (-top / tolerance).round()
    new = torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])
    tied = ~new.all(0) & (values[0] != values[-1])
    if not bool(tied.any()):
        return top
    length, w, new = len(top), top[:, tied], new[:, tied]
    place = torch.arange(length, device=top.device).unsqueeze(-1).expand_as(w)
    start = torch.where(new, place, 0).cummax(0).values  # of the copies of this value
    later = torch.where(new, place, length).flip(0).cummin(0).values.flip(0)
    end = torch.cat([later[1:], torch.full_like(later[:1], length)])  # where the next lower value starts
    own, above = w.gather(0, start), w.gather(0, (start - 1).clamp_min(0))
    share = (end - start) / (start - start.gather(0, (start - 1).clamp_min(0))).clamp_min(1)  # beside the next higher
    below = torch.where(end < length, w.gather(0, end.clamp_max(length - 1)), own - (above - own) * share.clamp_max(1))
    spread = top.clone()
    spread[:, tied] = own - (own - below) * (place - start) / (end - start)
    return spread
