"""Specs: TOML -> a checked, frozen `Spec` -> objects. The only place that knows TOML.

The constructors are the schema. A table's keys are the keyword-only parameters of what it names (a family, a network,
a program's class) or of `data.load` and `svi.fit`; these also judge the values. So a family that is added to
`families.__all__` can be written in a spec, stands in the JSON schema and in the list, with nothing to do here.
"""

import difflib
import inspect
import json
import math
import os
import re
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pyro
import tomli_w
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
from torch.distributions import constraints

from ppl_vae import data as datasets
from ppl_vae import families, networks, svi
from ppl_vae.conditional import Conditional
from ppl_vae.data import Data
from ppl_vae.program import VAE, PyroPair, load_program, prepare, scope, seeded, structure, trace_pair

__all__ = ["Check", "Component", "Spec", "components", "json_schema", "load_spec", "parse_override"]

ROLES = ("prior", "likelihood", "posterior")
SECTIONS = ("data", "model", *ROLES, "svi", "evaluation")
SVI = (*svi.SETTINGS, "seed")
CPU = torch.device("cpu")


class _Table(BaseModel):
    """A table of a spec: typed as TOML is, without unknown keys, not to be changed."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )


class _Open(_Table):
    """A table whose other keys are checked elsewhere."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class Spec:
    """The parts of a run, checked: each table as an attribute, its keys as attributes of that.

    Paths are absolute. Two specs are equal where all their keys are, wherever they were read.

    Attributes:
        path: the file it was read from.
        data: what to load; the keys are those of `data.load`.
        model: `latent`, and `program` with its keys where a program file takes the place of the three roles.
        prior, likelihood, posterior: `family`, its keys, and its `network`; None beside a program.
        svi: the keys of `fit`.
        evaluation: `samples`, the draws a datum.
    """

    path: Path = field(compare=False)
    data: Any
    model: Any
    prior: Any
    likelihood: Any
    posterior: Any
    svi: Any
    evaluation: Any

    def to_dict(self) -> dict[str, Any]:
        """Give all keys that apply, defaults filled in, as plain values."""
        tables = {name: getattr(self, name) for name in SECTIONS}
        plain = {name: table.model_dump(exclude_none=True) for name, table in tables.items() if table is not None}
        for key in _idle(self.data):
            plain["data"].pop(key, None)
        return plain

    def to_toml(self) -> str:
        """Write the spec out; to load this gives an equal spec."""
        return tomli_w.dumps(self.to_dict())

    def load_data(self) -> Data:
        """Read the data.

        Raises:
            ValueError: where they cannot be found or read, or do not suit the settings.
        """
        keys = {key: value for key, value in self.to_dict()["data"].items() if key != "name"}
        with _named(self):
            return datasets.load(self.data.name, **keys)

    def build(self, data: Data | None = None) -> PyroPair:
        """Construct the program at a starting point fitted to the data, by `svi.seed` alone.

        Args:
            data: what `load_data` gave; loaded where left out. Sizes are read from it.

        Raises:
            ValueError: where the data do not fit the program.
        """
        data = self.load_data() if data is None else data
        x = data.train["x"]
        sizes = {"features": data.features, "latent": self.model.latent}
        with _named(self, data), seeded(self.svi.seed, "build", device=CPU):
            if self.model.program is None:
                program: Any = _assemble(self, **sizes, rows=len(x))
            else:
                made = load_program(self.model.program)
                program = made(**_filled(made, **sizes), **self.model.model_dump(exclude={"latent", "program"}))
            if hasattr(program, "initialise"):
                program.initialise(x.cpu())
        return program

    def check(self, data: Data) -> "Check":
        """Try everything that a first step needs, and say what is to come; nothing is trained.

        Raises:
            ValueError: where data, program and objective do not fit; the message prints the `--set` that mends it.
        """
        program: Any = self.build(data)
        known = [data.train] if _on_table(self.posterior) else [data.test, data.validation, data.train]
        values = [] if not isinstance(program, torch.nn.Module) else list(program.named_parameters())
        counts: dict[str, int] = {}
        for name, value in values:
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + value.numel()
        with _named(self, data):
            for part in known:
                batch = prepare(program, part) if part is not None else {}
            found = structure(program, batch, seed=self.svi.seed)
            svi.check_objective(self.svi.elbo, found)
            few = {key: value[:100] for key, value in batch.items()}
            trace, kept = _trace(program, few, self.svi.particles, found.nesting, self.svi.seed)
        n, size = len(data.train["x"]), min(self.svi.batch_size, len(data.train["x"]))
        held = sum(part.nbytes for part in batch.values()) + 4 * sum(value.nbytes for _, value in values)
        return Check(
            data=data.name,
            n_train=n,
            features=data.features,
            latents={name: tuple(trace.nodes[name]["fn"].event_shape) for name in found.latents},
            observed={name: tuple(trace.nodes[name]["fn"].event_shape) for name in found.observed},
            kl={name: "sampled" if self.svi.elbo == "Trace_ELBO" else kind for name, kind in found.kl.items()},
            parameters=counts,
            epochs=self.svi.epochs,
            steps=self.svi.epochs * math.ceil(n / self.svi.batch_size),
            memory=held + 2 * kept * size // min(n, 100),
        )


@dataclass(frozen=True)
class Check:
    """What `Spec.check` found; `str` gives it as a page for people.

    Args:
        data: the name of the data.
        n_train: data for training.
        features: columns of `x`.
        latents: the latent sites in the model's order and the shape of an event of each.
        observed: the observed sites, likewise.
        kl: for each latent site, whether the objective takes its KL term `analytic` or `sampled`.
        parameters: how many numbers each part learns.
        epochs: passes over the data.
        steps: optimiser steps in all.
        memory: a rough estimate of the bytes that training takes, beyond the libraries themselves.
    """

    data: str
    n_train: int
    features: int
    latents: dict[str, tuple[int, ...]]
    observed: dict[str, tuple[int, ...]]
    kl: dict[str, str]
    parameters: dict[str, int]
    epochs: int
    steps: int
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """Give the findings as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        sites = [f"{name} {('n', *shape)} latent, KL {self.kl[name]}" for name, shape in self.latents.items()]
        sites += [f"{name} {('n', *shape)} observed" for name, shape in self.observed.items()]
        counts = [f"{name} {count:,}" for name, count in self.parameters.items()]
        return "\n".join(
            [
                f"data        {self.data}: {self.n_train:,} data for training, of {self.features} features",
                f"sites       {'; '.join(sites)}".replace("'n'", "n").replace("(n,)", "(n)"),
                f"parameters  {', '.join(counts) or 'none'}; {sum(self.parameters.values()):,} in all",
                f"to come     {self.steps:,} steps in {self.epochs:,} epochs",
                f"memory      about {max(self.memory / 2**20, 0.1):.1f} MiB",
            ]
        )


class Component(NamedTuple):
    """A family or network that a spec can name.

    `keys` holds the keys of its table with their defaults, None for one that must be given.
    """

    role: str
    name: str
    doc: str
    keys: dict[str, Any]


def load_spec(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, *, trust_code: bool = True
) -> Spec:
    """Read and check a spec.

    Args:
        path: a TOML file.
        overrides: values by dotted key, put in their place before anything is checked:
            `{"svi.epochs": 3, "likelihood.network.hidden": [50]}`. A whole table may be given; it replaces the old one.
        trust_code: whether the file of `model.program` may run; it does so here, for its keys to be checked.

    Raises:
        ValueError: naming the file and, all at once, each key that is wrong, its value, and what is allowed.
    """
    path = Path(path)
    raw = _merge(path, _read(path), overrides or {})
    errors: list[str] = []
    program = _resolve(path.resolve().parent, raw, errors, trust_code)
    paired = isinstance(raw.get("model"), dict) and "program" in raw["model"]
    sections = _sections(program, opened=paired and program is None)
    tables: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name, section in sections.items():
        if name in raw or name not in ROLES:
            try:
                tables[name] = section.adapter.validate_python(raw.get(name, {}))
            except ValidationError as error:
                errors += _explain(error, name, raw.get(name), section)
    for name in [name for name in raw if name not in sections]:
        homes = [
            f"{home}.{name}" for home in SECTIONS for m in sections[home].tables.values() if name in m.model_fields
        ]
        near = f" Did you mean {homes[0]}?" if homes else _near(name, SECTIONS)
        errors.append(f"{name}: Expected the tables {', '.join(SECTIONS)}; got an unknown name.{near}")
    spec = Spec(path, **tables)
    errors += _clashes(spec, raw, program, paired)
    if errors:
        text = errors[0] if len(errors) == 1 else f"{len(errors)} mistakes:\n  " + "\n  ".join(errors)
        raise ValueError(f"{path}: {text}")
    return spec


def parse_override(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`: the value is TOML; what does not parse as TOML is a string.

    Raises:
        ValueError: without `=` or a key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"Expected KEY=VALUE, such as svi.epochs=3; got {text!r}.")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return key.strip(), parsed["value"] if list(parsed) == ["value"] else value.strip()


def json_schema() -> dict[str, Any]:
    """Give the JSON schema of a spec, for editors."""
    fields: dict[str, Any] = {}
    for name, section in _sections(None, opened=True).items():
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
        raise ValueError(f"Expected a role, one of {', '.join(known)}; got {role!r}.{_near(role, known)}")
    found = []
    for each in known if role is None else (role,):
        for kind in _classes(networks) if each == "network" else [k for k in _classes(families) if _plays(k, each)]:
            first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
            doc = re.sub(r",? ?:math:`[^`]*`|\*", "", first)
            found.append(Component(each, kind.__name__, doc, _keys(kind)))
    return found


def _read(path: Path) -> dict[str, Any]:
    """Parse a file, or say what is wrong with it and where."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        there = [str(other) for other in sorted(path.parent.glob("*.toml"))]
        raise ValueError(f"Expected a spec at {path.absolute()}; got no such file.{_near(path, there)}") from None
    except IsADirectoryError:
        there = [other.name for other in sorted(path.glob("*.toml"))]
        raise ValueError(f"Expected a TOML file; got the folder {path}, which holds {_list(there)}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a TOML file in UTF-8; got {path}: {error}") from error
    if not text.strip():
        raise ValueError(f"Expected a spec with the tables {', '.join(SECTIONS)}; got the empty file {path}.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        raise ValueError(f"{path}, {where.rstrip(')')}: Expected TOML; got a mistake: {what}.") from error


def _merge(path: Path, raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put each override in its place."""
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        here = raw
        for i, part in enumerate(parents):
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                where = ".".join(parents[: i + 1])
                raise ValueError(f"{path}: {dotted}: Expected {where} to be a table; got {_show(here)}.")
        if not all((*parents, last)):
            raise ValueError(f"{path}: Expected keys with dots between them, such as svi.epochs; got {dotted!r}.")
        here[last] = _plain(value)
    return raw


def _plain(value: Any) -> Any:
    """Turn what Python has and TOML has not into what TOML has."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _resolve(folder: Path, raw: dict[str, Any], errors: list[str], trust_code: bool) -> type | None:
    """Make paths absolute, and load the program's class if there is one."""
    data, model = raw.get("data"), raw.get("model")
    if isinstance(data, dict):
        name, root = data.get("name"), data.get("root")
        if isinstance(root, str):
            data["root"] = str((folder / Path(root).expanduser()).resolve())
        if isinstance(name, str) and _is_path(name):
            places = [place / Path(name).expanduser() for place in (folder, datasets._root(None)[0])]
            data["name"] = str(next((place for place in places if place.exists()), places[0]).resolve())
    if not isinstance(model, dict) or not isinstance(model.get("program"), str):
        return None
    file, colon, name = model["program"].partition(":")
    model["program"] = f"{(folder / Path(file).expanduser()).resolve()}{colon}{name}"
    if not trust_code:
        errors.append(
            f"model.program: Expected leave to run the code of {model['program']}; got none. If you know that "
            "code, give --trust-code."
        )
        return None
    try:
        return load_program(model["program"])
    except ValueError as error:
        errors.append(f"model.program: {error}")
        return None


def _is_path(name: str) -> bool:
    return name not in datasets._NAMES and (bool(Path(name).suffix) or len(Path(name).parts) > 1)


def _classes(module: types.ModuleType) -> list[Any]:
    return [getattr(module, name) for name in module.__all__]


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Choose the parameters that are the keys of a table."""
    return {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _keys(function: Callable[..., Any]) -> dict[str, Any]:
    """Give the keys of a table with their defaults, None where one must be given."""
    return {key: None if p.default is p.empty else p.default for key, p in _keywords(function).items()}


def _needs(function: Callable[..., Any]) -> set[str]:
    """Name the positional parameters, which whoever builds fills in."""
    found = inspect.signature(function).parameters.items()
    return {key for key, p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty}


def _filled(function: Callable[..., Any], **known: Any) -> dict[str, Any]:
    """Choose what a constructor's positional parameters ask for."""
    if strange := _needs(function) - known.keys():
        raise ValueError(
            f"Expected positional parameters of {function.__name__} among {', '.join(known)}; got "
            f"{', '.join(sorted(strange))}. Make settings keyword-only."
        )
    return {key: value for key, value in known.items() if key in _needs(function)}


def _parametric(family: Any) -> bool:
    """Whether a family has parameters that a network may give."""
    if _needs(family) & set(ROLES):
        return False
    with seeded(0, device=CPU):
        return None in _keys(family).values() or family(2).start().numel() > 0


def _plays(kind: type[Any], role: str) -> bool:
    """Whether a family or network can play a role, by what it needs, its support and its being reparameterised."""
    needs = _needs(kind)
    if issubclass(kind, networks.Network):
        amortized = not issubclass(kind, networks.Free)
        return not amortized if role == "prior" else amortized and ("rows" not in needs or role == "posterior")
    if tied := needs & set(ROLES):
        return role not in tied
    if role == "prior":
        return any(other.reparameterised and other.support is kind.support for other in _classes(families))
    return _parametric(kind) and (role == "likelihood" or kind.reparameterised)


class _Section(NamedTuple):
    """What may stand in a table: a model, or one for each family; and those of the networks in it."""

    tables: dict[str, Any]
    networks: dict[str, Any]
    adapter: TypeAdapter[Any]


def _sections(program: type | None = None, *, opened: bool = False) -> dict[str, _Section]:
    return _generated(program, opened, tuple(_classes(families)), tuple(_classes(networks)))


@cache
def _generated(program: Any, opened: bool, kinds: tuple[Any, ...], nets: tuple[Any, ...]) -> dict[str, _Section]:
    """Make the models of all tables out of the constructors."""

    def nothing() -> None: ...

    def named(kind: Any, name: str, **more: Any) -> Any:
        free = _keywords(kind) and not _needs(kind) & set(ROLES)
        judge = partial(kind, **_filled(kind, event=2, rows=1)) if free else None
        return _table(name, kind, judge, family=(Literal[kind.__name__], ...), **more)

    count = Annotated[int, Field(ge=1)]
    tables: dict[str, dict[str, Any]] = {
        "data": {
            "": _table(
                "Data",
                datasets.load,
                _judge_data,
                only=_keywords(datasets.load).keys() - {"dtype"},
                name=(Annotated[str, AfterValidator(_judge_name)], ...),
            )
        },
        "model": {
            "": _table(
                "Model", program or nothing, opened=opened, latent=(count | None, None), program=(str | None, None)
            )
        },
        "svi": {"": _table("Svi", svi.fit, _judge_svi, only=SVI)},
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
    datasets.keyed(keys.get("seed", 0))
    svi.check_settings(**keys)


def _judge_data(**keys: Any) -> None:
    """Let `load` judge its settings, which it does before it looks for a file that is not there."""
    try:
        datasets.load(f"{os.devnull}/none.npz", **keys)
    except ValueError as error:
        if "no such file" not in str(error):
            raise


def _judge_name(name: str) -> str:
    if name not in datasets._NAMES and not _is_path(name):
        datasets.load(name)
    return name


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "model": "a table",
}


def _explain(error: ValidationError, name: str, raw: Any, section: _Section) -> list[str]:
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
        got, hint = _show(here), ""
        if kind.startswith("union_tag"):
            where, here = f"{where}.family", here.get("family")
            expected, got, hint = _list(tables), _show(here), _near(here, tables)
            if table is raw and here in families.__all__:
                roles = [role for role in ROLES if _plays(getattr(families, here), role)]
                hint = f" {here} can be {_list(roles)}, not {name}."
        elif kind == "extra_forbidden":
            expected, got, hint = _list(known), f"the unknown key {key} = {got}", _near(key, known)
            homes = [title for title, table in tables.items() if key in table.model_fields]
            if homes and key == "network":
                hint = f" {parent['family']} has no parameters for a network to give. Leave it out."
            elif homes:
                whole = f'{where.removesuffix("." + key)}={{family = "{parent["family"]}"}}'
                hint = f" It belongs to {_list(homes)}; to change the family replace the whole table, --set '{whole}'."
        elif kind == "missing":
            key, got = str(each["loc"][-1]), "none"
            where, expected = f"{where}.{key}", _hint(known[key].annotation)
            if key == "network":
                expected = f'a network ({_list(section.networks)}), such as {{family = "MLP", hidden = [200, 200]}}'
        elif kind == "literal_error":
            expected = context["expected"].replace("'", '"')
            hint = _near(here, re.findall(r'"([^"]*)"', expected))
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


def _list(words: Any) -> str:
    return ", ".join(map(str, words)) or "none"


def _hint(kind: Any) -> str:
    return {str: "text", int: "a whole number", float: "a number"}.get(kind, str(kind).replace("typing.", ""))


def _near(word: Any, known: Any) -> str:
    """Suggest the nearest spelling."""
    lower = {str(each).lower(): each for each in known}
    close = difflib.get_close_matches(str(word).lower(), lower, 1)
    return f" Did you mean {lower[close[0]]}?" if close else ""


def _show(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _on_table(part: Any) -> bool:
    """Whether a part keeps one row a datum."""
    network = getattr(part, "network", None)
    return network is not None and "rows" in _needs(getattr(networks, network.family))


def _idle(data: Any) -> dict[str, str]:
    """Give the keys of [data] without effect, and what they have none on."""
    if data.name == "digits":
        return dict.fromkeys(
            ("root", "array", "download", "test_fraction"), "digits, which are embedded, split and all"
        )
    if not _is_path(data.name):
        return dict.fromkeys(("array", "test_fraction"), f"{data.name}, which has a split of its own")
    found = dict.fromkeys(("root", "download"), "the path of a file; `name` says where it lies")
    return found if data.name.lower().endswith(".npz") else {**found, "array": "a file that is no .npz"}


def _clashes(spec: Spec, raw: dict[str, Any], program: type | None, paired: bool) -> Iterator[str]:
    """Say what is wrong between tables, and what has no effect."""
    data, model, likelihood, posterior = spec.data, spec.model, spec.likelihood, spec.posterior
    if data is not None:
        for key, owner in _idle(data).items():
            if key in data.model_fields_set:
                yield f"data.{key}: Expected no `{key}` for {owner}; got {_show(getattr(data, key))}. Leave it out."
        if spec.svi is not None and spec.svi.keep == "best" and not data.validation_fraction:
            yield (
                'svi.keep: Expected validation data for keep = "best"; got data.validation_fraction = 0. Try '
                '--set data.validation_fraction=0.1, or keep = "last".'
            )
    if paired:
        for role in ROLES:
            if role in raw:
                yield f"{role}: Expected no such table beside model.program, which takes its place; got one."
        if program is not None and model is not None:
            try:
                takes = _filled(program, features=1, latent=model.latent)
            except ValueError as error:
                yield f"model.program: {error}"
            else:
                if ("latent" in takes) != (model.latent is not None):
                    no = "" if "latent" in takes else "no "
                    yield f"model.latent: Expected {no}`latent` for {program.__name__}; got {_show(model.latent)}."
        return
    for role in ROLES:
        if role not in raw:
            yield f"{role}: Expected a table with family {_list(_sections()[role].tables)}, or model.program; got none."
    if model is not None and model.latent is None:
        yield "model.latent: Expected the number of latent variables; got none. Try --set model.latent=2."
    if data is not None and _on_table(posterior) and data.validation_fraction:
        yield (
            f"data.validation_fraction: Expected 0 for a posterior on a {posterior.network.family}, which knows its "
            f"training data alone; got {data.validation_fraction}. Leave it out, or use Linear or MLP."
        )
    if data is not None and likelihood is not None and data.binarization != "none":
        real = getattr(families, likelihood.family).support is constraints.real
        if real and not isinstance(getattr(likelihood, "scale", None), float):
            yield (
                f"data.binarization: Expected none for a {likelihood.family} likelihood that learns its scale; got "
                f"{_show(data.binarization)}. On zeros and ones its density grows without bound. Try --set "
                "data.binarization=none, or a Bernoulli, or a fixed scale."
            )
    if model is not None and model.latent is not None and None not in (spec.prior, likelihood, posterior):
        try:
            with seeded(0, device=CPU):
                _assemble(spec, features=2, latent=model.latent, rows=1)
        except ValueError as error:
            yield f"posterior: {error}"


def _assemble(spec: Spec, features: int, latent: int, rows: int) -> VAE:
    """Build the three conditionals, those last that are tied to others."""
    parts: dict[str, Any] = {}
    for role in sorted(ROLES, key=lambda role: len(_needs(getattr(families, getattr(spec, role).family)) & set(ROLES))):
        table = getattr(spec, role)
        family, network = getattr(families, table.family), getattr(table, "network", None)
        event = features if role == "likelihood" else latent
        made = family(**_filled(family, event=event, **parts), **table.model_dump(exclude={"family", "network"}))
        if network is not None:
            kind = getattr(networks, network.family)
            network = kind(**_filled(kind, rows=rows), **network.model_dump(exclude={"family"}))
        context = {"prior": (), "likelihood": (latent,), "posterior": (features,)}[role]
        parts[role] = Conditional(made, network).bind(*context)
    return VAE(**parts)


@contextmanager
def _named(spec: Spec, data: Data | None = None) -> Iterator[None]:
    """Name the file in an error, and print the `--set` that mends it where one does."""
    try:
        yield
    except ValueError as error:
        remedy = ""
        if data is not None and spec.likelihood is not None:
            x = data.train["x"]
            learned = getattr(spec.likelihood, "scale", None)
            outside = not bool(getattr(families, spec.likelihood.family).support.check(x).all())
            if outside and data.protocol["maximum"] is not None:
                unscaled = " --set data.scaling=none" if spec.data.scaling == "standardize" else ""
                remedy = f" Try --set data.binarization=dynamic{unscaled}."
            elif learned in ("network", "feature") and bool((x == x[0]).all(0).any()):
                remedy = " Try --set likelihood.scale=shared."
        raise ValueError(f"{spec.path}: {error}{remedy}") from error


def _trace(program: Any, batch: dict[str, torch.Tensor], particles: int, nesting: int, seed: int) -> tuple[Any, int]:
    """Score a batch under Pyro's validation: the model's trace, and the bytes kept for gradients."""
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    first = next(iter(batch.values()))
    with scope(program), seeded(seed, device=first.device), pyro.validation_enabled(True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            try:
                traces = trace_pair(program, batch, particles, nesting)
                for trace in traces:
                    trace.compute_log_prob()
            except RuntimeError as error:
                raise ValueError(
                    "Expected a program that also runs with dims of particles left of the data's, as evidence needs: "
                    f"shapes (..., n, event); it raised: {str(error).splitlines()[0]}"
                ) from error
    held = [*batch.values(), *(program.parameters() if isinstance(program, torch.nn.Module) else ())]
    for value in held:
        kept.pop(value.untyped_storage().data_ptr(), None)
    return traces[0], sum(kept.values())
