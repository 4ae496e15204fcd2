"""Named data sets and files, as dicts of tensors with leading n, and the protocol that made them."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae._checks import check_choice
from ppl_vae._seeds import fold_in
from ppl_vae.data.datasets import read_table
from ppl_vae.data.files import Table, are_whole
from ppl_vae.data.transforms import Transform, fit_transform, summary


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
    _observe: "Transform | None" = field(default=None, repr=False)

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
        seed = fold_in(self.protocol["seed"], "train", epoch)
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
    fold_in(seed)
    check_choice("binarization", binarization, ("none", "threshold", "static", "dynamic"))
    check_choice("scaling", scaling, ("none", "unit", "standardize"))
    check_choice("dequantization", dequantization, ("none", "uniform"))
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

    table = read_table(name, root, array, download)
    rows, by = _split(table, seed, validation_fraction, test_fraction)
    observe = fit_transform(table, rows["train"], binarization, scaling, dequantization, dtype)
    stored = {part: observe.prepare(table.x[index]) for part, index in rows.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for part, values in stored.items():
        parts[part] = {"x": observe(values, fold_in(seed, part, 0))}
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
        "levels": table.maximum + 1 if table.maximum is not None and are_whole(table.x) else None,
        "loc": summary(observe.loc),
        "scale": summary(observe.scale),
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


def _split(
    table: Table, seed: int, validation_fraction: float, test_fraction: float
) -> tuple[dict[str, npt.NDArray[np.int64]], str]:
    """Return the rows of each part, and how they were chosen."""

    def shuffled(rows: npt.NDArray[np.int64], stream: str) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(fold_in(seed, stream))
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


def _digest(part: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of keys, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(part):
        value = part[key].cpu().numpy()
        digest.update(f"{key} {value.shape} {value.dtype};".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
