"""Weights: draws from a program's guide in blocks, with their log importance weights."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae.evaluation.nested import Nested
from ppl_vae.programs.enumeration import Weights
from ppl_vae.programs.target import BLOCK, Target

_ENTRIES = 2**23  # numbers that one block of draws of the data may hold
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_WHOLE = 1000  # draws in a block at the most where the whole data set is one datum


class Draws(NamedTuple):
    """Some draws of a block of data.

    Args:
        weights: log weights, (k, n) in nats.
        likelihood: log likelihoods, (k, n).
        bounds: what averages to the ELBO, (k, n).
        moments: returns the latents and their squares, (k, n, z) each, by the guide and then by local weights.
    """

    weights: Tensor
    likelihood: Tensor
    bounds: Tensor
    moments: Callable[[], tuple[Tensor, ...]]


def weight_blocks(target: Target, samples: int, seed: int, inner: int = 1, first: int = 0) -> Iterator[Iterator[Draws]]:
    """Draws in blocks of data, numbered from `first`, and, within these, of draws.

    Where memory does not hold a block of draws it is halved, and so are all that follow.
    """
    room = [samples]
    for number, block in enumerate(target.blocks(), first):
        yield _weigh(block, samples, block_size(target, inner), (seed, number), inner, room)


def block_size(target: Target, inner: int = 1) -> int:
    """How many draws go side by side; the first entry of the batch says how large a datum is."""
    first = next(iter(target.batch.values()))
    whole, width = target.structure.whole, target.width
    numbers = max(target.features * inner, width) if whole else BLOCK * max(first[0].numel(), width)
    return max(1, min(_WHOLE if whole else BLOCK, _ENTRIES // numbers))


def _weigh(
    target: Target, samples: int, size: int, key: tuple[int, int], inner: int, room: list[int]
) -> Iterator[Draws]:
    def nested(k: int, key: tuple[int, ...]) -> Draws:
        found = Nested(target, k, inner, *key)
        return Draws(found.weights, found.likelihood, found.plain, found.moments)

    def plain(k: int, key: tuple[int, ...]) -> Draws:
        model, guide = target.traces(k, *key)
        likelihood = target.log_density(model, k, model.observation_nodes)
        prior = target.log_density(model, k, model.stochastic_nodes)
        weights = prior + likelihood - target.log_density(guide, k)
        return Draws(weights, likelihood, weights, partial(_moments, target, model))

    summed = target.structure.enumerated and not target.structure.sequential
    draw = nested if inner > 1 else partial(_weigh_sums, target) if summed else plain
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has ended, on a CPU or a GPU."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in _NO_MEMORY)


def _weigh_sums(target: Target, k: int, key: tuple[int, ...]) -> Draws:
    """Draws of a program with enumerated sites; where no others are left, all weights are p(x)."""
    own = k if target.structure.latents else 1
    weights = Weights(*target.all_values(own, *key), own, target.n, target.structure.observed)
    log_weights, likelihood, bounds = (
        one.expand(k, -1) for one in (weights.weights, weights.likelihood, weights.bounds)
    )
    return Draws(log_weights, likelihood, bounds, partial(_summed_moments, target, weights, k))


def _summed_moments(target: Target, weights: Weights, k: int) -> tuple[Tensor, ...]:
    if not target.structure.latents:
        return (target.draws(k),) * 4
    means = weights.moments(target.structure.latents, -1 - target.structure.nesting)
    return tuple(target.layout.pack(values) for values in means)


def _moments(target: Target, model: Trace) -> tuple[Tensor, ...]:
    z = target.flatten(model)
    return z, z.square(), z, z.square()


def constant(loc: Tensor, *scales: Tensor) -> Tensor:
    """Which entries have no spread but rounding, as the diagonal of a correlation matrix."""
    return torch.stack(scales).amax(0) <= 1e-13 * loc.abs()


def trace_blocks(target: Target, samples: int, size: int, *key: int | str) -> Iterator[tuple[int, Trace, Trace]]:
    """Traces of model and guide with at most `size` particles each, and how many they have."""
    for number, start in enumerate(range(0, samples, size)):
        k = min(size, samples - start)
        yield k, *target.traces(k, *key, number)
