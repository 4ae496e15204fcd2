"""Columns: what a model of `x` has to know about it beside its number of features."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

Kind = Literal["real", "positive", "unit", "count", "binary", "category", "ordered"]
KINDS: tuple[Kind, ...] = get_args(Kind)


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
    """

    count: int
    shape: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    kinds: tuple[Kind, ...] | None = None
    levels: tuple[int, ...] | None = None
    categories: dict[str, tuple[str, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
        if self.categories is not None:
            known["categories"] = {name: list(words) for name, words in self.categories.items()}
        return known

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Columns from what `to_dict` returned, lists in place of tuples."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        if known.get("categories"):
            known["categories"] = {key: tuple(words) for key, words in known["categories"].items()}
        return cls(**known)
