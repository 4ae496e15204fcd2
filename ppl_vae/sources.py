"""Sources: named data sets and files, as arrays with what is known of them."""

import csv
import difflib
import importlib
import math
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ppl_vae.batches import check_finite

__all__ = ["NAMES", "Table", "choose", "read_table", "root_folder"]

NAMES = ("digits", "mnist")


SUFFIXES = (".npy", ".npz", ".csv")


_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


_KEPT: list[object] = []


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


def read_table(name: str, root: str | os.PathLike[str] | None, array: str | None, download: bool) -> Table:
    """Find `name` among the known sets and the files."""
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if array is not None and suffix != ".npz":
        raise ValueError(f"Expected `array` for an .npz file only; got {array!r} for {name}. Leave it out.")
    if name == "digits":
        bunch = importlib.import_module("sklearn.datasets").load_digits()
        return Table(bunch.data.astype(np.uint8), bunch.target.astype(np.int64), (8, 8), maximum=16, n_train=1500)
    if name == "mnist":
        return _mnist(root, download)
    if path.is_dir():
        raise ValueError(f"Expected a file ({', '.join(SUFFIXES)}); got the folder {path}.")
    if not suffix and len(path.parts) == 1:
        close = difflib.get_close_matches(name.lower(), NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected `name` to be {', '.join(map(repr, NAMES))} or the path of a file "
            f"({', '.join(SUFFIXES)}); got {name!r}.{hint}"
        )
    if suffix not in SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(SUFFIXES)}; got {path}.")
    if not path.is_file():
        raise ValueError(f"Expected a data file at {path.absolute()}; got no such file. Correct `name`.")
    if suffix == ".csv":
        values, feature_names = _csv(path)
        return Table(values, feature_names=feature_names, maximum=maximum(values))
    values, array = _numpy(path, array)
    shape = values.shape[1:] if values.ndim > 2 else None
    values = values.reshape(len(values), -1)
    return Table(values, shape=shape, array=array, maximum=maximum(values))


def _numpy(path: Path, array: str | None) -> tuple[npt.NDArray[Any], str | None]:
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


def _csv(path: Path) -> tuple[npt.NDArray[np.float64], list[str] | None]:
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


def _mnist(root: str | os.PathLike[str] | None, download: bool) -> Table:
    """Read MNIST by torchvision, from the folder that holds `MNIST/raw`."""
    folder, origin = root_folder(root)
    datasets = _torchvision_datasets()
    try:
        parts = [datasets.MNIST(str(folder), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        remedy = (
            "Check the network connection, and that the folder can be written"
            if download
            else "Set `root` or PPL_VAE_DATA to the folder that holds MNIST/raw, or give download=True"
        )
        raise ValueError(f"Expected 'mnist' under {folder} ({origin}); got: {error} {remedy}.") from error
    x = np.concatenate([part.data.numpy() for part in parts])
    y = np.concatenate([part.targets.numpy() for part in parts]).astype(np.int64)
    return Table(x.reshape(len(x), -1), y, x.shape[1:], maximum=255, n_train=len(parts[0]), own_split=True)


def root_folder(root: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Return the folder of named sets, and what chose it."""
    if root is not None:
        return Path(root).expanduser(), "`root`"
    if chosen := os.environ.get("PPL_VAE_DATA"):
        return Path(chosen).expanduser(), "the environment variable PPL_VAE_DATA"
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ppl_vae", "the cache folder"


def _torchvision_datasets() -> ModuleType:
    """Import `torchvision.datasets`, also where torchvision's operators do not match this build of torch."""
    try:
        return importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ValueError(f"Expected torchvision for 'mnist'; got: {error}. Install torchvision.") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for module in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library: Any = importlib.import_module("torch.library").Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    return importlib.import_module("torchvision.datasets")


def choose(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a setting outside what is allowed."""
    if value not in allowed:
        raise ValueError(f"Expected `{key}` to be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def maximum(values: npt.NDArray[Any]) -> int | None:
    """Return the largest value that intensities may take, or None where that is not known."""
    if values.min() >= 0 and values.max() <= 1:
        return 1
    return 255 if values.dtype == np.uint8 else None
