"""The files of a run: one list of them, their digests, and tensors and training states without pickles."""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from pyro.distributions import constraints
from safetensors import SafetensorError
from torch import Tensor, nn

from ppl_vae.programs.param_store import ids, own_params, renamed
from ppl_vae.runs.metrics import FIRST, METRICS, lines_of

T = TypeVar("T")
FORMAT = "2"  # 1 had no manifest
ALWAYS = ("spec.toml", "metrics.jsonl", "model.safetensors")
FINISHED = ("report.json", "evidence.safetensors")
STATE, MANIFEST = "state.safetensors", "manifest.json"
PARAM = "pyro.param:"  # marks the names of tensors that a program keeps by pyro.param
REPORTS = ("report.md", "report.html")  # for people
_FIXED = (*ALWAYS, *FINISHED, STATE, MANIFEST, *REPORTS)
_OWN = re.compile(rf"{'|'.join(map(re.escape, _FIXED))}|figures/[\w.-]+\.png|[^/]+\.py")
_EDITED = re.compile(r"report\.(?:md|html)|metrics\.jsonl|[^/]+\.py")  # what people change by hand
_DESKTOP = (".DS_Store", ".directory", "Thumbs.db", "desktop.ini")


def check_folder(path: Path, *, finished: bool) -> None:
    """Check that a folder is a whole run of a known format.

    Args:
        path: the folder.
        finished: whether the run must have been evaluated; else it must have been interrupted.

    Raises:
        ValueError: If it is no run, lacks a file, has another format, or is in the other state.
    """
    if not path.is_dir():
        raise ValueError(f"Expected a run directory; {path} is {'a file' if path.exists() else 'missing'}.")
    held = {name for name in (*ALWAYS, *FINISHED, STATE, MANIFEST) if is_plain(path / name)}
    if not held:
        raise ValueError(f"Expected a run directory, as `ppl-vae fit` leaves; {path} holds none of its files.")
    if finished and STATE in held:
        raise ValueError(f"Expected a finished run; {path} was interrupted. Go on with: ppl-vae fit {path}")
    if not finished and STATE not in held and "report.json" in held:
        raise ValueError(
            f"Expected a spec or an interrupted run; {path} is a finished run. To train anew, fit its spec.toml."
        )
    got = FORMAT
    if MANIFEST in held:
        got = read_manifest(path)["format"]
    elif is_run(path):
        got = _metadata(plain_bytes(path / "model.safetensors")).get("format_version", "none")
    if got not in ("1", FORMAT):
        newer = "from a newer ppl_vae: upgrade" if got.isdigit() else "not written by ppl_vae"
        raise ValueError(f"Expected a run of format {FORMAT}; {path} has format {got}, {newer}.")
    wanted = (*ALWAYS, *(FINISHED if finished else (STATE,)), *((MANIFEST,) if got == FORMAT else ()))
    if missing := [name for name in wanted if name not in held]:
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
    """Entries of a folder that are not files of a run, or were edited by hand; all of them if it is not a run."""
    own, others = own_files(folder), []
    for entry in sorted(folder.iterdir()):
        opened = entry.name == "figures" and entry.is_dir() and not entry.is_symlink()
        for path in sorted(entry.iterdir()) if opened else [entry]:
            name, plain = path.relative_to(folder).as_posix(), is_plain(path)
            if name not in own or not plain:
                if not (plain and path.name in _DESKTOP):
                    others.append(name)
            elif (sha := own[name]) and _EDITED.fullmatch(name) and not is_as_written(path, sha):
                others.append(f"{name} (edited)")
    return others


def own_files(folder: Path) -> dict[str, str | None]:
    """Names of the files that `fit` and `evaluate` wrote to a run, each with its SHA-256 where that is known.

    Nothing else in a run directory is read, copied or replaced.
    """
    with contextlib.suppress(ValueError):
        if manifest := read_manifest(folder):
            return {MANIFEST: None} | {name: sha for name, (_, sha) in manifest["files"].items()}
    metadata = {}
    with contextlib.suppress(ValueError):
        metadata = read_metadata(folder / "model.safetensors", checked=False)
    if "format_version" not in metadata:
        with contextlib.suppress(ValueError, OSError, AttributeError):
            held = plain_bytes(folder / "metrics.jsonl")
            if lines_of(held, alone=True) or FIRST.startswith(held[: len(FIRST)]):
                return {"metrics.jsonl": None}  # of a training that was killed before its first state
        return {}
    report = folder / "report.md"
    figures = (
        re.findall(r"figures/[\w.-]+\.png", plain_bytes(report).decode(errors="replace")) if is_plain(report) else []
    )
    programs = {path.name: digest(path) for path in folder.glob("*.py") if is_plain(path)}
    fitted = {name: sha for name, sha in programs.items() if sha in metadata.get("program", "").split()}
    return dict.fromkeys((*_FIXED, *figures)) | fitted


def trained_files(folder: Path) -> list[str]:
    """Names of the files of a run that training left, and evaluation leaves as they are."""
    return [name for name in own_files(folder) if name in ALWAYS or name.endswith(".py")]


def seal(folder: Path, records: Mapping[str, Any]) -> None:
    """Write the manifest of a run: size and SHA-256 of each file, records, and a digest of the manifest itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, digest(path)] for path in paths}
    body = {"format": FORMAT, "ppl_vae": version("ppl-vae"), "files": files, **records}
    text = json.dumps({"digest": _digest_of(body), **body}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a run, without its own digest; empty for a run of format 1, which has none.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    with reading(path, "the manifest of a run"):
        manifest: dict[str, Any] = json.loads(plain_bytes(path))
        if manifest.pop("digest") != _digest_of(manifest):
            raise ValueError("its content has changed")
        if not isinstance(manifest["format"], str):
            raise ValueError("it has no format")
        if manifest["format"] == FORMAT:
            for name, (size, sha) in manifest["files"].items():
                if not (_OWN.fullmatch(name) and isinstance(size, int) and isinstance(sha, str)):
                    raise ValueError(f"no run has the file {name!r}")
    return manifest


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_own_name(name: Path) -> bool:
    """Whether a run has files of such a name."""
    return bool(_OWN.fullmatch(name.as_posix())) or name.as_posix() in ("figures", "space")


def is_plain(path: Path) -> bool:
    """Whether a path is a regular file, and no link."""
    return path.is_file() and not path.is_symlink()


def plain_bytes(path: Path) -> bytes:
    """Bytes of a regular file; no link is followed.

    Raises:
        OSError: If it is anything else, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return file.read()


def read_file(path: Path) -> bytes:
    """Bytes of a file of a run, as they were written; of metrics, those that were there when training ended.

    Raises:
        ValueError: If the run's manifest knows no such file or another content.
        OSError: If it cannot be read, or is no regular file.
    """
    held, manifest = plain_bytes(path), read_manifest(path.parent)
    if manifest and path.name != "spec.toml":  # whose fitted part is in the weights' metadata
        size, sha = manifest["files"].get(path.name, (0, None))
        held = held[:size] if path.name == "metrics.jsonl" else held
        if hashlib.sha256(held).hexdigest() != sha:
            raise ValueError("its content has changed since it was written")
    return held


def steadily(folder: Path, read: Callable[[], T]) -> T:
    """Read from a run, again if another process replaces it meanwhile."""
    before = read_manifest(folder)
    try:
        return read()
    except ValueError:
        if read_manifest(folder) == before:
            raise
    return steadily(folder, read)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a damaged file leads to into one message."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith("Expected"):
            raise
        known = isinstance(error, SafetensorError | OSError | ValueError)
        why = error if known else f"{type(error).__name__}: {error}"
        raise ValueError(f"Expected {path} to be {what}; it is damaged ({why}). Fit again.") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Save tensors as safetensors."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    known = {"format_version": FORMAT, "ppl_vae": version("ppl-vae"), **metadata}
    path.write_bytes(safetensors.torch.save(plain, known))  # by the user's own mode, which safetensors ignores


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load tensors from safetensors.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    return _load(path)[0]


def read_metadata(path: Path, *, checked: bool = True) -> dict[str, str]:
    """Metadata of a safetensors file, of one that is what was written if `checked`; errors as of `read_tensors`."""
    with reading(path, "a safetensors file"):
        return _metadata(read_file(path) if checked else plain_bytes(path))


def _metadata(held: bytes) -> dict[str, str]:
    size = int.from_bytes(held[:8], "little")
    header = json.loads(held[8 : 8 + min(size, len(held))])
    return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with reading(path, "a safetensors file"):
        held = read_file(path)
        return safetensors.torch.load(held), _metadata(held)


def learned_state(program: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy all that a program learned, ready for `write_tensors`.

    Returns:
        Tensors by name: a module's state and what the program keeps by `pyro.param`. And the metadata that names the
        constraints of the latter.

    Raises:
        ValueError: If a constraint has no name by which a file could keep it.
    """
    tensors = dict(program.state_dict()) if isinstance(program, nn.Module) else {}
    own, places = own_params(program), ids(program)
    names = {id(getattr(constraints, name)): name for name in constraints.__all__}
    kinds = {}
    for name, value in own["params"].items():
        constraint = own["constraints"][name]
        if id(constraint) not in names:
            raise ValueError(
                f"Expected a constraint that a file can name for pyro.param({name!r}), such as "
                f"constraints.positive; got {constraint}. Or make it a parameter of an nn.Module."
            )
        place = renamed(name, places)
        tensors[f"{PARAM}{place}"], kinds[place] = value, names[id(constraint)]
    return {name: value.detach().clone() for name, value in tensors.items()}, {"constraints": json.dumps(kinds)}


def load_learned_state(program: Any, path: Path) -> None:
    """Put what `learned_state` copied back into a program.

    Raises:
        ValueError: If the file is damaged, or names, shapes or types differ from the program's.
    """
    tensors, metadata = _load(path)
    with reading(path, "a program's weights"):
        kinds = json.loads(metadata.get("constraints", "{}"))
        if strange := set(kinds.values()) - {*constraints.__all__}:
            raise ValueError(f"there is no constraint {strange.pop()!r}")
        places = {place: one for one, place in ids(program).items()}
        params = {renamed(name, places): tensors.pop(f"{PARAM}{name}").requires_grad_() for name in kinds}
        known = {renamed(name, places): getattr(constraints, kind) for name, kind in kinds.items()}
    own_params(program).update(params=params, constraints=known)
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if not isinstance(program, nn.Module):
        return
    if len(dtypes) == 1:  # whatever torch's default is now
        program.to(dtypes.pop())
    own = {name: (tuple(value.shape), value.dtype) for name, value in program.state_dict().items()}
    got = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    for name in [name for name in {**own, **got} if own.get(name) != got.get(name)][:1]:
        raise ValueError(
            f"Expected {path} to hold this program's weights; {name} is {got.get(name, 'missing')} in place of "
            f"{own.get(name, 'nothing')}."
        )
    program.load_state_dict(tensors)


def read_report(folder: Path) -> dict[str, Any]:
    """Read `report.json` of a finished run."""
    file, wanted = folder / "report.json", {"spec", "data", "train", "test", "exact", "baseline"}
    with reading(file, "JSON"):
        report: dict[str, Any] = json.loads(read_file(file))
    data = report.get("data") if isinstance(report, dict) else None
    if not isinstance(data, dict) or not wanted <= report.keys() or "protocol" not in data:
        raise ValueError(f"Expected {file} to be a report; it lacks some of {', '.join(sorted(wanted))}. Fit again.")
    return report


def is_as_written(path: Path, sha: str) -> bool:
    """Whether a file is as its run wrote it, or metrics that have grown since, an epoch at a time."""
    if digest(path) == sha:
        return True
    with contextlib.suppress(ValueError, OSError, AttributeError):
        if path.name == "metrics.jsonl":
            return len(lines_of(plain_bytes(path), alone=True)) >= len(lines_of(read_file(path)))
    return False


def read_metrics(folder: Path, epochs: int) -> dict[str, list[Any]]:
    """Read `metrics.jsonl` of a finished run: the history that `write_metrics` was given."""
    file = folder / "metrics.jsonl"
    with reading(file, "JSON lines"):
        lines = lines_of(read_file(file))
        if len(lines) != epochs:
            raise ValueError(f"it has {len(lines)} lines for {epochs} epochs")
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
    tensors, metadata = _load(path)

    def nested(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return {key: nested(item) for key, item in value["items"]}
        return [nested(item) for item in value] if isinstance(value, list) else value

    with reading(path, "a training state"):
        state: dict[str, Any] = nested(json.loads(metadata["layout"]))
        return {**state}
