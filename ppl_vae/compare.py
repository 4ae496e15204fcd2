r"""Comparison: the approximate posterior beside the exact one, datum by datum."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.exact import gaussians

__all__ = ["Comparison", "compare_posteriors"]


@dataclass(frozen=True)
class Comparison:
    r"""How far q(z|x) is from p(z|x): tensors of shape (n,), in double precision.

    Args:
        kl: :math:`\mathrm{KL}(q \,\|\, p)` in nats.
        wasserstein: the 2-Wasserstein distance, not squared, in units of z.
        mean_error: distance of the means, in units of p's marginal standard deviations.
        scale_ratio: geometric mean over the latents of q's marginal standard deviation divided by p's.
        gap: log p(x) - ELBO in nats, which equals `kl`.
    """

    kl: Tensor
    wasserstein: Tensor
    mean_error: Tensor
    scale_ratio: Tensor
    gap: Tensor


def compare_posteriors(program: Any, x: Any) -> Comparison:
    r"""Compare a Gaussian guide with the exact posterior of its linear-Gaussian model, in closed form.

    Args:
        program: a linear-Gaussian program whose guide is Gaussian, in whatever form.
        x: data, a tensor (n, *x) or a batch dict.

    Returns:
        The distances of each datum.

    Raises:
        ValueError: where model or guide is not Gaussian in the latent variables.

    References:
        KL and 2-Wasserstein distance of Gaussians: The Frechet distance between multivariate normal distributions
        (Dowson and Landau 1982), equation 16; Pattern Recognition and Machine Learning (Bishop 2006), exercise 2.13.
    """
    p, q = gaussians(program, x, "model"), gaussians(program, x, "guide")
    apart = q.loc - p.loc
    trace = (p.precision * q.covariance).sum((-2, -1))
    distance = (apart.unsqueeze(-2) @ p.precision @ apart.unsqueeze(-1)).flatten()
    size = apart.shape[-1]
    entropy = 0.5 * (size * (1 + math.log(2 * math.pi)) - torch.logdet(q.precision))
    peak = p.log_normaliser - 0.5 * size * math.log(2 * math.pi) + 0.5 * torch.logdet(p.precision)
    elbo = peak - 0.5 * (distance + trace) + entropy
    kl = 0.5 * (trace + distance - size - torch.logdet(p.precision) + torch.logdet(q.precision))
    scale_p, scale_q = (one.covariance.diagonal(dim1=-2, dim2=-1).sqrt() for one in (p, q))
    return Comparison(
        kl=kl,
        wasserstein=wasserstein(p.loc, p.covariance, q.loc, q.covariance),
        mean_error=(apart / scale_p).norm(dim=-1),
        scale_ratio=(scale_q / scale_p).log().mean(-1).exp(),
        gap=p.log_normaliser - elbo,
    )


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
