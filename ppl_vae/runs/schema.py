"""The schema of a spec, made from the constructors: a family that is added to `families` can be written in a spec."""

import inspect
import os
import types
from collections import abc
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    create_model,
    model_validator,
)

from ppl_vae import families, networks
from ppl_vae._checks import check_choice
from ppl_vae._seeds import fold_in, fork_rng
from ppl_vae.data.columns import Columns
from ppl_vae.data.datasets import check_name
from ppl_vae.data.loading import load
from ppl_vae.evaluation.class_evidence import PRIORS
from ppl_vae.families.conditional import Conditional
from ppl_vae.infer.svi import SETTINGS, check_settings, fit
from ppl_vae.networks.encoding import WORDS
from ppl_vae.programs.given import KEYS
from ppl_vae.programs.given import ROLES as ROLES
from ppl_vae.programs.precision import Precision
from ppl_vae.runs.pace import Pace

SECTIONS = ("data", "model", *ROLES, "svi", "evaluation")
SVI = (*SETTINGS, "seed")
Encodings = str | dict[str, str]
CPU = torch.device("cpu")
_UNKNOWN = {"shape": "pictures, which have a shape,", "levels": "columns of known kinds or 8-bit intensities"}


class _Table(BaseModel):
    """A table of a spec: typed as TOML is, frozen, without unknown keys."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )


class _Open(_Table):
    """A table whose other keys are checked elsewhere."""

    model_config = ConfigDict(extra="allow")


class Section(NamedTuple):
    """What may stand in a table: one model, or one per family; and those of the networks in it."""

    tables: dict[str, Any]
    networks: dict[str, Any]
    adapter: TypeAdapter[Any]


def json_schema() -> dict[str, Any]:
    """JSON schema of a spec, for editors."""
    fields: dict[str, Any] = {}
    for name, section in sections(opened=True).items():
        kind = _union(section.tables)
        fields[name] = (kind, ...) if name in ("data", "model") else (kind | None, None)
    document = create_model("Spec", __base__=_Table, **fields)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document.model_json_schema()}


def classes(module: Any) -> list[Any]:
    """Classes that a spec can name, in the order of the alphabet."""
    return [getattr(module, name) for name in sorted(module.__all__)]


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters, which are the keys of a table."""
    return {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def keys_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Keys of a table with their defaults, None for one that must be given."""
    return {key: None if p.default is p.empty else p.default for key, p in _keywords(function).items()}


def needs(function: Callable[..., Any]) -> set[str]:
    """Names of the positional parameters, which whoever builds fills in."""
    parameters = inspect.signature(function).parameters.items()
    return {key for key, p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty}


def filled(function: Callable[..., Any], **known: Any) -> dict[str, Any]:
    """Choose the arguments for a constructor's positional parameters.

    Raises:
        ValueError: If it has others than these, or needs a `shape` or `levels` that the data do not have.
    """
    wanted = needs(function)
    if strange := wanted - known.keys():
        raise ValueError(
            f"Expected positional parameters of {function.__name__} among {', '.join(known)}; got "
            f"{', '.join(sorted(strange))}. Make settings keyword-only."
        )
    for key in sorted(wanted & _UNKNOWN.keys()):
        if known[key] is None:
            other = "MLP or Linear" if key == "shape" else "another family"
            raise ValueError(f"Expected {_UNKNOWN[key]} for {function.__name__}; got other data. Use {other}.")
    return {key: value for key, value in known.items() if key in wanted}


def described(columns: Columns) -> dict[str, Any]:
    """What constructors can be told of the columns of the data."""
    return {"levels": columns.levels, "columns": columns, "shape": columns.shape}


def _example(**known: Any) -> dict[str, Any]:
    """Arguments for the positional parameters of any part, over two features or small pictures."""
    columns = Columns(2, (8, 8), ("a", "b"), ("real", "real"), (17, 17))
    return {"event": 2, "rows": 1, **described(columns), **known}


@cache
def example(kind: Any) -> Any:
    """A family over two features, or the class itself if it has keys that must be given."""
    with fork_rng(0, device=CPU):
        return kind if None in keys_of(kind).values() else kind(**filled(kind, **_example()))


@cache
def parametric(kind: Any) -> bool:
    """Whether a family has parameters that a network may give."""
    return not needs(kind) & set(ROLES) and (example(kind) is kind or example(kind).start().numel() > 0)


def plays(kind: Any, role: str) -> bool:
    """Whether a family or network can play a role, by what it needs, its support and whether it is reparameterised."""
    wanted = needs(kind)
    if issubclass(kind, networks.Network):
        amortized = not issubclass(kind, networks.Free)  # a prior's, of what it is given
        return "rows" not in wanted if role == "prior" else amortized and ("rows" not in wanted or role == "posterior")
    if tied := wanted & set(ROLES):
        return role == ("prior" if "posterior" in tied else "posterior")
    if wanted & {"levels", "columns"} and role != "likelihood":
        return False
    if role == "prior":
        others = [example(other) for other in classes(families) if not needs(other) & set(ROLES)]
        return any(o.reparameterised and families.same_support(o.support, example(kind).support) for o in others)
    return parametric(kind) and (role == "likelihood" or example(kind).reparameterised)


def sections(own: Mapping[str, type | None] = {}, *, opened: bool = False) -> dict[str, Section]:  # noqa: B006
    """What may stand in each table of a spec.

    Args:
        own: classes from files of code, by the table that names them; their keys are those of that table. A table
            whose class is None may hold any key.
        opened: whether all such tables may hold any key.
    """
    return _sections(tuple(own.items()), opened, tuple(classes(families)), tuple(classes(networks)))


@cache
def _sections(code: Any, opened: bool, kinds: tuple[Any, ...], nets: tuple[Any, ...]) -> dict[str, Section]:
    own = dict(code)

    def named(kind: Any, title: str, **more: Any) -> Any:
        tied = needs(kind) & set(ROLES)
        judge = _nothing if tied else partial(_judge_part, kind)
        return _table(title, kind, judge, family=(Literal[kind.__name__], ...), **more)

    def coded(place: str) -> tuple[Any, ...]:
        """What makes the table of a class from a file, as `_table` takes it."""
        kind = own.get(place)
        return kind or _nothing, _nothing, None, opened or (place in own and kind is None)

    count = Annotated[int, Field(ge=1)]
    data_name, pace = Annotated[str, AfterValidator(_judge_name)], Annotated[str, BeforeValidator(_judge_pace)]
    read = _keywords(load).keys() - {"dtype"}
    given: dict[str, Any] = {
        "program": (str | None, None),
        "given": _names("given", KEYS),
        "given_to": _names("given_to", ROLES),
    }
    judged: Any = {"samples": (count, 1000), "class_prior": _names("class_prior", PRIORS, list[float])}
    judged |= {"precision": (Precision, "full")}
    more_of_svi: Any = {
        "checkpoint": (pace, "60 s"),
        "start": (str | None, None),
        "freeze": (list[str] | str | None, None),
    }
    tables: dict[str, dict[str, Any]] = {
        "data": {"": _table("Data", load, _judge_data, read, name=(data_name, ...))},
        "model": {"": _table("Model", *coded("model"), latent=(count | None, None), **given)},
        "svi": {"": _table("Svi", fit, _judge_svi, SVI, **more_of_svi)},
        "evaluation": {"": _table("Evaluation", _nothing, **judged)},
    }
    inner: dict[str, dict[str, Any]] = {}
    all_networks = {net: named(net, net.__name__) for net in nets}
    for role in ROLES:
        place, title = f"{role}.network", f"{role.title()}Network"
        inner[role] = {net.__name__: model for net, model in all_networks.items() if plays(net, role)}
        if place in own:
            inner[role] = {"": _table(title, *coded(place), program=(str, ...))}
        kind_of_network = _union(inner[role])
        if opened and role != "prior":
            kind_of_network |= _table(title, *coded(place), program=(str, ...))
        field = (kind_of_network | None, None) if role == "prior" else (kind_of_network, ...)
        more: Any = {"network": field}
        if role == "posterior":
            more["encoding"] = (Annotated[Encodings, AfterValidator(_judge_encoding)] | None, None)
        tables[role] = {
            kind.__name__: named(
                kind,
                role.title() + kind.__name__,
                **(more if parametric(kind) else {}),
            )
            for kind in kinds
            if plays(kind, role)
        }
    return {name: Section(tables[name], inner.get(name, {}), TypeAdapter(_union(tables[name]))) for name in SECTIONS}


def _nothing(**keys: Any) -> None:
    """A constructor without keys of its own, which accepts whatever it is given."""


def _union(models: dict[str, Any]) -> Any:
    kinds = tuple(models.values())
    return kinds[0] if len(kinds) == 1 else Annotated[Union[kinds], Field(discriminator="family")]  # noqa: UP007


def _table(
    title: str, function: Any, judge: Any = _nothing, only: Any = None, opened: bool = False, /, **fixed: Any
) -> Any:
    """Make the model of a table from the keyword-only parameters of a function, or `only` some of them.

    `judge`, most often the function itself, is called with each value alone, so that every mistake is reported, and
    with all values together if each is right.
    """
    keys = {key: p for key, p in _keywords(function).items() if only is None or key in only}
    required = {key for key, p in keys.items() if p.default is p.empty}
    body = function.__init__ if inspect.isclass(function) else function
    hints = get_type_hints(body, localns={"Conditional": Conditional})

    def alone(key: str, value: Any) -> Any:
        if required <= {key} and value is not None:
            judge(**{key: value})
        return value

    def together(table: Any) -> Any:
        judge(**{key: getattr(table, key) for key in keys})
        return table

    def written(hint: Any) -> Any:
        """A hint without the kinds that TOML has not."""
        if get_origin(hint) not in (Union, types.UnionType):
            return hint
        parts = (part for part in get_args(hint) if get_origin(part) not in (os.PathLike, abc.Callable))
        return Union[tuple(parts)]  # noqa: UP007

    fields = {
        key: (
            Annotated[written(hints.get(key, Any)), AfterValidator(partial(alone, key))],
            ... if key in required else p.default,
        )
        for key, p in keys.items()
    }
    make: Any = create_model
    validators = {"together": model_validator(mode="after")(together)}
    return make(title, __base__=_Open if opened else _Table, __validators__=validators, **fixed, **fields)


def _judge_part(kind: Any, /, **keys: Any) -> None:
    """Let a constructor judge its keys, over two columns, or over those that the keys name."""
    kinds = keys.get("kinds")
    names = tuple(kinds) if isinstance(kinds, dict) and kinds else ("a", "b")
    real: Any = ("real",) * len(names)
    columns = Columns(len(names), (8, 8), names, real, (2,) * len(names))
    kind(**filled(kind, event=len(names), rows=1, **described(columns)), **keys)


def _judge_encoding(encoding: Encodings) -> Encodings:
    for word in encoding.values() if isinstance(encoding, dict) else [encoding]:
        check_choice("encoding", word, WORDS)
    return encoding


def _names(key: str, allowed: tuple[str, ...], several: Any = list[str]) -> Any:
    """One name of some, or several, or nothing."""

    def judge(names: Any) -> Any:
        for name in [names] if isinstance(names, str) else names:
            check_choice(key, name, allowed if isinstance(name, str) else (name,))
        return names

    return Annotated[str | several, AfterValidator(judge)] | None, None


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


def _judge_name(name: str) -> str:
    check_name(name)
    return name


def _judge_pace(given: Any) -> str:
    text = str(given)  # a number is told what to say
    Pace(text)
    return text
