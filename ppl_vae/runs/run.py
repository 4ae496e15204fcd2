"""Run directories: a trained program with all it takes to know it again, written atomically."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppl_vae.data.loading import Data
from ppl_vae.infer.step import State
from ppl_vae.infer.svi import SETTINGS, fit, pick_device
from ppl_vae.programs.param_store import device_and_dtype
from ppl_vae.reports.figures import figures, scrutinise
from ppl_vae.reports.findings import list_findings
from ppl_vae.reports.measures import evaluate, evaluation_split, find_reference, finite, measure, trained
from ppl_vae.reports.page import describe, markdown, rendering
from ppl_vae.runs.spec import Spec, load_spec
from ppl_vae.runs.spec_file import read
from ppl_vae.runs.storage import (
    check_folder,
    check_replaceable,
    digest,
    is_run,
    read_metadata,
    read_metrics,
    read_report,
    read_state,
    read_weights,
    replacing,
    reserved,
    weights,
    write_state,
    write_tensors,
)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its directory.
        spec: the complete spec.
        program: the trained program.
        report: what `report.json` says.
    """

    path: Path
    spec: Spec
    program: Any
    report: dict[str, Any]


def load_run(path: str | Path, *, trust_code: bool = False) -> Run:
    """Load a finished run; neither the original spec, nor the data, nor any pickle is read.

    Args:
        path: the run directory.
        trust_code: whether the copy of a program file in the run may be executed.

    Raises:
        ValueError: for a folder that is no run, a run that is unfinished, truncated or of a newer format, or one with a
            program file where `trust_code` is not given.
    """
    path = Path(path)
    check_folder(path, finished=True)
    report = read_report(path)
    spec = read_spec(path, trust_code=trust_code)
    program = spec.assemble(features=report["data"]["features"], rows=report["data"]["n_train"])
    read_weights(program, path / "model.safetensors")
    return Run(path, spec, program, report)


def read_spec(path: Path, *, trust_code: bool) -> Spec:
    """Read a run's spec; a program is that of the run's own copy of the file.

    Raises:
        ValueError: where the spec or the program's file is not what was fitted.
    """
    known = read_metadata(path / "model.safetensors")
    model = read(path / "spec.toml").get("model")
    own = {}
    if isinstance(model, dict) and isinstance(model.get("program"), str):
        file, colon, name = model["program"].partition(":")
        copy = path / Path(file).name
        if not copy.is_file() or digest(copy) != known.get("program"):
            raise ValueError(
                f"Expected {copy}, the run's own copy of its program, as it was fitted; it is "
                f"{'changed' if copy.is_file() else 'missing'}. Fit again."
            )
        own = {"model.program": f"{copy.name}{colon}{name}"}
    spec = load_spec(path / "spec.toml", own, trust_code=trust_code)
    if _pinned(spec) != known.get("spec"):
        raise ValueError(
            f"Expected {path / 'spec.toml'} to say what was fitted; it was changed or cut since. Only data.name, "
            f"data.root and data.download may change, where the data have moved. Restore it, or fit again."
        )
    return spec


def _pinned(spec: Spec) -> str:
    """Give all of a spec that belongs to what was fitted; paths may change."""
    tables = spec.to_dict()
    for table, key in (("data", "name"), ("data", "root"), ("data", "download"), ("model", "program")):
        tables[table].pop(key, None)
    return json.dumps(tables, sort_keys=True)


def fit_spec(
    source: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    trust_code: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Run:
    """Train what a spec says, evaluate it, and leave a run directory.

    Args:
        source: a spec, a program `file.py[:Class]`, or the directory of an interrupted run to go on with.
        overrides: values by dotted key, put in their place before the spec is checked.
        out: the run directory, by default a new one under `runs/`.
        device: `auto`, `cpu` or `cuda`.
        force: whether a finished run at `out` may be replaced.
        trust_code: whether the program file that a run brings may be executed. One that a spec of your own names is.
        say: takes messages for the user.

    Raises:
        ValueError: for a spec, data or an `out` that will not do; nothing is written then.
        KeyboardInterrupt: after the last whole epoch's state was kept, with how to go on.
    """
    source = Path(source)
    resumed = source if source.is_dir() else None
    if resumed is None:
        spec = load_spec(source, overrides, trust_code=trust_code or not is_run(source.parent))
        folder = pick_folder(spec, out, force)
    else:
        check_folder(resumed, finished=False)
        if overrides or out is not None:
            raise ValueError("Expected neither --set nor --out with an interrupted run, which goes on as it began.")
        spec, folder = read_spec(resumed, trust_code=trust_code), resumed
        check_replaceable(folder)
    if spec.model.program is not None:
        say(f"runs the code of {spec.model.program}")
    with reserved(folder):
        return _train(spec, folder, pick_device(device), resumed, say)


def _train(spec: Spec, folder: Path, device: torch.device, resumed: Path | None, say: Callable[[str], None]) -> Run:
    """Train from the start or from an interrupted run's state, and leave what came of it in a directory."""
    data = spec.load_data()
    program: Any = spec.build(data)
    say(str(spec.check(data, program)))
    weights(program)
    state = None
    if resumed is not None:
        state = read_state(resumed / "state.safetensors")
        _same_data(resumed, state.pop("protocol"), data)
        read_weights(program, resumed / "model.safetensors")
        say(f"goes on after epoch {len(state['history']['elbo'])} of {spec.svi.epochs}")
    reached = [] if state is None else [(state, weights(program))]

    def note(epoch: int, now: State) -> None:
        reached[:] = [(now.save(), weights(program))]

    def keep(when: str) -> str:
        saved, learned = reached[0]
        with replacing(folder) as partial:
            _write_trained(partial, folder, spec, learned, saved["history"])
            write_state({**saved, "protocol": data.protocol}, partial / "state.safetensors")
        trust = "" if spec.model.program is None else " --trust-code"
        return f"{when}; its state is in {folder}. Go on with: ppl-vae fit {folder}{trust}"

    settings = {key: getattr(spec.svi, key) for key in (*SETTINGS, "seed")}
    given: dict[str, Any] = {"validation": data.validation, "resume": state, "on_epoch": note}
    try:
        history = fit(program, data.to(device), **settings, device=str(device), **given)
    except KeyboardInterrupt as stop:
        if not reached:
            raise type(stop)("interrupted in the first epoch; nothing was kept") from None
        done = len(reached[0][0]["history"]["elbo"])
        raise type(stop)(keep(f"interrupted after epoch {done} of {spec.svi.epochs}")) from None
    part, rows = evaluation_split(program, data)
    say(f"evaluates {len(rows['x']):,} data of the {part} part, with {spec.evaluation.samples:,} samples each")
    try:
        return write_run(folder, spec, program, data, vars(history))
    except KeyboardInterrupt as stop:
        raise type(stop)(keep("interrupted in the evaluation, after the last epoch")) from None
    except OSError:
        raise
    except Exception:
        say(keep("the evaluation failed after the last epoch"))
        raise


def write_run(folder: Path, spec: Spec, program: Any, data: Data, history: Mapping[str, Any]) -> Run:
    """Evaluate a trained program and leave a finished run directory, written as a whole.

    Args:
        folder: where; an earlier run there is replaced.
        spec: what was fitted.
        program: the trained program.
        data: its data.
        history: the entries of `History` by name.
    """
    check_replaceable(folder)
    with reserved(folder), replacing(folder) as partial:
        home = _write_trained(partial, folder, spec, weights(program), history)
        last = {"epochs": len(history["elbo"]), "steps": history["steps"], "seconds": history["seconds"][-1]}
        report = _report(partial, folder.resolve().name, home, program, data, last, history, spec.evaluation.samples)
    return Run(folder, home, program, report)


def evaluate_run(
    path: str | Path,
    *,
    samples: int | None = None,
    reference: str | None = None,
    gap: bool = False,
    calibration: bool = False,
    looked: int | None = None,
    temperatures: int | None = None,
    chains: int | None = None,
    device: str = "auto",
    trust_code: bool = False,
) -> Run:
    """Evaluate a finished run again, and replace its report, pictures and evidence.

    Args:
        path: the run directory.
        samples: importance samples a datum, as in the spec by default.
        reference: a method of `reference_posterior` to hold the evidence against.
        gap: whether to split log p(x) - ELBO into its parts.
        calibration: whether to test the guide on data of the model.
        looked: how many data the reference and the gap are found for, by default as many as the method can bear.
        temperatures: moves of each chain, where the reference is by annealing.
        chains: a datum, where the reference is by annealing.
        device: `auto`, `cpu` or `cuda`.
        trust_code: whether the copy of a program file in the run may be executed.

    Raises:
        ValueError: for a path that is no finished run, samples out of range, data that are not those of the run, or a
            reference that the program does not allow.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"Expected `samples` to be a whole number, at least 1; got {samples}.")
    run = load_run(path, trust_code=trust_code)
    check_replaceable(run.path)
    data = run.spec.load_data()
    _same_data(run.path, run.report["data"]["protocol"], data)
    if isinstance(run.program, nn.Module):
        run.program.to(pick_device(device))
    lines = read_metrics(run.path, run.report["train"]["epochs"])
    bounds = [line["validation"] for line in lines if line["validation"] is not None]
    history = {"elbo": [line["elbo"] for line in lines], "validation": bounds}
    with replacing(run.path) as partial:
        shutil.copytree(run.path, partial, ignore=shutil.ignore_patterns("figures"), dirs_exist_ok=True)
        report = _report(
            partial, run.path.resolve().name, run.spec, run.program, data, run.report["train"], history,
            samples or run.spec.evaluation.samples,
            {
                "reference": reference, "gap": gap, "calibration": calibration, "data": looked,
                "temperatures": temperatures, "chains": chains,
            },
        )  # fmt: skip
    return Run(run.path, run.spec, run.program, report)


def _same_data(path: Path, known: Mapping[str, Any], data: Data) -> None:
    """Refuse data that have changed since the run was fitted to them."""
    if data.protocol["digest"] != known["digest"] or data.protocol["split"] != known["split"]:
        raise ValueError(
            f"Expected the data that {path} was fitted to; {data.name} has changed since. Put the old data back, or "
            f"fit again. If they have moved, correct data.name in {path / 'spec.toml'}."
        )


def _write_trained(
    partial: Path, folder: Path, spec: Spec, learned: tuple[dict[str, Any], dict[str, str]], history: Mapping[str, Any]
) -> Spec:
    """Write what training leaves: weights, a line an epoch, the program's file where there is one, and the spec.

    Returns:
        The spec as it was written for `folder`, where it names the run's own copy of the program's file.
    """
    known, home = {}, spec
    if spec.model.program is not None:
        file, colon, name = spec.model.program.partition(":")
        shutil.copy2(file, partial / Path(file).name)
        known = {"program": digest(partial / Path(file).name)}
        own = f"{folder.resolve() / Path(file).name}{colon}{name}"
        home = dataclasses.replace(spec, model=spec.model.model_copy(update={"program": own}))
    home = dataclasses.replace(home, path=folder / "spec.toml")
    (partial / "spec.toml").write_text(home.to_toml(), encoding="utf-8")
    tensors, constraints = learned
    write_tensors(tensors, partial / "model.safetensors", spec=_pinned(spec), **known, **constraints)
    lines = []
    for epoch, elbo in enumerate(history["elbo"]):
        validation = history["validation"][epoch] if epoch < len(history["validation"]) else None
        rate, seconds = history["learning_rate"][epoch], history["seconds"][epoch]
        line = {"epoch": epoch, "elbo": elbo, "validation": validation, "learning_rate": rate, "seconds": seconds}
        lines.append(json.dumps(line) + "\n")
    (partial / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return home


def _report(
    partial: Path, title: str, spec: Spec, program: Any, data: Data, train: Mapping[str, Any],
    history: Mapping[str, Any], samples: int, closer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate and write the report, its pictures and the evidence of each datum into a folder."""
    device, seed = device_and_dtype(program)[0], spec.svi.seed
    data = data.to(device)
    part, rows = evaluation_split(program, data)
    asked = {name: value for name, value in (closer or {}).items() if value is not None and value is not False}
    truth = find_reference(program, rows, **asked, seed=seed)
    blocks, evidence = evaluate(program, data, samples=samples, seed=seed, latent=spec.model.latent)
    report: dict[str, Any] = {
        "spec": spec.to_dict(),
        "seed": seed,
        "versions": versions(),
        "device": device.type,
        "data": {
            "name": data.name,
            "protocol": data.protocol,
            "measure": measure(program, rows),
            "part": part,
            "features": data.features,
            "n_train": len(data.train["x"]),
            "n_test": len(data.test["x"]),
        },
        "train": {**train, **trained(program, data, seed=seed)},
        **blocks,
    }
    pictures = figures(program, data, history, partial / "figures", seed=seed)
    findings: list[str] = []
    options = "".join(f" --{key}" + f" {value}" * (value is not True) for key, value in asked.items())
    if asked:
        look = {name: value for name, value in asked.items() if name in ("gap", "calibration", "data")}
        more, findings, drawn = scrutinise(
            program, rows, evidence, partial / "figures", truth=truth, shape=data.shape, seed=seed, **look
        )
        report.update(finite(more))
        pictures |= drawn
    text = markdown(
        report,
        title=title,
        words=describe(program, spec),
        program=rendering(program, rows),
        doubts=list_findings(report, history["elbo"]),
        findings=findings,
        closer=options,
        pictures=pictures,
    )
    (partial / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (partial / "report.md").write_text(text, encoding="utf-8")
    table = {f.name: getattr(evidence, f.name) for f in dataclasses.fields(evidence) if f.name != "samples"}
    write_tensors(table, partial / "evidence.safetensors")
    return report


def pick_folder(spec: Spec, out: str | Path | None, force: bool | None) -> Path:
    """Choose where a run goes: `out`, or a new directory under `runs/` named after the spec.

    Args:
        spec: what will be fitted.
        out: where to, if anywhere.
        force: whether a finished run at `out` may be replaced; none for a caller that knows no such option.

    Raises:
        ValueError: where `out` holds a finished run and `force` is not given, or something else than a run.
    """
    if out is None:
        name, number = spec.path.stem, 1
        folder = Path("runs") / name
        while folder.exists():
            number += 1
            folder = Path("runs") / f"{name}-{number}"
        return folder
    folder = Path(out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    check_replaceable(folder)
    if (folder / "report.json").is_file() and not force:
        remedy = "Choose another" + (", or give --force." if force is False else ".")
        raise ValueError(f"Expected --out to be new; {folder} holds a finished run. {remedy}")
    return folder


def versions() -> dict[str, str]:
    """Name what a run was made with."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("ppl-vae", "pyro-ppl", "torch")}}
