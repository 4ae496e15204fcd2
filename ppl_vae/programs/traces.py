"""Traces: what can be read off any Pyro program, whatever its latent sites and inner plates."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import check_finite
from ppl_vae.programs.param_store import device_and_dtype, scope

Batch = dict[str, Tensor]


def check_batch(program: Any, batch: Mapping[str, Tensor], *, check: bool = True) -> Batch:
    """Check a batch and bring it to the program's device and floating type.

    If the model asks for `index` and the batch has none, the data are numbered from 0.

    Args:
        program: any program.
        batch: data by name.
        check: whether to look at the values; data drawn anew from a source that was checked need no second look.

    Raises:
        ValueError: If a value is not finite, the model does not take the batch, or the data do not fit.
    """
    if check:
        check_finite(batch)
    first = next(iter(batch.values()))
    device, dtype = device_and_dtype(program, first)
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
    """The entries of a batch that a model or guide takes; labels that it does not ask for are left out."""
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
        ValueError: If the program breaks the contract: no plate `"data"` at dim -1, a site outside it, or latent
            sites that differ between model and guide.
    """
    few = {key: value[:2] for key, value in batch.items()}
    device, _ = device_and_dtype(program, next(iter(few.values())))
    with torch.no_grad(), scope(program), fork_rng(seed, device=device):
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
                    "Evidence is per datum, so nothing may be drawn outside that plate."
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
