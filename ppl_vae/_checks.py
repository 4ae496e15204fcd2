"""Checks of integers and names, with one message for each mistake."""

from numbers import Integral
from typing import Any


def check_int(name: str, value: Any, least: int = 1) -> int:
    """Give a setting as an int, numpy's too.

    Raises:
        ValueError: where it is no whole number, or one below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected `{name}` to be a whole number, at least {least}; got {value!r}.")
    return int(value)


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a setting outside what is allowed."""
    if value not in allowed:
        raise ValueError(f"Expected `{key}` to be one of {', '.join(map(repr, allowed))}; got {value!r}.")
