"""Runs of programs whose whole data set counts as one datum, from the spec to the report."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ppl_vae.cli import app
from ppl_vae.data import load
from ppl_vae.evaluation.guide_check import check_guide
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.spec import load_spec

MODELS = Path(__file__).parents[2] / "models"
CONJUGATE = """
import pyro
import pyro.distributions as dist
from torch import nn
from torch.distributions import constraints


class Mean:
    def model(self, y):
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def guide(self, y):
        loc = pyro.param("loc", lambda: y.new_zeros(()))
        scale = pyro.param("scale", lambda: y.new_ones(()), constraint=constraints.positive)
        pyro.sample("m", dist.Normal(loc, scale))
"""
SPEC = """
[data]
name = "table.csv"
test_fraction = 0.0
[model]
program = "mean.py:Mean"
[svi]
epochs = 60
learning_rate = 0.1
particles = 10
schedule = "one-cycle"
[evaluation]
samples = 500
"""
Y = [0.4, 1.9, 1.1, -0.3, 0.7]


@pytest.fixture(autouse=True)
def _as_users_run() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mean.py").write_text(CONJUGATE)
    (tmp_path / "table.csv").write_text("y,other\n" + "".join(f"{y},{i}.5\n" for i, y in enumerate(Y)))
    (tmp_path / "spec.toml").write_text(SPEC)
    return tmp_path


def invoke(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


def test_columns_become_entries_by_the_names_that_the_model_takes(folder: Path) -> None:
    data = load_spec(folder / "spec.toml").load_data()
    assert {key: value.shape for key, value in data.train.items()} == {"x": (5, 1), "y": (5,)}
    assert len(data.test["y"]) == 0
    assert sorted(data.train["y"].tolist()) == pytest.approx(sorted(Y))
    assert data.feature_names == ["other"]
    assert data.roles["y"] == "entry of its own"
    scaled = load(folder / "table.csv", scaling="standardize").with_entries(["y"])
    torch.testing.assert_close(
        torch.from_numpy(scaled.transform.inverse(scaled.train["x"]))[:, 0] % 1, torch.full((4,), 0.5).double()
    )
    assert load(folder / "table.csv").with_entries(["y", "other", "none"]).train.keys() == {"y", "other"}
    with pytest.raises(ValueError, match=r"`test_fraction` in \[0, 1\); got 1"):
        load(folder / "table.csv", test_fraction=1.0)


def test_a_run_says_what_check_guide_says(folder: Path) -> None:
    """The truth: m given the data is N(3.8 / 6, 1 / 6)."""
    text = invoke("fit", folder / "spec.toml", "--out", folder / "run")
    assert "5 data count as one datum; all figures are of these training data." in text
    assert "Trust the guide" in text
    invoke("evaluate", folder / "run", "--reference", "closed-form", "--gap", "--trust-code", "--json")
    report = json.loads((folder / "run" / "report.json").read_text())
    run = load_run(folder / "run", trust_code=True)
    batch = run.spec.load_data().train
    check = check_guide(run.program, batch, samples=500, reference="closed-form")
    assert report["check"]["text"] == str(check).splitlines()
    assert report["check"]["trusted"] == "guide"
    moments = report["check"]["sites"]["m"]
    assert moments["closed-form"] == {
        "mean": [pytest.approx(3.8 / 6)],
        "error": [0.0],
        "sd": [pytest.approx(6**-0.5)],
    }
    assert abs(moments["reweighted"]["mean"][0] - 3.8 / 6) < 5 * moments["reweighted"]["error"][0] + 1e-3
    assert report["data"]["part"] == "train"
    assert (report["data"]["whole"], report["data"]["n_train"], report["data"]["n_test"]) == (True, 5, 0)
    assert report["test"]["n"] == 1
    assert report["test"]["log_evidence"]["mean"] == pytest.approx(report["exact"]["log_evidence"], abs=0.05)
    assert (report["gap"]["n"], report["gap"]["family"], report["gap"]["amortized"]) == (1, None, False)
    page = (folder / "run" / "report.md").read_text()
    for words in (
        "Nats of the data set",
        "no held-out data are evaluated",
        "| latent | guide | reweighted | closed-form | off | times as wide |",
        "**All figures are of the training data.** Some latent variables are shared by all data",
        "The family of this guide is not known, so it is not split.",
    ):
        assert words in page
    assert "per datum" not in page.partition("## What to distrust")[0]


def test_what_does_not_suit_one_datum_is_refused(folder: Path) -> None:
    spec = folder / "spec.toml"
    message = invoke("check", spec, "--set", "data.validation_fraction=0.4", status=2)
    assert "Try --set data.validation_fraction=0." in message
    assert "2 rows are held out and not used" in invoke("check", spec, "--set", "data.test_fraction=0.4")
    message = invoke(
        "fit",
        MODELS / "two_level.toml",
        "--set",
        f"data.name={folder / 'table.csv'}",
        "--set",
        "data.test_fraction=0",
        "--set",
        "data.scaling=none",
        "--out",
        folder / "none",
        status=2,
    )
    assert (
        "Expected held-out data, on which this program is evaluated; got none. Set data.test_fraction = 0.2 in a spec, "
        "or give `as_data` a test part." in message
    )
    (folder / "table.csv").write_text("z,other\n1.0,2.0\n2.0,1.5\n")
    assert "Expected data named y; got x" in invoke("check", spec, status=2)


@pytest.mark.parametrize("centred", [False, True])
def test_eight_schools_by_its_spec(centred: bool) -> None:
    spec = load_spec(MODELS / "eight_schools.toml", {"model.centred": centred})
    data = spec.load_data()
    assert data.train["y"].sum() == 70
    text = str(spec.check(data))
    assert "8 data for training, of 0 features, which count as one datum together" in text
    assert ("effect (8) latent" if centred else "raw (8) latent") in text
    assert "pyro.param 20" in text
