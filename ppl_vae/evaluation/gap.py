r"""Inference gap: how far the bound lies below the evidence, and which part is the family's, which the network's.

.. math::

    \log p(x) - \mathcal L[q] = \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{approximation}}
        + \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortization}}

where :math:`q^*` is the best member of the guide's family for one datum (Inference Suboptimality in Variational
Autoencoders, Cremer, Li and Duvenaud 2018, equation 5). To find it, each datum gets a row of parameters of its
own, with the model frozen.
"""

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.evaluation.best_member import Members, Search
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE

_DATA = 1000  # largest number of data in a block
_PARTICLES = 10  # draws per datum that `entries` leaves room for
_NARROW = 1e-5  # standard deviation of the narrowest posterior that the families' scales can follow


@dataclass(frozen=True)
class Gap:
    r"""Inference gap of each datum, in nats: tensors of shape (n,), in double precision.

    Args:
        total: :math:`\log p(x) - \mathcal L[q]`, the sum of the two parts.
        approximation: :math:`\log p(x) - \mathcal L[q^*]`, lost by the family.
        amortization: :math:`\mathcal L[q^*] - \mathcal L[q]`, lost by the guide's network.
        error: standard error of `total`: of its draws, of log p(x) and of rounding.
        approximation_error: the same of `approximation`, with the nats that the search may have missed.
        amortization_error: the same of `amortization`.
        log_evidence: log p(x): exact, given, or estimated by importance sampling from :math:`q^*`. The estimate is a
            lower bound on average, which makes total and approximation lower bounds too.
        elbo: :math:`\mathcal L[q]`.
        best_elbo: :math:`\mathcal L[q^*]`.
        from_prior: whether the search from the prior surely ended higher than that from the guide's answer.
    """

    total: Tensor
    approximation: Tensor
    amortization: Tensor
    error: Tensor
    approximation_error: Tensor
    amortization_error: Tensor
    log_evidence: Tensor
    elbo: Tensor
    best_elbo: Tensor
    from_prior: Tensor


def inference_gap(
    program: Any,
    x: Any = None,
    *,
    log_evidence: Any = None,
    draws: int = 1000,
    steps: int = 1000,
    entries: int = 2**21,
    seed: int = 0,
) -> Gap:
    r"""Split log p(x) - ELBO of each datum into approximation gap and amortization gap.

    Each datum gets a row of parameters of the guide's family. A learned scale that the family shares among data becomes
    the datum's own; networks inside a family stay as they are. The best member is searched for twice, from the guide's
    answer and from the prior's draw that explains the datum best; the higher end counts. Then all bounds are estimated
    anew, with fresh draws that the two guides share.

    A family of normals is searched by Newton's method on the bound (`ppl_vae.infer.closest_normal`), which is exact
    for linear-Gaussian models. Other families climb by Adam, in steps of the posterior's own width if they have
    normals, as a mixture has. The learning rate of a datum halves when progress is lost in the noise, which shows in
    the products of its steps with the gradients that follow, whose draws are new; the climb ends when all rates are a
    hundredth of the first. What the search may have missed nearby is estimated by new draws and is part of the errors
    of approximation and amortization. It can miss a mode that neither start leads to.

    Scales have a floor of 1e-6. If a posterior is narrower than 1e-5, or than a hundred times its rounding, a warning
    says so.

    Args:
        program: a `VAE`, or a `Target` of one. Its parameters stay untouched, bit by bit.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        log_evidence: log p(x) of each datum in nats, shape (n,), or an object that has it as `log_evidence`, with its
            standard error as `error` or `mc_se`. By default the closed form if there is one, else the
            importance-weighted estimate from the draws of :math:`q^*`.
        draws: samples per datum of the estimates, at least 2.
        steps: largest number of steps of each search.
        entries: how many numbers the draws of a block of data may hold; this bounds the memory.
        seed: of all draws; the global random state is left alone.

    Returns:
        The gap of each datum.

    Raises:
        TypeError: If the program is not a `VAE`: its guide's family is unknown.
        ValueError: If `draws` is below 2, `steps` or `entries` below 1, or data or evidence do not fit or are NaN.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud 2018), section 3. Newton's
        method rests on The Variational Gaussian Approximation Revisited (Opper, Archambeau 2009). The gradient of the
        climb is that of Sticking the Landing (Roeder, Wu, Duvenaud 2017). The products of steps and gradients tell
        noise from progress as in Non-asymptotic confidence bounds for stochastic approximation algorithms with constant
        step size (Pflug 1990).
    """
    target = Target.of(program, x)
    if not isinstance(target.program, VAE):
        raise TypeError(
            f"Expected a VAE, whose guide's family is known; got {type(target.program).__name__}. For other programs "
            "compare ELBO and log evidence: log_evidence(program, x, samples) has both."
        )
    draws, steps, entries = check_int("draws", draws, 2), check_int("steps", steps), check_int("entries", entries)
    truth, error = _known(target, log_evidence)
    versions = _versions(target.program)
    size = max(1, min(_DATA, entries // (_PARTICLES * target.batch["x"][0].numel())))
    parts = []
    for number, block in enumerate(target.blocks(size)):
        rows = slice(number * size, (number + 1) * size)
        search = Search(block, (seed, number), entries)
        parts.append(_gap(block, search, None if truth is None else truth[rows], error[rows], draws, steps))
    if _versions(target.program) != versions:
        raise RuntimeError("Expected the model to stay frozen; one of its parameters or buffers was written to.")
    return Gap(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Gap)))


def _versions(program: VAE) -> list[int]:
    return [tensor._version for tensor in (*program.parameters(), *program.buffers())]


def _known(target: Target, given: Any) -> tuple[Tensor | None, Tensor]:
    """Log p(x) of each datum if it is known, else None, and its standard error."""
    error = torch.zeros(target.n, dtype=torch.float64, device=target.device)
    if given is None:
        try:
            exact = gaussians(target, role="model")
            return exact.log_normaliser, exact.error
        except ValueError:
            return None, error
    pair = getattr(given, "log_evidence", given), getattr(given, "error", getattr(given, "mc_se", error))
    try:
        truth, error = (torch.as_tensor(value).to(error) for value in pair)
    except (TypeError, ValueError, RuntimeError) as mistake:
        raise ValueError(
            f"Expected `log_evidence` to be a tensor (n,) of nats, a Reference or an Evidence; got {given!r}."
        ) from mistake
    if truth.shape != (target.n,) or error.shape != (target.n,):
        raise ValueError(
            f"Expected `log_evidence` of shape ({target.n},), one number per datum; got {tuple(truth.shape)}, with "
            f"errors of shape {tuple(error.shape)}."
        )
    if bool(truth.isnan().any()):
        raise ValueError(
            f"Expected `log_evidence` to be known; got NaN for {int(truth.isnan().sum())} of {len(truth)} data. NUTS "
            "has none: use closed-form, quadrature or ais."
        )
    return truth, error


def _gap(target: Target, search: Search, truth: Tensor | None, error: Tensor, draws: int, steps: int) -> Gap:
    """The gap of each datum of a block, from log p(x), if known, and its standard error."""
    with torch.no_grad(), target.running(*search.key, "rows"):
        batch, posterior = target.batch, target.program.posterior
        others = target.program.context("posterior", batch)
        context = [batch["index"]] if posterior.wants == "index" else [batch["x"], *others]
        rows = posterior.unconstrained(*context, observed=batch.get("mask"))
        width = posterior.family.start().numel()
    guide = Members(posterior.family, rows)
    best, from_prior, left = guide.start, torch.zeros_like(error, dtype=torch.bool), torch.zeros_like(error)
    if rows.shape[1] == width > 0:
        best, from_prior, left, widths = search.best(guide, steps)
        least = max(_NARROW, 100 * torch.finfo(rows.dtype).eps)
        if widths is not None and (narrow := int((widths.amin(1) < least).sum())):
            warnings.warn(
                f"The posteriors of {narrow} of {len(widths)} data are narrower than {least:.0e} in a latent variable, "
                "too narrow for the scales of a family. Rescale the latent variables.",
                stacklevel=3,
            )
    here, there = (search.log_weights(guide, parameters, draws, "final") for parameters in (guide.start, best))
    estimate = there.logsumexp(0) - math.log(draws)
    relative = (there - estimate).exp() if truth is None else torch.zeros_like(there)
    truth, elbo, top = estimate if truth is None else truth, here.mean(0), there.mean(0)
    total, lost, gained = (each.var(0) / draws for each in (relative - here, relative - there, there - here))
    known = error.square() + (torch.finfo(rows.dtype).eps * elbo).square()
    errors = [(total + known).sqrt(), (lost + known + left.square()).sqrt(), (gained + left.square()).sqrt()]
    return Gap(truth - elbo, truth - top, top - elbo, *errors, truth, elbo, top, from_prior)  # type: ignore[call-arg]
