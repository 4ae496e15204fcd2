"""Traces: what can be read off any Pyro program, whatever its latent sites and inner plates."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Normal
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae.data.batches import check_finite
from ppl_vae.programs.param_store import device_and_dtype
from ppl_vae.programs.rows import check_numbered, indexed, keywords, numbered

Batch = dict[str, Tensor]
_CHUNK = 64  # entries of a whole data set that are summed in their own precision


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
    taken = batch_of(program.model, numbered(program, moved))
    _check_takes_mask(program, moved)
    if not taken.keys() & batch.keys() - {"index"}:
        raise ValueError(f"Expected data named {', '.join(keywords(program.model))}; got {', '.join(batch)}.")
    if check and hasattr(program, "check"):
        program.check(taken)
    if check and "index" not in batch and indexed(program):
        check_numbered(program, taken)
    return taken


def _check_takes_mask(program: Any, batch: Mapping[str, Tensor]) -> None:
    """Refuse missing entries to a model that does not ask for `mask`, and to a guide that would see a NaN."""
    if "x" not in batch or "mask" not in batch or bool(batch["mask"].all()):
        return
    for role in ("model", "guide"):
        taken = keywords(getattr(program, role))
        if "mask" not in taken and (role == "model" or ("x" in taken and not bool(batch["x"].isfinite().all()))):
            if "**" not in taken:
                raise ValueError(
                    f"Expected a {role} that takes `mask` (True is observed), since entries of `x` are missing; got "
                    f"one that takes {', '.join(taken)}. Let the {role} take `mask`, or drop rows with missing entries."
                )


def batch_of(function: Callable[..., Any], batch: Mapping[str, Tensor]) -> Batch:
    """The entries of a batch that a model or guide takes; labels that it does not ask for are left out."""
    taken = keywords(function)
    return dict(batch) if "**" in taken else {key: value for key, value in batch.items() if key in taken}


def aligned(batch: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a batch share their leading size; they need not where the whole counts as one datum."""
    sizes = {value.shape[:1] for value in batch.values()}
    return len(sizes) == 1 and torch.Size([]) not in sizes


def plain_sites(trace: Trace, names: Iterable[str] | None = None) -> list[str]:
    """The sites of a trace, all by default, without deterministic ones and those by which Pyro subsamples a plate."""
    names = [*trace.stochastic_nodes, *trace.observation_nodes] if names is None else names
    nodes: Any = trace.nodes
    found = [name for name in names if type(nodes[name]["fn"]).__name__ != "_Subsample"]
    return [name for name in found if not nodes[name]["infer"].get("_deterministic")]


def trace_pair(program: Any, batch: Mapping[str, Tensor], samples: int, nesting: int) -> tuple[Trace, Trace]:
    """Trace the guide and, replaying it, the model, with `samples` particles at dim -1 - nesting."""
    particles = pyro.plate("particles", samples, dim=-1 - nesting)
    guide = poutine.trace(particles(program.guide)).get_trace(**batch_of(program.guide, batch))
    model = poutine.trace(poutine.replay(particles(program.model), trace=guide)).get_trace(**batch)
    return model, guide


def replayed(program: Any, batch: Mapping[str, Tensor], guide: Trace, number: int) -> tuple[Trace, Trace]:
    """Trace model and guide without particles, at the values of one particle of a guide's trace."""
    alone = poutine.trace(program.guide).get_trace(**batch_of(program.guide, batch))
    own: Any = alone.nodes
    given = {
        name: node["value"][number].reshape(own[name]["value"].shape)
        for name, node in drawn_sites(guide).items()
        if not isinstance(node["fn"], Delta)  # which is made anew of the values that it stands for
    }
    alone = poutine.trace(Given(given)(program.guide)).get_trace(**batch_of(program.guide, batch))
    return poutine.trace(poutine.replay(program.model, trace=alone)).get_trace(**batch), alone


def drawn_sites(trace: Trace) -> dict[str, Any]:
    """The latent sites of a trace by name, auxiliary ones too."""
    nodes: Any = trace.nodes
    return {name: nodes[name] for name in plain_sites(trace, trace.stochastic_nodes)}


class Given(Messenger):
    """Gives values to sites, which stay latent; unlike `poutine.replay` it leaves a site's `infer` as it is."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.values:
            message["value"] = self.values[message["name"]]


class _OneOf(Messenger):
    """Takes one particle's part of whatever values latent sites are given within."""

    def __init__(self, number: int, latents: Iterable[str]) -> None:
        super().__init__()
        self.number, self.latents = number, latents

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.latents and message["value"] is not None:
            message["value"] = message["value"][self.number]


def trace_in_turn(trace: Callable[[Callable[..., Any]], Trace], function: Any, samples: int, latents: Any) -> Trace:
    """Trace a model or guide that cannot have particles once for each, and stack the traces along a first dim.

    Args:
        trace: makes one trace of a function.
        function: the model or guide. Values that handlers give to its latent sites are stacked likewise.
        samples: the number of particles.
        latents: names of the latent sites.
    """
    traces = [trace(_OneOf(number, latents)(function)) for number in range(samples)]
    stacked: Any = traces[0].copy()
    stacked.alone, stack = traces, stacked.nodes
    for name in plain_sites(stacked):
        nodes: Any = [trace.nodes[name] for trace in traces]
        scores = torch.stack([unscaled(node) for node in nodes])
        stack[name] = {**nodes[0], "value": torch.stack([node["value"] for node in nodes]), "unscaled": scores}
    return stacked  # type: ignore[no-any-return]


def unscaled(site: Any) -> Tensor:
    """Log probabilities of a site, with its mask but without its scale."""
    if "unscaled" in site:
        return site["unscaled"]  # type: ignore[no-any-return]
    plain = type(site["fn"]) is Normal and not site["args"] and not site["kwargs"]
    log_prob = normal(site) if plain else site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return pyro.distributions.util.scale_and_mask(log_prob, 1.0, site["mask"])  # type: ignore[no-any-return]


def normal(site: Any) -> Tensor:
    """Log density of a normal site, without gradients in one piece of memory.

    A scale that is the same for many entries costs no more than its own, which `Normal.log_prob` expands.
    """
    loc, scale = site["fn"].loc, site["fn"].scale
    for dim in range(scale.dim()):
        scale = scale.narrow(dim, 0, 1) if scale.stride(dim) == 0 and scale.shape[dim] > 1 else scale
    apart, constant = site["value"] - loc, scale.log() + 0.5 * math.log(2 * math.pi)
    if torch.is_grad_enabled():
        return (apart / scale).square() * -0.5 - constant
    return apart.div_(scale).square_().mul_(-0.5).sub_(constant)


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
    for name in plain_sites(trace, names):
        log_prob = unscaled(trace.nodes[name])
        parts = log_prob.reshape(samples, -1, n)
        if n == 1 and parts.shape[1] > _CHUNK:  # in double precision from partial sums on, which is faster
            even = parts.shape[1] // _CHUNK * _CHUNK
            sums = parts[:, :even].reshape(samples, -1, _CHUNK).sum(-1, keepdim=True)
            parts = torch.cat([sums, parts[:, even:]], 1)
        total = total.to(log_prob.device) + parts.sum(1, dtype=torch.float64)
    return total
