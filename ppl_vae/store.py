"""Files that can be trusted: directories written as a whole, weights and training states without pickles."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["FORMAT", "check_folder", "read_state", "read_weights", "replacing", "write_state", "write_weights"]

FORMAT = "1"


def check_folder(path: Path) -> None:
    """Refuse a path that is no run directory, or one written by a newer format."""
    weights = path / "model.safetensors"
    if not path.is_dir():
        raise ValueError(f"Expected a run directory; {path} is {'a file' if path.exists() else 'missing'}.")
    missing = [name for name in ("spec.toml", "model.safetensors") if not (path / name).is_file()]
    if missing:
        raise ValueError(f"Expected a run directory, as `ppl-vae fit` leaves; {path} lacks {' and '.join(missing)}.")
    try:
        with safe_open(weights, "pt") as file:
            found = (file.metadata() or {}).get("format_version", "none")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Expected {weights} to be a safetensors file; it is damaged ({error}). Fit again.") from None
    if found != FORMAT:
        raise ValueError(
            f"Expected a run of format {FORMAT}; {path} has format {found}, "
            f"{'from a newer ppl_vae: upgrade' if found.isdigit() else 'not written by ppl_vae'}."
        )


def write_weights(program: nn.Module, path: Path) -> None:
    """Save a program's state as safetensors."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in program.state_dict().items()}
    safetensors.torch.save_file(tensors, path, {"format_version": FORMAT, "ppl_vae": version("ppl-vae")})


def read_weights(program: nn.Module, path: Path) -> None:
    """Load a program's state from safetensors, all of it.

    Raises:
        ValueError: where names or shapes differ from the program's.
    """
    try:
        program.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ValueError(f"Expected {path} to hold this program's weights; {last}") from None


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Save a training state, nested containers of tensors and plain values, as safetensors and JSON."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    layout = json.dumps(plain(state))
    safetensors.torch.save_file(tensors, path, {"format_version": FORMAT, "layout": layout})


def read_state(path: Path) -> dict[str, Any]:
    """Load a training state that `write_state` saved."""
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        layout = json.loads(file.metadata()["layout"])

    def nested(value: Any) -> Any:
        if isinstance(value, dict):
            return (
                tensors[value["tensor"]] if "tensor" in value else {key: nested(item) for key, item in value["items"]}
            )
        return [nested(item) for item in value] if isinstance(value, list) else value

    return nested(layout)  # type: ignore[no-any-return]


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a directory as a whole: under a temporary name, flushed to disk, then renamed into place.

    Where the block raises, the directory stays as it was, and nothing half-written is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        former = folder.parent / f".{folder.name}.former-{os.getpid()}"
        if folder.exists():
            folder.rename(former)
        partial.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
