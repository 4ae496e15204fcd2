"""Data drawn from a model, with the latent variables that they came from."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.programs.param_store import mode
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import Batch


def simulate(program: Any, x: Any = None) -> tuple[Batch, Tensor]:
    """Draw latent variables and data from a model, from the current random state.

    Where in the batch a site's values belong is found by observing the entries' own numbers.

    Args:
        program: any program, or a `Target`.
        x: placeholders for the data, a tensor (n, *x) or a batch dict; none beside a `Target`.

    Returns:
        The batch with all that is observed drawn anew, and the latent variables, (n, z) in double precision.

    Raises:
        ValueError: If data cannot be drawn from the model: it has factors, transforms its data before it observes
            them, or observes an entry twice.
    """
    target = Target.of(program, x)
    batch = target.batch
    real = {key: value for key, value in batch.items() if value.is_floating_point()}
    if not real:
        raise ValueError("Expected a batch with real numbers among its entries, where simulated data go; got none.")
    shapes, sizes = {key: value.shape for key, value in real.items()}, [value.numel() for value in real.values()]
    flat = torch.cat([value.flatten() for value in real.values()]).nan_to_num()

    def filled(entries: Tensor) -> dict[str, Tensor]:
        parts = zip(shapes.items(), entries.split(sizes), strict=True)
        return {**batch, **{key: part.reshape(shape) for (key, shape), part in parts}}

    numbers = torch.arange(len(flat), device=flat.device).to(flat.dtype)
    masks = {"mask": torch.ones_like(batch["mask"])} if "mask" in batch else {}  # hidden entries may be filled
    with pyro.validation_enabled(False), mode(target.program):
        trace = poutine.trace(target.program.model).get_trace(**{**filled(numbers), **masks})
    where = {name: _entries(name, trace.nodes[name], len(flat)) for name in target.structure.observed}
    seen = torch.cat([index.flatten() for index in where.values()])
    if len(seen.unique()) != len(seen):
        raise ValueError("Expected each entry of the data to be observed once; some are observed at several sites.")
    there = target.with_batch(filled(flat))
    drawn = there.trace("model", 1, poutine.uncondition)
    for name, index in where.items():
        node: Any = drawn.nodes[name]
        if node["value"].numel() != index.numel():
            raise ValueError(
                f"Expected a distribution as large as its data at site '{name}', {tuple(index.shape)}; got draws of "
                f"shape {tuple(node['value'].shape)}. Expand its parameters."
            )
        flat[index.flatten()] = node["value"].reshape(index.shape).flatten().to(flat)
    return filled(flat), there.flatten(drawn)[0]


def _entries(name: str, node: Any, count: int) -> Tensor:
    """Read off an observed site which entries of the data it observes."""
    if isinstance(node["fn"], pyro.distributions.Unit):
        raise ValueError(
            f"Expected a model that data can be drawn from; site '{name}' is a factor, which no data come from."
        )
    if not node["value"].is_floating_point():
        raise ValueError(
            f"Expected data of a floating type, to find where simulated ones go; site '{name}' observes "
            f"{node['value'].dtype}. Convert the entry with .float()."
        )
    index = node["value"].round().long()
    if not bool(((index >= 0) & (index < count)).all()) or not torch.equal(index.to(node["value"]), node["value"]):
        raise ValueError(
            f"Expected a model that observes its data as they are; site '{name}' observes something made of them. "
            "Transform the data beforehand."
        )
    return index


def simulate_twice(target: Target, *key: int | str) -> tuple[Batch, Tensor]:
    """Simulate, then again from the result with the same randomness, to see that nothing depends on placeholders.

    Raises:
        ValueError: If latent variables or data depend on observed values, or as in `simulate`.
    """
    with target.running(*key):
        batch, z = simulate(target)
    with target.running(*key):
        again, same = simulate(target.with_batch(batch))
    if not torch.equal(z, same) or any(not torch.equal(batch[name], again[name]) for name in batch):
        raise ValueError(
            "Expected a model whose latent variables and data do not depend on the values observed; they changed with "
            "the placeholders."
        )
    return batch, z
