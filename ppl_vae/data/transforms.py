"""Transforms from stored values to data: binarisation, dequantisation and scaling."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae.data.files import Table, are_whole


@dataclass(frozen=True)
class Transform:
    """Stored values -> data: binarised, or dequantised and scaled to (values - loc) / scale."""

    binarization: str
    dequantize: bool
    maximum: int
    loc: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    dtype: torch.dtype

    def prepare(self, values: npt.NDArray[Any]) -> Tensor:
        """Return `values` as a tensor; what may lose digits stays in double precision until it is scaled."""
        exact = self.dequantize or values.dtype == np.uint8
        return torch.from_numpy(values).to(self.dtype if exact else torch.float64)

    def __call__(self, stored: Tensor, seed: int) -> Tensor:
        """Return data (n, x) of `dtype` on the device of `stored`, with any noise drawn by `seed`."""
        if self.binarization == "threshold":
            return (stored >= self.maximum / 2).to(self.dtype)
        if self.binarization != "none" or self.dequantize:
            generator = torch.Generator(stored.device).manual_seed(seed)
            noise = torch.rand(stored.shape, generator=generator, dtype=stored.dtype, device=stored.device)
            if not self.dequantize:
                return (noise < stored / self.maximum).to(self.dtype)
            # Rounding could lift 255 + noise to 256, into the next bin.
            stored = torch.minimum(noise.add_(stored), torch.nextafter(stored + 1, stored))
        loc, scale = (torch.from_numpy(v).to(stored) for v in (self.loc, self.scale))
        return ((stored - loc) / scale).to(self.dtype)


def fit_transform(
    table: Table,
    train: npt.NDArray[np.int64],
    binarization: str,
    scaling: str,
    dequantization: str,
    dtype: torch.dtype,
) -> Transform:
    """Fit the scaling to the training rows, and refuse options that the values do not allow."""
    noise = int(dequantization == "uniform")
    if noise and not are_whole(table.x):
        value = table.x[table.x != np.floor(table.x)][0]
        raise ValueError(f'Expected whole numbers for dequantization = "uniform"; got {value}. Use "none".')
    if binarization != "none" and table.maximum is None:
        raise ValueError(
            f'Expected intensities for binarization = "{binarization}": a named image set, uint8, or values '
            f"in [0, 1]; got values from {table.x.min()} to {table.x.max()}. Rescale them to [0, 1] in the "
            f'file, or use "none".'
        )
    base = table.maximum + noise if table.own_split and table.maximum is not None else 1
    loc, scale = np.zeros(()), np.asarray(1.0 if binarization != "none" else base, np.float64)
    values = table.x[train]
    if scaling == "unit" and binarization == "none":
        largest = max(abs(float(values.max())), abs(float(values.min()))) or 1.0
        scale = np.asarray((largest if table.maximum is None else table.maximum) + noise, np.float64)
    elif scaling == "standardize":
        loc = values.mean(0, dtype=np.float64) + noise / 2
        scale = np.sqrt(values.var(0, dtype=np.float64) + noise / 12)
        scale = np.where(values.max(0) == values.min(0), base, scale)
    return Transform(binarization, bool(noise), table.maximum or 1, loc, scale, dtype)


def summary(values: npt.NDArray[np.float64]) -> float | list[float] | str:
    """Return few numbers as they are, many as their digest."""
    if values.ndim == 0:
        return float(values)
    return values.tolist() if len(values) <= 16 else "sha256:" + hashlib.sha256(values.tobytes()).hexdigest()
