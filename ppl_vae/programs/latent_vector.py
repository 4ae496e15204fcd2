"""The log joint density of a program and the path that leads to it, as functions of one real vector a datum."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints, identity_transform

from ppl_vae._seeds import fork_rng
from ppl_vae.programs.param_store import device_and_dtype, scope
from ppl_vae.programs.traces import Structure, batch_of, log_density, structure, trace_pair


class Layout:
    """How the values of several latent sites lie in one vector a datum.

    Args:
        sites: name, a value `(k, *inner plates, n, *event)` and the number of event dimensions of each site.
        nesting: how many plates enclose a site at the most.
    """

    def __init__(self, sites: list[tuple[str, Tensor, int]], nesting: int) -> None:
        self.nesting = nesting
        self.discrete = {name: value.dtype for name, value, _ in sites if not value.is_floating_point()}
        self.sites = [
            (name, value.shape[1 : value.dim() - event], value.shape[value.dim() - event :])
            for name, value, event in sites
        ]

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Put the sites side by side, shape (k, n, z)."""
        flat = []
        for name, batch, event in self.sites:
            value = values[name].reshape(len(values[name]), -1, batch[-1], event.numel())
            flat.append(value.transpose(1, 2).flatten(2))
        return torch.cat(flat, -1)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Take a vector (k, n, z) apart, site by site."""
        sizes = [batch[:-1].numel() * event.numel() for _, batch, event in self.sites]
        values = {}
        for (name, batch, event), part in zip(self.sites, vector.split(sizes, -1), strict=True):
            inner = part.unflatten(-1, (batch[:-1].numel(), event.numel())).transpose(1, 2)
            values[name] = inner.reshape(len(vector), *batch, *event)
        return values


def guide_draws(program: Any, batch: dict[str, Tensor], draws: int, found: Structure) -> tuple[Tensor, Layout]:
    """Draw the latent variables from the guide.

    Returns:
        Draws (k, n, z) in double precision, several sites side by side in the model's order, and how they lie.
    """
    particles = pyro.plate("particles", draws, dim=-1 - found.nesting)
    trace = poutine.trace(particles(program.guide)).get_trace(**batch_of(program.guide, batch))
    return packed(trace, found), layout_of(trace, found)


def packed(trace: Any, found: Structure) -> Tensor:
    """Give the latent variables of a trace with particles, shape (k, n, z), in double precision."""
    values = {name: trace.nodes[name]["value"] for name in found.latents}
    return layout_of(trace, found).pack(values).double()


def site_values(program: Any, layout: Layout, z: Tensor) -> dict[str, Tensor]:
    """Take latent vectors (k, n, z) apart, site by site, in the program's precision; discrete sites keep their type."""
    dtype = device_and_dtype(program)[1] or torch.get_default_dtype()
    return {name: value.to(layout.discrete.get(name, dtype)) for name, value in layout.unpack(z).items()}


def layout_of(trace: Any, found: Structure) -> Layout:
    """Say how the latent variables of a trace with particles lie side by side."""
    sites = [(name, trace.nodes[name]["value"], trace.nodes[name]["fn"].event_dim) for name in found.latents]
    return Layout(sites, found.nesting)


Batch = dict[str, Tensor]


class Joint:
    r"""The log joint density of a program, and its guide's, as functions of one real vector a datum.

    The latent sites stand side by side in the model's order. One on the positive numbers is seen through a logarithm,
    one on an interval through a logit, with the volume that this brings.

    Args:
        program: any program whose latent sites are continuous.
        batch: data, as `prepare` gives them.
        found: the program's structure, read off where not given.

    Raises:
        ValueError: for a latent site that is discrete or of a support without a simple change of variables.
    """

    def __init__(self, program: Any, batch: Batch, found: Structure | None = None) -> None:
        self.program, self.batch = program, batch
        self.found = structure(program, batch) if found is None else found
        first = next(iter(batch.values()))
        self.n, self.device = len(first), first.device
        with torch.no_grad(), scope(program), fork_rng(0, device=self.device):
            model, guide = trace_pair(program, batch, 1, self.found.nesting)
        nodes: Any = guide.nodes
        self.auxiliary = [name for name in guide.stochastic_nodes if nodes[name]["infer"].get("is_auxiliary")]
        self.transforms, self.shapes, sites = {}, {}, []
        for name in self.found.latents:
            node: Any = model.nodes[name]
            value: Any = nodes[name]["value"]
            self.transforms[name] = biject_to(_support(name, node["fn"].support))
            plates = sorted(frame.dim for frame in node["cond_indep_stack"] if frame.vectorized)
            event = value.shape[value.dim() - node["fn"].event_dim :]
            batched = value.shape[: value.dim() - len(event)]
            self.shapes[name] = (*(batched[dim] for dim in plates if -1 > dim > -1 - self.found.nesting), *event)
            sites.append((name, value, node["fn"].event_dim))
        self.layout = Layout(sites, self.found.nesting)
        self.dtype = torch.promote_types(sites[0][1].dtype, torch.float32)
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    def rows(self, chosen: Tensor) -> "Joint":
        """Take the data for which `chosen`, (n,), is true."""
        return Joint(self.program, {key: value[chosen] for key, value in self.batch.items()}, self.found)

    def log_probs(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Give log p(z) and log p(x|z), each (k, n) in nats and double precision, at vectors u (k, n, z)."""
        values, volume = self._values(u)
        trace = self._trace(self.program.model, values, len(u))
        prior = log_density(trace, len(u), self.n, self.found.latents)
        return prior + volume, log_density(trace, len(u), self.n, self.found.observed)

    def log_guide(self, u: Tensor) -> Tensor:
        """Give log q(z|x), (k, n) in nats, at vectors u (k, n, z)."""
        values, volume = self._values(u)
        try:
            return log_density(self._trace(self.program.guide, values, len(u)), len(u), self.n) + volume
        except NotImplementedError as error:
            raise ValueError("Expected a guide that can score any z for start='guide'; got one that cannot.") from error

    @torch.no_grad()
    def draw(self, start: Literal["prior", "guide"], k: int) -> Tensor:
        """Draw k vectors a datum, (k, n, z), from the prior or the guide, out of the global random state."""
        function = self.program.model if start == "prior" else self.program.guide
        return self.vector(self._trace(function, {}, k))

    def vector(self, trace: Trace) -> Tensor:
        """Read the vectors (k, n, z) off a trace that has particles."""
        nodes: Any = trace.nodes
        return self._pack({name: nodes[name]["value"] for name in self.found.latents})

    def place(self, z: Tensor) -> Tensor:
        """Give the vectors u, (k, n, z), at which the latent variables are z, (k, n, z)."""
        return self._pack({name: value.to(self.dtype) for name, value in self.layout.unpack(z).items()})

    def latents(self, u: Tensor) -> Tensor:
        """Give the latent variables themselves, (k, n, z) in double precision, at vectors u."""
        values = self.layout.unpack(u)
        return self.layout.pack({name: self.transforms[name](value) for name, value in values.items()}).double()

    def _pack(self, values: dict[str, Tensor]) -> Tensor:
        return self.layout.pack({name: self.transforms[name].inv(value) for name, value in values.items()})

    def _values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        values, volume = self.layout.unpack(u), 0.0
        for name, raw in values.items():
            transform = self.transforms[name]
            if transform != identity_transform:
                values[name] = transform(raw)
                log_det = transform.log_abs_det_jacobian(raw, values[name]).double()
                inner = log_det.reshape(*log_det.shape[: 1 + self.found.nesting], -1).sum(-1)
                volume = volume + inner.reshape(len(u), -1, self.n).sum(1)
        return values, volume

    def _trace(self, function: Callable[..., Any], values: dict[str, Tensor], k: int) -> Trace:
        particles = pyro.plate("particles", k, dim=-1 - self.found.nesting)
        conditioned = poutine.condition(function, data=values) if values else function
        return poutine.trace(particles(conditioned)).get_trace(**batch_of(function, self.batch))


def _support(name: str, support: Any) -> Any:
    """Give an elementwise constraint that the support of a latent site is, or refuse it by name."""
    inner = support
    while hasattr(inner, "base_constraint"):  # of an independent event, or of a mixture
        inner = inner.base_constraint
    if inner.is_discrete:
        raise ValueError(
            f"Expected continuous latent sites, for their gradients; got '{name}', which is discrete. What takes any "
            "site is log_evidence(program, x, samples)."
        )
    if inner in (constraints.real, constraints.real_vector):
        return constraints.real
    if inner in (constraints.positive, constraints.nonnegative):
        return constraints.positive
    if isinstance(inner, constraints.interval):
        low, high = torch.as_tensor(inner.lower_bound), torch.as_tensor(inner.upper_bound)
        if bool((low == low.flatten()[0]).all()) and bool((high == high.flatten()[0]).all()):
            return constraints.interval(low.flatten()[0], high.flatten()[0])
    raise ValueError(
        f"Expected latent sites on the real or the positive numbers, or on one interval; got '{name}' on {support}."
    )
