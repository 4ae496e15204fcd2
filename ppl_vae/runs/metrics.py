"""Metrics of a run: `metrics.jsonl`, a line an epoch, which grows while a training goes on."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
FIRST = b'{"epoch": 0, "elbo": '  # how it begins
METRICS = ("elbo", "validation", "objective", "validation_objective", "learning_rate", "seconds")


def write_metrics(history: Mapping[str, Any], folder: Path) -> None:
    """Write all epochs; without validation data its bound is null."""
    rows = itertools.zip_longest(*(history.get(key, ()) for key in METRICS))
    lines = [_line(epoch, row) for epoch, row in enumerate(rows)]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def append_metrics(history: Mapping[str, Any], folder: Path) -> None:
    """Add the last epoch to the metrics of a run that is being trained."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        last = [(history.get(key) or [None])[-1] for key in METRICS]
        file.write(_line(len(history["elbo"]) - 1, last))


def trim_metrics(folder: Path, epochs: int) -> None:
    """Cut the metrics of an unfinished run to so many epochs: a killed training may have left more than its state."""
    path = folder / FILE
    if path.is_file() and not path.is_symlink():
        os.truncate(path, len(b"".join(path.read_bytes().splitlines(keepends=True)[:epochs])))


def lines_of(held: bytes, *, alone: bool = False) -> list[dict[str, Any]]:
    """The lines in a file's bytes, of which a torn last one does not count.

    Raises:
        ValueError: If they are no JSON, or with `alone`, if there are others than those of epochs.
    """
    lines: list[dict[str, Any]] = [json.loads(line) for line in held.decode().split("\n")[:-1]]
    if alone and any(line.keys() != {"epoch", *METRICS} for line in lines):
        raise ValueError("it has other lines than those of epochs")
    return lines


def _line(epoch: int, row: Iterable[Any]) -> str:
    return json.dumps({"epoch": epoch, **dict(zip(METRICS, row, strict=True))}) + "\n"
