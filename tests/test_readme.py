"""The code of the README and the docs runs as it stands, but for the length of training."""

import importlib
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from ppl_vae.cli import app

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
PAGES = [
    page
    for page in sorted((README.parent / "docs").glob("*.md"))
    if "```python\n" in page.read_text().replace("```python\n# needs ", "")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_docs_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    names = {"__name__": page.stem}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        if block.startswith("# needs "):  # an account, a server
            continue
        exec(compile(block.replace("epochs=100", "epochs=5"), f"{page.name}, block {number + 1}", "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    names = {"__name__": "readme"}
    for block in range(number + 1):  # each may go on from those before
        capsys.readouterr()
        code = BLOCKS[block].replace("epochs=300", "epochs=2").replace(", 1000)", ", 50)")
        exec(compile(code, f"README.md, block {block + 1}", "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_code_for_missing_data_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    path = README.parent / "docs" / "missing.md"
    (code,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    exec(compile(code.replace("epochs=300", "epochs=2").replace("=1000", "=50"), str(path), "exec"), {})
    assert "alcohol" in capsys.readouterr().out


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_the_commands_of_the_pages_are_ours(page: Path) -> None:
    group: Any = get_command(app)
    fenced = re.findall(r"^```(?:text)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`(ppl-vae [^`]*)`", page.read_text())
    found = [*re.findall(r"(?:^|srun |bin/)(ppl-vae .*)$", "\n".join(fenced).replace("\\\n", ""), re.MULTILINE), *spans]
    for line in found:
        words = shlex.split(line.partition("  #")[0])[1:]
        if words[0].startswith("-") or words[0].isupper() or "|" in words:
            continue
        command = group.commands[words[0]]
        command.make_context(words[0], words[1:], resilient_parsing=len(words) < 3)


def test_the_commands_stand_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (README.parent / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make (demo|test|lint|bench|clean)\b", README.read_text()))
    assert {"demo", "test"} <= named <= targets


def test_named_paths_exist() -> None:
    pattern = r"\b(?:models|docs|inference|notebooks)/[\w./]+\.(?:toml|py|png|ipynb)\b"
    for path in re.findall(pattern, README.read_text()):
        assert (README.parent / path).is_file(), path


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    names = runpy.run_path(str(README.parent / "docs" / "reference.py"))
    names["write_reference"](tmp_path)
    for package in filter(None, names["PACKAGES"]):
        page = (tmp_path / f"ppl_vae.{package}.rst").read_text()
        for name in importlib.import_module(f"ppl_vae.{package}").__all__:
            assert re.search(rf"\b{name}\b", page), f"ppl_vae.{package}.{name}"
    assert ".. autofunction:: save_run" in (tmp_path / "ppl_vae.rst").read_text()
