"""The tail shape of importance weights."""

import math

import torch
from torch import Tensor


def tail_length(samples: int) -> int:
    """How many of the weights count as their tail."""
    return math.ceil(min(samples / 5, 3 * math.sqrt(samples)))


def pareto_k(log_weights: Tensor, samples: int | None = None) -> Tensor:
    r"""Estimate the shape k of the generalised Pareto tail of weights; their moments of order below 1/k exist.

    It is the posterior mean under the profile likelihood of the largest :math:`\min(k/5, 3\sqrt{k})` weights (A New and
    Efficient Estimation Method for the Generalized Pareto Distribution, Zhang and Stephens 2009), shrunk weakly towards
    one half.

    Args:
        log_weights: shape (k, n); only the largest are read.
        samples: how many weights these are the largest of; all of them by default.

    Returns:
        The shape of each datum, (n,); NaN below 25 samples, or if the tail is constant.

    References:
        Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry 2024), section 3 and appendix C.
    """
    samples = len(log_weights) if samples is None else samples
    n = log_weights.shape[1]
    if samples < 25:
        return log_weights.new_full((n,), math.nan)
    length = tail_length(samples)
    top = log_weights.topk(length + 1, 0).values
    top = (top - top[0]).double()
    excess = (top[:-1].exp() - top[-1].exp()).flip(0).T  # (n, tail), ascending
    constant = excess[:, -1] <= 0
    excess = torch.where(constant.unsqueeze(-1), 1.0, excess.clamp_min(torch.finfo(torch.float64).tiny))
    grid = 30 + int(math.sqrt(length))
    quartile = excess[:, int(length / 4 + 0.5) - 1].unsqueeze(-1)
    steps = 1 - (grid / (torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device) - 0.5)).sqrt()
    theta = steps / (3 * quartile) + 1 / excess[:, -1:]  # (n, grid)
    shape = torch.stack([torch.log1p(-one.unsqueeze(-1) * excess).mean(-1) for one in theta.T], -1)
    profile = length * (torch.log(-theta / shape) - shape - 1)
    weights = torch.softmax(profile, -1)
    best = (weights * theta).sum(-1, keepdim=True)
    k = torch.log1p(-best * excess).mean(-1)
    return torch.where(constant, math.nan, (length * k + 10 * 0.5) / (length + 10))
