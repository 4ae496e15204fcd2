"""Runs: train what a spec says, and keep the result in a run directory."""

import contextlib
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ppl_vae import _processes as processes
from ppl_vae._progress import reporting
from ppl_vae.infer.step import State
from ppl_vae.infer.svi import fit, pick_device
from ppl_vae.reports.measures import evaluation_split
from ppl_vae.runs import places, stops, storage
from ppl_vae.runs.blame import blamed
from ppl_vae.runs.evaluated import write_run
from ppl_vae.runs.loaded import Run
from ppl_vae.runs.machine import machine
from ppl_vae.runs.metrics import append_metrics, trim_metrics
from ppl_vae.runs.pace import Pace, reached
from ppl_vae.runs.spec import Spec, load_spec
from ppl_vae.runs.spec_file import Say, quiet
from ppl_vae.runs.start import begin, settings_of
from ppl_vae.runs.trained import check_same_data, pick_place, read_spec, trained_on, write_trained

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
