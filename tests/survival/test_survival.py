"""A few cases of each attack on runs, in a process of their own; `soak.py` tries them all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak.py"


def soak(*options):
    return subprocess.run([sys.executable, SOAK, *options], capture_output=True, text=True, timeout=1800)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_nothing_is_lost():
    done = soak("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^\| (.*) \| ([\d,]+) \| 0 \|$", done.stdout, re.MULTILINE))
    assert len(counts) == 17
    assert all(int(count) > 0 for count in counts.values())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_run_that_is_written_in_two_steps_is_found_out():
    done = soak("--quick", "--only", "kills in evaluate", "--broken")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search("LOST .*: evaluate killed at .*: left (nothing|unreadable)", done.stdout)
