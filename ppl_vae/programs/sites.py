"""Structure of a program: what its traces show, and whether its guide keeps one row per datum by position."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae._seeds import fork_rng
from ppl_vae.programs.enumeration import Weights, all_values, enumerated_sites, log_density, summed_trace
from ppl_vae.programs.param_store import device_and_dtype, own_params
from ppl_vae.programs.plates import (
    BrokenContract,
    check_sizes,
    data_plate,
    fixed,
    frames,
    is_point,
    is_whole,
    local_plate,
    observes,
    subsampled,
)
from ppl_vae.programs.rows import fitted_by_position, known_data
from ppl_vae.programs.traces import Batch, aligned, batch_of, plain_sites, replayed, trace_pair
from ppl_vae.programs.trial import FAILED, TRIED, by_place, first, nesting_of, shapes_of, traces_of, trial

OTHER_DATA = (
    "Expected the data that this program was fitted to, in their order; got {n} others. This guide keeps one row per "
    "datum and scores no others: take `index`, or an amortized guide."
)
_CHECKED = "_ppl_vae_checked"


@dataclass(frozen=True)
class Structure:
    """What the traces of a program show.

    Args:
        latents: names of the latent sites, in the model's order, without the enumerated ones.
        observed: names of the observed sites.
        nesting: how many plates enclose a site at the most, the data plate included.
        kl: for each latent site, whether its KL term is `analytic` under `TraceMeanField_ELBO`, or `sampled`.
        same_order: whether model and guide visit the latent sites in one order.
        shapes: of each site of one datum, (*inner plates, *event).
        not_reparameterised: names of the guide's sites whose draws have no gradient, such as discrete ones.
        points: latent sites of the guide that are points, and so have no density.
        rows: how many rows a program has that keeps one row per datum by position, and so takes these data as a whole
            or not at all; None for all others.
        whole: whether the whole data set counts as one datum, since a site lies outside the data plate.
        local: where the whole counts as one, the plate whose elements are independent given the sites outside it.
        subsampled: a plate that holds only a part of its data, which training allows and evidence does not.
        sequential: whether the program runs one draw at a time, since its densities are wrong or fail beside particles.
        enumerated: names of the discrete latent sites that are summed out, in the model's order: those marked
            `infer={"enumerate": "parallel"}` in the guide, or in the model if the guide lacks them. A site that the
            guide enumerates sequentially is drawn, and so is one of the latent sites.
        enumerated_by_guide: those of them that are in the guide.
    """

    latents: tuple[str, ...]
    observed: tuple[str, ...]
    nesting: int
    kl: dict[str, str]
    same_order: bool
    shapes: dict[str, tuple[int, ...]]
    not_reparameterised: tuple[str, ...]
    points: tuple[str, ...] = ()
    rows: int | None = None
    whole: bool = False
    local: str | None = None
    subsampled: str | None = None
    sequential: bool = False
    enumerated: tuple[str, ...] = ()
    enumerated_by_guide: tuple[str, ...] = ()


def structure(program: Any, batch: Mapping[str, Tensor], *, seed: int = 0) -> Structure:
    """Read a program's structure off traces of a copy, on the first data of a batch.

    A program that fails on these but not on the whole batch, whose parameters grow with the data, or whose density of
    a datum changes with its place in the batch keeps one row per datum by position. One with a site outside the data
    plate is read off the whole batch.

    Raises:
        ValueError: If the program breaks the contract: latent sites that differ between model and guide, a data plate
            of another name or at another dim, or no densities beside particles.
    """
    part, all_of_it = first(batch, 2) if aligned(batch) else dict(batch), not aligned(batch)
    try:
        seen, shapes = _look(program, part, seed)
    except FAILED as error:
        if isinstance(error, BrokenContract):
            raise
        part, all_of_it = dict(batch), True
        seen, shapes = _look_at_all(program, part, seed)
    if seen.whole:
        return _whole(program, dict(batch), seen if all_of_it else _look_at_all(program, dict(batch), seed)[0], seed)
    if not aligned(batch):
        sizes = {key: tuple(value.shape) for key, value in batch.items()}
        raise ValueError(f"Expected tensors that share their leading size n; got shapes {sizes}.")
    n, key = len(next(iter(batch.values()))), _key(program, batch)
    if vars(program).get(_CHECKED, (None,))[0] != key:
        _check_particles(program, part, seen, seed)
        rows = all_of_it or (n > 1 and by_place(program, batch, shapes, seed))
        if rows and not all_of_it:
            _look_at_all(program, dict(batch), seed)
        vars(program)[_CHECKED] = key, rows
    by_position = all_of_it or vars(program)[_CHECKED][1] or fitted_by_position(program)
    return replace(seen, rows=n if by_position else None)


def _whole(program: Any, batch: Batch, seen: Structure, seed: int) -> Structure:
    """Structure where the whole data set counts as one datum, which says whether particles go side by side."""
    if seen.enumerated:
        try:
            _check_enumerated(program, batch, seen, seed)
        except BrokenContract:
            _check_enumerated(program, batch, seen, seed, particles=0)
            return replace(seen, sequential=True)
        return seen
    sequential = not _vectorises(program, batch, seen, seed)
    return replace(seen, sequential=sequential, local=None if sequential else seen.local)


def _vectorises(program: Any, batch: Batch, seen: Structure, seed: int) -> bool:
    """Whether two draws side by side have the densities that each has alone."""
    device = device_and_dtype(program, next(iter(batch.values())))[0]
    with torch.no_grad(), trial(program) as twin, fork_rng(seed, device=device):
        traces_of(twin, batch, seed)  # so that lazy parameters are made without particles
        try:
            pair = trace_pair(twin, batch, 2, seen.nesting)
            together = torch.stack([log_density(trace, 2, 1) for trace in pair])  # (2, 2, 1)
        except FAILED:
            return False
        for number in range(2):
            alone = replayed(twin, batch, pair[1], number)
            one = torch.stack([log_density(trace, 1, 1) for trace in alone])
            if not _same(together[:, number], one[:, 0], batch):
                return False
    return True


def ignores_data(program: Any, batch: Batch, seed: int) -> bool:
    """Whether a guide draws the same whatever the data, so that it belongs to those it was fitted to."""
    other = {key: value + 1 if value.is_floating_point() else value for key, value in batch.items()}
    device, draws = device_and_dtype(program, next(iter(batch.values())))[0], []
    with torch.no_grad(), trial(program) as twin:
        for given in (batch, other):
            with fork_rng(seed, device=device):
                trace = poutine.trace(twin.guide).get_trace(**batch_of(twin.guide, given))
            draws.append([trace.nodes[name]["value"] for name in plain_sites(trace, trace.stochastic_nodes)])
    return all(torch.equal(*pair) for pair in zip(*draws, strict=True))


def _key(program: Any, batch: Mapping[str, Tensor]) -> Any:
    """What a program consists of: as long as this is the same, it need not be tried again."""
    tensors = [*program.named_parameters()] if isinstance(program, nn.Module) else []
    tensors += [*own_params(program)["params"].items()]
    return [(name, id(tensor)) for name, tensor in tensors], sorted(batch), min(len(next(iter(batch.values()))), TRIED)


def _look(program: Any, batch: Batch, seed: int) -> tuple[Structure, dict[str, torch.Size]]:
    """Structure of a program on some data, and the shapes of its parameters then."""
    with torch.no_grad(), trial(program) as twin:
        guide, model = traces_of(twin, batch, seed)
        seen = _read(guide, model, data_plate(program))
        if any(is_point(guide.nodes[name]["fn"]) for name in seen.latents):
            seen = replace(seen, points=fixed((guide, model), traces_of(twin, batch, seed + 1)[0]))
        return seen, shapes_of(twin, guide, model)


def _look_at_all(program: Any, batch: Batch, seed: int) -> tuple[Structure, dict[str, torch.Size]]:
    """Likewise on all data, which a guide that was fitted to others does not take."""
    try:
        return _look(program, batch, seed)
    except FAILED as error:
        if known_data(program, batch) is False:
            raise ValueError(OTHER_DATA.format(n=len(next(iter(batch.values()))))) from None
        if isinstance(error, TypeError | NotImplementedError | AssertionError):
            raise ValueError(
                f"Expected a model and a guide that run on data named {', '.join(batch)}; one raised: "
                f"{(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        raise


def _read(guide: Trace, model: Trace, plate: str | None) -> Structure:
    nodes: Any = guide.nodes
    sampled = plain_sites(guide, guide.stochastic_nodes)
    drawn = [name for name in sampled if not nodes[name]["infer"].get("is_auxiliary")]
    enumerated, guided = enumerated_sites(guide, model)
    drawn = [name for name in drawn if name not in guided]
    latents = [name for name in plain_sites(model, model.stochastic_nodes) if name not in enumerated]
    if set(drawn) != set(latents):
        raise BrokenContract(
            f"Expected model and guide to have the same latent sites; only the model has "
            f"{sorted(set(latents) - set(drawn)) or 'none'}, "
            f"only the guide has {sorted(set(drawn) - set(latents)) or 'none'}."
        )
    if seen := observes(guide):
        raise BrokenContract(
            f"Expected a guide that observes nothing; it observes '{seen[0]}', whose density would enter its own. "
            f"Hide it: pyro.poutine.block(guide, hide={seen})."
        )
    pair = guide, model
    whole, depth, shapes = is_whole(pair, plate), nesting_of(pair), {}
    for trace in pair:
        for name in plain_sites(trace):
            node: Any = trace.nodes[name]
            inner = sorted((frame for frame in node["cond_indep_stack"] if frame.vectorized), key=lambda one: one.dim)
            sizes = [frame.size for frame in inner if frame.dim < -1]
            if whole:  # dims that no plate stands for count too
                batch, held = node["value"].shape[: node["value"].dim() - node["fn"].event_dim], frames(node).values()
                sizes = [size for dim, size in enumerate(batch, -len(batch)) if size > 1 or dim in held]
            shapes[name] = (*sizes, *node["fn"].event_shape)
    kl = {name: _kl_term(guide.nodes[name], model.nodes[name]) for name in latents}
    without = tuple(name for name in sampled if not nodes[name]["fn"].has_rsample)
    observed = tuple(plain_sites(model, model.observation_nodes))
    found = Structure(tuple(latents), observed, depth, kl, drawn == latents, shapes, without, whole=whole)
    found = replace(found, enumerated=tuple(enumerated), enumerated_by_guide=tuple(guided))
    if not whole:
        return found
    check_sizes(pair, latents)
    local = None if enumerated else local_plate(pair, latents)
    return replace(found, local=local, subsampled=subsampled(pair))


def _kl_term(q: Any, p: Any) -> str:
    try:
        with torch.enable_grad():  # by which torch has that of exponential families, such as Wishart's
            kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return "sampled"
    return "analytic"


def _check_enumerated(program: Any, batch: Batch, seen: Structure, seed: int, particles: int = 2) -> None:
    """Check that the values of enumerated sites go side by side, and that particles, if any, do so with them.

    Raises:
        BrokenContract: If the program fails on dims left of its plates, or its densities are not those of single draws.
    """
    first, n = next(iter(batch.values())), 1 if seen.whole else len(next(iter(batch.values())))
    left, names = -1 - seen.nesting, seen.enumerated

    def score(function: Any, values: dict[str, Tensor], samples: int, first: int) -> Tensor:
        return log_density(summed_trace(function, batch, values, names, first), samples, n)

    try:
        with torch.no_grad(), trial(program) as twin, fork_rng(seed, device=device_and_dtype(program, first)[0]):
            own: Any = traces_of(twin, batch, seed)[0].nodes  # also so that lazy parameters are made without particles
            score(twin.model, {name: own[name]["value"] for name in seen.latents}, 1, left)
            if not particles:
                return
            plate = pyro.plate("particles", particles, dim=left)
            guide: Any = poutine.trace(plate(twin.guide)).get_trace(**batch_of(twin.guide, batch)).nodes
            given = {name: guide[name]["value"] for name in seen.latents}
            for number, together in enumerate(score(plate(twin.model), given, particles, left - 1)):
                one = {name: value[number].reshape(own[name]["value"].shape) for name, value in given.items()}
                if not _same(together, score(twin.model, one, 1, left)[0], batch):
                    raise ValueError("the density of two draws side by side is not that of each alone")
            pair = all_values(twin, batch, particles, seen.nesting, names, seen.enumerated_by_guide)
            Weights(*pair, particles, n, seen.observed)
    except (*FAILED, AssertionError) as error:
        raise BrokenContract(
            f"Expected a program that runs with the values of {', '.join(names)} side by side, in dims left of all "
            "plates (chains by pyro.markov, tables indexed by pyro.ops.indexing.Vindex); it raised: "
            f"{(str(error) or repr(error)).splitlines()[0]}"
        ) from error


def _same(one: Tensor, other: Tensor, batch: Batch) -> bool:
    """Whether densities agree to the precision of the data."""
    slack = 1e-4 if any(value.dtype == torch.float32 for value in batch.values()) else 1e-8
    return torch.allclose(one, other, rtol=slack, atol=slack, equal_nan=True)


def _check_particles(program: Any, batch: Batch, seen: Structure, seed: int) -> None:
    """Check that a program has densities with a dim of particles left of all plates, as evidence needs them."""
    n, first = len(next(iter(batch.values()))), next(iter(batch.values()))
    if seen.enumerated:
        _check_enumerated(program, batch, seen, seed)
        return
    try:
        with torch.no_grad(), trial(program) as twin, fork_rng(seed, device=device_and_dtype(program, first)[0]):
            for trace in trace_pair(twin, batch, 3, seen.nesting):
                log_density(trace, 3, n)
    except (KeyError, NotImplementedError):  # of flows without an inverse, which some verbs do not need
        return
    except FAILED as error:
        raise ValueError(
            "Expected a program that also runs with dims of particles left of the data's, as evidence needs: shapes "
            f"(..., n, event); it raised: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
