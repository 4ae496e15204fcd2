"""TOML files and overrides, before anybody asks what they mean. Nothing slow is imported here."""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_override(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`: the value is TOML; what does not parse as TOML is a string.

    Raises:
        ValueError: without `=` or a key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"Expected KEY=VALUE, such as svi.epochs=3; got {text!r}.")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return key.strip(), parsed["value"] if list(parsed) == ["value"] else value.strip()


def is_program(path: Path) -> bool:
    """Whether a path is that of a program, `file.py` or `file.py:Class`, and not of a spec."""
    return path.name.partition(":")[0].endswith(".py")


def read(path: Path) -> dict[str, Any]:
    """Parse a file, or say what is wrong with it and where; a program's path gives its spec, on the digits."""
    if is_program(path):
        file = path.with_name(path.name.partition(":")[0])
        if not file.is_file():
            there = [str(other) for other in sorted(file.parent.glob("*.py"))]
            raise ValueError(f"Expected a program at {file.absolute()}; got no such file.{near(file, there)}")
        return {"data": {"name": "digits"}, "model": {"program": path.name}}
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        there = [str(other) for other in sorted(path.parent.glob("*.toml"))]
        raise ValueError(f"Expected a spec at {path.absolute()}; got no such file.{near(path, there)}") from None
    except IsADirectoryError:
        there = [other.name for other in sorted(path.glob("*.toml"))]
        raise ValueError(f"Expected a TOML file; got the folder {path}, which holds {listed(there)}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a TOML file in UTF-8; got {path}: {error}") from error
    if not text.strip():
        raise ValueError(f"Expected a spec with the tables data, model, svi and others; got the empty file {path}.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        raise ValueError(f"{path}, {where.rstrip(')')}: Expected TOML; got a mistake: {what}.") from error


def merge(path: Path, raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put each override in its place."""
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        here = raw
        for i, part in enumerate(parents):
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                where = ".".join(parents[: i + 1])
                raise ValueError(f"{path}: {dotted}: Expected {where} to be a table; got {show(here)}.")
        if not all((*parents, last)):
            raise ValueError(f"{path}: Expected keys with dots between them, such as svi.epochs; got {dotted!r}.")
        here[last] = _plain(value)
    return raw


def _plain(value: Any) -> Any:
    """Turn what Python has and TOML has not into what TOML has."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def near(word: Any, known: Any) -> str:
    """Suggest the nearest spelling."""
    lower = {str(each).lower(): each for each in known}
    close = difflib.get_close_matches(str(word).lower(), lower, 1)
    return f" Did you mean {lower[close[0]]}?" if close else ""


def show(value: Any) -> str:
    """Show a value as it would stand in a file, shortened where it is long."""
    text = "none" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(words: Any) -> str:
    """Put words side by side, or say that there are none."""
    return ", ".join(map(str, words)) or "none"
