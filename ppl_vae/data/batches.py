"""Batches of data: dicts of tensors that share their leading size n, and the order in which training visits them."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fold_in

AT_ONCE = 2**24  # numbers that are looked at together


def permutation(n: int, *, seed: int, epoch: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Order (n,) in which an epoch visits n data: the same numbers on every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(fold_in(seed, "order", epoch))).to(device)


def minibatches(
    data: Mapping[str, Tensor], size: int, *, seed: int, epoch: int, part: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Tensor]]:
    """Visit every datum once, in batches of `size` (the last may be smaller), in the order of `permutation`.

    Each tensor is indexed on its own device::

        for epoch in range(epochs):
            for batch in minibatches(data.epoch(epoch), 100, seed=0, epoch=epoch):
                svi.step(**batch)

    Args:
        data: by name, with one leading size.
        size: of a batch.
        seed: of the order.
        epoch: likewise.
        part: (i, m) for part i of m of each batch, as even as can be; a batch with fewer data than parts comes whole.

    Raises:
        ValueError: If `size` is not a positive integer, or the leading sizes differ.
    """
    size, n = check_int("size", size), _leading(data)
    order = permutation(n, seed=seed, epoch=epoch)
    rows = {device: order.to(device).split(size) for device in {value.device for value in data.values()}}
    if part != (0, 1):
        rows = {
            device: [step.tensor_split(part[1])[part[0]] if len(step) >= part[1] else step for step in steps]
            for device, steps in rows.items()
        }
    return (
        {key: value.index_select(0, rows[value.device][step]) for key, value in data.items()}
        for step in range(math.ceil(n / size))
    )


def as_batch(x: object, *, aligned: bool = True) -> dict[str, Tensor]:
    """Turn a tensor, an array or a mapping of these into a dict of tensors.

    A bare array (n, x) becomes `{"x": array}`. Floats keep their precision. Integers and booleans become the default
    float dtype in `x`, int64 in `y` and `index`, booleans in `mask`, and stay as they are elsewhere.

    Args:
        x: a tensor, an array or a mapping of these.
        aligned: whether the entries must share their leading size.

    Raises:
        TypeError: If a value is not an array of real numbers, or a key is not a string.
        ValueError: If a bare array has fewer than two dimensions, there are no data, leading sizes differ, or `mask`
            is not boolean with the shape of `x`.
    """
    if isinstance(x, Mapping):
        if wrong := [key for key in x if not isinstance(key, str)]:
            raise TypeError(f"Expected strings as the keys of a batch; got {wrong[0]!r}.")
        batch = {key: _tensor(key, value) for key, value in x.items()}
    else:
        batch = {"x": _tensor("x", x)}
        if batch["x"].ndim < 2:
            raise ValueError(
                f"Expected `x` of shape (n, x); got {tuple(batch['x'].shape)}. For n data of one feature use "
                f"x.reshape(-1, 1), for one datum x.reshape(1, -1)."
            )
    if (_leading(batch) if aligned or not batch else min(value.numel() for value in batch.values())) == 0:
        raise ValueError("Expected at least one datum; got n = 0.")
    _check_mask(batch)
    return batch


def mask_missing(x: object) -> dict[str, Tensor]:
    """Batch of an array (n, *x), NaN where an entry is missing: `x` as it is, and its `mask` (True is observed).

    Raises:
        TypeError: If `x` is not an array of real numbers.
        ValueError: As `as_batch`.

    Example:
        >>> mask_missing([[1.0, float("nan")]])["mask"]
        tensor([[ True, False]])
    """
    batch = as_batch(x)
    return {**batch, "mask": ~batch["x"].isnan()}


def check_observed(batch: Mapping[str, Tensor], numbers: npt.NDArray[np.int64] | None = None) -> None:
    """Refuse rows with nothing observed, from which nothing can be learned.

    Args:
        batch: data by name.
        numbers: of the rows in their source, (n,), to name them by.

    Raises:
        ValueError: Naming the first such row.
    """
    if "mask" not in batch or bool((seen := batch["mask"].flatten(1).any(1)).all()):
        return
    rows = (~seen).nonzero().flatten().tolist()
    first = rows[0] if numbers is None else min(int(numbers[row]) for row in rows)
    where = "" if numbers is None else " of the source"
    raise ValueError(
        f"Expected something observed in each row to fit; got nothing in row {first}{where} (counted from 0), "
        f"{len(rows)} such in all. Leave these rows out."
    )


def rows_within(features: int, numbers: int = 8 * AT_ONCE) -> int:
    """How many rows of so many features hold a number of numbers, at least one row."""
    return max(1, numbers // max(1, features))


def check_finite(batch: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities, except in entries of `x` that `mask` hides (True is observed).

    Raises:
        ValueError: Naming the key, row and column (from 0) of the first bad entry, and how many there are.
    """
    _check_mask(batch)
    for key, value in batch.items():
        rows, found, first = torch.atleast_1d(value), 0, None
        step = rows_within(rows[:1].numel(), AT_ONCE)
        for start in range(0, len(rows), step):
            bad = ~torch.isfinite(rows[start : start + step])
            if key == "x" and "mask" in batch:
                bad &= torch.atleast_1d(batch["mask"])[start : start + step]
            if bad.any():
                row, *rest = torch.nonzero(bad)[0].tolist()
                first, found = first or (row + start, *rest), found + int(bad.sum())
        if first is not None:
            row, *rest = first
            column = f", column {rest[0] if len(rest) == 1 else tuple(rest)}" if rest else ""
            remedy = ", or hide missing entries by a `mask` (True is observed; see mask_missing)" if key == "x" else ""
            raise ValueError(
                f"Expected finite numbers in `{key}`; got {rows[first].item()} in row {row}{column} (counted "
                f"from 0), {found} such in all. Drop the rows{remedy}."
            )


def _leading(batch: Mapping[str, Tensor]) -> int:
    """Leading size that all tensors of a batch share."""
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    if len({shape[:1] for shape in shapes.values()} - {()}) != 1 or () in shapes.values():
        raise ValueError(f"Expected tensors that share their leading size n; got shapes {shapes}.")
    return next(iter(shapes.values()))[0]


def _check_mask(batch: Mapping[str, Tensor]) -> None:
    mask, x = batch.get("mask"), batch.get("x")
    if mask is not None and x is not None and (mask.shape != x.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"Expected `mask` to be boolean of the shape of `x`, {tuple(x.shape)}; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}."
        )


def _tensor(key: str, value: object) -> Tensor:
    """Tensor of `value`, with the dtype that its key calls for."""
    if not isinstance(value, Tensor):
        try:
            values = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"Expected `{key}` to be an array of real numbers; got: {error}") from error
        kind, size = values.dtype.kind, values.dtype.itemsize
        if kind not in "biuf":
            raise TypeError(
                f"Expected `{key}` to be an array of real numbers; got {type(value).__name__} of dtype {values.dtype}."
            )
        native = np.int64 if kind == "u" and size > 1 else np.float64 if size > 8 else values.dtype.newbyteorder("=")
        value = torch.from_numpy(np.require(values, native, ["C", "W"]))
    if value.is_complex():
        raise TypeError(f"Expected `{key}` to be an array of real numbers; got dtype {value.dtype}.")
    if key == "mask" and value.dtype != torch.bool:
        if not ((value == 0) | (value == 1)).all():
            raise ValueError("Expected `mask` to be boolean (True is observed); got values beside 0 and 1.")
        return value.bool()
    if value.is_floating_point():
        return value
    if key == "x":
        return value.to(torch.get_default_dtype())
    return value.long() if key in ("y", "index") else value
