"""Trials of a program on a copy, and whether the density of a datum depends on its place in the batch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from ppl_vae._seeds import fork_rng
from ppl_vae.programs.enumeration import enumerated_sites, enumerating, log_density
from ppl_vae.programs.param_store import copied, device_and_dtype, scope, to_double
from ppl_vae.programs.plates import data_plate, frames, is_point
from ppl_vae.programs.traces import Batch, aligned, batch_of, plain_sites

TRIED = 64  # data on which densities are compared
FAILED = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError)  # on strange shapes


def first(batch: Mapping[str, Tensor], count: int) -> Batch:
    """The first data of a batch."""
    return {key: value[:count] for key, value in batch.items()}


@contextmanager
def trial(program: Any, *, double: bool = False) -> Iterator[Any]:
    """A copy of a program to try out, so that whatever it sets up or registers with Pyro is dropped."""
    try:
        twin = to_double(program) if double else program
        twin = copied(program) if twin is program else twin
    except (RuntimeError, TypeError):  # it holds tensors or handles that cannot be copied
        twin = program
    with scope(twin, keep=False):
        yield twin


def traces_of(program: Any, batch: Batch, seed: int) -> tuple[Trace, Trace]:
    """Trace the guide and, replaying it, the model."""
    first = next(iter(batch.values()))
    with fork_rng(seed, device=device_and_dtype(program, first)[0]):
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, batch))
        nodes: Any = guide.nodes
        around = [frame for name in plain_sites(guide) for frame in nodes[name]["cond_indep_stack"]]
        own = [(frame.size, frame.full_size) for frame in around if frame.name == data_plate(program)]
        kept = [sizes[0] for sizes in own if aligned(batch) and len(first) not in sizes]
        if kept:
            raise ValueError(
                f"Expected the {kept.pop()} data that this guide keeps one row each for; got {len(first)}. Pass an "
                "autoguide itself as the guide, not within a function, and make it anew for other data."
            )
        return guide, poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**batch)


def parameters_of(program: Any, *traces: Trace) -> dict[str, Tensor]:
    """What a program learns, by name: parameters of the module and those that its traces have registered."""
    tensors: dict[str, Tensor] = {**(dict(program.named_parameters()) if isinstance(program, nn.Module) else {})}
    for trace in traces:
        nodes: Any = trace.nodes
        tensors |= {name: nodes[name]["value"].unconstrained() for name in trace.param_nodes if "$$$" not in name}
    return tensors


def nesting_of(pair: tuple[Trace, Trace]) -> int:
    """How many plates enclose a site at the most."""
    around = (frames(trace.nodes[name]) for trace in pair for name in plain_sites(trace))
    return max((-dim for plates in around for dim in plates.values()), default=0)


def shapes_of(program: Any, *traces: Trace) -> dict[str, torch.Size]:
    """Shapes of what a program learns, by name."""
    return {name: tensor.shape for name, tensor in parameters_of(program, *traces).items()}


def by_place(program: Any, batch: Mapping[str, Tensor], shapes: dict[str, torch.Size], seed: int) -> bool:
    """Whether a program's parameters grow with the data, or the density of a datum changes with its place in a batch.

    Shapes are those of the parameters on two data. The densities are compared in double precision, so that rounding
    does not count, if the program runs in it. Rows that several data in a row share, more than `TRIED`, are not seen.
    """
    n, batch = len(next(iter(batch.values()))), first(batch, TRIED)
    with torch.no_grad(), trial(program) as twin:
        try:
            found = shapes_of(twin, *traces_of(twin, batch if n > 2 else first(batch, 1), seed))
            if Counter(found.values()) != Counter(shapes.values()):  # names may differ, as those by `id(self)` do
                return True
        except FAILED:
            return True
    double = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    for exact in (True, False):
        try:
            with torch.no_grad(), trial(program, double=exact) as twin, pyro.validation_enabled(False):
                return _moves(twin, double if exact else batch, seed, 1e-7 if exact else 1e-3)
        except _Failed:  # then there is no telling
            continue
    return False


class _Failed(Exception):
    """A program failed in a trial."""


@contextmanager
def _trying() -> Iterator[None]:
    """Turn whatever a program raises in double precision or under disturbed parameters into one exception."""
    try:
        yield
    except Exception as error:  # of any kind, as in a flow that cannot be inverted
        raise _Failed from error


def _moves(program: Any, batch: Batch, seed: int, tolerance: float) -> bool:
    """Whether the densities of data change with the order of the batch, under disturbed parameters."""
    n, first = len(next(iter(batch.values()))), next(iter(batch.values()))
    order = torch.arange(n, device=first.device).roll(1)
    device = device_and_dtype(program, first)[0]

    def scores(batch: Batch, values: dict[str, Tensor], seed: int) -> Tensor:
        rows = []
        with fork_rng(seed, "probe", device=device):
            for part in (program.guide, program.model):
                scored = enumerating(poutine.condition(part, data=values), names, left)
                with _trying():
                    rows.append(_scored(poutine.trace(scored).get_trace(**batch_of(part, batch)), n))
        return torch.stack(rows)

    with _trying():
        pair = traces_of(program, batch, seed)
    names, left = enumerated_sites(*pair)[0], -1 - nesting_of(pair)
    with fork_rng(seed, "probe", device=device), _disturbed(parameters_of(program, *pair)):
        with _trying():
            guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, batch))
        drawn: dict[str, Any] = {
            name: guide.nodes[name] for name in plain_sites(guide, guide.stochastic_nodes) if name not in names
        }
        values = {name: node["value"] for name, node in drawn.items()}
        with _trying():  # a value may lack the dim of the data
            moved = {name: node["value"].index_select(-1 - node["fn"].event_dim, order) for name, node in drawn.items()}
        here, again = scores(batch, values, seed), scores(batch, values, seed + 1)
        there = scores({key: value[order] for key, value in batch.items()}, moved, seed)

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
    points = [name for name in plain_sites(trace) if is_point(nodes[name]["fn"])]
    total = log_density(trace, 1, n, [name for name in plain_sites(trace) if name not in points])[0]
    for name in points:
        apart = (nodes[name]["fn"].mean - nodes[name]["value"]).double().square()
        total = total - apart.flatten(apart.dim() - nodes[name]["fn"].event_dim).sum(-1).reshape(-1, n).sum(0)
    return total
