"""Traces: what can be read off any Pyro program, whatever its latent sites and inner plates."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae.batches import check_finite, keyed

__all__ = [
    "Structure",
    "batch_of",
    "check_support",
    "doubled",
    "log_density",
    "place",
    "prepare",
    "replayed",
    "scope",
    "seeded",
    "structure",
    "trace_pair",
]

Batch = dict[str, Tensor]


def check_support(site: str, support: Any, x: Tensor, mask: Tensor | None, family: str) -> None:
    """Refuse data outside a likelihood's support, naming the first such value and what to do."""
    inside = support.check(x)
    if mask is not None and mask.shape == inside.shape:
        inside = inside | ~mask
    if bool(inside.all()):
        return
    first = (~inside).nonzero()[0].tolist()
    remedy = "Choose a likelihood whose support holds the data."
    if family == "Bernoulli":
        remedy = (
            'Binarise the data (binarization = "dynamic", "static" or "threshold"), or choose a likelihood for real '
            "numbers, such as Normal."
        )
    place_ = f"row {first[0]}" + (f", column {', '.join(map(str, first[1:]))}" if first[1:] else "")
    raise ValueError(
        f"Expected data in the support of {family}, {_name(support)}, at site '{site}'; got "
        f"{x[tuple(first)].flatten()[0].item():g} at {place_} "
        f"and {int((~inside).sum())} such values in all. {remedy}"
    )


def _name(support: Any) -> str:
    inner = getattr(support, "base_constraint", support)
    return {"Boolean": "{0, 1}", "Real": "the real numbers"}.get(type(inner).__name__.strip("_"), str(support))


@contextmanager
def seeded(*key: int | str, device: torch.device) -> Iterator[None]:
    """Draw from the streams of a key, then leave the global random state as it was found."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(keyed(*key))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def scope(program: Any) -> Iterator[None]:
    """Run a program with a parameter store of its own, on top of the global one, and leave that as it was."""
    store = pyro.get_param_store()
    own = vars(program).setdefault("_ppl_vae_params", {"params": {}, "constraints": {}})
    outer: Any = store.get_state()
    copies = {
        name: value if "$$$" in name else value.detach().clone().requires_grad_()
        for name, value in outer["params"].items()
    }
    merged: Any = {
        "params": {**copies, **own["params"]},
        "constraints": {**outer["constraints"], **own["constraints"]},
    }
    with store.scope(merged):
        yield
    for name, value in merged["params"].items():
        new = name not in copies or value is not copies[name]
        if "$$$" not in name and (new or not torch.equal(value, outer["params"][name])):
            own["params"][name], own["constraints"][name] = value, merged["constraints"][name]


def doubled(program: Any) -> Any:
    """Copy a program in double precision, what it learned through `pyro.param` too; one without tensors stays."""
    if not isinstance(program, nn.Module) or place(program)[1] is None:
        return program
    twin = copy.deepcopy(program).double()
    own = vars(twin).get("_ppl_vae_params", {"params": {}})
    own["params"] = {name: value.detach().double().requires_grad_() for name, value in own["params"].items()}
    return twin


def place(program: Any, x: Tensor | None = None) -> tuple[torch.device, torch.dtype | None]:
    """Give the device of a program and its floating type, `None` where it holds no tensors."""
    tensors = itertools.chain(program.parameters(), program.buffers()) if isinstance(program, nn.Module) else iter(())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is not None:
        return first.device, first.dtype
    return (torch.device("cpu") if x is None else x.device), None


def prepare(program: Any, batch: Mapping[str, Tensor], *, check: bool = True) -> Batch:
    """Check a batch and bring it to the program's device and floating type.

    Where the model asks for `index` and the batch has none, the data are numbered.

    Args:
        program: any program.
        batch: data by name.
        check: whether the values are looked at; data that are drawn anew from a source that was need not be.

    Raises:
        ValueError: for values that are not finite, a batch that the model does not take, or data that do not fit.
    """
    if check:
        check_finite(batch)
    first = next(iter(batch.values()))
    device, dtype = place(program, first)
    moved = {
        key: value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }
    if "index" not in moved and "index" in _keywords(program.model):
        moved["index"] = torch.arange(len(first), device=device)
    taken = batch_of(program.model, moved)
    if not taken.keys() & batch.keys():
        raise ValueError(f"Expected data named {', '.join(_keywords(program.model))}; got {', '.join(batch)}.")
    if check and hasattr(program, "check"):
        program.check(taken)
    return taken


def batch_of(function: Callable[..., Any], batch: Mapping[str, Tensor]) -> Batch:
    """Choose what a model or guide takes; labels that no model asks for stay behind."""
    keywords = _keywords(function)
    return dict(batch) if "**" in keywords else {key: value for key, value in batch.items() if key in keywords}


def _keywords(function: Callable[..., Any]) -> list[str]:
    target = function.forward if isinstance(function, nn.Module) else function
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in inspect.signature(target).parameters.values()]


@dataclass(frozen=True)
class Structure:
    """What the traces of a program show.

    Args:
        latents: names of the latent sites, in the model's order.
        observed: names of the observed sites.
        nesting: how many plates enclose a site at the most, the data plate included.
        kl: for each latent site, whether its KL term is `analytic` under `TraceMeanField_ELBO`, or `sampled`.
        same_order: whether model and guide visit the latent sites in one order.
    """

    latents: tuple[str, ...]
    observed: tuple[str, ...]
    nesting: int
    kl: dict[str, str]
    same_order: bool


def structure(program: Any, batch: Mapping[str, Tensor], *, seed: int = 0) -> Structure:
    """Read a program's structure off one pair of traces, on the first data of a batch.

    Raises:
        ValueError: where the program breaks the contract: no plate `"data"` at dim -1, a site outside it, or latent
            sites that differ between model and guide.
    """
    few = {key: value[:2] for key, value in batch.items()}
    device, _ = place(program, next(iter(few.values())))
    with torch.no_grad(), scope(program), seeded(seed, device=device):
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, few))
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**few)
    drawn = [name for name in guide.stochastic_nodes if not guide.nodes[name]["infer"].get("is_auxiliary")]
    latents = list(model.stochastic_nodes)
    drawn, latents = [_plain(guide, drawn), _plain(model, latents)]
    if set(drawn) != set(latents):
        raise ValueError(
            f"Expected model and guide to have the same latent sites; only the model has "
            f"{sorted(set(latents) - set(drawn)) or 'none'}, "
            f"only the guide has {sorted(set(drawn) - set(latents)) or 'none'}."
        )
    depth = 0
    for trace in (guide, model):
        for name in _plain(trace, [*trace.stochastic_nodes, *trace.observation_nodes]):
            frames = {frame.name: frame.dim for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized}
            if frames.get("data") != -1:
                raise ValueError(
                    f"Expected every site inside the outermost plate 'data' at dim -1; site '{name}' is in "
                    f"{frames or 'no plate'}. "
                    "Evidence is counted a datum, so nothing may be drawn outside that plate."
                )
            depth = max(depth, *(-dim for dim in frames.values()))
    kl = {name: _kl_term(guide.nodes[name], model.nodes[name]) for name in latents}
    return Structure(tuple(latents), tuple(_plain(model, model.observation_nodes)), depth, kl, drawn == latents)


def _plain(trace: Trace, names: Any) -> list[str]:
    return [name for name in names if type(trace.nodes[name]["fn"]).__name__ != "_Subsample"]


def _kl_term(q: Any, p: Any) -> str:
    try:
        kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return "sampled"
    return "analytic"


def trace_pair(program: Any, batch: Mapping[str, Tensor], samples: int, nesting: int) -> tuple[Trace, Trace]:
    """Trace the guide and, replaying it, the model, with `samples` particles at dim -1 - nesting."""
    particles = pyro.plate("particles", samples, dim=-1 - nesting)
    guide = poutine.trace(particles(program.guide)).get_trace(**batch_of(program.guide, batch))
    model = poutine.trace(poutine.replay(particles(program.model), trace=guide)).get_trace(**batch)
    return model, guide


def log_density(trace: Trace, samples: int, n: int, names: Iterable[str] | None = None) -> Tensor:
    """Sum the log probabilities of sites, unscaled and with their masks, over all dims but particles and data.

    Args:
        trace: of a model or guide.
        samples: the number of particles.
        n: the number of data.
        names: the sites that count, all by default.

    Returns:
        Nats, shape (samples, n), in double precision.
    """
    total = torch.zeros(samples, n, dtype=torch.float64)
    for name in _plain(trace, [*trace.stochastic_nodes, *trace.observation_nodes] if names is None else names):
        site: Any = trace.nodes[name]
        log_prob = pyro.distributions.util.scale_and_mask(
            site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), 1.0, site["mask"]
        )
        total = total.to(log_prob.device) + log_prob.double().reshape(samples, -1, n).sum(1)
    return total


def replayed(program: Any, batch: dict[str, Tensor], seed: int) -> tuple[Any, Any]:
    """Trace the guide and, replaying it, the model, without particles."""
    with torch.no_grad(), scope(program), seeded(seed, device=place(program, next(iter(batch.values())))[0]):
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, batch))
        return poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**batch), guide
