"""`ppl-vae apply RUN score` on files of many rows: memory, and processor time beside reading, evaluation and writing.

    python benchmarks/streaming.py --rows 1000000

Each file is scored by a process of its own. The bar is 1.2 times the evaluation of the same rows in memory for an
array, and 1.2 times reading (by pandas), evaluation and writing (by pandas) for a table.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ppl_vae import load_run
from ppl_vae.evaluation.evidence import estimate_evidence
from ppl_vae.programs.target import Target
from ppl_vae.runs.apply import Applied, carry_out
from ppl_vae.runs.run import fit_spec

SPEC = """
data = { name = "small.npy", scaling = "standardize" }
model = { latent = 4 }
prior = { family = "StandardNormal" }
likelihood = { family = "Normal", scale = "shared", network = { family = "MLP", hidden = [32] } }
posterior = { family = "Normal", network = { family = "MLP", hidden = [32] } }
svi = { epochs = 5 }
evaluation = { samples = 30 }
"""
READ: dict[str, Callable[[Path], Any]] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}


def write_rows(folder: Path, rows: int, name: str) -> None:
    """Rows of 50 columns from a linear model of four latents, as an array and as tables."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 50))
    x = np.concatenate(
        [
            (rng.normal(size=(n, 4)) @ weight + 0.5 * rng.normal(size=(n, 50))).astype(np.float32)
            for n in [10_000] * (rows // 10_000) + [rows % 10_000]
        ]
    )
    np.save(folder / f"{name}.npy", x)
    frame = pd.DataFrame(x, columns=[f"c{j}" for j in range(50)])
    frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    frame.to_parquet(folder / f"{name}.parquet")


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of some work."""
    torch.set_num_threads(1)
    start = time.process_time()
    work()
    return time.process_time() - start


def score(folder: Path, source: str, samples: int) -> tuple[float, float]:
    """Processor time of scoring a file, and the peak memory of this process in MiB."""
    ending = Path(source).suffix.replace(".npy", ".npz")
    run, out = load_run(folder / "run"), folder / f"{source}{ending}"
    taken = seconds(lambda: carry_out(run, "score", folder / source, out=out, samples=samples))
    return taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def evaluate(folder: Path, samples: int) -> float:
    """Processor time of the evaluation of all rows in memory."""
    run = load_run(folder / "run")
    transform, x = Applied.of(run).reader.transform, np.load(folder / "large.npy")
    target = Target(run.program, {"x": transform(transform.to_tensor(x.astype(np.float64)), 0)})
    with torch.no_grad():
        return seconds(lambda: estimate_evidence(target, samples, 0, None))


def read_and_write(path: Path) -> dict[str, float]:
    """Processor time of reading a table, and of writing its scores, by pandas."""
    read, scores, other = READ[path.suffix], path.with_name(path.name + path.suffix), path.with_stem("other")
    found = {"reading": seconds(lambda: read(path))}
    table = read(scores)
    return found | {"writing": seconds(lambda: (table.to_csv if path.suffix == ".csv" else table.to_parquet)(other))}


def alone(function: Callable[..., Any], *given: Any) -> Any:
    """The answer of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, 20_000, "small")
        write_rows(folder, given.rows, "large")
        (folder / "spec.toml").write_text(SPEC)
        fit_spec(folder / "spec.toml", out=folder / "run")
        print(f"| file of {given.rows:,} rows | apply, s | parts, s | ratio | peak, MiB | at 20,000 rows |")
        print("|---|---:|---|---:|---:|---:|")
        evaluation = alone(evaluate, folder, given.samples)
        for ending in (".npy", ".csv", ".parquet"):
            _, least = alone(score, folder, f"small{ending}", given.samples)
            taken, peak = alone(score, folder, f"large{ending}", given.samples)
            more = alone(read_and_write, folder / f"large{ending}") if ending in READ else {}
            each = {"evaluation": evaluation, **more}
            listed = " + ".join(f"{value:.1f} {name}" for name, value in each.items())
            ratio = taken / sum(each.values())
            print(f"| `{ending}` | {taken:.1f} | {listed} | {ratio:.2f} | {peak:.0f} | {least:.0f} |", flush=True)


if __name__ == "__main__":
    main()
