"""Data that are mapped from files, held against the same data in memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ppl_vae import VAE, Conditional, fit
from ppl_vae.data import load
from ppl_vae.data.files import room
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import Linear

rng = np.random.default_rng(0)
ARRAYS = {
    "float32": rng.normal(size=(300, 7)).astype(np.float32),
    "gaps": np.where(rng.random((300, 7)) < 0.1, np.nan, rng.normal(size=(300, 7))),
    "whole": rng.integers(-5, 90, (300, 7)),
    "bytes": rng.integers(0, 256, (300, 4, 5)).astype(np.uint8),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("float32", {"scaling": "standardize", "validation_fraction": 0.2}),
    ("float32", {"scaling": "unit"}),
    ("gaps", {"scaling": "standardize", "missing": "model"}),
    ("gaps", {"missing": "drop rows"}),
    ("whole", {"dequantization": "uniform"}),
    ("bytes", {"binarization": "dynamic"}),
    ("bytes", {"binarization": "static"}),
    ("bytes", {"scaling": "unit", "dequantization": "uniform"}),
]


@pytest.fixture(autouse=True)
def _small_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ppl_vae.data.files._AT_ONCE", 100)  # a few rows at a time


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_mapped_data_are_those_in_memory_to_the_bit(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    np.save(tmp_path / "x.npy", ARRAYS[name])
    with monkeypatch.context() as patch:
        patch.setattr("ppl_vae.data.files._AT_ONCE", 2**22)  # all at once
        plain = load(tmp_path / "x.npy", **options)
    monkeypatch.setenv("PPL_VAE_IN_MEMORY", "1000")
    mapped = load(tmp_path / "x.npy", **options)
    assert mapped.protocol == plain.protocol
    assert mapped.columns == plain.columns
    for epoch in (0, 3):
        one, other = plain.epoch(epoch), mapped.epoch(epoch)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].nan_to_num(9.0), other[key].nan_to_num(9.0)) for key in one)
    assert torch.equal(plain.test["x"].nan_to_num(9.0), mapped.test["x"].nan_to_num(9.0))
    assert mapped.stored is None or mapped.stored["x"].dtype in (torch.uint8, torch.float32)
    assert os.listdir(tmp_path / "cache" / "ppl_vae") == []  # the maps have no names


def test_training_on_mapped_data_gives_the_same_weights(tmp_path: Path, monkeypatch: Any) -> None:
    torch.set_default_dtype(torch.float32)
    np.save(tmp_path / "x.npy", ARRAYS["bytes"])
    trained = []
    for size in ("1000000", "1000"):
        monkeypatch.setenv("PPL_VAE_IN_MEMORY", size)
        data = load(tmp_path / "x.npy", binarization="dynamic")
        torch.manual_seed(0)
        likelihood = Conditional(Bernoulli(20), Linear())
        vae = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(Normal(2), Linear()))
        vae.initialise(data.train["x"])
        fit(vae, data, epochs=3, batch_size=50, progress=False)
        trained.append(vae.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_infinities_in_mapped_data_are_named_by_their_place(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PPL_VAE_IN_MEMORY", "1000")
    x = ARRAYS["float32"].copy()
    x[250, 3] = x[299, 0] = np.inf
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="got inf in row 250, column 3 .* 2 such in all"):
        load(tmp_path / "x.npy")


def test_a_room_is_in_memory_if_it_fits_there(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PPL_VAE_IN_MEMORY", "4000")
    small, large = room((10, 10), torch.float64), room((100, 10), torch.float32)
    assert not (tmp_path / "cache").exists()
    larger = room((100, 11), torch.float32)
    assert (tmp_path / "cache").exists()
    assert (small.shape, large.shape, larger.shape) == ((10, 10), (100, 10), (100, 11))
    larger[:] = 2.0
    assert float(larger.sum()) == 2200


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_in_pieces_are_those_in_memory(suffix: str, tmp_path: Path, monkeypatch: Any) -> None:
    frame = pd.DataFrame(ARRAYS["gaps"][:, :4], columns=list("abcd"))
    frame["count"] = rng.poisson(2.0, 300)
    frame["kind"] = rng.choice(["u", "v"], 300)
    frame["name"] = [f"0{i}" for i in range(300)]
    frame["group"] = rng.choice(["one", "two"], 300)
    path = tmp_path / f"t.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    options: Any = {"label": "kind", "id": "name", "covariates": ["group"], "leave_out": ["d"], "missing": "model"}
    plain = load(path, **options, scaling="standardize")
    monkeypatch.setenv("PPL_VAE_IN_MEMORY", "1000")
    mapped = load(path, **options, scaling="standardize")
    assert mapped.protocol == plain.protocol
    assert mapped.columns == plain.columns
    assert (mapped.classes, mapped.roles) == (plain.classes, plain.roles)
    for key, value in plain.train.items():
        assert torch.equal(value.nan_to_num(9.0) if key == "x" else value, mapped.train[key].nan_to_num(9.0))
    assert list(plain.ids["test"]) == list(mapped.ids["test"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="larger than memory; got words in column 'kind'"):
        load(path, missing="model")
    with pytest.raises(ValueError, match="`columns` to name a column of .* Did you mean 'count'"):
        load(path, columns=["a", "cout"])
