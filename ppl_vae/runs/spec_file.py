"""Spec files before their keys are checked: TOML, overrides, and words for messages. Nothing slow is imported here."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
DEPTH, LARGEST = 20, 2**20  # tables and lists in one another, and bytes, of a spec


def quiet(message: str) -> None:
    """Print nothing."""


def parse_override(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`: the value is TOML; what does not parse as TOML is a string.

    Raises:
        ValueError: If `=` or the key is missing.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"Expected KEY=VALUE, such as svi.epochs=3; got {text!r}.")
    try:
        parsed = _parsed(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return key.strip(), parsed["value"] if list(parsed) == ["value"] else value.strip()


def _parsed(text: str) -> dict[str, Any]:
    """Parse TOML, at most `DEPTH` tables and lists deep.

    Raises:
        TOMLDecodeError: If it is no TOML.
        ValueError: If it is deeper, or has numbers of thousands of digits.
    """
    deep = ValueError(f"Expected tables and lists at most {DEPTH} deep; got deeper ones.")
    if re.search(rf"(?:[\w-]+[ \t]*\.[ \t]*){{{DEPTH},}}", text):  # which takes the parser long
        raise deep
    try:
        if _depth(tables := tomllib.loads(text)) > DEPTH:
            raise deep
    except RecursionError:
        raise deep from None
    return tables


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def is_program(path: Path) -> bool:
    """Whether a path is that of a program, `file.py` or `file.py:Class`, and not of a spec."""
    return path.name.partition(":")[0].endswith(".py")


def read(path: Path) -> dict[str, Any]:
    """Tables of a spec file; for a program's path, a spec that fits it to the digits.

    Raises:
        ValueError: If there is no such file, or it is no TOML, with the line.
    """
    file = path.with_name(path.name.partition(":")[0]) if is_program(path) else path
    if not file.exists():
        kind = "program" if is_program(path) else "spec"
        others = sorted(file.parent.glob("*.py" if is_program(path) else "*.toml"))
        raise ValueError(f"Expected a {kind} at {file.absolute()}; got no such file.{near(file, others)}")
    if file.is_dir():
        held = listed(sorted(other.name for other in file.glob("*.toml")))
        raise ValueError(f"Expected a file; got the folder {file}, which holds {held}.")
    if is_program(path):
        return {"data": {"name": "digits"}, "model": {"program": path.name}}
    try:
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise OSError(f"it is no regular file of at most {LARGEST:,} bytes")
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a TOML file in UTF-8; got {path}: {error}") from error
    if not text.strip():
        raise ValueError(f"Expected a spec with the tables data, model, svi and others; got the empty file {path}.")
    try:
        return _parsed(text)
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        raise ValueError(f"{path}, {where.rstrip(')')}: Expected TOML; got a mistake: {what}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def merge(path: Path, tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the tables, with each override in its place and paths and tuples as TOML has them."""
    merged: dict[str, Any] = plain(tables)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        if not all((*parents, last)):
            raise ValueError(f"{path}: Expected keys with dots between them, such as svi.epochs; got {dotted!r}.")
        table = merged
        for i, part in enumerate(parents):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                where = ".".join(parents[: i + 1])
                raise ValueError(f"{path}: {dotted}: Expected {where} to be a table; got {show(table)}.")
        table[last] = plain(value)
    return merged


def programs(tables: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables that name a file of code by their key `program`, each after its place, such as `posterior.network`."""
    for place in ("model", "likelihood.network", "posterior.network"):
        table: Any = tables
        for key in place.split("."):
            table = table.get(key) if isinstance(table, Mapping) else None
        if isinstance(table, dict) and isinstance(table.get("program"), str):
            yield place, table


def plain(value: Any) -> Any:
    """Turn what Python has and TOML has not into what TOML has."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def near(word: Any, known: Iterable[Any]) -> str:
    """Suggest the nearest known word, if one is near."""
    lower = {str(each).lower(): each for each in known}
    close = difflib.get_close_matches(str(word).lower(), lower, 1)
    return f" Did you mean {lower[close[0]]}?" if close else ""


def show(value: Any) -> str:
    """Write a value as in a file, cut if it is long."""
    text = "none" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(words: Iterable[Any]) -> str:
    """Put words side by side; `none` if there are none."""
    return ", ".join(map(str, words)) or "none"
