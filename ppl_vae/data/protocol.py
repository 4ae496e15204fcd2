"""The protocol of a data set: which rows go to which part, what its columns are, and the digests that tell it apart."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fold_in
from ppl_vae.data.columns import Columns, Kind, infer_kind
from ppl_vae.data.files import RawData, present
from ppl_vae.data.tables import LABEL, UNLABELLED
from ppl_vae.data.transforms import Stored, Transform


def split(
    raw: RawData, seed: int, validation_fraction: float, test_fraction: float
) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of each part."""

    def shuffled(rows: npt.NDArray[np.int64], stream: str) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(fold_in(seed, stream))
        return rows[torch.randperm(len(rows), generator=generator).numpy()]

    n = len(raw.x)
    n_train = n - round(test_fraction * n) if raw.n_train is None else raw.n_train
    order = np.arange(n) if raw.in_order else shuffled(np.arange(n), "split")
    train, test = order[:n_train], order[n_train:]
    n_validation = round(validation_fraction * n_train)
    no_test = not len(test) and (test_fraction > 0 or raw.n_train is not None)
    if no_test or n_validation >= n_train or (validation_fraction > 0 and not n_validation):
        raise ValueError(
            f"Expected rows for every part; got {n} rows, which makes {n_train - n_validation} for training, "
            f"{n_validation} for validation (`validation_fraction` = {validation_fraction}) and {len(test)} "
            f"for testing (`test_fraction` = {test_fraction}). Give more rows, or change the fractions."
        )
    if not n_validation:
        return {"train": train, "test": test}
    train = shuffled(train, "split-validation")
    return {"train": train[n_validation:], "validation": train[:n_validation], "test": test}


def withhold(raw: RawData, train: npt.NDArray[np.int64], labelled: int, seed: int) -> npt.NDArray[np.int64]:
    """Labels (n,), -1 for the training rows beyond the first ones of each class, in an order by seed."""
    if raw.y is None:
        raise ValueError(f"Expected labels, for `labelled`; got data without any. Name their column: {LABEL}.")
    labelled, y, generator = (
        check_int("labelled", labelled),
        raw.y.copy(),
        torch.Generator().manual_seed(fold_in(seed, "labelled")),
    )
    order = train[torch.randperm(len(train), generator=generator).numpy()]
    order = order[y[order] >= 0]
    order = order[np.argsort(y[order], kind="stable")]
    turn = np.concatenate([np.arange(count) for count in np.unique(y[order], return_counts=True)[1]])
    y[order[np.argsort(turn, kind="stable")[labelled:]]] = UNLABELLED
    return y


def infer_kinds(raw: RawData, train: npt.NDArray[np.int64]) -> list[Kind] | None:
    """Kinds of the columns of a table: of numbers by their values, of words by their number and order."""
    kinds: list[Kind] = []
    for j in range(raw.x.shape[1] if raw.is_table else 0):
        name, words = raw.name(j), raw.categories.get(raw.name(j))
        of_words: Kind = "ordered" if name in raw.ordered else "binary" if words and len(words) == 2 else "category"
        kinds.append(of_words if words else infer_kind(present(raw.x[:, j]), present(raw.x[train, j])))
    return kinds or None


def describe(raw: RawData, kinds: list[Kind] | None, transform: Transform) -> Columns:
    """Columns of `x`, as the transform leaves them."""
    n, levels = raw.x.shape[1], None
    scaled = np.broadcast_to((transform.loc != 0) | (transform.scale != 1) | transform.dequantize, n)
    if kinds is not None:
        for j in np.flatnonzero(scaled):
            kinds[j] = "positive" if kinds[j] == "positive" and not transform.dequantize else "real"
        kinds = kinds if transform.binarization == "none" else ["binary"] * n
        sizes = [2 if kind == "binary" else 0 for kind in kinds]
        levels = tuple(len(raw.categories.get(raw.name(j), ())) or size for j, size in enumerate(sizes))
    elif transform.binarization != "none":
        levels = (2,) * n
    elif raw.maximum is not None and not transform.dequantize and not transform.loc.ndim and raw.is_whole:
        levels = (raw.maximum + 1,) * n
    given: Any = {} if raw.y is None else {"y": (len(raw.classes or ()) or int(raw.y.max()) + 1,)}
    if raw.covariates is not None:
        given["covariates"] = tuple(map(len, raw.covariate_words.values()))
    known, words = None if kinds is None else tuple(kinds), raw.covariate_words or None
    more: Any = {"given": given or None, "covariates": words}
    return Columns(n, raw.shape, raw.names, known, levels, raw.categories or None, **more)


def digest(*parts: Mapping[str, Tensor | Stored] | None) -> str:
    """SHA-256 of keys, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for part in filter(None, parts):
        for key in sorted(part):
            value = part[key]
            many = [value] if isinstance(value, Tensor) else iter(value)
            for number, each in enumerate(many):
                array, shape = each.cpu().numpy(), tuple(value.shape)
                found.update(f"{key} {shape} {array.dtype};".encode() if number == 0 else b"")
                found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def summary(values: npt.NDArray[np.float64]) -> float | list[float] | str:
    """Few numbers as they are, many as their digest."""
    if values.ndim == 0:
        return float(values)
    return values.tolist() if len(values) <= 16 else "sha256:" + hashlib.sha256(values.tobytes()).hexdigest()
