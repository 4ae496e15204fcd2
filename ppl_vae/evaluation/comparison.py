r"""Comparison: the approximate posterior beside the exact one, or a reference for it, datum by datum."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.evaluation.weights import constant, trace_blocks
from ppl_vae.programs.closed_form import Gaussian, gaussians
from ppl_vae.programs.target import Target

_DRAWS = 100  # draws at a time


@dataclass(frozen=True)
class Comparison:
    r"""How far q(z|x) is from p(z|x): tensors of shape (n,), in double precision.

    Args:
        kl: :math:`\mathrm{KL}(q \,\|\, p)` in nats, which equals log p(x) - ELBO.
        wasserstein: the 2-Wasserstein distance, not squared, in units of z. If q or p is not Gaussian, it is that of
            the Gaussians of the same moments, a lower bound (Gelbrich).
        mean_error: distance of the means, in units of p's marginal standard deviations. Entries that are constant, as
            in a Cholesky factor, count neither here nor in `scale_ratio`.
        scale_ratio: geometric mean over the latents of q's marginal standard deviation divided by p's.
        error: standard error of `kl`, from the draws and the reference's log p(x) together; 0 in closed form.
    """

    kl: Tensor
    wasserstein: Tensor
    mean_error: Tensor
    scale_ratio: Tensor
    error: Tensor

    @property
    def gap(self) -> Tensor:
        """Log p(x) - ELBO in nats, which is `kl`."""
        return self.kl


def compare_posteriors(
    program: Any, x: Any = None, *, reference: Any = None, draws: int = 1000, seed: int = 0
) -> Comparison:
    r"""Compare a guide with the exact posterior of a linear-Gaussian model, or with a reference for any other.

    The comparison is in closed form if there is no reference and the guide is Gaussian. Otherwise it samples from the
    guide: its log weights are :math:`\log p(x) - \log q(z \mid x) + \log p(z \mid x)`, whose mean lies the KL below
    log p(x). The moments of a Gaussian guide are exact, those of any other guide are those of its draws.

    Args:
        program: a program, or a `Target`, whose model is linear-Gaussian, or any that has a reference; with any guide.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        reference: a `Reference` of the same data, from `reference_posterior(program, x)`, whose log p(x) and moments
            replace the exact ones. NUTS has no log p(x): `kl`, `gap` and `error` are NaN. If annealing has not
            settled, its log p(x) and so the KL are low on average. Moments by sampling carry an error that is not
            reported here.
        draws: samples per datum, at least 2; for a guide that is not Gaussian, more than there are latents.
        seed: of the draws; the global random state is left alone.

    Returns:
        The distances of each datum.

    Raises:
        ValueError: If the model is not Gaussian in the latent variables and there is no reference, the reference is of
            other data, or there are too few draws.

    References:
        KL and 2-Wasserstein distance of Gaussians: The Frechet distance between multivariate normal distributions
        (Dowson and Landau 1982), equation 16; Pattern Recognition and Machine Learning (Bishop 2006), exercise 2.13.
        Lower bound for other distributions: On a Formula for the L2 Wasserstein Metric between Measures on Euclidean
        and Hilbert Spaces (Gelbrich 1990), theorem 2.1.
    """
    draws = check_int("draws", draws, 2)
    target = Target.of(program, x)
    exact = _exact(target) if reference is None else None
    try:
        q = gaussians(target, role="guide")
    except (ValueError, NotImplementedError):  # NotImplementedError: the guide scores only its own draws
        q = None
    if exact is not None and q is not None:
        kl, posterior, moments = _kl(q, exact), [exact.loc, exact.covariance], [q.loc, q.covariance]
        error = exact.error + q.error
    else:
        moments, elbo, error = _sampled(target, draws, seed, q)
        if exact is not None:
            truth, doubt, posterior = exact.log_normaliser, exact.error, [exact.loc, exact.covariance]
        else:
            truth, doubt, *posterior = _known(reference, moments[0])
        error = torch.hypot(error, doubt)
        kl = truth - elbo
    scale_p, scale_q = (covariance.diagonal(dim1=-2, dim2=-1).sqrt() for _, covariance in (posterior, moments))
    fixed = constant(posterior[0], scale_p, scale_q)
    return Comparison(
        kl=kl,
        wasserstein=wasserstein(*posterior, *moments),
        mean_error=torch.where(fixed, 0.0, (moments[0] - posterior[0]) / scale_p).norm(dim=-1),
        scale_ratio=(torch.where(fixed, 0.0, (scale_q / scale_p).log()).sum(-1) / (~fixed).sum(-1)).exp(),
        error=error,
    )


def _exact(target: Target) -> Gaussian:
    try:
        return gaussians(target, role="model")
    except ValueError as error:
        raise ValueError(
            f"{error} For other models give a reference: compare_posteriors(program, x, "
            "reference=reference_posterior(program, x))."
        ) from error


def _kl(q: Gaussian, p: Gaussian) -> Tensor:
    apart = q.loc - p.loc
    trace = (p.precision * q.covariance).sum((-2, -1))
    distance = (apart.unsqueeze(-2) @ p.precision @ apart.unsqueeze(-1)).flatten()
    return 0.5 * (trace + distance - apart.shape[-1] - torch.logdet(p.precision) + torch.logdet(q.precision))


def _known(reference: Any, loc: Tensor) -> list[Tensor]:
    """Log p(x), its error, and the posterior's moments, of the data whose guide has these means."""
    if not hasattr(reference, "covariance") or reference.loc.shape != loc.shape:
        given = tuple(reference.loc.shape) if hasattr(reference, "covariance") else type(reference).__name__
        raise ValueError(
            f"Expected `reference` to be a Reference of the same data, with means of shape {tuple(loc.shape)}; got "
            f"{given}. Make one with reference_posterior(program, x)."
        )
    return [getattr(reference, name).to(loc) for name in ("log_evidence", "error", "loc", "covariance")]


@torch.no_grad()
def _sampled(target: Target, draws: int, seed: int, q: Gaussian | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Moments of the guide, by its draws unless `q` has them, its ELBO in nats, (n,), and the ELBO's standard error."""
    parts = []
    for number, block in enumerate(target.blocks()):
        vectors, log_weights = [], []
        for k, model, guide in trace_blocks(block, draws, _DRAWS, seed, "compare", number):
            vectors.append(block.flatten(model))
            log_weights.append(block.log_weights(model, guide, k))
        z, weights = torch.cat(vectors), torch.cat(log_weights)
        size = z.shape[-1]
        if q is None and draws <= size + 1:
            raise ValueError(
                f"Expected `draws` to exceed the number of latents, {size}, by two or more, for their covariance under "
                f"a guide that is not Gaussian; got {draws}."
            )
        centred = (z - z.mean(0)).transpose(0, 1)
        covariance = centred.mT @ centred / (draws - 1)
        parts.append((z.mean(0), covariance, weights.mean(0), weights.std(0) / draws**0.5))
    loc, covariance, elbo, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return [loc, covariance] if q is None else [q.loc, q.covariance], elbo, error


def wasserstein(loc_p: Tensor, covariance_p: Tensor, loc_q: Tensor, covariance_q: Tensor) -> Tensor:
    r"""2-Wasserstein distance of Gaussians, not squared, (n,).

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
    """Factor covariances (n, z, z): by Cholesky, or by eigenvalues if they are singular, as with few chains."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(covariance[failed > 0])
        factor[failed > 0] = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return factor
