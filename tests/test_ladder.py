"""Imports run down the ladder: the contracts in pyproject.toml hold, and would tell of an import that runs up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(folder: Path) -> tuple[int, str]:
    """Check the package in a folder against the contracts there."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", LINT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """A copy of the package that a test may damage."""
    shutil.copytree(ROOT / "ppl_vae", tmp_path / "ppl_vae", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


UPWARD = {
    "between packages": ("networks/linear.py", "from ppl_vae.families.family import Family", "The ladder"),
    "far up": ("data/batches.py", "from ppl_vae.runs.run import load_run", "The ladder"),
    "to the root": ("programs/vae.py", "from ppl_vae import fit", "Nothing imports the root"),
    "inside a function": ("families/family.py", "def f():\n    from ppl_vae.infer.svi import fit", "The ladder"),
    "inside a package": ("networks/network.py", "from ppl_vae.networks.mlp import MLP", "networks"),
    "training to references": ("infer/svi.py", "from ppl_vae.infer.reference import Reference", "independent"),
    "matplotlib": ("evaluation/gap.py", "import matplotlib", "matplotlib"),
    "pydantic": ("data/files.py", "import pydantic", "pydantic"),
    "typer": ("runs/run.py", "import typer", "typer"),
}


def test_the_contracts_hold() -> None:
    status, told = lint(ROOT)
    assert status == 0, told


@pytest.mark.parametrize("name", UPWARD)
def test_an_import_that_runs_up_is_told(name: str, twin: Path) -> None:
    module, line, contract = UPWARD[name]
    with (twin / "ppl_vae" / module).open("a") as file:
        file.write(f"\n{line}\n")
    status, told = lint(twin)
    assert status == 1
    assert any(contract in row for row in told.splitlines() if row.endswith("BROKEN")), told
