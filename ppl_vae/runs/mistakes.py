"""Mistakes in a spec, in the words of its file: where, what is allowed, what is there, and the nearest spelling."""

import re
from typing import Any

from pydantic import ValidationError

from ppl_vae import families
from ppl_vae.runs.schema import ROLES, Section, plays
from ppl_vae.runs.spec_file import listed, near, show

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "model": "a table",
}


def explain(error: ValidationError, name: str, raw: Any, section: Section) -> list[str]:
    """Write one line for each mistake in a table.

    Args:
        error: what pydantic raised for it.
        name: name of the table.
        raw: the table as it stands in the file.
        section: what may stand in it.
    """
    lines: dict[str, str] = {}
    for each in error.errors(include_url=False):
        kind, context, where, key = each["type"], each.get("ctx", {}), name, name
        here = parent = raw
        for step in each["loc"]:
            inside = step in here if isinstance(here, dict) else isinstance(here, list) and isinstance(step, int)
            if inside:
                here, parent, key = here[step], here, str(step)
                where += f".{step}" if isinstance(step, str) else f"[{step}]"
        table = here if kind == "missing" or kind.startswith("union_tag") else parent
        tables = section.tables if table is raw else section.networks
        known = _known(tables, table)
        got, hint = show(here), ""
        if kind == "value_error":
            lines[where] = f"{where}: {context['error']}"
            continue
        if kind.startswith("union_tag"):
            family = here.get("family")
            where, expected, got, hint = f"{where}.family", listed(tables), show(family), near(family, tables)
            if table is raw and isinstance(family, str) and family in families.__all__:
                roles = [role for role in ROLES if plays(getattr(families, family), role)]
                hint = f" {family} can be {listed(roles)}, not {name}."
        elif kind == "extra_forbidden":
            expected, got, hint = listed(known), f"the unknown key {key} = {got}", near(key, known)
            homes = [title for title, model in tables.items() if key in model.model_fields]
            if homes and key == "network":
                hint = f" {parent['family']} has no parameters for a network to give. Leave it out."
            elif homes:
                whole = f'{where.removesuffix("." + key)}={{family = "{parent["family"]}"}}'
                hint = f" It belongs to {listed(homes)}; to change the family replace the whole table, --set '{whole}'."
        elif kind == "missing":
            key, got = str(each["loc"][-1]), "none"
            where += f".{key}"
            expected = listed(tables) if key == "family" else _type_words(known[key].annotation)
            if key == "network":
                expected = f'a network ({listed(section.networks)}), such as {{family = "MLP", hidden = [200, 200]}}'
        elif kind == "literal_error":
            expected = context["expected"].replace("'", '"')
            hint = near(here, re.findall(r'"([^"]*)"', expected))
        elif kind == "greater_than_equal":
            expected = f"at least {context['ge']}"
        else:
            expected = KINDS.get(kind.split("_")[0], each["msg"])
        if where in lines:
            lines[where] = lines[where].replace("; got", f" or {expected}; got", 1)
        else:
            lines[where] = f"{where}: Expected {expected}; got {got}.{hint}"
    return list(lines.values())


def _known(tables: dict[str, Any], raw: Any) -> dict[str, Any]:
    """Fields that belong into a table by its family; `family` alone if that is unknown."""
    family = raw.get("family") if isinstance(raw, dict) and "" not in tables else ""
    return tables[family].model_fields if isinstance(family, str) and family in tables else {"family": None}


def _type_words(kind: Any) -> str:
    return {str: "text", int: "a whole number", float: "a number"}.get(kind, str(kind).replace("typing.", ""))
