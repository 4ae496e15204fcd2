"""Transforms from stored values to data: binarisation, dequantisation and scaling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae.data.columns import Kind
from ppl_vae.data.files import RawData, present


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

    def __call__(self, stored: Tensor, seed: int) -> Tensor:
        """Transform to data (n, x) of `dtype` on the device of `stored`; `seed` fixes the noise."""
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
    values = raw.x[train][:, scaled] if raw.categories and scaled.any() else raw.x[train]
    largest = raw.maximum or float(np.abs(present(values)).max()) or 1
    divisor = float(largest + noise) if binarization == "none" and (scaling == "unit" or raw.unit) else 1.0
    loc: npt.NDArray[np.float64] = np.zeros(())
    scale: npt.NDArray[np.float64] = np.asarray(divisor)
    if scaling == "unit" and raw.categories:
        scale = np.where(scaled, divisor, 1.0)
    if scaling == "standardize":
        values = raw.x[train]
        loc = np.asarray(np.nanmean(values, 0, dtype=np.float64) + noise / 2)
        scale = np.sqrt(np.nanvar(values, 0, dtype=np.float64) + noise / 12)
        scale = np.where(np.nanmax(values, 0) == np.nanmin(values, 0), divisor, scale)
        if kinds is not None:
            loc, scale = np.where(np.array(kinds) == "real", loc, 0.0), np.where(scaled, scale, 1.0)
    return Transform(binarization, bool(noise), raw.maximum or 1, loc, scale, dtype)
