"""Tables and pictures in specs: what `check` says of their columns, and what a run keeps of them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from ppl_vae.data import Columns
from ppl_vae.runs import storage
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import Spec, load_spec
from ppl_vae.runs.spec_file import parse_override

TABLES: dict[str, Any] = {
    "model": {"latent": 2},
    "prior": {"family": "StandardNormal"},
    "likelihood": {"family": "Mixed", "network": {"family": "MLP", "hidden": [4]}},
    "posterior": {"family": "Normal", "network": {"family": "MLP", "hidden": [4]}},
    "svi": {"epochs": 1, "batch_size": 20},
    "evaluation": {"samples": 30},
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "row": np.arange(1, 61),
            "species": np.array(["gentoo", "adelie", "chinstrap"])[rng.integers(0, 3, 60)],
            "mass (g)": rng.normal(4000, 500, 60),
            "eggs": rng.poisson(3, 60),
            "flat": 0,
            "site": 1,
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def spec(table: Path, data: dict[str, Any] | None = None, **tables: Any) -> Spec:
    return Spec.from_dict({**TABLES, "data": {"name": str(table), **(data or {})}, **tables}, table.parent / "run.toml")


def test_check_lists_columns_and_what_mends_them(table: Path) -> None:
    checked = spec(table).check(spec(table).load_data())
    assert checked.columns == {
        "row": "count feature",
        "species": "category feature",
        "mass (g)": "real feature",
        "eggs": "count feature",
        "flat": "binary feature",
        "site": "binary feature",
    }
    assert len(checked.hints) == 3
    assert "columns     count feature: row, eggs; category feature: species; real feature: mass (g)" in str(checked)
    assert all(hint in str(checked) for hint in checked.hints)
    assert json.loads(json.dumps(checked.to_dict()))["hints"] == checked.hints
    changes = dict(parse_override(re.findall(r"--set 'data\.(.*)'", hint)[0]) for hint in checked.hints)
    assert changes == {"id": "row", "label": "species", "leave_out": ["flat", "site"]}
    mended = spec(table, changes)
    again = mended.check(mended.load_data())
    assert again.hints == []
    assert again.columns == {
        "mass (g)": "real feature",
        "eggs": "count feature",
        "row": "id",
        "species": "label",
        "flat": "left out",
        "site": "left out",
    }
    half = spec(table, {"leave_out": ["flat"]})
    assert any('\'data.leave_out=["flat", "site"]\'' in hint for hint in half.check(half.load_data()).hints)


def test_a_scale_for_constant_columns_is_refused_by_name(table: Path) -> None:
    pd.read_csv(table).assign(flat=2.5).to_csv(table, index=False)
    constant = spec(table)
    with pytest.raises(ValueError, match=r"constant .*Try --set 'data.leave_out=\[\"flat\", \"site\"\]'"):
        constant.build(constant.load_data())


def test_check_says_what_standardize_leaves_alone(table: Path) -> None:
    scaled = spec(table, {"scaling": "standardize", "leave_out": ["row", "flat", "site"], "label": "species"})
    assert scaled.check(scaled.load_data()).hints == [
        "eggs: as they are, since standardize scales no counts and no shares"
    ]


def test_check_says_what_single_precision_rounds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"far": 1e8 + rng.normal(0, 5, 60), "wide": 1e8 * rng.normal(0, 5, 60), "near": 100.0})
    frame["near"] += rng.normal(0, 5, 60)
    frame.to_csv(tmp_path / "far.csv", index=False)
    told = spec(tmp_path / "far.csv").check(spec(tmp_path / "far.csv").load_data()).hints
    assert [hint.split(":")[0] for hint in told] == ["far"]
    assert "rounded to steps of 12; subtract a constant, or --set 'data.scaling=standardize'" in told[0]
    x = spec(tmp_path / "far.csv").load_data().train["x"][:, 0].double()
    assert (x - x.mean()).abs().max() < 25
    assert len(x.unique()) < 10
    scaled = spec(tmp_path / "far.csv", {"scaling": "standardize"})
    data = scaled.load_data()
    assert scaled.check(data).hints == []
    stored = frame["far"].to_numpy()[data.row_numbers["train"]]
    np.testing.assert_allclose(data.to_table(data.train["x"], "train")["far"], stored, atol=1e-5)


def test_check_says_which_counts_may_be_codes(table: Path) -> None:
    frame = pd.read_csv(table).assign(grade=1 + np.arange(60) % 4, many=1 + np.arange(60) % 12, word="a")
    frame["zone"] = 1 + np.arange(60) % 3
    frame["word"] = np.where(np.arange(60) % 2, "a", "b")
    frame[["mass (g)", "eggs", "grade", "many", "zone", "word"]].to_csv(table, index=False)
    (hint,) = spec(table, {"categories": ["zone"]}).check(spec(table, {"categories": ["zone"]}).load_data()).hints
    assert hint == 'grade: counts from 1 up; if they are codes, --set \'data.categories=["zone", "grade"]\''
    changed = spec(table, dict([parse_override(re.findall(r"--set 'data\.(.*)'", hint)[0])]))
    checked = changed.check(changed.load_data())
    assert checked.hints == []
    assert checked.columns["grade"] == checked.columns["zone"] == "category feature"


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_value_off_the_support_is_named_by_its_row_in_the_file(table: Path, part: str) -> None:
    chosen = {"columns": ["eggs"], "validation_fraction": 0.2}
    family = {"family": "Poisson", "network": {"family": "MLP", "hidden": [4]}}
    row = int(spec(table, chosen).load_data().row_numbers[part][3])
    frame = pd.read_csv(table)
    frame.loc[row, "eggs"] = -7
    frame.to_csv(table, index=False)
    bad = spec(table, chosen, likelihood=family)
    expected = f"Row 3 of the {part} part is row {row} of t.csv (counted from 0). Column 0 is 'eggs'."
    with pytest.raises(ValueError, match=re.escape(expected)):
        bad.check(bad.load_data())


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        (
            {"kinds": {"mass*": "Poisson", "species": "Categorical", "*": "Normal"}},
            r"support of Mixed, the whole numbers from 0, at .*column 2 .* 'mass \(g\)'. Give it another family in `k",
        ),
        ({"kinds": {"mass*": "Normal"}}, "got none for 'row' in `kinds`. Try --set likelihood.kinds=infer, or change"),
        ({"kinds": {"*": "Normal", "gone": "Normal"}}, "got 'gone'. Try --set likelihood.kinds=infer"),
        ({"family": "Poisson"}, r"support of Poisson, .* Column 2 is 'mass \(g\)'. Families that take such data: Flow"),
        ({"family": "Categorical"}, "Expected the levels of 6 features.*none in columns 0, 2, 3. For other columns"),
        ({"family": "DiscretizedLogistic"}, "Expected one number of levels .* got columns without levels"),
    ],
)
def test_a_likelihood_that_does_not_take_a_column_is_refused_by_its_name(
    table: Path, likelihood: dict[str, Any], expected: str
) -> None:
    whole = spec(table, likelihood={**TABLES["likelihood"], **likelihood})
    with pytest.raises(ValueError, match=expected):
        whole.build(whole.load_data())


def test_pictures_have_no_columns_to_list() -> None:
    digits = load_spec(Path(__file__).parents[2] / "models" / "digits.toml")
    checked = digits.check(digits.load_data())
    assert (checked.columns, checked.hints) == ({}, [])
    assert "columns" not in str(checked)


def test_a_run_keeps_the_columns_and_loads_without_its_data(table: Path) -> None:
    chosen = spec(table, {"label": "species", "id": "row", "leave_out": ["flat", "site"]})
    columns = chosen.load_data().columns
    run = fit_spec(chosen, out=table.parent / "run", device="cpu")
    assert Columns.from_dict(run.report["data"]["columns"]) == columns
    assert run.report["data"]["protocol"]["roles"]["species"] == "label"
    assert load_spec(run.path / "spec.toml") == chosen
    table.unlink()
    loaded = load_run(run.path)
    assert torch.equal(loaded.program.sample(5, seed=0), run.program.sample(5, seed=0))


def test_a_run_from_before_columns_were_kept_loads(table: Path) -> None:
    family = {"family": "Normal", "network": {"family": "MLP", "hidden": [4]}}
    chosen = spec(table, {"columns": ["mass (g)", "eggs"]}, likelihood=family)
    run = fit_spec(chosen, out=table.parent / "run", device="cpu")
    report = json.loads((run.path / "report.json").read_text())
    del report["data"]["columns"]
    (run.path / "report.json").write_text(json.dumps(report))
    weights = run.path / "model.safetensors"
    older = {**storage.read_metadata(weights), "format_version": "1"}
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights, older)
    (run.path / "manifest.json").unlink()
    loaded = load_run(run.path)
    assert torch.equal(loaded.program.sample(5, seed=0), run.program.sample(5, seed=0))


def test_parts_are_told_of_the_columns(table: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class Own:\n    def __init__(self, features, columns, levels): self.told = columns, levels\n"
        "    def model(self, x): ...\n    def guide(self, x): ...\n"
    )
    only = {"data": {"name": str(table)}, "model": {"program": "own.py:Own"}}
    columns = spec(table).load_data().columns
    built: Any = Spec.from_dict(only, tmp_path / "run.toml").assemble(columns=columns, rows=48)
    assert built.told == (columns, columns.levels)


@pytest.mark.parametrize(
    ("name", "keys", "match"),
    [
        ("digits", {"label": "x"}, "data.label: Expected no `label` for digits, which are embedded"),
        ("wine", {"label": "x"}, "data.label: Expected no `label` for wine, which is embedded"),
        ("cifar10", {"test_fraction": 0.1}, "data.test_fraction: .* cifar10, which has a split of its own"),
        ("t.parquet", {"separator": ";"}, "data.separator: .* data that are no text"),
        ("x.npy", {"columns": ["a"]}, "data.columns: .* an array, whose columns have no names"),
        ("faces/", {"categories": ["a"]}, "data.categories: .* a folder of pictures"),
        ("faces/", {"root": "."}, "data.root: .* the path of a file"),
        ("irs", {}, "data.name: Expected `name` to be .*; got 'irs'. Did you mean 'iris'"),
    ],
)
def test_keys_without_effect_are_refused(tmp_path: Path, name: str, keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Spec.from_dict({**TABLES, "data": {"name": name, **keys}}, tmp_path / "run.toml")


def test_a_folder_of_pictures_stands_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    for i in range(10):
        Image.fromarray(np.full((2, 3), 20 * i, np.uint8)).save(tmp_path / "faces" / f"{i}.png")
    family = {"family": "Normal", "network": {"family": "MLP", "hidden": [4]}}
    tables = {**TABLES, "likelihood": family, "data": {"name": "faces/", "scaling": "unit"}}
    chosen = Spec.from_dict(tables, tmp_path / "run.toml")
    assert chosen.data.name == str((tmp_path / "faces").resolve())
    data = chosen.load_data()
    assert (data.shape, data.columns.levels) == ((2, 3), (256,) * 6)
    assert Spec.from_dict(chosen.to_dict(), tmp_path / "run.toml") == chosen


def test_the_bad_table_names_the_spec(table: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.toml: Expected `label` to name .*got 'specie'. Did you mean 'species'"):
        spec(table, {"label": "specie"}).load_data()
