"""The evaluation of a trained program: its report, figures and evidence, written as a whole with what training left."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae import _processes as processes
from ppl_vae._checks import check_int
from ppl_vae._progress import reporting
from ppl_vae.data.loading import Data
from ppl_vae.infer.svi import pick_device
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
from ppl_vae.runs.spec import Spec
from ppl_vae.runs.spec_file import Say, quiet
from ppl_vae.runs.trained import check_same_data, trained_on, write_trained


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
