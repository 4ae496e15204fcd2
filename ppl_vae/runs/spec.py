"""Specs: TOML -> a checked, frozen `Spec` -> objects. The only place that knows TOML.

The constructors are the schema. A table's keys are the keyword-only parameters of what it names (a family, a network,
a program's class) or of `data.load` and `svi.fit`; these also judge the values. So a family that is added to
`families.__all__` can be written in a spec, stands in the JSON schema and in the list, with nothing to do here.
"""

import math
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pydantic import ValidationError
from torch.distributions import constraints

from ppl_vae import families, networks
from ppl_vae._seeds import fork_rng
from ppl_vae.data.datasets import root_folder
from ppl_vae.data.loading import Data, load
from ppl_vae.families.conditional import Conditional
from ppl_vae.infer.objectives import check_objective
from ppl_vae.programs.program import PyroPair, load_program
from ppl_vae.programs.traces import check_batch, structure
from ppl_vae.programs.vae import VAE
from ppl_vae.runs.check import Check, try_out
from ppl_vae.runs.schema import CPU, ROLES, SECTIONS, explain, filled, is_path, needs, sections
from ppl_vae.runs.spec_file import is_program, listed, merge, near, read, show


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
            return load(self.data.name, **keys)

    def build(self, data: Data | None = None) -> PyroPair:
        """Construct the program at a starting point fitted to the data, by `svi.seed` alone.

        Args:
            data: what `load_data` gave; loaded where left out. Sizes are read from it.

        Raises:
            ValueError: where the data do not fit the program.
        """
        data = self.load_data() if data is None else data
        x = data.train["x"]
        with _named(self, data):
            program: Any = self.assemble(features=data.features, rows=len(x))
            if hasattr(program, "initialise"):
                with fork_rng(self.svi.seed, "initialise", device=CPU):
                    program.initialise(x.cpu())
        return program

    def assemble(self, *, features: int, rows: int) -> Any:
        """Construct the program for data of these sizes, without the data.

        Args:
            features: columns of `x`.
            rows: data for training.
        """
        with fork_rng(self.svi.seed, "build", device=CPU):
            if self.model.program is None:
                return _assemble(self, features, self.model.latent, rows)
            made = load_program(self.model.program)
            sizes = filled(made, features=features, latent=self.model.latent)
            return made(**sizes, **self.model.model_dump(exclude={"latent", "program"}))

    def check(self, data: Data, program: Any = None) -> "Check":
        """Try everything that a first step needs, and say what is to come; nothing is trained.

        Args:
            data: what `load_data` gave.
            program: what `build` gave, built anew where left out.

        Raises:
            ValueError: where data, program and objective do not fit; the message prints the `--set` that mends it.
        """
        program = self.build(data) if program is None else program
        known = [data.train] if _on_table(self.posterior) else [data.test, data.validation, data.train]
        values = [] if not isinstance(program, torch.nn.Module) else list(program.named_parameters())
        counts: dict[str, int] = {}
        for name, value in values:
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + value.numel()
        with _named(self, data):
            for part in known:
                batch = check_batch(program, part) if part is not None else {}
            found = structure(program, batch, seed=self.svi.seed)
            check_objective(self.svi.elbo, found)
            few = {key: value[:100] for key, value in batch.items()}
            trace, kept = try_out(program, few, self.svi.particles, found.nesting, self.svi.seed)
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


def load_spec(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, *, trust_code: bool = True
) -> Spec:
    """Read and check a spec.

    Args:
        path: a TOML file, or a program, `file.py[:Class]`, to be fitted to the digits with 10 latent variables.
        overrides: values by dotted key, put in their place before anything is checked:
            `{"svi.epochs": 3, "likelihood.network.hidden": [50]}`. A whole table may be given; it replaces the old one.
        trust_code: whether the file of `model.program` may run; it does so here, for its keys to be checked.

    Raises:
        ValueError: naming the file and, all at once, each key that is wrong, its value, and what is allowed.
    """
    path = Path(path)
    raw = merge(path, read(path), overrides or {})
    errors: list[str] = []
    program = _resolve(path.absolute().parent.resolve(), raw, errors, trust_code)
    if is_program(path) and program is not None and "latent" in needs(program):
        raw["model"].setdefault("latent", 10)
    paired = isinstance(raw.get("model"), dict) and "program" in raw["model"]
    known = sections(program, opened=paired and program is None)
    tables: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name, section in known.items():
        if name in raw or name not in ROLES:
            try:
                tables[name] = section.adapter.validate_python(raw.get(name, {}))
            except ValidationError as error:
                errors += explain(error, name, raw.get(name), section)
    for name in [name for name in raw if name not in known]:
        homes = [f"{home}.{name}" for home in SECTIONS for m in known[home].tables.values() if name in m.model_fields]
        hint = f" Did you mean {homes[0]}?" if homes else near(name, SECTIONS)
        errors.append(f"{name}: Expected the tables {', '.join(SECTIONS)}; got an unknown name.{hint}")
    spec = Spec(path, **tables)
    errors += _clashes(spec, raw, program, paired)
    if errors:
        text = errors[0] if len(errors) == 1 else f"{len(errors)} mistakes:\n  " + "\n  ".join(errors)
        raise ValueError(f"{path}: {text}")
    return spec


def _resolve(folder: Path, raw: dict[str, Any], errors: list[str], trust_code: bool) -> type | None:
    """Make paths absolute, and load the program's class if there is one."""
    data, model = raw.get("data"), raw.get("model")
    if isinstance(data, dict):
        name, root = data.get("name"), data.get("root")
        if isinstance(root, str):
            data["root"] = str((folder / Path(root).expanduser()).resolve())
        if isinstance(name, str) and is_path(name):
            places = [place / Path(name).expanduser() for place in (folder, root_folder(None)[0], Path.cwd())]
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


def _on_table(part: Any) -> bool:
    """Whether a part keeps one row a datum."""
    network = getattr(part, "network", None)
    return network is not None and "rows" in needs(getattr(networks, network.family))


def _idle(data: Any) -> dict[str, str]:
    """Give the keys of [data] without effect, and what they have none on."""
    if data.name == "digits":
        return dict.fromkeys(
            ("root", "array", "download", "test_fraction"), "digits, which are embedded, split and all"
        )
    if not is_path(data.name):
        return dict.fromkeys(("array", "test_fraction"), f"{data.name}, which has a split of its own")
    found = dict.fromkeys(("root", "download"), "the path of a file; `name` says where it lies")
    return found if data.name.lower().endswith(".npz") else {**found, "array": "a file that is no .npz"}


def _clashes(spec: Spec, raw: dict[str, Any], program: type | None, paired: bool) -> Iterator[str]:
    """Say what is wrong between tables, and what has no effect."""
    data, model, likelihood, posterior = spec.data, spec.model, spec.likelihood, spec.posterior
    if data is not None:
        for key, owner in _idle(data).items():
            if key in data.model_fields_set:
                yield f"data.{key}: Expected no `{key}` for {owner}; got {show(getattr(data, key))}. Leave it out."
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
                takes = filled(program, features=1, latent=model.latent)
            except ValueError as error:
                yield f"model.program: {error}"
            else:
                if ("latent" in takes) != (model.latent is not None):
                    no = "" if "latent" in takes else "no "
                    yield f"model.latent: Expected {no}`latent` for {program.__name__}; got {show(model.latent)}."
        return
    for role in ROLES:
        if role not in raw:
            yield f"{role}: Expected a table with family {listed(sections()[role].tables)}, or model.program; got none."
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
                f"{show(data.binarization)}. On zeros and ones its density grows without bound. Try --set "
                "data.binarization=none, or a Bernoulli, or a fixed scale."
            )
    if model is not None and model.latent is not None and None not in (spec.prior, likelihood, posterior):
        try:
            with fork_rng(0, device=CPU):
                _assemble(spec, features=2, latent=model.latent, rows=1)
        except ValueError as error:
            yield f"posterior: {error}"


def _assemble(spec: Spec, features: int, latent: int, rows: int) -> VAE:
    """Build the three conditionals, those last that are tied to others."""
    parts: dict[str, Any] = {}
    for role in sorted(ROLES, key=lambda role: len(needs(getattr(families, getattr(spec, role).family)) & set(ROLES))):
        table = getattr(spec, role)
        family, network = getattr(families, table.family), getattr(table, "network", None)
        event = features if role == "likelihood" else latent
        made = family(**filled(family, event=event, **parts), **table.model_dump(exclude={"family", "network"}))
        if network is not None:
            kind = getattr(networks, network.family)
            network = kind(**filled(kind, rows=rows), **network.model_dump(exclude={"family"}))
        context = {"prior": (), "likelihood": (latent,), "posterior": (features,)}[role]
        parts[role] = Conditional(made, network).bind(*context)
    return VAE(**parts)


@contextmanager
def _named(spec: Spec, data: Data | None = None) -> Iterator[None]:
    """Name the file in an error, with the line of a program's file, or the `--set` that mends it where one does."""
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
    except Exception as error:
        if spec.model.program is None:
            raise
        file = spec.model.program.partition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"line {lines[-1]}" if lines else "it"
        what = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{spec.path}: model.program: Expected model and guide of {file} to run on the data; {where} raised "
            f"{type(error).__name__}: {what}"
        ) from error
