"""Checks of integers, names and errors, with one message for each mistake."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

_NO_MEMORY = ("OutOfMemoryError", "can't allocate memory", "not enough memory", "out of memory")


def check_int(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; NumPy's integers pass too.

    Raises:
        ValueError: If it is not a whole number, or is below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected `{name}` to be a whole number, at least {least}; got {value!r}.")
    return int(value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has ended, on the CPU or a GPU."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that is not among those allowed.

    Raises:
        ValueError: Listing what is allowed.
    """
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}; got {value!r}.")
