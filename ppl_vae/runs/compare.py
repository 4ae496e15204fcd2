"""Run beside run: one table of finished runs, with paired differences over the same data."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppl_vae.runs.storage import check_folder, read_report, read_tensors


def compare_runs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Put finished runs side by side, with paired differences of log evidence over the same data.

    Returns:
        `runs`, a summary each, and `differences`, each `a`, `b`, `mean` (a minus b, nats per datum) and `se` over data.

    Raises:
        ValueError: for fewer than two runs, or runs that no one measure can compare: a density beside a probability
            mass, or other data, split, binarisation, scaling or dequantisation.
    """
    if len(paths) < 2:
        raise ValueError(f"Expected two or more runs to compare; got {len(paths)}.")
    runs, values = [], []
    for path in map(Path, paths):
        check_folder(path, finished=True)
        report = read_report(path)
        runs.append({"path": str(path), **{key: report[key] for key in ("data", "train", "test", "exact", "baseline")}})
        found = read_tensors(path / "evidence.safetensors").get("log_evidence")
        if found is None or len(found) != report["test"]["n"]:
            raise ValueError(
                f"Expected {path / 'evidence.safetensors'} to hold the evidence of each datum; it is damaged."
            )
        values.append(found.double())
    first = runs[0]
    for other in runs[1:]:
        for what, mine, theirs in _measures(first["data"], other["data"]):
            if mine != theirs:
                raise ValueError(
                    f"Expected runs whose figures share one measure; {what} is {mine} in {first['path']} and {theirs} "
                    f"in {other['path']}, so their nats do not compare. Compare runs that agree in it."
                )
    differences = []
    for a in range(len(runs)):
        for b in range(a + 1, len(runs)):
            gap = values[a] - values[b]
            spread = float(gap.std()) / len(gap) ** 0.5 if len(gap) > 1 else None
            differences.append({"a": runs[a]["path"], "b": runs[b]["path"], "mean": float(gap.mean()), "se": spread})
    return {"runs": runs, "differences": differences}


def _measures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what has to agree between two runs, by name."""
    yield "the likelihood's figure", f"a {a['measure']}", f"a {b['measure']}"
    for key in ("name", "binarization", "scaling", "dequantization", "seed"):
        yield f"data.{key}", json.dumps(a["protocol"].get(key)), json.dumps(b["protocol"].get(key))
    mine, theirs = a["protocol"]["split"], b["protocol"]["split"]
    for key in dict.fromkeys([*mine, *theirs]):
        yield f"the split's {key}", mine.get(key, 0), theirs.get(key, 0)
    yield "the part that was evaluated", a["part"], b["part"]
    yield "the digest of the test data", a["protocol"]["digest"][:12], b["protocol"]["digest"][:12]
