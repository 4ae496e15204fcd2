"""Run directories: a trained program with all it takes to know it again, written atomically."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch

from ppl_vae.data import Data
from ppl_vae.report import describe, distrust, evaluate, figures, markdown, measure, rendering, trained
from ppl_vae.spec import Spec, load_spec
from ppl_vae.store import FORMAT, check_folder, read_state, read_weights, replacing, write_state, write_weights
from ppl_vae.svi import SETTINGS, State, fit, pick_device
from ppl_vae.toml import read
from ppl_vae.traces import place

__all__ = ["Run", "compare_runs", "evaluate_run", "fit_spec", "load_run", "write_run"]


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
    """Load a finished run; neither the original spec nor any pickle is read.

    Args:
        path: the run directory.
        trust_code: whether the copy of a program file in the run may be executed.

    Raises:
        ValueError: for a folder that is no run, a run that is unfinished, truncated or of a newer format, or one with a
            program file where `trust_code` is not given.
    """
    path = Path(path)
    check_folder(path)
    report = read_report(path)
    spec = read_spec(path, trust_code=trust_code)
    program = spec.assemble(features=report["data"]["features"], rows=report["data"]["n_train"])
    read_weights(program, path / "model.safetensors")
    return Run(path, spec, program, report)


def read_spec(path: Path, *, trust_code: bool) -> Spec:
    """Read a run's spec; a program is that of the run's own copy of the file."""
    wanted = read(path / "spec.toml").get("model", {}).get("program")
    own = {} if wanted is None else {"model.program": Path(wanted).name}
    return load_spec(path / "spec.toml", own, trust_code=trust_code)


def fit_spec(
    source: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Run:
    """Train what a spec says, evaluate it, and leave a run directory.

    Args:
        source: a spec, or the directory of an interrupted run to go on with.
        overrides: values by dotted key, put in their place before the spec is checked.
        out: the run directory, by default a new one under `runs/`.
        device: `auto`, `cpu` or `cuda`.
        force: whether a finished run at `out` may be replaced.
        say: takes messages for the user.

    Raises:
        ValueError: for a spec, data or an `out` that will not do; nothing is written then.
        KeyboardInterrupt: after the last whole epoch's state was kept, with how to go on.
    """
    source = Path(source)
    resumed = source if source.is_dir() else None
    if resumed is not None:
        check_folder(resumed)
        if (resumed / "report.json").exists():
            raise ValueError(
                f"Expected a spec or an interrupted run; {resumed} is a finished run. Evaluate or compare it."
            )
        if overrides:
            raise ValueError("Expected no --set with an interrupted run, which goes on as it began; got some.")
    spec = read_spec(resumed, trust_code=True) if resumed else load_spec(source, overrides)
    folder = resumed or pick_folder(spec, out, force)
    target = pick_device(device)
    data = spec.load_data()
    program: Any = spec.build(data)
    say(str(spec.check(data, program)))
    state = read_state(resumed / "state.safetensors") if resumed else None
    reached: list[dict[str, Any]] = [state] if state else []

    def note(epoch: int, now: State) -> None:
        reached[:] = [now.save()]

    settings = {key: getattr(spec.svi, key) for key in (*SETTINGS, "seed")}
    try:
        history = fit(
            program, data.to(target), **settings, device=device, validation=data.validation, resume=state, on_epoch=note
        )
    except KeyboardInterrupt:
        if not reached:
            raise KeyboardInterrupt("interrupted in the first epoch; nothing was kept") from None
        with replacing(folder) as partial:
            _write_trained(partial, spec, program, reached[0]["history"])
            write_state(reached[0], partial / "state.safetensors")
        done = len(reached[0]["history"]["elbo"])
        raise KeyboardInterrupt(
            f"interrupted after epoch {done} of {spec.svi.epochs}; its state is in {folder}. "
            f"Go on with: ppl-vae fit {folder}"
        ) from None
    return write_run(folder, spec, program, data, vars(history))


def write_run(folder: Path, spec: Spec, program: Any, data: Data, history: Mapping[str, Any]) -> Run:
    """Evaluate a trained program and leave a finished run directory, written as a whole.

    Args:
        folder: where; an earlier run there is replaced.
        spec: what was fitted.
        program: the trained program.
        data: its data.
        history: the entries of `History` by name.
    """
    with replacing(folder) as partial:
        _write_trained(partial, spec, program, history)
        last = {"epochs": len(history["elbo"]), "steps": history["steps"], "seconds": history["seconds"][-1]}
        report = _report(partial, spec, program, data, dict(last), history, spec.evaluation.samples)
    return Run(folder, spec, program, report)


def evaluate_run(
    path: str | Path, *, samples: int | None = None, device: str = "auto", trust_code: bool = False
) -> Run:
    """Evaluate a finished run again, and replace its report, pictures and evidence.

    Args:
        path: the run directory.
        samples: importance samples a datum, as in the spec by default.
        device: `auto`, `cpu` or `cuda`.
        trust_code: whether the copy of a program file in the run may be executed.

    Raises:
        ValueError: for a path that is no finished run, or samples out of range.
    """
    run = load_run(path, trust_code=trust_code)
    if samples is not None and samples < 1:
        raise ValueError(f"Expected `samples` to be at least 1; got {samples}.")
    run.program.to(pick_device(device))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    history = {"elbo": [line["elbo"] for line in lines], "validation": [line["validation"] for line in lines]}
    history["validation"] = [bound for bound in history["validation"] if bound is not None]
    with replacing(run.path) as partial:
        for kept in run.path.iterdir():
            if kept.is_file():
                shutil.copy2(kept, partial / kept.name)
        report = _report(
            partial, run.spec, run.program, run.spec.load_data(), run.report["train"], history,
            samples or run.spec.evaluation.samples,
        )  # fmt: skip
    return Run(run.path, run.spec, run.program, report)


def compare_runs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Put finished runs side by side, with paired differences of log evidence over the same held-out data.

    Returns:
        `runs`, a summary each, and `differences`, each `a`, `b`, `mean` (a minus b, nats per datum) and `se` over data.

    Raises:
        ValueError: for fewer than two runs, or runs that no one measure can compare: a density beside a probability
        mass,
            or other data, split, binarisation, scaling or dequantisation.
    """
    if len(paths) < 2:
        raise ValueError(f"Expected two or more runs to compare; got {len(paths)}.")
    runs, values = [], []
    for path in map(Path, paths):
        check_folder(path)
        report = read_report(path)
        runs.append({"path": str(path), **{key: report[key] for key in ("data", "train", "test", "exact", "baseline")}})
        values.append(safetensors.torch.load_file(path / "evidence.safetensors")["log_evidence"].double())
    first = runs[0]["data"]
    for other in runs[1:]:
        for what, mine, theirs in _measures(first, other["data"]):
            if mine != theirs:
                raise ValueError(
                    f"Expected runs whose figures share one measure; {what} is {mine} in {runs[0]['path']} and "
                    f"{theirs} in "
                    f"{other['path']}, so their nats do not compare."
                )
    differences = []
    for a in range(len(runs)):
        for b in range(a + 1, len(runs)):
            gap = values[a] - values[b]
            spread = float(gap.std()) / len(gap) ** 0.5 if len(gap) > 1 else None
            differences.append({"a": runs[a]["path"], "b": runs[b]["path"], "mean": float(gap.mean()), "se": spread})
    return {"runs": runs, "differences": differences}


def _measures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "what is measured", a["measure"], b["measure"]
    for key in ("name", "binarization", "scaling", "dequantization", "split", "seed", "digest"):
        yield f"data.{key}", a["protocol"].get(key), b["protocol"].get(key)


def _write_trained(folder: Path, spec: Spec, program: Any, history: Mapping[str, Any]) -> None:
    """Write what training leaves: spec, weights, a line an epoch, and the program's file where there is one."""
    (folder / "spec.toml").write_text(spec.to_toml())
    write_weights(program, folder / "model.safetensors")
    lines = []
    for epoch, elbo in enumerate(history["elbo"]):
        validation = history["validation"][epoch] if epoch < len(history["validation"]) else None
        rate, seconds = history["learning_rate"][epoch], history["seconds"][epoch]
        line = {"epoch": epoch, "elbo": elbo, "validation": validation, "learning_rate": rate, "seconds": seconds}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if spec.model.program is not None:
        file = Path(spec.model.program.rpartition(":")[0] or spec.model.program)
        shutil.copy2(file, folder / file.name)


def _report(
    folder: Path,
    spec: Spec,
    program: Any,
    data: Data,
    train: dict[str, Any],
    history: Mapping[str, Any],
    samples: int,
) -> dict[str, Any]:
    """Evaluate and write the report, its pictures and the evidence of each test datum into a folder."""
    device = place(program)[0]
    data = data.to(device)
    bound = trained(program, data, seed=spec.svi.seed)
    blocks, evidence = evaluate(program, data, samples=samples, seed=spec.svi.seed)
    report: dict[str, Any] = {
        "spec": spec.to_dict(),
        "seed": spec.svi.seed,
        "versions": versions(),
        "device": device.type,
        "data": {
            "name": data.name,
            "protocol": data.protocol,
            "measure": measure(program, data.test),
            "features": data.features,
            "n_train": len(data.train["x"]),
            "n_test": len(data.test["x"]),
        },
        "train": {**train, "elbo": bound["mean"]},
        **blocks,
    }
    doubts = distrust(report, history["elbo"], train_se=bound["se"] or 0.0)
    text = markdown(
        report,
        title=spec.path.stem if spec.path.stem != "spec" else folder.name.strip(".").split(".")[0],
        words=describe(program, spec),
        program=rendering(program, data.test),
        doubts=doubts,
        pictures=figures(program, data, history, folder / "figures", seed=spec.svi.seed),
    )
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (folder / "report.md").write_text(text)
    table = {f.name: getattr(evidence, f.name).cpu() for f in dataclasses.fields(evidence) if f.name != "samples"}
    safetensors.torch.save_file(table, folder / "evidence.safetensors", {"format_version": FORMAT})
    return report


def read_report(path: Path) -> dict[str, Any]:
    """Read `report.json` of a finished run."""
    if not (path / "report.json").is_file():
        raise ValueError(f"Expected a finished run; {path} was interrupted. Go on with: ppl-vae fit {path}")
    try:
        return json.loads((path / "report.json").read_text())  # type: ignore[no-any-return]
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {path / 'report.json'} to be JSON; it is damaged ({error}). Fit again.") from None


def pick_folder(spec: Spec, out: str | Path | None, force: bool) -> Path:
    """Choose where a run goes: `out`, or a new directory under `runs/` named after the spec.

    Raises:
        ValueError: where `out` holds a finished run and `force` is not given, or something else than a run.
    """
    if out is None:
        name = spec.path.stem if spec.path else "run"
        folder, number = Path("runs") / name, 2
        while folder.exists():
            folder, number = Path("runs") / f"{name}-{number}", number + 1
        return folder
    folder = Path(out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if not (folder / "spec.toml").is_file():
        raise ValueError(f"Expected --out to be new or an earlier run; {folder} holds something else.")
    if (folder / "report.json").is_file() and not force:
        raise ValueError(f"Expected --out to be new; {folder} holds a finished run. Choose another, or give --force.")
    return folder


def versions() -> dict[str, str]:
    """Name what a run was made with."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("ppl-vae", "pyro-ppl", "torch")}}
