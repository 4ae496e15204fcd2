"""Progress: what takes long says how far it is, in a line every ten seconds, where somebody listens."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds
_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def reporting(say: Callable[[str], None]) -> Iterator[None]:
    """Let `say` take the lines of all that is tracked within the block."""
    token = _listener.set(say)
    try:
        yield
    finally:
        _listener.reset(token)


def track(
    items: Iterable[T], what: str, total: int, *, done: int = 0, note: Callable[[], str] = lambda: ""
) -> Iterator[T]:
    """Pass items on, and say after one of them how many are done and how long the others will take.

    Args:
        items: what takes long, one after the other.
        what: it is, with `{}` where the number that is done stands.
        total: the number of items, those that were done before among them.
        done: how many were done before.
        note: what else to say, called only where something is said.
    """
    say, began = _listener.get(), time.monotonic()
    last = began
    for number, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if say is not None and now - last >= EVERY and number < total:
            last, left = now, (now - began) / (number - done) * (total - number)
            say(f"{what.format(f'{number:,} of {total:,}')}{note()}, {_span(left)} left")


def _span(seconds: float) -> str:
    """A time in words, not too exact."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{math.ceil(seconds)} s"
