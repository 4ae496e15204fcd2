"""Structure of a program: what its traces show, and whether its guide keeps one row per datum by position."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae._seeds import fork_rng
from ppl_vae.programs.param_store import copied, device_and_dtype, scope, to_double
from ppl_vae.programs.rows import known_data
from ppl_vae.programs.traces import Batch, batch_of, log_density, plain_sites, trace_pair

OTHER_DATA = (
    "Expected the data that this program was fitted to, in their order; got {n} others. This guide keeps one row per "
    "datum and scores no others: take `index`, or an amortized guide."
)
_FAILED = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)  # of a program on strange shapes


@dataclass(frozen=True)
class Structure:
    """What the traces of a program show.

    Args:
        latents: names of the latent sites, in the model's order.
        observed: names of the observed sites.
        nesting: how many plates enclose a site at the most, the data plate included.
        kl: for each latent site, whether its KL term is `analytic` under `TraceMeanField_ELBO`, or `sampled`.
        same_order: whether model and guide visit the latent sites in one order.
        shapes: of each site of one datum, (*inner plates, *event).
        not_reparameterised: names of the guide's sites whose draws have no gradient, such as discrete ones.
        rows: how many rows a program has that keeps one row per datum by position, and so takes these data as a whole
            or not at all; None for all others.
    """

    latents: tuple[str, ...]
    observed: tuple[str, ...]
    nesting: int
    kl: dict[str, str]
    same_order: bool
    shapes: dict[str, tuple[int, ...]]
    not_reparameterised: tuple[str, ...]
    rows: int | None = None


def structure(program: Any, batch: Mapping[str, Tensor], *, seed: int = 0) -> Structure:
    """Read a program's structure off traces of a copy, on the first data of a batch.

    A program that fails on these but not on the whole batch, whose parameters grow with the data, or whose density of
    a datum changes with its place in the batch keeps one row per datum by position.

    Raises:
        ValueError: If the program breaks the contract: no plate `"data"` at dim -1, a site outside it, latent sites
            that differ between model and guide, or no densities beside particles.
    """
    n = len(next(iter(batch.values())))
    part, whole = _first(batch, 2), False
    try:
        guide, model, sizes = _traces(program, part, seed)
    except _FAILED:
        if n <= 2:
            raise
        part, whole = dict(batch), True
        try:
            guide, model, sizes = _traces(program, part, seed)
        except _FAILED as error:
            raise (ValueError(OTHER_DATA.format(n=n)) if known_data(program, batch) is False else error) from None
    seen = _read(guide, model)
    _check_particles(program, part, seen.nesting, seed)
    if not whole and n > 1:
        try:
            whole = sizes != _traces(program, _first(batch, 3 if n > 2 else 1), seed)[2]
        except _FAILED:
            whole = True
        whole = whole or _depends_on_place(program, _first(batch, 3), seed)
    return replace(seen, rows=n if whole else None)


def _first(batch: Mapping[str, Tensor], count: int) -> Batch:
    return {key: value[:count] for key, value in batch.items()}


@contextmanager
def trial(program: Any) -> Iterator[Any]:
    """A copy of a program to try out, so that whatever it sets up or registers with Pyro is dropped."""
    try:
        twin = copied(program)
    except (RuntimeError, TypeError):  # it holds tensors or handles that cannot be copied
        twin = program
    with scope(twin, keep=False):
        yield twin


def _traces(program: Any, batch: Batch, seed: int) -> tuple[Trace, Trace, dict[str, Any]]:
    """Traces of guide and model, and the shapes of the parameters that these have used or set up."""
    n, first = len(next(iter(batch.values()))), next(iter(batch.values()))
    device, _ = device_and_dtype(program, first)
    with torch.no_grad(), trial(program) as twin, fork_rng(seed, device=device):
        guide = poutine.trace(twin.guide).get_trace(**batch_of(twin.guide, batch))
        kept = {
            frame.size
            for name in plain_sites(guide)
            for frame in guide.nodes[name]["cond_indep_stack"]
            if frame.name == "data"
        }
        if kept - {n}:
            raise ValueError(
                f"Expected the {kept.pop()} data that this guide keeps one row each for; got {n}. Pass an autoguide "
                "itself as the guide, not within a function, and make it anew for other data."
            )
        model = poutine.trace(poutine.replay(twin.model, trace=guide)).get_trace(**batch)
        tensors = _parameters(twin, guide, model)
    return guide, model, {name: tensor.shape for name, tensor in tensors.items()}


def _parameters(program: Any, *traces: Trace) -> dict[str, Tensor]:
    """What a program learns, by name: parameters of the module and those that its traces have registered."""
    tensors: dict[str, Tensor] = {**(dict(program.named_parameters()) if isinstance(program, nn.Module) else {})}
    for trace in traces:
        nodes: Any = trace.nodes
        tensors |= {name: nodes[name]["value"].unconstrained() for name in trace.param_nodes if "$$$" not in name}
    return tensors


def _read(guide: Trace, model: Trace) -> Structure:
    nodes: Any = guide.nodes
    sampled = plain_sites(guide, guide.stochastic_nodes)
    drawn = [name for name in sampled if not nodes[name]["infer"].get("is_auxiliary")]
    latents = plain_sites(model, model.stochastic_nodes)
    if set(drawn) != set(latents):
        raise ValueError(
            f"Expected model and guide to have the same latent sites; only the model has "
            f"{sorted(set(latents) - set(drawn)) or 'none'}, "
            f"only the guide has {sorted(set(drawn) - set(latents)) or 'none'}."
        )
    depth, shapes = 0, {}
    for trace in (guide, model):
        for name in plain_sites(trace):
            node: Any = trace.nodes[name]
            frames = {frame.name: frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
            if frames.get("data") != -1:
                raise ValueError(
                    f"Expected every site inside the outermost plate 'data' at dim -1; site '{name}' is in "
                    f"{frames or 'no plate'}. "
                    "Evidence is per datum, so nothing may be drawn outside that plate."
                )
            depth = max(depth, *(-dim for dim in frames.values()))
            inner = [
                frame.size for frame in sorted(node["cond_indep_stack"], key=lambda frame: frame.dim) if frame.dim < -1
            ]
            shapes[name] = (*inner, *node["fn"].event_shape)
    kl = {name: _kl_term(guide.nodes[name], model.nodes[name]) for name in latents}
    without = tuple(name for name in sampled if not nodes[name]["fn"].has_rsample)
    observed = tuple(plain_sites(model, model.observation_nodes))
    return Structure(tuple(latents), observed, depth, kl, drawn == latents, shapes, without)


def _kl_term(q: Any, p: Any) -> str:
    try:
        kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return "sampled"
    return "analytic"


def _check_particles(program: Any, batch: Batch, nesting: int, seed: int) -> None:
    """Check that a program has densities with a dim of particles left of all plates, as evidence needs them."""
    n, first = len(next(iter(batch.values()))), next(iter(batch.values()))
    try:
        with torch.no_grad(), trial(program) as twin, fork_rng(seed, device=device_and_dtype(program, first)[0]):
            for trace in trace_pair(twin, batch, 3, nesting):
                log_density(trace, 3, n)
    except (KeyError, NotImplementedError):  # of flows without an inverse, which some verbs do not need
        return
    except _FAILED as error:
        raise ValueError(
            "Expected a program that also runs with dims of particles left of the data's, as evidence needs: shapes "
            f"(..., n, event); it raised: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error


def _depends_on_place(program: Any, batch: Batch, seed: int) -> bool:
    """Whether the density of a datum changes with its place in a batch, under parameters that differ row by row.

    In double precision, so that rounding does not count, if the program runs in it.
    """
    double = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    for exact in (True, False):
        try:
            return _moves(to_double(program), double, seed, 1e-7) if exact else _moves(program, batch, seed, 1e-3)
        except Exception:  # of any kind, as in a flow that cannot be inverted: then there is no telling
            continue
    return False


def _moves(program: Any, batch: Batch, seed: int, tolerance: float) -> bool:
    n, first = len(next(iter(batch.values()))), next(iter(batch.values()))
    order = torch.arange(n, device=first.device).roll(1)
    device, rolled = device_and_dtype(program, first)[0], {key: value[order] for key, value in batch.items()}

    def scores(batch: Batch, values: dict[str, Tensor], seed: int) -> Tensor:
        with fork_rng(seed, "probe", device=device):
            traces = [
                poutine.trace(poutine.condition(part, data=values)).get_trace(**batch_of(part, batch))
                for part in (twin.guide, twin.model)
            ]
        return torch.stack([_scored(trace, n) for trace in traces])

    with torch.no_grad(), trial(program) as twin, pyro.validation_enabled(False):
        if isinstance(twin, nn.Module) and twin is not program:
            twin.eval()
        with fork_rng(seed, "probe", device=device):
            guide = poutine.trace(twin.guide).get_trace(**batch_of(twin.guide, batch))
            model = poutine.trace(poutine.replay(twin.model, trace=guide)).get_trace(**batch)
            with _disturbed(_parameters(twin, guide, model)):
                guide = poutine.trace(twin.guide).get_trace(**batch_of(twin.guide, batch))
                nodes: Any = guide.nodes
                values = {name: nodes[name]["value"] for name in plain_sites(guide, guide.stochastic_nodes)}
                dims = {name: -1 - nodes[name]["fn"].event_dim for name in values}
                moved = {name: value.index_select(dims[name], order) for name, value in values.items()}
                here, again = scores(batch, values, seed), scores(batch, values, seed + 1)
                there = scores(rolled, moved, seed)

    def close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    return close(here, again) and not close(here[:, order], there)


@contextmanager
def _disturbed(tensors: dict[str, Tensor]) -> Iterator[None]:
    """Add noise to tensors, so that rows that are alike differ, and take it back."""
    kept = [tensor.clone() for tensor in tensors.values()]
    try:
        for tensor in tensors.values():
            tensor.add_(0.3 * torch.randn_like(tensor))
        yield
    finally:
        for tensor, value in zip(tensors.values(), kept, strict=True):
            tensor.copy_(value)


def _scored(trace: Trace, n: int) -> Tensor:
    """Log density of each datum, (n,); a point has none, and counts by its squared distance from the value."""
    nodes: Any = trace.nodes
    points = [name for name in plain_sites(trace) if _is_point(nodes[name]["fn"])]
    total = log_density(trace, 1, n, [name for name in plain_sites(trace) if name not in points])[0]
    for name in points:
        apart = (nodes[name]["fn"].mean - nodes[name]["value"]).double().square()
        total = total - apart.flatten(apart.dim() - nodes[name]["fn"].event_dim).sum(-1).reshape(-1, n).sum(0)
    return total


def points_of(trace: Trace) -> list[str]:
    """Latent sites that are points rather than distributions, if no auxiliary site carries their density."""
    nodes: Any = trace.nodes
    if any(nodes[name]["infer"].get("is_auxiliary") for name in trace.stochastic_nodes):
        return []
    return [name for name in plain_sites(trace, trace.stochastic_nodes) if _is_point(nodes[name]["fn"])]


def _is_point(distribution: Any) -> bool:
    while not isinstance(distribution, Delta) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, Delta)
