"""Attacks on runs: children that are killed, files that are damaged, inputs that are hostile. Seeded, and counted."""

import contextlib
import copy
import ctypes
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
sys.path.insert(0, str(Path(__file__).parents[1]))

import pyro
import safetensors.torch
import small
import torch
import torch._dynamo  # which Adam loads

from ppl_vae import load_run
from ppl_vae.cli import app
from ppl_vae.runs import evaluated, run, schema, stops, storage

schema.sections()

SPEC = small.SPEC.replace("epochs = 2", 'epochs = 6\ncheckpoint = "1 epoch"')
PROGRAM = """
import pathlib, pyro, torch
import pyro.distributions as dist

pathlib.Path(MARK).touch()

class Own(torch.nn.Module):
    def __init__(self, features, latent):
        super().__init__()
        self.decoder, self.encoder = torch.nn.Linear(latent, features), torch.nn.Linear(features, latent)

    def model(self, x):
        pyro.module(f"own{id(self)}", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.decoder.in_features), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 5.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module(f"own{id(self)}", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))
"""


DISCRETE = PROGRAM.replace("pathlib.Path(MARK).touch()", "").replace(
    """            pyro.sample("x", dist.Normal(self.decoder(z), 5.0)""",
    """            c = pyro.sample("c", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.decoder(z) + c.unsqueeze(-1), 5.0)""",
)


def own_program(world: Any, text: str, name: str = "own") -> Path:
    """A spec of the same training of a program of one's own."""
    folder = world.folder / name
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(text)
    spec = SPEC.partition("[prior]")[0] + 'program = "own.py"\n[svi]' + SPEC.partition("[svi]")[2]
    (folder / "own.toml").write_text(spec.replace('"table.npy"', f'"{world.spec.with_name("table.npy")}"'))
    return folder / "own.toml"


def project(folder: Path) -> Path:
    """Write a spec and its data, and give the spec."""
    path = small.small_spec(folder)
    path.write_text(SPEC)
    return path


def child(arguments: list[Any], log: Path, before: Callable[[], Any] = lambda: None) -> int:
    """Start a command in a process of its own, without loading the libraries anew; pictures are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.stdout.flush()
        number = os.fork()
    if number:
        return number
    status = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False, buffering=1) for n in (1, 2))
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        for name in (*stops.NAMES, "SIGQUIT", "SIGALRM"):  # whatever this process was started with
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_default_dtype(torch.float32)
        evaluated.draw_run = lambda *given, **more: given[3].mkdir() or {}
        before()
        try:
            app([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            os.write(handle, traceback.format_exc().encode())
            status = 1
    finally:
        os._exit(status)


def finish(number: int, patience: float = 600.0) -> int:
    """Wait for a child, and give its status: minus the signal that killed it."""
    deadline = time.monotonic() + patience
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
        time.sleep(0.005)


def command(arguments: list[Any], log: Path, before: Callable[[], Any] = lambda: None) -> tuple[int, str]:
    """Run a command to its end: its status, and all that it printed."""
    status = finish(child(arguments, log, before))
    return status, log.read_text(errors="replace") if log.is_file() else ""


WRITING = (
    *(
        "openat",
        "write",
        "pwrite64",
        "mkdir",
        "mkdirat",
        "rename",
        "renameat",
        "renameat2",
        "unlink",
        "unlinkat",
        "rmdir",
    ),
    *("link", "linkat", "symlink", "symlinkat", "ftruncate", "fallocate", "fsync", "fdatasync", "chmod", "fchmodat"),
)
STRACE = shutil.which("strace")


def _wait_for_tracer() -> None:
    """Let another process trace this one, and wait until it does."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER of any
    deadline = time.monotonic() + 30
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        if time.monotonic() > deadline:
            os._exit(71)
        time.sleep(0.001)


def traced(arguments: list[Any], log: Path, trace: Path, *options: str) -> int:
    """Run a command under strace, and give its status."""
    number = child(arguments, log, _wait_for_tracer)
    command = [STRACE, "-qq", "-o", trace, *options, "-p", number]
    tracer = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, start_new_session=True)
    status = finish(number)
    tracer.wait(60)
    return status


def writing_steps(arguments: list[Any], root: Path, log: Path) -> list[Any]:
    """The moments at which a command writes under a folder: system calls and their counts, else Python's own."""
    trace = log.with_name("trace")
    if STRACE and traced(arguments, log, trace, "-y", "-e", f"trace={','.join(WRITING)}") == 0:
        found, counted = [], dict.fromkeys(WRITING, 0)
        for line in trace.read_text(errors="replace").splitlines():
            if match := re.match(r"(\w+)\(", line):
                counted[match[1]] += 1
                reads = match[1] == "openat" and not re.search("O_(WRONLY|RDWR|CREAT|TRUNC)", line)
                if str(root) in line and not reads:
                    found.append((match[1], counted[match[1]]))
        if found:
            return found
    counter = log.with_name("counter")
    assert command(arguments, log, hooked(root, count=counter))[0] == 0, log.read_text()
    return [("step", n) for n in range(1, len(counter.read_bytes()) + 1)]


def killed(arguments: list[Any], root: Path, log: Path, step: tuple[str, int]) -> int:
    """Run a command that is killed at one of its `writing_steps`, and give its status."""
    name, number = step
    if name == "step":
        return command(arguments, log, hooked(root, kill=number))[0]
    inject = f"inject={name}:signal=KILL:when={number}"
    return traced(arguments, log, log.with_name("trace"), "-e", f"trace={name}", "-e", inject)


def hooked(root: Path, kill: int = 0, count: Path | None = None) -> Callable[[], None]:
    """Make a process kill itself at its n-th writing step under a folder, or count them as the bytes of a file."""

    def hook() -> None:
        counted, prefix = [0], str(root)

        def watch(event: str, given: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"):
                return
            writes = event != "open" or (
                isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and any(os.fsdecode(one).startswith(prefix) for one in given[:2] if isinstance(one, str | bytes)):
                counted[0] += 1
                if counted[0] == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                if count is not None:
                    count.write_bytes(b"x" * counted[0])

        sys.addaudithook(watch)

    return hook


def state_of(folder: Path) -> str:
    """What a run directory holds: a finished or an interrupted run, nothing, or something unreadable."""
    try:
        load_run(folder)
    except ValueError as error:
        if "was interrupted" not in str(error):
            held = [path.name for path in folder.iterdir()] if folder.exists() else []
            return f"unreadable: {error}" if set(held) - {"metrics.jsonl"} else "nothing"  # but the figures so far
        storage.check_folder(folder, finished=False)
        storage.read_state(folder / storage.STATE)
        return "interrupted"
    return "finished"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same weights, history and figures, to the bit."""
    a, b = weights(one), weights(other)
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and first["test"] == second["test"]


def left_over(folder: Path) -> list[str]:
    """What lies beside a run that nobody put there; the file of a lock is harmless."""
    names = (path.name for path in folder.parent.iterdir())
    return [name for name in names if name.startswith(f".{folder.name}.") and not name.endswith(".lock")]


def damages(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, bytes, bytes]]:
    """Flips of a byte and cuts, over all files of a run: the file, what it held, and what it is to hold."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        file = files[number % len(files)]
        whole = file.read_bytes()
        if not whole:
            continue
        at = draw.randrange(len(whole))
        if draw.random() < 0.3:
            yield file, whole, whole[:at]
        else:
            yield file, whole, whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]


JUNK: list[Any] = [
    *(None, True, -1, 0, 1, 10**400, 2**63, 10**12, 0.5, -0.0, float("nan"), float("inf"), "", "x", "é\0", "a" * 5000),
    *([], ["Normal"], [[[1]]], {}, {"family": "MLP"}, {"family": ["Normal"]}, {"program": "none.py"}, {"a": {"b": {}}}),
    *(
        "Normal",
        "Bernoulli",
        "MixtureNormal",
        "VampPrior",
        "best",
        "dynamic",
        "standardize",
        "/proc/self/mem",
        "nowhere/",
    ),
]


WORDS = ["family", "scale", "hidden", "seed", "x", "network", "program", "kinds"]


def mutated(tables: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy of the tables of a spec with one to three mutations: junk, another key, a lost or a moved table."""
    changed = copy.deepcopy(tables)
    for _ in range(draw.randint(1, 3)):
        places = [changed]
        for place in places:
            places += [value for value in place.values() if isinstance(value, dict)]
        place, action = draw.choice(places), draw.random()
        key = draw.choice(list(place) or WORDS)
        if action < 0.2:
            place[draw.choice(WORDS)] = copy.deepcopy(draw.choice(JUNK))
        elif action < 0.3:
            place.pop(key, None)
        elif action < 0.4:
            place[key] = copy.deepcopy(draw.choice(places))
        else:
            place[key] = copy.deepcopy(draw.choice(JUNK))
    return changed


def hostile_states(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Training states that do not fit the program, by what is wrong with them."""
    state = storage.read_state(folder / storage.STATE)
    first = state["optimizer"]["state"][0]

    def changed(**more: Any) -> dict[str, Any]:
        return {**state, **more}

    def moments(**more: Any) -> dict[str, Any]:
        optimizer = {**state["optimizer"], "state": {**state["optimizer"]["state"], 0: {**first, **more}}}
        return changed(optimizer=optimizer)

    yield "a moment cut short", moments(exp_avg=first["exp_avg"].flatten()[:1])
    yield "a moment of integers", moments(exp_avg_sq=first["exp_avg_sq"].long())
    yield "steps in a row", moments(step=torch.zeros(7))
    yield "one weight for all", changed(learned=[torch.zeros(1) for _ in state["learned"]])
    yield "weights of another type", changed(learned=[value.double() for value in state["learned"]])
    yield "too few weights", changed(learned=state["learned"][:-1])
    yield "no list", changed(learned={"a": 1})
    yield "best of another shape", changed(best=[torch.zeros(2)])
    yield "a history of words", changed(history={**state["history"], "elbo": ["a"]})
    yield "a schedule of words", changed(schedule={**state["schedule"], "last_epoch": "x"})
    yield "a schedule's method", changed(schedule={**state["schedule"], "step": 1})
    yield "groups without their tensors", changed(optimizer={**state["optimizer"], "param_groups": []})
    noise = [torch.zeros(3, dtype=torch.uint8)]
    yield "a place of words", changed(place="here")
    yield "a place without losses", changed(place={"losses": torch.zeros(3), "generators": noise})
    yield "generators of another kind", changed(place={"losses": torch.zeros(1, 2), "generators": noise})
    yield "no optimizer", {key: value for key, value in state.items() if key != "optimizer"}


def told(status: int, said: str) -> str:
    return f"status {status}: {said[-300:]}"


def stop_after(epochs: int) -> Any:
    """Interrupt a command after some epochs."""

    def hook() -> None:
        fit = run.fit

        def stopping(*given: Any, on_epoch: Any, **more: Any) -> Any:
            def stop(epoch: int, state: Any) -> None:
                on_epoch(epoch, state)
                if epoch + 1 == epochs:
                    raise KeyboardInterrupt

            return fit(*given, on_epoch=stop, **more)

        run.fit = stopping

    return hook


class World:
    """A spec with its data, the run that it leads to, and what is in the middle of training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec, self.log = folder, project(folder), folder / "log"
        self.whole, self.part = folder / "whole", folder / "part"
        for arguments in (["fit", self.spec, "--out", folder / "warm"], ["evaluate", folder / "warm"]):
            _warmed(arguments)
        start = time.monotonic()
        status, said = command(["fit", self.spec, "--out", self.whole], self.log)
        assert status == 0, said
        self.seconds = time.monotonic() - start
        number = self.training(self.part)
        os.kill(number, signal.SIGTERM)
        assert finish(number) == 143, self.log.read_text()

    def apart(self, folder: Path) -> "World":
        """The same with a folder of its own to write to."""
        other = copy.copy(self)
        folder.mkdir()
        other.folder, other.log = folder, folder / "log"
        return other

    def fresh(self, name: str) -> Path:
        """A place of this name, with nothing in it."""
        place = self.folder / "places" / name
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        return place

    def training(self, place: Path, before: Callable[[], Any] = lambda: None, *more: str) -> int:
        """A training there that does not end by itself, and whose state was kept once."""
        number = child(["fit", self.spec, "--out", place, "--set", "svi.epochs=100000", *more], self.log, before)
        until(lambda: state_of(place) == "interrupted", number)
        return number

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-300:]


def until(reached: Callable[[], bool], number: int, patience: float = 120.0) -> None:
    """Wait for what a child does.

    Raises:
        RuntimeError: If it ends before, or does not do it.
    """
    deadline = time.monotonic() + patience
    while not reached():
        if time.monotonic() > deadline or os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if reached():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
            raise RuntimeError(f"process {number} did not come that far")
        time.sleep(0.01)


def _warmed(arguments: list[Any]) -> None:
    """Run a command here, so that the children, which are forked, need not load what it loads."""
    drawn, evaluated.draw_run = evaluated.draw_run, lambda *given, **more: given[3].mkdir() or {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            app([*map(str, arguments)])
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(said.getvalue()) from stop
    evaluated.draw_run = drawn
    pyro.clear_param_store()
