"""The log joint density of a program and the path that leads to it, as functions of one real vector a datum."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints, identity_transform

from ppl_vae.captured import Captured
from ppl_vae.exact import Layout
from ppl_vae.traces import Structure, batch_of, log_density, scope, seeded, structure, trace_pair

__all__ = ["Joint", "Path", "State"]

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
        with torch.no_grad(), scope(program), seeded(0, device=self.device):
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


@dataclass(frozen=True)
class State:
    """Where the chains are.

    Args:
        u: vectors, (k, n, z).
        base: log density of the base, (k, n).
        tilt: log density of the joint less that of the base, (k, n).
        base_slope: gradient of `base`, (k, n, z).
        tilt_slope: gradient of `tilt`, (k, n, z).
    """

    u: Tensor
    base: Tensor
    tilt: Tensor
    base_slope: Tensor
    tilt_slope: Tensor

    def where(self, accept: Tensor, other: "State") -> "State":
        """Take the other state where `accept`, (k, n), is false."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(State)]
        return State(*(torch.where(accept if a.dim() == 2 else accept.unsqueeze(-1), a, b) for a, b in pairs))


class Path:
    r"""The densities :math:`f_\beta` between a base and the joint.

    Args:
        joint: of the program and its data.
        start: the base, `"prior"` or `"guide"`.

    Raises:
        ValueError: for another base.
    """

    def __init__(self, joint: Joint, start: Literal["prior", "guide"] = "prior") -> None:
        if start not in ("prior", "guide"):
            raise ValueError(f"Expected `start` to be 'prior' or 'guide'; got {start!r}.")
        if start == "guide" and joint.auxiliary:
            raise ValueError(f"Expected a guide without auxiliary sites for start='guide'; got {joint.auxiliary[0]!r}.")
        self.joint, self.start = joint, start
        self._both = Captured(self._ends)
        self._steep = Captured(lambda u: self._ends(u)[2:])

    def draw(self, k: int) -> State:
        """Draw k states from the base."""
        return self.at(self.joint.draw(self.start, k))

    def at(self, u: Tensor) -> State:
        """Evaluate both ends of the path and their gradients at u, (k, n, z)."""
        u = u.detach().contiguous()
        return State(u, *self._both(u))

    def slopes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gradients of both ends alone, as in a `State`, for less work."""
        base, tilt = self._steep(u.detach())
        return base, tilt

    def _ends(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prior, likelihood = self.joint.log_probs(u)
            if self.start == "prior":
                ends = prior, likelihood, slope(prior, u), slope(likelihood, u)
            else:
                base = self.joint.log_guide(u)
                inner, whole = slope(base, u), prior + likelihood
                ends = base, whole - base, inner, slope(whole, u) - inner
        return tuple(end.detach() for end in ends)


def slope(value: Tensor, u: Tensor) -> Tensor:
    """Give the gradient of the sum of `value` in u: of its ones, so that it holds no trace of the value itself."""
    if not value.requires_grad:
        return torch.zeros_like(u)
    ones = torch.ones(value.shape, dtype=value.dtype, device=value.device)
    found = torch.autograd.grad(value, u, ones, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(u) if found is None else found
