"""Plates: which one holds the data, and whether a program has latent variables outside it."""

import math
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.poutine.trace_struct import Trace

from ppl_vae.programs.traces import plain_sites

Pair = tuple[Trace, Trace]  # of the guide and the model


class BrokenContract(ValueError):
    """A program that is none: its data plate is not where it should be, or model and guide have different sites."""


def data_plate(program: Any) -> str | None:
    """Name of the plate that holds the data; None if the whole data set counts as one datum in any case."""
    return getattr(program, "data_plate", "data")


def frames(node: Any) -> dict[str, int]:
    """Plates around a site, by name, with their dims."""
    return {frame.name: frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}


def is_whole(pair: Pair, plate: str | None) -> bool:
    """Whether the whole data set counts as one datum: a site of the guide or the model lies outside the data plate.

    Raises:
        BrokenContract: If all sites lie in one outermost plate of another name, which is proposed, or in the data plate
            at another dim.
    """
    around = [frames(trace.nodes[name]) for trace in pair for name in plain_sites(trace)]
    if plate is None or not around:
        return True
    if all(site.get(plate) == -1 for site in around):
        return False
    if all(plate in site for site in around):
        raise BrokenContract(
            f"Expected the data plate '{plate}' as the outermost one at dim -1; it is at dim "
            f"{min(site[plate] for site in around)}. Give it dim=-1 and the inner plates the dims left of it; with "
            "Program(..., data_plate=None) the whole data set counts as one datum."
        )
    outer = set.intersection(*({name for name, dim in site.items() if dim == -1} for site in around))
    if outer:
        name = outer.pop()
        raise BrokenContract(
            f"Expected an outermost plate '{plate}' at dim -1; all sites are in '{name}'. If that holds the data, say "
            f"so: Program(..., data_plate='{name}'). With data_plate=None the whole data set counts as one datum."
        )
    return True


def subsampled(pair: Pair) -> str | None:
    """Name of a plate that holds only a part of its data; None if there is none."""
    around = (frame for trace in pair for name in plain_sites(trace) for frame in _stack(trace, name))
    return next((str(frame.name) for frame in around if frame.full_size not in (None, frame.size)), None)


def check_sizes(pair: Pair, latents: list[str]) -> None:
    """Check that plates and latent sites have one size in guide and model.

    Raises:
        BrokenContract: Naming the plate or site that has two.
    """
    plates: dict[str, int] = {}
    for trace in pair:
        for name in plain_sites(trace):
            for frame in _stack(trace, name):
                full = frame.full_size or frame.size
                if plates.setdefault(frame.name, full) != full:
                    raise BrokenContract(
                        f"Expected plate '{frame.name}' to have one size; it has {plates[frame.name]} in the guide and "
                        f"{full} in the model. Make the guide for these data."
                    )
    for name in latents:
        fns: list[Any] = [trace.nodes[name]["fn"] for trace in pair]
        sizes = [math.prod((*fn.batch_shape, *fn.event_shape)) for fn in fns]
        if sizes[0] != sizes[1]:
            raise BrokenContract(
                f"Expected site '{name}' to have one size in model and guide; it has {sizes[1]} entries in the model "
                f"and {sizes[0]} in the guide. Put it into the same plates in both."
            )


def _stack(trace: Trace, name: str) -> Any:
    node: Any = trace.nodes[name]
    return node["cond_indep_stack"]


def local_plate(pair: Pair, latents: list[str]) -> str | None:
    """The plate that holds the most latent sites, if its elements are independent given all sites outside it.

    They are where no site outside the plate comes after a latent site inside it, in both traces. None also where the
    guide's sites inside the plate are functions of sites outside, so that there is nothing to draw anew.
    """
    sites: Any = pair[1].nodes
    counts: dict[tuple[str, int], int] = {}
    for name in latents:
        for plate in frames(sites[name]).items():
            counts[plate] = counts.get(plate, 0) + 1
    fits = [
        plate
        for plate, count in counts.items()
        if count < len(latents) and all(_independent(trace, *plate) for trace in pair) and _drawn_inside(pair[0], plate)
    ]
    return max(fits, key=lambda plate: counts[plate])[0] if fits else None


def _independent(trace: Trace, plate: str, dim: int) -> bool:
    begun, names = False, set(plain_sites(trace))
    for name, node in trace.nodes.items():
        if name in names:
            inside = frames(node).get(plate) == dim
            if begun and not inside:
                return False
            begun |= inside and not node["is_observed"]
    return True


def _drawn_inside(guide: Trace, plate: tuple[str, int]) -> bool:
    nodes: Any = guide.nodes
    inside = [nodes[name] for name in plain_sites(guide) if plate in frames(nodes[name]).items()]
    return any(not is_point(node["fn"]) for node in inside)


def is_point(distribution: Any, *kinds: type) -> bool:
    """Whether a distribution is a point, `Delta`, or of the kinds given."""
    kinds = kinds or (Delta,)
    while not isinstance(distribution, kinds) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, kinds)


def fixed(pair: Pair, again: Trace) -> tuple[str, ...]:
    """Latent sites of the guide that are points: a `Delta` at the same place in another trace."""
    nodes: Any = pair[0].nodes
    others: Any = again.nodes
    return tuple(
        name
        for name in plain_sites(pair[0], pair[0].stochastic_nodes)
        if is_point(nodes[name]["fn"]) and torch.equal(nodes[name]["value"], others[name]["value"])
    )


def observes(guide: Trace) -> list[str]:
    """What a guide observes beside the points and factors by which it transforms."""
    nodes: Any = guide.nodes
    return [name for name in guide.observation_nodes if not is_point(nodes[name]["fn"], Delta, Unit)]
