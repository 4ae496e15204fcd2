"""Try all attacks on runs, and write what was tried and what was lost: python tests/survival/soak.py --page FILE."""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import attacks as a
import hostile as h
import torch
from cases import STRACE, World

HEAD = """# What runs survive

`make soak` attacks runs and writes this page. A case is survived if nothing that was finished or kept is lost, no
damaged content is accepted, no stranger's code runs, and every refusal is one message with exit status 2. A run that
was killed is then gone on with, and must end with the same weights and figures, to the bit, as one never killed.

| attack | cases | lost |
|---|---:|---:|
"""
Part = Callable[[World], Iterable[tuple[str, str]]]


def shared(attack: Callable[..., Any], *given: Any, parts: int) -> list[Part]:
    """An attack at every writing step, in parts that can run side by side."""
    return [partial(_chosen, attack, given, slice(number, None, parts)) for number in range(parts)]


def _chosen(attack: Callable[..., Any], given: Any, chosen: slice, world: World) -> Any:
    return attack(world, *given, chosen)


def seeded(attack: Callable[..., Any], count: int, parts: int, *more: Any) -> list[Part]:
    """Cases by chance, in parts with seeds of their own."""
    return [partial(_drawn, attack, count // parts, seed, more) for seed in range(parts)]


def _drawn(attack: Callable[..., Any], count: int, seed: int, more: Any, world: World) -> Any:
    return attack(world, count, seed, *more)


def first(attack: Part, count: int) -> Part:
    """A few cases of an attack."""
    return lambda world: islice(attack(world), count)


ALL: dict[str, list[Part]] = {
    "kill -9 at every writing step of fit": shared(a.kills_while_writing, "fit", parts=6),
    "kill -9 at every writing step of fit --force": shared(a.kills_while_writing, "force", parts=6),
    "kill -9 at every writing step of evaluate": shared(a.kills_while_writing, "evaluate", parts=2),
    "kill -9 at every writing step of a resumed fit": shared(a.kills_while_writing, "resume", parts=4),
    "kill -9 at random moments": seeded(a.random_kills, 200, 4),
    "kill -9 at random moments, with the state kept at each step": seeded(a.random_kills, 40, 2, a.keep_each_step),
    "resumed under each objective, captured and step by step": [
        partial(_chosen, a.resumed, (), slice(number, None, 4)) for number in range(4)
    ],
    "resumed with two processes": [a.two_ranks],
    "memory over 10,000 captured steps": [lambda world: a.memory_is_flat(world, 10_000)],
    "signals, single and double": [lambda world: a.signals(world)],
    "signals that were ignored": [a.ignored_signals],
    "flips and cuts": seeded(h.flips_and_cuts, 500, 2),
    "hostile runs": [h.hostile_runs, h.hostile_reports, h.hostile_files, h.programs],
    "hostile data": [h.hostile_data],
    "hostile settings": [h.hostile_settings],
    "mutated specs": seeded(h.mutated_specs, 2000, 2),
    "mutated data files": seeded(h.mutated_data, 1000, 2),
    "races": [a.races],
    "races with the interleaving forced": [a.forced_races],
    "bad places and streams": [a.bad_places],
    "locales": [a.locales],
}
QUICK: dict[str, list[Part]] = {
    "kills in fit": [lambda world: a.kills_while_writing(world, "fit", slice(20, None, 90))],
    "kills in fit --force": [lambda world: a.kills_while_writing(world, "force", slice(150, None, 50))],
    "kills in evaluate": [lambda world: a.kills_while_writing(world, "evaluate", slice(20, None, 5))],
    "kills in a resumed fit": [lambda world: a.kills_while_writing(world, "resume", slice(60, None, 60))],
    "random kills": [lambda world: a.random_kills(world, 2)],
    "random kills within epochs": [lambda world: a.random_kills(world, 1, 1, a.keep_each_step)],
    "memory over captured steps": [lambda world: a.memory_is_flat(world, 2_000)],
    "signals": [lambda world: a.signals(world, ("SIGINT", "SIGHUP"), (True,))],
    "ignored signals": [lambda world: a.ignored_signals(world, ("SIGHUP",))],
    "flips and cuts": [lambda world: h.flips_and_cuts(world, 60)],
    "hostile runs": [first(h.hostile_runs, 16), first(h.hostile_files, 6)],
    "programs of strangers": [h.programs],
    "hostile data and settings": [first(h.hostile_data, 16), first(h.hostile_settings, 6)],
    "mutated specs": [lambda world: h.mutated_specs(world, 60)],
    "mutated data": [lambda world: h.mutated_data(world, 60)],
    "races": [a.races],
    "bad places": [a.bad_places],
}


def start(part: Part, world: World, folder: Path, most: int | None) -> int:
    """Run a part of an attack in a process of its own, which leaves a line for each case."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    status = 1
    try:
        os.setpgid(0, 0)  # which ends with all its children
        apart = world.apart(folder)
        with (folder / "cases").open("w", buffering=1) as file:
            try:
                for case, lost in islice(part(apart), most):
                    print(json.dumps([case, lost]), file=file)
            except BaseException:
                print(json.dumps(["the attack itself", traceback.format_exc()]), file=file)
        status = 0
    finally:
        os._exit(status)


def main() -> int:
    """Run the attacks; the exit status says whether something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="the page to write")
    parser.add_argument("--only", default="", help="attacks whose name holds these words")
    parser.add_argument("--most", type=int, default=None, help="cases of each part of an attack; by default all")
    parser.add_argument("--quick", action="store_true", help="a few cases of each attack")
    parser.add_argument("--broken", action="store_true", help="break the library on purpose: something must be lost")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="parts that run side by side")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds after which a part counts as lost")
    given = parser.parse_args()
    if given.broken:
        a.write_in_two_steps()
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # whatever this process was started with
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    began = time.perf_counter()
    table = {name: parts for name, parts in (QUICK if given.quick else ALL).items() if given.only in name}
    cases, losses = dict.fromkeys(table, 0), list[tuple[str, str, str]]()
    left, running = [(name, part) for name, parts in table.items() for part in parts], dict[int, Any]()
    with tempfile.TemporaryDirectory(prefix="survival") as made:
        folder = Path(made).resolve()
        world, count, total = World(folder), 0, len(left)
        while left or running:
            while left and len(running) < given.workers:
                name, part = left.pop(0)
                place, count = folder / f"part{count}", count + 1
                running[start(part, world, place, given.most)] = (name, place, time.perf_counter())
            time.sleep(0.05)
            for number, (name, place, since) in list(running.items()):
                late = time.perf_counter() - since > given.patience
                if late:
                    os.killpg(number, signal.SIGKILL)
                ended, status = os.waitpid(number, 0 if late else os.WNOHANG)
                if not ended:
                    continue
                del running[number]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(number, signal.SIGKILL)  # children that were left
                file = place / "cases"
                found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
                if late or status:
                    last = f", after {found[-1][0]}" if found else ""
                    found.append(["the attack itself", f"it took too long{last}" if late else f"{status}{last}"])
                cases[name] += len(found)
                lost = [(name, case, what) for case, what in found if what]
                losses += lost
                for _, case, what in lost:
                    print(f"LOST {name}: {case}: {what}", flush=True)
                now = time.perf_counter()
                done = f"{total - len(left) - len(running)} of {total} parts, {now - began:.0f} s"
                print(f"{name}: {len(found)} cases, {len(lost)} lost, {now - since:.0f} s ({done})", flush=True)
    rows = [(name, cases[name], sum(one[0] == name for one in losses)) for name in table]
    text = "".join(f"| {name} | {tried:,} | {lost} |\n" for name, tried, lost in rows)
    minutes = (time.perf_counter() - began) / 60
    where = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}"
    how = "system calls, by strace" if STRACE else "Python's own steps"
    ends = f"\n{sum(cases.values()):,} cases in {minutes:.0f} minutes, {given.workers} at a time ({where}); "
    ends += f"{len(losses)} lost. "
    ends += f"Writing steps are {how}.\nA run that is killed before its first state is kept leaves at most "
    ends += "`metrics.jsonl` with the figures so far, which the next fit there replaces.\n"
    ends += "".join(f"\n- {name}: {case}: {what.strip().splitlines()[-1]}" for name, case, what in losses)
    if given.page:
        given.page.write_text(HEAD + text + ends, encoding="utf-8")
    print(text + ends)
    return int(bool(losses))


if __name__ == "__main__":
    sys.exit(main())
