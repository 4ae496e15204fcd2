"""The files of a run: folders replaced as a whole, tensors and training states without pickles."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from pyro.distributions import constraints
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ppl_vae.programs.param_store import own_params

FORMAT = "1"
ALWAYS = ("spec.toml", "metrics.jsonl", "model.safetensors")
FINISHED = ("report.json", "evidence.safetensors")
STATE = "state.safetensors"
METRICS = ("elbo", "validation", "objective", "validation_objective", "learning_rate", "seconds")
PARAM = "pyro.param:"  # marks the names of tensors that a program keeps by pyro.param


def check_folder(path: Path, *, finished: bool) -> None:
    """Check that a folder is a whole run of this format.

    Args:
        path: the folder.
        finished: whether the run must have been evaluated; else it must have been interrupted.

    Raises:
        ValueError: If it is no run, lacks a file, has another format, or is in the other state.
    """
    if not path.is_dir():
        raise ValueError(f"Expected a run directory; {path} is {'a file' if path.exists() else 'missing'}.")
    held = {name for name in (*ALWAYS, *FINISHED, STATE) if (path / name).is_file()}
    if not held:
        raise ValueError(f"Expected a run directory, as `ppl-vae fit` leaves; {path} holds none of its files.")
    if finished and STATE in held:
        raise ValueError(f"Expected a finished run; {path} was interrupted. Go on with: ppl-vae fit {path}")
    if not finished and STATE not in held and "report.json" in held:
        raise ValueError(
            f"Expected a spec or an interrupted run; {path} is a finished run. To train anew, fit its spec.toml."
        )
    got = read_metadata(path / "model.safetensors").get("format_version", "none") if is_run(path) else FORMAT
    if got != FORMAT:
        newer = "from a newer ppl_vae: upgrade" if got.isdigit() else "not written by ppl_vae"
        raise ValueError(f"Expected a run of format {FORMAT}; {path} has format {got}, {newer}.")
    if missing := [name for name in (*ALWAYS, *(FINISHED if finished else (STATE,))) if name not in held]:
        raise ValueError(f"Expected a whole run directory; {path} lacks {' and '.join(missing)}. Fit again.")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, finished or interrupted: one with the weights of a program."""
    return (folder / "model.safetensors").is_file()


def check_replaceable(folder: Path) -> None:
    """Check that a run may be written to a folder: it is missing, empty, or holds only files of a run.

    The files of a run are those that `fit` and `evaluate` write. Links, other files and other folders are not.

    Raises:
        ValueError: If it is a file, or holds anything else, by name.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"Expected a directory for the run; {folder} is a file. Choose another place.")
    if others := _others(folder):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"Expected a new or empty directory, or one that holds only a run; {folder} also holds {shown}. Nothing "
            "there was changed. Choose another place, or move these away."
        )


def _others(folder: Path) -> list[str]:
    """Entries of a folder that are not files of a run; all of them if the folder is not a run."""
    try:
        metadata = read_metadata(folder / "model.safetensors")
    except ValueError:
        metadata = {}
    if "format_version" not in metadata:
        return sorted(path.name for path in folder.iterdir())
    report = folder / "report.md"
    text = report.read_text(encoding="utf-8", errors="replace") if report.is_file() else ""
    own = {*ALWAYS, *FINISHED, STATE, report.name, *re.findall(r"figures/[\w.-]+\.png", text)}
    others = []
    for entry in sorted(folder.iterdir()):
        opened = entry.name == "figures" and entry.is_dir() and not entry.is_symlink()
        for path in sorted(entry.iterdir()) if opened else [entry]:
            name = path.relative_to(folder).as_posix()
            plain = path.is_file() and not path.is_symlink()
            program = plain and path.suffix == ".py" and digest(path) in metadata.get("program", "").split()
            if not (plain and name in own or program):
                others.append(name)
    return others


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn what a reader raises on a damaged file into one message."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"Expected {path} to be {what}; it is damaged ({error}). Fit again.") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Save tensors as safetensors.

    Raises:
        OSError: If the disk is full or cannot be written; safetensors has an error of its own for this.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        safetensors.torch.save_file(plain, path, {"format_version": FORMAT, "ppl_vae": version("ppl-vae"), **metadata})
    except SafetensorError as error:
        full = "os error 28" in str(error) or "No space" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load tensors from safetensors.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    with _reading(path, "a safetensors file"):
        return safetensors.torch.load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; its errors are those of `read_tensors`."""
    with _reading(path, "a safetensors file"), safe_open(path, "pt") as file:
        return file.metadata() or {}


def learned_state(program: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy all that a program learned, ready for `write_tensors`.

    Returns:
        Tensors by name: a module's state and what the program keeps by `pyro.param`. And the metadata that names the
        constraints of the latter.

    Raises:
        ValueError: If a constraint has no name by which a file could keep it.
    """
    tensors = dict(program.state_dict()) if isinstance(program, nn.Module) else {}
    own = own_params(program)
    names = {id(getattr(constraints, name)): name for name in constraints.__all__}
    kinds = {}
    for name, value in own["params"].items():
        constraint = own["constraints"][name]
        if id(constraint) not in names:
            raise ValueError(
                f"Expected a constraint that a file can name for pyro.param({name!r}), such as "
                f"constraints.positive; got {constraint}. Or make it a parameter of an nn.Module."
            )
        tensors[f"{PARAM}{name}"], kinds[name] = value, names[id(constraint)]
    return {name: value.detach().clone() for name, value in tensors.items()}, {"constraints": json.dumps(kinds)}


def load_learned_state(program: Any, path: Path) -> None:
    """Put what `learned_state` copied back into a program.

    Raises:
        ValueError: If the file is damaged, or names or shapes differ from the program's.
    """
    tensors = read_tensors(path)
    kinds = json.loads(read_metadata(path).get("constraints", "{}"))
    params = {name: tensors.pop(f"{PARAM}{name}").requires_grad_() for name in kinds}
    own_params(program).update(
        params=params, constraints={name: getattr(constraints, kind) for name, kind in kinds.items()}
    )
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if not isinstance(program, nn.Module):
        return
    if len(dtypes) == 1:  # whatever torch's default is now
        program.to(dtypes.pop())
    try:
        program.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ValueError(f"Expected {path} to hold this program's weights; {last}") from None


def read_report(folder: Path) -> dict[str, Any]:
    """Read `report.json` of a finished run."""
    file, wanted = folder / "report.json", {"spec", "data", "train", "test", "exact", "baseline"}
    with _reading(file, "JSON"):
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not wanted <= report.keys() or "protocol" not in report["data"]:
        raise ValueError(f"Expected {file} to be a report; it lacks some of {', '.join(sorted(wanted))}. Fit again.")
    return report


def write_metrics(history: Mapping[str, Any], folder: Path) -> None:
    """Write `metrics.jsonl`, one line per epoch; without validation data its bound is null."""
    rows = itertools.zip_longest(*(history.get(key, ()) for key in METRICS))
    lines = [{"epoch": epoch, **dict(zip(METRICS, row, strict=True))} for epoch, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_metrics(folder: Path, epochs: int) -> dict[str, list[Any]]:
    """Read `metrics.jsonl` of a finished run: the history that `write_metrics` was given."""
    file = folder / "metrics.jsonl"
    with _reading(file, "JSON lines"):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if len(lines) != epochs:
        raise ValueError(f"Expected one line for each of {epochs} epochs in {file}; got {len(lines)}. Fit again.")
    return {key: [line[key] for line in lines if line.get(key) is not None] for key in METRICS}


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Save a training state, nested containers of tensors and plain values, as safetensors and JSON."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    write_tensors(tensors, path, layout=json.dumps(plain(state)))


def read_state(path: Path) -> dict[str, Any]:
    """Load a training state that `write_state` saved.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    tensors, layout = read_tensors(path), read_metadata(path).get("layout")
    if layout is None:
        raise ValueError(f"Expected {path} to hold a training state; it is damaged. Fit again.")

    def nested(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return {key: nested(item) for key, item in value["items"]}
        return [nested(item) for item in value] if isinstance(value, list) else value

    return nested(json.loads(layout))  # type: ignore[no-any-return]


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make a folder before the work that fills it, so that a place that cannot be written fails early.

    If the block raises, the folders made are removed unless they hold something by then.
    """
    made = [path for path in reversed([folder, *folder.parents]) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()
        raise


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a folder as a whole: under a temporary name, flushed to disk, then renamed into place.

    If the block raises, the folder stays as it was, and nothing half-written is left.

    Raises:
        ValueError: If the folder holds anything but a run, as `check_replaceable` says.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    partial, former = (folder.parent / f".{folder.name}.{what}-{os.getpid()}" for what in ("partial", "former"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        check_replaceable(folder)
        if folder.exists():
            folder.rename(former)
        try:
            partial.rename(folder)
        except BaseException:
            if former.exists():
                former.rename(folder)
            raise
        shutil.rmtree(former, ignore_errors=True)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    if sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
