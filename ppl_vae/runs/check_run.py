"""The check of a run: whether each file is as it was written, and whether this machine would give the same bits."""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppl_vae.infer.svi import pick_device
from ppl_vae.runs import places, storage
from ppl_vae.runs.machine import machine


@dataclass(frozen=True)
class RunCheck:
    """What `check_run` reports; `str` writes it as text.

    Args:
        path: the run directory.
        format: of the run.
        finished: whether it was evaluated.
        files: what became of each file: `as written`, `edited` (a report, or the place of data in a spec), `changed`
            or `missing`, and `not of the run` for others.
        machines: those that trained the run, one after another.
        differences: what this machine has other than these, each with both values.
    """

    path: str
    format: str
    finished: bool
    files: dict[str, str]
    machines: list[dict[str, Any]]
    differences: list[str]

    @property
    def damaged(self) -> list[str]:
        """Files that changed or are missing, though nobody may edit them."""
        return [name for name, state in self.files.items() if state in ("changed", "missing")]

    @property
    def same_bits(self) -> bool:
        """Whether fitting the run's spec here gives the same bits."""
        return bool(self.machines) and not self.differences and not self.damaged

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "damaged": self.damaged, "same_bits": self.same_bits}

    def __str__(self) -> str:
        others = [f"{name} is {state}" for name, state in self.files.items() if state != "as written"]
        there = "; ".join(", ".join(f"{key} {value}" for key, value in one.items()) for one in self.machines)
        verdict = f"cannot be expected here: {'; '.join(self.differences or self.damaged or ['no machine is known'])}"
        lines = [
            f"run         {self.path}: {'finished' if self.finished else 'interrupted'}, format {self.format}",
            f"files       {'; '.join([f'{len(self.files) - len(others)} as written', *others])}",
            f"trained on  {there or 'unknown: runs of format 1 have no record'}",
            f"same bits   {'to be expected here, from its spec and its data' if self.same_bits else verdict}",
        ]
        return "\n".join(lines)


def check_run(path: str | Path) -> RunCheck:
    """Check the files of a run against its manifest, and this machine against those that trained it.

    Neither weights nor programs are loaded.

    Raises:
        ValueError: If it is no run, or its manifest is damaged.
    """
    path = Path(path)
    places.mend(path)
    finished = not (path / storage.STATE).is_file()
    storage.check_folder(path, finished=finished)
    manifest = storage.read_manifest(path)
    machines = manifest.get("trained", [])
    gpu = any(one.get("device") != "cpu" for one in machines)
    here = machine(pick_device("auto" if gpu else "cpu"))
    pairs = [(key, one.get(key), value) for one in machines for key, value in here.items() if one.get(key) != value]
    differences = [*dict.fromkeys(f"{key} {there} there and {value} here" for key, there, value in pairs)]
    own = storage.own_files(path)
    files = {name: _state(path / name, sha) for name, sha in own.items() if manifest or (path / name).exists()}
    others = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if not file.is_dir()]
    files |= {name: "not of the run" for name in others if name not in own}
    return RunCheck(str(path), manifest.get("format", "1"), finished, files, machines, differences)


def _state(file: Path, sha: str | None) -> str:
    if not storage.is_plain(file):
        return "missing"
    if sha is None or storage.is_as_written(file, sha):
        return "as written"
    if file.name in (*storage.REPORTS, "spec.toml"):
        return "edited"
    with contextlib.suppress(ValueError, OSError):
        storage.read_file(file)  # metrics may have grown
        return "edited"
    return "changed"
