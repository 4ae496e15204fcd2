"""Named data sets and files, as dicts of tensors with leading n, and the protocol that made them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae._checks import check_choice
from ppl_vae._seeds import fold_in
from ppl_vae.data.checks import check_categories, check_columns, complete_rows, totals
from ppl_vae.data.columns import Columns, suspect
from ppl_vae.data.datasets import is_path, read_dataset
from ppl_vae.data.files import chunks, present
from ppl_vae.data.protocol import describe, digest, infer_kinds, split, summary, withhold
from ppl_vae.data.tables import Roles
from ppl_vae.data.transforms import Stored, Transform, fit_transform

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in its parts, each a dict of tensors with leading n, and the protocol that made them.

    `x` is (n, x) of the dtype asked for, words as codes; `y` is (n,) of int64 if the set has labels, -1 where one is
    not known; `size_factor` (n,) and `covariates` (n, c) are there if they were asked for; `mask` is boolean as `x`,
    True where observed, if an entry is missing, where `x` is NaN.

    Attributes:
        name: The name of the set or file.
        train: The training part, as epoch 0 sees it.
        validation: The part to choose settings by, or None. It never changes.
        test: The part to evaluate on. It never changes.
        protocol: What was done to the data, ready for JSON. Evaluations compare if `digest`, the SHA-256 of the test
            part (of the training part if there is no other), is equal. `log_volume` (nats per datum) turns a density of
            `x` into one of the values as stored: log p(stored) = log p(x) - log_volume, for a row without missing
            entries.
        transform: From stored values to `x`.
        columns: The columns of `x`: names, kinds, levels, categories, and the picture that a row flattens.
        row_numbers: Of each part, the rows (n,) of the source that it holds, counted from 0 without a header.
        ids: Of each part, what tells its rows apart (n,), or None: the column `id`, or the paths of pictures.
        classes: The words of `y` in the order of its codes, or None.
        roles: The role of each column that is no feature: `label`, `id`, `size factor`, `covariate` or `left out`.
        suspects: Features that look like something else, by name: `label`, `id` or `constant`.
        stored: The `x` of the training part before the transform if each epoch draws it anew, else None.
        source: What `load` was given to read them, ready for JSON; None if it cannot be read again so.
    """

    name: str
    train: dict[str, Tensor] = field(repr=False)
    validation: dict[str, Tensor] | None = field(repr=False)
    test: dict[str, Tensor] = field(repr=False)
    protocol: dict[str, Any]
    transform: Transform = field(repr=False)
    columns: Columns
    row_numbers: dict[str, npt.NDArray[np.int64]] = field(repr=False)
    ids: dict[str, npt.NDArray[Any] | None] = field(repr=False)
    classes: tuple[str, ...] | None = None
    roles: dict[str, str] = field(default_factory=dict)
    suspects: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Tensor] | None = field(default=None, repr=False)
    source: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def features(self) -> int:
        """Number of columns of `x`."""
        return self.columns.count

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Picture that a row of `x` flattens, such as (28, 28), or None."""
        return self.columns.shape

    @property
    def feature_names(self) -> list[str] | None:
        """Names of the columns of `x`, or None."""
        return None if self.columns.names is None else list(self.columns.names)

    def to_table(self, x: Tensor, part: str | None = None) -> "DataFrame":
        """Rows of `x` as a pandas table in the data's own units, with their names and words.

        Codes between two words are rounded. Binarised data stay binary.

        Args:
            x: as in a part, or draws of it, (n, x).
            part: `train`, `validation` or `test`, whose ids or row numbers become the index.

        Raises:
            ValueError: If `x` does not have the columns of the data, or the rows of the part.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"Expected `x` of shape (n, {self.features}); got {tuple(x.shape)}.")
        index = None if part is None else self.row_numbers[part] if self.ids[part] is None else self.ids[part]
        if index is not None and len(index) != len(x):
            raise ValueError(f"Expected the {len(index)} rows of the part {part!r}; got {len(x)}.")
        return self.columns.to_table(self.transform.inverse(x), index)

    def with_entries(self, names: Iterable[str]) -> "Data":
        """Copy of the data whose columns of these names are entries of the batch, (n,), and no longer part of `x`.

        `x` is left out if no column is left for it. Names that no column has, or that the batch has already, are
        ignored.

        Raises:
            ValueError: If cells of such a column are missing.
        """
        own, asked = self.columns.names or (), set(names) - self.train.keys()
        taken = [name for name in own if name in asked]
        kept = [j for j, name in enumerate(own) if name not in taken]
        if not taken:
            return self
        gone = [name for name in taken if self.columns.missing is not None and self.columns.missing[own.index(name)]]
        if gone:
            raise ValueError(f"Expected no missing cells in '{gone[0]}', an entry of its own; got some. Drop the rows.")

        def part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            x: dict[str, Tensor] = {key: tensors[key][:, kept] for key in ("x", "mask") if key in tensors and kept}
            others = {key: value for key, value in tensors.items() if key not in ("x", "mask")}
            return {**x, **others, **{name: tensors["x"][:, own.index(name)] for name in taken}}

        loc, scale = (each[kept] if each.ndim else each for each in (self.transform.loc, self.transform.scale))
        return replace(
            self,
            train=part(self.train),
            validation=self.validation and part(self.validation),
            test=part(self.test),
            stored=None if self.stored is None or not kept else {"x": self.stored["x"][:, kept]},
            transform=replace(self.transform, loc=loc, scale=scale),
            columns=self.columns.only(kept),
            roles={**self.roles, **dict.fromkeys(taken, "entry of its own")},
            suspects={name: look for name, look in self.suspects.items() if name not in taken},
            source=self.source and {**self.source, "entries": [*self.source.get("entries", []), *taken]},
        )

    def to(self, device: torch.device | str) -> "Data":
        """Copy of the data with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: part and {key: value.to(device) for key, value in part.items()}
            for name, part in vars(self).items()
            if name in ("train", "validation", "test", "stored")
        }
        return replace(self, **moved)

    def epoch(self, epoch: int) -> dict[str, Tensor]:
        """Training part as epoch number `epoch` sees it; epoch 0 is `train`.

        Dynamic binarization and dequantization draw `x` anew each epoch, by the data's seed and `epoch`, on the
        device that holds the data (a CPU and a GPU draw different numbers). Everything else stays as it is.
        """
        if self.stored is None or epoch == 0:
            return dict(self.train)
        x = self.transform(self.stored["x"], fold_in(self.protocol["seed"], "train", epoch))
        return {**self.train, "x": x.masked_fill_(~self.train["mask"], np.nan) if "mask" in self.train else x}


def load(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    array: str | None = None,
    label: str | None = None,
    id: str | None = None,  # noqa: A002  as users call it
    columns: list[str] | None = None,
    leave_out: list[str] | None = None,
    categories: list[str] | None = None,
    size_factor: str | None = None,
    covariates: list[str] | None = None,
    labelled: int | None = None,
    separator: str | None = None,
    missing: str = "refuse",
    seed: int = 0,
    binarization: str = "none",
    scaling: str = "none",
    dequantization: str = "none",
    validation_fraction: float = 0.0,
    test_fraction: float = 0.2,
    download: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Read a data set, split it, and scale, binarise or dequantise it. `seed` alone fixes the result.

    Arrays (n, h, w) become rows (n, h*w); so do (n, c, h, w) and (n, h, w, c), channels first: they stand last if the
    last axis, and not the second, has 1 or 3 entries. Words in a table become codes 0, 1, ... in sorted order.
    A `.npy` file or a table of numbers that would take more than half of memory, or than the bytes in the variable
    PPL_VAE_IN_MEMORY, is mapped, and so is what is made of it, by files in the cache folder that vanish with the
    process: the data are the same, but need not fit into memory. A table that took more than a second to read is kept
    there for the next time (`docs/scale.md`).
    Intensities have a known maximum: 16 for digits, 255 for MNIST and for uint8
    arrays, 1 for values in [0, 1] (a uint8 array of zeros and ones too).

    Args:
        name: "digits" (scikit-learn's, values 0..16), "iris", "wine", "breast_cancer" or "diabetes" (scikit-learn's
            tables, in their own units); "keywords" (how often each keyword stands in each module of the Python that
            runs); "mnist", "fashionmnist", "kmnist", "emnist" (balanced), "omniglot", "cifar10"
            or "svhn" (torchvision's, values in [0, 1]); the path of a `.npy`, `.npz`, `.csv`, `.tsv`, `.txt`,
            `.parquet`, `.feather` or `.h5ad` (AnnData) file, or of a folder of pictures. The first row of text is a
            header if any of its cells is not a number, or if it numbers the columns (0, 1, 2 or 2019, 2020, 2021).
        root: The folder of named sets; by default the variable PPL_VAE_DATA, else the platform's cache folder.
        array: The key in an `.npz` file; may be left out if there is only one beside the labels. Or the layer of an
            `.h5ad` file, in place of X.
        label: The column of a table, or the key in an `.npz` file (by default "y"), that becomes `y`.
        id: The column that tells the rows of a table apart.
        columns: The columns that are features; by default all that have no other role.
        leave_out: Columns to leave out.
        categories: Columns to read as words, even if they hold numbers.
        size_factor: By how much a row counts more than the average: a column, or "total", the row's total (of counts)
            over the mean total of the training part.
        covariates: The columns of a table, or the keys in an `.npz` file, that become `covariates`: numbers as they
            are, words as codes.
        labelled: How many training data keep their label, as many of each class as there are; the other labels become
            -1, as do missing cells of the label's column, which are refused otherwise. None keeps them all.
        separator: The character between cells of text; by default the one of `,`, tab, `;` and `|` (and, in a `.txt`,
            a space) that gives the first lines equally many cells.
        missing: What becomes of missing cells of a table, or NaN in an array: "refuse" them, "drop rows" that have
            some, or "model" what is observed: `x` is then NaN there, and the parts have a `mask`. Scales and kinds of
            columns are those of the observed entries.
        seed: Fixes the split and every draw.
        binarization: "none"; "threshold", 1 from half the maximum up; "static", one Bernoulli draw; "dynamic", a new
            draw of the training part each epoch. Validation and test are drawn once, and are the same under "static"
            and "dynamic".
        scaling: "none"; "unit", divided by the maximum (if none is known, by the largest absolute value of the
            training part); "standardize", by each feature's mean and standard deviation in the training part (1 for
            a constant feature). In a table, "standardize" scales columns of kind `real`, divides those of kind
            `positive` by their standard deviation, and leaves codes, counts and shares alone; "unit" scales only real
            and positive ones if there are words.
        dequantization: "none", or "uniform": integers plus noise in [0, 1), before the scaling, which then divides by
            the maximum + 1. "standardize" allows for the noise: mean + 1/2, variance + 1/12.
        validation_fraction: The share of the training part that is set aside for validation.
        test_fraction: The share of a file's rows for testing, 0 for none; named sets have a split of their own.
        download: Whether a named set may be downloaded.
        dtype: torch.float32 or torch.float64.

    Returns:
        The data, on the CPU; `load("digits", scaling="unit").train["x"]` is (1500, 64) in [0, 1].

    Raises:
        ValueError: If an option is unknown or does not suit the data, or the data cannot be found or read.
    """
    name = os.fspath(name)
    given = {key: value for key, value in locals().items() if value is not None and key not in ("dtype", "download")}
    given |= {key: str(Path(given[key]).absolute()) for key in ("name", "root") if key in given and is_path(given[key])}
    fold_in(seed)
    check_choice("missing", missing, ("refuse", "model", "drop rows"))
    check_choice("binarization", binarization, ("none", "threshold", "static", "dynamic"))
    check_choice("scaling", scaling, ("none", "unit", "standardize"))
    check_choice("dequantization", dequantization, ("none", "uniform"))
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Expected `dtype` torch.float32 or torch.float64; got {dtype}.")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"Expected `validation_fraction` in [0, 1); got {validation_fraction}.")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"Expected `test_fraction` in [0, 1); got {test_fraction}.")
    if binarization != "none" and (scaling == "standardize" or dequantization == "uniform"):
        raise ValueError(
            f'Expected scaling "none" or "unit" and dequantization "none" beside binarization = '
            f'"{binarization}"; got scaling = "{scaling}", dequantization = "{dequantization}". Binary data '
            f"have neither a scale nor bins: leave out one of the two."
        )

    roles = Roles(label, id, columns, leave_out, categories, size_factor, separator, covariates, labelled)
    raw = read_dataset(name, root, array, download, roles)
    raw, kept = complete_rows(raw, Path(name).name, missing)
    rows = split(raw, seed, validation_fraction, test_fraction)
    check_columns(raw, rows["train"])
    check_categories(raw, rows["train"])
    if labelled is not None:
        raw = replace(raw, y=withhold(raw, rows["train"], labelled, seed))
    kinds = infer_kinds(raw, rows["train"])
    transform = fit_transform(raw, rows["train"], kinds, binarization, scaling, dequantization, dtype)
    factors, mean_total = raw.size_factor, None
    if factors is None and size_factor is not None:
        check_choice("size_factor", size_factor, ("total",))
        factors, mean_total = totals(raw, rows["train"])
    stored = {part: Stored(raw.x, index, transform) for part, index in rows.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    incomplete = bool(raw.missing.any())
    for part, index in rows.items():
        parts[part] = {"x": stored[part].transformed(fold_in(seed, part, 0))}
        if incomplete:
            parts[part]["mask"] = torch.from_numpy(~raw.missing[index])
            parts[part]["x"].masked_fill_(~parts[part]["mask"], np.nan)
        if not all(bool((x.isfinite() | (x.isnan() & incomplete)).all()) for x in chunks(parts[part]["x"])):
            raise ValueError(f"Expected values within {dtype}; got larger. Scale them, or change `dtype`.")
        if raw.y is not None:
            parts[part]["y"] = torch.from_numpy(raw.y[index])
        if factors is not None:
            parts[part]["size_factor"] = torch.from_numpy(factors[index]).to(dtype)
        if raw.covariates is not None:
            parts[part]["covariates"] = torch.from_numpy(raw.covariates[index]).to(dtype)
    file = Path(name).name
    by = "the set's own" if raw.in_order else "permutation by seed"
    protocol = {
        "name": file if raw.array is None else f"{file}:{raw.array}",
        "split": {"by": by, **{f"n_{part}": len(index) for part, index in rows.items()}},
        "seed": int(seed),
        "binarization": binarization,
        "scaling": scaling,
        "dequantization": dequantization,
        "maximum": raw.maximum,
        "levels": raw.maximum + 1 if raw.maximum is not None and raw.is_whole else None,
        "loc": summary(transform.loc),
        "scale": summary(transform.scale),
        "log_volume": float(np.log(np.broadcast_to(transform.scale, raw.x.shape[1])).sum()),
        "digest": digest(parts["test" if len(rows["test"]) else "train"]),
        "digest_train": digest({**parts["train"], "x": stored["train"]}, parts.get("validation")),
        **({"roles": raw.roles} if raw.roles else {}),
        **({"mean_total": mean_total} if mean_total is not None else {}),
    }
    looks = {
        raw.name(j): suspect(raw.name(j), present(raw.x[:, j]), present(raw.x[rows["train"], j]))
        for j in range(len(kinds or ()))
    }
    described = describe(raw, kinds, transform)
    if incomplete:
        described = replace(described, missing=tuple(raw.missing[rows["train"]].mean(0).tolist()))
    return Data(
        name=file,
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        protocol=protocol,
        columns=described,
        row_numbers={part: kept[index] for part, index in rows.items()},
        ids={part: None if raw.ids is None else raw.ids[index] for part, index in rows.items()},
        classes=raw.classes,
        roles=raw.roles,
        suspects={column: look for column, look in looks.items() if look is not None},
        transform=transform,
        stored={"x": stored["train"].whole} if transform.redraws else None,
        source=given if dtype == torch.float32 else None,
    )
