"""Named data sets and files, as dicts of tensors with leading n, and the protocol that made them."""

import csv
import difflib
import hashlib
import importlib
import math
import operator
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Data", "as_batch", "batches", "check_finite", "keyed", "load", "permutation"]

_NAMES = ("digits", "mnist")
_SUFFIXES = (".npy", ".npz", ".csv")
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
_KEPT: list[object] = []


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in its parts, each a dict of tensors with leading n, and the protocol that made them.

    Shapes: `x` (n, x) of the dtype asked for, and `y` (n,) of int64 where the set has labels.

    Attributes:
        name: A known name, or the name of the file.
        train: The training part, as epoch 0 sees it.
        validation: A fixed part for choosing, or None.
        test: A fixed part for judging.
        protocol: What was done to the data, ready for JSON. Evaluations compare where `digest` is equal:
            the SHA-256 of the test part. `log_volume` (nats per datum) turns a density of `x` into one of
            the values as stored: log p(stored) = log p(x) - log_volume.
        shape: The picture that a row of `x` flattens, such as (28, 28), or None.
        feature_names: The header of a CSV file, or None.
    """

    name: str
    train: dict[str, Tensor] = field(repr=False)
    validation: dict[str, Tensor] | None = field(repr=False)
    test: dict[str, Tensor] = field(repr=False)
    protocol: dict[str, Any]
    shape: tuple[int, ...] | None = None
    feature_names: list[str] | None = None
    _stored: Tensor | None = field(default=None, repr=False)
    _observe: "_Observe | None" = field(default=None, repr=False)

    @property
    def features(self) -> int:
        """The number of columns of `x`."""
        return self.train["x"].shape[1]

    def to(self, device: torch.device | str) -> "Data":
        """Return the same data with every tensor on `device`."""

        def move(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: value.to(device) for key, value in part.items()}

        return replace(
            self,
            train=move(self.train),
            validation=None if self.validation is None else move(self.validation),
            test=move(self.test),
            _stored=None if self._stored is None else self._stored.to(device),
        )

    def epoch(self, epoch: int) -> dict[str, Tensor]:
        """Return the training part as epoch number `epoch` sees it; epoch 0 is `train`.

        Dynamic binarization draws x ~ Bernoulli(intensity) anew, dequantization draws its noise anew, by the
        data's seed and `epoch`, on the device that holds the data (a CPU and a GPU draw different numbers).
        All else is the stored tensors themselves.
        """
        seed = keyed(self.protocol["seed"], "train", epoch)
        if self._stored is None or self._observe is None or epoch == 0:
            return dict(self.train)
        return {**self.train, "x": self._observe(self._stored, seed)}


def load(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    array: str | None = None,
    seed: int = 0,
    binarization: str = "none",
    scaling: str = "none",
    dequantization: str = "none",
    validation_fraction: float = 0.0,
    test_fraction: float = 0.2,
    download: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Read a data set and split, scale, binarise or dequantise it, all by `seed` alone.

    Arrays (n, h, w) become rows (n, h*w). Intensities have a known maximum: 16 for digits, 255 for MNIST and
    for uint8 arrays, 1 for whatever lies in [0, 1] (a uint8 array of zeros and ones too).

    Args:
        name: "digits" (scikit-learn's, values 0..16), "mnist" (values in [0, 1]), or the path of a `.npy`,
            `.npz` or `.csv` file. A CSV's first row is a header if any of its cells is not a number.
        root: The folder of named sets; else the variable PPL_VAE_DATA, else the platform's cache folder.
        array: The key in an `.npz` file; may be left out if there is only one.
        seed: Fixes the split and every draw.
        binarization: "none"; "threshold", 1 from half the maximum on; "static", one Bernoulli draw;
            "dynamic", a new draw of the training part each epoch. Validation and test are drawn once, and
            are the same under "static" and "dynamic".
        scaling: "none"; "unit", divided by the maximum (of the training part's absolute values where none
            is known); "standardize", by the training part's mean and standard deviation per feature, which
            counts as 1 for a constant feature.
        dequantization: "none", or "uniform": integers plus noise of [0, 1), before the scaling, which then
            divides by the maximum + 1. "standardize" allows for the noise: mean + 1/2, variance + 1/12.
        validation_fraction: The share of the training part that is set apart.
        test_fraction: The share of a file's rows for testing; named sets have a split of their own.
        download: Whether a named set may be fetched.
        dtype: torch.float32 or torch.float64.

    Returns:
        The data, on the CPU: `load("digits", scaling="unit").train["x"]` is (1500, 64) in [0, 1].

    Raises:
        ValueError: If an option is unknown or does not suit the data, or the data cannot be found or read.
    """
    name = os.fspath(name)
    keyed(seed)
    _choose("binarization", binarization, ("none", "threshold", "static", "dynamic"))
    _choose("scaling", scaling, ("none", "unit", "standardize"))
    _choose("dequantization", dequantization, ("none", "uniform"))
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Expected `dtype` torch.float32 or torch.float64; got {dtype}.")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"Expected `validation_fraction` in [0, 1); got {validation_fraction}.")
    if not 0 < test_fraction < 1:
        raise ValueError(f"Expected `test_fraction` in (0, 1); got {test_fraction}.")
    if binarization != "none" and (scaling == "standardize" or dequantization == "uniform"):
        raise ValueError(
            f'Expected scaling "none" or "unit" and dequantization "none" beside binarization = '
            f'"{binarization}"; got scaling = "{scaling}", dequantization = "{dequantization}". Binary data '
            f"have neither a scale nor bins: leave out one of the two."
        )

    table = _table(name, root, array, download)
    rows, by = _split(table, seed, validation_fraction, test_fraction)
    observe = _observe(table, rows["train"], binarization, scaling, dequantization, dtype)
    stored = {part: observe.prepare(table.x[index]) for part, index in rows.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for part, values in stored.items():
        parts[part] = {"x": observe(values, keyed(seed, part, 0))}
        if not torch.isfinite(parts[part]["x"]).all():
            raise ValueError(f"Expected values within {dtype}; got larger. Scale them, or change `dtype`.")
        if table.y is not None:
            parts[part]["y"] = torch.from_numpy(table.y[rows[part]])
    named = Path(name).name
    protocol = {
        "name": named if table.array is None else f"{named}:{table.array}",
        "split": {"by": by, **{f"n_{part}": len(index) for part, index in rows.items()}},
        "seed": int(seed),
        "binarization": binarization,
        "scaling": scaling,
        "dequantization": dequantization,
        "maximum": table.maximum,
        "levels": table.maximum + 1 if table.maximum is not None and _whole(table.x) else None,
        "loc": _summary(observe.loc),
        "scale": _summary(observe.scale),
        "log_volume": float(np.log(np.broadcast_to(observe.scale, table.x.shape[1])).sum()),
        "digest": _digest(parts["test"]),
    }
    redrawn = binarization == "dynamic" or dequantization == "uniform"
    return Data(
        name=named,
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        protocol=protocol,
        shape=table.shape,
        feature_names=table.feature_names,
        _stored=stored["train"] if redrawn else None,
        _observe=observe if redrawn else None,
    )


def keyed(*key: SupportsIndex | str) -> int:
    """Mix a key, such as (seed, epoch) or (seed, "stream", block), into a 63-bit seed for a generator.

    Keys that differ in any entry or in length give seeds that are as good as independent.

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


def permutation(n: int, *, seed: int, epoch: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return the order (n,) in which epoch `epoch` visits n data: the same numbers on every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(keyed(seed, "order", epoch))).to(device)


def batches(data: Mapping[str, Tensor], size: int, *, seed: int, epoch: int) -> Iterator[dict[str, Tensor]]:
    """Yield every datum once, in batches of `size` (the last may be smaller), in an order by (seed, epoch).

    Each tensor is indexed on its own device, in the order that `permutation` gives:

        for epoch in range(epochs):
            for batch in batches(data.epoch(epoch), 100, seed=0, epoch=epoch):
                svi.step(**batch)

    Raises:
        ValueError: If `size` is not a positive integer, or the leading sizes differ.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"Expected `size` to be an integer >= 1; got {size!r}.")
    n = _leading(data)
    order = permutation(n, seed=seed, epoch=epoch)
    orders = {device: order.to(device) for device in {value.device for value in data.values()}}

    def generate() -> Iterator[dict[str, Tensor]]:
        for start in range(0, n, size):
            rows = {device: index[start : start + size] for device, index in orders.items()}
            yield {key: value.index_select(0, rows[value.device]) for key, value in data.items()}

    return generate()


def as_batch(x: object) -> dict[str, Tensor]:
    """Turn a tensor, whatever `np.asarray` takes, or a mapping of these into a dict of tensors.

    A bare array (n, x) is `{"x": array}`. Integers and booleans become the default float dtype in `x`, stay
    integers elsewhere (int64 in `y` and `index`) and become booleans in `mask`; floats keep their precision.

    Raises:
        TypeError: If something is not an array of real numbers, or a key is not a string.
        ValueError: If a bare array has fewer than two dimensions, there are no data, leading sizes differ, or
            `mask` is not a yes or no for each entry of `x`.
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
    if _leading(batch) == 0:
        raise ValueError("Expected at least one datum; got n = 0.")
    _check_mask(batch)
    return batch


def check_finite(batch: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities, except in entries of `x` that `mask` hides (True is observed).

    Raises:
        ValueError: Naming the key, row and column (from 0) of the first such entry, and how many there are.
    """
    _check_mask(batch)
    for key, value in batch.items():
        bad = ~torch.isfinite(value)
        if key == "x" and "mask" in batch:
            bad &= batch["mask"]
        if bad.any():
            row, *rest = torch.nonzero(bad)[0].tolist()
            column = f", column {rest[0] if len(rest) == 1 else tuple(rest)}" if rest else ""
            remedy = ", or hide the entries by a `mask` (True is observed)" if key == "x" else ""
            raise ValueError(
                f"Expected finite numbers in `{key}`; got {value[(row, *rest)].item()} in row {row}{column} "
                f"(counted from 0), {int(bad.sum())} such in all. Drop the rows{remedy}."
            )


class _Table(NamedTuple):
    """Values as stored, all parts in one array (n, x), and what is known of them."""

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64] | None = None
    shape: tuple[int, ...] | None = None
    feature_names: list[str] | None = None
    array: str | None = None
    maximum: int | None = None
    n_train: int | None = None
    own_split: bool = False


@dataclass(frozen=True)
class _Observe:
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


def _observe(
    table: _Table,
    train: npt.NDArray[np.int64],
    binarization: str,
    scaling: str,
    dequantization: str,
    dtype: torch.dtype,
) -> _Observe:
    """Fit the scaling to the training rows, and refuse options that the values do not allow."""
    noise = int(dequantization == "uniform")
    if noise and not _whole(table.x):
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
    return _Observe(binarization, bool(noise), table.maximum or 1, loc, scale, dtype)


def _split(
    table: _Table, seed: int, validation_fraction: float, test_fraction: float
) -> tuple[dict[str, npt.NDArray[np.int64]], str]:
    """Return the rows of each part, and how they were chosen."""

    def shuffled(rows: npt.NDArray[np.int64], stream: str) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(keyed(seed, stream))
        chosen: npt.NDArray[np.int64] = rows[torch.randperm(len(rows), generator=generator).numpy()]
        return chosen

    n = len(table.x)
    n_train = n - round(test_fraction * n) if table.n_train is None else table.n_train
    order, by = np.arange(n), "the set's own"
    if not table.own_split:
        order, by = shuffled(order, "split"), "permutation by seed"
    train, test = order[:n_train], order[n_train:]
    n_validation = round(validation_fraction * n_train)
    if not len(test) or n_validation >= n_train or (validation_fraction > 0 and not n_validation):
        raise ValueError(
            f"Expected rows for every part; got {n} rows, which makes {n_train - n_validation} for training, "
            f"{n_validation} for validation (`validation_fraction` = {validation_fraction}) and {len(test)} "
            f"for testing (`test_fraction` = {test_fraction}). Give more rows, or change the fractions."
        )
    if not n_validation:
        return {"train": train, "test": test}, by
    train = shuffled(train, "split-validation")
    return {"train": train[n_validation:], "validation": train[:n_validation], "test": test}, by


def _table(name: str, root: str | os.PathLike[str] | None, array: str | None, download: bool) -> _Table:
    """Find `name` among the known sets and the files."""
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if array is not None and suffix != ".npz":
        raise ValueError(f"Expected `array` for an .npz file only; got {array!r} for {name}. Leave it out.")
    if name == "digits":
        bunch = importlib.import_module("sklearn.datasets").load_digits()
        return _Table(bunch.data.astype(np.uint8), bunch.target.astype(np.int64), (8, 8), maximum=16, n_train=1500)
    if name == "mnist":
        return _mnist(root, download)
    if path.is_dir():
        raise ValueError(f"Expected a file ({', '.join(_SUFFIXES)}); got the folder {path}.")
    if not suffix and len(path.parts) == 1:
        close = difflib.get_close_matches(name.lower(), _NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected `name` to be {', '.join(map(repr, _NAMES))} or the path of a file "
            f"({', '.join(_SUFFIXES)}); got {name!r}.{hint}"
        )
    if suffix not in _SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(_SUFFIXES)}; got {path}.")
    if not path.is_file():
        raise ValueError(f"Expected a data file at {path.absolute()}; got no such file. Correct `name`.")
    if suffix == ".csv":
        values, feature_names = _csv(path)
        return _Table(values, feature_names=feature_names, maximum=_maximum(values))
    values, array = _numpy(path, array)
    shape = values.shape[1:] if values.ndim > 2 else None
    values = values.reshape(len(values), -1)
    return _Table(values, shape=shape, array=array, maximum=_maximum(values))


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


def _mnist(root: str | os.PathLike[str] | None, download: bool) -> _Table:
    """Read MNIST by torchvision, from the folder that holds `MNIST/raw`."""
    folder, origin = _root(root)
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
    return _Table(x.reshape(len(x), -1), y, x.shape[1:], maximum=255, n_train=len(parts[0]), own_split=True)


def _root(root: str | os.PathLike[str] | None) -> tuple[Path, str]:
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


def _choose(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Expected `{key}` to be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def _leading(batch: Mapping[str, Tensor]) -> int:
    """Return the n that all tensors of a batch share."""
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    if not shapes or any(not shape for shape in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
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
    """Return `value` as a tensor of the dtype that its key asks for."""
    if not isinstance(value, Tensor):
        try:
            values = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"Expected `{key}` to be an array of real numbers; got: {error}") from error
        if values.dtype.kind not in "biuf":
            raise TypeError(
                f"Expected `{key}` to be an array of real numbers; got {type(value).__name__} of dtype {values.dtype}."
            )
        if values.dtype.kind == "u" and values.dtype != np.uint8:
            values = values.astype(np.int64)
        if values.dtype.itemsize > 8:
            values = values.astype(np.float64)
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        value = torch.from_numpy(values if values.flags.writeable else values.copy())
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


def _whole(values: npt.NDArray[Any]) -> bool:
    return values.dtype == np.uint8 or bool((values == np.floor(values)).all())


def _maximum(values: npt.NDArray[Any]) -> int | None:
    """Return the largest value that intensities may take, or None where that is not known."""
    if values.min() >= 0 and values.max() <= 1:
        return 1
    return 255 if values.dtype == np.uint8 else None


def _summary(values: npt.NDArray[np.float64]) -> float | list[float] | str:
    """Return few numbers as they are, many as their digest."""
    if values.ndim == 0:
        return float(values)
    return values.tolist() if len(values) <= 16 else "sha256:" + hashlib.sha256(values.tobytes()).hexdigest()


def _digest(part: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of keys, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(part):
        value = part[key].cpu().numpy()
        digest.update(f"{key} {value.shape} {value.dtype};".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
