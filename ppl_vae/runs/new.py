"""A first spec for the data at hand: a likelihood that suits the columns, sensible sizes, a comment on each choice."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ppl_vae.data.columns import infer_kind
from ppl_vae.data.datasets import is_path, read_dataset
from ppl_vae.data.files import present
from ppl_vae.data.loading import Data, load
from ppl_vae.data.tables import Roles
from ppl_vae.families.mixed import INFERRED
from ppl_vae.runs.check import column_hints
from ppl_vae.runs.spec import load_spec

_LISTED = 40  # columns whose families are written out
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ].*)?")
_USELESS = re.compile(r"Expected (?:numbers or words in|each word of) column '(.+?)' (?:of|in) ")
SCHEMA = "spec.schema.json"


def write_spec(path: Path, name: str, overrides: Mapping[str, Any] | None = None) -> tuple[str, list[str]]:
    """Write a commented spec that fits a data set, and check that it makes sense.

    Args:
        path: where; there must be no such file yet.
        name: the data set, or the path of a file, relative to where the command runs.
        overrides: keys of `[data]`, such as `{"label": "class"}`.

    Returns:
        The text, and what looks wrong with the columns, with the `--set` that mends it.

    Raises:
        ValueError: If the file exists, or the data cannot be read.
    """
    if path.exists():
        raise ValueError(f"Expected a new file; {path} exists. Choose another name, or remove it.")
    keys = dict(overrides or {})
    data = None
    while data is None:
        try:
            for column, is_date in _distinct_words(name, keys):
                role = "leave_out" if is_date or "id" in keys else "id"
                keys[role] = column if role == "id" else [*keys.get(role, []), column]
            data = load(name, **keys)
        except ValueError as error:
            if useless := _USELESS.match(str(error)):  # dates, or words that hardly come twice
                keys["leave_out"] = [*keys.get("leave_out", []), useless[1]]
            elif "missing cells" in str(error) and "missing" not in keys:
                keys["missing"] = "model"
            else:
                raise
    for column, like in data.suspects.items():
        if like in ("label", "id") and like not in keys:
            keys[like] = column
        elif like == "constant":
            keys["leave_out"] = [*keys.get("leave_out", []), column]
    data = load(name, **keys)
    where = os.path.relpath(name, path.absolute().parent) + "/" * Path(name).is_dir() if is_path(name) else name
    if len(data.train["x"]) >= 500:
        keys.setdefault("validation_fraction", 0.1)
    text = _text({"name": where, **keys}, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        load_spec(path)
    except ValueError:
        path.unlink()
        raise
    return text, column_hints(data)


def _distinct_words(name: str, keys: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Columns of dates, and of words of which no two are the same: they tell rows apart, and say nothing of others."""
    roles = Roles(*(keys.get(field.name) for field in fields(Roles)))
    raw = read_dataset(name, keys.get("root"), keys.get("array"), keys.get("download", False), roles)
    dates = {column: all(map(_DATE.fullmatch, words)) for column, words in raw.categories.items()}
    return [(name, is_date) for name, is_date in dates.items() if is_date or len(raw.categories[name]) == len(raw.x)]


def _text(keys: dict[str, Any], data: Data) -> str:
    columns, n = data.columns, len(data.train["x"])
    family, settings, comment = _likelihood(data)
    keys |= {key: value for key, value in settings.pop("data", {}).items() if key not in keys}
    hidden = [64, 64] if columns.count <= 64 else [200, 200]
    network: dict[str, Any] = {"family": "MLP", "hidden": hidden, "activation": "gelu"}
    picture = columns.shape is not None and min(columns.shape[-2:]) >= 16
    if picture:
        network = {"family": "Conv", "channels": [32, 64], "hidden": [256]}
    latent = min(50 if picture else 10, max(2, columns.count // 2))
    epochs = max(20, min(300, round(5000 * 100 / n)))
    svi: dict[str, Any] = {"elbo": "TraceMeanField_ELBO", "epochs": epochs, "batch_size": max(20, min(100, n // 10))}
    svi |= {"learning_rate": 2e-3, "schedule": "one-cycle"}
    if keys.get("validation_fraction"):
        svi["keep"] = "best"
    roles = "; ".join(f"{name}: {role}" for name, role in data.roles.items())
    if "missing" in keys:
        roles += "; rows with missing cells are dropped" if columns.missing is None else "; missing cells are modelled"
    tables: list[tuple[str, str, dict[str, Any]]] = [
        ("data", f"{n:,} rows to train on, {columns.count} features" + (f" ({roles})" if roles else ""), keys),
        ("model", "How many latent variables describe a row; try fewer or more.", {"latent": latent}),
        ("prior", "p(z). Others: ppl-vae list prior", {"family": "StandardNormal"}),
        ("likelihood", f"p(x|z). {comment}", {"family": family, **settings, "network": network}),
        ("posterior", "q(z|x), the guide. Others: ppl-vae list posterior", {"family": "Normal", "network": network}),
        ("svi", "Training: a pass over the data is an epoch.", svi),
        ("evaluation", "Draws per datum for the evidence.", {"samples": 1000}),
    ]
    schema = files("ppl_vae.runs") / SCHEMA
    lines = [f"#:schema {Path(str(schema)).as_uri()}", f"# Train it: ppl-vae fit FILE. Made for {keys['name']}."]
    for title, about, table in tables:
        lines += ["", f"# {about}", f"[{title}]", *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _likelihood(data: Data) -> tuple[str, dict[str, Any], str]:
    """Family, its keys (those of the data under `data`), and why."""
    columns, levels = data.columns, data.protocol["levels"]
    if columns.shape is not None:
        if levels == 2:
            return "Bernoulli", {}, "Pixels are 0 or 1."
        x = data.train["x"][~data.train["x"].isnan()]
        if levels is not None and bool(((x == x.min()) | (x == x.max())).all()):
            return "Bernoulli", {"data": {"binarization": "threshold"}}, "Pixels are black or white."
        if levels is not None:
            said = f"{levels} intensities. Or black and white: data.binarization = dynamic and a Bernoulli."
            return "DiscretizedLogistic", {"data": {"scaling": "unit"}}, said
        return "Normal", {"scale": "shared"}, "Real numbers with one noise scale."
    rows = data.train["x"].double().numpy().T
    each = columns.kinds or [infer_kind(present(x), present(x)) for x in rows]
    kinds = set(each)
    scaled: dict[str, Any] = {"data": {"scaling": "standardize"}} if kinds & {"real", "positive"} else {}
    if kinds == {"real"}:
        said = "Real numbers, standardised, with a noise scale for each column."
        return "Normal", {"scale": "feature", "data": {"scaling": "standardize"}}, said
    if len(kinds) == 1 and kinds != {"ordered"}:
        (kind,) = kinds
        return INFERRED[kind], scaled, f"All columns are of the kind {kind}."
    names = columns.names or tuple(map(str, range(columns.count)))
    families = {name: INFERRED[kind] for name, kind in zip(names, each, strict=True)}
    if len(names) > _LISTED and columns.kinds:
        return "Mixed", {"kinds": "infer", **scaled}, "A family for each column, by its kind; see ppl-vae check."
    return "Mixed", {"kinds": families, **scaled}, "A family for each column; change any."


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
