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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppl_vae import families
from ppl_vae._checks import check_choice, check_int
from ppl_vae.evaluation.best_member import Members, Search
from ppl_vae.evaluation.evidence import log_weights
from ppl_vae.programs.autoguides import family_of, normal_of
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.param_store import own_params
from ppl_vae.programs.parts import in_parts
from ppl_vae.programs.sites import ignores_data
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE

_DATA = 1000  # largest number of data in a block
_PARTICLES = 10  # draws per datum that `entries` leaves room for
_MOMENTS = 500  # draws of a guide, for its means and variances
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
        family: name of the guide's family. None if it is not known: then only the total is, and its parts are NaN.
        amortized: whether a network answers for all data. Without one, as in an autoguide, there is nothing to
            amortize: what `amortization` holds is then what optimisation has left to gain.
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
    family: str | None
    amortized: bool


def inference_gap(
    program: Any,
    x: Any = None,
    *,
    family: str | None = None,
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

    A `VAE` has the family of its posterior. The family of Pyro's `AutoNormal`, `AutoDiagonalNormal`,
    `AutoMultivariateNormal`, `AutoLowRankMultivariateNormal` and `AutoNormalMessenger` is known as well, and that of
    any other guide can be given. These are families over all latent variables of a datum side by side, each carried to
    the real line, as in Pyro. Where the whole data set counts as one datum, n is 1. Without a family only the total is
    known.

    Scales have a floor of 1e-6. If a posterior is narrower than 1e-5, or than a hundred times its rounding, a warning
    says so.

    Args:
        program: any program, or a `Target`. Its parameters stay untouched, bit by bit.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        family: `"Normal"`, `"FullNormal"` or `"LowRankNormal"`, in place of the guide's own. Where the guide is no
            member of it, `amortization` may be negative: so much does the guide gain by being none.
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
        ValueError: If the family is unknown or a latent site has no place on the real line, `draws` is below 2, `steps`
            or `entries` below 1, or data or evidence do not fit or are NaN.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud 2018), section 3. Newton's
        method rests on The Variational Gaussian Approximation Revisited (Opper, Archambeau 2009). The gradient of the
        climb is that of Sticking the Landing (Roeder, Wu, Duvenaud 2017). The products of steps and gradients tell
        noise from progress as in Non-asymptotic confidence bounds for stochastic approximation algorithms with constant
        step size (Pflug 1990).
    """
    target = Target.of(program, x)
    draws, steps, entries = check_int("draws", draws, 2), check_int("steps", steps), check_int("entries", entries)
    truth, error = _known(target, log_evidence)
    own = isinstance(target.program, VAE) and family is None
    kind, keys = (type(target.program.posterior.family).__name__, {}) if own else family_of(target.program.guide)
    if family is not None:
        check_choice("family", family, ("Normal", "FullNormal", "LowRankNormal"))
        kind, keys = family, (keys if family == kind else {})
    size = max(1, min(_DATA, entries // (_PARTICLES * target.features)))
    how = _How(size, kind, keys, own, truth, error, draws, steps, entries, seed)
    parts = in_parts(target, _gaps, size, how)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Gap(**whole, family=kind, amortized=_amortized(target, seed))


class _How(NamedTuple):
    """What is asked of all blocks of data: the guide's family and its keywords, and arguments of `inference_gap`."""

    size: int
    kind: str | None
    keys: dict[str, Any]
    own: bool
    truth: Tensor | None
    error: Tensor
    draws: int
    steps: int
    entries: int
    seed: int


def _gaps(target: Target, first: int, how: _How) -> dict[str, Tensor]:
    """The gap of each datum of some blocks, numbered from `first`."""
    target.layout  # noqa: B018  runs the guide once, so that lazy parameters are there
    versions, parts = _versions(target.program), []
    for number, block in enumerate(target.blocks(how.size), first):
        begin, key = number * how.size, (how.seed, number)
        rows = slice(begin, begin + block.n)
        truth = None if how.truth is None else how.truth[rows].to(target.device)
        known = truth, how.error[rows].to(target.device)
        if how.own:
            search = Search(block, key, how.entries)
            guide = _posterior(block, search)
            here = search.log_weights(guide, guide.start, how.draws, "final")
        elif how.kind is None:
            parts.append(_total(block, *known, how.draws, how.seed))
            continue
        else:
            search = Search(block, key, how.entries, Joint(block))
            family = getattr(families, how.kind)(search.event, **how.keys)
            guide, exact = _member(block, search, family)
            here = search.log_weights(guide, guide.start, how.draws, "final") if exact else None  # type: ignore[assignment]
        parts.append(_gap(search, guide, here, *known, how.draws, how.steps))
    if _versions(target.program) != versions:
        raise RuntimeError("Expected the model to stay frozen; one of its parameters or buffers was written to.")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _versions(program: Any) -> list[int]:
    tensors = (*program.parameters(), *program.buffers()) if isinstance(program, nn.Module) else ()
    return [tensor._version for tensor in (*tensors, *own_params(program)["params"].values())]


def _amortized(target: Target, seed: int) -> bool:
    """Whether a guide answers for data by reading them."""
    if isinstance(target.program, VAE):
        return target.program.posterior.wants == "context"
    return target.structure.rows is None and not ignores_data(target.program, target.batch, seed)


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


def _posterior(target: Target, search: Search) -> Members:
    """The answers of the posterior of a `VAE`."""
    with torch.no_grad(), target.running(*search.key, "rows"):
        batch, posterior = target.batch, target.program.posterior
        others = target.program.context("posterior", batch)
        context = [batch["index"]] if posterior.wants == "index" else [batch["x"], *others]
        return Members(posterior.family, posterior.unconstrained(*context, observed=batch.get("mask")))


@torch.no_grad()
def _member(target: Target, search: Search, family: Any) -> tuple[Members, bool]:
    """The members of a family that are the guide's normals, or have its means and variances, and whether they are."""
    real: Any = search.real
    family = family.to(target.device, real.dtype)
    with target.running(*search.key, "member"):
        normal = normal_of(target.program.guide) if family.normals == "all" else None
        if isinstance(normal, dict):
            parts = ({name: normal[name][part].unsqueeze(0) for name in real.shapes} for part in (0, 1))
            loc, scale = (real.coordinates.pack(part)[0] for part in parts)
        elif normal is not None:
            loc, scale = normal.mean.unsqueeze(0), normal.stddev.unsqueeze(0)
        else:
            u = real.draw("guide", _MOMENTS)
            loc, scale = u.mean(0), u.std(0)
    full = getattr(normal, "precision_matrix", None)
    precision = torch.diag_embed(scale.double() ** -2) if full is None else full.unsqueeze(0).double()
    own = type(family).__name__ == family_of(target.program.guide)[0]
    return Members(
        family, family.nearest(loc.double(), precision)["parameters"].to(real.dtype)
    ), own and normal is not None


@torch.no_grad()
def _total(target: Target, truth: Tensor | None, error: Tensor, draws: int, seed: int) -> dict[str, Tensor]:
    """The total of each datum, where nothing is known of the family."""
    here = log_weights(target, samples=draws, inner=1, seed=seed)
    estimate = here.logsumexp(0) - math.log(draws)
    relative = (here - estimate).exp() if truth is None else torch.zeros_like(here)
    truth, elbo, unknown = estimate if truth is None else truth, here.mean(0), torch.full_like(error, math.nan)
    total = ((relative - here).var(0) / draws + error.square()).sqrt()
    parts = dict.fromkeys(("approximation", "amortization", "approximation_error", "amortization_error"), unknown)
    never = torch.zeros_like(error, dtype=torch.bool)
    known = {"total": truth - elbo, "error": total, "log_evidence": truth, "elbo": elbo}
    return {**known, **parts, "best_elbo": unknown, "from_prior": never}


def _gap(
    search: Search, guide: Members, here: Tensor | None, truth: Tensor | None, error: Tensor, draws: int, steps: int
) -> dict[str, Tensor]:
    """The gap of each datum of a block.

    Args:
        search: of the best members of the block.
        guide: the members that the guide is or is like.
        here: log weights of the guide by the draws that the best members get too; None if those have others.
        truth: log p(x), if it is known.
        error: its standard error.
        draws: how many.
        steps: of each search.
    """
    best, from_prior, left = guide.start, torch.zeros_like(error, dtype=torch.bool), torch.zeros_like(error)
    rows = guide.start
    with search.target.running(*search.key, "width"):  # some start from draws
        width = guide.family.start().numel()
    if guide.sizes[0] == width > 0:
        best, from_prior, left, widths = search.best(guide, steps)
        least = max(_NARROW, 100 * torch.finfo(rows.dtype).eps)
        if widths is not None and (narrow := int((widths.amin(1) < least).sum())):
            warnings.warn(
                f"The posteriors of {narrow} of {len(widths)} data are narrower than {least:.0e} in a latent variable, "
                "too narrow for the scales of a family. Rescale the latent variables.",
                stacklevel=5,  # the caller of `inference_gap`
            )
    shared, there = here is not None, search.log_weights(guide, best, draws, "final")
    here = log_weights(search.target, samples=draws, inner=1, seed=search.key[0]) if here is None else here
    estimate = there.logsumexp(0) - math.log(draws)
    relative = (there - estimate).exp() if truth is None else torch.zeros_like(there)
    truth, elbo, top = estimate if truth is None else truth, here.mean(0), there.mean(0)
    if shared:
        total, lost, gained = (each.var(0) / draws for each in (relative - here, relative - there, there - here))
    else:
        spread, lost, apart = (each.var(0) / draws for each in (relative, relative - there, here))
        total, gained = spread + apart, there.var(0) / draws + apart
    known = error.square() + (torch.finfo(rows.dtype).eps * elbo).square()
    errors = [(total + known).sqrt(), (lost + known + left.square()).sqrt(), (gained + left.square()).sqrt()]
    names = ("total", "approximation", "amortization", "error", "approximation_error", "amortization_error")
    figures = dict(zip(names, (truth - elbo, truth - top, top - elbo, *errors), strict=True))
    return {**figures, "log_evidence": truth, "elbo": elbo, "best_elbo": top, "from_prior": from_prior}
