"""What training leaves in a run, and where: a place, the spec as it was fitted, weights, metrics, files of programs."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppl_vae.data.datasets import is_path
from ppl_vae.data.loading import Data
from ppl_vae.programs.program import source_of
from ppl_vae.runs import places, storage
from ppl_vae.runs.built import Built
from ppl_vae.runs.metrics import write_metrics
from ppl_vae.runs.spec import load_spec
from ppl_vae.runs.spec_file import Say, programs, quiet, read


@contextlib.contextmanager
def pick_place(
    spec: Any, out: str | Path | None, *, force: bool | None = None, say: Say = quiet
) -> Iterator[places.Place]:
    """Claim the place of a run: `out`, or a new folder under `runs/` named after the spec.

    Args:
        spec: what will be fitted.
        out: the folder, if it was given.
        force: whether to replace a finished run at `out`; None for a caller that has no such option.
        say: takes messages for the user.

    Raises:
        ValueError: If `out` holds a finished run and `force` is not given, or anything but a run, or if another
            process writes there.
    """
    with contextlib.ExitStack() as stack:
        if out is not None:
            place = stack.enter_context(places.claimed(Path(out), say=say))
            if (place.folder / "report.json").is_file() and not force:
                remedy = "Choose another" + (", or give --force." if force is False else ".")
                raise ValueError(f"Expected --out to be new; {out} holds a finished run. {remedy}")
        names = (Path("runs") / f"{spec.path.stem}{f'-{i}' if i > 1 else ''}" for i in itertools.count(1))
        for folder in names if out is None else ():
            if not folder.exists():
                with contextlib.suppress(FileExistsError, places.Busy):  # another process was first
                    place = stack.enter_context(places.claimed(folder, new=True, say=say))
                    break
        yield place


def read_spec(path: Path, trust_code: bool, say: Say) -> Any:
    """Spec of a run, with the run's own copy of its program file; a `Built` if its program was built in Python.

    Raises:
        ValueError: If the spec or the program file is not what was fitted.
    """
    known = storage.read_metadata(path / "model.safetensors")
    own, digests, names = {}, known.get("program", "").split(), []
    for place, table in () if "built" in known else programs(read(path / "spec.toml")):
        file, colon, name = table["program"].partition(":")
        copy = path / Path(file).name
        own[f"{place}.program"] = f"{copy.name}{colon}{name}"
        names += [copy.name] if copy.name not in names else []
        fitted = dict(zip(names, digests, strict=False)).get(copy.name)
        if not storage.is_plain(copy) or storage.digest(copy) != fitted:
            raise ValueError(
                f"Expected {copy}, the run's own copy of its program, as it was fitted; it is "
                f"{'changed' if storage.is_plain(copy) else 'missing'}. Fit again."
            )
    spec: Any = None
    if "built" in known:
        spec = Built(path / "spec.toml", read(path / "spec.toml"))
    else:
        spec = load_spec(path / "spec.toml", own, trust_code=trust_code, say=say)
    with storage.reading(path / "model.safetensors", "a program's weights"):
        fitted = json.loads(known["spec"])
    if _pinned(read(path / "spec.toml"), "name" in fitted["data"]) != known["spec"]:
        raise ValueError(
            f"Expected {path / 'spec.toml'} to say what was fitted; it was changed or cut since. Restore it, or fit "
            "again. If the data have moved, only data.name, data.root and data.download may change."
        )
    return spec


def _pinned(tables: dict[str, Any], named: bool = True) -> str:
    """All of a complete spec that was fitted, as JSON; paths may change, and keys that came later are not missed.

    Args:
        tables: the spec as it stands.
        named: whether the name of a set counts, which older runs left out; that of a file never does.
    """
    for key in ("root", "download", *(("name",) if not named or is_path(tables["data"]["name"]) else ())):
        tables["data"].pop(key, None)
    for _, table in programs(tables):
        table.pop("program")
    return json.dumps(tables, sort_keys=True)


def check_same_data(path: Path, known: Mapping[str, Any], data: Data) -> None:
    """Check that the data are those that a run was fitted to."""
    if any(data.protocol[key] != known.get(key, data.protocol[key]) for key in ("digest", "digest_train", "split")):
        raise ValueError(
            f"Expected the data that {path} was fitted to; {data.name} has changed since. Put the old data back, or "
            f"fit again. If they have moved, correct data.name in {path / 'spec.toml'}."
        )


def write_trained(
    partial: Path, folder: Path, spec: Any, learned: tuple[dict[str, Any], dict[str, str]], history: Mapping[str, Any]
) -> Any:
    """Write what training leaves: weights, metrics, the files of programs if there are any, and the spec.

    Returns:
        The spec as written for `folder`: it names the run's own copies of these files.
    """
    own: dict[str, str] = {}
    copies: dict[str, str] = {}
    digests = []
    for place, reference in spec.programs.items():
        file, colon, name = reference.partition(":")
        if file not in copies:
            taken = Path(file).name in copies.values()
            copies[file] = f"{place.partition('.')[0]}_{Path(file).name}" if taken else Path(file).name
            (partial / copies[file]).write_bytes(source_of(file))  # as it was trained, whatever became of the file
            digests.append(storage.digest(partial / copies[file]))
        own[place] = f"{folder.resolve() / copies[file]}{colon}{name}"
    home, program = spec.relocated(folder / "spec.toml", own), {"program": " ".join(digests)} if digests else {}
    (partial / "spec.toml").write_text(home.to_toml(), encoding="utf-8")
    tensors, constraints = learned
    known = {"spec": _pinned(spec.to_dict()), **program, **constraints}
    known |= {"built": "in Python"} if isinstance(spec, Built) else {}
    storage.write_tensors(tensors, partial / "model.safetensors", **known)
    write_metrics(history, partial)
    return home


def trained_on(folder: Path, more: list[dict[str, Any]] = []) -> list[dict[str, Any]]:  # noqa: B006
    """The machines that a run was trained on, and more of them."""
    known = storage.read_manifest(folder).get("trained", [])
    return [*known, *(one for one in more if one not in known)]
