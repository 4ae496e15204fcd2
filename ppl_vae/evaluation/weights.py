"""Weights: draws from a program's guide in blocks, with their log importance weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae.evaluation.nested import Nested
from ppl_vae.programs.enumeration import Weights
from ppl_vae.programs.target import BLOCK, Target

_ENTRIES = 2**23  # numbers that one block of draws of the data may hold
_WHOLE = 1000, 2**21  # draws and numbers in a block at the most where the whole data set is one datum


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
    """Draws in blocks of data, numbered from `first`, and, within these, of draws."""
    for number, block in enumerate(target.blocks(), first):
        yield map(_numbers, _weigh(block, samples, block_size(target, inner), (seed, number), inner))


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


def _weigh(target: Target, samples: int, size: int, key: tuple[int, int], inner: int) -> Iterator[Draws]:
    if inner > 1:
        for number, start in enumerate(range(0, samples, size)):
            with _checked(number):
                nested = Nested(target, min(size, samples - start), inner, *key, number)
            yield Draws(nested.weights, nested.likelihood, nested.plain, nested.moments)
        return
    if target.structure.enumerated and not target.structure.sequential:
        yield from _weigh_sums(target, samples, size, key)
        return
    for k, model, guide in trace_blocks(target, samples, size, *key):
        likelihood = target.log_density(model, k, model.observation_nodes)
        prior = target.log_density(model, k, model.stochastic_nodes)
        weights = prior + likelihood - target.log_density(guide, k)
        yield Draws(weights, likelihood, weights, partial(_moments, target, model))


def _weigh_sums(target: Target, samples: int, size: int, key: tuple[int, int]) -> Iterator[Draws]:
    """Draws of a program with enumerated sites; where no others are left, all weights are p(x)."""
    structure = target.structure
    for number, start in enumerate(range(0, samples, size)):
        k = min(size, samples - start)
        own = k if structure.latents else 1
        with _checked(number):
            weights = Weights(*target.all_values(own, *key, number), own, target.n, structure.observed)
        moments = partial(_summed_moments, target, weights, k)
        log_weights, likelihood, bounds = (
            each.expand(k, -1) for each in (weights.weights, weights.likelihood, weights.bounds)
        )
        yield Draws(log_weights, likelihood, bounds, moments)


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
        with _checked(number):
            traces = target.traces(k, *key, number)
        yield k, *traces
