"""Checks of raw data: missing cells, empty columns, words that the training part lacks, totals of counts."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ppl_vae.data.files import RawData, rows_text


def complete_rows(raw: RawData, file: str, missing: str) -> tuple[RawData, npt.NDArray[np.int64]]:
    """Refuse missing cells, drop the rows that have some, or leave them to the model.

    Returns:
        The data of the rows that stay, and the numbers of these rows.

    Raises:
        ValueError: With the columns and rows that have missing cells, if they are to be refused; or if all rows have.
    """
    gone = raw.missing.any(1)
    kept = np.flatnonzero(~gone)
    if missing == "model" or not gone.any():
        return raw, np.arange(len(raw.x))
    if missing == "refuse" or not len(kept):
        each = raw.missing.sum(0)
        counts = {raw.name(int(j)): int(each[j]) for j in np.flatnonzero(each)}
        listed = ", ".join(f"{name!r} ({count})" for name, count in list(counts.items())[:20])
        listed += ", ..." * (len(counts) > 20)
        remedies = ['model them (missing = "model")']
        remedies += ['drop these rows (missing = "drop rows")'] if len(kept) else []
        remedies += [f"leave the columns out (leave_out = {json.dumps(list(counts))})"] if raw.is_table else []
        raise ValueError(
            f"Expected no missing cells in {file}; got some in {listed}: {rows_text(raw.lines, np.flatnonzero(gone))}. "
            f"To go on, {', or '.join(remedies)}."
        )
    keys = ("x", "y", "ids", "size_factor", "covariates", "lines")
    rows: dict[str, Any] = {key: getattr(raw, key) for key in keys}
    rows = {key: value if value is None else value[kept] for key, value in rows.items()}
    return replace(raw, **rows), kept


def check_columns(raw: RawData, train: npt.NDArray[np.int64]) -> None:
    """Refuse columns that are missing throughout the training part.

    Raises:
        ValueError: With their names.
    """
    if not raw.missing.any():
        return
    empty = [raw.name(int(j)) for j in np.flatnonzero(raw.missing[train].all(0))]
    if empty:
        shown = ", ".join(map(repr, empty[:8])) + ", ..." * (len(empty) > 8)
        remedy = f"Leave them out (leave_out = {json.dumps(empty)})" if raw.is_table else "Leave them out"
        raise ValueError(
            f"Expected each column to be observed somewhere in the training part; got columns that are missing "
            f"throughout: {shown}. {remedy}."
        )


def check_categories(raw: RawData, train: npt.NDArray[np.int64]) -> None:
    """Refuse words that the training part lacks.

    Raises:
        ValueError: With the words, their column and rows.
    """
    columns = [(name, words, raw.x[:, (raw.names or ()).index(name)]) for name, words in raw.categories.items()]
    if raw.covariates is not None:
        pairs = zip(raw.covariate_words.items(), raw.covariates.T, strict=True)
        columns += [(name, words, codes) for (name, words), codes in pairs if words]
    for name, words, codes in columns:
        other = np.flatnonzero(~np.isin(codes, codes[train]) & ~np.isnan(codes))
        if len(other):
            strange = sorted({words[int(code)] for code in codes[other]})
            known = ", ".join(map(repr, strange[:5])) + ", ..." * (len(strange) > 5)
            remedy = f'give id = "{name}"' if len(words) == len(codes) else "merge rare words, drop the rows"
            raise ValueError(
                f"Expected each word of column {name!r} in the training part; got {known} in other parts alone "
                f'({rows_text(raw.lines, other)}). Leave the column out (leave_out = ["{name}"]), or {remedy}.'
            )


def totals(raw: RawData, train: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], float]:
    """Total of each row (n,) over the mean total of the training rows, and that mean.

    Raises:
        ValueError: If a column holds no counts, or a row none but zeros.
    """
    if raw.missing.any():
        where = rows_text(raw.lines, np.flatnonzero(raw.missing.any(1)))
        raise ValueError(
            f'Expected no missing cells for size_factor = "total", which adds up each row; got some in {where}. Name a '
            'column of factors, or drop these rows (missing = "drop rows").'
        )
    counts = ((raw.x >= 0) & (raw.x == np.floor(raw.x))).all(0)
    if wrong := [raw.name(j) for j, fine in enumerate(counts) if not fine or raw.name(j) in raw.categories]:
        raise ValueError(
            'Expected counts (whole numbers from 0 up) in every column for size_factor = "total"; got others in '
            f"{', '.join(wrong)}. Leave these columns out, or name a column of factors."
        )
    each = raw.x.sum(1, dtype=np.float64)
    if not each.all():
        empty = rows_text(raw.lines, np.flatnonzero(each == 0))
        raise ValueError(f'Expected a total above 0 in every row for size_factor = "total"; got 0 in {empty}.')
    mean = float(each[train].mean())
    return each / mean, mean
