"""When the state of a run is kept while it trains."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

SHARE = 0.01  # of the time of training that keeping its state may take
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


class Pace:
    """Keeps time between the states of a run that are kept.

    Args:
        text: how often: a time such as "60 s", "5 min" or "1 h" (at an epoch's end, or within one that takes longer;
            less often if it would take more than a hundredth of all time), a number of epochs such as "10 epochs", or
            "off".

    Raises:
        ValueError: If it is none of these.
    """

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|epochs?)|off", text)
        if match is None or (match[1] and not float(match[1])):
            raise ValueError(f'Expected `checkpoint` such as "60 s", "5 min", "10 epochs" or "off"; got {text!r}.')
        self.every, self.unit = (float(match[1]), match[2]) if match[1] else (0.0, "")
        self.began, self.cost, self.epochs = time.monotonic(), 0.0, 0
        self.kept, self.epoch_began = 0, self.began

    def is_due(self) -> bool:
        """Whether the state is to be kept; called once at each epoch's end."""
        self.epochs, self.epoch_began = self.epochs + 1, time.monotonic()
        if self.unit not in _UNITS:
            return bool(self.unit) and self.epochs >= self.every
        return self._passed(self.began)

    def is_due_within(self) -> bool:
        """Whether the state is to be kept before the epoch ends, since it takes long."""
        return self.unit in _UNITS and self._passed(max(self.began, self.epoch_began))

    def _passed(self, start: float) -> bool:
        return time.monotonic() - start >= max(self.every * _UNITS[self.unit], self.cost / SHARE)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Note how long it takes to keep the state, and when it was."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.began, self.epochs, self.kept = time.monotonic(), 0, self.kept + 1
            self.cost = self.began - start


def reached(state: Mapping[str, Any], epochs: int) -> str:
    """How far a training state is, in words."""
    place = state.get("place")
    steps = "" if place is None else f" and {len(place['losses'])} steps"
    return f"epoch {len(state['history']['elbo'])} of {epochs}{steps}"
