r"""Comparison: the approximate posterior beside the exact one, datum by datum."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.batches import as_batch
from ppl_vae.exact import Gaussian, gaussians
from ppl_vae.latents import packed
from ppl_vae.traces import log_density, prepare, scope, seeded, structure, trace_pair

__all__ = ["Comparison", "compare_posteriors"]

_DATA = 100  # data at a time
_DRAWS = 100  # draws at a time


@dataclass(frozen=True)
class Comparison:
    r"""How far q(z|x) is from p(z|x): tensors of shape (n,), in double precision.

    Args:
        kl: :math:`\mathrm{KL}(q \,\|\, p)` in nats.
        wasserstein: the 2-Wasserstein distance, not squared, in units of z; where q is not Gaussian, that of the
            Gaussians of the same moments, which is a lower bound of it.
        mean_error: distance of the means, in units of p's marginal standard deviations.
        scale_ratio: geometric mean over the latents of q's marginal standard deviation divided by p's.
        gap: log p(x) - ELBO in nats, which equals `kl`.
        error: Monte Carlo standard error of `kl` and `gap`; 0 where they are in closed form.
    """

    kl: Tensor
    wasserstein: Tensor
    mean_error: Tensor
    scale_ratio: Tensor
    gap: Tensor
    error: Tensor


def compare_posteriors(program: Any, x: Any, *, draws: int = 1000, seed: int = 0) -> Comparison:
    r"""Compare a guide with the exact posterior of its linear-Gaussian model.

    In closed form where the guide is Gaussian; else by sampling from the guide, whose log weights are
    :math:`\log p(x) - \log q(z \mid x) + \log p(z \mid x)`, so that their distance from the exact log p(x) is the KL.

    Args:
        program: a program whose model is linear-Gaussian, with any guide.
        x: data, a tensor (n, *x) or a batch dict.
        draws: samples a datum from a guide that is not Gaussian, more than there are latents.
        seed: of the draws; the global random state is left alone.

    Returns:
        The distances of each datum.

    Raises:
        ValueError: where the model is not Gaussian in the latent variables, or for too few draws.

    References:
        KL and 2-Wasserstein distance of Gaussians: The Frechet distance between multivariate normal distributions
        (Dowson and Landau 1982), equation 16; Pattern Recognition and Machine Learning (Bishop 2006), exercise 2.13.
    """
    p = gaussians(program, x, "model")
    try:
        q = gaussians(program, x, "guide")
    except ValueError:
        return _sampled(program, x, p, draws, seed)
    apart = q.loc - p.loc
    trace = (p.precision * q.covariance).sum((-2, -1))
    distance = (apart.unsqueeze(-2) @ p.precision @ apart.unsqueeze(-1)).flatten()
    size = apart.shape[-1]
    entropy = 0.5 * (size * (1 + math.log(2 * math.pi)) - torch.logdet(q.precision))
    peak = p.log_normaliser - 0.5 * size * math.log(2 * math.pi) + 0.5 * torch.logdet(p.precision)
    elbo = peak - 0.5 * (distance + trace) + entropy
    kl = 0.5 * (trace + distance - size - torch.logdet(p.precision) + torch.logdet(q.precision))
    return _comparison(p, q.loc, q.covariance, kl, p.log_normaliser - elbo, torch.zeros_like(kl))


def _comparison(p: Gaussian, loc: Tensor, covariance: Tensor, kl: Tensor, gap: Tensor, error: Tensor) -> Comparison:
    scale_p, scale_q = (one.diagonal(dim1=-2, dim2=-1).sqrt() for one in (p.covariance, covariance))
    return Comparison(
        kl=kl,
        wasserstein=wasserstein(p.loc, p.covariance, loc, covariance),
        mean_error=((loc - p.loc) / scale_p).norm(dim=-1),
        scale_ratio=(scale_q / scale_p).log().mean(-1).exp(),
        gap=gap,
        error=error,
    )


@torch.no_grad()
def _sampled(program: Any, x: Any, p: Gaussian, draws: int, seed: int) -> Comparison:
    size = p.loc.shape[1]
    if draws <= size + 1:
        raise ValueError(
            f"Expected `draws` to exceed the number of latents, {size}, by two or more, for their covariance under a "
            f"guide that is not Gaussian; got {draws}."
        )
    batch = prepare(program, as_batch(x))
    found = structure(program, batch, seed=seed)
    parts = []
    for number, start in enumerate(range(0, len(p.loc), _DATA)):
        rows = slice(start, start + _DATA)
        part = {key: value[rows] for key, value in batch.items()}
        n, codes, weights = len(p.loc[rows]), [], []
        for block, done in enumerate(range(0, draws, _DRAWS)):
            k = min(_DRAWS, draws - done)
            with scope(program), seeded(seed, "compare", number, block, device=p.loc.device):
                model, guide = trace_pair(program, part, k, found.nesting)
                codes.append(packed(model, found))
                weights.append(log_density(model, k, n) - log_density(guide, k, n))
        z, gaps = torch.cat(codes), p.log_normaliser[rows] - torch.cat(weights)
        centred = (z - z.mean(0)).transpose(0, 1)
        parts.append((z.mean(0), centred.mT @ centred / (draws - 1), gaps.mean(0), gaps.std(0) / draws**0.5))
    loc, covariance, gap, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return _comparison(p, loc, covariance, gap, gap, error)


def wasserstein(loc_p: Tensor, covariance_p: Tensor, loc_q: Tensor, covariance_q: Tensor) -> Tensor:
    r"""Give the 2-Wasserstein distance of Gaussians, not squared.

    :math:`W_2^2 = |m_p - m_q|^2 + \mathrm{tr}(S_p + S_q - 2 (S_p^{1/2} S_q S_p^{1/2})^{1/2})`. The trace of the last
    root is the sum of the singular values of :math:`L_p^\top L_q`, with Cholesky factors L.

    Args:
        loc_p: shape (n, z).
        covariance_p: shape (n, z, z).
        loc_q: shape (n, z).
        covariance_q: shape (n, z, z).
    """
    cross = torch.linalg.svdvals(torch.linalg.cholesky(covariance_p).mT @ torch.linalg.cholesky(covariance_q)).sum(-1)
    traces = (covariance_p + covariance_q).diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((loc_p - loc_q).square().sum(-1) + traces - 2 * cross).clamp_min(0).sqrt()
