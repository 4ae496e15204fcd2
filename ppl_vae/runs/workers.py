"""Runs side by side, each in a process of its own."""

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ppl_vae.runs.stops import Stopped

_FORKS = "forkserver" if sys.platform == "linux" else "spawn"
# what all runs load, once
_LOADED = ["ppl_vae.runs.run", "torch._dynamo", "sklearn.datasets", "matplotlib.backends.backend_agg"]


def side_by_side(
    train: Callable[..., Any], given: Mapping[Path, tuple[Any, ...]], workers: int
) -> Iterator[tuple[Path, str | None]]:
    """Call a function for each run directory in a process of its own, and tell of each as it ends.

    What a process prints goes to a new file beside the directory, `NAME.log` if that is free, which is removed if all
    went well. If the caller stops, so do the processes; a run keeps what it has trained.

    Args:
        train: of some arguments, which can be pickled as it can.
        given: the arguments of each run, by its directory.
        workers: runs side by side.

    Returns:
        Each directory, with what went wrong or None.
    """
    context: Any = multiprocessing.get_context(_FORKS)
    if _FORKS == "forkserver":
        context.set_forkserver_preload(_LOADED)
    processes: list[Any] = []
    threads = max(1, (os.cpu_count() or 1) // workers)

    def run(folder: Path) -> str | None:
        log = _new_log(folder)
        processes.append(process := context.Process(target=_call, args=(log, threads, train, given[folder])))
        process.start()
        process.join()
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        if process.exitcode == 0:
            log.unlink(missing_ok=True)
            return None
        return lines[-1] if lines else f"exit status {process.exitcode}"

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            waiting = {pool.submit(run, folder): folder for folder in given}
            for one in concurrent.futures.as_completed(waiting):
                yield waiting[one], one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                if process.is_alive():
                    process.terminate()
            raise


def _new_log(folder: Path) -> Path:
    """A new file for what a run prints, beside its directory."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log, number = folder.with_name(f"{folder.name}.log"), 1
    while True:
        with suppress(FileExistsError):
            log.touch(exist_ok=False)
            return log
        number += 1
        log = folder.with_name(f"{folder.name}-{number}.log")


def _call(log: Path, threads: int, train: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Train a run, and end with what went wrong in the log.

    Raises:
        SystemExit: With what went wrong.
    """
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    try:
        train(*given)
    except (ValueError, OSError, Stopped) as error:
        sys.exit(str(error))
