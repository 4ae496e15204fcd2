"""Results of rows: tables and arrays, written piece by piece to a file that appears whole."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ppl_vae._checks import check_choice

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Result:
    """What was asked, of some consecutive rows.

    Attributes:
        arrays: numbers by name, each with leading n.
        index: numbers or ids of the rows.
        table: the same as a pandas table.
        labels: the label of each row as it stands in the source, or None.
    """

    arrays: dict[str, npt.NDArray[Any]]
    index: npt.NDArray[Any]
    table: "DataFrame" = field(repr=False)
    labels: npt.NDArray[Any] | None = None


def as_result(index: npt.NDArray[Any], blocks: dict[str, tuple[list[str], Tensor]]) -> Result:
    """Blocks of columns, by their names, as arrays and as one table."""
    pandas: Any = importlib.import_module("pandas")
    arrays = {key: values.cpu().numpy() for key, (_, values) in blocks.items()}
    names = [name for columns, _ in blocks.values() for name in columns]
    return Result(arrays, index, pandas.DataFrame(np.concatenate([*arrays.values()], 1), index=index, columns=names))


def check_new(out: Path) -> None:
    """Check that a file can be written.

    Raises:
        ValueError: If it is there, or its ending is of no known type.
    """
    check_choice("the ending of --out", out.suffix.lower(), (".csv", ".tsv", ".parquet", ".npz"))
    if out.exists():
        raise ValueError(f"Expected --out to be new; {out} is there. Choose another name, or move it away.")


def write(results: Iterator[Result], out: Path) -> int:
    """Write results to a table (`.csv`, `.tsv`, `.parquet`) or arrays (`.npz`), piece by piece; the file appears whole.

    Returns:
        The number of rows.

    Raises:
        ValueError: If the file is there, or its ending is of no such type.
    """
    check_new(out)
    unfinished = out.with_name(f".{out.name}.partial-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    try:
        with _writer(unfinished, out.suffix.lower()) as put:
            for result in results:
                put(result)
                rows += len(result.index)
        os.link(unfinished, out)  # fails where the file has come meanwhile
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


@contextmanager
def _writer(path: Path, ending: str) -> Iterator[Callable[[Result], None]]:
    """What puts a result behind the others in a file."""
    if ending == ".npz":
        kept: list[Result] = []
        yield kept.append
        arrays: Any = {key: np.concatenate([one.arrays[key] for one in kept]) for key in kept[0].arrays}
        index = np.concatenate([one.index for one in kept])
        with path.open("wb") as whole:
            np.savez(whole, **arrays, index=index.astype(str) if index.dtype.kind == "O" else index)
    elif ending == ".parquet":
        try:
            pyarrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ValueError(f"Expected pyarrow for {path}; got: {error} Install ppl-vae[parquet].") from error
        made: list[Any] = []
        try:

            def put(result: Result) -> None:
                piece = pyarrow.Table.from_pandas(result.table.reset_index(names="row"), preserve_index=False)
                made.extend([] if made else [parquet.ParquetWriter(path, piece.schema)])
                made[0].write_table(piece.cast(made[0].schema))

            yield put
        finally:
            for writer in made:
                writer.close()
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            yield partial(_put, file, "\t" if ending == ".tsv" else ",")


def _put(file: TextIO, separator: str, result: Result) -> None:
    result.table.to_csv(file, sep=separator, index_label="row", header=file.tell() == 0)


def write_text(results: Iterator[Result], screen: TextIO) -> int:
    """Write results as CSV to a stream; returns the number of rows."""
    rows = 0
    for result in results:
        result.table.to_csv(screen, index_label="row", header=rows == 0)
        rows += len(result.index)
    return rows
