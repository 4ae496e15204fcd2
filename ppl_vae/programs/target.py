"""`Target`: a program and its data, checked once, with all that evaluation and inference ask of the two."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.programs.enumeration import all_values, drawn_values, log_density, summed_trace
from ppl_vae.programs.latent_vector import Layout
from ppl_vae.programs.param_store import device_and_dtype, mode, own_params, scope, to_double
from ppl_vae.programs.plates import is_point
from ppl_vae.programs.rows import known_data
from ppl_vae.programs.sites import OTHER_DATA, Structure, structure
from ppl_vae.programs.traces import (
    Batch,
    Given,
    aligned,
    batch_of,
    check_batch,
    drawn_sites,
    plain_sites,
    trace_in_turn,
    trace_pair,
    unscaled,
)

BLOCK = 100  # data in a block

Role = Literal["model", "guide"]
T = TypeVar("T")


class Target:
    """A program and the data that its posterior is about, checked once.

    Every verb takes a program and data, `log_evidence(program, x, samples)`, or a target that holds both,
    `log_evidence(target, samples=samples)`. With a target nothing is checked or traced twice, and results that several
    verbs share, such as the closed form, are computed once. They are computed anew when a parameter or buffer of the
    program has changed; tensors that a plain function closes over cannot be watched: make a new target then.

    Args:
        program: any program.
        x: data, a tensor (n, *x) or a batch dict.

    Attributes:
        program: the program.
        batch: the data by name, on the program's device and in its precision.
        n: the number of data; 1 where the whole data set counts as one datum.
        device: where the data are.
        dtype: the program's floating type, or None if it holds no tensors.

    Raises:
        ValueError: If the data are not finite, or the model does not take them.

    Example:
        >>> import torch
        >>> from ppl_vae import PPCA, Target, exact_log_evidence, log_evidence
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> target = Target(PPCA.fit(x, 1).to_vae(), x)
        >>> torch.allclose(log_evidence(target, samples=10).log_evidence, exact_log_evidence(target), atol=1e-5)
        True
    """

    def __init__(self, program: Any, x: Any) -> None:
        self._set(program, check_batch(program, as_batch(x, aligned=False)))
        if not aligned(self.batch):
            self.structure  # noqa: B018  so that a program that needs one leading size says so

    def _set(self, program: Any, batch: Batch, structure: Structure | None = None) -> None:
        first = next(iter(batch.values()))
        self.program, self.batch = program, batch
        self.device, self.dtype = first.device, device_and_dtype(program)[1]
        self._structure = structure
        self._layout: Layout | None = None
        self._cache: dict[Any, tuple[Any, Any]] = {}

    @classmethod
    def of(cls, program: Any, x: Any = None) -> "Target":
        """Make a target of a program and data, or pass one on.

        Raises:
            TypeError: If a program comes without data, or a target with data.
        """
        if isinstance(program, cls):
            if x is not None:
                raise TypeError("Expected a target alone, which holds its data; got data beside it.")
            return program
        if x is None:
            raise TypeError(f"Expected data `x` beside a {type(program).__name__}; got none.")
        return cls(program, x)

    def with_batch(self, batch: Batch) -> "Target":
        """The same program on other data of the same kind, which are not checked again."""
        other = object.__new__(type(self))
        other._set(self.program, batch, self._structure)
        return other

    @property
    def structure(self) -> Structure:
        """What the traces of the program show; read once."""
        if self._structure is None:
            self._structure = structure(self.program, self.batch)
        return self._structure

    @property
    def n(self) -> int:
        """The number of data; 1 where the whole data set counts as one datum."""
        return 1 if self.structure.whole else len(next(iter(self.batch.values())))

    @property
    def features(self) -> int:
        """How many numbers the batch holds per datum, at least 1."""
        whole = self.structure.whole
        return max(sum((value if whole else value[0]).numel() for value in self.batch.values()), 1)

    @property
    def width(self) -> int:
        """How many numbers a datum's log probabilities of a site hold at the most, by enumeration; 1 without it."""
        if not self.structure.enumerated:
            return 1

        def count() -> int:
            with torch.no_grad(), self.running(0):
                trace = self.rows(slice(0, 1)).trace("model", 1)
                return max(unscaled(trace.nodes[name]).numel() for name in plain_sites(trace))

        return self.cached("width", count)

    def rows(self, which: slice | Tensor) -> "Target":
        """The target of some of the data: a slice, indices, or a boolean mask of shape (n,)."""
        if self.structure.whole:
            return self
        return self.with_batch({key: value[which] for key, value in self.batch.items()})

    def blocks(self, size: int = BLOCK) -> Iterator["Target"]:
        """Targets of consecutive data, at most `size` each; the target itself if its guide takes all data or none."""
        if self.n <= size or self.structure.rows is not None:
            yield self
            return
        for start in range(0, self.n, size):
            yield self.rows(slice(start, start + size))

    @contextmanager
    def running(self, *key: int | str) -> Iterator[None]:
        """Run the program in evaluation mode on a store of its own, with draws from the streams of a key."""
        with scope(self.program), fork_rng(*key, device=self.device):
            yield

    def traces(self, samples: int, *key: int | str) -> tuple[Trace, Trace]:
        """Trace the model and the guide that it replays, with `samples` particles drawn by a key."""
        self._check_data()
        with self.running(*key):
            if not self.structure.sequential and not self.structure.enumerated:
                return trace_pair(self.program, self.batch, samples, self.structure.nesting)
            guide = self.trace("guide", samples)
            return self.trace("model", samples, self.replaying(guide)), guide

    def all_values(self, samples: int, *key: int | str) -> tuple[Trace, Trace]:
        """Trace model and guide with all values of the enumerated sites, each with draws of its own of what follows."""
        self._check_data()
        with self.running(*key):
            return all_values(
                self.program,
                self.batch,
                samples,
                self.structure.nesting,
                self.structure.enumerated,
                self.structure.enumerated_by_guide,
            )

    def replaying(self, guide: Trace) -> Callable[[Any], Any]:
        """A handler by which the model takes the latent variables of a trace of the guide."""
        if not self.structure.enumerated:
            return lambda function: poutine.replay(function, trace=guide)
        return Given(self.values(guide))

    def values(self, trace: Trace) -> dict[str, Tensor]:
        """Values of the latent sites in a trace."""
        nodes: Any = trace.nodes
        return {name: nodes[name]["value"] for name in self.structure.latents}

    def predict(self, guide: Trace, samples: int) -> Trace:
        """Trace the model with the latent variables of a trace of the guide, and all that is observed drawn anew.

        Enumerated sites are drawn from their posterior given these and the data.
        """
        structure, replay = self.structure, self.replaying(guide)
        if not structure.enumerated:
            return self.trace("model", samples, lambda function: poutine.uncondition(replay(function)))

        def anew(function: Any, first: int) -> Trace:
            drawn = Given(drawn_values(function, self.batch, structure.enumerated, first))
            return poutine.trace(poutine.uncondition(drawn(function))).get_trace(**self.batch)

        first = -1 - structure.nesting
        with torch.no_grad(), mode(self.program):
            if structure.sequential:
                one = partial(anew, first=first)
                return trace_in_turn(one, replay(self.program.model), samples, structure.latents)
            return anew(self._beside("model", samples, replay), first - 1)

    def replay(self, seed: int) -> tuple[Trace, Trace]:
        """Trace the model and the guide that it replays, without particles or gradients."""
        with torch.no_grad(), self.running(seed):
            guide = poutine.trace(self.program.guide).get_trace(**batch_of(self.program.guide, self.batch))
            model, names = poutine.replay(self.program.model, trace=guide), self.structure.enumerated
            if names:
                model = Given(self.values(guide))(self.program.model)
                model = Given(drawn_values(model, self.batch, names, -1 - self.structure.nesting))(model)
            return poutine.trace(model).get_trace(**self.batch), guide

    def trace(
        self,
        role: Role,
        samples: int,
        handler: Callable[[Any], Any] = lambda function: function,
        *,
        values: dict[str, Tensor] | None = None,
    ) -> Trace:
        """Trace the model or the guide alone, under a handler, with particles from the current random state.

        Enumerated sites have all their values side by side, and are drawn wherever other sites are drawn given them.

        Args:
            role: which of the two.
            samples: the number of particles.
            handler: wraps it.
            values: of all latent sites, if they are known.
        """
        if role == "guide":
            self._check_data()
        if values is not None:
            handler = partial(poutine.condition, data=values)
        structure = self.structure
        function = getattr(self.program, role)
        batch = batch_of(function, self.batch)
        names = structure.enumerated if role == "model" else structure.enumerated_by_guide
        first = -1 - structure.nesting

        def trace(function: Any, first: int) -> Trace:
            plain: Any = None if names and values is not None else poutine.trace(function).get_trace(**batch)
            if not names:
                return plain  # type: ignore[no-any-return]
            drawn = {} if plain is None else drawn_sites(plain)
            given = {name: node["value"] for name, node in drawn.items() if name not in names}
            return summed_trace(function, batch, given, names, first)

        with mode(self.program):
            if structure.sequential:
                return trace_in_turn(partial(trace, first=first), handler(function), samples, structure.latents)
            return trace(self._beside(role, samples, handler), first - 1)

    def _beside(self, role: Role, samples: int, handler: Callable[[Any], Any] = lambda function: function) -> Any:
        """The model or the guide, under a handler, with particles."""
        particles = pyro.plate("particles", samples, dim=-1 - self.structure.nesting)
        return particles(handler(getattr(self.program, role)))

    def _check_data(self) -> None:
        """Refuse a part of the data, and data that a guide with one row per datum does not know, if it remembers."""
        if (plate := self.structure.subsampled) is not None:
            raise ValueError(
                f"Expected all data in plate '{plate}', since evidence takes all of them; the program takes a part. "
                "Let model and guide take `subsample_size=None` by keyword and pass it on to the plate."
            )
        rows = self.structure.rows
        if self.structure.whole and known_data(self.program, self.batch) is False:
            raise ValueError(
                "Expected the data that this program was fitted to; got others. This guide does not look at its data: "
                "fit a program to the other data."
            )
        if rows is not None and (rows != self.n or known_data(self.program, self.batch) is False):
            raise ValueError(OTHER_DATA.format(n=self.n))

    def log_density(self, trace: Trace, samples: int, names: Any = None) -> Tensor:
        """Sum the log densities of a trace's sites over all but particles and data, (samples, n) in nats.

        Raises:
            ValueError: If a latent site is a point, as in an `AutoDelta`, which has no density.
        """
        points = [name for name in self.structure.points if name in trace.nodes and is_point(trace.nodes[name]["fn"])]
        if names is None and points:
            raise ValueError(
                f"Expected latent sites with a density; got '{points[0]}', a point (Delta), so nothing can be said of "
                "log p(x). Use a guide with a spread."
            )
        return log_density(trace, samples, self.n, names, self.structure.observed).to(self.device)

    def log_weights(self, model: Trace, guide: Trace, samples: int) -> Tensor:
        """Log importance weights, log p(x, z) - log q(z|x), of a pair of traces, (samples, n) in nats."""
        return self.log_density(model, samples) - self.log_density(guide, samples)

    @property
    def layout(self) -> Layout:
        """How the latent sites lie side by side, in the model's order."""
        if self._layout is None:
            with torch.no_grad(), self.running(0):
                self.flatten(self.trace("guide", 1))
        return self._layout  # type: ignore[return-value]

    def flatten(self, trace: Trace) -> Tensor:
        """The latent sites of a trace side by side in the model's order, (k, n, z) in double precision."""
        nodes: Any = trace.nodes
        sites = [(name, nodes[name]["value"], nodes[name]["fn"].event_dim) for name in self.structure.latents]
        if self._layout is None:
            self._layout = Layout(sites, self.n)
        if not sites:  # all are summed out
            sizes = [
                f.size for node in nodes.values() for f in node.get("cond_indep_stack", ()) if f.name == "particles"
            ]
            return torch.empty(max(sizes, default=1), self.n, 0, dtype=torch.float64, device=self.device)
        return self._layout.pack({name: value for name, value, _ in sites}).double()

    def draws(self, samples: int) -> Tensor:
        """Draw latent variables from the guide, (samples, n, z), from the current random state."""
        z = self.flatten(self.trace("guide", samples))
        return z if self.structure.latents else z.expand(samples, -1, -1)

    def score(self, role: Role, z: Tensor) -> Tensor:
        """Log density of the model or the guide, (k, n) in nats, at latent vectors (k, n, z)."""
        return self.log_density(self.trace(role, len(z), values=self.unflatten(z)), len(z))

    def unflatten(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites, with k particles, from latent vectors (k, n, z)."""
        dtype, discrete = self.dtype or torch.get_default_dtype(), self.layout.discrete
        return {name: value.to(discrete.get(name, dtype)) for name, value in self.layout.unpack(z).items()}

    def score_sites(self, role: Role, values: dict[str, Tensor]) -> Tensor:
        """Log density of the model or the guide, (k, n) in nats, at values of the latent sites with k particles."""
        samples = len(next(iter(values.values())))
        return self.log_density(self.trace(role, samples, values=values), samples)

    def to_double(self) -> Self:
        """The same target in double precision, or itself if it is so already, or runs in no other than its own."""
        if self.dtype is None and all(value.dtype != torch.float32 for value in self.batch.values()):
            return self

        def make() -> Any:
            batch = {key: value.double() if value.is_floating_point() else value for key, value in self.batch.items()}
            twin = self.with_batch(batch)
            try:
                twin._set(to_double(self.program), batch, self._structure)
                if self.dtype is None:  # its parameters are made by `pyro.param`, or it has constants of its own
                    with torch.no_grad():
                        twin.traces(1, 0)
            except (RuntimeError, TypeError, ValueError):
                if self.dtype is not None:
                    raise
                return self
            return twin

        return self.cached("double", make)  # type: ignore[no-any-return]

    def cached(self, key: Any, compute: Callable[[], T]) -> T:
        """The result of `compute`, or its ValueError, kept under a key until a parameter of the program changes."""
        now = _versions(self.program)
        if key not in self._cache or self._cache[key][0] != now:
            try:
                result: Any = compute()
            except ValueError as error:
                result = error
            self._cache[key] = now, result
        result = self._cache[key][1]
        if isinstance(result, ValueError):
            raise ValueError(*result.args) from result.__cause__
        return result  # type: ignore[no-any-return]

    def refresh(self, device: torch.device | None = None) -> None:
        """Forget what was computed, and follow the program to its device, or go to the one given."""
        batch = {key: value.to(device) for key, value in self.batch.items()}
        self._set(self.program, check_batch(self.program, batch, check=False), self._structure)


def _versions(program: Any) -> list[tuple[int, int]]:
    """Which tensors a program learns or keeps, and how often each was changed in place."""
    tensors = [*program.parameters(), *program.buffers()] if isinstance(program, nn.Module) else []
    tensors += [*own_params(program)["params"].values(), *pyro.get_param_store().get_state()["params"].values()]
    return [(id(tensor), tensor._version) for tensor in tensors]
