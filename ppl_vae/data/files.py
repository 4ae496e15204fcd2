"""Files of data, as arrays with what is known of them."""

import csv
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ppl_vae.data.batches import check_finite

SUFFIXES = (".npy", ".npz", ".csv")
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


class Table(NamedTuple):
    """Values as stored, all parts in one array (n, x), and what is known of them."""

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64] | None = None
    shape: tuple[int, ...] | None = None
    feature_names: list[str] | None = None
    array: str | None = None
    maximum: int | None = None
    n_train: int | None = None
    own_split: bool = False


def read_numpy(path: Path, array: str | None) -> tuple[npt.NDArray[Any], str | None]:
    """Read an array of at least two dimensions from an `.npy` or `.npz` file, and its key there."""
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


def read_csv(path: Path) -> tuple[npt.NDArray[np.float64], list[str] | None]:
    """Read numbers (n, x) separated by commas, and their header if there is one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"Expected comma-separated text in UTF-8; got {path}: {error}") from error
    header = rows[0][1] if rows and None in map(_number, rows[0][1]) else None
    if len(rows) == (header is not None):
        raise ValueError(f"Expected rows of numbers in {path}; got {'only a header' if header else 'none'}.")
    values = np.empty((len(rows) - (header is not None), len(rows[0][1])))
    for i, (line, cells) in enumerate(rows[-len(values) :]):
        if len(cells) != values.shape[1]:
            raise ValueError(
                f"Expected {values.shape[1]} cells in {path}, line {line}, as in its first row; got {len(cells)}."
            )
        for j, cell in enumerate(cells):
            number = _number(cell)
            if number is None or not math.isfinite(number):
                raise ValueError(
                    f"Expected a finite number in {path}, line {line}, column "
                    f"{repr(header[j]) if header else j + 1}; got {cell!r}. Correct the cell, or drop the "
                    f"row or the column."
                )
            values[i, j] = number
    return values, header


def _number(cell: str) -> float | None:
    """Return the number in a cell (NaN where one is missing), or None where it holds some other text."""
    if cell.lower() in _MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def maximum(values: npt.NDArray[Any]) -> int | None:
    """Return the largest value that intensities may take, or None where that is not known."""
    if values.min() >= 0 and values.max() <= 1:
        return 1
    return 255 if values.dtype == np.uint8 else None


def are_whole(values: npt.NDArray[Any]) -> bool:
    """Say whether all values are whole numbers."""
    return values.dtype == np.uint8 or bool((values == np.floor(values)).all())
