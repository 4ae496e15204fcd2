"""Files that can be trusted: directories written as a whole, weights and training states without pickles."""

import contextlib
import errno
import hashlib
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

FORMAT = "1"
ALWAYS = ("spec.toml", "metrics.jsonl", "model.safetensors")
FINISHED = ("report.json", "evidence.safetensors")
OWN = (*ALWAYS, *FINISHED, "report.md", "state.safetensors")
_PARAM = "pyro.param:"


def check_folder(path: Path, *, finished: bool) -> None:
    """Refuse a path that is no run directory, lacks a file, was interrupted, or comes of a newer format.

    Args:
        path: the directory.
        finished: whether it must have been evaluated, or interrupted in training.
    """
    if not path.is_dir():
        raise ValueError(f"Expected a run directory; {path} is {'a file' if path.exists() else 'missing'}.")
    held = [name for name in (*ALWAYS, *FINISHED, "state.safetensors") if (path / name).is_file()]
    if not held:
        raise ValueError(f"Expected a run directory, as `ppl-vae fit` leaves; {path} holds none of its files.")
    interrupted = "state.safetensors" in held
    if finished and interrupted:
        raise ValueError(f"Expected a finished run; {path} was interrupted. Go on with: ppl-vae fit {path}")
    if not finished and not interrupted and "report.json" in held:
        raise ValueError(
            f"Expected a spec, a program or an interrupted run; {path} is a finished run. Evaluate or compare it, or "
            f"fit {path / 'spec.toml'} to train anew."
        )
    if (path / "model.safetensors").is_file():
        found = read_metadata(path / "model.safetensors").get("format_version", "none")
        if found != FORMAT:
            newer = "from a newer ppl_vae: upgrade" if found.isdigit() else "not written by ppl_vae"
            raise ValueError(f"Expected a run of format {FORMAT}; {path} has format {found}, {newer}.")
    if missing := [name for name in (*ALWAYS, *(FINISHED if finished else ("state.safetensors",))) if name not in held]:
        raise ValueError(
            f"Expected a whole run directory, as `ppl-vae fit` leaves; {path} lacks {' and '.join(missing)}. Fit again."
        )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, finished or interrupted: one with the weights of a program."""
    return (folder / "model.safetensors").is_file()


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder unless it is empty, or a run in which every entry is the run's own file.

    The run's own files are those that `fit` and `evaluate` write: links, other files and other folders are not.

    Raises:
        ValueError: naming what else lies there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"Expected a directory for the run; {folder} is a file. Choose another place.")
    others = _others(folder)
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"Expected a new or empty directory, or one that holds a run alone; {folder} also holds {shown}. Nothing "
            "there was changed. Choose another place, or move these away."
        )


def _others(folder: Path) -> list[str]:
    """List the entries of a folder that are not a run's own files; of a folder that is no run, all of them."""
    entries = sorted(folder.iterdir())
    try:
        program = read_metadata(folder / "model.safetensors")
    except ValueError:
        program = {}
    if "format_version" not in program:
        return [path.name for path in entries]
    report = folder / "report.md"
    text = report.read_text(encoding="utf-8", errors="replace") if report.is_file() else ""
    drawn = {f"figures/{name}" for name in re.findall(r"figures/([\w.-]+\.png)", text)}

    def own(path: Path) -> bool:
        if path.is_symlink() or not path.is_file():
            return False
        known = path.name in OWN or path.relative_to(folder).as_posix() in drawn
        return known or (path.suffix == ".py" and digest(path) == program.get("program"))

    others = []
    for path in entries:
        inner = sorted(path.iterdir()) if path.name == "figures" and path.is_dir() and not path.is_symlink() else [path]
        others += [each.relative_to(folder).as_posix() for each in inner if not own(each)]
    return others


def digest(path: Path) -> str:
    """Give the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Save tensors as safetensors.

    Raises:
        OSError: where the disk is full or cannot be written, which safetensors reports in an error of its own.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    known = {"format_version": FORMAT, "ppl_vae": version("ppl-vae"), **metadata}
    try:
        safetensors.torch.save_file(plain, path, known)
    except SafetensorError as error:
        full = "os error 28" in str(error) or "No space" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load tensors from safetensors.

    Raises:
        ValueError: for a file that is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Expected {path} to be a safetensors file; it is damaged ({error}). Fit again.") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Read what a safetensors file says of itself; the arguments and errors are those of `read_tensors`."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Expected {path} to be a safetensors file; it is damaged ({error}). Fit again.") from None


def weights(program: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy all that a program learned: a module's state, and what it keeps by `pyro.param`, with its constraints.

    Raises:
        ValueError: for a constraint that no file can name.
    """
    found = dict(program.state_dict()) if isinstance(program, nn.Module) else {}
    own = vars(program).get("_ppl_vae_params", {"params": {}, "constraints": {}})
    names = {id(getattr(constraints, name)): name for name in constraints.__all__}
    kinds = {}
    for name, value in own["params"].items():
        kind = names.get(id(own["constraints"][name]))
        if kind is None:
            raise ValueError(
                f"Expected a constraint that a file can name for pyro.param({name!r}), such as "
                f"constraints.positive; got {own['constraints'][name]}. Or make it a parameter of an nn.Module."
            )
        found[f"{_PARAM}{name}"], kinds[name] = value, kind
    return {name: value.detach().clone() for name, value in found.items()}, {"constraints": json.dumps(kinds)}


def read_weights(program: Any, path: Path) -> None:
    """Put what `weights` gave back into a program, all of it.

    Raises:
        ValueError: for a damaged file, or where names or shapes differ from the program's.
    """
    tensors = read_tensors(path)
    kinds = json.loads(read_metadata(path).get("constraints", "{}"))
    params = {name: tensors.pop(f"{_PARAM}{name}").requires_grad_() for name in kinds}
    if params:
        held = {name: getattr(constraints, kind) for name, kind in kinds.items()}
        vars(program)["_ppl_vae_params"] = {"params": params, "constraints": held}
    kept = {value.dtype for value in tensors.values() if value.is_floating_point()}
    try:
        if isinstance(program, nn.Module):
            if len(kept) == 1:  # whatever torch's default is now
                program.to(kept.pop())
            program.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ValueError(f"Expected {path} to hold this program's weights; {last}") from None


def read_report(path: Path) -> dict[str, Any]:
    """Read `report.json` of a finished run."""
    file, wanted = path / "report.json", {"spec", "data", "train", "test", "exact", "baseline"}
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {file} to be JSON; it is damaged ({error}). Fit again.") from None
    if not isinstance(report, dict) or not wanted <= report.keys() or "protocol" not in report["data"]:
        raise ValueError(f"Expected {file} to be a report; it lacks some of {', '.join(sorted(wanted))}. Fit again.")
    return report


def read_metrics(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` of a finished run, a line an epoch."""
    file = path / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"Expected {file} to hold JSON lines; it is damaged ({error}). Fit again.") from None
    if len(lines) != epochs:
        raise ValueError(f"Expected a line for each of {epochs} epochs in {file}; got {len(lines)}. Fit again.")
    return lines


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Save a training state, nested containers of tensors and plain values, as safetensors and JSON."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    write_tensors(tensors, path, layout=json.dumps(plain(state)))


def read_state(path: Path) -> dict[str, Any]:
    """Load a training state that `write_state` saved.

    Raises:
        ValueError: for a file that is missing or damaged.
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
    """Make a directory before the work that fills it, so that what cannot be written is known; undo that on failure."""
    made = []
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            path.mkdir()
            made.append(path)
    try:
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # by now it holds something
                path.rmdir()
        raise


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a directory as a whole: under a temporary name, flushed to disk, then renamed into place.

    Where the block raises, the directory stays as it was, and nothing half-written is left.

    Raises:
        ValueError: where the directory holds anything else than a run, as `check_replaceable` says.
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
