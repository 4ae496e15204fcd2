"""Keyed randomness: seeds from keys, and draws that leave the global random state alone."""

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import SupportsIndex

import numpy as np
import torch


def fold_in(*key: SupportsIndex | str) -> int:
    """Mix a key, such as (seed, epoch) or (seed, "stream", block), into a 63-bit seed for a generator.

    Keys that differ in any entry or in length give seeds that behave as independent.

    Raises:
        ValueError: If an integer is negative or needs more than 64 bits.
    """
    words = [len(key)]
    for part in key:
        if isinstance(part, str):
            number = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8])
        else:
            number = operator.index(part)
        if not 0 <= number < 2**64:
            raise ValueError(f"Expected a seed or key that is an integer from 0 to 2**64 - 1; got {part}.")
        words += [number & 0xFFFFFFFF, number >> 32]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def fork_rng(*key: int | str, device: torch.device) -> Iterator[None]:
    """Seed the global generators with a key inside a `with` block, and restore their state after it."""
    states = random_state(device)
    try:
        for generator in _generators(device):
            generator.manual_seed(fold_in(*key))
        yield
    finally:
        set_random_state(states, device)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The states of the global generators that draw on a device."""
    return [generator.get_state() for generator in _generators(device)]


def set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Go back to these states."""
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(state)


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()
    return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]
