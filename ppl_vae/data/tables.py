"""Tables: columns of numbers and words, and the role of each."""

import csv
import difflib
import importlib
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppl_vae.data.files import RawData, check_unpacked, encode, intensity, reading, rows_text

TEXT = (".csv", ".tsv", ".txt")
BINARY = (".parquet", ".feather")
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(e[-+]?\d+)?", re.IGNORECASE)
LABEL = """--set 'data.label="NAME"'"""  # what names the column of labels
UNLABELLED = -1  # in `y`, where the label is not known
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


@dataclass(frozen=True)
class Roles:
    """What the columns of a table are for, and what separates them in text: keys of `load`."""

    label: str | None = None
    id: str | None = None
    columns: Sequence[str] | None = None
    leave_out: Sequence[str] | None = None
    categories: Sequence[str] | None = None
    size_factor: str | None = None
    separator: str | None = None
    covariates: Sequence[str] | None = None
    labelled: int | None = None


@dataclass(frozen=True)
class Table:
    """A table as it stands in its source.

    Attributes:
        source: Where it stands, for messages.
        cells: Each column, by its name or its number from 1: a list of text, None where it is missing; a tuple of text
            as it stands in a file; or an array.
        has_header: Whether the source names the columns.
        lines: Line of each row in a text file.
        levels: Columns that pandas holds as categories, with their words if these have an order.
    """

    source: str
    cells: dict[str, Any]
    has_header: bool = True
    lines: npt.NDArray[np.int64] | None = None
    levels: dict[str, list[str]] = field(default_factory=dict)

    def column(self, name: str, as_words: bool = False) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
        """Numbers of a column, or codes of its sorted words; NaN where missing.

        Raises:
            ValueError: If it holds neither, infinities, or numbers and words at once unless read `as_words`.
        """
        cells, words = self.cells[name], self.levels.get(name)
        as_words |= words is not None
        if isinstance(cells, tuple):
            try:
                plain = None if as_words else np.fromiter(map(float, cells), np.float64, len(cells))
            except ValueError:
                plain = None
            if plain is not None:
                self._check_numbers(name, plain, cells)
                return plain, ()
            cells = self.text(name)
        if isinstance(cells, np.ndarray):
            if cells.dtype.kind not in "biuf":
                raise ValueError(
                    f"Expected numbers or words in column {name!r} of {self.source}; got {cells.dtype}. Convert them, "
                    f'or leave the column out (leave_out = ["{name}"]).'
                )
            cells = cells.astype(np.float64)
            if not as_words:
                self._check_numbers(name, cells, cells)
                return cells, ()
            cells = [None if math.isnan(value) else f"{value:.15g}" for value in cells]
        if not words:
            numbers = [math.nan if cell is None else _number(cell) for cell in cells]
            if not as_words and (all(c is None for c in cells) or any(v == v and v is not None for v in numbers)):
                self._check_numbers(name, numbers, cells)
                return np.array(numbers, np.float64), ()
            words = sorted(set(cells) - {None}, key=None if None in numbers else float)
            if not as_words and all(map(_DECIMAL_COMMA.fullmatch, words)):
                raise ValueError(
                    f"Expected numbers with a decimal point in column {name!r} of {self.source}; got {words[0]!r}. "
                    f'Convert them, or read them as words (categories = ["{name}"]).'
                )
        codes: dict[Any, float] = {None: math.nan} | {word: float(code) for code, word in enumerate(words)}
        return np.array([codes[cell] for cell in cells]), tuple(words)

    def text(self, name: str) -> Any:
        """Cells of a column: text without the space around it and None where missing, or an array."""
        cells = self.cells[name]
        if not isinstance(cells, tuple):
            return cells
        return [None if cell.lower() in _MISSING else cell for cell in map(str.strip, cells)]

    def _check_numbers(self, name: str, numbers: Any, cells: Any) -> None:
        if isinstance(numbers, np.ndarray) and not np.isinf(numbers).any():
            return
        i = next((i for i, number in enumerate(numbers) if number is None or math.isinf(number)), None)
        if i is not None:
            column = repr(name) if self.has_header else name.removeprefix("column ")
            words = "" if numbers[i] is not None else f', or read all as words (categories = ["{name}"])'
            if re.fullmatch(r"[-+]?\d+,\d+", str(cells[i])):
                words += "; decimals follow a point, not a comma"
            raise ValueError(
                f"Expected a finite number in {self.source}, {rows_text(self.lines, [i])}, column {column}; got "
                f"{str(cells[i])!r}. Correct the cell, or drop the row or the column{words}."
            )


def read_table(path: Path, separator: str | None, text: Iterable[str] = ()) -> Table:
    """Read a table from text, a parquet or a feather file; the columns named in `text` as they stand there.

    Raises:
        ValueError: If it cannot be read, or has no rows.
    """
    if path.suffix.lower() in BINARY:
        return _read_pandas(path)
    return next(stream_text(path, separator, None, text))


def stream_text(path: Path, separator: str | None, size: int | None, text: Iterable[str] = ()) -> Iterator[Table]:
    """Read a table from text, at most `size` rows at a time.

    Raises:
        ValueError: If it is no text in UTF-8, has no rows, or a row is longer or shorter than the first.
    """
    if separator is not None and len(separator) != 1:
        raise ValueError(f'Expected `separator` to be one character, such as ";"; got {separator!r}.')
    usual = {".tsv": "\t,;|", ".txt": ",\t;| "}.get(path.suffix.lower(), ",\t;|")
    with reading(path, "separated text in UTF-8"), path.open(newline="", encoding="utf-8-sig") as file:
        beginning = "".join(itertools.islice(file, 200))
        file.seek(0)
        mark = separator or _find_separator(beginning, usual)
        reader = _reader(file, mark)
        first = [cell.strip() for cell in next(filter(None, reader), [])]
        header = first if None in map(_number, first) or _numbers_columns(beginning, mark) else None
        done = reader.line_num if header else 0  # lines that were read
        file.seek(0)
        lines, empty = itertools.islice(file, done, None), True
        piece = [*itertools.islice(lines, size)]
        while piece and (numbers := _read_numbers(piece, mark, len(first))) is not None:
            cells: list[Any] = [*numbers.T]
            for j in [j for j, name in enumerate(header or ()) if name in text]:
                cells[j] = tuple(line.rstrip("\r\n").split(mark)[j] for line in piece)
            named = _named(header or [""] * len(first), cells, path)
            yield Table(str(path), named, header is not None, np.arange(done + 1, done + len(piece) + 1))
            done, piece, empty = done + len(piece), [*itertools.islice(lines, size)], False
        reader = _reader(itertools.chain(piece, lines), mark)
        rows = ((done + reader.line_num, row) for row in reader if row)
        while read := [*itertools.islice(rows, size)]:
            yield _text_table(path, header, len(first), read)
            empty = False
        if empty:
            raise ValueError(f"Expected rows of numbers in {path}; got {'only a header' if header else 'none'}.")


def _read_numbers(lines: list[str], separator: str, width: int) -> npt.NDArray[np.float64] | None:
    """Rows of numbers alone, without quotes, gaps or empty lines; None for others."""
    if separator == " " or not lines[0].strip():
        return None
    try:
        numbers = np.loadtxt(lines, np.float64, comments=None, delimiter=separator, ndmin=2)
    except ValueError:
        return None
    return numbers if numbers.shape == (len(lines), width) else None


def _text_table(path: Path, header: list[str] | None, width: int, rows: list[tuple[int, list[str]]]) -> Table:
    for line, row in rows:
        if len(row) != width:
            raise ValueError(f"Expected {width} cells in {path}, line {line}, as in its first row; got {len(row)}.")
    cells = [*zip(*(row for _, row in rows), strict=True)]
    named = _named(header or [""] * width, cells, path)
    return Table(str(path), named, header is not None, np.array([line for line, _ in rows]))


def _reader(lines: Iterable[str], separator: str) -> Any:
    return csv.reader(lines, delimiter=separator, skipinitialspace=separator == " ")


def _numbers_columns(text: str, separator: str) -> bool:
    """Whether the first of some lines numbers three columns or more: whole numbers in equal steps.

    No other row may be like that, or all of these numbers must lie outside the range of what stands below them.
    """
    lines = filter(None, _reader(io.StringIO(text, newline=""), separator))
    first, *others = [[*map(_number, map(str.strip, row))] for row in itertools.islice(lines, 20)] or [[]]
    if not others or not _in_steps(first):
        return False
    columns = [[cell for cell in below if cell is not None and cell == cell] for below in zip(*others, strict=False)]
    outside = [not below or not min(below) <= head <= max(below) for head, below in zip(first, columns, strict=False)]
    return all(outside) or not any(map(_in_steps, others))


def _in_steps(row: Sequence[Any]) -> bool:
    """Whether a row holds three whole numbers or more in equal steps."""
    whole = len(row) > 2 and all(cell is not None and cell.is_integer() for cell in row)
    return whole and len({b - a for a, b in itertools.pairwise(row)}) == 1 and row[0] != row[1]


def _find_separator(text: str, usual: str) -> str:
    """Separator that gives each of the first lines equally many cells, at least two; else the first one."""
    for separator in usual:
        rows = filter(None, _reader(io.StringIO(text, newline=""), separator))
        widths = {len(row) for row in itertools.islice(rows, 20)}
        if len(widths) == 1 and widths != {1}:
            return separator
    return usual[0]


def _read_pandas(path: Path) -> Table:
    """Read a parquet or feather file."""
    pandas = importlib.import_module("pandas")
    try:
        with reading(path, f"a {path.suffix[1:]} file"):
            if path.suffix.lower() == ".parquet":
                about = importlib.import_module("pyarrow.parquet").read_metadata(path)
                check_unpacked(path, sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)))
            frame = getattr(pandas, f"read_{path.suffix[1:].lower()}")(path)
    except ImportError as error:
        raise ValueError(f"Expected pyarrow for {path}; got: {error} Install ppl-vae[parquet].") from error
    if not frame.size:
        raise ValueError(f"Expected a table with rows in {path}; got {len(frame)} rows, {frame.shape[1]} columns.")
    return frame_table(frame, str(path))


def stream_binary(path: Path, size: int) -> Iterator[Table]:
    """A parquet file in pieces; a feather file as a whole, in pieces afterwards."""
    pandas = importlib.import_module("pandas")
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"Expected pyarrow for {path}; got: {error} Install ppl-vae[parquet].") from error
    try:
        if path.suffix.lower() == ".feather":
            frame = pandas.read_feather(path)
            frames = (frame.iloc[i : i + size] for i in range(0, len(frame), size))
        else:
            frames = (batch.to_pandas() for batch in parquet.ParquetFile(path).iter_batches(size))
        first = next(frames, None)
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"Expected a {path.suffix[1:]} file; got {path}: {error}") from error
    for frame in itertools.chain([] if first is None else [first], frames):
        yield frame_table(frame, str(path))


def frame_table(frame: Any, source: str) -> Table:
    """A pandas table, with its source for messages."""
    pandas: Any = importlib.import_module("pandas")
    types = pandas.api.types
    cells, levels = _named(frame.columns, [column for _, column in frame.items()], source), {}
    for name, column in cells.items():
        if isinstance(column.dtype, pandas.CategoricalDtype):
            levels[name] = [str(word) for word in column.cat.categories] if column.cat.ordered else []
        if name in levels or types.is_string_dtype(column) or types.is_object_dtype(column):
            cells[name] = [None if gone else str(cell) for cell, gone in zip(column, column.isna(), strict=True)]
        else:
            gaps = types.is_numeric_dtype(column) and column.isna().any()
            cells[name] = column.to_numpy(np.float64, na_value=np.nan) if gaps else column.to_numpy()
    return Table(source, cells, levels=levels)


def choose(table: Table, roles: Roles) -> RawData:
    """Assign each column of a table its role.

    Raises:
        ValueError: If a name is unknown or has two roles, no feature is left, or a column does not suit its role.
    """
    size = None if roles.size_factor == "total" and "total" not in table.cells else roles.size_factor
    taken: dict[str, str] = {}
    for role, key, names in (
        ("label", "label", [roles.label]),
        ("id", "id", [roles.id]),
        ("size factor", "size_factor", [size]),
        ("covariate", "covariates", roles.covariates or ()),
        ("left out", "leave_out", roles.leave_out or ()),
        ("feature", "columns", roles.columns or ()),
        ("", "categories", roles.categories or ()),
    ):
        for name in filter(None, names):
            if name not in table.cells:
                raise ValueError(unknown_name(key, name, list(table.cells), f"column of {table.source}"))
            if role and taken.setdefault(name, role) != role:
                raise ValueError(
                    f"Expected one role for column {name!r} of {table.source}; got {taken[name]} and {role}."
                )
    rest = "feature" if roles.columns is None else "left out"
    taken = {name: taken.get(name, rest) for name in table.cells}
    features = [name for name in dict.fromkeys(roles.columns or table.cells) if taken[name] == "feature"]
    if not features:
        held = ", ".join(f"{name} ({role})" for name, role in taken.items())
        raise ValueError(f"Expected at least one feature in {table.source}; got {held}.")
    pairs = [table.column(name, name in (roles.categories or ())) for name in features]
    x = np.stack([values for values, _ in pairs], 1)
    categories = {name: words for name, (_, words) in zip(features, pairs, strict=True) if words}
    raw = RawData(
        x,
        names=tuple(features) if table.has_header or len(features) < len(table.cells) or categories else None,
        maximum=None if categories else intensity(x),
        is_table=True,
        categories=categories,
        ordered=frozenset(name for name, words in table.levels.items() if words),
        roles={name: role for name, role in taken.items() if role != "feature"},
        lines=table.lines,
    )
    if roles.label:
        values, words = table.column(roles.label) if roles.labelled else _complete(table, roles.label, "label")
        where, known = f"column {roles.label!r} of {table.source}", ~np.isnan(values)
        y = np.full(len(values), UNLABELLED)
        y[known], classes = (values[known], words) if words else encode(values[known], where)
        raw = replace(raw, y=y, classes=classes)
    if roles.id:
        raw = replace(raw, ids=np.asarray(table.text(roles.id)))
    if size:
        values, words = _complete(table, size, "size factor")
        if words or not (values > 0).all():
            raise ValueError(f"Expected numbers above 0 as size factors in column {size!r} of {table.source}.")
        raw = replace(raw, size_factor=values)
    return with_covariates(raw, table, roles.covariates) if roles.covariates else raw


def with_covariates(raw: RawData, table: Table, names: Iterable[str]) -> RawData:
    """Add columns of a table, which has a row for each datum, as covariates."""
    read = {name: _complete(table, name, "covariate") for name in names}
    if wrong := [name for name, (values, _) in read.items() if len(values) != len(raw.x)]:
        raise ValueError(
            f"Expected a covariate for each of the {len(raw.x)} data of {table.source}; got {len(read[wrong[0]][0])} "
            f"in {wrong[0]!r}."
        )
    words_of = {name: words for name, (_, words) in read.items()}
    return replace(raw, covariates=np.stack([each for each, _ in read.values()], 1), covariate_words=words_of)


def unknown_name(key: str, name: str, known: list[str], what: str) -> str:
    """Message for a name that is not known, with some that are, and the nearest."""
    close = difflib.get_close_matches(name, known, 1)
    some = (", ".join(map(repr, known[:20])) + ", ..." * (len(known) > 20)) or "there is none"
    return f"Expected `{key}` to name a {what} ({some}); got {name!r}." + (
        f" Did you mean {close[0]!r}?" if close else ""
    )


def _complete(table: Table, name: str, role: str) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """Read a column without missing cells."""
    values, words = table.column(name)
    if np.isnan(values).any():
        gone = rows_text(table.lines, np.flatnonzero(np.isnan(values)))
        raise ValueError(f"Expected a {role} in every row of {table.source}; got none in {gone}. Drop these rows.")
    return values, words


def _named(names: Iterable[object], cells: list[Any], path: Path | str) -> dict[str, Any]:
    """Columns by their names, or by their number from 1 where they have none."""
    known = [str(name) or f"column {j}" for j, name in enumerate(names, 1)]
    name, count = Counter(known).most_common(1)[0]
    if count > 1:
        raise ValueError(f"Expected distinct names of columns in {path}; got {name!r} {count} times. Rename them.")
    return dict(zip(known, cells, strict=True))


def _number(cell: str) -> float | None:
    """Number in a cell, NaN if it is missing, None if the cell holds other text."""
    if cell.lower() in _MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None
