r"""Comparison: the approximate posterior beside the exact one, or a reference for it, datum by datum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.programs._old_draws import packed
from ppl_vae.programs.closed_form import Gaussian, gaussians
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.traces import Structure, check_batch, log_density, structure, trace_pair

_DATA = 100  # data at a time
_DRAWS = 100  # draws at a time


@dataclass(frozen=True)
class Comparison:
    r"""How far q(z|x) is from p(z|x): tensors of shape (n,), in double precision.

    Args:
        kl: :math:`\mathrm{KL}(q \,\|\, p)` in nats.
        wasserstein: the 2-Wasserstein distance, not squared, in units of z; where q or p is not Gaussian, that of the
            Gaussians of the same moments, which is a lower bound of it (Gelbrich).
        mean_error: distance of the means, in units of p's marginal standard deviations.
        scale_ratio: geometric mean over the latents of q's marginal standard deviation divided by p's.
        gap: log p(x) - ELBO in nats, which equals `kl`.
        error: standard error of `kl` and `gap`, of the draws and of the reference's log p(x) together; 0 where they are
            in closed form.
    """

    kl: Tensor
    wasserstein: Tensor
    mean_error: Tensor
    scale_ratio: Tensor
    gap: Tensor
    error: Tensor


def compare_posteriors(program: Any, x: Any, *, reference: Any = None, draws: int = 1000, seed: int = 0) -> Comparison:
    r"""Compare a guide with the exact posterior of a linear-Gaussian model, or with a reference for any other.

    Without a reference, in closed form where the guide is Gaussian too. Else by sampling from the guide, whose log
    weights are :math:`\log p(x) - \log q(z \mid x) + \log p(z \mid x)`, so that their mean lies the KL below log p(x).
    The moments of a Gaussian guide are exact, those of another are those of its draws.

    Args:
        program: a program whose model is linear-Gaussian, or any that has a reference; with any guide.
        x: data, a tensor (n, *x) or a batch dict.
        reference: a `Reference` of the same data, from `reference_posterior(program, x)`, whose log p(x) and moments
            stand for the exact ones. NUTS has no log p(x): `kl`, `gap` and `error` are NaN. Annealing that has not
            settled is low on average, and so is the KL; moments by sampling have an error that no field holds.
        draws: samples a datum, at least 2; of a guide that is not Gaussian, more than there are latents.
        seed: of the draws; the global random state is left alone.

    Returns:
        The distances of each datum.

    Raises:
        ValueError: where the model is not Gaussian in the latent variables and there is no reference, for one of other
            data, or for too few draws.

    References:
        KL and 2-Wasserstein distance of Gaussians: The Frechet distance between multivariate normal distributions
        (Dowson and Landau 1982), equation 16; Pattern Recognition and Machine Learning (Bishop 2006), exercise 2.13.
        That it bounds the distance of others from below: On a Formula for the L2 Wasserstein Metric between Measures on
        Euclidean and Hilbert Spaces (Gelbrich 1990), theorem 2.1.
    """
    draws = check_int("draws", draws, 2)
    batch = check_batch(program, as_batch(x))
    found = structure(program, batch, seed=seed)
    exact = None if reference is not None else _exact(program, x)
    try:
        q = gaussians(program, x, role="guide")
    except (ValueError, NotImplementedError):  # of a guide that scores its own draws alone
        q = None
    if exact is None or q is None:
        moments, bound, error = _sampled(program, batch, found, draws, seed, gaussian=q is not None)
        moments = moments if q is None else (q.loc, q.covariance)
        if exact is not None:
            gap = exact.log_normaliser - bound
            return _comparison((exact.loc, exact.covariance), moments, gap, gap, error)
        truth, doubt, *posterior = _known(reference, moments[0])
        return _comparison(posterior, moments, truth - bound, truth - bound, torch.hypot(error, doubt))
    apart = q.loc - exact.loc
    trace = (exact.precision * q.covariance).sum((-2, -1))
    distance = (apart.unsqueeze(-2) @ exact.precision @ apart.unsqueeze(-1)).flatten()
    size = apart.shape[-1]
    entropy = 0.5 * (size * (1 + math.log(2 * math.pi)) - torch.logdet(q.precision))
    peak = exact.log_normaliser - 0.5 * size * math.log(2 * math.pi) + 0.5 * torch.logdet(exact.precision)
    elbo = peak - 0.5 * (distance + trace) + entropy
    kl = 0.5 * (trace + distance - size - torch.logdet(exact.precision) + torch.logdet(q.precision))
    gap = exact.log_normaliser - elbo
    return _comparison((exact.loc, exact.covariance), (q.loc, q.covariance), kl, gap, torch.zeros_like(kl))


def _comparison(p: Sequence[Tensor], q: Sequence[Tensor], kl: Tensor, gap: Tensor, error: Tensor) -> Comparison:
    """Compare the moments of p and q, each a mean (n, z) and a covariance (n, z, z)."""
    scale_p, scale_q = (covariance.diagonal(dim1=-2, dim2=-1).sqrt() for _, covariance in (p, q))
    return Comparison(
        kl=kl,
        wasserstein=wasserstein(*p, *q),
        mean_error=((q[0] - p[0]) / scale_p).norm(dim=-1),
        scale_ratio=(scale_q / scale_p).log().mean(-1).exp(),
        gap=gap,
        error=error,
    )


def _exact(program: Any, x: Any) -> Gaussian:
    """Give the exact posterior, or name the remedy where there is none in closed form."""
    try:
        return gaussians(program, x, role="model")
    except ValueError as error:
        raise ValueError(
            f"{error} For other models give a reference: compare_posteriors(program, x, "
            "reference=reference_posterior(program, x))."
        ) from error


def _known(reference: Any, loc: Tensor) -> list[Tensor]:
    """Give log p(x), its error, and the posterior's moments, of the data whose guide's means are given."""
    if not hasattr(reference, "covariance") or reference.loc.shape != loc.shape:
        given = tuple(reference.loc.shape) if hasattr(reference, "covariance") else type(reference).__name__
        raise ValueError(
            f"Expected `reference` to be a Reference of the same data, with means of shape {tuple(loc.shape)}; got "
            f"{given}. reference_posterior(program, x) gives one."
        )
    return [getattr(reference, name).to(loc) for name in ("log_evidence", "error", "loc", "covariance")]


@torch.no_grad()
def _sampled(
    program: Any, batch: dict[str, Tensor], found: Structure, draws: int, seed: int, *, gaussian: bool = False
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Give the moments of the guide's draws, (n, z) and (n, z, z), the ELBO in nats, (n,), and its standard error."""
    first = next(iter(batch.values()))
    parts = []
    for number, start in enumerate(range(0, len(first), _DATA)):
        part = {key: value[start : start + _DATA] for key, value in batch.items()}
        n, codes, weights = len(first[start : start + _DATA]), [], []
        for block, done in enumerate(range(0, draws, _DRAWS)):
            k = min(_DRAWS, draws - done)
            with scope(program), fork_rng(seed, "compare", number, block, device=first.device):
                model, guide = trace_pair(program, part, k, found.nesting)
                codes.append(packed(model, found))
                weights.append(log_density(model, k, n) - log_density(guide, k, n))
        z, weight = torch.cat(codes), torch.cat(weights)
        size = z.shape[-1]
        if not gaussian and draws <= size + 1:
            raise ValueError(
                f"Expected `draws` to exceed the number of latents, {size}, by two or more, for their covariance under "
                f"a guide that is not Gaussian; got {draws}."
            )
        centred = (z - z.mean(0)).transpose(0, 1)
        parts.append((z.mean(0), centred.mT @ centred / (draws - 1), weight.mean(0), weight.std(0) / draws**0.5))
    loc, covariance, bound, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return (loc, covariance), bound, error


def wasserstein(loc_p: Tensor, covariance_p: Tensor, loc_q: Tensor, covariance_q: Tensor) -> Tensor:
    r"""Give the 2-Wasserstein distance of Gaussians, not squared.

    :math:`W_2^2 = |m_p - m_q|^2 + \mathrm{tr}(S_p + S_q - 2 (S_p^{1/2} S_q S_p^{1/2})^{1/2})`. The trace of the last
    root is the sum of the singular values of :math:`L_p^\top L_q`, with factors :math:`S = L L^\top`.

    Args:
        loc_p: shape (n, z).
        covariance_p: shape (n, z, z).
        loc_q: shape (n, z).
        covariance_q: shape (n, z, z).
    """
    cross = torch.linalg.svdvals(_root(covariance_p).mT @ _root(covariance_q)).sum(-1)
    traces = (covariance_p + covariance_q).diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((loc_p - loc_q).square().sum(-1) + traces - 2 * cross).clamp_min(0).sqrt()


def _root(covariance: Tensor) -> Tensor:
    """Factor covariances (n, z, z): by Cholesky, or by eigenvalues where they are singular, as of few chains."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(covariance[failed > 0])
        factor[failed > 0] = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return factor
