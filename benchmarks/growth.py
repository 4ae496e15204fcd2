"""How time and memory grow with latents, samples and data, each case in a process of its own.

python benchmarks/growth.py [--out results.json]

One of the three is varied while the others stay, for the evidence of images by 784-200-200-z and for the epoch of a
training on them in batches of 128. Memory is what the process held at most beyond what it held before the work.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from clock import clocks, pair, record

from ppl_vae import fit, log_evidence

BASE = {"latents": 50, "samples": 1000, "data": 200}
VARIED = {"latents": (2, 10, 50, 250), "samples": (10, 100, 1000, 10_000), "data": (20, 200, 2000, 20_000)}
ENTRIES = 4_000_000  # samples and data that a case of evidence may have together


def measure(work: str, latents: int, samples: int, data: int) -> dict[str, float]:
    """Time one case in this process, after a smaller one that fetches what is needed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    program, x = pair(784, [200, 200], latents), (torch.rand(data, 784) < 0.13).float()

    def run(rows: int, draws: int, epochs: int) -> None:
        if work == "evidence":
            log_evidence(program, x[:rows], draws)
        else:
            fit(program, x[:rows], epochs=epochs, batch_size=128, device="cpu", progress=False, capture="graph")

    run(min(data, 20), 10, 2)
    before, began = most_held(), clocks()
    run(data, samples, 2)
    after, ended = most_held(), clocks()
    return {"processor_seconds": ended[1] - began[1], "added_mib": (after - before) / 1024}


def most_held() -> int:
    """KiB that this process has held at most; `ru_maxrss` would begin with what the process that started it held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def growth() -> dict[str, Any]:
    """Run all cases; returns `{work: {what varies: {its value: figures}}}`."""
    found: dict[str, Any] = {}
    for work, kinds in (("evidence", ("latents", "samples", "data")), ("two epochs", ("latents", "data"))):
        for kind in kinds:
            for value in VARIED[kind]:
                case = {**BASE, **({} if work == "evidence" else {"data": 2000}), kind: value}
                if work == "evidence" and case["samples"] * case["data"] > ENTRIES:
                    case["samples"] = ENTRIES // case["data"]
                command = [sys.executable, __file__, "--one", work, *map(str, case.values())]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = {**case, **json.loads(done.stdout)}
                found.setdefault(work, {}).setdefault(kind, []).append(row)
                print(f"{work}, {row}", flush=True)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The rows of a page of Markdown."""
    lines = ["| work | latents | samples | data | processor seconds | more memory, MiB |", "|---|---|---|---|---|---|"]
    for work in ("evidence", "two epochs"):
        for kind, rows in found[work].items():
            title = f"{work}, by {kind}"
            for row in rows:
                sizes = f"{row['latents']:,} | {row['samples'] if work == 'evidence' else 1:,} | {row['data']:,}"
                lines.append(f"| {title} | {sizes} | {row['processor_seconds']:.2f} | {row['added_mib']:,.0f} |")
                title = ""
    return lines


def main() -> None:
    """Run all; write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("WORK", "LATENTS", "SAMPLES", "DATA"), help="a single case")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], *map(int, given.one[1:]))))
        return
    found = growth()
    print("\n".join(table(found)))
    record(found, given.out)


if __name__ == "__main__":
    main()
