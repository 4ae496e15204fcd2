"""Specs of models that are given a label or covariates, from the table to the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ppl_vae.data.loading import load
from ppl_vae.runs.compare import compare_runs
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import Spec

MLP = {"family": "MLP", "hidden": [4]}
TABLES: dict[str, Any] = {
    "model": {"latent": 2, "given": "y"},
    "prior": {"family": "StandardNormal"},
    "likelihood": {"family": "Normal", "scale": "shared", "network": MLP},
    "posterior": {"family": "Normal", "network": MLP},
    "svi": {"epochs": 1, "batch_size": 50},
    "evaluation": {"samples": 30},
}
PROGRAM = """
import pyro, pyro.distributions as dist, torch
class Own(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen = {}
    def model(self, x, y, covariates):
        self.seen.update(y=y, covariates=covariates)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(covariates[:, 0], 1.0))
            pyro.sample("x", dist.Normal((z + y).unsqueeze(-1), self.scale.exp()).to_event(1), obs=x)
    def guide(self, x, y, covariates):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.scale * x[:, 0], 1.0))
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    species = np.array(["adelie", "chinstrap", "gentoo"])[rng.integers(0, 3, 80)]
    frame = pd.DataFrame(
        {
            "species": species,
            "sex": np.array(["female", "male"])[rng.integers(0, 2, 80)],
            "age": rng.normal(10, 3, 80),
            "mass": rng.normal(0, 1, 80) + 3 * (species == "gentoo"),
            "bill": rng.normal(0, 1, 80),
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def spec(table: Path, data: dict[str, Any] | None = None, **tables: Any) -> Spec:
    roles = {"name": str(table), "label": "species", "covariates": ["age", "sex"]}
    return Spec.from_dict({**TABLES, "data": {**roles, **(data or {})}, **tables}, table.parent / "run.toml")


def test_covariates_and_labels_are_entries_of_the_batch(table: Path) -> None:
    data, frame = load(table, label="species", covariates=["age", "sex"], dtype=torch.float64), pd.read_csv(table)
    rows = data.row_numbers["train"]
    assert data.feature_names == ["mass", "bill"]
    assert data.roles == {"species": "label", "sex": "covariate", "age": "covariate"}
    assert data.columns.given == {"y": (3,), "covariates": (0, 2)}
    assert np.array_equal(data.train["covariates"][:, 0], frame["age"][rows])
    assert np.array_equal(data.train["covariates"][:, 1], (frame["sex"][rows] == "male").astype(float))


def test_labelled_keeps_as_many_of_each_class(table: Path) -> None:
    all_of_them, some = load("digits"), load("digits", labelled=105)
    y, known = some.train["y"], some.train["y"] >= 0
    assert torch.equal(y[known], all_of_them.train["y"][known])
    assert sorted(y[known].bincount(minlength=10).tolist()) == [10] * 5 + [11] * 5
    assert torch.equal(some.test["y"], all_of_them.test["y"])
    assert not torch.equal(y, load("digits", labelled=105, seed=1).train["y"])
    frame = pd.read_csv(table)
    frame.loc[:9, "species"] = None
    frame.to_csv(table.parent / "gaps.csv", index=False)
    with pytest.raises(ValueError, match="Expected a label in every row"):
        load(table.parent / "gaps.csv", label="species")
    gaps = load(table.parent / "gaps.csv", label="species", columns=["mass", "bill"], labelled=1000)
    parts = torch.cat([gaps.train["y"], gaps.test["y"]])
    assert int((parts < 0).sum()) == 10
    assert gaps.classes == ("adelie", "chinstrap", "gentoo")


def test_a_run_reports_classes_and_comes_back(table: Path, tmp_path: Path) -> None:
    both = {"latent": 1, "given": ["y", "covariates"], "given_to": ["prior", "likelihood", "posterior"]}
    given = spec(table, model=both, prior={"family": "Normal", "network": MLP})
    run = fit_spec(given, out=tmp_path / "a", device="cpu")
    again = load_run(tmp_path / "a")
    assert run.report["data"]["measure"] == "density given y and covariates"
    assert run.report["baseline"]["ppca"]["log_evidence"] < 0
    block = run.report["classes"]
    assert block["classes"] == 3
    assert block["n"] + block["outliers"] == 16
    assert (tmp_path / "a" / "figures" / "class_calibration.png").is_file()
    text = (tmp_path / "a" / "report.md").read_text()
    assert "p(x | y, c) = ∫ p(x | z, y, c) p(z | y, c) dz" in text
    assert "**Classes** by p(y given x)" in text
    sampled = {"y": 1, "covariates": [10.0, 0.0]}
    assert torch.equal(run.program.sample(3, given=sampled), again.program.sample(3, given=sampled))
    fresh = evaluate_run(tmp_path / "a", device="cpu")
    assert fresh.report["classes"] == json.loads(json.dumps(block))
    fit_spec(spec(table, model={"latent": 2}), out=tmp_path / "b", device="cpu")
    with pytest.raises(ValueError, match="a density given y and covariates in .* and a density in"):
        compare_runs([tmp_path / "a", tmp_path / "b"])


def test_pictures_have_figures_of_classes_and_swaps(tmp_path: Path) -> None:
    digits = Spec.from_dict({**TABLES, "data": {"name": "digits"}}, tmp_path / "run.toml")
    fit_spec(digits, out=tmp_path / "run", device="cpu")
    assert {"classes.png", "swaps.png"} <= {file.name for file in (tmp_path / "run" / "figures").iterdir()}


def test_a_program_of_one_s_own_gets_what_it_asks_for(table: Path) -> None:
    (table.parent / "own.py").write_text(PROGRAM)
    tables = {key: value for key, value in TABLES.items() if key in ("svi", "evaluation")}
    roles = {"name": str(table), "label": "species", "covariates": ["age"], "leave_out": ["sex"]}
    own = Spec.from_dict({**tables, "data": roles, "model": {"program": "own.py:Own"}}, table.parent / "own.toml")
    data = own.load_data()
    program: Any = own.build(data)
    own.check(data, program)
    with pytest.raises(ValueError, match="Expected no `given` beside model.program"):
        Spec.from_dict({**tables, "data": roles, "model": {"program": "own.py:Own", "given": "y"}}, own.path)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown": ({}, {"model": {"latent": 2, "given": "label"}}, "model.given: .*one of 'y', 'covariates'"),
    "no part": ({}, {"model": {"latent": 2, "given": "y", "given_to": ["guide"]}}, "given_to: .*'prior', 'likelihood'"),
    "guide alone": (
        {},
        {"model": {"latent": 2, "given": "y", "given_to": ["posterior"]}},
        "given to the prior or the likelihood",
    ),
    "nothing": ({}, {"model": {"latent": 2, "given_to": ["prior"]}}, "--set model.given=y"),
    "prior": ({}, {"model": {"latent": 2}, "prior": {"family": "Normal", "network": MLP}}, "is named in `given_to`"),
    "class prior": (
        {},
        {"model": {"latent": 2}, "evaluation": {"class_prior": "uniform"}},
        "evaluation.class_prior: .*--set model.given=y",
    ),
    "no labels": ({"label": None, "leave_out": ["species"]}, {}, "Expected labels .* --set data.label=NAME"),
    "a label to name": ({"label": None}, {}, "Expected labels .* --set data.label=species"),
    "no covariates": (
        {"covariates": None, "leave_out": ["sex"]},
        {"model": {"latent": 2, "given": "covariates"}},
        "--set 'data.covariates=..NAME",
    ),
    "pseudo-inputs": ({}, {"prior": {"family": "VampPrior", "components": 5}}, "--set 'model.given_to=..likelihood"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name_and_says_what_mends_it(case: str, table: Path) -> None:
    data, tables, message = REFUSED[case]
    data = {
        key: value for key, value in {**{"label": "species", "covariates": ["age", "sex"]}, **data}.items() if value
    }
    with pytest.raises(ValueError, match=message):
        Spec.from_dict({**TABLES, "data": {"name": str(table), **data}, **tables}, table.parent / "run.toml").build()


def test_refuses_a_label_that_the_training_part_lacks(table: Path) -> None:
    frame = pd.read_csv(table)
    frame.loc[load(table).row_numbers["test"][:1], "species"] = "rockhopper"
    frame.to_csv(table, index=False)
    with pytest.raises(ValueError, match="got rockhopper in other parts alone. Try another split: --set data.seed=1"):
        spec(table).build()
    spec(table, {"seed": 1}).build()


def test_covariates_of_an_npz_file_are_other_arrays_in_it(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(1)
    x, age = rng.normal(size=(60, 3)), rng.normal(size=(60, 2))
    sex = np.array(["female", "male"])[rng.integers(0, 2, 60)]
    np.savez(tmp_path / "a.npz", x=x, age=age, sex=sex)
    own = {"name": str(tmp_path / "a.npz"), "covariates": ["age", "sex"]}
    data = load(**own)
    rows = data.row_numbers["train"]
    expected = np.column_stack([age[rows], sex[rows] == "male"])
    assert np.allclose(data.train["covariates"].numpy(), expected)
    assert data.columns.covariates == {"age1": (), "age2": (), "sex": ("female", "male")}
    tables = {**TABLES, "data": own, "model": {"latent": 2, "given": "covariates"}}
    run = fit_spec(Spec.from_dict(tables), out=tmp_path / "run")
    np.savez(
        tmp_path / "b.npz",
        x=x[data.row_numbers["test"]],
        sex=sex[data.row_numbers["test"]],
        age=age[data.row_numbers["test"]],
    )
    again, known = run.encode(tmp_path / "b.npz"), run.encode()
    assert np.allclose(again.to_numpy(), known.to_numpy(), atol=1e-5)
    np.savez(tmp_path / "c.npz", x=x, age=age)
    with pytest.raises(ValueError, match=r"Expected a key of .*c.npz \('x', 'age'\); got 'sex'"):
        run.encode(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=x, age=age[1:], sex=sex)
    with pytest.raises(ValueError, match="covariate for each of the 60 data of .*; got 59 in 'age1'"):
        load(tmp_path / "d.npz", covariates=["age", "sex"])


def test_covariates_of_new_rows_are_read_by_name(table: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    own = {"name": str(table), "covariates": ["sex", "age"], "leave_out": ["species"]}
    run = fit_spec(
        Spec.from_dict({**TABLES, "data": own, "model": {"latent": 2, "given": "covariates"}}), out=tmp_path / "run"
    )
    frame = pd.read_csv(table).iloc[run.spec.load_data().row_numbers["test"]][["age", "mass", "sex", "bill"]]
    assert np.allclose(run.encode(frame).to_numpy(), run.encode().to_numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="it lacks 'sex'"):
        run.encode(frame.drop(columns="sex"))
    with pytest.raises(ValueError, match=r"words of column 'sex' .* got 'mal'"):
        run.encode(frame.replace("male", "mal"))


def test_convolutions_take_a_label_beside_the_picture(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    conv = {"family": "Conv", "channels": [2], "hidden": [4]}
    # Two parameters of 32 latents are as many as the pixels, which makes no decoder of it.
    tables = {**TABLES, "data": {"name": "digits"}, "model": {"latent": 32, "given": "y"}}
    for role in ("likelihood", "posterior"):
        tables[role] = {**TABLES[role], "network": conv}
    run = fit_spec(Spec.from_dict(tables), out=tmp_path / "run")
    program, x = load_run(run.path).program, run.spec.load_data().test["x"][:3]
    one, other = (program.approximate(x, y=torch.full((3,), label)) for label in (0, 1))
    assert program.posterior.network.layers[-2].__class__.__name__ == "ReLU"
    assert one.mean.shape == (3, 32)
    assert not torch.allclose(one.mean, other.mean)
