"""Columns: what a model of `x` has to know about it beside its number of features."""

import importlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pandas import DataFrame

Kind = Literal["real", "positive", "unit", "count", "binary", "category", "ordered"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_BY_NAME = {"categories", "given", "covariates"}
_LABELS = frozenset(
    ("class", "classes", "label", "labels", "target", "species", "y", "category", "diagnosis", "outcome", "group")
)


@dataclass(frozen=True)
class Columns:
    """The columns of `x`, in their order.

    Attributes:
        count: How many there are.
        shape: The picture that a row flattens, (height, width) or (channels, height, width), or None.
        names: Their names, or None if the data have none.
        kinds: The kind of each: `real`, `positive`, `unit` (the open interval from 0 to 1), `count`, `binary`,
            `category` or `ordered`. None if nothing is known, as of images.
        levels: How many values each can take, 0 if that is not finite; codes run from 0 to `levels - 1`.
        categories: The words of the columns that held text, by name, in the order of their codes.
        missing: The share of each column that is missing in the training part; None if no entry of the data is.
        given: How many values each column of the batch's other entries can take, 0 for numbers: of the label `y` the
            number of its classes, of `covariates` one for each column.
        covariates: The words of each column of `covariates`, by name; none for one of numbers.
    """

    count: int
    shape: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    kinds: tuple[Kind, ...] | None = None
    levels: tuple[int, ...] | None = None
    categories: dict[str, tuple[str, ...]] | None = None
    missing: tuple[float, ...] | None = None
    given: dict[str, tuple[int, ...]] | None = None
    covariates: dict[str, tuple[str, ...]] | None = None

    def only(self, kept: list[int]) -> "Columns":
        """Some of the columns, which are no picture."""
        few: dict[str, Any] = {
            key: None if getattr(self, key) is None else tuple(getattr(self, key)[j] for j in kept)
            for key in ("names", "kinds", "levels", "missing")
        }
        words = {name: each for name, each in (self.categories or {}).items() if name in (few["names"] or ())}
        return replace(self, count=len(kept), shape=None, categories=words or None, **few)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
        for key in known.keys() & _BY_NAME:
            known[key] = {name: list(each) for name, each in known[key].items()}
        return known

    def to_table(self, values: npt.NDArray[Any], index: Any = None) -> "DataFrame":
        """Values (n, x) in the data's own units as a pandas table, with names and words; codes are rounded."""
        pandas: Any = importlib.import_module("pandas")
        table = pandas.DataFrame(values, index=index, columns=self.names)
        for name, words in (self.categories or {}).items():
            codes = table[name].round().clip(0, len(words) - 1).fillna(-1).astype(int)
            ordered = self.kinds is not None and self.kinds[table.columns.get_loc(name)] == "ordered"
            table[name] = pandas.Categorical.from_codes(codes, words, ordered=ordered)
        return table

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Columns from what `to_dict` returned, lists in place of tuples."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        for key in known.keys() & _BY_NAME:
            known[key] = {name: tuple(each) for name, each in known[key].items()}
        return cls(**known)


def infer_kind(values: npt.NDArray[Any], train: npt.NDArray[Any]) -> Kind:
    """Infer the kind of a column of numbers: its support from all rows, its skewness from the training rows.

    - `binary`: 0 and 1 alone.
    - `count`: whole numbers from 0 or 1 up. Whole numbers that begin higher are measurements, as grams are.
    - `unit`: all inside the open interval from 0 to 1, and reaching below 0.05 and above 0.95.
    - `positive`: all above 0, with a skewness above 1.
    - `real`: all others.

    Numbers are never taken for categories: that they are codes is for the user to say.

    Args:
        values: the column, (n,), without missing entries.
        train: its training rows.
    """
    low, high = values.min(), values.max()
    if low >= 0 and (values == np.floor(values)).all():
        if high <= 1:
            return "binary"
        if low <= 1:
            return "count"
    if low <= 0:
        return "real"
    if low < 0.05 and 0.95 < high < 1:
        return "unit"
    centred = train - train.mean(dtype=np.float64)
    return "positive" if (centred**3).mean() > (centred**2).mean() ** 1.5 > 0 else "real"


def suspect(name: str, values: npt.NDArray[Any], train: npt.NDArray[Any]) -> str | None:
    """What a feature looks like that may be none: an `id`, `constant`, a `label`; None if it looks like a feature.

    An id counts the rows from 0 or 1, or is whole and rises from row to row; a label has a telling name and few
    distinct whole numbers.

    Args:
        name: of the column.
        values: the column, (n,); words as their codes.
        train: its training rows.
    """
    n, low = len(values), values.min()
    if n > 2 and (values == np.floor(values)).all():
        counts = low in (0, 1) and values.max() == low + n - 1 and len(np.unique(values)) == n
        if counts or (values[1:] > values[:-1]).all():
            return "id"
    if (train == train[0]).all():
        return "constant"
    if name.lower() in _LABELS or name.lower().endswith(("_class", "_label", "_type")):
        distinct = np.unique(values)
        return "label" if len(distinct) <= 30 and (distinct == np.floor(distinct)).all() else None
    return None
