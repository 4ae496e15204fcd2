r"""Reference posteriors: log p(x) with its own error and the moments of p(z|x), by the strongest method there is.

Closed form where the program is linear-Gaussian; quadrature for up to three latent variables; annealed importance
sampling for any number; NUTS for a handful of data, which gives draws and moments but no evidence.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.data.batches import as_batch
from ppl_vae.infer.annealing import annealed_importance, rows_of
from ppl_vae.infer.hmc import quiet
from ppl_vae.infer.modes import points_of
from ppl_vae.infer.nuts import sample
from ppl_vae.infer.quadrature import integrate
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.latent_vector import Joint
from ppl_vae.programs.param_store import device_and_dtype, to_double
from ppl_vae.programs.traces import check_batch, structure

_MOST = 3  # latent variables under quadrature


@dataclass(frozen=True)
class Reference:
    r"""The posterior of each datum, as well as one method can tell it; in double precision.

    Args:
        log_evidence: log p(x) in nats, (n,); NaN under NUTS.
        error: of `log_evidence`, in nats, (n,): 0 in closed form, an estimated absolute error by quadrature, a
            standard error by sampling, NaN under NUTS.
        loc: mean of p(z|x), (n, z); several latent sites stand side by side in the model's order.
        covariance: (n, z, z).
        method: `"closed-form"`, `"quadrature"`, `"ais"` or `"nuts"`.
        draws: from p(z|x), (k, n, z), by sampling; none otherwise.
        shapes: of the latent sites of a datum, by name.
        converged: whether the method's own checks passed: all data have settled, or NUTS mixed (R-hat below 1.01, 400
            bulk effective draws, no divergence).
        diagnostics: what was checked; tensors have shape (n,). Of quadrature `settled`, which data reached the
            tolerance: the error of the others is large, or infinite, and their figures are what there is. Of annealing
            likewise, whose chains agree well enough (`Annealing.settled`): the figure of the others is low on average,
            by more than its error. Of sampling `ess`, of annealing `acceptance` too, of NUTS `r_hat` (the worst of a
            datum), `settled` (whether a datum passed) and `divergences` (of all: data move together, so one fails all).
    """

    log_evidence: Tensor
    error: Tensor
    loc: Tensor
    covariance: Tensor
    method: str
    draws: Tensor | None
    shapes: dict[str, tuple[int, ...]]
    converged: bool = True
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> dict[str, Tensor]:
        """Give the posterior mean of each latent site by name, (n, *inner plates, *event)."""
        parts = self.loc.split([math.prod(shape) for shape in self.shapes.values()], -1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def reference_posterior(
    program: Any,
    x: Any,
    method: Literal["auto", "closed-form", "quadrature", "ais", "nuts"] = "auto",
    *,
    seed: int = 0,
    **settings: Any,
) -> Reference:
    """Give log p(x) and the moments of p(z|x) of each datum by a method that does not rest on the guide.

    Args:
        program: any program whose latent sites are continuous.
        x: data, a tensor (n, *x) or a batch dict.
        method: `"auto"` takes the closed form where there is one, else quadrature up to three latent variables, else
            annealing.
        seed: of the draws; the global random state is left alone.
        **settings: of `quadrature`: `tolerance` of the error in nats (1e-8), `points` of the finest lattice of a datum
            (2**20), `entries`, numbers that the data of one block may hold, which bounds the memory; of `ais`: those of
            `annealed_importance`; of `nuts`: `draws` and `warmup` of each of `chains`. Under `"auto"`, those of the
            other methods are ignored.

    Returns:
        The reference. One that did not converge says so.

    Raises:
        ValueError: for an unknown method or setting, a method that the program does not allow, or a latent site that
            is discrete.
    """
    methods: dict[str, Callable[..., Reference]] = {
        "closed-form": _closed_form,
        "quadrature": _quadrature,
        "ais": _ais,
        "nuts": _nuts,
    }
    if method not in ("auto", *methods):
        raise ValueError(f"Expected `method` to be one of auto, {', '.join(methods)}; got {method!r}.")
    asked = methods.values() if method == "auto" else [methods[method]]
    known = sorted({name for one in asked for name in _settings(one)})
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"Expected settings of {method!r} among {', '.join(known) or 'none'}; got {unknown[0]!r}.")
    batch = check_batch(program, as_batch(x))
    joint = Joint(program, rows_of(batch, 0, 1))
    others = "'ais', 'nuts'" + (", 'quadrature'" if joint.size <= _MOST else "")
    if method == "quadrature" and joint.size > _MOST:
        raise ValueError(
            f"Expected at most {_MOST} latent variables for method='quadrature'; got {joint.size}. This program "
            f"allows {others}, and 'closed-form' if it is linear-Gaussian."
        )
    if method in ("auto", "closed-form"):
        try:
            return _closed_form(joint, batch)
        except ValueError as error:
            if method == "closed-form":
                raise ValueError(f"{error} This program allows {others}.") from error
    if method == "auto":
        method = _next(joint)
        settings = {name: value for name, value in settings.items() if name in _settings(methods[method])}
    return methods[method](joint, batch, seed=seed, **settings)


def strongest(program: Any, x: Any) -> Literal["closed-form", "quadrature", "ais"]:
    """Say which method `"auto"` takes, by the first datum and without running it."""
    batch = rows_of(check_batch(program, as_batch(x)), 0, 1)
    joint = Joint(program, batch)
    try:
        _closed_form(joint, batch)
    except ValueError:
        return _next(joint)
    return "closed-form"


def _next(joint: Joint) -> Literal["quadrature", "ais"]:
    return "quadrature" if joint.size <= _MOST else "ais"


def _settings(function: Callable[..., Any]) -> list[str]:
    function = annealed_importance if function is _ais else function
    return [
        one.name
        for one in inspect.signature(function).parameters.values()
        if one.kind is one.KEYWORD_ONLY and one.name != "seed"
    ]


def _closed_form(joint: Joint, batch: dict[str, Tensor]) -> Reference:
    found = gaussians(joint.program, batch, "model")
    zero = torch.zeros_like(found.log_normaliser)
    return Reference(found.log_normaliser, zero, found.loc, found.covariance, "closed-form", None, joint.shapes)


def _ais(joint: Joint, batch: dict[str, Tensor], *, seed: int, **settings: Any) -> Reference:
    found = annealed_importance(joint.program, batch, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(1, found.shares.shape[1], generator=generator) + torch.arange(len(found.shares))[:, None]).to(
        found.shares
    )
    chosen = torch.searchsorted(found.shares.cumsum(0).T.contiguous(), places.T.contiguous() / len(places))
    chosen = chosen.clamp(max=len(places) - 1).T.unsqueeze(-1).expand(found.latents.shape)
    return Reference(
        found.log_evidence,
        found.error,
        *found.moments(),
        "ais",
        found.latents.gather(0, chosen),
        joint.shapes,
        bool(found.settled.all()),
        {"acceptance": found.acceptance, "ess": found.ess, "settled": found.settled},
    )


def twin(joint: Joint, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    program = to_double(joint.program)
    if device_and_dtype(program)[1] is not None:
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return program, batch


def _quadrature(
    joint: Joint,
    batch: dict[str, Tensor],
    *,
    points: int = 2**20,
    tolerance: float = 1e-8,
    entries: int = 2**23,
    seed: int = 0,
) -> Reference:
    """Sum over a lattice around the posterior, enlarged until it holds the mass and refined until the sum stands."""
    check_int("entries", entries)
    if check_int("points", points) < 6**joint.size:
        raise ValueError(
            f"Expected `points` to be at least {6**joint.size}, 6 along each of {joint.size} axes; got {points}."
        )
    if not tolerance > 0:
        raise ValueError(f"Expected `tolerance` to be positive; got {tolerance}.")
    program, batch = twin(joint, batch)
    found = structure(program, batch)
    n = len(next(iter(batch.values())))
    features = sum(value[0].numel() for value in batch.values()) + joint.size
    size = max(1, entries // (points_of(joint.size) * features))
    parts = []
    for number, begin in enumerate(range(0, n, size)):
        block = Joint(program, rows_of(batch, begin, begin + size), found)
        with quiet(block, seed, number):
            parts.append(integrate(block, points, tolerance, entries))
    log_evidence, error, loc, covariance, settled = (torch.cat(part) for part in zip(*parts, strict=True))
    return Reference(
        log_evidence,
        error,
        loc,
        covariance,
        "quadrature",
        None,
        joint.shapes,
        bool(settled.all()),
        {"settled": settled},
    )


def _nuts(
    joint: Joint,
    batch: dict[str, Tensor],
    *,
    draws: int = 1000,
    warmup: int = 500,
    chains: int = 4,
    seed: int = 0,
) -> Reference:
    """Sample the latent variables by NUTS, in double precision."""
    draws, warmup, chains = check_int("draws", draws, 4), check_int("warmup", warmup), check_int("chains", chains)
    if chains < 2:
        raise ValueError("Expected `chains` to be at least 2 under method='nuts', whose R-hat compares them; got 1.")
    joint = Joint(*twin(joint, batch))
    values, diagnostics = sample(joint, draws=draws, warmup=warmup, chains=chains, seed=seed)
    loc = values.mean(0)
    covariance = torch.einsum("kny,knz->nyz", values - loc, values - loc) / (len(values) - 1)
    unknown = torch.full((joint.n,), math.nan, dtype=torch.float64, device=loc.device)
    settled = (diagnostics["r_hat"] < 1.01) & (diagnostics["ess"] > 400) & (diagnostics["divergences"] == 0)
    diagnostics["settled"] = settled
    return Reference(unknown, unknown, loc, covariance, "nuts", values, joint.shapes, bool(settled.all()), diagnostics)
