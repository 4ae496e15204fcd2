"""Specs: TOML -> a checked, frozen `Spec` -> objects.

The constructors are the schema. A table's keys are the keyword-only parameters of what it names (a family, a network,
a program's class) or of `data.load` and `svi.fit`; these also judge the values. So a family that is added to
`families` can be written in a spec, and is in the JSON schema and in the list.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from torch.distributions import constraints

from ppl_vae import families
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import rows_within
from ppl_vae.data.columns import Columns
from ppl_vae.data.datasets import is_path, root_folder, unused_keys
from ppl_vae.data.loading import Data, load
from ppl_vae.programs.given import KEYS
from ppl_vae.programs.program import PyroPair, load_network, load_program
from ppl_vae.programs.rows import keywords
from ppl_vae.programs.vae import VAE
from ppl_vae.runs.assembly import as_list, assemble, on_columns, on_table, tied_to
from ppl_vae.runs.blame import blamed
from ppl_vae.runs.check import Check, check_program
from ppl_vae.runs.mistakes import explain
from ppl_vae.runs.remedies import guides, remedy, support_of
from ppl_vae.runs.schema import CPU, ROLES, SECTIONS, described, filled, needs, sections
from ppl_vae.runs.spec_file import Say, is_program, listed, merge, near, programs, quiet, read, show
from ppl_vae.runs.start import begin

Source = str | os.PathLike[str]
_OWN = {"latent", "program", "given", "given_to"}  # keys of `model` that are no program's
_OF_CODES = ("Bernoulli", "Categorical", "Mixed", "OrderedCategorical")  # likelihoods to which codes are no numbers
# for what can be built without the data
_TRIAL = Columns(64, (8, 8), levels=(2,) * 64, given={"y": (2,), "covariates": (0,)})


@dataclass(frozen=True)
class Spec:
    """The parts of a run, checked: each table as an attribute, its keys as attributes of that.

    Paths are absolute. Two specs are equal if all their keys are, wherever they were read.

    Attributes:
        path: the file it was read from.
        data: what to load; the keys are those of `data.load`.
        model: `latent`, and `program` with its keys if a program file takes the place of the three roles.
        prior: `family`, its keys, and its `network`, one of the library's by `family` or one of your own by `program`,
            with its keys; None beside a program.
        likelihood: likewise.
        posterior: likewise.
        svi: the keys of `fit`; `checkpoint`; `start`, a run whose weights are taken where they fit; and `freeze`, what
            is not learned: `taken`, or names of tensors or of what they begin with, such as `likelihood`.
        evaluation: `samples`, the draws per datum, and `precision` of their products.
    """

    path: Path = field(compare=False)
    data: Any
    model: Any
    prior: Any
    likelihood: Any
    posterior: Any
    svi: Any
    evaluation: Any

    @classmethod
    def from_dict(
        cls, tables: Mapping[str, Any], path: Source = "spec.toml", *, trust_code: bool = True, say: Say = quiet
    ) -> "Spec":
        """Check the tables of a spec.

        Args:
            tables: the tables by name, as in a TOML file.
            path: the file that they stand for: messages name it, and paths are relative to its folder.
            trust_code: whether the files of programs and networks may run; they do so here, to check their keys.
            say: told of each such file before it runs.

        Raises:
            ValueError: If any key is wrong: each of them, its value, and what is allowed.
        """
        path, raw = Path(path), merge(Path(path), tables, {})
        errors: list[str] = []
        own = _resolve(path.absolute().parent.resolve(), raw, errors, trust_code, say)
        program = own.get("model")
        if is_program(path) and program is not None and "latent" in needs(program):
            raw["model"].setdefault("latent", 10)
        if _table(raw, "model").get("given") and "program" not in raw["model"]:
            named = _table(_table(raw, "prior"), "network").get("family", "Free") != "Free"
            raw["model"].setdefault("given_to", ["prior"] * named + ["likelihood", "posterior"])
        known = sections(own)
        checked: dict[str, Any] = dict.fromkeys(SECTIONS)
        for name, section in known.items():
            if name in raw or name not in ROLES:
                try:
                    checked[name] = section.adapter.validate_python(raw.get(name, {}))
                except ValidationError as error:
                    errors += explain(error, name, raw.get(name), section)
        for name in [name for name in raw if name not in known]:
            homes = [
                f"{home}.{name}" for home in SECTIONS for t in known[home].tables.values() if name in t.model_fields
            ]
            hint = f" Did you mean {homes[0]}?" if homes else near(name, SECTIONS)
            errors.append(f"{name}: Expected the tables {', '.join(SECTIONS)}; got an unknown name.{hint}")
        spec = cls(path, **checked)
        errors += _conflicts(spec, raw, program)
        if errors:
            text = errors[0] if len(errors) == 1 else f"{len(errors)} mistakes:\n  " + "\n  ".join(errors)
            raise ValueError(f"{path}: {text}")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """All keys that apply, defaults filled in, as plain values."""
        tables = {name: getattr(self, name) for name in SECTIONS}
        plain = {name: table.model_dump(exclude_none=True) for name, table in tables.items() if table is not None}
        for key in unused_keys(self.data.name):
            plain["data"].pop(key, None)
        return plain

    @property
    def training(self) -> dict[str, Any]:
        """The keys of `[svi]` that `fit` takes: `fit(program, data, **spec.training)`."""
        return self.svi.model_dump(exclude={"checkpoint", "start", "freeze"})  # type: ignore[no-any-return]

    def to_toml(self) -> str:
        """The spec as TOML, which loads as an equal spec."""
        return tomli_w.dumps(self.to_dict())

    @property
    def programs(self) -> dict[str, str]:
        """The files of code that the spec names, `file.py:Class`, by the table that names them."""
        return {place: table["program"] for place, table in programs(self.to_dict())}

    def relocated(self, path: Path, references: Mapping[str, str]) -> "Spec":
        """The same spec at another path, with other places for the files of its `programs`."""
        parts = {}
        for place, reference in references.items():
            name, _, inner = place.partition(".")
            part, update = getattr(self, name), {"program": reference}
            parts[name] = part.model_copy(update={inner: part.network.model_copy(update=update)} if inner else update)
        return replace(self, path=path, **parts)

    def load_data(self) -> Data:
        """Read the data; columns that a program's model asks for by name become entries of the batch.

        Raises:
            ValueError: If they cannot be found or read, or do not suit the settings.
        """
        with _blamed(self):
            _check_there(self.data.name, self.path.absolute().parent.resolve())
            data = load(**self.to_dict()["data"])
        names = [] if self.model.program is None else keywords(load_program(self.model.program).model)  # type: ignore[attr-defined]
        return data.with_entries(name for name in names if name != "x")

    def build(self, data: Data | None = None) -> PyroPair:
        """Construct the program at a starting point fitted to the data, by `svi.seed` alone.

        Args:
            data: what `load_data` returned, from which sizes are read; by default loaded anew.

        Raises:
            ValueError: If the data do not fit the program.
        """
        data = self.load_data() if data is None else data
        with _blamed(self, data):
            if "y" in as_list(self.model.given) and "y" in data.train:
                _check_labels(data)
            program: Any = self.assemble(columns=data.columns, rows=len(next(iter(data.train.values()))))
            if hasattr(program, "initialise"):
                few = rows_within(data.features)
                keys = [key for key in ("x", "size_factor", "mask", *KEYS) if key in data.train]
                given = {key: data.train[key][:few].cpu() for key in keys}
                own = [given[key] for key in ("x", "mask") if key in given]
                if len(own) > 1 and "mask" not in keywords(program.initialise):
                    raise ValueError("Expected `initialise` to take `mask`, True if observed, since cells are missing.")
                with fork_rng(self.svi.seed, "initialise", device=CPU):
                    program.initialise(*([given] if isinstance(program, VAE) else own))
        return program

    def assemble(self, *, columns: Columns, rows: int) -> Any:
        """Construct the program for such data, without the data.

        Args:
            columns: the columns of `x`.
            rows: number of training data.

        Raises:
            ValueError: If a part needs to know of the columns what is not known.
        """
        with fork_rng(self.svi.seed, "build", device=CPU):
            if self.model.program is None:
                return assemble(self, columns, self.model.latent, rows)
            kind = load_program(self.model.program)
            sizes = filled(kind, features=columns.count, latent=self.model.latent, **described(columns))
            return kind(**sizes, **self.model.model_dump(exclude=_OWN))

    def check(self, data: Data, program: Any = None) -> Check:
        """Try all that a first step needs, and describe what training will do; nothing is trained.

        Args:
            data: what `load_data` returned.
            program: what `build` returned, by default built anew.

        Raises:
            ValueError: If data, program and objective do not fit; the message has the `--set` that mends it.
        """
        new = program is None
        program = self.build(data) if new else program
        with _blamed(self, data):
            found = check_program(program, data, **self.training)
            if new:
                found.hints.extend(begin(self, program)[1])
        words = ", ".join(data.columns.categories or {})
        if self.likelihood is not None and words and self.likelihood.family not in _OF_CODES:
            hint = f"{words}: words, whose codes a {self.likelihood.family} takes for numbers"
            found.hints.append(f'{hint}; use Mixed, with kinds = "infer", or leave_out')
        return found


def load_spec(
    path: Source, overrides: Mapping[str, Any] | None = None, *, trust_code: bool = True, say: Say = quiet
) -> Spec:
    """Read and check a spec.

    Args:
        path: a TOML file, or a program, `file.py[:Class]`, to be fitted to the digits with 10 latent variables.
        overrides: values by dotted key, set before anything is checked:
            `{"svi.epochs": 3, "likelihood.network.hidden": [50]}`. A whole table replaces the old one.
        trust_code: whether the files of programs and networks may run; they do so here, to check their keys.
        say: told of each such file before it runs.

    Raises:
        ValueError: If the file or any key is wrong: each of them, its value, and what is allowed.
    """
    path = Path(path)
    return Spec.from_dict(merge(path, read(path), overrides or {}), path, trust_code=trust_code, say=say)


def _resolve(folder: Path, raw: dict[str, Any], errors: list[str], trust_code: bool, say: Say) -> dict[str, Any]:
    """Make paths absolute, and load the classes that tables name, None for one that cannot be loaded."""
    data = _table(raw, "data")
    own: dict[str, Any] = {}
    name, root = data.get("name"), data.get("root")
    if isinstance(root, str):
        data["root"] = str((folder / Path(root).expanduser()).resolve())
    if isinstance(name, str) and is_path(name):
        data["name"] = _found(name, folder, root_folder(None)[0], Path.cwd())
    if isinstance(start := _table(raw, "svi").get("start"), str):
        raw["svi"]["start"] = _found(start, folder, Path.cwd())
    for place, table in programs(raw):
        file, colon, name = table["program"].partition(":")
        table["program"] = f"{(folder / Path(file).expanduser()).resolve()}{colon}{name}"
        own[place] = None
        try:
            if not trust_code:
                raise ValueError(f"Cannot run {table['program']} without --trust-code. Read its code first.")
            say(f"runs the code of {table['program']}")
            if place == "model":
                own[place] = load_program(table["program"], fresh=True)
            else:
                own[place] = load_network(table["program"], fresh=True)
                filled(own[place], context=1, outputs=1, shape=(1, 1))
        except ValueError as error:
            errors.append(f"{place}.program: {error}")
    return own


def _found(name: str, *folders: Path) -> str:
    """The absolute path of what lies in one of some folders, or would lie in the first."""
    places = [folder / Path(name).expanduser() for folder in folders]
    return str(next((place for place in places if place.exists()), places[0]).resolve())


def _check_there(name: str, home: Path) -> None:
    """Refuse the path of data that are not there, by all places where they were looked for."""
    if is_path(name) and not Path(name).exists() and Path(name).is_relative_to(home):
        inner = Path(name).relative_to(home)
        others = [str(folder / inner) for folder in (root_folder(None)[0], Path.cwd()) if folder.resolve() != home]
        nor = "".join(f", nor at {other}" for other in others)
        raise ValueError(f"Expected a data file at {name}; got no such file or folder{nor}. Correct the path.")


def _conflicts(spec: Spec, raw: dict[str, Any], program: type | None) -> Iterator[str]:
    """What is wrong between the tables, and what has no effect."""
    data, model, likelihood, posterior = spec.data, spec.model, spec.likelihood, spec.posterior
    latent = getattr(model, "latent", None)
    if data is not None:
        for key, owner in unused_keys(data.name).items():
            if key in data.model_fields_set:
                yield f"data.{key}: Expected no `{key}` for {owner}; got {show(getattr(data, key))}. Leave it out."
        if spec.svi is not None and spec.svi.keep == "best" and not data.validation_fraction:
            yield 'svi.keep: Expected validation data for "best"; got none. Try --set data.validation_fraction=0.1.'
    if "program" in _table(raw, "model"):
        for role in ROLES:
            if role in raw:
                yield f"{role}: Expected no such table beside model.program, which takes its place; got one."
        for key in {"given", "given_to"} & raw["model"].keys():
            yield f"model.{key}: Expected no `{key}` beside model.program, which takes y or covariates by name."
        if program is not None and model is not None:
            try:
                takes = filled(program, features=1, latent=latent, **described(_TRIAL))
            except ValueError as error:
                yield f"model.program: {error}"
            else:
                if ("latent" in takes) != (latent is not None):
                    no = "" if "latent" in takes else "no "
                    yield f"model.latent: Expected {no}`latent` for {program.__name__}; got {show(latent)}."
        return
    for role in ROLES:
        if role not in raw:
            yield f"{role}: Expected a table with family {listed(sections()[role].tables)}, or model.program; got none."
    if model is not None and latent is None:
        yield "model.latent: Expected the number of latent variables; got none. Try --set model.latent=2."
    given = as_list(getattr(model, "given", None))
    if model is not None and model.given_to and not given:
        yield f"model.given_to: Expected `given` beside it; got none. Try --set model.given={KEYS[0]}."
    if getattr(spec.evaluation, "class_prior", None) is not None and "y" not in given:
        yield "evaluation.class_prior: Expected a model that is given labels; got another. Try --set model.given=y."
    if data is not None and on_table(posterior) and data.validation_fraction:
        yield (
            f"data.validation_fraction: Expected 0 for a posterior on a {posterior.network.family}, which knows its "
            f"training data alone; got {data.validation_fraction}. Leave it out, or use Linear or MLP."
        )
    if data is not None and likelihood is not None and data.binarization != "none":
        real = families.same_support(support_of(likelihood), constraints.real)
        if real and not isinstance(getattr(likelihood, "scale", None), float):
            yield (
                f"data.binarization: Expected none for a {likelihood.family} likelihood that learns its scale, whose "
                f"density of zeros and ones has no bound; got {show(data.binarization)}. Try --set "
                "data.binarization=none, a Bernoulli, or a fixed scale."
            )
    if latent is not None and None not in (spec.prior, likelihood, posterior) and not on_columns(likelihood):
        try:
            with fork_rng(0, device=CPU):
                assemble(spec, _TRIAL, latent=latent, rows=1, own=False)
        except ValueError as error:
            remedy = guides(spec) if "reparameterised posterior" in str(error) else ""
            free = "where nothing is given" in str(error)
            place = "prior.network.family" if free else "prior" if tied_to(spec.prior) else "posterior"
            yield f"{place}: {error}{remedy}"


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A table as it stands in the file; an empty one if it is no table."""
    table = raw.get(name)
    return table if isinstance(table, dict) else {}


@contextmanager
def _blamed(spec: Spec, data: Data | None = None) -> Iterator[None]:
    """Name the spec in an error, with the line of a program's file, or with the `--set` that mends it."""
    try:
        with blamed(spec.programs):
            yield
    except ValueError as error:
        mends = "" if data is None or spec.likelihood is None else remedy(spec, data, str(error))
        raise ValueError(f"{spec.path}: {error}{mends}") from error


def _check_labels(data: Data) -> None:
    """Refuse labels that the training part lacks."""
    parts = [part["y"].tolist() for part in (data.train, data.validation or {"y": data.train["y"]}, data.test)]
    if strange := {*parts[1], *parts[2]} - {*parts[0]}:
        words = ", ".join(data.classes[label] if data.classes else str(label) for label in sorted(strange))
        raise ValueError(
            f"Expected each label in the training part, for a model that is given labels; got {words} in other parts "
            f"alone. Try another split: --set data.seed={data.protocol['seed'] + 1}; or leave such rows out."
        )
