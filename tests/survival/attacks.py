"""The attacks, each a generator of outcomes: `""` for a case that was survived, else what was lost.

The quick tests take a few cases of each; `soak.py` takes them all and counts.
"""

import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from cases import (
    PROGRAM,
    SPEC,
    child,
    command,
    damages,
    finish,
    hostile_states,
    kill_at,
    left_over,
    mutated,
    project,
    same,
    state_of,
    weights,
)

from ppl_vae import fit, load_run, load_spec
from ppl_vae.data import load
from ppl_vae.runs import storage, trained

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def _told(status: int, said: str) -> str:
    return f"status {status}: {said[-300:]}"


class World:
    """A spec with its data, the run that it leads to, and what is in the middle of training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec, self.log = folder, project(folder), folder / "log"
        status, said = command(["fit", self.spec, "--out", folder / "whole"], self.log)
        assert status == 0, said
        self.whole, self.part = folder / "whole", folder / "part"
        number = child(["fit", self.spec, "--out", self.part, "--set", "svi.epochs=100000"], self.log)
        while state_of(self.part) != "interrupted":
            time.sleep(0.02)
        os.kill(number, signal.SIGTERM)
        assert finish(number) == 143, self.log.read_text()

    def fresh(self, name: str) -> Path:
        """A place of this name, with nothing in it."""
        place = self.folder / "places" / name
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        return place

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-300:]


def kills_while_writing(world: World, verb: str, steps: Iterable[int]) -> Iterator[tuple[str, str]]:
    """Kill a command at its n-th touch of a file; then the run is whole, and the same command ends as it would have."""
    for step in steps:
        place = world.fresh("run")
        before: set[str] = {"nothing", "interrupted", "finished"}
        if verb != "fit":
            shutil.copytree(world.whole, place)
            before = {"finished"} if verb == "evaluate" else {"finished", "interrupted"}
        if verb == "resume":
            shutil.rmtree(place)
            command(["fit", world.spec, "--out", place], world.log, _stop_after(3))
            before = {"interrupted", "finished"}
        arguments = {
            "fit": ["fit", world.spec, "--out", place],
            "force": ["fit", world.spec, "--out", place, "--force"],
            "evaluate": ["evaluate", place],
            "resume": ["fit", place],
        }[verb]
        status, said = command(arguments, world.log, kill_at(step, place.parent))
        if status == 0:
            return
        case = f"{verb} killed at step {step}"
        if status != -signal.SIGKILL:
            yield case, _told(status, said)
            continue
        state = state_of(place)
        if state not in before:
            yield case, f"left {state}"
            continue
        if state == "interrupted":
            arguments = ["fit", place]
        elif state == "finished":
            arguments = ["evaluate", place]
        status, said = command(arguments, world.log)
        lost = "" if status == 0 and same(place, world.whole) else f"then status {status}: {said[-300:]}"
        yield case, lost or "".join(f"left {name} " for name in left_over(place))


def _stop_after(epochs: int) -> Any:
    """Interrupt a command after some epochs."""

    def hook() -> None:
        from ppl_vae.runs import run

        fit = run.fit

        def stopping(*given: Any, on_epoch: Any, **more: Any) -> Any:
            def stop(epoch: int, state: Any) -> None:
                on_epoch(epoch, state)
                if epoch + 1 == epochs:
                    raise KeyboardInterrupt

            return fit(*given, on_epoch=stop, **more)

        run.fit = stopping

    return hook


def _keep_each_step() -> None:
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
        time.sleep(draw.uniform(0.0, 0.6))
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
        yield f"random kill {number} ({state})", "" if whole else _told(status, said)


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
            process = child(["fit", world.spec, "--out", place, "--set", "svi.epochs=100000"], world.log)
            while state_of(place) != "interrupted":
                time.sleep(0.02)
            for _ in range(1 + double):
                os.kill(process, number)
                time.sleep(0.001)
            status, state = finish(process), state_of(place)
            good = status == 128 + number and state == "interrupted" and "Go on with: ppl-vae fit" in world.said()
            yield f"{name}{' twice' * double}", "" if good else f"status {status}, {state}: {world.said()}"


def ignored_signals(world: World, names: Iterable[str] = ("SIGHUP", "SIGINT")) -> Iterator[tuple[str, str]]:
    """Signals that were ignored at the start, as by nohup, stay so."""
    for name in names:
        place, number = world.fresh("run"), getattr(signal, name)

        def ignore(number: int = number) -> None:
            signal.signal(number, signal.SIG_IGN)

        process = child(["fit", world.spec, "--out", place], world.log, ignore)
        while state_of(place) == "nothing":
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        status = finish(process)
        yield f"{name} ignored", "" if status == 0 and same(place, world.whole) else f"status {status}: {world.said()}"


def flips_and_cuts(world: World, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Damage a byte of a file, or cut it: readers refuse the run, or answer as before."""
    for folder in (world.whole, world.part):
        twin = world.fresh("twin")
        shutil.copytree(folder, twin)

        def read() -> Any:
            if (twin / storage.STATE).exists():  # noqa: B023
                storage.check_folder(twin, finished=False)  # noqa: B023
                trained.read_spec(twin, False, lambda message: None)  # noqa: B023
                state = storage.read_state(twin / storage.STATE)  # noqa: B023
                return repr(state), repr(sorted(weights(twin).items()))  # noqa: B023
            found = load_run(twin)  # noqa: B023
            history = storage.read_metrics(twin, found.report["train"]["epochs"])  # noqa: B023
            table = storage.read_tensors(twin / "evidence.safetensors")  # noqa: B023
            spec = found.spec.to_dict()
            spec["data"].pop("name")
            return spec, found.report, repr(sorted(weights(twin).items())), history, repr(sorted(table.items()))  # noqa: B023

        truth = read()
        for file, whole, damaged in damages(twin, count // 2, seed):
            file.write_bytes(damaged)
            case = f"{file.relative_to(twin)}, {len(whole)} to {len(damaged)} bytes"
            try:
                lost = "" if read() == truth else "another content was accepted"
            except ValueError:
                lost = ""
            except Exception as error:
                lost = f"{type(error).__name__}: {error}"
            file.write_bytes(whole)
            yield case, lost
        yield "and whole again", "" if read() == truth else "the run does not read"


def hostile_runs(world: World) -> Iterator[tuple[str, str]]:
    """Interrupted runs with states that do not fit, sealed as if they were whole: refused, and nothing crashes."""
    for case, state in hostile_states(world.part):
        twin = world.fresh("twin")
        shutil.copytree(world.part, twin)
        storage.write_state(state, twin / storage.STATE)
        (twin / storage.MANIFEST).unlink()
        storage.seal(twin, {})
        status, said = command(["fit", twin], world.log)
        good = status == 2 and "Traceback" not in said
        yield case, "" if good else _told(status, said)
    for case, text in {
        "deep metadata": "[" * 100_000,
        "no JSON": "{",
        "a list": "[]",
        "no keys": "{}",
        "numbers for words": '{"digest": 1, "format": 2, "files": 3}',
    }.items():
        for name in (storage.MANIFEST, "report.json"):
            twin = world.fresh("twin")
            shutil.copytree(world.whole, twin)
            (twin / name).write_text(text)
            if name != storage.MANIFEST:
                (twin / storage.MANIFEST).unlink()
                storage.seal(twin, {})
            for verb in (["evaluate", twin], ["compare", twin, world.whole], ["check", twin]):
                status, said = command(verb, world.log)
                good = status == (0 if verb[0] == "check" and name == "report.json" else 2) and "Traceback" not in said
                yield f"{name}: {case}, {verb[0]}", "" if good else _told(status, said)
    yield from _strange_entries(world)
    yield from _programs(world)


def _strange_entries(world: World) -> Iterator[tuple[str, str]]:
    """Links, pipes and a person's files in a run: neither read nor copied nor lost."""
    secret = world.folder / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "key").write_text("private")
    for name, make in {
        "a link to a folder": lambda run: (run / "figures2").symlink_to(secret),
        "a link to .": lambda run: (run / "loop").symlink_to("."),
        "figures as a link": lambda run: (shutil.rmtree(run / "figures"), (run / "figures").symlink_to(secret)),
        "report as a link": lambda run: ((run / "report.md").unlink(), (run / "report.md").symlink_to(secret / "key")),
        "weights as a link": lambda run: (
            (run / "model.safetensors").rename(world.folder / "w"),
            (run / "model.safetensors").symlink_to(world.folder / "w"),
        ),
        "a pipe": lambda run: ((run / "metrics.jsonl").unlink(), os.mkfifo(run / "metrics.jsonl")),
        "an edited report": lambda run: (run / "report.md").open("a").write("my note"),
        "a folder of notes": lambda run: (run / "notes").mkdir(),
    }.items():
        twin = world.fresh("twin")
        shutil.copytree(world.whole, twin)
        make(twin)
        before = {path: path.lstat().st_mtime_ns for path in [*twin.rglob("*"), *secret.rglob("*")]}
        status, said = command(["evaluate", twin], world.log)
        same_as_before = before == {path: path.lstat().st_mtime_ns for path in [*twin.rglob("*"), *secret.rglob("*")]}
        good = status == 2 and "Traceback" not in said and same_as_before
        yield name, "" if good else f"status {status}, as before: {same_as_before}: {said[-300:]}"


def _programs(world: World) -> Iterator[tuple[str, str]]:
    """A stranger's run with a program: nothing runs without leave, and with leave it is told before it runs."""
    folder = world.folder / "theirs"
    folder.mkdir(exist_ok=True)
    mark = folder / "mark"
    (folder / "own.py").write_text(PROGRAM.replace("MARK", repr(str(mark))))
    text = SPEC.partition("[prior]")[0] + 'program = "own.py"\n[svi]' + SPEC.partition("[svi]")[2]
    (folder / "own.toml").write_text(text.replace('"table.npy"', f'"{world.folder / "table.npy"}"'))
    for verb, hook in (("evaluate", None), ("fit", _stop_after(2))):
        place = world.fresh("run")
        status, said = command(["fit", folder / "own.toml", "--out", place], world.log, hook or (lambda: None))
        assert status == (130 if hook else 0), said
        mark.unlink()
        for more, wanted in (([], 2), (["--trust-code"], 0)):
            for arguments in ([verb, place], ["check", place / "spec.toml"]):
                twin = place if arguments[0] == verb else place / "spec.toml"
                status, said = command([arguments[0], twin, *more], world.log)
                ran = mark.exists()
                mark.unlink(missing_ok=True)
                told = "runs the code of" in said or "without --trust-code" in said
                good = status == wanted and ran == (wanted == 0) and told
                yield (
                    f"{' '.join(map(str, arguments[:1]))} {more}",
                    "" if good else f"{status}, ran: {ran}: {said[-300:]}",
                )


def mutated_specs(world: World, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Specs with random mistakes: refused in words, or good to build."""
    draw, path = random.Random(seed), world.folder / "mutant.toml"
    good = tomllib.loads(SPEC)
    for number in range(count):
        tables = mutated(good, draw)
        try:
            spec = load_spec(world.spec, {})
            spec = type(spec).from_dict(tables, path, trust_code=False)
            spec.check(spec.load_data())
            yield f"spec {number}", ""
        except (ValueError, MemoryError, OverflowError, OSError):
            yield f"spec {number}", ""
        except RuntimeError as error:
            yield f"spec {number}", "" if "memory" in str(error) else f"{error}: {json.dumps(tables)[:400]}"
        except Exception as error:
            yield f"spec {number}", f"{type(error).__name__}: {error}: {json.dumps(tables)[:400]}"


def mutated_data(world: World, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Data files with flipped and cut bytes: refused in words, or read."""
    folder, draw = world.folder / "data", random.Random(seed)
    folder.mkdir(exist_ok=True)
    x = np.random.default_rng(1).integers(0, 9, (12, 3))
    np.save(folder / "a.npy", x)
    np.savez_compressed(folder / "a.npz", x=x, y=np.arange(12) % 2)
    for suffix, mark in ((".csv", ","), (".tsv", "\t"), (".txt", " ")):
        (folder / f"a{suffix}").write_text(f"a{mark}b{mark}c\n" + "".join(mark.join(map(str, r)) + "\n" for r in x))
    import pandas

    pandas.DataFrame(x.astype(float), columns=list("abc")).to_parquet(folder / "a.parquet")
    originals = [path for path in sorted(folder.iterdir()) if path.stem == "a"]
    for number in range(count):
        original = originals[number % len(originals)]
        whole = bytearray(original.read_bytes())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(whole))
            if draw.random() < 0.2 and len(whole) > 9:
                del whole[at:]
                break
            whole[at] = draw.randrange(256)
        file = folder / f"b{original.suffix}"
        file.write_bytes(whole)
        try:
            load(file)
            lost = ""
        except (ValueError, MemoryError):
            lost = ""
        except Exception as error:
            lost = f"{type(error).__name__}: {error}"
        yield f"{original.suffix} {number}", lost


def hostile_data(world: World) -> Iterator[tuple[str, str]]:
    """Files that announce more than they hold, never end, or hold no numbers: refused, and memory stays small."""
    folder = world.folder / "hostile"
    folder.mkdir(exist_ok=True)
    np.save(folder / "good.npy", np.ones((9, 3)))
    good = (folder / "good.npy").read_bytes()
    (folder / "huge.npy").write_bytes(good.replace(b"(9, 3)", b"(9999999999, 200)"))
    np.savez(folder / "words.npz", x=np.array([["a", "b"]] * 9))
    np.savez(folder / "objects.npz", x=np.array([[1, None]] * 9, dtype=object))
    np.savez_compressed(folder / "bomb.npz", x=np.zeros((3000, 1000)))
    os.mkfifo(folder / "pipe.csv")
    os.mkfifo(folder / "pipe.npy")
    (folder / "zero.npy").symlink_to("/dev/zero")
    (folder / "memory.csv").symlink_to("/proc/self/mem")
    (folder / "nul.csv").write_bytes(b"1,2\0\n3,4\n")
    (folder / "bytes.csv").write_bytes(b"\xff\xfe\n1,2\n")
    (folder / "field.csv").write_text("a,b\n" + '"' + "1" * 200_000 + '",2\n')
    for name in ("deep", "dotted"):
        text = "a=" + "[" * 100_000 if name == "deep" else "[" + ".".join("a" * 5_000) + "]"
        (folder / f"{name}.toml").write_text(text)
    os.mkfifo(folder / "pipe.toml")
    (folder / "binary.toml").write_bytes(bytes(range(256)))
    (folder / "digits.toml").write_text("a = " + "9" * 10_000)

    def small() -> None:
        os.environ["PPL_VAE_LARGEST"] = "1e7"

    for file in sorted(folder.iterdir()):
        if file.stem == "good":
            continue
        given = [file] if file.suffix == ".toml" else [world.spec, "--set", f"data.name={file}"]
        status, said = command(["check", *given], world.log, small)
        yield file.name, "" if status == 2 and "Traceback" not in said else _told(status, said)
    for setting in (
        *("prior.family=['Normal']", "prior=[1]", "model.latent=1000000000", "model.latent=10000000000000000000"),
        *("svi=3", "data.name=['a']", "likelihood.network=['x']", "likelihood.network.family=['MLP']"),
        *(
            "svi.seed=1e400",
            "data.seed=-1",
            f"data.name={'x' * 5000}.csv",
            "evaluation.samples=0",
            "svi.checkpoint=often",
        ),
        *("data.root='\\u0000'", "data.name='\\u0000.csv'", f"x={'[' * 5000}", "a.b.c=1"),
        *("model.program='\\u0000.py'", "posterior.encoding={a=1}", "svi.learning_rate=nan", "likelihood.scale=[]"),
    ):
        status, said = command(["check", world.spec, "--set", setting], world.log)
        good = status == 2 and "Traceback" not in said
        yield setting[:40], "" if good else _told(status, said)


def races(world: World) -> Iterator[tuple[str, str]]:
    """Two writers of one run, and a reader beside a writer."""
    place = world.fresh("run")
    first = child(["fit", world.spec, "--out", place, "--set", "svi.epochs=100000"], world.log)
    while state_of(place) != "interrupted":
        time.sleep(0.02)
    other = world.folder / "other.log"
    for verb in (["fit", world.spec, "--out", place, "--force"], ["fit", place]):
        status, said = command(verb, other)
        named = f"process {first}" in said
        yield f"{verb[0]} beside fit", "" if status == 2 and named else _told(status, said)
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
        yield f"{arguments[0]} on a full disk", "" if good else _told(status, said)
    for number in (1, 2):

        def closed(number: int = number) -> None:
            os.close(number)

        status, said = command(["fit", world.spec, "--out", world.fresh("run")], world.log, closed)
        good = status == (1 if number == 1 else 0) and same(world.folder / "places" / "run", world.whole)
        yield f"stream {number} closed", "" if good else _told(status, said)

    def ascii_only() -> None:
        import sys

        sys.stdout, sys.stderr = (
            open(n, "w", encoding="ascii", errors=errors, closefd=False)
            for n, errors in ((1, "strict"), (2, "backslashreplace"))
        )

    status, said = command(["fit", world.spec, "--out", world.fresh("run")], world.log, ascii_only)
    yield "an ASCII terminal", "" if status == 0 and "+-" in said else _told(status, said)
    odd = os.fsdecode(b"r\xff")
    status, said = command(["fit", world.spec, "--out", world.folder / "places" / odd], world.log)
    yield (
        "a name that is no UTF-8",
        "" if status == 2 and "Traceback" not in said else _told(status, said),
    )
    status, said = command(["fit", world.spec, "--out", "."], world.log, lambda: os.chdir(world.fresh("run").parent))
    yield (
        "the folder where one is",
        "" if status == 2 and "where you are" in said else _told(status, said),
    )
    status, said = command(["fit", world.spec, "--out", "/proc/run"], world.log)
    yield "a folder of the system", "" if status == 2 and "Traceback" not in said else _told(status, said)
    if os.geteuid() == 0 and shutil.which("mount"):
        mounted = world.fresh("mounted")
        mounted.mkdir()
        if os.system(f"mount -t tmpfs -o size=100k none '{mounted}' 2>/dev/null") == 0:
            try:
                status, said = command(["fit", world.spec, "--out", mounted], world.log)
                yield (
                    "a mount point",
                    "" if status == 2 and "mount point" in said else _told(status, said),
                )
                status, said = command(["fit", world.spec, "--out", mounted / "run"], world.log)
                good = status == 2 and "Traceback" not in said and not any(mounted.iterdir())
                yield "a disk that is really full", "" if good else _told(status, said)
            finally:
                os.system(f"umount '{mounted}'")


ALL = {
    "kill -9 at every writing step of fit": lambda world: kills_while_writing(world, "fit", range(1, 10_000)),
    "kill -9 at every writing step of fit --force": lambda world: kills_while_writing(world, "force", range(1, 10_000)),
    "kill -9 at every writing step of evaluate": lambda world: kills_while_writing(world, "evaluate", range(1, 10_000)),
    "kill -9 at every writing step of a resumed fit": lambda world: kills_while_writing(
        world, "resume", range(1, 10_000)
    ),
    "kill -9 at random moments": lambda world: random_kills(world, 200),
    "kill -9 at random moments, with the state kept at each step": lambda world: random_kills(
        world, 40, 1, _keep_each_step
    ),
    "memory over 10,000 captured steps": lambda world: memory_is_flat(world, 10_000),
    "signals, single and double": signals,
    "signals that were ignored": ignored_signals,
    "flips and cuts": lambda world: flips_and_cuts(world, 500),
    "hostile runs": hostile_runs,
    "hostile data and settings": hostile_data,
    "mutated specs": lambda world: mutated_specs(world, 2000),
    "mutated data files": lambda world: mutated_data(world, 1000),
    "races": races,
    "bad places and streams": bad_places,
}
QUICK = {
    "kills in fit": lambda world: kills_while_writing(world, "fit", (9, 40, 77)),
    "kills in fit --force": lambda world: kills_while_writing(world, "force", (60,)),
    "kills in evaluate": lambda world: kills_while_writing(world, "evaluate", (30, 90, 95, 99)),
    "kills in a resumed fit": lambda world: kills_while_writing(world, "resume", (35,)),
    "random kills": lambda world: random_kills(world, 2),
    "random kills within epochs": lambda world: random_kills(world, 1, 1, _keep_each_step),
    "memory over captured steps": lambda world: memory_is_flat(world, 2_000),
    "signals": lambda world: signals(world, ("SIGINT", "SIGHUP"), (True,)),
    "ignored signals": lambda world: ignored_signals(world, ("SIGHUP",)),
    "flips and cuts": lambda world: flips_and_cuts(world, 60),
    "hostile runs": lambda world: islice(hostile_runs(world), 16),
    "programs of strangers": _programs,
    "hostile data and settings": lambda world: islice(hostile_data(world), 16),
    "mutated specs": lambda world: mutated_specs(world, 60),
    "mutated data": lambda world: mutated_data(world, 60),
    "races": races,
    "bad places": bad_places,
}


def write_in_two_steps() -> None:
    """Break the library on purpose: a run is removed, and then copied anew."""
    from ppl_vae.runs import places

    def swap(partial: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(partial, folder)

    places._swap = swap
