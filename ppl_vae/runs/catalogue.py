"""The catalogue: what a spec can name, in which roles, and how to write it."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, get_type_hints

from ppl_vae import families, networks
from ppl_vae.families.supports import describe_support
from ppl_vae.runs.schema import ROLES, classes, example, json_schema, keys_of, needs, parametric, plays
from ppl_vae.runs.spec_file import near

_EXAMPLES: dict[Any, Any] = {int: 10, float: 1.0, list[int]: [200, 200]}
_NETWORK = '{ family = "MLP", hidden = [200, 200] }'


class Component(NamedTuple):
    """A family or network that a spec can name.

    `keys` holds the keys of its table with their defaults, None for one that must be given.
    """

    role: str
    name: str
    doc: str
    keys: dict[str, Any]


def components(role: str | None = None) -> list[Component]:
    """List what can be named in a role (`prior`, `likelihood`, `posterior` or `network`), by default in all of them.

    Raises:
        ValueError: If the role is unknown.
    """
    known = (*ROLES, "network")
    if role is not None and role not in known:
        raise ValueError(f"Expected a role, one of {', '.join(known)}; got {role!r}.{near(role, known)}")
    return [
        Component(each, kind.__name__, _summary(kind), keys_of(kind))
        for each in (known if role is None else (role,))
        for kind in (classes(networks) if each == "network" else classes(families))
        if each == "network" or plays(kind, each)
    ]


def describe(name: str) -> dict[str, Any]:
    """Describe a family or network: what it is, its roles, support and keys, and a table to copy.

    Raises:
        ValueError: If there is no such family or network.
    """
    known = {kind.__name__: kind for kind in (*classes(families), *classes(networks))}
    if name not in known:
        raise ValueError(f"Expected a family or network ({', '.join(known)}); got {name!r}.{near(name, known)}")
    kind = known[name]
    text = (inspect.getdoc(kind) or "").partition("\n\nArgs:")[0]
    told: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        told |= _arguments((inspect.getdoc(base) or "").partition("\n\nArgs:")[2])
    hints = get_type_hints(kind.__init__, localns={"Conditional": families.Conditional})
    keys = {
        key: {"default": default, "must_be_given": default is None, "doc": told.get(key, "")}
        for key, default in keys_of(kind).items()
    }
    is_family = issubclass(kind, families.Family)
    roles = [role for role in ROLES if plays(kind, role)] if is_family else ["network"]
    about: dict[str, Any] = {"name": name, "roles": roles, "doc": _plain(text), "keys": keys}
    if is_family:
        made = kind if needs(kind) & set(ROLES) else example(kind)
        about["support"] = describe_support(made.support)
        about["support"] += ", as many as the data have" if "levels" in needs(kind) else ""
        about["reparameterised"] = bool(made.reparameterised)
    given = {key: _EXAMPLES.get(hints.get(key), "...") for key, one in keys.items() if one["must_be_given"]}
    return {**about, "example": _example(kind, roles[-1] if roles[-1] != "posterior" else roles[0], given, is_family)}


def detail(about: Mapping[str, Any]) -> str:
    """Write a description for the terminal."""
    lines = [f"{about['name']}: {', '.join(about['roles'])}", "", about["doc"], ""]
    if "support" in about:
        how = "yes, so it can be a guide's" if about["reparameterised"] else "no, so it cannot be a guide's"
        lines += [f"support          {about['support']}", f"reparameterised  {how}"]
    for key, one in about["keys"].items():
        default = "must be given" if one["must_be_given"] else f"= {json.dumps(one['default'])}"
        lines.append(f"key {key} ({default}): {one['doc']}".rstrip(": "))
    return "\n".join([*lines, "", about["example"]])


def listing(listed: Sequence[Mapping[str, Any]]) -> str:
    """Families and networks by role, with their keys."""
    lines: list[str] = []
    for role, group in groupby(listed, lambda component: component["role"]):
        lines.append(role)
        for one in group:
            keys = ", ".join(key if value is None else f"{key} = {value}" for key, value in one["keys"].items())
            lines.append(f"  {one['name']:<28} {one['doc']}" + (f" [{keys}]" if keys else ""))
    return "\n".join([*lines, "", "ppl-vae list NAME describes one, with its keys and a table to copy."])


def schema_text() -> str:
    """JSON schema of a spec, as text."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _example(kind: Any, role: str, given: Mapping[str, Any], is_family: bool) -> str:
    if not is_family:
        inner = "".join(f", {key} = {json.dumps(value)}" for key, value in given.items())
        return f'network = {{ family = "{kind.__name__}"{inner} }}'
    lines = [f"[{role}]", f'family = "{kind.__name__}"', *(f"{key} = {json.dumps(v)}" for key, v in given.items())]
    if role != "prior" and parametric(kind):
        lines.append(f"network = {_NETWORK}")
    return "\n".join(lines)


def _arguments(text: str) -> dict[str, str]:
    """Sentences of an `Args:` section by name."""
    told: dict[str, str] = {}
    name = ""
    for line in text.split("\n\n")[0].splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name, told[match[1]] = match[1], match[2]
        elif name:
            told[name] += f" {line.strip()}"
    return {key: _plain(value) for key, value in told.items()}


def _summary(kind: Any) -> str:
    """First sentence of a class's docstring, as plain text, up to its formula."""
    first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\w\.) (?=[A-Z])", re.sub(r",? ?:math:`[^`]*`|\*", "", first))[0]


def _plain(text: str) -> str:
    """A docstring as plain text, its formulas without their commands."""

    def formula(match: re.Match[str]) -> str:
        return re.sub(r"\\(mathrm|left|right|[,;!])|[{}\\]", "", match[1].replace(r"\mid", "|"))

    return re.sub(r":math:`([^`]*)`", formula, text).replace("``", "`")
