"""Attack every stated certainty with thousands of hard cases, and print the rates: python tests/adversary/run.py."""

import argparse
import importlib
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
    "class_evidence": 1000,
    "impute": 1000,
    "enumeration": 1000,
    "training": 200,
    "swaps": 7380,
}
CHUNKS = 20
COUNTED = ("estimates", "accepted", "settled", "converged", "trained")  # names of the cases answered for


def attack(kind: str, count: int, seed: int, until: float) -> dict[str, float] | None:
    """Rates of a chunk of the cases, in a process of its own; None if the time is up."""
    if time.time() > until:
        return None
    import pyro
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    sys.path.insert(0, str(FOLDER.parent))
    sys.path.insert(0, str(FOLDER))
    rates: dict[str, float] = importlib.import_module(f"test_{kind}").rates(count, seed)
    return rates


def write(page: Path, kind: str, total: dict[str, float]) -> None:
    """Put a kind's row into the table of a page; the rows of other kinds stay."""
    before, _, rest = page.read_text().partition("<!-- rates -->\n")
    table, _, after = rest.partition("<!-- end -->")
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[2:]}
    counted = next((total[key] for key in COUNTED if key in total), total["cases"])
    figures = (total["cases"], counted, total["beyond_5"], total["beyond_50"])
    rows[kind.replace("_", " ")] = f"| {kind.replace('_', ' ')} | {' | '.join(f'{each:,.0f}' for each in figures)} |"
    head = ["| kind | cases | counted | beyond 5 | beyond 50 |", "|---|---|---|---|---|"]
    names = [name.replace("_", " ") for name in COUNTS]
    lines = ["<!-- rates -->", *head, *(rows[name] for name in names if name in rows), "<!-- end -->"]
    page.write_text(before + "\n".join(lines) + after)


def main() -> None:
    """Print the rates, and put those of the kinds that ran into the table of `--page`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(COUNTS)}; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which a kind begins no further chunk")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; one a core by default")
    parser.add_argument("--page", type=Path, help="the page whose table takes the rates, docs/adversary.md")
    given = parser.parse_args()
    there = [kind for kind in COUNTS if (FOLDER / f"test_{kind}.py").is_file()]
    with ProcessPoolExecutor(given.workers) as pool:
        for kind in given.kinds or there:
            began, count = time.time(), max(round(given.share * COUNTS[kind] / CHUNKS), 1)
            chunks = [(kind, count, 1_000_000 + chunk * count, began + 60 * given.minutes) for chunk in range(CHUNKS)]
            parts = []
            for chunk, part in zip(chunks, pool.map(attack, *zip(*chunks, strict=True)), strict=True):
                if part is None:
                    continue
                parts.append(part)
                if part["beyond_5"]:
                    print(f"  rates{chunk[1:3]}: {told(part)}", flush=True)
            total = {key: sum(part[key] for part in parts) for key in parts[0]}
            print(f"{kind:12} {told(total)} ({time.time() - began:.0f} s)", flush=True)
            if given.page is not None:
                write(given.page, kind, total)


def told(rates: dict[str, float]) -> str:
    """Rates as a line of text."""
    return ", ".join(f"{key} {value:g}" for key, value in rates.items())


if __name__ == "__main__":
    main()
