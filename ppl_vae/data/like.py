"""New data of the kind that a model was fitted to: read in pieces, and matched with its columns by name."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae._seeds import fold_in
from ppl_vae.data import annotated
from ppl_vae.data.batches import as_batch
from ppl_vae.data.columns import Columns
from ppl_vae.data.files import flatten, read_array, read_cells, rows_text
from ppl_vae.data.loading import Data
from ppl_vae.data.tables import BINARY, TEXT, Table, frame_table, stream_binary, stream_text
from ppl_vae.data.transforms import Transform

PIECE = 10_000  # rows that are read at a time
_NUMBERS = 2**22  # that are read at a time from wide or narrow tables


@dataclass(frozen=True, eq=False)
class Piece:
    """Some consecutive rows of new data.

    Attributes:
        batch: what a program takes: `x`, and `mask`, `size_factor` or other entries where there are any.
        index: row numbers (n,), counted from 0, or the ids of the rows.
        labels: the label of each row as it stands in the source, (n,), or None.
        values: `x` as the source has it, (n, x), words as codes and NaN where missing, or None.
    """

    batch: dict[str, Tensor]
    index: npt.NDArray[Any]
    labels: npt.NDArray[Any] | None = None
    values: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads data of the kind that a model was fitted to.

    Args:
        columns: of the data that the model was fitted to.
        transform: of these data.
        label: the column of a table that is a label, if it is there.
        id: the column that tells the rows apart, if it is there.
        size_factor: the column of size factors, or "total".
        mean_total: the mean total of the training rows, where the size factor is the row's total over it.
        separator: of cells of text; found by default.
        array: key in an `.npz` file.
        seed: of the noise, where the data are binarised or dequantised.
        missing: whether missing cells become a `mask`; else they are refused.
        classes: the words of the label, where the model is given it.
        covariates: columns of a table, or keys of an `.npz` file, that the model is given.
    """

    columns: Columns
    transform: Transform = field(repr=False)
    label: str | None = None
    id: str | None = None
    size_factor: str | None = None
    mean_total: float | None = None
    separator: str | None = None
    array: str | None = None
    seed: int = 0
    missing: bool = False
    classes: tuple[str, ...] | None = None
    covariates: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows to read at a time, a multiple of 100: the more, the fewer their columns."""
        return max(10, min(1000, _NUMBERS // max(self.columns.count, 1) // 100)) * 100

    def pieces(self, source: Any, size: int = PIECE, *, label: bool = True) -> Iterator[Piece]:
        """Read a source, at most `size` rows at a time.

        Args:
            source: the path of a table or an array; a pandas table; an array (n, x) in the data's own units; a batch
                dict of tensors as the program takes it, which is passed on as it is; or `Data`, for their test part.
            size: rows of a piece.
            label: whether a table has to have the label that the model is given.

        Raises:
            ValueError: If a column is missing or of another type, or holds words that the training data lack; or if the
                source cannot be read.
        """
        if isinstance(source, Data):
            yield from self._held_out(source, size)
            return
        if isinstance(source, Mapping):
            batch = as_batch(source)
            n = len(next(iter(batch.values())))
            for start in range(0, n, size):
                rows = {key: value[start : start + size] for key, value in batch.items()}
                yield Piece(rows, np.arange(start, min(start + size, n)))
            return
        start = 0
        tables = self._tables(source, size)
        for part in self._arrays(source, size, label) if tables is None else tables:
            piece = self._matched(part, start, label) if isinstance(part, Table) else self._array(*part, start)
            start += len(piece.index)
            yield piece
        if not start:
            raise ValueError(f"Expected rows in {source}; got none.")

    def _held_out(self, data: Data, size: int) -> Iterator[Piece]:
        """The test part of loaded data."""
        ids, numbers, labels = data.ids["test"], data.row_numbers["test"], data.test.get("y")
        words = (
            None if labels is None else np.asarray(data.classes or range(int(labels.max()) + 1))[labels.cpu().numpy()]
        )
        for start in range(0, len(numbers), size):
            rows = slice(start, start + size)
            index = (numbers if ids is None else ids)[rows]
            batch = {key: value[rows] for key, value in data.test.items()}
            yield Piece(batch, index, None if words is None else words[rows])

    def _tables(self, source: Any, size: int) -> Iterator[Table] | None:
        """A table in pieces, or None for arrays."""
        if hasattr(source, "iloc"):
            return (frame_table(source.iloc[i : i + size], "the table") for i in range(0, len(source), size))
        if not isinstance(source, str | Path):
            return None
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"Expected the path of a table or an array; there is no file {path}.")
        ending = path.suffix.lower()
        if ending == annotated.SUFFIX:
            return annotated.stream_annotated(path, self.array, size)
        if ending in TEXT:
            words = [name for name in (self.id, annotated.NAMES, self.label) if name]
            words += [*(self.columns.categories or {}), *(self.columns.covariates or {})]
            return stream_text(path, self.separator, size, words)
        return stream_binary(path, size) if ending in BINARY else None

    def _arrays(self, source: Any, size: int, label: bool) -> Iterator[tuple[npt.NDArray[Any], Table]]:
        """Arrays of rows, each with a table of what else is given of them."""
        values, given = source, Table(f"{source}", {})
        if isinstance(source, str | Path):
            path = Path(source)
            if path.suffix.lower() == ".npy":
                try:
                    values = np.load(path, mmap_mode="r", allow_pickle=False)
                except (ValueError, OSError, EOFError) as error:
                    raise ValueError(f"Expected a NumPy file without objects; got {path}: {error}") from error
            elif path.suffix.lower() == ".npz":
                keys = [*self.covariates, *([self.label or "y"] if label and self.classes is not None else [])]
                values = read_array(path, self.array, self.label, self.covariates).x
                given = Table(f"{path}", read_cells(path, keys))
            else:
                known = ", ".join((*TEXT, *BINARY, ".npy", ".npz", annotated.SUFFIX))
                raise ValueError(f"Expected a file of type {known}; got {path}.")
        values = values.numpy(force=True) if isinstance(values, Tensor) else np.asanyarray(values)
        if values.dtype.kind not in "biuf" or values.ndim < 2:
            raise ValueError(f"Expected numbers of shape (n, x); got {values.dtype} of shape {values.shape}.")
        for rows in (slice(i, i + size) for i in range(0, len(values), size)):
            yield values[rows], Table(given.source, {name: cells[rows] for name, cells in given.cells.items()})

    def _array(self, values: npt.NDArray[Any], given: Table, start: int) -> Piece:
        rows, _ = flatten(values)
        if rows.shape[1] != self.columns.count:
            raise ValueError(
                f"Expected rows of {self.columns.count} numbers, as the model was fitted to; got {rows.shape[1]}."
            )
        rows = rows if rows.dtype == np.uint8 else rows.astype(np.float64)
        index, batch = np.arange(start, start + len(rows)), self._entries(rows, None, start)
        self._give(batch, given)
        return Piece(batch, index, values=rows.astype(np.float64))

    def _give(self, batch: dict[str, Tensor], given: Table) -> None:
        """Put what a model is given into a batch, as far as a table has it: the label and the covariates."""
        label, words = self.label or "y", self.columns.covariates or {}
        if self.classes is not None and label in given.cells:
            batch["y"] = torch.from_numpy(self._column(given, label, self.classes)).long()
        if self.covariates and words and words.keys() <= given.cells.keys():
            each = [self._column(given, name, known or None) for name, known in words.items()]
            batch["covariates"] = torch.from_numpy(np.stack(each, 1)).to(batch["x"].dtype)

    def _entries(self, rows: npt.NDArray[Any], lines: Any, start: int) -> dict[str, Tensor]:
        """The batch of rows in the data's own units."""
        gone = ~np.isfinite(rows)
        if gone.any() and not self.missing:
            row, column = np.argwhere(gone)[0]
            where = rows_text(lines, [row]) if lines is not None else f"row {row + start} (counted from 0)"
            raise ValueError(
                f"Expected a finite number in every cell, as the model was fitted to; got {rows[row, column]} in "
                f'{where}, column {self._name(int(column))}. Drop such rows, or fit with missing = "model".'
            )
        stored = self.transform.to_tensor(np.where(gone, 0.0, rows) if gone.any() else rows)
        batch = {"x": self.transform(stored, fold_in(self.seed, "new data", start))}
        if self.missing:
            batch["mask"] = torch.from_numpy(~gone)
        if self.size_factor == "total" and self.mean_total is not None:
            batch["size_factor"] = torch.from_numpy(rows.sum(1) / self.mean_total).to(batch["x"].dtype)
        return batch

    def _name(self, column: int) -> str:
        return str(column + 1) if self.columns.names is None else repr(self.columns.names[column])

    def _matched(self, table: Table, start: int, label: bool) -> Piece:
        """Rows of a table, its columns found by name, or by place where they have none."""
        names = self.columns.names or tuple(list(table.cells)[: self.columns.count])
        if self.columns.names is None and len(table.cells) != self.columns.count:
            raise ValueError(f"Expected {self.columns.count} columns in {table.source}; got {len(table.cells)}.")
        needed = [*names, *([self.size_factor] if self.size_factor not in (None, "total") else [])]
        needed += [*self.covariates, *([str(self.label)] if label and self.classes is not None else [])]
        if lacking := [name for name in needed if name not in table.cells]:
            close = difflib.get_close_matches(lacking[0], table.cells, 1)
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(
                f"Expected the columns that the model was fitted to in {table.source}; it lacks {lacking[0]!r}{more}."
                + (f" The nearest is {close[0]!r}: rename it." if close else "")
            )
        values = np.stack([self._column(table, name, words) for name, words in self._words(names)], 1)
        batch = self._entries(values, table.lines, start)
        n = len(values)
        if self.size_factor not in (None, "total"):
            batch["size_factor"] = torch.from_numpy(table.column(str(self.size_factor))[0]).to(batch["x"].dtype)
        self._give(batch, table)
        named = next((name for name in (self.id, annotated.NAMES) if name in table.cells), None)
        index = np.arange(start, start + n) if named is None else np.asarray(table.text(named))
        return Piece(batch, index, np.asarray(table.text(self.label)) if self.label in table.cells else None, values)

    def _words(self, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...] | None]]:
        return ((name, (self.columns.categories or {}).get(name)) for name in names)

    def _column(self, table: Table, name: str, words: tuple[str, ...] | None) -> npt.NDArray[np.float64]:
        """Numbers of a column, or the codes that its words had in the training data; NaN where missing."""
        values, found = table.column(name, words is not None)
        if words is None:
            if found:
                raise ValueError(
                    f"Expected numbers in column {name!r} of {table.source}, as the model was fitted to; got the word "
                    f"{found[0]!r}."
                )
            return values
        if strange := [word for word in found if word not in words]:
            rows = np.flatnonzero(values == found.index(strange[0]))
            known = ", ".join(map(repr, words[:12])) + ", ..." * (len(words) > 12)
            close = difflib.get_close_matches(strange[0], words, 1)
            raise ValueError(
                f"Expected words of column {name!r} that the training data have ({known}); got {strange[0]!r} in "
                f"{table.source}, {rows_text(table.lines, rows)}." + (f" Did you mean {close[0]!r}?" if close else "")
            )
        codes = np.array([words.index(word) for word in found] + [0], np.float64)
        gone = np.isnan(values)
        return np.where(gone, np.nan, codes[np.where(gone, -1, values).astype(np.int64)])
