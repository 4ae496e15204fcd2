"""Data with missing cells that are left to the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ppl_vae.data import load, mask_missing
from ppl_vae.data.batches import check_observed


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "real": rng.normal(5, 2, 60),
            "long": rng.lognormal(0, 1.5, 60),
            "count": rng.poisson(1.0, 60).astype(float),
            "word": rng.choice(["a", "b", "c"], 60),
            "yes": rng.choice(["n", "y"], 60),
            "label": rng.choice(["p", "q"], 60),
        }
    )
    hidden = rng.random((60, 5)) < 0.2
    hidden[0] = False
    return table.mask(pd.DataFrame(np.c_[hidden, np.zeros(60, bool)], columns=table.columns))


def written(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def test_parts_say_what_is_observed_and_lead_back(frame: pd.DataFrame, tmp_path: Path) -> None:
    data = load(written(frame, tmp_path), missing="model", label="label", scaling="standardize", test_fraction=0.3)
    features = frame.drop(columns="label")
    for part, batch in (("train", data.train), ("test", data.test)):
        rows = features.iloc[data.row_numbers[part]]
        assert (batch["mask"].numpy() == rows.notna().to_numpy()).all()
        assert torch.equal(batch["x"].isnan(), ~batch["mask"])
        back = data.to_table(batch["x"], part)
        assert (back["word"].astype(object).isna() == rows["word"].isna()).all()
        for name in ("real", "long", "count"):
            np.testing.assert_allclose(back[name], rows[name], rtol=1e-6)
        seen = rows["word"].notna()
        assert (back["word"][seen].astype(str) == rows["word"][seen]).all()
    assert data.columns.missing == pytest.approx(features.iloc[data.row_numbers["train"]].isna().mean().tolist())
    assert data.columns == type(data.columns).from_dict(data.columns.to_dict())


def test_scales_and_kinds_are_those_of_the_observed_entries(frame: pd.DataFrame, tmp_path: Path) -> None:
    data = load(written(frame, tmp_path), missing="model", label="label", scaling="standardize", dtype=torch.float64)
    assert data.columns.kinds == ("real", "positive", "count", "category", "binary")
    train = frame.iloc[data.row_numbers["train"]]
    mean, spread = train["real"].mean(), train["real"].std(ddof=0)  # pandas skips what is missing
    np.testing.assert_allclose(data.train["x"][:, 0], (train["real"] - mean) / spread, rtol=1e-12)
    np.testing.assert_allclose(data.train["x"][:, 1], train["long"] / train["long"].std(ddof=0), rtol=1e-12)
    np.testing.assert_allclose(data.train["x"][:, 2], train["count"])


def test_with_nothing_missing_the_key_changes_nothing(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = written(frame.dropna(), tmp_path)
    one, other = (load(path, missing=missing, label="label") for missing in ("model", "refuse"))
    assert one.protocol == other.protocol
    assert one.train.keys() == {"x", "y"}
    assert one.columns == other.columns


@pytest.mark.parametrize("binarization", ["none", "static", "dynamic", "threshold"])
def test_arrays_with_nan(binarization: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 3, 4))
    x[3, 1, 2] = x[5] = np.nan
    np.savez(tmp_path / "x.npz", x=x)
    data = load(tmp_path / "x.npz", missing="model", binarization=binarization, seed=2)
    for batch in (data.train, data.test, data.epoch(1)):
        assert torch.equal(batch["x"].isnan(), ~batch["mask"])
    assert sum(int((~part["mask"]).sum()) for part in (data.train, data.test)) == 13
    assert (data.shape, data.protocol["maximum"]) == ((3, 4), 1)
    if binarization != "none":
        assert set(data.train["x"][data.train["mask"]].tolist()) == {0.0, 1.0}
    dropped = load(tmp_path / "x.npz", missing="drop rows", seed=2)
    assert len(dropped.train["x"]) + len(dropped.test["x"]) == 38
    assert "mask" not in dropped.train


@pytest.mark.parametrize(
    ("change", "keys", "match"),
    [
        ({"real": np.nan}, {}, r"missing throughout: 'real'\. Leave them out \(leave_out = \[\"real\"\]\)"),
        ({"yes": None, "long": np.nan}, {}, "missing throughout: 'long', 'yes'"),
        ({"label": [None, *"p" * 59]}, {}, "Expected a label in every row .*; got none in line 2"),
        ({}, {"size_factor": "total"}, 'no missing cells for size_factor = "total"'),
        ({"word": [None, "once", *"b" * 58]}, {"seed": 2}, "got 'once' in other parts alone"),
        ({}, {"missing": "keep"}, "`missing` to be one of 'refuse', 'model', 'drop rows'; got 'keep'"),
    ],
)
def test_mistakes_are_named(
    change: dict[str, Any], keys: dict[str, Any], match: str, frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = written(frame.assign(**change), tmp_path)
    with pytest.raises(ValueError, match=match):
        load(path, **{"missing": "model", "label": "label", **keys})


def test_infinities_are_no_missing_cells(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.where(np.arange(18).reshape(9, 2) == 5, np.inf, 1.0))
    with pytest.raises(ValueError, match="got inf in row 2, column 1"):
        load(tmp_path / "x.npy", missing="model")


def test_masks_of_bare_arrays() -> None:
    for x in ([[1.0, np.nan]], np.array([[1.0, np.nan]]), pd.DataFrame({"a": [1.0], "b": [np.nan]})):
        batch = mask_missing(x)
        assert batch["mask"].tolist() == [[True, False]]
        check_observed(batch)
    with pytest.raises(ValueError, match=r"got nothing in row 1 \(counted from 0\), 2 such"):
        check_observed(mask_missing(np.array([[1.0, 2.0], [np.nan] * 2, [np.nan] * 2])))
    with pytest.raises(ValueError, match="got nothing in row 7 of the source"):
        check_observed(mask_missing(np.array([[1.0], [np.nan]])), np.array([3, 7]))
