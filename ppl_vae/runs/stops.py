"""Signals that end a process, turned into one interruption that keeps what was trained. Nothing slow is imported."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # Ctrl-C, lost connections, clusters
PATIENCE = 5.0  # seconds after which another signal is raised too, should the first have been swallowed


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        message: what was kept, and how to go on.
        number: of the signal.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class _Listener:
    """What has arrived since `listening` began."""

    def __init__(self) -> None:
        self.arrived: int | None = None
        self.told: float | None = None  # when it was raised
        self.blocks = 0

    def __call__(self, number: int, frame: Any) -> None:
        self.arrived = self.arrived or number
        if self.told is None or time.monotonic() > self.told + PATIENCE:
            self.tell()

    def tell(self) -> None:
        """Raise what has arrived, unless signals are held off."""
        if self.arrived is not None and not self.blocks:
            self.told = time.monotonic()
            raise Stopped(number=self.arrived)


_active: list[_Listener] = []


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Turn the first signal that ends a process into `Stopped`; later ones must wait.

    Signals that were ignored at the start, as by nohup, stay ignored. Inside another such block, and outside of the
    main thread, nothing changes.
    """
    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    listener = _Listener()
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    former: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    former = {number: handler for number, handler in former.items() if handler not in (None, signal.SIG_IGN)}
    _active.append(listener)
    try:
        for number in former:
            signal.signal(number, listener)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _active.clear()


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Hold signals off while files are written; the first of all to arrive is raised at the end."""
    listener = _active[0] if _active else _Listener()
    listener.blocks += 1
    try:
        yield
    finally:
        listener.blocks -= 1
    if listener.told is None:
        listener.tell()


def look() -> None:
    """Raise again what a program has swallowed."""
    for listener in _active:
        listener.tell()
