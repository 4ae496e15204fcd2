"""The schema of a spec, made from the constructors: a family that is added to `families` can be written in a spec."""

import inspect
import os
import re
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from ppl_vae import families, networks
from ppl_vae._seeds import fold_in, fork_rng
from ppl_vae.data.datasets import NAMES
from ppl_vae.data.loading import load
from ppl_vae.families.conditional import Conditional
from ppl_vae.infer.svi import SETTINGS, check_settings, fit
from ppl_vae.runs.spec_file import listed, near, show

ROLES = ("prior", "likelihood", "posterior")
SECTIONS = ("data", "model", *ROLES, "svi", "evaluation")
SVI = (*SETTINGS, "seed")
CPU = torch.device("cpu")


class _Table(BaseModel):
    """A table of a spec: typed as TOML is, without unknown keys, not to be changed."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )


class _Open(_Table):
    """A table whose other keys are checked elsewhere."""

    model_config = ConfigDict(extra="allow")


class Component(NamedTuple):
    """A family or network that a spec can name.

    `keys` holds the keys of its table with their defaults, None for one that must be given.
    """

    role: str
    name: str
    doc: str
    keys: dict[str, Any]


def json_schema() -> dict[str, Any]:
    """Give the JSON schema of a spec, for editors."""
    fields: dict[str, Any] = {}
    for name, section in sections(None, opened=True).items():
        kind = _union(section.tables)
        fields[name] = (kind, ...) if name in ("data", "model") else (kind | None, None)
    document = create_model("Spec", __base__=_Table, **fields)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document.model_json_schema()}


def components(role: str | None = None) -> list[Component]:
    """List what can be named in a role (`prior`, `likelihood`, `posterior` or `network`), in all of them by default.

    Raises:
        ValueError: for an unknown role.
    """
    known = (*ROLES, "network")
    if role is not None and role not in known:
        raise ValueError(f"Expected a role, one of {', '.join(known)}; got {role!r}.{near(role, known)}")
    found = []
    for each in known if role is None else (role,):
        for kind in classes(networks) if each == "network" else [k for k in classes(families) if _plays(k, each)]:
            first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
            doc = re.sub(r",? ?:math:`[^`]*`|\*", "", first)
            found.append(Component(each, kind.__name__, doc, _keys(kind)))
    return found


def classes(module: Any) -> list[Any]:
    """Give the classes that a package offers."""
    return [getattr(module, name) for name in sorted(module.__all__)]


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Choose the parameters that are the keys of a table."""
    return {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _keys(function: Callable[..., Any]) -> dict[str, Any]:
    """Give the keys of a table with their defaults, None where one must be given."""
    return {key: None if p.default is p.empty else p.default for key, p in _keywords(function).items()}


def needs(function: Callable[..., Any]) -> set[str]:
    """Name the positional parameters, which whoever builds fills in."""
    found = inspect.signature(function).parameters.items()
    return {key for key, p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty}


def filled(function: Callable[..., Any], **known: Any) -> dict[str, Any]:
    """Choose what a constructor's positional parameters ask for."""
    if strange := needs(function) - known.keys():
        raise ValueError(
            f"Expected positional parameters of {function.__name__} among {', '.join(known)}; got "
            f"{', '.join(sorted(strange))}. Make settings keyword-only."
        )
    return {key: value for key, value in known.items() if key in needs(function)}


def _parametric(family: Any) -> bool:
    """Whether a family has parameters that a network may give."""
    if needs(family) & set(ROLES):
        return False
    with fork_rng(0, device=CPU):
        return None in _keys(family).values() or family(2).start().numel() > 0


def _plays(kind: type[Any], role: str) -> bool:
    """Whether a family or network can play a role, by what it needs, its support and its being reparameterised."""
    asked = needs(kind)
    if issubclass(kind, networks.Network):
        amortized = not issubclass(kind, networks.Free)
        return not amortized if role == "prior" else amortized and ("rows" not in asked or role == "posterior")
    if tied := asked & set(ROLES):
        return role not in tied
    if role == "prior":
        return any(other.reparameterised and other.support is kind.support for other in classes(families))
    return _parametric(kind) and (role == "likelihood" or kind.reparameterised)


class _Section(NamedTuple):
    """What may stand in a table: a model, or one for each family; and those of the networks in it."""

    tables: dict[str, Any]
    networks: dict[str, Any]
    adapter: TypeAdapter[Any]


def sections(program: type | None = None, *, opened: bool = False) -> dict[str, _Section]:
    """Give what may stand in each table, beside a program's class where there is one."""
    return _generated(program, opened, tuple(classes(families)), tuple(classes(networks)))


@cache
def _generated(program: Any, opened: bool, kinds: tuple[Any, ...], nets: tuple[Any, ...]) -> dict[str, _Section]:
    """Make the models of all tables out of the constructors."""

    def nothing() -> None: ...

    def named(kind: Any, name: str, **more: Any) -> Any:
        free = _keywords(kind) and not needs(kind) & set(ROLES)
        judge = partial(kind, **filled(kind, event=2, rows=1)) if free else None
        return _table(name, kind, judge, family=(Literal[kind.__name__], ...), **more)

    count = Annotated[int, Field(ge=1)]
    tables: dict[str, dict[str, Any]] = {
        "data": {
            "": _table(
                "Data",
                load,
                _judge_data,
                only=_keywords(load).keys() - {"dtype"},
                name=(Annotated[str, AfterValidator(_judge_name)], ...),
            )
        },
        "model": {
            "": _table(
                "Model", program or nothing, opened=opened, latent=(count | None, None), program=(str | None, None)
            )
        },
        "svi": {"": _table("Svi", fit, _judge_svi, only=SVI)},
        "evaluation": {"": _table("Evaluation", nothing, samples=(count, 1000))},
    }
    of_network = {net: named(net, net.__name__) for net in nets}
    inner: dict[str, dict[str, Any]] = {}
    for role in ROLES:
        inner[role] = {net.__name__: model for net, model in of_network.items() if _plays(net, role)}
        tables[role] = {}
        for kind in kinds:
            if _plays(kind, role):
                network = (_union(inner[role]) | None, None) if role == "prior" else (_union(inner[role]), ...)
                more = {"network": network} if _parametric(kind) else {}
                tables[role][kind.__name__] = named(kind, role.title() + kind.__name__, **more)
    return {name: _Section(tables[name], inner.get(name, {}), TypeAdapter(_union(tables[name]))) for name in SECTIONS}


def _union(models: dict[str, Any]) -> Any:
    kinds = tuple(models.values())
    return kinds[0] if len(kinds) == 1 else Annotated[Union[kinds], Field(discriminator="family")]  # noqa: UP007


def _table(
    title: str,
    function: Callable[..., Any],
    judge: Any = None,
    /,
    only: Any = None,
    opened: bool = False,
    **fixed: Any,
) -> Any:
    """Make a table's model out of a function's keyword-only parameters.

    `judge`, most often the function itself, is called with each value alone, so that every mistake is found, and where
    all are right with all together.
    """
    found = {key: p for key, p in _keywords(function).items() if only is None or key in only}
    required = {key for key, p in found.items() if p.default is p.empty}
    body = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    hints = get_type_hints(body, localns={"Conditional": Conditional})

    def alone(key: str, value: Any) -> Any:
        if judge is not None and required <= {key} and value is not None:
            judge(**{key: value})
        return value

    def together(table: Any) -> Any:
        if judge is not None:
            judge(**{key: getattr(table, key) for key in found})
        return table

    def written(hint: Any) -> Any:
        if get_origin(hint) not in (Union, types.UnionType):
            return hint
        return Union[tuple(part for part in get_args(hint) if get_origin(part) is not os.PathLike)]  # noqa: UP007

    fields = {
        key: (
            Annotated[written(hints.get(key, Any)), AfterValidator(partial(alone, key))],
            ... if key in required else p.default,
        )
        for key, p in found.items()
    }
    make: Any = create_model
    return make(
        title,
        __base__=_Open if opened else _Table,
        __validators__={"together": model_validator(mode="after")(together)},
        **fixed,
        **fields,
    )


def _judge_svi(**keys: Any) -> None:
    fold_in(keys.get("seed", 0))
    check_settings(**keys)


def _judge_data(**keys: Any) -> None:
    """Let `load` judge its settings, which it does before it looks for a file that is not there."""
    try:
        load(f"{os.devnull}/none.npz", **keys)
    except ValueError as error:
        if "no such file" not in str(error):
            raise


def is_path(name: str) -> bool:
    """Whether the name of data is a path."""
    return name not in NAMES and (bool(Path(name).suffix) or len(Path(name).parts) > 1)


def _judge_name(name: str) -> str:
    if name not in NAMES and not is_path(name):
        load(name)
    return name


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "model": "a table",
}


def explain(error: ValidationError, name: str, raw: Any, section: _Section) -> list[str]:
    """Say of each mistake where it stands in the file, what is allowed and what is there."""
    lines: dict[str, str] = {}
    for each in error.errors(include_url=False):
        kind, context, where, key = each["type"], each.get("ctx", {}), name, name
        here: Any = raw
        parent: Any = raw
        for step in each["loc"]:
            inside = step in here if isinstance(here, dict) else isinstance(here, list) and isinstance(step, int)
            if inside:
                here, parent, key = here[step], here, str(step)
                where += f".{step}" if isinstance(step, str) else f"[{step}]"
        table = here if kind == "missing" or kind.startswith("union_tag") else parent
        tables = section.tables if table is raw else section.networks
        known = _known(tables, table)
        if kind == "value_error":
            lines[where] = f"{where}: {context['error']}"
            continue
        got, hint = show(here), ""
        if kind.startswith("union_tag"):
            where, here = f"{where}.family", here.get("family")
            expected, got, hint = listed(tables), show(here), near(here, tables)
            if table is raw and here in families.__all__:
                roles = [role for role in ROLES if _plays(getattr(families, here), role)]
                hint = f" {here} can be {listed(roles)}, not {name}."
        elif kind == "extra_forbidden":
            expected, got, hint = listed(known), f"the unknown key {key} = {got}", near(key, known)
            homes = [title for title, table in tables.items() if key in table.model_fields]
            if homes and key == "network":
                hint = f" {parent['family']} has no parameters for a network to give. Leave it out."
            elif homes:
                whole = f'{where.removesuffix("." + key)}={{family = "{parent["family"]}"}}'
                hint = f" It belongs to {listed(homes)}; to change the family replace the whole table, --set '{whole}'."
        elif kind == "missing":
            key, got = str(each["loc"][-1]), "none"
            where, expected = f"{where}.{key}", _hint(known[key].annotation)
            if key == "network":
                expected = f'a network ({listed(section.networks)}), such as {{family = "MLP", hidden = [200, 200]}}'
        elif kind == "literal_error":
            expected = context["expected"].replace("'", '"')
            hint = near(here, re.findall(r'"([^"]*)"', expected))
        elif kind == "greater_than_equal":
            expected = f"at least {context['ge']}"
        else:
            expected = _KINDS.get(kind.split("_")[0], each["msg"])
        if where in lines:
            lines[where] = lines[where].replace("; got", f" or {expected}; got", 1)
        else:
            lines[where] = f"{where}: Expected {expected}; got {got}.{hint}"
    return list(lines.values())


def _known(tables: dict[str, Any], raw: Any) -> dict[str, Any]:
    """Give the keys that belong into a table by its family; none where that is unknown."""
    family = raw.get("family") if isinstance(raw, dict) and "" not in tables else ""
    return tables[family].model_fields if family in tables else {"family": None}


def _hint(kind: Any) -> str:
    return {str: "text", int: "a whole number", float: "a number"}.get(kind, str(kind).replace("typing.", ""))
