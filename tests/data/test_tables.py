"""Tables: what pandas and scikit-learn say of the same file is the oracle."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import torch
from sklearn.preprocessing import StandardScaler

from ppl_vae.data import Columns, Data, load
from ppl_vae.data.columns import infer_kind
from ppl_vae.data.tables import read_table, stream_text

PENGUINS = Path(os.environ.get("PPL_VAE_DATA", "")) / "penguins.csv"


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "row": np.arange(1, 61),
            "species": np.array(["gentoo", "adelie", "chin strap"])[rng.integers(0, 3, 60)],
            "sex": np.array(["m", "f"])[rng.integers(0, 2, 60)],
            "mass": rng.normal(4000, 500, 60).round(1),
            "area": rng.lognormal(0, 1.5, 60),
            "eggs": rng.poisson(2, 60),
            "ringed": rng.integers(0, 2, 60),
            "share": np.r_[0.01, 0.99, rng.uniform(0.02, 0.98, 58)],
        }
    )


def _write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".feather":
        frame.to_feather(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def _parts(data: Data) -> dict[str, dict[str, torch.Tensor]]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: part for name, part in parts.items() if part is not None}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "parquet", "feather"])
def test_a_table_is_what_pandas_reads(frame: pd.DataFrame, tmp_path: Path, suffix: str) -> None:
    data = load(_write(frame, tmp_path / f"t.{suffix}"), dtype=torch.float64, validation_fraction=0.2)
    expected = frame.assign(**{name: pd.Categorical(frame[name]).codes for name in ("species", "sex")})
    assert data.feature_names == list(frame.columns)
    for name, part in _parts(data).items():
        np.testing.assert_array_equal(part["x"], expected.iloc[data.row_numbers[name]].to_numpy(np.float64))
    assert sorted(np.concatenate(list(data.row_numbers.values()))) == list(range(60))
    assert data.ids == dict.fromkeys(data.row_numbers)
    assert data.columns.categories == {"species": ("adelie", "chin strap", "gentoo"), "sex": ("f", "m")}
    assert data.columns.levels == (0, 3, 2, 0, 0, 0, 2, 0)
    assert data.columns.kinds == ("count", "category", "binary", "real", "positive", "count", "binary", "unit")
    assert data.suspects == {"row": "id", "species": "label"}
    assert Columns.from_dict(data.columns.to_dict()) == data.columns


def test_all_formats_give_one_digest(frame: pd.DataFrame, tmp_path: Path) -> None:
    paths = [_write(frame, tmp_path / f"t.{suffix}") for suffix in ("csv", "tsv", "parquet", "feather")]
    assert len({load(path, label="species").protocol["digest"] for path in paths}) == 1


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_separator_is_found(frame: pd.DataFrame, tmp_path: Path, separator: str) -> None:
    words = frame.assign(species='a "quoted" word, with ; and | and \t inside')
    words.to_csv(tmp_path / "t.csv", sep=separator, index=False)
    data = load(tmp_path / "t.csv")
    assert data.columns == load(tmp_path / "t.csv", separator=separator).columns
    assert data.feature_names == list(frame.columns)


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 3))
    np.savetxt(tmp_path / "t.txt", x)
    data = load(tmp_path / "t.txt", dtype=torch.float64)
    np.testing.assert_allclose(data.train["x"], x[data.row_numbers["train"]])


def test_a_separator_that_cannot_be_found_is_given(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a  b\n1 2\n 3  4\n5 6\n7 8\n")
    data = load(tmp_path / "t.csv", separator=" ")
    assert data.feature_names == ["a", "b"]
    np.testing.assert_array_equal(data.train["x"].sum() + data.test["x"].sum(), 36)
    with pytest.raises(ValueError, match="`separator` to be one character.*got '::'"):
        load(tmp_path / "t.csv", separator="::")


def test_label_id_and_left_out(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = _write(frame, tmp_path / "t.csv")
    data = load(path, label="species", id="row", leave_out=["sex", "area"])
    assert data.feature_names == ["mass", "eggs", "ringed", "share"]
    assert data.roles == {"row": "id", "species": "label", "sex": "left out", "area": "left out"}
    assert data.protocol["roles"] == data.roles
    assert data.classes == ("adelie", "chin strap", "gentoo")
    for name, part in _parts(data).items():
        rows = frame.iloc[data.row_numbers[name]]
        assert part["y"].dtype == torch.int64
        np.testing.assert_array_equal(np.array(data.classes)[part["y"]], rows["species"])
        np.testing.assert_array_equal(np.asarray(data.ids[name]).astype(int), rows["row"])
    assert data.suspects == {}
    chosen = load(path, columns=["eggs", "mass"], label="species")
    assert chosen.feature_names == ["eggs", "mass"]
    assert chosen.roles["row"] == "left out"
    np.testing.assert_array_equal(chosen.train["x"], data.train["x"][:, [1, 0]])


def test_whole_numbers_are_labels_in_their_order(tmp_path: Path) -> None:
    frame = pd.DataFrame({"class": [10, 9, 1] * 10, "x": np.arange(30) / 7})
    data = load(_write(frame, tmp_path / "t.csv"), label="class")
    assert data.classes == ("1", "9", "10")
    expected = np.unique(frame["class"], return_inverse=True)[1][data.row_numbers["test"]]
    np.testing.assert_array_equal(data.test["y"], expected)
    with pytest.raises(ValueError, match=r"words or whole numbers as labels in column 'x' of .*; got 0.14"):
        load(tmp_path / "t.csv", label="x")


def test_numbers_can_be_read_as_words(tmp_path: Path) -> None:
    frame = pd.DataFrame({"code": [1, 2, 10] * 10, "x": np.arange(30) / 7})
    for suffix in ("csv", "parquet"):
        data = load(_write(frame, tmp_path / f"t.{suffix}"), categories=["code"])
        assert data.columns.categories == {"code": ("1", "2", "10")}
        assert data.columns.kinds == ("category", "real")
        np.testing.assert_array_equal(data.train["x"][:, 0], np.tile([0, 1, 2], 10)[data.row_numbers["train"]])


def test_ordered_categories_keep_their_order(tmp_path: Path) -> None:
    words = ["low", "high", "middle"] * 20
    ordered = pd.Categorical(words, ["low", "middle", "high", "extreme"], ordered=True)
    frame = pd.DataFrame({"o": ordered, "u": pd.Categorical(words), "b": [True, False, True] * 20})
    data = load(_write(frame, tmp_path / "t.parquet"))
    assert data.columns.kinds == ("ordered", "category", "binary")
    assert data.columns.levels == (4, 3, 2)
    assert data.columns.categories == {"o": ("low", "middle", "high", "extreme"), "u": ("high", "low", "middle")}
    rows = data.row_numbers["test"]
    np.testing.assert_array_equal(data.test["x"][:, 0], ordered.codes[rows])
    back = data.to_table(data.test["x"])
    assert back["o"].dtype.ordered
    assert not back["u"].dtype.ordered
    assert list(back["o"]) == list(frame["o"].iloc[rows])


@pytest.mark.parametrize("scaling", ["none", "unit", "standardize"])
def test_to_table_leads_back(frame: pd.DataFrame, tmp_path: Path, scaling: str) -> None:
    wide = pd.concat([frame, pd.DataFrame(np.random.default_rng(1).normal(5, 3, (60, 20))).add_prefix("g")], axis=1)
    data = load(_write(wide, tmp_path / "t.csv"), scaling=scaling, dtype=torch.float64, id="row")
    for name, part in _parts(data).items():
        table = data.to_table(part["x"], name)
        expected = wide.iloc[data.row_numbers[name]].drop(columns="row").set_axis(table.index)
        assert list(table.index) == list(map(str, wide["row"].iloc[data.row_numbers[name]]))
        pd.testing.assert_frame_equal(table, expected, check_dtype=False, check_categorical=False, rtol=1e-12)
    drawn = data.to_table(torch.full((2, data.features), 9.7))
    assert list(drawn["sex"]) == ["m", "m"]
    with pytest.raises(ValueError, match=r"shape \(n, 27\); got \(2, 3\)"):
        data.to_table(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="48 rows of the part 'train'; got 2"):
        data.to_table(torch.zeros(2, 27), "train")


def test_to_table_takes_dequantised_numbers_down() -> None:
    data, raw = load("digits", dequantization="uniform", scaling="unit"), load("digits")
    np.testing.assert_array_equal(data.to_table(data.test["x"]), raw.test["x"])


def test_standardizing_leaves_codes_and_counts_alone(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = _write(frame, tmp_path / "t.csv")
    raw, scaled = (load(path, scaling=s, dtype=torch.float64) for s in ("none", "standardize"))
    names, kinds = raw.feature_names, raw.columns.kinds
    assert names is not None
    assert kinds == scaled.columns.kinds
    for part in ("train", "test"):
        before, after = (getattr(data, part)["x"].numpy() for data in (raw, scaled))
        for j, kind in enumerate(kinds or ()):
            if kind in ("real", "positive"):
                oracle = StandardScaler(with_mean=kind == "real").fit(raw.train["x"][:, [j]])
                np.testing.assert_allclose(after[:, [j]], oracle.transform(before[:, [j]]), rtol=1e-12)
            else:
                np.testing.assert_array_equal(after[:, j], before[:, j])
    assert scaled.protocol["log_volume"] == pytest.approx(
        sum(float(raw.train["x"][:, names.index(name)].std(correction=0).log()) for name in ("mass", "area"))
    )


def test_unit_scaling_beside_words_scales_measurements_alone(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = _write(frame[["species", "mass", "eggs"]], tmp_path / "t.csv")
    raw, scaled = (load(path, scaling=s, dtype=torch.float64).train["x"] for s in ("none", "unit"))
    torch.testing.assert_close(scaled, raw / torch.tensor([1, raw[:, 1].max(), 1]))
    for options in ({"binarization": "threshold"}, {"dequantization": "uniform"}):
        with pytest.raises(ValueError, match="numbers alone .*; got words in species"):
            load(path, **options)


def test_kinds_follow_the_transform(tmp_path: Path) -> None:
    counts = pd.DataFrame(np.random.default_rng(0).poisson(2, (60, 2)), columns=["a", "b"])
    path = _write(counts, tmp_path / "t.csv")
    for options, kinds in (
        ({}, ("count", "count")),
        ({"scaling": "standardize"}, ("count", "count")),
        ({"scaling": "unit"}, ("real", "real")),
        ({"dequantization": "uniform"}, ("real", "real")),
    ):
        assert load(path, **options).columns.kinds == kinds  # type: ignore[arg-type]
    shares = _write(counts.clip(0, 1), tmp_path / "binary.csv")
    data = load(shares, binarization="static")
    assert (data.columns.kinds, data.columns.levels) == (("binary", "binary"), (2, 2))


def test_pictures_have_levels_but_no_kinds(tmp_path: Path) -> None:
    assert load("digits").columns == Columns(64, (8, 8), levels=(17,) * 64, given={"y": (10,)})
    assert load("digits", scaling="unit").columns.levels == (17,) * 64
    assert load("digits", binarization="static").columns.levels == (2,) * 64
    for options in ({"dequantization": "uniform"}, {"scaling": "standardize"}):
        assert load("digits", **options).columns.levels is None
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    assert load(tmp_path / "x.npy").columns == Columns(3)


# Size factors


def test_size_factors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = pd.DataFrame(rng.poisson(3, (50, 4)) + 1, columns=list("abcd")).assign(depth=rng.uniform(1, 2, 50))
    path = _write(counts, tmp_path / "t.csv")
    data = load(path, size_factor="total", leave_out=["depth"], dtype=torch.float64, validation_fraction=0.2)
    mean = data.train["x"].sum(1).mean()
    for part in _parts(data).values():
        torch.testing.assert_close(part["size_factor"], part["x"].sum(1) / mean)
    assert "size_factor" in data.epoch(3)
    data = load(path, size_factor="depth", dtype=torch.float64)
    assert data.feature_names == list("abcd")
    np.testing.assert_array_equal(data.test["size_factor"], counts["depth"].iloc[data.row_numbers["test"]])
    np.save(tmp_path / "x.npy", counts[list("abcd")])
    total = load(tmp_path / "x.npy", size_factor="total", dtype=torch.float64)
    torch.testing.assert_close(total.test["size_factor"], total.test["x"].sum(1) / total.train["x"].sum(1).mean())
    with pytest.raises(ValueError, match=r"counts \(whole numbers.*size_factor = \"total\"; got others in depth"):
        load(path, size_factor="total")
    with pytest.raises(ValueError, match="`size_factor` to be one of 'total'; got 'depth'"):
        load(tmp_path / "x.npy", size_factor="depth")
    _write(counts[list("abcd")] * (np.arange(50) != 7)[:, None], path)
    with pytest.raises(ValueError, match="total above 0 in every row.*got 0 in line 9"):
        load(path, size_factor="total")
    with pytest.raises(ValueError, match="numbers above 0 as size factors in column 'a'"):
        load(path, size_factor="a")


# Kinds


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1, 1, 0], "binary"),
        ([0, 0, 0], "binary"),
        ([0, 1, 5, 2], "count"),
        ([1, 2, 3, 1], "count"),
        ([172, 181, 230, 190], "real"),
        ([-1, 0, 1, 2], "real"),
        ([0.0, 0.5, 2.0], "real"),
        ([0.01, 0.5, 0.99], "unit"),
        ([0.2, 0.5, 0.8], "real"),
        ([0.0, 0.5, 1.0], "real"),
        ([1.5, 1.5, 1.5], "real"),
    ],
)
def test_kinds_of_numbers(values: list[float], kind: str) -> None:
    array = np.array(values, np.float64)
    assert infer_kind(array, array) == kind


def test_skewed_positive_columns() -> None:
    rng = np.random.default_rng(0)
    assert infer_kind(x := rng.lognormal(0, 1, 500), x) == "positive"
    assert infer_kind(x := rng.normal(100, 5, 500), x) == "real"
    assert infer_kind(x - 100, x - 100) == "real"


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
def test_bundled_sets(name: str) -> None:
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    data = load(name, dtype=torch.float64)
    assert data.feature_names == list(bunch.feature_names)
    assert data.classes == tuple(bunch.target_names)
    for part, batch in _parts(data).items():
        np.testing.assert_array_equal(batch["x"], bunch.data[data.row_numbers[part]])
        np.testing.assert_array_equal(batch["y"], bunch.target[data.row_numbers[part]])
    assert set(data.columns.kinds or ()) <= {"real", "positive"}
    assert data.suspects == {}
    one = load(name, columns=[data.feature_names[2]])
    assert torch.equal(one.train["x"][:, 0], load(name).train["x"][:, 2])


def test_diabetes_is_in_its_own_units() -> None:
    bunch, data = sklearn.datasets.load_diabetes(scaled=False), load("diabetes", dtype=torch.float64)
    expected = bunch.data[data.row_numbers["test"]] - np.eye(10)[1]  # the sexes 1 and 2 have the codes 0 and 1
    np.testing.assert_array_equal(data.test["x"], expected)
    assert data.columns.kinds == ("real", "binary", *("real",) * 8)


@pytest.mark.skipif(not PENGUINS.is_file(), reason="PPL_VAE_DATA holds no penguins.csv")
def test_penguins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got some in 'bill_length_mm' \(2\), .*'sex' \(11\): 11 rows, .* line 5\."):
        load(PENGUINS)
    data = load(PENGUINS, leave_out=["sex", *pd.read_csv(PENGUINS).columns[2:6]])
    assert data.columns.categories == {
        "species": ("Adelie", "Chinstrap", "Gentoo"),
        "island": ("Biscoe", "Dream", "Torgersen"),
    }
    whole = load(_write(pd.read_csv(PENGUINS).dropna(), tmp_path / "penguins.csv"))
    assert whole.columns.kinds == ("category", "category", "real", "real", "real", "real", "binary", "real")
    assert whole.suspects == {"species": "label"}


def test_a_constant_column_is_suspect(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": 1.5, "word": "x", "b": np.arange(20) / 3, "late": [3, 5, 6, 9] * 5})
    data = load(_write(frame, tmp_path / "t.csv"))
    assert data.suspects == {"a": "constant", "word": "constant"}


# Bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label": "specie"}, r"`label` to name .*\('row', 'species'.*\); got 'specie'. Did you mean 'species'"),
        ({"id": "Row"}, "`id` to name a column of .*got 'Row'. Did you mean 'row'"),
        ({"columns": ["mass", "egs"]}, "`columns` to name .*got 'egs'. Did you mean 'eggs'"),
        ({"leave_out": ["zzz"]}, r"`leave_out` to name .*got 'zzz'\.$"),
        ({"categories": ["rings"]}, "`categories` to name .*got 'rings'"),
        ({"size_factor": "totl"}, "`size_factor` to name .*got 'totl'"),
        ({"label": "sex", "id": "sex"}, "one role for column 'sex' of .*; got label and id"),
        ({"label": "sex", "columns": ["sex"]}, "one role for column 'sex' of .*; got label and feature"),
        ({"columns": []}, r"at least one feature in .*; got row \(left out\)"),
        ({"size_factor": "species"}, "numbers above 0 as size factors in column 'species'"),
        ({"array": "x"}, r"no `array` for a file that is neither \.npz nor \.h5ad; got 'x'"),
    ],
)
def test_bad_roles_are_refused(frame: pd.DataFrame, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(_write(frame, tmp_path / "t.csv"), **options)


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((9, 2)))
    _write(pd.DataFrame({"a": [1.0] * 9}), tmp_path / "t.parquet")
    for name, options, match in (
        ("digits", {"label": "x"}, "no `label` for digits, which are embedded"),
        ("iris", {"label": "species"}, "no `label` for iris, which is embedded, labels and all; got 'species'"),
        (tmp_path / "x.npy", {"columns": ["a"]}, "no `columns` for an array, whose columns have no names"),
        (tmp_path / "x.npy", {"label": "y"}, "no `label` for an array alone"),
        (tmp_path / "t.parquet", {"separator": ","}, "no `separator` for data that are no text"),
    ):
        with pytest.raises(ValueError, match=match):
            load(name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ("a,b\n1,x\n2,3\n3,y\n4,5\n", {}, r"finite number in .*, line 2, column 'b'; got 'x'.*categories = \[\"b\"\]"),
        ("a,b\n" + "1,2\n" * 8 + "3,inf\n", {}, "line 10, column 'b'; got 'inf'"),
        ("a,a\n1,2\n", {}, "distinct names of columns in .*; got 'a' 2 times"),
        ("a,b\n1,x\n2,\n3,y\n4,x\n", {"label": "b"}, "a label in every row of .*; got none in line 3"),
        ("a,b\n1,x\n2,?\n3,NA\n4,x\n", {}, r"missing .* t.csv; got some in 'b' \(2\): 2 rows, the first in line 3"),
        ("a\n" + "x\n" * 30, {"label": "a"}, "at least one feature"),
        ("a;b\n" + "-0,5;1\n" * 9, {}, "a decimal point in column 'a' of .*; got '-0,5'"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, text: str, options: dict[str, Any], match: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "t.csv", **options)


def test_words_that_the_training_part_lacks_are_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    rows = load(_write(frame, tmp_path / "t.csv")).row_numbers["test"]
    frame.loc[rows[1], "species"] = "emperor"
    _write(frame, tmp_path / "t.csv")
    with pytest.raises(ValueError, match=rf"'species' in .*'emperor' in other .*line {rows[1] + 2}\).*leave_out"):
        load(tmp_path / "t.csv")
    load(tmp_path / "t.csv", label="species")
    load(tmp_path / "t.csv", leave_out=["species"])
    _write(frame, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=rf"row {rows[1]} \(counted from 0\)"):
        load(tmp_path / "t.parquet")


def test_text_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name\n" + "".join(f"person {i}\n" for i in range(40)))
    with pytest.raises(ValueError, match=r"each word of column 'name' in the training part; .*give id = \"name\""):
        load(tmp_path / "t.csv")


def test_other_types_are_refused_unless_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame({"when": pd.date_range("2020", periods=20), "x": np.arange(20) / 3, "c": [1j] * 20})
    with pytest.raises(ValueError, match=r"numbers or words in column 'when' of .*; got datetime64.*leave_out"):
        load(_write(frame[["when", "x"]], tmp_path / "t.parquet"))
    assert load(tmp_path / "t.parquet", leave_out=["when"]).feature_names == ["x"]
    assert load(tmp_path / "t.parquet", id="when").ids["test"] is not None
    frame.loc[3, "when"] = None
    with pytest.raises(ValueError, match="numbers or words in column 'when'"):
        load(_write(frame[["when", "x"]], tmp_path / "t.parquet"))


def test_large_ids_keep_their_digits(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": np.arange(20) * 7 % 20 + 2**60, "x": np.arange(20) / 3})
    for suffix, kind in (("csv", str), ("parquet", int)):
        data = load(_write(frame, tmp_path / f"t.{suffix}"), id="id")
        assert list(map(kind, frame["id"].iloc[data.row_numbers["test"]])) == list(data.ids["test"])  # type: ignore[arg-type]


def test_missing_cells_of_other_types(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None, 3] * 5, dtype="Int64"),
            "b": pd.array([True, None, False] * 5, dtype="boolean"),
            "c": pd.Categorical(["x", None, "y"] * 5),
            "s": ["x", None, "y"] * 5,
        }
    )
    with pytest.raises(ValueError, match=r"got some in 'i' \(5\), 'b' \(5\), 'c' \(5\), 's' \(5\): 5 rows, .* row 1 "):
        load(_write(frame, tmp_path / "t.parquet"))
    _write(frame.dropna().astype({"i": int}), tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet").columns.kinds == ("count", "binary", "binary", "binary")


def test_damaged_and_empty_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("parquet", "feather"):
        (tmp_path / f"t.{suffix}").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=rf"a {suffix} file; got .*t\.{suffix}"):
            load(tmp_path / f"t.{suffix}")
    _write(pd.DataFrame({"a": []}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="table with rows in .*; got 0 rows, 1 columns"):
        load(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=re.escape("Install ppl-vae[parquet]")):
        load(tmp_path / "t.parquet")


def test_rows_with_missing_cells_are_dropped_where_asked_to(tmp_path):
    frame = pd.DataFrame({"a": [1.5, 2.5, np.nan, 4.5, 5.5, 6.5], "b": ["x", "y", "x", None, "y", "x"], "t": range(6)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match=r"'a' \(1\), 'b' \(1\).*or drop these rows \(missing = \"drop rows\"\)"):
        load(tmp_path / "t.csv")
    data = load(tmp_path / "t.csv", missing="drop rows", id="t", test_fraction=0.3)
    numbers = np.sort(np.concatenate(list(data.row_numbers.values())))
    assert numbers.tolist() == [0, 1, 4, 5]
    for part in ("train", "test"):
        assert [int(t) for t in data.ids[part]] == data.row_numbers[part].tolist()
        wanted = frame.loc[data.row_numbers[part]]
        made = data.to_table(getattr(data, part)["x"], part)
        assert made["a"].tolist() == pytest.approx(wanted["a"].tolist())
        assert made["b"].astype(str).tolist() == wanted["b"].tolist()
    with pytest.raises(ValueError, match="`missing` to be one of 'refuse', 'model', 'drop rows'; got 'keep'"):
        load(tmp_path / "t.csv", missing="keep")


def test_numbers_with_words_further_down_are_one_table(tmp_path: Path) -> None:
    """Rows of numbers alone are read at once, the rest by cells; both give the same values, lines and text."""
    rows = [f"{i},{i / 3!r},0{i}" for i in range(8)]
    rows[5] = '5,"1.5",05'
    path = tmp_path / "t.csv"
    path.write_text("a,b,name\r\n" + "\r\n".join(rows[:6]) + "\r\n\r\n" + "\n".join(rows[6:]) + "\n")
    pieces = list(stream_text(path, None, 2, ["name"]))
    assert [len(piece.lines) for piece in pieces] == [2, 2, 2, 2]  # type: ignore[arg-type]
    assert [line for piece in pieces for line in piece.lines] == [2, 3, 4, 5, 6, 7, 9, 10]  # type: ignore[union-attr]
    values = np.concatenate([piece.column("b")[0] for piece in pieces])
    assert values.tolist() == [1.5 if i == 5 else i / 3 for i in range(8)]
    assert [name for piece in pieces for name in piece.text("name")] == [f"0{i}" for i in range(8)]
    whole = read_table(path, None, ["name"])
    assert whole.column("b")[0].tolist() == values.tolist()
    path.write_text("a,b\n1,2\n3,inf\n")
    with pytest.raises(ValueError, match=r"finite number in .*t.csv, line 3, column 'b'; got 'inf'"):
        load(path)
    path.write_text("id,b\n01,2\n02,NaN\n03, 4\n")
    data = load(path, id="id", missing="drop rows", test_fraction=0.0)
    assert sorted(data.ids["train"]) == ["01", "03"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ("0,1,2\n4.5,3.5,1\n9,7,8\n0,0,1", ["0", "1", "2"]),
        ("2019;2020;2021\n1;2;3\n4;6;6\n9;8;1", ["2019", "2020", "2021"]),
        ("0,1,2\n1,2,3\n5,6,7\n1,1,9", None),  # other rows are like that
        ("1,2\n3,5\n7,8\n1,1", None),  # two columns are always in equal steps
        ("3,1,4\n1,5,9\n2,6,5\n3,5,8", None),
        ("7,7,7\n1,5,9\n2,6,5\n3,5,8", None),
    ],
)
def test_a_header_of_numbers_is_told_from_a_row(lines, names, tmp_path):
    (tmp_path / "t.csv").write_text(lines + "\n")
    loaded = load(tmp_path / "t.csv", test_fraction=0.0)
    assert loaded.feature_names == names
    assert len(loaded.train["x"]) == len(lines.splitlines()) - (names is not None)


def test_a_decimal_comma_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n1,5;2\n2,5;3\n3;4\n")
    with pytest.raises(ValueError, match="decimals follow a point, not a comma"):
        load(tmp_path / "t.csv")
