"""The log joint density of a program, as a function of one real vector per datum."""

import math
from typing import Any, Literal

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import identity_transform

from ppl_vae.programs.bijections import bijection, limits
from ppl_vae.programs.latent_vector import Layout
from ppl_vae.programs.plates import frames
from ppl_vae.programs.target import Role, Target


class Joint:
    r"""The log joint density of a program, and its guide's, as functions of one real vector per datum.

    The latent sites stand side by side in the model's order, each by its unconstrained coordinates and with the volume
    that these bring: a positive number by its logarithm, one of an interval by its logit, a simplex of m entries by
    m - 1 numbers, a positive definite matrix by the m (m + 1) / 2 of its Cholesky factor. `latents` gives the values
    themselves, all entries of them.

    Args:
        program: any program with continuous latent sites, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.

    Attributes:
        target: the program and its data.
        n: the number of data.
        size: the number of unconstrained coordinates per datum, u.
        shapes: of the values of each latent site of a datum, without the data plate.
        transforms: from coordinates to values, site by site.
        auxiliary: names of the guide's auxiliary sites.

    Raises:
        ValueError: If a latent site is discrete, its support has no bijection to vectors, or the bounds of its support
            depend on other latent variables.
    """

    def __init__(self, program: Any, x: Any = None) -> None:
        self.target = target = Target.of(program, x)
        self.n, self.device = target.n, target.device
        structure = target.structure
        if not structure.latents:
            raise ValueError(
                f"Expected latent sites that are not enumerated; got {', '.join(structure.enumerated) or 'none'}, so "
                "that log_evidence(program, x, 1) is exact and nothing is left to integrate."
            )
        with torch.no_grad():
            model, guide = target.traces(1, 0)
        nodes: Any = guide.nodes
        self.auxiliary = [name for name in guide.stochastic_nodes if nodes[name]["infer"].get("is_auxiliary")]
        self.transforms, self.shapes, self._events = {}, {}, {}
        raw: list[tuple[str, Tensor, int]] = []
        for name in structure.latents:
            node: Any = model.nodes[name]
            value: Any = nodes[name]["value"]
            support = node["fn"].support
            transform = self.transforms[name] = bijection(name, support)
            inside = -1 - structure.nesting, 0 if structure.whole else -1
            plates = sorted(dim for dim in frames(node).values() if inside[0] < dim < inside[1])
            event = value.shape[value.dim() - node["fn"].event_dim :]
            self._events[name] = len(event)
            batched = value.shape[: value.dim() - len(event)]
            own = structure.shapes[name]  # with dims that no plate stands for
            self.shapes[name] = own if structure.whole else (*(batched[dim] for dim in plates), *event)
            change = transform.domain.event_dim - transform.codomain.event_dim
            raw.append((name, value.new_empty(transform.inverse_shape(value.shape)), len(event) + change))
        self._check_bounds(model)
        target.flatten(guide)
        self.layout, self.coordinates = target.layout, Layout(raw, self.n)
        self.dtype = torch.promote_types(nodes[structure.latents[0]]["value"].dtype, torch.float32)
        self.size = sum(value.numel() for _, value, _ in raw) // self.n

    def rows(self, chosen: Tensor | slice) -> "Joint":
        """The joint of some of the data: a slice, or a boolean mask of shape (n,)."""
        return Joint(self.target.rows(chosen))

    @property
    def elementwise(self) -> bool:
        """Whether each latent variable has one coordinate of its own."""
        return all(transform.domain.event_dim == 0 for transform in self.transforms.values())

    def _check_bounds(self, model: Trace) -> None:
        """Refuse supports that other latent variables bound, such as Uniform(0, z)."""
        nodes: Any = model.nodes
        bounds = {name: list(limits(nodes[name]["fn"].support)) for name in self.transforms}
        if not any(bounds.values()) or len(bounds) == 1:
            return
        with torch.no_grad():
            others: Any = self.target.traces(1, 1)[0].nodes
        for name, own in bounds.items():
            if not all(map(torch.equal, own, limits(others[name]["fn"].support))):
                raise ValueError(
                    f"Expected supports that stay the same; the bounds of '{name}' depend on other latent variables. "
                    "Sample it from fixed bounds, such as 0 and 1, and stretch it in the model."
                )

    def log_probs(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(z) and log p(x|z), each (k, n) in nats and double precision, at vectors u (k, n, u)."""
        values, volume = self._values(u)
        trace = self._trace("model", values)
        prior = self.target.log_density(trace, len(u), self.target.structure.latents)
        return prior + volume, self.target.log_density(trace, len(u), self.target.structure.observed)

    def log_guide(self, u: Tensor) -> Tensor:
        """Log q(z|x), (k, n) in nats, at vectors u (k, n, u)."""
        values, volume = self._values(u)
        try:
            return self.target.log_density(self._trace("guide", values), len(u)) + volume
        except NotImplementedError as error:
            raise ValueError("Expected a guide that can score any z for start='guide'; got one that cannot.") from error

    @torch.no_grad()
    def draw(self, start: Literal["prior", "guide"], k: int) -> Tensor:
        """Draw k vectors per datum, (k, n, u), from the prior or the guide and the current random state."""
        return self.vector(self.target.trace("model" if start == "prior" else "guide", k))

    def vector(self, trace: Trace) -> Tensor:
        """The vectors (k, n, u) of a trace that has particles."""
        nodes: Any = trace.nodes
        return self._pack({name: nodes[name]["value"].to(self.dtype) for name in self.shapes})

    def place(self, z: Tensor) -> Tensor:
        """The vectors u, (k, n, u), at which the latent variables are z, (k, n, z)."""
        return self._pack({name: value.to(self.dtype) for name, value in self.layout.unpack(z).items()})

    def latents(self, u: Tensor) -> Tensor:
        """The latent variables, (k, n, z) in double precision, at vectors u."""
        values = self.coordinates.unpack(u)
        return self.layout.pack({name: self.transforms[name](value) for name, value in values.items()}).double()

    def _pack(self, values: dict[str, Tensor]) -> Tensor:
        return self.coordinates.pack({name: self.transforms[name].inv(value) for name, value in values.items()})

    def _values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        values, volume = self.coordinates.unpack(u), 0.0
        for name, raw in values.items():
            transform = self.transforms[name]
            if transform != identity_transform:
                values[name] = transform(raw)
                log_det = transform.log_abs_det_jacobian(raw, values[name]).double()
                inner = math.prod(self.shapes[name][: len(self.shapes[name]) - self._events[name]])
                volume = volume + log_det.reshape(len(u), inner, self.n, -1).sum((1, 3))
        return values, volume

    def _trace(self, role: Role, values: dict[str, Tensor]) -> Trace:
        return self.target.trace(role, len(next(iter(values.values()))), values=values)
