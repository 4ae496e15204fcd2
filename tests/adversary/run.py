"""Attack every stated certainty with thousands of hard cases, and print the rates: python tests/adversary/run.py."""

import argparse
import importlib
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
COUNTS = {  # cases of each kind
    "set_verdict": 4000,
    "quadrature": 3000,
    "annealing": 600,
    "closed_form": 5000,
    "gap": 1000,
    "nuts": 300,
    "calibration": 1000,
    "comparison": 1000,
    "training": 200,
}
CHUNKS = 20
COUNTED = ("estimates", "accepted", "settled", "converged")  # what a kind calls the cases that it answers for


def attack(kind: str, count: int, seed: int) -> dict[str, float]:
    """Rates of a share of the cases, in a process of its own."""
    import pyro
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    sys.path.insert(0, str(FOLDER.parent))
    sys.path.insert(0, str(FOLDER))
    rates: dict[str, float] = importlib.import_module(f"test_{kind}").rates(count, seed)
    return rates


def main() -> None:
    """Print a table of the rates, and write them where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(COUNTS)}; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--page", type=Path, help="the page whose table takes the rates, docs/adversary.md")
    given = parser.parse_args()
    there = [kind for kind in COUNTS if (FOLDER / f"test_{kind}.py").is_file()]
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for kind in given.kinds or there:
            began, count = time.perf_counter(), max(round(given.share * COUNTS[kind] / CHUNKS), 1)
            seeds = [1_000_000 + chunk * count for chunk in range(CHUNKS)]
            parts = list(pool.map(attack, [kind] * CHUNKS, [count] * CHUNKS, seeds))
            total = {key: sum(part[key] for part in parts) for key in parts[0]}
            results[kind] = total
            told = ", ".join(f"{key} {value:g}" for key, value in total.items())
            print(f"{kind:12} {told} ({time.perf_counter() - began:.0f} s)", flush=True)
    if given.page is not None:
        before, _, rest = given.page.read_text().partition("<!-- rates -->")
        table = ["| kind | cases | counted | beyond 5 | beyond 50 |", "|---|---|---|---|---|"]
        for kind, total in results.items():
            counted = next((total[key] for key in COUNTED if key in total), total["cases"])
            figures = (total["cases"], counted, total["beyond_5"], total["beyond_50"])
            table.append(f"| {kind.replace('_', ' ')} | {' | '.join(f'{figure:,.0f}' for figure in figures)} |")
        text = "\n".join(["<!-- rates -->", *table, "<!-- end -->"])
        given.page.write_text(before + text + rest.partition("<!-- end -->")[2])


if __name__ == "__main__":
    main()
