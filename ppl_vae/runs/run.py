"""Runs: train what a spec says, evaluate it, and keep the result in a run directory, written as a whole."""

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae import _processes as processes
from ppl_vae._checks import check_int
from ppl_vae._progress import reporting
from ppl_vae.data.loading import Data
from ppl_vae.infer.step import State
from ppl_vae.infer.svi import fit, pick_device
from ppl_vae.programs.param_store import device_and_dtype
from ppl_vae.programs.target import Target
from ppl_vae.reports.diagnostics import Diagnostics, diagnose, find_reference
from ppl_vae.reports.figures import draw_diagnostics, draw_run
from ppl_vae.reports.measures import (
    classify,
    evaluate,
    evaluation_split,
    finite,
    measure,
    predict,
    strangest,
    trained,
)
from ppl_vae.reports.page import markdown, run_page
from ppl_vae.runs import places, stops, storage
from ppl_vae.runs.blame import blamed
from ppl_vae.runs.built import Built
from ppl_vae.runs.loaded import Run, load_run, read_run
from ppl_vae.runs.machine import machine
from ppl_vae.runs.metrics import append_metrics, trim_metrics
from ppl_vae.runs.pace import Pace, reached
from ppl_vae.runs.spec import Spec, load_spec
from ppl_vae.runs.spec_file import Say, quiet
from ppl_vae.runs.start import begin, settings_of
from ppl_vae.runs.trained import check_same_data, pick_place, read_spec, trained_on, write_trained

__all__ = ["evaluate_run", "fit_spec", "load_run", "write_run"]

OnEpoch = Callable[[int, State], None]


def fit_spec(
    source: str | Path | Spec,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    trust_code: bool = False,
    say: Say = quiet,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Train what a spec says, evaluate it, and leave a run directory.

    Its `metrics.jsonl` grows by a line an epoch meanwhile.

    Args:
        source: a spec or its path, a program `file.py[:Class]`, or the directory of an interrupted run to go on with.
        overrides: values by dotted key, set before the spec of a path is checked.
        out: the run directory, by default a new one under `runs/`.
        device: `auto`, `cpu` or `cuda`.
        force: whether to replace a finished run at `out`.
        trust_code: whether a program file that a run brings may run. One that your own spec names always may.
        say: takes messages for the user, among them how far training and evaluation are, every ten seconds.
        on_epoch: called after each epoch with its number and the `State`, such as `trackers.tensorboard(...)`.

    Raises:
        ValueError: If spec, data or `out` will not do; nothing is written then.
        KeyboardInterrupt: After the state of the last whole epoch was kept, with how to go on.
    """
    with stops.listening(), processes.group(device), reporting(quiet if processes.rank() else say):
        if out is not None and processes.restarted() and (Path(out) / storage.STATE).exists():
            source, overrides, out = out, None, None
        if processes.rank():
            return _follow(source, overrides, pick_device(device), trust_code)
        with processes.telling():
            return _lead(source, overrides, out, device, force, trust_code, say, on_epoch)


def _lead(
    source: str | Path | Spec,
    overrides: Mapping[str, Any] | None,
    out: str | Path | None,
    device: str,
    force: bool,
    trust_code: bool,
    say: Say,
    on_epoch: OnEpoch | None,
) -> Run:
    """What `fit_spec` does, in the first of several processes."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Spec) or not Path(source).is_dir():
            if not isinstance(source, Spec):
                trusted = trust_code or not storage.is_run(Path(source).parent)
                source = load_spec(source, overrides, trust_code=trusted, say=say)
            place = stack.enter_context(pick_place(source, out, force=force, say=say))
            return _train(source, place, pick_device(device), False, say, on_epoch)
        if overrides or out is not None:
            raise ValueError(
                "Expected neither --set, --from nor --out with an interrupted run, which goes on as it began."
            )
        storage.check_folder(Path(source), finished=False)
        place = stack.enter_context(places.claimed(Path(source), say=say))
        storage.check_folder(place.path, finished=False)
        return _train(read_spec(place.path, trust_code, say), place, pick_device(device), True, say, on_epoch)


def _follow(
    source: str | Path | Spec, overrides: Mapping[str, Any] | None, device: torch.device, trust_code: bool
) -> Any:
    """Train along with the first process and take a share of the evaluation; nothing is written or said."""
    if (start := processes.share()) is None:
        raise SystemExit(2)  # the first has failed, and says why
    try:
        resumed = not isinstance(source, Spec) and Path(source).is_dir()
        if resumed:
            spec = read_spec(Path(source), trust_code, quiet)  # type: ignore[arg-type]
        else:
            spec = source if isinstance(source, Spec) else load_spec(source, overrides, trust_code=True)
        data = spec.load_data()
        program: Any = spec.build(data)
        spec = spec if resumed else begin(spec, program)[0]
        fit(program, data.to(device), **settings_of(spec, program, data, device), resume=start["state"], progress=False)
    except ValueError:  # which the first process meets too
        raise SystemExit(2) from None
    processes.follow(program)
    return None


def _train(
    spec: Spec, place: places.Place, device: torch.device, resumed: bool, say: Say, on_epoch: OnEpoch | None
) -> Run:
    """Train from the start or from an interrupted run's state, and write the run."""
    for text in (spec.to_toml(), str(place.folder)):
        if (plain := text.encode(errors="replace").decode()) != text:
            raise ValueError(f"Expected names of files and folders in UTF-8; got {plain[:60]!r}. Rename them.")
    data = spec.load_data()
    program: Any = spec.build(data)
    say(str(spec.check(data, program)))
    record = None
    if not resumed:
        spec, words, record = begin(spec, program)
        for text in words:
            say(text)
    learned = storage.learned_state(program)  # refuses what no file can hold, before the work
    machines = [machine(device)]
    start: dict[str, Any] | None = None
    now: State | None = None
    latest: Any = None  # the state of the last checkpoint, and what was learned by then
    go_on = f"its state is in {place.path}. Go on with: ppl-vae fit {place.path}{' --trust-code' * bool(spec.programs)}"
    if resumed:
        start = storage.read_state(place.path / storage.STATE)
        with storage.reading(place.path / storage.STATE, "a training state"):
            check_same_data(place.path, start.pop("protocol"), data)
            record = start.pop("start", None)
            say(f"goes on after {reached(start, spec.svi.epochs)}")
        storage.load_learned_state(program, place.path / "model.safetensors")
        machines = trained_on(place.path, machines)
    place.reserve(5 * sum(value.nbytes for value in learned[0].values()) + 2**20)
    pace = Pace(spec.svi.checkpoint)
    live = resumed or not storage.is_run(place.folder)  # another run that is to be replaced stays as it is till then
    if live:
        trim_metrics(place.folder, len(start["history"]["elbo"]) if start else 0)

    def keep(latest: tuple[dict[str, Any], Any]) -> str:
        """Write the latest state, and say where it is and how to go on."""
        nonlocal live
        state, learned = latest
        with pace.keeping(), stops.held_off(), place.replacing(trained=machines) as partial:
            write_trained(partial, place.path, spec, learned, state["history"])
            storage.write_state({**state, "protocol": data.protocol, "start": record}, partial / storage.STATE)
        live = True
        return go_on

    def look(state: State, is_due: Callable[[], bool]) -> None:
        nonlocal now, latest
        now = state
        stops.look()
        if is_due():
            latest = (state.save() if state.losses else state.good), storage.learned_state(program)
            where = reached(latest[0], spec.svi.epochs)
            try:
                how = keep(latest)
            except OSError as error:
                say(f"the state after {where} cannot be kept, and training goes on: {error}")
            else:
                if pace.kept == 1:
                    say(f"after {where} and every {spec.svi.checkpoint} {how}")

    def note(epoch: int, state: State) -> None:
        if live:
            with contextlib.suppress(OSError):  # a full disk is told of by what keeps the state
                append_metrics(vars(state.history), place.folder)
        if on_epoch is not None:
            on_epoch(epoch, state)
        look(state, pace.is_due)

    def last() -> tuple[dict[str, Any], Any] | None:
        """The state of the last epoch, or of a checkpoint after that, and what was learned by then."""
        if now is None or now.good is None or not now.good["history"]["elbo"]:
            return latest
        good, steps = now.good, -1 if latest is None else latest[0]["history"]["steps"]
        if steps >= good["history"]["steps"]:
            return latest  # type: ignore[no-any-return]
        now.load(good)
        return good, storage.learned_state(program)

    history = None
    try:
        settings = {**settings_of(spec, program, data, device), "resume": start, "on_epoch": note}
        processes.tell({"state": start})
        settings["on_step"] = lambda state: look(state, pace.is_due_within)
        with blamed(spec.programs):
            history = fit(program, data.to(device), **settings)
            part, rows = evaluation_split(program, data)
            n, draws = len(next(iter(rows.values()))), spec.evaluation.samples
            say(f"evaluates {n:,} data of the {part} part, with {draws:,} samples each")
            with processes.leading(program):
                return write_run(place, spec, program, data, vars(history), machines, record)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        if (held := last()) is None:
            what = (
                f"interrupted before another epoch ended; {go_on}"
                if resumed
                else "interrupted in the first epoch; nothing was kept"
            )
            raise stops.Stopped(what, number) from None
        when = f"interrupted after {reached(held[0], spec.svi.epochs)}"
        raise stops.Stopped(f"{when}; {keep(held)}", number) from None
    except Exception:
        if (held := last()) is not None:
            when = "the evaluation failed" if history is not None else "the training failed"
            with contextlib.suppress(OSError, ValueError):
                say(f"{when} after {reached(held[0], spec.svi.epochs)}; {keep(held)}")
        raise
    finally:
        if place.known is None:  # no state was kept
            (place.folder / "metrics.jsonl").unlink(missing_ok=True)


def write_run(
    place: places.Place,
    spec: Spec | Built,
    program: Any,
    data: Data,
    history: Mapping[str, Any],
    machines: Any = None,
    start: Mapping[str, Any] | None = None,
) -> Run:
    """Evaluate a trained program and write a finished run directory as a whole.

    Args:
        place: where, as `pick_place` gives it; an earlier run there is replaced.
        spec: what was fitted.
        program: the trained program.
        data: its data.
        history: the entries of `History` by name.
        machines: that trained it, as `machine` describes them; by default this one.
        start: what was taken of an earlier run, as `take_weights` describes it.
    """
    machines = machines or [machine(device_and_dtype(program)[0])]
    with place.replacing(trained=machines, evaluated=machines[-1]) as partial:
        home = write_trained(partial, place.path, spec, storage.learned_state(program), history)
        train = {"epochs": len(history["elbo"]), "steps": history["steps"], "seconds": history["seconds"][-1]}
        train |= {"objective": history["objective"][-1]} if history.get("objective") else {}
        train |= {} if history.get("best_epoch") is None else {"kept_epoch": history["best_epoch"] + 1}
        train |= {"start": start} if start else {}
        train |= {"processes": processes.size()} if processes.size() > 1 else {}
        train |= {key: history[key] for key in ("capture", "capture_reason") if history.get(key)}
        run = Run(place.path, home, program, {"train": train})
        return _write_report(partial, run, data, history, spec.evaluation.samples, Diagnostics())


def evaluate_run(
    path: str | Path,
    *,
    samples: int | None = None,
    diagnostics: Diagnostics = Diagnostics(),  # noqa: B008  frozen
    device: str = "auto",
    program: Any = None,
    trust_code: bool = False,
    say: Say = quiet,
) -> Run:
    """Evaluate a finished run again, and replace its report, figures and evidence.

    Args:
        path: the run directory.
        samples: importance samples per datum, by default as in the spec.
        diagnostics: what the report includes beside the evidence.
        device: `auto`, `cpu` or `cuda`.
        program: as of `load_run`.
        trust_code: whether the run's copy of a program file may run.
        say: takes messages for the user.

    Raises:
        ValueError: If the path is no finished run, its data have changed, or `samples` or the diagnostics will not do.
    """
    with stops.listening(), processes.group(device), contextlib.ExitStack() as stack:
        if processes.rank():
            return _assist(Path(path), pick_device(device), trust_code, program)
        stack.enter_context(processes.telling())
        stack.enter_context(reporting(say))
        if samples is not None:
            check_int("samples", samples)
        places.mend(Path(path), say)
        storage.check_folder(Path(path), finished=True)
        place = stack.enter_context(places.claimed(Path(path), say=say))
        run = read_run(place.path, trust_code, say, program)
        data = run.spec.load_data()
        with storage.reading(place.path / "report.json", "a report"):
            protocol, epochs = run.report["data"]["protocol"], check_int("epochs", run.report["train"]["epochs"])
            check_same_data(place.path, protocol, data)
        history = storage.read_metrics(place.path, epochs)
        if isinstance(run.program, nn.Module):
            run.program.to(pick_device(device))
        records = {"trained": trained_on(place.path), "evaluated": machine(device_and_dtype(run.program)[0])}
        with blamed(run.spec.programs), place.replacing(**records) as partial:
            for name in storage.trained_files(place.path):
                (partial / name).write_bytes(storage.read_file(place.path / name))
            processes.tell("evaluate")
            with processes.leading(run.program):
                return _write_report(partial, run, data, history, samples or run.spec.evaluation.samples, diagnostics)


def _assist(path: Path, device: torch.device, trust_code: bool, program: Any = None) -> Any:
    """Take a share of the evaluation of a run; nothing is written or said."""
    if processes.share() is None:
        raise SystemExit(2)  # the first has failed, and says why
    program = load_run(path, program=program, trust_code=trust_code).program
    if isinstance(program, nn.Module):
        program.to(device)
    processes.follow(program)
    return None


def _write_report(
    partial: Path, run: Run, data: Data, history: Mapping[str, Any], samples: int, diagnostics: Diagnostics
) -> Run:
    """Evaluate a run, and write its report, figures and the evidence of each datum.

    Args:
        partial: the folder to write to.
        run: the run; of its report only `train` is read.
        data: its data.
        history: bounds of each epoch by name.
        samples: importance samples per datum.
        diagnostics: what the report includes beside the evidence.

    Returns:
        The run with its new report.
    """
    spec, program, seed = run.spec, run.program, run.spec.svi.seed
    device = device_and_dtype(program)[0]
    data = data.to(device)
    part, rows = evaluation_split(program, data)
    target = Target(program, rows)
    reference = find_reference(target, diagnostics, seed=seed)
    known = reference if target.structure.whole else None
    how: Any = {"samples": samples, "seed": seed, "precision": spec.evaluation.precision}
    blocks, evidence = evaluate(target, data, **how, latent=spec.model.latent, reference=known)
    libraries = {name: version(name) for name in ("ppl-vae", "pyro-ppl", "torch")}
    report: dict[str, Any] = {
        "spec": spec.to_dict(),
        "seed": seed,
        "versions": {"python": sys.version.split()[0], **libraries},
        "device": device.type,
        "data": {
            "name": data.name,
            "protocol": data.protocol,
            "measure": measure(target),
            "part": part,
            "features": data.features,
            "columns": data.columns.to_dict(),
            "whole": target.structure.whole,
            **({} if data.classes is None else {"classes": list(data.classes)}),
            "n_train": len(next(iter(data.train.values()))),
            "n_test": len(next(iter(data.test.values()))),
        },
        "train": {**run.report["train"], **trained(target, data, blocks["test"], seed=seed)},
        **blocks,
    }
    classes = classify(target, data, samples=samples, prior=spec.evaluation.class_prior, seed=seed)
    predictive, strange = predict(target, data, seed=seed), strangest(target, data, evidence.log_evidence)
    more = {"classes": classes, "predictive": predictive and predictive.summary(), "strangest": strange}
    report |= finite({key: block for key, block in more.items() if block is not None})
    drawn: Any = {"report": report, "log_evidence": evidence.log_evidence, "predictive": predictive, "seed": seed}
    captions, notes = draw_run(target, data, history, partial / "figures", **drawn), []
    if diagnostics != Diagnostics():
        results = diagnose(target, evidence, diagnostics, reference, seed=seed)
        report |= results.report
        captions |= draw_diagnostics(results, partial / "figures", shape=data.shape)
        notes = results.notes
    about = {"title": run.path.resolve().name, "options": diagnostics.options}
    text = markdown(report, history["elbo"], target, captions=captions, notes=notes, **about)
    (partial / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (partial / "report.md").write_text(text, encoding="utf-8")
    page = run_page(text, report, captions, partial / "figures")
    (partial / "report.html").write_text(page, encoding="utf-8")
    table = {name: value for name, value in vars(evidence).items() if isinstance(value, Tensor)}
    scaling = {f"transform.{name}": torch.as_tensor(getattr(data.transform, name)) for name in ("loc", "scale")}
    storage.write_tensors(table | scaling, partial / "evidence.safetensors")
    return dataclasses.replace(run, report=report)
