"""Notebooks: kept with their outputs, by a digest of the sources they are of, and each runs from top to bottom.

`make notebooks` (or this file as a script, with the names of some) writes their outputs anew.
"""

import base64
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SECONDS = 300  # for one cell, on a machine that has other work
LARGEST = 700_000  # bytes of a notebook
ENVIRONMENT = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
# Pyro imports tqdm.auto, which asks for ipywidgets, a nicety that we do not install.
ENVIRONMENT["PYTHONWARNINGS"] = "ignore:IProgress not found"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def digest(notebook):
    """SHA-256 of all sources."""
    return hashlib.sha256("\0".join(f"{cell.cell_type}:{cell.source}" for cell in notebook.cells).encode()).hexdigest()


def execute(notebook, folder):
    """Run a notebook in a kernel and a folder of its own."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def smaller(code):
    """A picture in few colours."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def write(path):
    """Run a notebook, and keep its outputs with the digest of its sources."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    for output in outputs_of(notebook):
        if code := output.get("data", {}).get("image/png"):
            output.data = {"image/png": smaller(code), "text/plain": "<Figure>"}
    notebook.metadata = {"kernelspec": dict(notebook.metadata.kernelspec), "sources": digest(notebook)}
    nbformat.write(notebook, path)


def test_there_are_notebooks():
    assert "01_exact_posterior" in [path.stem for path in NOTEBOOKS]


@every_notebook
def test_is_kept_with_the_outputs_of_its_sources(path):
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)  # from 4.5 on cells have ids
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.get("sources") == digest(notebook), "run: make notebooks"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    for cell in notebook.cells:
        assert cell.id.startswith("cell-")  # chosen, where tools make random ones that spoil diffs
        assert not cell.get("attachments")
        assert "execution" not in cell.metadata  # the times of a run
    found = outputs_of(notebook)
    assert {output.output_type for output in found} <= {"stream", "display_data", "execute_result"}
    assert [output.text for output in found if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in found)
    assert path.stat().st_size < LARGEST
    for place in (Path.home(), tempfile.gettempdir(), path.parents[1]):
        assert f"{place}/" not in path.read_text(encoding="utf-8")  # no place of the machine that wrote it


def test_a_changed_source_is_seen():
    notebook = read(NOTEBOOKS[0])
    notebook.cells[-1].source += " "
    assert notebook.metadata.sources != digest(notebook)


@every_notebook
def test_runs(path, tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "PPL_VAE_FAST": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own puts pictures into the notebook
    notebook = read(path)
    code = execute(notebook, tmp_path)
    assert all(cell.execution_count for cell in code)
    outputs = outputs_of(notebook)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []  # no warnings before a reader
    assert any("image/png" in output.get("data", {}) for output in outputs)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    os.environ.pop("MPLBACKEND", None)
    for file in NOTEBOOKS:
        if not sys.argv[1:] or file.stem in sys.argv[1:]:
            print(file.name, flush=True)
            write(file)
