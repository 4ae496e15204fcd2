"""Notebooks: stored without outputs, and each runs from top to bottom in a kernel and a folder of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SECONDS = 120  # for one cell, on a machine that has other work

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def test_there_are_notebooks():
    assert "01_exact_posterior" in [path.stem for path in NOTEBOOKS]


@every_notebook
def test_is_stored_without_outputs(path):
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)  # from 4.5 on cells have ids
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.id.startswith("cell-")  # chosen, where tools make random ones that spoil diffs
        assert not cell.get("attachments")
        assert "execution" not in cell.metadata  # the times of a run
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@every_notebook
def test_runs(path, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PPL_VAE_FAST", "1")
    # Pyro imports tqdm.auto, which asks for ipywidgets, a nicety that we do not install.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own puts pictures into the notebook
    notebook = read(path)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=folder).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []  # no warnings before a reader
    assert any("image/png" in output.get("data", {}) for output in outputs)
