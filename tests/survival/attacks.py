"""The attacks, each a generator of outcomes: `""` for a case that was survived, else what was lost.

The quick tests take a few cases of each; `soak.py` takes them all and counts.
"""

import contextlib
import gc
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cases import (
    DISCRETE,
    World,
    child,
    command,
    finish,
    killed,
    left_over,
    own_program,
    same,
    state_of,
    stop_after,
    told,
    until,
    writing_steps,
)

from ppl_vae import fit, load_spec

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGQUIT", "SIGALRM")
UNHEARD = ("SIGQUIT", "SIGALRM")  # which end a process at once


def kills_while_writing(world: World, verb: str, chosen: slice = slice(None)) -> Iterator[tuple[str, str]]:  # noqa: B008
    """Kill a command at its writing steps; then the run is whole, and the same command ends as it would have."""

    def start() -> tuple[Path, list[Any]]:
        place = world.fresh("run")
        if verb == "resume":
            status, said = command(["fit", world.spec, "--out", place], world.log, stop_after(3))
            assert status == 130, said
            return place, ["fit", place]
        if verb != "fit":
            shutil.copytree(world.whole, place)
        return place, ["evaluate", place] if verb == "evaluate" else ["fit", world.spec, "--out", place] + (
            ["--force"] if verb == "force" else []
        )

    before = {"fit": {"nothing", "interrupted", "finished"}, "evaluate": {"finished"}}
    place, arguments = start()
    for step in writing_steps(arguments, place.parent, world.log)[chosen]:
        place, arguments = start()
        status = killed(arguments, place.parent, world.log, step)
        case = f"{verb} killed at {step[0]} {step[1]}"
        if status == 0:  # its calls are not always as many
            yield case, "" if same(place, world.whole) else "it was not killed, and ended otherwise"
            continue
        if status != -signal.SIGKILL:
            yield case, told(status, world.said())
            continue
        state = state_of(place)
        if state not in before.get(verb, {"interrupted", "finished"}):
            yield case, f"left {state}"
            continue
        if state == "interrupted":
            arguments = ["fit", place]
        elif state == "finished":
            arguments = ["evaluate", place]
        status, said = command(arguments, world.log)
        lost = "" if status == 0 and same(place, world.whole) else f"then status {status}: {said[-300:]}"
        yield case, lost or "".join(f"left {name} " for name in left_over(place))


def keep_each_step() -> None:
    """Keep the state of a training after each of its steps."""
    from ppl_vae.runs import run

    run.Pace.is_due_within = lambda self: True  # type: ignore[method-assign]


def random_kills(
    world: World, count: int, seed: int = 0, before: Callable[[], Any] = lambda: None
) -> Iterator[tuple[str, str]]:
    """Kill a training at a random moment, go on, and compare with one that was never killed."""
    draw = random.Random(seed)
    for number in range(count):
        place = world.fresh("run")
        process = child(["fit", world.spec, "--out", place], world.log, before)
        time.sleep(draw.uniform(0.0, world.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        finish(process)
        state = state_of(place)
        if state == "finished":
            yield f"random kill {number}", ""
            continue
        arguments = ["fit", place] if state == "interrupted" else ["fit", world.spec, "--out", place]
        status, said = command(arguments, world.log)
        whole = status == 0 and same(place, world.whole)
        yield f"random kill {number} ({state})", "" if whole else told(status, said)


def memory_is_flat(world: World, steps: int) -> Iterator[tuple[str, str]]:
    """Train by captured steps, and look at the memory of the process after each thousand of them."""
    data, page, seen = load_spec(world.spec).load_data(), os.sysconf("SC_PAGE_SIZE"), []
    spec = load_spec(world.spec, {"svi.epochs": -(-steps // 3)})  # of three steps each

    def look(epoch: int, state: Any) -> None:
        if state.history.steps % 999 == 0:
            gc.collect()
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20)

    fit(spec.build(data), data, **spec.training, on_epoch=look, progress=False)
    for number, size in enumerate(seen[1:], 2):
        grown = size - seen[0]
        yield f"after {number} thousand steps", "" if grown < 2 else f"{grown:.1f} MiB more than after one thousand"


def signals(world: World, names: Iterable[str] = SIGNALS, doubles: Iterable[bool] = (False, True)) -> Iterator[Any]:
    """Send a signal, once or twice, to a training: its state is kept, and the exit status names the signal."""
    for name in names:
        for double in doubles:
            place, number = world.fresh("run"), getattr(signal, name)
            process = world.training(place)
            for _ in range(1 + double):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
                time.sleep(0.001)
            status, state = finish(process), state_of(place)
            heard = status == 128 + number and "Go on with: ppl-vae fit" in world.said()
            good = state == "interrupted" and (status == -number if name in UNHEARD else heard)
            yield f"{name}{' twice' * double}", "" if good else f"status {status}, {state}: {world.said()}"


def ignored_signals(world: World, names: Iterable[str] = ("SIGHUP", "SIGINT")) -> Iterator[tuple[str, str]]:
    """Signals that were ignored at the start, as by nohup, stay so."""
    for name in names:
        place, number = world.fresh("run"), getattr(signal, name)

        def ignore(number: int = number) -> None:
            signal.signal(number, signal.SIG_IGN)

        process = child(["fit", world.spec, "--out", place], world.log, ignore)
        until(lambda: state_of(place) != "nothing", process)  # noqa: B023
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        status = finish(process)
        yield f"{name} ignored", "" if status == 0 and same(place, world.whole) else f"status {status}: {world.said()}"


def races(world: World) -> Iterator[tuple[str, str]]:
    """Two writers of one run, and a reader beside a writer."""
    place = world.fresh("run")
    first = world.training(place)
    other = world.folder / "other.log"
    for verb in (["fit", world.spec, "--out", place, "--force"], ["fit", place]):
        status, said = command(verb, other)
        named = f"process {first}" in said
        yield f"{verb[0]} beside fit", "" if status == 2 and named else told(status, said)
    os.kill(first, signal.SIGKILL)
    finish(first)
    status, said = command(["fit", world.spec, "--out", place, "--force"], other)
    yield "after a kill the lock is free", "" if status == 0 else said[-300:]
    shutil.rmtree(place)
    inside = world.folder / "inside"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    numbers = [child(["fit", world.spec], world.folder / f"log{i}", lambda: os.chdir(inside)) for i in range(3)]
    statuses = [finish(number) for number in numbers]
    runs = [path for path in (inside / "runs").iterdir() if not path.name.startswith(".")]
    good = statuses == [0] * 3 and len(runs) == 3 and all(same(one, world.whole) for one in runs)
    yield "three default names at once", "" if good else f"{statuses}, {runs}"
    shutil.copytree(world.whole, place)
    writer = child(["evaluate", place], world.log)
    lost = ""
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        if state_of(place) != "finished":
            lost = state_of(place)
    yield "a reader beside evaluate", lost


def bad_places(world: World) -> Iterator[tuple[str, str]]:
    """Places that cannot be written, full disks and closed streams: one message, and what was there stays."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    place = world.fresh("run")
    shutil.copytree(world.whole, place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for arguments in (["fit", world.spec, "--out", place, "--force"], ["evaluate", place]):
        status, said = command(arguments, world.folder / "places.log", limited)
        now = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        good = status == 2 and now == before and not left_over(place)
        yield f"{arguments[0]} on a full disk", "" if good else told(status, said)
    for number in (1, 2):

        def closed(number: int = number) -> None:
            os.close(number)

        status, said = command(["fit", world.spec, "--out", world.fresh("run")], world.log, closed)
        good = status == (1 if number == 1 else 0) and same(world.folder / "places" / "run", world.whole)
        yield f"stream {number} closed", "" if good else told(status, said)

    def ascii_only() -> None:
        import sys

        sys.stdout, sys.stderr = (
            open(n, "w", encoding="ascii", errors=errors, closefd=False)
            for n, errors in ((1, "strict"), (2, "backslashreplace"))
        )

    status, said = command(["fit", world.spec, "--out", world.fresh("run")], world.log, ascii_only)
    yield "an ASCII terminal", "" if status == 0 and "+-" in said else told(status, said)
    odd = os.fsdecode(b"r\xff")
    status, said = command(["fit", world.spec, "--out", world.folder / "places" / odd], world.log)
    yield (
        "a name that is no UTF-8",
        "" if status == 2 and "Traceback" not in said else told(status, said),
    )
    status, said = command(["fit", world.spec, "--out", "."], world.log, lambda: os.chdir(world.fresh("run").parent))
    yield (
        "the folder where one is",
        "" if status == 2 and "where you are" in said else told(status, said),
    )
    status, said = command(["fit", world.spec, "--out", "/proc/run"], world.log)
    yield "a folder of the system", "" if status == 2 and "Traceback" not in said else told(status, said)
    if os.geteuid() == 0 and shutil.which("mount"):
        mounted = world.fresh("mounted")
        mounted.mkdir()
        if os.system(f"mount -t tmpfs -o size=100k none '{mounted}' 2>/dev/null") == 0:
            try:
                status, said = command(["fit", world.spec, "--out", mounted], world.log)
                yield (
                    "a mount point",
                    "" if status == 2 and "mount point" in said else told(status, said),
                )
                status, said = command(["fit", world.spec, "--out", mounted / "run"], world.log)
                good = status == 2 and "Traceback" not in said and not any(mounted.iterdir())
                yield "a disk that is really full", "" if good else told(status, said)
            finally:
                os.system(f"umount '{mounted}'")


def resumed(world: World, chosen: slice = slice(None)) -> Iterator[tuple[str, str]]:  # noqa: B008
    """Kill a training under each objective at a random moment, step by step and captured, and go on to the bit."""
    objectives = {
        "Trace_ELBO": [],
        "TraceMeanField_ELBO": ["svi.elbo=TraceMeanField_ELBO"],
        "TraceEnum_ELBO": ["svi.elbo=TraceEnum_ELBO"],  # of a program with a discrete site
        "four particles": ["svi.particles=4"],
        "ImportanceWeighted": ["svi.elbo=ImportanceWeighted", "svi.particles=3"],
        "ImportanceWeighted, stl": ["svi.elbo=ImportanceWeighted", "svi.particles=3", "svi.gradient=stl"],
        "ImportanceWeighted, dreg": ["svi.elbo=ImportanceWeighted", "svi.particles=3", "svi.gradient=dreg"],
        "Renyi": ["svi.elbo=Renyi", "svi.particles=3", "svi.alpha=0.5"],
        "the best epoch": ["svi.keep=best", "data.validation_fraction=0.2"],
    }
    wanted = [(name, keys, capture) for name, keys in objectives.items() for capture in ("off", "graph")]
    wanted = [(name, keys, "auto" if (name, how) == ("TraceEnum_ELBO", "graph") else how) for name, keys, how in wanted]
    draw, discrete = random.Random(0), own_program(world, DISCRETE)
    for name, keys, capture in [*wanted, ("Trace_ELBO", [], "compile")][chosen]:
        more = [word for key in (*keys, f"svi.capture={capture}") for word in ("--set", key)]
        whole, place = world.folder / "alone", world.fresh("run")
        shutil.rmtree(whole, ignore_errors=True)
        start, spec = time.monotonic(), discrete if name == "TraceEnum_ELBO" else world.spec
        trusted = ["--trust-code"] if name == "TraceEnum_ELBO" else []
        status, said = command(["fit", spec, "--out", whole, *more], world.log)
        took = time.monotonic() - start
        if status:
            yield f"{name}, {capture}", told(status, said)
            continue
        for number in range(3):
            place = world.fresh("run")
            process = child(["fit", spec, "--out", place, *more], world.log, keep_each_step)
            with contextlib.suppress(RuntimeError):
                until(lambda: state_of(place) != "nothing", process)  # noqa: B023
                time.sleep(draw.uniform(0.0, 0.5 * min(took, 2.0)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            finish(process)
            state = state_of(place)
            if state == "interrupted":
                status, said = command(["fit", place, *trusted], world.log)
            good = status == 0 and state in ("interrupted", "finished") and same(place, whole)
            yield f"{name}, {capture}, kill {number} ({state})", "" if good else told(status, said)


def two_ranks(world: World, count: int = 6) -> Iterator[tuple[str, str]]:
    """Kill both of two processes that train together, or the first, and go on with two, to the bit."""

    def both(arguments: list[Any], port: int) -> list[int]:
        def member(rank: int) -> Callable[[], None]:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            return lambda: os.environ.update({key: str(value) for key, value in own.items()})

        logs = (world.log, world.folder / "second.log")
        return [child(arguments, log, member(rank)) for rank, log in enumerate(logs)]

    def free() -> int:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            return int(one.getsockname()[1])

    whole, draw = world.folder / "together", random.Random(0)
    statuses = [finish(one) for one in both(["fit", world.spec, "--out", whole], free())]
    if statuses != [0, 0]:
        yield "two processes", f"{statuses}: {world.said()}"
        return
    for number in range(count):
        place = world.fresh("run")
        members = both(["fit", world.spec, "--out", place], free())
        with contextlib.suppress(RuntimeError):
            until(lambda: state_of(place) != "nothing", members[0])  # noqa: B023
            time.sleep(draw.uniform(0.0, 0.2))
        for one in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
            finish(one)
        state = state_of(place)
        if state == "interrupted":
            statuses = [finish(one) for one in both(["fit", place], free())]
        good = state in ("interrupted", "finished") and statuses == [0, 0] and same(place, whole)
        yield f"two processes, kill {number} ({state})", "" if good else f"{state}, {statuses}: {world.said()}"


def forced_races(world: World) -> Iterator[tuple[str, str]]:
    """Hold a writer just before it swaps its run into place, and let others act meanwhile."""
    reached, go, other = world.folder / "reached", world.folder / "go", world.folder / "other.log"
    second = world.folder / "second"
    status, said = command(["fit", world.spec, "--out", second, "--set", "svi.seed=1"], world.log)
    assert status == 0, said

    def held() -> None:
        from ppl_vae.runs import evaluated

        write = evaluated._write_report

        def waiting(*given: Any) -> Any:
            found = write(*given)
            reached.touch()
            while not go.exists():
                time.sleep(0.01)
            return found

        evaluated._write_report = waiting

    def another(place: Path) -> str:
        shutil.rmtree(place)
        shutil.copytree(second, place)
        return ""

    def refused(*arguments: Any) -> str:
        status, said = command([*arguments], other)
        return "" if status == 2 and "Traceback" not in said else told(status, said)

    acts: dict[str, tuple[Callable[[Path], str], str]] = {
        "evaluate": (lambda place: refused("evaluate", place), "whole"),
        "fit --force": (lambda place: refused("fit", world.spec, "--out", place, "--force"), "whole"),
        "a read": (lambda place: "" if state_of(place) == "finished" else state_of(place), "whole"),
        "another run moved there": (another, "second"),
        "the run moved away": (lambda place: place.rename(place.with_name("moved")) and "", "moved"),
        "a file of a person's": (lambda place: (place / "notes.txt").write_text("mine") and "", "notes"),
    }
    for writer in (["evaluate"], ["fit", world.spec, "--set", "svi.checkpoint=off", "--force", "--out"]):
        for name, (act, after) in acts.items():
            for ends in ("let go", "killed"):
                place = world.fresh("run")
                shutil.copytree(world.whole, place)
                for file in (reached, go):
                    file.unlink(missing_ok=True)
                number = child([*writer, place], world.log, held)
                until(reached.exists, number)
                lost = act(place)
                if ends == "killed":
                    os.kill(number, signal.SIGKILL)
                go.touch()
                status = finish(number)
                case = f"{name} beside {writer[0]}, then {ends}"
                home = place.with_name("moved") if after == "moved" else place
                good = state_of(home) == "finished" and same(home, second if after == "second" else world.whole)
                good &= after != "notes" or (place / "notes.txt").read_text() == "mine"
                good &= status in ((-9,) if ends == "killed" else (0,) if after == "whole" else (0, 2))
                if not lost and not good:
                    lost = f"{state_of(home)}, {told(status, world.said())}"
                yield case, lost


def locales(world: World) -> Iterator[tuple[str, str]]:
    """Start a command anew under other languages and encodings of the terminal."""
    for name, more in {
        "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        "POSIX": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        "Turkish": {"LC_ALL": "tr_TR.UTF-8"},
        "one that is not there": {"LC_ALL": "xx_YY.KOI8-R"},
        "ASCII": {"PYTHONIOENCODING": "ascii"},
        "Latin-1": {"PYTHONIOENCODING": "latin-1"},
        "UTF-16": {"PYTHONIOENCODING": "utf-16"},
    }.items():
        for place in (world.fresh("run"), world.folder / "rün"):
            shutil.rmtree(place, ignore_errors=True)
            command_line = [sys.executable, "-m", "ppl_vae", "fit", str(world.spec), "--out", str(place)]
            done = subprocess.run(command_line, env={**os.environ, **more}, capture_output=True, timeout=300)
            refused = done.returncode == 2 and not place.name.isascii() and "PYTHONUTF8" in more and not place.exists()
            good = refused or (done.returncode == 0 and same(place, world.whole))
            good &= b"Traceback" not in done.stderr
            yield (
                f"{name}, {place.name}",
                "" if good else told(done.returncode, (done.stdout + done.stderr).decode(errors="replace")),
            )


def write_in_two_steps() -> None:
    """Break the library on purpose: a run is removed, and then copied anew."""
    from ppl_vae.runs import places

    def swap(partial: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(partial, folder)

    places._swap = swap
