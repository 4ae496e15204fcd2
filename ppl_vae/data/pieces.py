"""Tables larger than memory, read in pieces."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ppl_vae.data.files import RawData, intensity, scratch
from ppl_vae.data.tables import BINARY, Roles, Table, choose, stream_binary, stream_text

_PIECE, _FEATURES = 10_000, "the features"


def read_in_pieces(path: Path, roles: Roles, text: list[str]) -> RawData:
    """Read a table of numbers that is larger than memory into the map of a file that vanishes with the process.

    Raises:
        ValueError: If it cannot be read, or a feature holds words.
    """
    binary, head, rows = path.suffix.lower() in BINARY, None, 0
    own = [*(name for name in (roles.label, roles.id, roles.size_factor) if name), *(roles.covariates or ())]
    others: dict[str, list[Any]] = {}
    with scratch() as file:
        for piece in stream_binary(path, _PIECE) if binary else stream_text(path, roles.separator, _PIECE, text):
            head = head or choose(piece, roles)
            names = head.names or tuple(piece.cells)
            columns = [piece.column(name) for name in names]
            if wrong := [name for name, (_, words) in zip(names, columns, strict=True) if words or name in text]:
                raise ValueError(
                    f"Expected numbers in the features of {path}, which is larger than memory; got words in column "
                    f'{wrong[0]!r}. Convert them, or leave the column out (leave_out = ["{wrong[0]}"]).'
                )
            file.write(np.stack([values for values, _ in columns], 1).tobytes())
            rows += len(columns[0][0])
            for name in [name for name in own if name in piece.cells]:
                others.setdefault(name, []).extend(piece.text(name))
        if head is None:
            raise ValueError(f"Expected a table with rows in {path}; got none.")
        file.flush()
        x = np.memmap(file.name, np.float64, "c", shape=(rows, len(names)))
    known = {name: cells if isinstance(cells[0], str | None) else np.asarray(cells) for name, cells in others.items()}
    plain = replace(roles, columns=[_FEATURES], leave_out=None, categories=None)
    about = choose(Table(str(path), {**known, _FEATURES: x[:, 0]}), plain)
    return replace(about, x=x, names=head.names, maximum=intensity(x), roles=head.roles)
