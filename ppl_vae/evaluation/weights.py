"""Weights: draws from a program's guide in blocks, with their log importance weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae._checks import is_out_of_memory
from ppl_vae._seeds import fork_rng
from ppl_vae.evaluation.nested import Nested
from ppl_vae.programs.capture import close, record
from ppl_vae.programs.enumeration import Weights
from ppl_vae.programs.precision import Precision
from ppl_vae.programs.target import BLOCK, Target
from ppl_vae.programs.traces import trace_pair

_LOG = logging.getLogger(__name__)
_MANY = 30  # small blocks of draws that repay a capture
_LARGE = 2**21  # numbers in a block that counts for two
_ENTRIES = 2**23  # numbers that one block of draws of the data may hold
# of tracing; the program itself has just run
_UNTRACEABLE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_WHOLE = 1000, 2**21  # draws and numbers in a block at the most where the whole data set is one datum


class Draws(NamedTuple):
    """Some draws of a block of data.

    Args:
        weights: log weights, (k, n) in nats.
        likelihood: log likelihoods, (k, n).
        bounds: what averages to the ELBO, (k, n).
        moments: returns the latents and their squares, (k, n, z) each, by the guide and then by local weights.
        lowered: what products of a lower precision add to the log weights, (k, n), for draws of which that is known.
    """

    weights: Tensor
    likelihood: Tensor
    bounds: Tensor
    moments: Callable[[], tuple[Tensor, ...]]
    lowered: Tensor | None = None


def weight_blocks(
    target: Target, samples: int, seed: int, inner: int = 1, first: int = 0, precision: Precision = "full"
) -> Iterator[Iterator[Draws]]:
    """Draws in blocks of data, numbered from `first`, and, within these, of draws.

    On a CPU many blocks of one size are replayed from the tensor operations of one, with the same draws (see `record`).
    Where memory does not hold a block of draws it is halved, and so are all that follow.
    """
    size = block_size(target, inner)
    plain = inner == 1 and not target.structure.enumerated and not target.structure.sequential
    weigh = _Weigher(target, samples, min(size, samples), precision, plain and target.device.type == "cpu")
    room = [samples]
    for number, block in enumerate(target.blocks(), first):
        yield map(_numbers, _weigh(block, samples, size, (seed, number), inner, weigh, room))


def _numbers(draws: Draws) -> Draws:
    """Draws whose weights are all numbers.

    Raises:
        ValueError: If a weight is not.
    """
    if bool(draws.weights.isnan().any()):
        row = int(draws.weights.isnan().any(0).nonzero()[0])
        raise ValueError(
            f"Expected log weights that are numbers; got NaN of datum {row} of a block: for some draw a parameter or a "
            "log density is not a number. Look at the model's outputs far from the data, or train at a lower rate."
        )
    return draws


def _checked(number: int) -> AbstractContextManager[None]:
    """Pyro's validation as it is set for the first draws, without it for further ones, which makes them faster."""
    return pyro.validation_enabled(False) if number else nullcontext()


def block_size(target: Target, inner: int = 1) -> int:
    """How many draws go side by side; the first entry of the batch says how large a datum is."""
    first = next(iter(target.batch.values()))
    whole, width = target.structure.whole, target.width
    numbers = max(target.features * inner, width) if whole else BLOCK * max(first[0].numel(), width)
    most, entries = _WHOLE if whole else (BLOCK, _ENTRIES)
    return max(1, min(most, entries // numbers))


class _Weigher:
    """Weights of blocks of a program's data and draws, by Pyro or replayed.

    Args:
        target: the program and all data.
        samples: draws of each datum.
        size: draws in a block.
        precision: of the factors of large products in a replay.
        suits: whether a replay may be tried.
    """

    def __init__(self, target: Target, samples: int, size: int, precision: Precision, suits: bool) -> None:
        self.target, self.samples, self.size, self.precision, self.suits = target, samples, size, precision, suits
        self.graphs: dict[int, Any] = {}  # by how many data are in a block

    def __call__(self, block: Target, k: int, key: tuple[int, ...]) -> Draws:
        """Draw k times from the guide by a key."""
        if k == self.size and block.n in self.graphs:
            return self._replayed(self.graphs[block.n], block, key)
        with _checked(int(key[-1])):
            model, guide = block.traces(k, *key)
        draws = self._of(block, k, model, guide)
        return self._captured(block, key, draws) if k == self.size and self.suits and self._repays(block) else draws

    def _repays(self, block: Target) -> bool:
        """Whether there are enough blocks of one size, of which large ones count for several."""
        blocks = self.samples // self.size * max(self.target.n // BLOCK if block.n == BLOCK else 1, 1)
        numbers = self.size * block.n * block.features
        return self.precision != "full" or blocks * (1 + numbers / _LARGE) >= _MANY

    def _of(self, block: Target, k: int, model: Trace, guide: Trace) -> Draws:
        likelihood = block.log_density(model, k, model.observation_nodes)
        prior = block.log_density(model, k, model.stochastic_nodes)
        weights = prior + likelihood - block.log_density(guide, k)
        return Draws(weights, likelihood, weights, lambda: _moments(block.flatten(model)))

    def _replayed(self, graph: Any, block: Target, key: tuple[int, ...]) -> Draws:
        with torch.no_grad(), fork_rng(*key, device=block.device):
            weights, likelihood, z = graph(*block.batch.values())
        return Draws(weights, likelihood, weights, lambda: _moments(z.double()))

    def _captured(self, block: Target, key: tuple[int, ...], draws: Draws) -> Draws:
        """Record the operations of a block and hold them against its draws by Pyro; where that fails, no more."""

        def weights(*entries: Tensor) -> tuple[Tensor, ...]:
            own = block.with_batch(dict(zip(block.batch, entries, strict=True)))
            pair = trace_pair(own.program, own.batch, self.size, own.structure.nesting)
            made, nodes = self._of(own, self.size, *pair), cast(Any, pair[0].nodes)
            own.flatten(pair[0])
            z = own.layout.pack({name: nodes[name]["value"] for name in own.structure.latents})
            return made.weights, made.likelihood, z

        entries = [*block.batch.values()]
        try:
            with torch.no_grad(), block.running(*key), pyro.validation_enabled(False):
                graph = record(weights, entries)
            again = self._replayed(graph, block, key)
            if not (close(again.weights, draws.weights) and close(again.moments()[0], draws.moments()[0])):
                raise ValueError("the draws or weights of a replay are others")
            if self.precision == "bfloat16":
                with torch.no_grad(), block.running(*key), pyro.validation_enabled(False):
                    graph = record(weights, entries, precision=torch.bfloat16)
                low = self._replayed(graph, block, key)
                draws = low if self.graphs else low._replace(lowered=low.weights - draws.weights)
        except _UNTRACEABLE as error:
            reason = f"{type(error).__name__}: {error}"
            _LOG.info("Weighing step by step, which is slower; no graph could be captured: %s", reason)
            self.suits = False
            return draws
        self.graphs[block.n] = graph
        return draws


def _weigh(
    target: Target, samples: int, size: int, key: tuple[int, int], inner: int, weigh: _Weigher, room: list[int]
) -> Iterator[Draws]:
    def nested(k: int, key: tuple[int, ...]) -> Draws:
        with _checked(key[-1]):
            found = Nested(target, k, inner, *key)
        return Draws(found.weights, found.likelihood, found.plain, found.moments)

    summed = target.structure.enumerated and not target.structure.sequential
    draw = nested if inner > 1 else partial(_weigh_sums if summed else weigh, target)
    for number, start in enumerate(range(0, samples, size)):
        yield from _fitting(draw, min(size, samples - start), (*key, number), room)


def _fitting(draw: Callable[..., Draws], k: int, key: tuple[int, ...], room: list[int]) -> Iterator[Draws]:
    """Draw k at once, or, where memory ends, in parts with keys of their own."""
    if k <= room[0]:
        try:
            draws = draw(k, key)
        except (MemoryError, RuntimeError) as error:
            if k == 1 or not is_out_of_memory(error):
                raise
            room[0] = k // 2
        else:
            yield draws
            return
    size = room[0]
    for part, start in enumerate(range(0, k, size)):
        yield from _fitting(draw, min(size, k - start), (*key, part), room)


def _weigh_sums(target: Target, k: int, key: tuple[int, ...]) -> Draws:
    """Draws of a program with enumerated sites; where no others are left, all weights are p(x)."""
    own = k if target.structure.latents else 1
    with _checked(key[-1]):
        weights = Weights(*target.all_values(own, *key), own, target.n, target.structure.observed)
    log_weights, likelihood, bounds = (
        each.expand(k, -1) for each in (weights.weights, weights.likelihood, weights.bounds)
    )
    return Draws(log_weights, likelihood, bounds, partial(_summed_moments, target, weights, k))


def _summed_moments(target: Target, weights: Weights, k: int) -> tuple[Tensor, ...]:
    if not target.structure.latents:
        return (target.draws(k),) * 4
    means = weights.moments(target.structure.latents, -1 - target.structure.nesting)
    return tuple(target.layout.pack(values) for values in means)


def _moments(z: Tensor) -> tuple[Tensor, ...]:
    return z, z.square(), z, z.square()


def constant(loc: Tensor, *scales: Tensor) -> Tensor:
    """Which entries have no spread but rounding, as the diagonal of a correlation matrix."""
    return torch.stack(scales).amax(0) <= 1e-13 * loc.abs()


def trace_blocks(target: Target, samples: int, size: int, *key: int | str) -> Iterator[tuple[int, Trace, Trace]]:
    """Traces of model and guide with at most `size` particles each, and how many they have."""
    for number, start in enumerate(range(0, samples, size)):
        k = min(size, samples - start)
        with _checked(number):
            traces = target.traces(k, *key, number)
        yield k, *traces
