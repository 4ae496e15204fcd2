"""Try all attacks on runs, and write what was tried and what was lost: python tests/survival/soak.py --page FILE."""

import argparse
import platform
import sys
import tempfile
import time
import traceback
from itertools import islice
from pathlib import Path

import torch
from attacks import ALL, QUICK, World, write_in_two_steps

HEAD = """# What runs survive

`make soak` attacks runs and writes this page. A case is survived if nothing that was finished or kept is lost, no
damaged content is accepted, no stranger's code runs, and every refusal is one message with exit status 2. A run that
was killed is then gone on with, and must end with the same weights and figures, to the bit, as one never killed.

| attack | cases | lost |
|---|---:|---:|
"""


def main() -> int:
    """Run the attacks; the exit status says whether something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="the page to write")
    parser.add_argument("--only", default="", help="attacks whose name holds these words")
    parser.add_argument("--most", type=int, default=None, help="cases of each attack; by default all")
    parser.add_argument("--quick", action="store_true", help="a few cases of each attack")
    parser.add_argument("--broken", action="store_true", help="break the library on purpose: something must be lost")
    given = parser.parse_args()
    if given.broken:
        write_in_two_steps()
    torch.set_num_threads(1)
    rows, losses, began = [], [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="survival") as folder:
        world = World(Path(folder).resolve())
        for name, attack in (QUICK if given.quick else ALL).items():
            if given.only not in name:
                continue
            cases = 0
            try:
                for case, lost in islice(attack(world), given.most):
                    cases += 1
                    if lost:
                        losses.append((name, case, lost))
                        print(f"LOST {name}: {case}: {lost}", flush=True)
            except Exception:
                losses.append((name, "the attack itself", traceback.format_exc()))
                print(traceback.format_exc(), flush=True)
            rows.append((name, cases, sum(one[0] == name for one in losses)))
            print(f"{name}: {cases} cases, {rows[-1][2]} lost, {time.perf_counter() - began:.0f} s", flush=True)
    table = "".join(f"| {name} | {cases:,} | {lost} |\n" for name, cases, lost in rows)
    total, minutes = sum(row[1] for row in rows), (time.perf_counter() - began) / 60
    where = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}"
    ends = f"\n{total:,} cases in {minutes:.0f} minutes on one thread ({where}); {len(losses)} lost.\n"
    ends += "".join(f"\n- {name}: {case}: {lost.strip().splitlines()[-1]}" for name, case, lost in losses)
    if given.page:
        given.page.write_text(HEAD + table + ends, encoding="utf-8")
    print(table + ends)
    return int(bool(losses))


if __name__ == "__main__":
    sys.exit(main())
