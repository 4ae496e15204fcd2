r"""Reference posteriors: log p(x) with its own error and the moments of p(z|x), by the strongest method there is.

Closed form if the program is linear-Gaussian; quadrature for up to three latent variables; annealed importance sampling
for any number; NUTS for a handful of data, which returns draws and moments but no evidence.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_int
from ppl_vae.infer.annealing import AnnealingSettings, annealed_importance
from ppl_vae.infer.hmc import unvalidated
from ppl_vae.infer.modes import points_of
from ppl_vae.infer.nuts import sample
from ppl_vae.infer.quadrature import integrate
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.target import Target

_MOST = 3  # latent variables under quadrature

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reference:
    r"""Posterior of each datum by one method, in double precision.

    Args:
        log_evidence: log p(x) in nats, (n,); NaN under NUTS.
        error: of `log_evidence`, in nats, (n,): 0 in closed form, an estimated absolute error by quadrature, a
            standard error by sampling, NaN under NUTS.
        loc: mean of p(z|x), (n, z); several latent sites lie side by side in the model's order, all entries of their
            values, such as the m shares of a simplex.
        covariance: of p(z|x), (n, z, z).
        method: `"closed-form"`, `"quadrature"`, `"ais"` or `"nuts"`.
        draws: from p(z|x), (k, n, z), by sampling; None otherwise.
        shapes: of the latent sites of one datum, by name.
        converged: whether the method's own checks passed: all data have settled, or NUTS has mixed (R-hat below 1.01,
            400 effective draws, no divergence, BFMI above 0.3, no contradiction).
        diagnostics: what was checked; tensors have shape (n,). Quadrature has `settled`, the data that reached the
            tolerance in evidence and moments, and `moment_error`, the estimated error of mean and covariance in
            standard deviations; the errors of the others are large or infinite. With one latent variable it searches
            three times the range of 448 draws of prior and guide in 4,000 steps or more. With two or three it searches
            around the modes to which climbs from these draws lead, and from points that mix coordinates of several, and
            the draws that matter: it can miss an isolated mode that none of them comes near, or one much narrower than
            those found. Annealing has `settled`, the data
            whose chains agree well enough (`Annealing.settled`); the evidence of the others is too low on average, by
            more than its error. Sampling has `ess`; annealing also `acceptance`; NUTS also `ess_tail` (of the 5 % and
            95 % quantiles), `r_hat` (rank-normalised and folded, the worst of a datum), `divergences`, `bfmi` (how much
            the energy changes from draw to draw; chains with less than 0.3 explore the tails slowly), `contradicted`
            (where draws of the prior, weighed by their likelihood, have another mean), `settled` (whether a datum
            passed) and `mcse_mean`, (n, z), the Monte Carlo standard error of `loc`.
        sample_stats: of each draw of NUTS, (k, n): `energy`, `lp`, both of the unconstrained coordinates, in nats, and
            `diverging`. `to_datatree(program, x, reference=...)` has them beside the draws.
        chains: of NUTS; `draws.unflatten(0, (-1, chains))` has the draws of each.
    """

    log_evidence: Tensor
    error: Tensor
    loc: Tensor
    covariance: Tensor
    method: str
    draws: Tensor | None
    shapes: Shapes
    converged: bool = True
    diagnostics: dict[str, Any] = field(default_factory=dict)
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
    chains: int = 1

    @property
    def sites(self) -> dict[str, Tensor]:
        """Posterior mean of each latent site by name, (n, *inner plates, *event)."""
        parts = self.loc.split([math.prod(shape) for shape in self.shapes.values()], -1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def reference_posterior(
    program: Any,
    x: Any = None,
    method: Literal["auto", "closed-form", "quadrature", "ais", "nuts"] = "auto",
    *,
    seed: int = 0,
    **settings: Any,
) -> Reference:
    """Log p(x) and the moments of p(z|x) of each datum, by a method that does not rest on the guide.

    Args:
        program: any program whose latent sites are continuous, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        method: `"auto"` takes the closed form if there is one, else quadrature up to three latent variables, else
            annealing.
        seed: of the draws; the global random state is left alone.
        **settings: of `quadrature`: `tolerance` of the error in nats (1e-8), `points` of the finest lattice of a datum
            (2**20), `entries`, how many numbers a block of data may hold, which bounds the memory; of `ais`: those of
            `annealed_importance`; of `nuts`: `draws` and `warmup` of each of `chains`. Under `"auto"`, those of the
            other methods are ignored.

    Returns:
        The reference; its `converged` is false if the method's own checks failed.

    Raises:
        ValueError: If a method or setting is unknown, the program does not allow the method, or a latent site is
            discrete.
    """
    check_choice("method", method, ("auto", *_METHODS))
    known = sorted({name for one in (_METHODS if method == "auto" else [method]) for name in _settings(one)})
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"Expected settings of {method!r} among {', '.join(known) or 'none'}; got {unknown[0]!r}.")
    target = Target.of(program, x)
    joint = Joint(target.rows(slice(0, 1)))
    others = "'ais', 'nuts'" + (", 'quadrature'" if joint.size <= _MOST else "")
    if method == "quadrature" and joint.size > _MOST:
        raise ValueError(
            f"Expected at most {_MOST} latent variables for method='quadrature'; got {joint.size}. This program "
            f"allows {others}, and 'closed-form' if it is linear-Gaussian."
        )
    if method == "auto":
        method = strongest(target)
        settings = {name: value for name, value in settings.items() if name in _settings(method)}
    try:
        return _METHODS[method](target, joint, seed=seed, **settings)
    except ValueError as error:
        if method == "closed-form":
            raise ValueError(f"{error} This program allows {others}.") from error
        raise


def strongest(program: Any, x: Any = None) -> Literal["closed-form", "quadrature", "ais"]:
    """The method that `"auto"` takes; arguments as of `reference_posterior`."""
    target = Target.of(program, x)
    size = Joint(target.rows(slice(0, 1))).size
    try:
        gaussians(target, role="model")
    except ValueError:
        return "quadrature" if size <= _MOST else "ais"
    return "closed-form"


def _closed_form(target: Target, first: Joint, seed: int) -> Reference:
    exact = gaussians(target, role="model")
    return Reference(exact.log_normaliser, exact.error, exact.loc, exact.covariance, "closed-form", None, first.shapes)


def _ais(target: Target, first: Joint, seed: int, **settings: Any) -> Reference:
    annealing = annealed_importance(target, seed=seed, **settings)
    chains, n = annealing.shares.shape
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.rand(1, n, generator=generator) + torch.arange(chains)[:, None]).to(annealing.shares) / chains
    chosen = torch.searchsorted(annealing.shares.cumsum(0).T.contiguous(), levels.T.contiguous())
    chosen = chosen.clamp(max=chains - 1).T.unsqueeze(-1).expand(annealing.latents.shape)
    draws, loc_and_covariance = annealing.latents.gather(0, chosen), annealing.moments()
    diagnostics = {name: getattr(annealing, name) for name in ("acceptance", "ess", "settled")}
    converged, value, error = bool(annealing.settled.all()), annealing.log_evidence, annealing.error
    return Reference(value, error, *loc_and_covariance, "ais", draws, first.shapes, converged, diagnostics)


def _quadrature(
    target: Target, first: Joint, seed: int, *, points: int = 2**20, tolerance: float = 1e-8, entries: int = 2**23
) -> Reference:
    """Sum over a lattice around the posterior, enlarged until it holds the mass and refined until the sum stands."""
    check_int("entries", entries)
    size = first.size
    if check_int("points", points) < 6**size:
        raise ValueError(f"Expected `points` to be at least {6**size}, 6 along each of {size} axes; got {points}.")
    if not tolerance > 0:
        raise ValueError(f"Expected `tolerance` to be positive; got {tolerance}.")
    rows = max(1, entries // (points_of(size) * (target.features + size)))
    parts = []
    for number, block in enumerate(target.to_double().blocks(rows)):
        joint = Joint(block)
        with unvalidated(joint, seed, number):
            parts.append(integrate(joint, points, tolerance, entries))
    log_evidence, error, loc, covariance, moments, settled = (torch.cat(part) for part in zip(*parts, strict=True))
    diagnostics, converged = {"settled": settled, "moment_error": moments}, bool(settled.all())
    return Reference(log_evidence, error, loc, covariance, "quadrature", None, first.shapes, converged, diagnostics)


def _nuts(
    target: Target, first: Joint, seed: int, *, draws: int = 500, warmup: int = 500, chains: int = 8
) -> Reference:
    """Sample the latent variables by NUTS, in double precision."""
    draws, warmup, chains = check_int("draws", draws, 4), check_int("warmup", warmup), check_int("chains", chains)
    if chains < 2:
        raise ValueError("Expected `chains` to be at least 2 under method='nuts', whose R-hat compares them; got 1.")
    z, diagnostics, stats = sample(Joint(target.to_double()), draws=draws, warmup=warmup, chains=chains, seed=seed)
    loc = z.mean(0)
    covariance = torch.einsum("kny,knz->nyz", z - loc, z - loc) / (len(z) - 1)
    unknown = torch.full_like(loc[:, 0], math.nan)
    settled = (diagnostics["r_hat"] < 1.01) & (diagnostics["ess"] > 400) & (diagnostics["divergences"] == 0)
    settled &= ~diagnostics["contradicted"] & ~(diagnostics["bfmi"] < 0.3)
    diagnostics["settled"] = settled
    moments, passed = (loc, covariance), bool(settled.all())
    return Reference(unknown, unknown, *moments, "nuts", z, first.shapes, passed, diagnostics, stats, chains)


_METHODS: dict[str, Callable[..., Reference]]
_METHODS = {"closed-form": _closed_form, "quadrature": _quadrature, "ais": _ais, "nuts": _nuts}


def _settings(method: str) -> list[str]:
    """Names of the settings of a method."""
    if method == "ais":
        return [setting.name for setting in fields(AnnealingSettings)]
    parameters = inspect.signature(_METHODS[method]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
