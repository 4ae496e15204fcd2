"""The code of the README and the docs runs as it stands, but for the length of training."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
PAGES = [page for page in sorted((README.parent / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_docs_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    names = {"__name__": page.stem}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
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


def test_the_commands_stand_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (README.parent / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make (demo|test|lint|bench|clean)\b", README.read_text()))
    assert {"demo", "test"} <= named <= targets


def test_named_paths_exist() -> None:
    pattern = r"\b(?:models|docs|inference|notebooks)/[\w./]+\.(?:toml|py|png|ipynb)\b"
    for path in re.findall(pattern, README.read_text()):
        assert (README.parent / path).is_file(), path
