"""Files of numbers, and what a file or a named set says about its values."""

import csv
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ppl_vae.data.batches import check_finite

SUFFIXES = (".npy", ".npz", ".csv")
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


@dataclass(frozen=True)
class RawData:
    """Values as stored, all parts in one array, before any split or transform.

    Attributes:
        x: Values (n, x).
        y: Labels (n,), or None.
        shape: The picture that a row of `x` flattens, or None.
        feature_names: The header of a CSV file, or None.
        array: The key in an `.npz` file, or None.
        maximum: The largest value that intensities can take, or None if the values are not intensities.
        n_train: The size of a named set's own training part, or None.
        in_order: Whether the training part comes first, as the set has it; else rows are shuffled.
        unit: Whether intensities count in units of the maximum even without scaling.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64] | None = None
    shape: tuple[int, ...] | None = None
    feature_names: list[str] | None = None
    array: str | None = None
    maximum: int | None = None
    n_train: int | None = None
    in_order: bool = False
    unit: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all values are whole numbers."""
        return self.x.dtype == np.uint8 or bool((self.x == np.floor(self.x)).all())


def read_file(path: Path, array: str | None) -> RawData:
    """Read a `.npy`, `.npz` or `.csv` file.

    Raises:
        ValueError: If there is no such file, or it does not hold finite numbers, one row per datum.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(SUFFIXES)}; got {path}.")
    if not path.is_file():
        raise ValueError(f"Expected a data file at {path.absolute()}; got no such file. Correct `name`.")
    feature_names: list[str] | None = None
    if path.suffix.lower() == ".csv":
        x, feature_names = _read_csv(path)
    else:
        x, array = _read_numpy(path, array)
    unit_interval = x.min() >= 0 and x.max() <= 1
    return RawData(
        x.reshape(len(x), -1),
        shape=x.shape[1:] if x.ndim > 2 else None,
        feature_names=feature_names,
        array=array,
        maximum=1 if unit_interval else 255 if x.dtype == np.uint8 else None,
    )


def _read_numpy(path: Path, array: str | None) -> tuple[npt.NDArray[Any], str | None]:
    """Array of at least two dimensions, and its key in an `.npz` file."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                array = None
            else:
                keys = list(loaded.files)
                array = keys[0] if array is None and len(keys) == 1 else array
                loaded = loaded[array] if array in keys else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected a NumPy file without objects; got {path}: {error}") from error
    if loaded is None:
        raise ValueError(
            f"Expected `array` to be a key of {path} ({', '.join(map(repr, keys)) or 'it is empty'}); got {array!r}."
        )
    where = f"{path}" if array is None else f"{path}:{array}"
    if loaded.dtype.kind not in "biuf":
        raise ValueError(f"Expected real numbers in {where}; got an array of dtype {loaded.dtype}.")
    if loaded.ndim < 2 or not loaded.size:
        raise ValueError(f"Expected an array of shape (n, x) or (n, h, w) in {where}; got {loaded.shape}.")
    values = np.ascontiguousarray(loaded, np.uint8 if loaded.dtype == np.uint8 else np.float64)
    try:
        check_finite({"x": torch.from_numpy(values)})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return values, array


def _read_csv(path: Path) -> tuple[npt.NDArray[np.float64], list[str] | None]:
    """Numbers (n, x) separated by commas, and their header if there is one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"Expected comma-separated text in UTF-8; got {path}: {error}") from error
    header = rows.pop(0)[1] if rows and None in map(_number, rows[0][1]) else None
    if not rows:
        raise ValueError(f"Expected rows of numbers in {path}; got {'only a header' if header else 'none'}.")
    values = np.empty((len(rows), len(header or rows[0][1])))
    for i, (line, cells) in enumerate(rows):
        if len(cells) != values.shape[1]:
            raise ValueError(
                f"Expected {values.shape[1]} cells in {path}, line {line}, as in its first row; got {len(cells)}."
            )
        for j, cell in enumerate(cells):
            number = _number(cell)
            if number is None or not math.isfinite(number):
                column = repr(header[j]) if header else j + 1
                raise ValueError(
                    f"Expected a finite number in {path}, line {line}, column {column}; got {cell!r}. Correct the "
                    f"cell, or drop the row or the column."
                )
            values[i, j] = number
    return values, header


def _number(cell: str) -> float | None:
    """Number in a cell, NaN if it is missing, None if the cell holds other text."""
    if cell.lower() in _MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None
