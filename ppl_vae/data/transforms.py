"""Transforms from stored values to data: binarisation, dequantisation and scaling."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae.data.columns import Kind
from ppl_vae.data.files import RawData, chunks, present, room

_CACHED = 2**17  # numbers that are transformed at once on a CPU, whose cache holds them


@dataclass(frozen=True)
class Transform:
    """Stored values -> data: binarised, or dequantised and scaled to (values - loc) / scale.

    Made by `fit_transform`.
    """

    binarization: str
    dequantize: bool
    maximum: int
    loc: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    dtype: torch.dtype

    @property
    def redraws(self) -> bool:
        """Whether each epoch draws the training data anew."""
        return self.binarization == "dynamic" or self.dequantize

    def to_tensor(self, values: npt.NDArray[Any]) -> Tensor:
        """Stored values as a tensor, in double precision if `dtype` could lose digits before the scaling."""
        exact = self.dequantize or values.dtype == np.uint8
        return torch.from_numpy(values).to(self.dtype if exact else torch.float64)

    def inverse(self, x: Tensor) -> npt.NDArray[np.float64]:
        """Transform data (n, x) back to the units that they are stored in, without the noise; binary data stay."""
        values = x.detach().cpu().double().numpy() * self.scale + self.loc
        return np.floor(values) if self.dequantize else values

    def __call__(self, stored: Tensor, seed: int | torch.Generator) -> Tensor:
        """Transform to data (n, x) of `dtype` on the device of `stored`; `seed`, or a generator, fixes the noise."""
        generator = torch.Generator(stored.device).manual_seed(seed) if isinstance(seed, int) else seed
        if stored.device.type != "cpu":
            return self._of(stored, generator)
        x = torch.empty(stored.shape, dtype=self.dtype)
        rows = max(1, _CACHED // max(x[:1].numel(), 1))
        for part, given in zip(x.split(rows), stored.split(rows), strict=True):
            part.copy_(self._of(given, generator))
        return x

    def _of(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        if stored.dtype == torch.uint8:
            stored = stored.to(self.dtype)
        if self.binarization == "threshold":
            return (stored >= self.maximum / 2).to(self.dtype)
        if self.binarization != "none" or self.dequantize:
            noise = torch.rand(stored.shape, generator=generator, dtype=stored.dtype, device=stored.device)
            if not self.dequantize:
                return torch.lt(noise, stored / self.maximum, out=noise).to(self.dtype)
            # Rounding could lift 255 + noise to 256, into the next bin.
            stored = torch.minimum(noise.add_(stored), torch.nextafter(stored + 1, stored))
        loc, scale = (torch.from_numpy(v).to(stored) for v in (self.loc, self.scale))
        return ((stored - loc) / scale).to(self.dtype)


def _plain(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bytes as they are, other numbers in double precision."""
    return values if values.dtype == np.uint8 else values.astype(np.float64, copy=False)


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of raw values before the transform, in the order of a part, as tensors of some at a time."""

    values: npt.NDArray[Any]
    index: npt.NDArray[np.int64]
    transform: Transform

    def __iter__(self) -> Iterator[Tensor]:
        for rows in chunks(np.broadcast_to(self.index[:, None], self.shape)):
            yield self.transform.to_tensor(_plain(self.values[rows[:, 0]]))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.index), self.values.shape[1]

    @property
    def whole(self) -> Tensor:
        """All rows; of bytes as bytes."""
        return torch.from_numpy(self.values[self.index]) if self.values.dtype == np.uint8 else torch.cat([*self])

    def transformed(self, seed: int) -> Tensor:
        """All rows, transformed; the seed fixes the noise."""
        generator, done = torch.Generator().manual_seed(seed), 0
        x = room(self.shape, self.transform.dtype)
        for rows in self:
            x[done : done + len(rows)] = self.transform(rows, generator)
            done += len(rows)
        return x


def fit_transform(
    raw: RawData,
    train: npt.NDArray[np.int64],
    kinds: Sequence[Kind] | None,
    binarization: str,
    scaling: str,
    dequantization: str,
    dtype: torch.dtype,
) -> Transform:
    """Fit a transform to the training rows.

    Missing cells count for nothing. Where kinds are known, "standardize" divides `positive` columns without a shift,
    and leaves all but these and `real` ones alone. So does "unit" where there are words.

    Raises:
        ValueError: If an option does not suit the values.
    """
    noise = int(dequantization == "uniform")
    if raw.categories and (noise or binarization != "none"):
        raise ValueError(
            f"Expected numbers alone beside binarization or dequantization; got words in {', '.join(raw.categories)}."
        )
    if noise and not raw.is_whole:
        seen = present(raw.x)
        value = seen[seen != np.floor(seen)][0]
        raise ValueError(f'Expected whole numbers for dequantization = "uniform"; got {value}. Use "none".')
    if binarization != "none" and raw.maximum is None:
        raise ValueError(
            f'Expected intensities for binarization = "{binarization}": a named image set, uint8, or values '
            f"in [0, 1]; got values from {np.nanmin(raw.x)} to {np.nanmax(raw.x)}. Rescale them to [0, 1] in the "
            f'file, or use "none".'
        )
    scaled = np.array([kind in ("real", "positive") for kind in kinds or ()])
    divisor = 1.0
    if binarization == "none" and (scaling == "unit" or raw.unit):
        few = scaled if raw.categories and scaled.any() else slice(None)
        parts = (present(raw.x[rows][:, few]) for rows in chunks(train))
        largest = raw.maximum or max(float(np.abs(part).max()) for part in parts if len(part)) or 1
        divisor = float(largest + noise)
    loc: npt.NDArray[np.float64] = np.zeros(())
    scale: npt.NDArray[np.float64] = np.asarray(divisor)
    if scaling == "unit" and raw.categories:
        scale = np.where(scaled, divisor, 1.0)
    if scaling == "standardize":
        mean, variance, constant = _moments(raw.x, train)
        loc, scale = np.asarray(mean + noise / 2), np.where(constant, divisor, np.sqrt(variance + noise / 12))
        if kinds is not None:
            loc, scale = np.where(np.array(kinds) == "real", loc, 0.0), np.where(scaled, scale, 1.0)
    return Transform(binarization, bool(noise), raw.maximum or 1, loc, scale, dtype)


def _moments(values: npt.NDArray[Any], train: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    """Mean, variance and whether there is one value alone, of each column, without missing cells.

    Rows are added up one after the other, as NumPy does, so that it does not matter how many are looked at together.
    """

    def parts() -> Iterator[npt.NDArray[Any]]:
        every = chunks(np.broadcast_to(train[:, None], (len(train), values.shape[1])))
        return (values[rows[:, 0]].astype(np.float64, copy=False) for rows in every)

    def total(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        known = (np.nan_to_num(part, copy=False) for part in parts)
        start = next(known).sum(0)
        return functools.reduce(lambda sums, part: np.concatenate([sums[None], part]).sum(0), known, start)

    count = sum((~np.isnan(part)).sum(0) for part in parts())
    mean = total(parts()) / count
    variance = total((part - mean) ** 2 for part in parts()) / count
    low = functools.reduce(np.fmin, (np.fmin.reduce(part) for part in parts()))
    high = functools.reduce(np.fmax, (np.fmax.reduce(part) for part in parts()))
    return mean, variance, low == high
