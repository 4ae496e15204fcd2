"""What is known of a program that was built in Python, in place of a spec, which could not build it."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tomli_w

from ppl_vae.data.loading import Data, load
from ppl_vae.programs.given import ROLES
from ppl_vae.programs.vae import VAE
from ppl_vae.runs.spec_file import plain

_LACKING = {"latent": None, "program": None, "class_prior": None, "seed": 0, "precision": "full"}


class Built:
    """The tables of a run whose program was built in Python; attributes as of a `Spec`.

    Args:
        path: where they stand.
        tables: `data`, `model`, `svi` and `evaluation`, and for a `VAE` a table for each role.
    """

    programs: dict[str, str] = {}  # noqa: RUF012  it names no file of code

    def __init__(self, path: Path, tables: Mapping[str, Any]) -> None:
        self.path, self._tables = path, plain(tables)
        spaces = {key: SimpleNamespace(**{**_LACKING, **table}) for key, table in self._tables.items()}
        self.data, self.model = spaces["data"], spaces["model"]
        self.svi, self.evaluation = spaces["svi"], spaces["evaluation"]

    def to_dict(self) -> dict[str, Any]:
        """The tables as plain values."""
        return copy.deepcopy(self._tables)  # type: ignore[no-any-return]

    def to_toml(self) -> str:
        """The tables as TOML."""
        return tomli_w.dumps(self._tables)

    def relocated(self, path: Path, references: Mapping[str, str]) -> "Built":
        """The same at another path."""
        return Built(path, self._tables)

    def load_data(self) -> Data:
        """Read the data again, if `load` read them.

        Raises:
            ValueError: If they were in memory alone.
        """
        given = self.to_dict()["data"]
        if "in_memory" in given:
            raise ValueError(
                f"Expected rows: the data of this run, {given['name']!r}, were in memory when it was saved. Give them."
            )
        entries = given.pop("entries", [])
        return load(**given).with_entries(entries)


def tables_of(program: Any, data: Data, settings: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """What is known of a program, its data and its training, laid out as a spec is."""
    known = {"name": data.name, "in_memory": True} if data.source is None else dict(data.source)
    tables: dict[str, Any] = {"data": known, "svi": dict(settings), "evaluation": {"samples": samples}}
    if not isinstance(program, VAE):
        return {**tables, "model": {"built": True, "program": type(program).__name__}}
    tables["model"] = {"built": True, "latent": program.prior.family.event_shape.numel()}
    for role in ROLES:
        part = getattr(program, role)
        tables[role] = _described(part.family)
        if part.context or part.wants == "index":
            tables[role]["network"] = _described(part.network)
    return tables


def _described(part: Any) -> dict[str, Any]:
    """Class of a part, and those of its keys that it keeps by their names."""
    keys = [key for key, p in inspect.signature(type(part)).parameters.items() if p.kind is p.KEYWORD_ONLY]
    kept = {key: getattr(part, key) for key in keys if isinstance(getattr(part, key, None), int | float | str | list)}
    return {"family": type(part).__name__, **kept}
