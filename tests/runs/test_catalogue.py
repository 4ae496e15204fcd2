"""Finding one's way: what can be named, how it is written, the schema, and a first spec for the data at hand."""

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ppl_vae import families, networks
from ppl_vae.runs.catalogue import components, describe, detail, schema_text
from ppl_vae.runs.new import SCHEMA, write_spec
from ppl_vae.runs.schema import SECTIONS
from ppl_vae.runs.spec import load_spec

MODELS = Path(__file__).parents[2] / "models"
NAMES = [*families.__all__, *networks.__all__]
BASE = tomllib.loads((MODELS / "digits.toml").read_text())


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_described_with_a_table_that_can_be_copied(name, tmp_path):
    about = describe(name)
    assert about["doc"]
    assert about["roles"]
    assert all(one["doc"] for one in about["keys"].values()), "a key without a sentence in the docstring"
    assert "\\" not in detail(about), "a formula's command"
    table = tomllib.loads(about["example"])
    for role, value in table.items():
        if role == "network":
            over = {"prior.network": value} if name == "Free" else {"posterior.network": value}
            over |= {"prior": {"family": "Normal"}} if name == "Free" else {}
        else:
            over = {role: value}
        partner = {"posterior": {"family": name, "network": {"family": "Linear"}}}
        own_support = role == "prior" and about["reparameterised"] and about["support"] != "the real numbers"
        over |= partner if own_support and "posterior" in about["roles"] else {}
        if name == "HypersphericalUniform":
            over |= {"posterior": {"family": "VonMisesFisher", "network": {"family": "Linear"}}}
        if name == "ExactNormal":
            over |= {"likelihood": {"family": "Normal", "scale": "shared", "network": {"family": "Linear"}}}
        assert load_spec(MODELS / "digits.toml", over)


def test_components_and_descriptions_agree():
    listed = {(one.role, one.name) for one in components()}
    assert listed == {(role, name) for name in NAMES for role in describe(name)["roles"]}
    with pytest.raises(ValueError, match="Did you mean NegativeBinomial"):
        describe("NegativBinomial")


def test_a_list_shows_whole_sentences():
    """The formula of a first sentence is left out, and what is left reads well."""
    docs = {one.name: one.doc for one in components()}
    assert docs["LogNormal"] == "Independent log-normals."
    assert docs["NegativeBinomial"] == "Independent negative binomials, by mean and dispersion."
    assert docs["Flow"] == "A standard normal u bent by a flow."
    assert all(re.search(r"\w\.$", doc) and ":math:" not in doc for doc in docs.values())
    assert not [doc for doc in docs.values() if re.search(r"\b(with|is|of|and|by|probability)\.$|:\.$|\. ", doc)]
    assert describe("DiscretizedLogistic")["support"] == "0, 1/16, ..., 1, as many as the data have"
    assert describe("Mixed")["support"] == "what each column's family takes"


def test_the_committed_schema_is_the_one_of_the_constructors():
    assert (files("ppl_vae.runs") / SCHEMA).read_text(encoding="utf-8") == schema_text(), (
        f"write it anew: ppl-vae schema > ppl_vae/runs/{SCHEMA}"
    )
    schema = json.loads(schema_text())
    assert set(schema["properties"]) == set(SECTIONS)


def test_every_spec_names_the_schema_on_its_first_line():
    for path in MODELS.glob("*.toml"):
        first = path.read_text().splitlines()[0]
        assert (path.parent / first.removeprefix("#:schema ")).resolve() == Path(str(files("ppl_vae.runs") / SCHEMA))


def table(n=300, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return pd.DataFrame({
        "row": np.arange(n),
        "age": 50 + 10 * z + rng.normal(size=n),
        "smoker": np.where(z + rng.normal(size=n) > 0, "yes", "no"),
        "visits": rng.poisson(np.exp(1 + 0.5 * z)),
        "income": np.exp(8 + z + rng.normal(size=n)),
        "town": rng.choice(["Aix", "Bari", "Cork"], n),
    })  # fmt: skip


def test_a_new_spec_of_a_table_takes_each_column_for_what_it_is(tmp_path):
    table().to_csv(tmp_path / "people.csv", index=False)
    text, hints = write_spec(tmp_path / "mine" / "people.toml", str(tmp_path / "people.csv"))
    spec = load_spec(tmp_path / "mine" / "people.toml")
    assert tomllib.loads(text)["data"]["name"] == "../people.csv"
    assert spec.data.id == "row"
    assert spec.likelihood.kinds == {
        "age": "Normal",
        "smoker": "Bernoulli",
        "visits": "NegativeBinomial",
        "income": "LogNormal",
        "town": "Categorical",
    }
    assert not [hint for hint in hints if "row" in hint]
    data = spec.load_data()
    assert "KL analytic" in str(spec.check(data))
    assert all(line.startswith("#") for line in text.splitlines() if line and "=" not in line and line[0] != "[")


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda rng: rng.poisson(3, (80, 5)), "NegativeBinomial"),
        (lambda rng: rng.normal(size=(80, 5)), "Normal"),
        (lambda rng: rng.integers(0, 2, (80, 5)), "Bernoulli"),
        (lambda rng: rng.integers(0, 256, (80, 20, 20)).astype(np.uint8), "DiscretizedLogistic"),
        (lambda rng: rng.integers(0, 256, (80, 3, 20, 20)).astype(np.uint8), "DiscretizedLogistic"),
        (lambda rng: (255 * rng.integers(0, 2, (80, 20, 20))).astype(np.uint8), "Bernoulli"),
        (lambda rng: rng.beta(0.5, 0.5, (400, 5)), "Beta"),
    ],
)
def test_a_new_spec_of_an_array_fits_its_values(make, family, tmp_path):
    np.save(tmp_path / "x.npy", make(np.random.default_rng(0)))
    write_spec(tmp_path / "x.toml", str(tmp_path / "x.npy"))
    spec = load_spec(tmp_path / "x.toml", {"svi.epochs": 1})
    assert spec.likelihood.family == family
    data = spec.load_data()
    assert spec.check(data, spec.build(data))


def test_a_new_spec_tells_rows_apart_by_words_that_are_all_distinct(tmp_path):
    names = [f"p{i}" for i in np.random.default_rng(0).permutation(300)]
    table().drop(columns="row").assign(name=names, mail=names).to_csv(tmp_path / "t.csv", index=False)
    text, _ = write_spec(tmp_path / "t.toml", str(tmp_path / "t.csv"))
    data = tomllib.loads(text)["data"]
    assert (data["id"], data["leave_out"]) == ("name", ["mail"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_new_spec_leaves_out_dates_and_words_that_hardly_come_twice(kind, tmp_path):
    days = pd.date_range("2020-02-28", periods=20, freq="6h").to_series().sample(300, replace=True, random_state=0)
    frame = table().assign(day=days.to_numpy(), surname=[f"s{i // 2}" for i in range(300)])
    path = tmp_path / f"t.{kind}"
    (frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path))
    text, _ = write_spec(tmp_path / "t.toml", str(path))
    data = tomllib.loads(text)["data"]
    assert (data["id"], data["leave_out"]) == ("row", ["day", "surname"])
    assert "day: left out; surname: left out" in text
    assert load_spec(tmp_path / "t.toml").load_data().features == 5
    with pytest.raises(ValueError, match="one role for column 'day'"):
        write_spec(tmp_path / "own.toml", str(path), {"columns": ["day", "age"]})


def test_a_new_spec_beside_a_folder_of_pictures_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("faces").mkdir()
    for place, x in enumerate(np.random.default_rng(0).integers(0, 256, (30, 5, 4)).astype(np.uint8)):
        Image.fromarray(x).save(f"faces/{place}.png")
    write_spec(Path("faces.toml"), "faces/")
    assert load_spec("faces.toml").load_data().features == 20


def test_a_new_spec_replaces_no_file_and_leaves_none_behind(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("precious")
    with pytest.raises(ValueError, match="Expected a new file; .* exists"):
        write_spec(path, "digits")
    assert path.read_text() == "precious"
    with pytest.raises(ValueError, match="no such file"):
        write_spec(tmp_path / "other.toml", str(tmp_path / "none.csv"))
    assert not (tmp_path / "other.toml").exists()
