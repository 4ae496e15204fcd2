"""Errors that programs of one's own raise, as messages."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def blamed(programs: Mapping[str, str]) -> Iterator[None]:
    """Turn what a program of one's own raises into a message with the line of its file.

    Args:
        programs: the files of code, `file.py:Class`, by the table of the spec that names them.

    Raises:
        ValueError: With that message; errors that come from elsewhere stay as they are.
    """
    try:
        yield
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError | MemoryError):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = {
            place: [frame.lineno for frame in frames if frame.filename == reference.partition(":")[0]]
            for place, reference in programs.items()
        }
        if not any(lines.values()):  # a fault of ours
            raise
        place = next(place for place in lines if lines[place])
        file, parts = programs[place].partition(":")[0], "model and guide" if place == "model" else "the network"
        what = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{place}.program: Expected {parts} of {file} to run on the data; line {lines[place][-1]} raised "
            f"{type(error).__name__}: {what}"
        ) from error
