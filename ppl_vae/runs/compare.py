"""Comparison of finished runs: one table, with paired differences over the same data."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ppl_vae.runs.console import comparison
from ppl_vae.runs.places import mend
from ppl_vae.runs.storage import check_folder, read_metadata, read_report, read_tensors, reading, steadily


def compare_runs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Compare finished runs, with paired differences of log evidence over the same data.

    Returns:
        `runs`, a summary each, and `differences`, each `a`, `b`, `mean` (a minus b, nats per datum) and `se` over data.

    Raises:
        ValueError: If there are fewer than two runs, or their figures have no common measure: a density beside a
            probability mass, or other data, split, binarisation, scaling or dequantisation.
    """
    if len(paths) < 2:
        raise ValueError(f"Expected two or more runs to compare; got {len(paths)}.")
    runs, evidence = [], []
    for path in map(Path, paths):
        mend(path)
        run, values = steadily(path, partial(_read, path))
        runs.append(run)
        evidence.append(values)
    first = runs[0]
    for other in runs[1:]:
        for what, one, two in _measures(first["data"], other["data"]):
            if one != two:
                raise ValueError(
                    f"Expected runs with one measure; {what} is {one} in {first['path']} and {two} in {other['path']}. "
                    "Compare runs that agree in it."
                )
    differences = []
    for (a, values), (b, others) in itertools.combinations(zip(runs, evidence, strict=True), 2):
        gap = values - others
        se = float(gap.std()) / len(gap) ** 0.5 if len(gap) > 1 else None
        differences.append({"a": a["path"], "b": b["path"], "mean": float(gap.mean()), "se": se})
    return {"runs": runs, "differences": differences}


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Summary of a run, and the evidence of each datum."""
    check_folder(path, finished=True)
    read_metadata(path / "model.safetensors")  # a run with damaged weights is no measure
    report, file = read_report(path), path / "evidence.safetensors"
    with reading(path / "report.json", "a report"):  # whatever of it is told below
        run = {"path": str(path), **{key: report[key] for key in ("data", "train", "test", "exact", "baseline")}}
        list(_measures(run["data"], run["data"]))
        comparison({"runs": [run], "differences": []})
        n = int(report["test"]["n"])
    values = read_tensors(file).get("log_evidence")
    if values is None or values.shape != (n,):
        raise ValueError(f"Expected {file} to hold the evidence of each datum; it is damaged. Fit again.")
    return run, values.double()


def _measures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What has to agree between the data of two runs, with its value in each."""
    yield "the likelihood's figure", f"a {a['measure']}", f"a {b['measure']}"
    for key in ("name", "binarization", "scaling", "dequantization", "seed"):
        yield f"data.{key}", json.dumps(a["protocol"].get(key)), json.dumps(b["protocol"].get(key))
    for key in ("by", "n_test"):
        yield f"the split's {key}", a["protocol"]["split"].get(key), b["protocol"]["split"].get(key)
    yield "the part that was evaluated", a["part"], b["part"]
    yield "the digest of the test data", a["protocol"]["digest"][:12], b["protocol"]["digest"][:12]
