"""Sweeps: a grid of settings, a run for each, and one table of what they reached."""

import dataclasses
import itertools
import json
import math
import os
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppl_vae._checks import check_int
from ppl_vae.reports.diagnostic_plots import sweep_results, varying
from ppl_vae.reports.more_pages import sweep_page
from ppl_vae.runs import storage
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import load_spec
from ppl_vae.runs.spec_file import parse_override, show
from ppl_vae.runs.workers import side_by_side

SEED = "svi.seed"
GRID = "sweep.json"
Grid = Mapping[str, Sequence[Any]]


def parse_grid(texts: Sequence[str], file: Path | None = None) -> dict[str, list[Any]]:
    """Read the values of each key: `KEY=VALUE,VALUE`, each VALUE in TOML or a string, and a TOML file of lists.

    Raises:
        ValueError: If a key has no value or two entries, or the file has anything but lists.
    """
    grid: dict[str, list[Any]] = {}
    if file is not None:
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(
                f"Expected a TOML file of lists, such as svi.seed = [0, 1]; got {file}: {error}"
            ) from error
        grid = dict(_lists(tables))
    for text in texts:
        key, _, values = text.partition("=")
        whole = parse_override(f"{key}=[{values}]")[1]  # where each value is TOML
        parts = whole if isinstance(whole, list) else [parse_override(f"{key}={one}")[1] for one in values.split(",")]
        if key.strip() in grid:
            raise ValueError(f"Expected the values of {key.strip()} once, with commas between; got them twice.")
        grid[key.strip()] = parts
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError("Expected values for each key, such as --set svi.seed=0,1,2; got none.")
    return grid


def _lists(tables: Mapping[str, Any], before: str = "") -> Any:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _lists(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        settings: the value of each key of the grid.
        folder: its run directory.
    """

    settings: dict[str, Any]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it is a finished run."""
        return (self.folder / "report.json").is_file()


def run_sweep(
    spec: Path,
    grid: Grid,
    out: Path,
    *,
    workers: int | None = None,
    trust_code: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Train a run for each combination of settings, side by side, and compare them.

    A sweep that was stopped goes on: finished members stay, an interrupted one resumes. A member that fails does not
    end the others.

    Args:
        spec: the path of a spec.
        grid: the values of each key, by dotted key.
        out: the folder, new or that of the same sweep.
        workers: runs side by side; by default one a core.
        trust_code: whether programs that a run brings may run.
        say: takes messages for the user.

    Returns:
        What `summarise` returns; it is also in `sweep.json`, `sweep.md`, `sweep.html` and `sweep.png` of the folder.

    Raises:
        ValueError: If a setting will not do, or the folder holds something else. Nothing is trained then.
    """
    cores = os.cpu_count() or 1
    workers = cores if workers is None else check_int("workers", workers)
    members = [_member(out, dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    errors: dict[str, dict[str, Any]] = {}
    for member in members:
        try:
            load_spec(spec, member.settings, trust_code=True)
        except ValueError as error:
            errors.setdefault(str(error), member.settings)
    if errors:
        raise ValueError("\n".join(f"{message} (with {named(settings)})" for message, settings in errors.items()))
    _claim(out, spec, grid)
    left = [member for member in members if not member.done]
    for member in left:  # what a member that failed before has said
        member.folder.with_name(f"{member.folder.name}.log").unlink(missing_ok=True)
    say(f"{len(members)} runs, {len(members) - len(left)} of them finished; {workers} side by side")
    given = {member.folder: (spec, member, trust_code) for member in left}
    named_by = {member.folder: named(member.settings) for member in left}
    failed: dict[str, str] = {}
    for number, (folder, wrong) in enumerate(side_by_side(_train, given, workers), 1):
        if wrong is not None:
            failed[folder.name] = wrong
        say(f"{number} of {len(left)}: {named_by[folder]}{': ' + wrong if wrong else ''}")
    found = summarise(members) | {"failed": failed}
    _record(out, spec, grid, found)
    (out / "sweep.md").write_text(told(found), encoding="utf-8")
    if found["settings"]:
        (out / "sweep.html").write_text(sweep_page(found, told(found)), encoding="utf-8")
        sweep_results(found).savefig(out / "sweep.png", dpi=120, bbox_inches="tight")
    return found


def _member(out: Path, settings: dict[str, Any]) -> Member:
    name = ",".join(f"{key}={show(value)}" for key, value in settings.items())
    plain = "".join(c if c.isalnum() or c in "=,.-_" else "" for c in name) or "run"
    return Member(settings, out / plain[:150])


def _train(spec: Path, member: Member, trust_code: bool) -> None:
    """Train a run, from the start or from where it was stopped."""
    if (member.folder / storage.STATE).is_file():
        fit_spec(member.folder, trust_code=trust_code)
    else:
        fit_spec(spec, overrides=member.settings, out=member.folder, trust_code=trust_code)


def _claim(out: Path, spec: Path, grid: Grid) -> None:
    """Make the folder of a sweep, or see that it is that of this one."""
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        _record(out, spec, grid, {})
        return
    file = out / GRID
    if not file.is_file():
        raise ValueError(f"Expected --out to be new, or an earlier sweep; {out} holds other things. Choose another.")
    known = json.loads(file.read_text(encoding="utf-8"))
    if known.get("digest") != storage.digest(spec):
        raise ValueError(f"Expected the spec of the sweep in {out}; {spec} has changed since. Choose another --out.")


def _record(out: Path, spec: Path, grid: Grid, found: Mapping[str, Any]) -> None:
    text = json.dumps({"spec": str(spec), "digest": storage.digest(spec), "grid": grid, **found}, indent=2)
    (out / f".{GRID}").write_text(text + "\n", encoding="utf-8")
    os.replace(out / f".{GRID}", out / GRID)


def summarise(members: Sequence[Member]) -> dict[str, Any]:
    r"""Compare the finished members of a sweep, setting by setting, over data and seeds.

    The seeds of a setting are averaged, datum by datum. A difference to the best setting has the standard error over
    data of the paired differences, and that over seeds by Welch,
    :math:`\sqrt{s_1^2 / n_1 + s_2^2 / n_2}`, with the variances :math:`s^2` of the means of single runs.

    Returns:
        `settings`: for each its values without the seed, the number of `seeds`, `log_evidence` and `elbo` with `se`
        over data, `se_seeds` (None for one seed: unknown), `mc_se` and `kind`, `validation`, the bound of the
        validation part, `seconds` of training, `ppca` of the same size, and the `difference` to the chosen one.
        `chosen`: the place of the best one by the validation part, None without such a part.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        if member.done:
            key = json.dumps({key: value for key, value in member.settings.items() if key != SEED})
            groups.setdefault(key, []).append(member)
    rows, values = [], []
    for key, group in groups.items():
        reports = [storage.read_report(member.folder) for member in group]
        each = torch.stack([storage.read_tensors(m.folder / "evidence.safetensors")["log_evidence"] for m in group])
        values.append(each)
        bounds = [report["test"]["log_evidence"] for report in reports]
        row: dict[str, Any] = {"values": json.loads(key), "seeds": len(group)}
        row["log_evidence"] = {**_over(each), "mc_se": math.hypot(*(one["mc_se"] for one in bounds)) / len(group)}
        row["log_evidence"]["kind"] = max((one["kind"] for one in bounds), key=len)
        row["elbo"] = statistics.mean(report["test"]["elbo"]["mean"] for report in reports)
        row["validation"] = _validation(group, reports)
        row["seconds"] = statistics.mean(report["train"]["seconds"] for report in reports)
        row["ppca"] = reports[0]["baseline"] and reports[0]["baseline"]["ppca"]["log_evidence"]
        row["digest"] = reports[0]["data"]["protocol"]["digest"]
        rows.append(row)
    judged = [number for number, row in enumerate(rows) if row["validation"] is not None]
    chosen = max(judged, key=lambda number: rows[number]["validation"]) if judged else None
    best = chosen if chosen is not None else 0
    for row, each in zip(rows, values, strict=True):
        same = row["digest"] == rows[best]["digest"] and each.shape[1] == values[best].shape[1]
        row["difference"] = _difference(each, values[best]) if same and row is not rows[best] else None
    for row in rows:
        del row["digest"]
    return {"settings": rows, "chosen": chosen, "compared_with": best if rows else None}


def _over(each: torch.Tensor) -> dict[str, Any]:
    """Mean over seeds and data (s, n), with the standard error over either."""
    means, data = each.mean(1), each.mean(0)
    seeds = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"mean": float(each.mean()), "se": float(data.std()) / math.sqrt(len(data)), "se_seeds": seeds}


def _difference(each: torch.Tensor, best: torch.Tensor) -> dict[str, Any]:
    apart, few = each.mean(0) - best.mean(0), min(len(each), len(best)) < 2
    seeds = None if few else float((each.mean(1).var() / len(each) + best.mean(1).var() / len(best)).sqrt())
    return {"mean": float(apart.mean()), "se": float(apart.std()) / math.sqrt(len(apart)), "se_seeds": seeds}


def _validation(group: Sequence[Member], reports: Sequence[Mapping[str, Any]]) -> float | None:
    """Bound of the validation part at the state that each run kept, mean over seeds."""
    found = []
    for member, report in zip(group, reports, strict=True):
        bounds = storage.read_metrics(member.folder, report["train"]["epochs"])["validation"]
        if not bounds:
            return None
        found.append(max(bounds) if report["spec"]["svi"].get("keep") == "best" else bounds[-1])
    return statistics.mean(found)


def named(settings: Mapping[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{key} = {show(value)}" for key, value in settings.items()) or "the spec as it is"


def told(found: Mapping[str, Any]) -> str:
    """The table of a sweep in Markdown."""
    head = (
        "setting",
        "log p(x)",
        "± data",
        "± seeds",
        "seeds",
        "difference",
        "ELBO",
        "PPCA",
        "seconds",
    )
    rows, settings = [], [row["values"] for row in found["settings"]]
    keys = varying(settings) if settings else []
    for number, row in enumerate(found["settings"]):
        value, apart = row["log_evidence"], row["difference"]
        name = named({key: row["values"][key] for key in keys}) + (" (chosen)" if number == found["chosen"] else "")
        sign = ">= " if value["kind"] == "lower bound" else ""
        gap = (
            "" if apart is None else f"{apart['mean']:+.3f} ± {apart['se']:.3f} data, {_known(apart['se_seeds'])} seeds"
        )
        ppca = "" if row["ppca"] is None else f"{row['ppca']:.3f}"
        cells = (sign + f"{value['mean']:.3f}", f"{value['se']:.3f}", _known(value["se_seeds"]), str(row["seeds"]))
        rows.append((name, *cells, gap, f"{row['elbo']:.3f}", ppca, f"{row['seconds']:.1f}"))
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---", *("---:",) * (len(head) - 1)), *rows)]
    common = {key: settings[0][key] for key in settings[0] if key not in keys} if settings else {}
    told = "Nats per datum, higher is better." + (f" All have {named(common)}." if common else "")
    lines = [told, "", *lines]
    if found["settings"] and found["chosen"] is None:
        lines += ["", "No setting is chosen: there is no validation part (data.validation_fraction = 0.1 makes one)."]
    elif found["settings"]:
        lines += ["", "Chosen by the bound of the validation part; the figures are of the test part."]
    lines += [f"\nFailed: {name}: {why}" for name, why in found.get("failed", {}).items()]
    return "\n".join(["# Sweep", "", *lines]) + "\n"


def _known(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.3f}"
