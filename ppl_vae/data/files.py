"""Arrays of numbers in files, and what a source says about its values."""

import contextlib
import math
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from platformdirs import user_cache_path
from torch import Tensor

from ppl_vae.data.batches import check_finite

LARGEST = "PPL_VAE_LARGEST"  # the variable with the size, in bytes, that data may take once they are unpacked
CACHE = "PPL_VAE_CACHE"  # the variable with the folder for what can be made anew
IN_MEMORY = "PPL_VAE_IN_MEMORY"  # the variable with the size, in bytes, up to which numbers are held in memory
_AT_ONCE = 2**22  # numbers that are looked at together
_BLOWN_UP = 100  # times that a file may grow when it is unpacked to more than a gibibyte


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a reader raises on a foreign file into one message.

    Raises:
        ValueError: With that message, also if it is no regular file, such as a pipe, which might never end.
    """
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(("Expected", f"{path}")):
            raise
        what_else = str(error) or type(error).__name__
        raise ValueError(f"Expected {what}; got {path}: {what_else}") from error


def check_unpacked(path: Path, size: int) -> None:
    """Check that data which a file's header announces can be meant, before memory is taken for them.

    Raises:
        ValueError: If they take more than a gibibyte and a hundred times the file, or more than a person set.
    """
    given = os.environ.get(LARGEST, "")
    limit = float(given) if given else max(2**30, _BLOWN_UP * path.stat().st_size)
    if size > limit:
        raise ValueError(
            f"Expected data of at most {limit:.0f} bytes in {path}; its header announces {size}. If they are meant, "
            f"set the variable {LARGEST}={size}."
        )


def in_memory() -> float:
    """Size, in bytes, up to which numbers are held in memory: what a person set, or half of all memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
    return float(os.environ.get(IN_MEMORY) or pages / 2)


def cache_folder() -> Path:
    """The folder for what can be made anew, by the variable PPL_VAE_CACHE or the platform; made if need be."""
    chosen = os.environ.get(CACHE)
    folder = Path(chosen).expanduser() if chosen else user_cache_path("ppl_vae", appauthor=False, opinion=False)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scratch() -> Any:
    """A file in the cache folder without a name of its own; a map of it outlives its end."""
    return tempfile.NamedTemporaryFile(dir=cache_folder(), prefix="scratch-")


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one is the map of a file in the cache folder, which vanishes with the process."""
    size = math.prod(shape)
    if size * dtype.itemsize <= in_memory():
        return torch.empty(shape, dtype=dtype)
    with scratch() as file:
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)


def chunks(values: Any) -> Iterator[Any]:
    """Consecutive rows, some at a time."""
    step = max(1, _AT_ONCE // max(1, math.prod(values.shape[1:])))
    return (values[start : start + step] for start in range(0, len(values), step))


@dataclass(frozen=True)
class RawData:
    """Values as stored, all parts in one array, before any split or transform.

    Attributes:
        x: Values (n, x); codes for words, NaN where a cell is missing.
        y: Labels (n,), or None.
        shape: The picture that a row of `x` flattens, or None.
        names: Names of the columns, or None.
        array: The key in an `.npz` file, or None.
        maximum: The largest value that intensities can take, or None if the values are not intensities.
        n_train: The size of a named set's own training part, or None.
        in_order: Whether the training part comes first, as the set has it; else rows are shuffled.
        unit: Whether intensities count in units of the maximum even without scaling.
        is_table: Whether the columns differ in what they mean, so that their kinds can be inferred.
        categories: The words of each column that held text, in the order of their codes.
        ordered: Those of these columns whose words have an order.
        classes: The words of `y`, in the order of its codes, or None.
        ids: What tells the rows apart (n,), or None.
        size_factor: By how much each row counts more than the average (n,), or None.
        covariates: What else is known of each row, (n, c), words as codes, or None.
        covariate_words: The words of each of these columns by name, none for one of numbers.
        roles: The role of each column that is no feature.
        lines: The line of each row in a text file (n,), or None.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64] | None = None
    shape: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    array: str | None = None
    maximum: int | None = None
    n_train: int | None = None
    in_order: bool = False
    unit: bool = False
    is_table: bool = False
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    classes: tuple[str, ...] | None = None
    ids: npt.NDArray[Any] | None = None
    size_factor: npt.NDArray[np.float64] | None = None
    covariates: npt.NDArray[np.float64] | None = None
    covariate_words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    lines: npt.NDArray[np.int64] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all values are whole numbers, none of them a code."""
        if self.x.dtype == np.uint8 or self.categories:
            return not self.categories
        return all(bool(((part == np.floor(part)) | np.isnan(part)).all()) for part in chunks(self.x))

    @cached_property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Where a cell is missing, (n, x)."""
        some = self.x.dtype.kind == "f" and any(np.isnan(part).any() for part in chunks(self.x))
        return np.isnan(self.x) if some else np.broadcast_to(False, self.x.shape)

    def name(self, column: int) -> str:
        """Name of a column, or its number from 1."""
        return f"column {column + 1}" if self.names is None else self.names[column]


def rows_text(lines: npt.NDArray[np.int64] | None, rows: Sequence[int] | npt.NDArray[np.int64]) -> str:
    """Name some rows, by their `lines` in a text file if there are any."""
    first = f"row {rows[0]} (counted from 0)" if lines is None else f"line {lines[rows[0]]}"
    return first if len(rows) == 1 else f"{len(rows)} rows, the first in {first}"


def encode(values: npt.NDArray[Any], where: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Codes (n,) of labels, and the label of each code: words sorted, or whole numbers in order.

    Raises:
        ValueError: If they are neither words nor whole numbers.
    """
    if values.dtype.kind not in "biufU":
        raise ValueError(f"Expected words or whole numbers as labels in {where}; got dtype {values.dtype}.")
    if values.dtype.kind == "f":
        if not (values == np.floor(values)).all():
            value = values[values != np.floor(values)][0]
            raise ValueError(
                f"Expected words or whole numbers as labels in {where}; got {value}. Leave `label` out, which makes "
                "it a feature."
            )
        values = values.astype(np.int64)
    words, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int64), tuple(map(str, words))


def read_array(path: Path, array: str | None, label: str | None, others: Sequence[str] = ()) -> RawData:
    """Read a `.npy` or `.npz` file.

    The latter may hold labels under the key `label`, by default under `y` if that holds whole numbers or words, and
    what is no data under `others`.

    Raises:
        ValueError: If it does not hold numbers, finite or NaN where missing, one row per datum.
    """
    y, classes, loaded, where = None, None, _load(path), f"{path}"
    if isinstance(loaded, list):
        keys, labelled = loaded, label or "y"
        left = [key for key in keys if key != labelled and key not in others] or keys
        array = left[0] if array is None and len(left) == 1 else array
        for key, value in {"array": array, "label": label or array}.items():
            if value not in keys:
                known = ", ".join(map(repr, keys)) or "it is empty"
                remedy = f"Try --set data.{key}=NAME."
                raise ValueError(f"Expected `{key}` to be a key of {path} ({known}); got {value!r}. {remedy}")
        loaded, where = _load(path, array), f"{path}:{array}"
        if labelled in keys and labelled != array:
            labels = _load(path, labelled)
            if label or labels.dtype.kind in "biuU":
                if labels.shape != loaded.shape[:1]:
                    raise ValueError(f"Expected labels {loaded.shape[:1]} in {path}:{labelled}; got {labels.shape}.")
                y, classes = encode(labels, f"{path}:{labelled}")
    if loaded.dtype.kind not in "biuf":
        raise ValueError(f"Expected real numbers in {where}; got an array of dtype {loaded.dtype}.")
    if not 2 <= loaded.ndim <= 4 or not loaded.size:
        raise ValueError(
            f"Expected an array of shape (n, x) or (n, h, w), or (n, c, h, w) or (n, h, w, c), in {where}; "
            f"got {loaded.shape}."
        )
    plain = np.uint8 if loaded.dtype == np.uint8 else np.float64
    values = loaded if isinstance(loaded, np.memmap) else np.ascontiguousarray(loaded, plain)
    check_numbers(values, where)
    rows, shape = flatten(values)
    return RawData(rows, y, shape, array=array, maximum=intensity(values), classes=classes)


def read_cells(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Arrays under some keys of an `.npz` file as columns by name: of numbers, or lists of words.

    Raises:
        ValueError: If there is no such key, or it holds neither (n,) nor (n, c) numbers or words.
    """
    known, cells = _load(path), dict[str, Any]()
    for key in keys:
        if not isinstance(known, list) or key not in known:
            listed = ", ".join(map(repr, known if isinstance(known, list) else [])) or "there is none"
            raise ValueError(f"Expected a key of {path} ({listed}); got {key!r}.")
        values = _load(path, key)
        if values.ndim not in (1, 2) or values.dtype.kind not in "biufU":
            raise ValueError(
                f"Expected numbers or words of shape (n,) or (n, c) in {path}:{key}; got {values.dtype} of shape "
                f"{values.shape}."
            )
        columns = {key: values} if values.ndim == 1 else {f"{key}{j}": one for j, one in enumerate(values.T, 1)}
        cells |= {name: one.tolist() if one.dtype.kind == "U" else one for name, one in columns.items()}
    return cells


def check_numbers(values: npt.NDArray[Any], where: str) -> None:
    """Refuse infinities, with the place of the first."""
    if not any(np.isinf(part).any() for part in chunks(values)):
        return
    try:
        check_finite({"x": torch.from_numpy(values), "mask": torch.from_numpy(~np.isnan(values))})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _load(path: Path, key: str | None = None) -> Any:
    """Array in a `.npy` file or under a key of an `.npz` file; without a key, the keys of the latter."""
    with reading(path, "a NumPy file without objects"), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            _check_header(path, file, path.stat().st_size)
            file.seek(0)
            mapped = 8 * path.stat().st_size > in_memory()  # as many bytes as reading it may take
            return np.load(path if mapped else file, "c" if mapped else None, allow_pickle=False)
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if key is None:
                return list(sizes)
            check_unpacked(path, sizes[key].file_size)
            with archive.open(sizes[key]) as member:
                _check_header(path, member, sizes[key].file_size)
            with archive.open(sizes[key]) as member:
                return np.lib.format.read_array(member, allow_pickle=False)


def _check_header(path: Path, file: IO[bytes], size: int) -> None:
    """Check that an array is as large as its header says."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"Expected an array of numbers in {path}; got one of named fields.")
    shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"Expected an array of {shape} in {path}; the file is too short for it.")


def intensity(values: npt.NDArray[Any]) -> int | None:
    """Largest value that intensities can take: 1 in the unit interval, 255 for 8 bits; None for other numbers."""
    seen = [(part.min(), part.max()) for part in map(present, chunks(values)) if len(part)]
    unit = bool(seen) and all(low >= 0 and high <= 1 for low, high in seen)
    return 1 if unit else 255 if values.dtype == np.uint8 else None


def present(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values that are not missing, in one row."""
    return values[~np.isnan(values)] if values.dtype.kind == "f" else values.reshape(-1)


def flatten(pictures: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], tuple[int, ...] | None]:
    """Rows (n, x) of pictures (n, h, w), (n, c, h, w) or (n, h, w, c), and the shape (h, w) or (c, h, w).

    Channels come last if the last axis, and not the second, has 1 or 3 entries; else they come first.
    """
    if pictures.ndim == 4 and pictures.shape[3] in (1, 3) and pictures.shape[1] not in (1, 3):
        pictures = np.moveaxis(pictures, 3, 1)
    return np.ascontiguousarray(pictures).reshape(len(pictures), -1), pictures.shape[1:] if pictures.ndim > 2 else None
