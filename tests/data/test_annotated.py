"""AnnData files, written here as its specification says, held against the arrays that they were made of."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse
import torch

from ppl_vae.data import load
from ppl_vae.runs import evaluated
from ppl_vae.runs.run import fit_spec

N, GENES = 60, 4
rng = np.random.default_rng(0)
COUNTS = rng.poisson(3.0, (N, GENES)).astype(np.float32) + (np.arange(GENES) == 0)
BATCH = rng.integers(0, 3, N)
TYPE = rng.choice(["T cell", "B cell"], N)
DEPTH = rng.uniform(0.5, 2.0, N)
WORDS = np.array(["b1", "b2", "b3"])


def matrix(group: Any, name: str, values: np.ndarray, kind: str) -> None:
    """Write a matrix, dense or compressed by rows or columns."""
    if kind == "dense":
        group[name] = values
        return
    part = group.create_group(name)
    part.attrs.update({"encoding-type": f"{kind}_matrix", "shape": values.shape})
    sparse = getattr(scipy.sparse, f"{kind}_array")(values)
    for key in ("data", "indices", "indptr"):
        part[key] = getattr(sparse, key)


def write(path: Path, kind: str = "csr", rows: slice = slice(None)) -> Path:
    names = np.array([f"cell{i}" for i in range(N)], object)[rows]
    with h5py.File(path, "w") as file:
        matrix(file, "X", np.log1p(COUNTS)[rows], kind)
        matrix(file.create_group("layers"), "counts", COUNTS[rows], kind)
        for group, index in (("obs", names), ("var", np.array([f"g{j}" for j in range(GENES)], object))):
            file.create_group(group).attrs["_index"] = "_index"
            file[group]["_index"] = index
        obs = file["obs"]
        obs.attrs["column-order"] = ["batch", "type", "depth", "age"]
        batch = obs.create_group("batch")
        batch.attrs["encoding-type"] = "categorical"
        batch["codes"], batch["categories"] = BATCH[rows].astype(np.int8), WORDS.astype(object)
        obs["type"], obs["depth"] = TYPE[rows].astype(object), DEPTH[rows]
        age = obs.create_group("age")
        age["values"], age["mask"] = np.arange(len(names)), np.arange(len(names)) == 3
    return path


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
def test_matrix_layers_and_columns_are_those_that_were_written(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "cells.h5ad", kind)
    options: Any = {"label": "type", "covariates": ["batch"], "leave_out": ["g2"]}
    data = load(path, array="counts", size_factor="total", **options)
    for part, batch in (("train", data.train), ("test", data.test)):
        rows = data.row_numbers[part]
        assert np.array_equal(batch["x"].numpy(), COUNTS[rows][:, [0, 1, 3]])
        assert np.array_equal(batch["covariates"][:, 0].numpy(), BATCH[rows])
        assert [data.classes[k] for k in batch["y"]] == TYPE[rows].tolist()  # type: ignore[index]
        assert list(data.ids[part]) == [f"cell{i}" for i in rows]  # type: ignore[arg-type]
        totals = COUNTS[:, [0, 1, 3]].sum(1)
        expected = totals[rows] / totals[data.row_numbers["train"]].mean()
        assert np.allclose(batch["size_factor"].numpy(), expected)
    assert data.columns.names == ("g0", "g1", "g3")
    assert data.columns.kinds == ("count",) * 3
    assert data.columns.covariates == {"batch": ("b1", "b2", "b3")}
    plain = load(path, columns=["g1", "g0"], size_factor="depth")
    rows = plain.row_numbers["train"]
    assert np.allclose(plain.train["x"].numpy(), np.log1p(COUNTS)[rows][:, [1, 0]])
    assert np.allclose(plain.train["size_factor"].numpy(), DEPTH[rows])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"array": "count"}, r"`array` to name a layer of .* \('counts'\); got 'count'. Did you mean 'counts'\?"),
        ({"columns": ["g9"]}, "`columns` to name a variable of"),
        ({"label": "typ"}, "`label` to name a column of .* Did you mean 'type'"),
        ({"covariates": ["age"]}, "covariate in every row of .* row 3"),
        ({"categories": ["g1"]}, "no `categories` for an AnnData file"),
        ({"separator": ","}, "no `separator` for data that are no text"),
    ],
)
def test_wrong_names_are_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(write(tmp_path / "cells.h5ad"), **options)


def test_damaged_files_are_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="Expected an AnnData file; got"):
        load(path)
    with h5py.File(path, "w") as file:
        file["X"] = np.zeros(3)
    with pytest.raises(ValueError, match="Expected an AnnData file; got"):
        load(path)
    write(path)
    with h5py.File(path, "a") as file:
        del file["X"]
        file.create_dataset("X", (10**9, 10**4), np.float32, chunks=(1, 10**4))
    with pytest.raises(ValueError, match="its header announces"):
        load(path)


def test_a_model_of_counts_takes_cells_of_another_file_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
    torch.set_default_dtype(torch.float32)
    write(tmp_path / "cells.h5ad")
    (tmp_path / "spec.toml").write_text("""
data = { name = "cells.h5ad", array = "counts", covariates = ["batch"], size_factor = "total" }
model = { latent = 1, given = "covariates" }
prior = { family = "StandardNormal" }
likelihood = { family = "NegativeBinomial", network = { family = "Linear" } }
posterior = { family = "Normal", network = { family = "Linear" } }
svi = { epochs = 2 }
evaluation = { samples = 30 }
""")
    run = fit_spec(tmp_path / "spec.toml", out=tmp_path / "run")
    known = run.encode()
    whole = run.encode(tmp_path / "cells.h5ad")
    assert list(whole.index) == [f"cell{i}" for i in range(N)]
    assert np.allclose(whole.loc[known.index], known, atol=1e-5)
    some = run.encode(write(tmp_path / "few.h5ad", "csc", slice(0, 20)))
    assert np.allclose(some, whole[:20], atol=1e-5)
