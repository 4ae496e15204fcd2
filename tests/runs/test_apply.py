"""Runs applied to new rows: codes, scores and samples in the table's own units, held against closed forms."""

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from ppl_vae import exact_log_evidence, log_evidence
from ppl_vae.cli import app
from ppl_vae.data import load
from ppl_vae.runs.apply import Applied, auroc, carry_out
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import Spec

N = 260


def table() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    z = draw.normal(size=N)
    return pd.DataFrame(
        {
            "name": [f"r{i}" for i in range(N)],
            "grams": 4000 + 700 * z + 100 * draw.normal(size=N),
            "length": 20 - 3 * z + draw.normal(size=N),
            "depth": 5 + draw.normal(size=N),
            "odd": np.where(np.abs(z) > 1.9, "yes", "no"),
        }
    )


def spec(path, **changes):
    tables = {
        "data": {"name": str(path), "label": "odd", "id": "name", "scaling": "standardize"},
        "model": {"latent": 2},
        "prior": {"family": "StandardNormal"},
        "likelihood": {"family": "Normal", "scale": "shared", "network": {"family": "Linear"}},
        "posterior": {"family": "Normal", "network": {"family": "Linear"}},
        "svi": {"epochs": 10, "learning_rate": 0.05},
        "evaluation": {"samples": 100},
    }
    return Spec.from_dict({**tables, **changes}, path.with_name("spec.toml"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apply")
    table().to_csv(folder / "table.csv", index=False)
    torch.set_default_dtype(torch.float32)
    fit_spec(spec(folder / "table.csv"), out=folder / "run", device="cpu")
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(1)
    z = draw.normal(size=N)
    words = np.array(["low", "mid", "high"])[np.digitize(z, [-0.5, 0.5])]
    frame = pd.DataFrame({"stage": words, "visits": draw.poisson(np.exp(z / 2)), "size": z + draw.normal(size=N)})
    frame.to_csv(folder / "mixed.csv", index=False)
    torch.set_default_dtype(torch.float32)
    made = spec(
        folder / "mixed.csv",
        data={"name": str(folder / "mixed.csv")},
        likelihood={"family": "Mixed", "network": {"family": "Linear"}},
    )
    fit_spec(made, out=folder / "run", device="cpu")
    return load_run(folder / "run"), frame


def batch(run, frame):
    """What the program takes of rows of the table."""
    data = load(run.spec.data.name, label="odd", id="name", scaling="standardize")
    values = frame[["grams", "length", "depth"]].to_numpy()
    return {"x": torch.from_numpy((values - data.transform.loc) / data.transform.scale).float()}


def test_codes_are_those_of_the_guide(run):
    frame = table().head(120)
    found = run.encode(frame)
    q = run.program.approximate(batch(run, frame)["x"])
    np.testing.assert_allclose(found[["z0", "z1"]], q.mean.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[["z0 sd", "z1 sd"]], q.stddev.detach(), rtol=1e-5)
    assert list(found.index[:2]) == ["r0", "r1"]


def test_scores_are_log_evidence_whatever_the_size_of_a_piece(run):
    frame = table()
    found = run.score(frame)
    evidence = log_evidence(run.program, batch(run, frame), 100, seed=run.spec.svi.seed)
    np.testing.assert_allclose(found["log_evidence"], evidence.log_evidence, rtol=1e-5, atol=1e-4)
    pieces = dataclasses.replace(Applied.of(run), piece=100)
    again = pd.concat([one.table for one in pieces.score(frame)])
    np.testing.assert_allclose(found["log_evidence"], again["log_evidence"], rtol=1e-9)
    exact = exact_log_evidence(run.program, batch(run, frame)).numpy()
    apart = (found["log_evidence"] - exact)[found["kind"] == "estimate"]
    assert abs(apart.mean()) < 5 * np.sqrt((found["mc_se"] ** 2).sum()) / N - evidence.bias.mean().item() + 1e-4


def test_the_tail_is_that_of_held_out_rows(run):
    held = run.score()
    assert len(held) == run.report["test"]["n"]
    ranks = held["log_evidence"].rank(method="max")
    np.testing.assert_allclose(held["tail_probability"], (1 + ranks) / (len(held) + 1), atol=1e-9)
    far = table().head(1).assign(grams=90_000)
    assert run.score(far)["tail_probability"].item() == pytest.approx(1 / (len(held) + 1))


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "frame", "npy"])
def test_every_source_gives_the_same_codes(run, tmp_path, ending):
    frame = table().head(30)
    source = tmp_path / f"rows.{ending}"
    if ending in ("csv", "tsv"):
        frame.to_csv(source, sep="," if ending == "csv" else "\t", index=False)
    elif ending == "parquet":
        frame[["odd", "depth", "length", "grams", "name"]].to_parquet(source)  # columns go by name
    elif ending == "npy":
        np.save(source, frame[["grams", "length", "depth"]].to_numpy())
    else:
        source = frame
    np.testing.assert_allclose(run.encode(source), run.encode(frame), rtol=1e-6)


def test_a_reconstruction_is_in_the_tables_units(run):
    frame = table().head(100)
    found = run.reconstruct(frame)
    x = batch(run, frame)["x"]
    data = load(run.spec.data.name, label="odd", id="name", scaling="standardize")
    with torch.no_grad():
        q = run.program.approximate(x)
        expected = run.program.likelihood(q.mean).mean.double().numpy() * data.transform.scale + data.transform.loc
        weight = run.program.likelihood.network.weight.double().numpy() * data.transform.scale[:, None]
    spread = np.sqrt((q.variance.double().numpy() @ (weight**2).T).sum(0) / 100) / len(frame)  # of 100 draws a row
    apart = found.to_numpy() - expected  # the mean of x is linear in z: draws average to that at the mean
    assert (np.abs(apart.mean(0)) < 5 * spread).all()
    assert list(found.columns) == ["grams", "length", "depth"]


def test_samples_have_the_models_moments_in_the_tables_units(run):
    found = run.sample(20_000)
    data = load(run.spec.data.name, label="odd", id="name", scaling="standardize")
    part = run.program.likelihood
    with torch.no_grad():
        there, weight = part(torch.zeros(1, 2, dtype=torch.float32)), part.network.weight.double().numpy()
    mean = there.mean[0].double().numpy() * data.transform.scale + data.transform.loc
    error = found.std() / np.sqrt(len(found))
    assert (np.abs(found.mean() - mean) < 5 * error).all()
    variance = ((weight**2).sum(1) + there.variance[0].double().numpy()) * data.transform.scale**2
    assert (np.abs(found.var() / variance - 1) < 5 * np.sqrt(2 / len(found))).all()


def test_missing_cells_are_filled_as_by_gaussian_conditioning(run):
    frame = table().head(60)
    frame.loc[3, "grams"] = frame.loc[4, "length"] = np.nan
    frame.loc[5, ["grams", "length", "depth"]] = np.nan
    data = load(run.spec.data.name, label="odd", id="name", scaling="standardize")
    part, z = run.program.likelihood, torch.zeros(1, 2, dtype=torch.float32)
    with torch.no_grad():
        there, weight = part(z), part.network.weight.double().numpy()
    mean, scale = there.mean[0].double().numpy(), data.transform.scale
    covariance = weight @ weight.T + np.diag(there.variance[0].double().numpy())
    with pytest.raises(ValueError, match="Expected rows with missing cells, to be imputed; got none"):
        run.impute()
    found = run.impute(frame, 2000)
    for row, gone in ((3, [0]), (4, [1]), (5, [0, 1, 2])):
        seen = [j for j in range(3) if j not in gone]
        x = (frame.loc[row, ["grams", "length", "depth"]].to_numpy(float) - data.transform.loc) / scale
        gain = covariance[np.ix_(gone, seen)] @ np.linalg.inv(covariance[np.ix_(seen, seen)])
        expected = mean[gone] + gain @ (x - mean)[seen]
        spread = np.sqrt(np.diag(covariance[np.ix_(gone, gone)] - gain @ covariance[np.ix_(seen, gone)]))
        cells = found.iloc[row][["grams", "length", "depth"]].to_numpy(float)
        error = spread * scale[gone] * np.sqrt(1 / 100 + 1 / found.iloc[row]["ess"])
        assert (np.abs(cells[gone] - (expected * scale[gone] + data.transform.loc[gone])) < 5 * error).all()
        sds = found.iloc[row][[f"{['grams', 'length', 'depth'][j]} sd" for j in gone]].to_numpy(float)
        assert (np.abs(sds / (spread * scale[gone]) - 1) < 0.45).all()  # of 100 draws
        np.testing.assert_allclose(
            cells[seen], frame.loc[row, ["grams", "length", "depth"]].to_numpy(float)[seen], rtol=1e-5
        )
    assert (found["grams"].drop(["r3", "r5"]).to_numpy() == frame["grams"].drop([3, 5]).to_numpy()).all()


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    draw = np.random.default_rng(3)
    kind = draw.integers(0, 2, N)
    frame = pd.DataFrame({"a": kind * 3 + draw.normal(size=N), "b": -kind + draw.normal(size=N)})
    frame["kind"] = np.array(["cat", "dog"])[kind]
    frame.to_csv(folder / "kinds.csv", index=False)
    torch.set_default_dtype(torch.float32)
    data = {"name": str(folder / "kinds.csv"), "label": "kind", "scaling": "standardize"}
    fit_spec(spec(folder / "kinds.csv", data=data, model={"latent": 1, "given": "y"}), out=folder / "run", device="cpu")
    return load_run(folder / "run"), frame


def test_classes_are_those_of_the_discriminant(conditional):
    run, frame = conditional
    found = run.predict(frame.drop(columns="kind"))
    data = run.spec.load_data()
    x = torch.from_numpy((frame[["a", "b"]].to_numpy() - data.transform.loc) / data.transform.scale).float()
    each = [exact_log_evidence(run.program, {"x": x, "y": torch.full((N,), y)}) for y in (0, 1)]
    prior = (data.train["y"].bincount().double() / len(data.train["y"])).log()
    exact = (torch.stack(each, 1) + prior).softmax(1)[:, 1].numpy()
    assert (np.abs(found["p(dog)"] - exact) < 6 * found["error"] + 1e-3).all()
    right = found["prediction"].to_numpy() == frame["kind"].to_numpy()
    assert right.mean() > 0.8
    assert (found["prediction"][found["outlier"]] == "none").all()
    far = frame.head(1).assign(a=60.0)
    assert run.predict(far)["prediction"].item() == "none"


def test_a_label_that_the_model_is_given_is_read_from_the_table(conditional):
    run, frame = conditional
    codes = run.encode(frame.head(40))
    data = run.spec.load_data()
    x = torch.from_numpy((frame[["a", "b"]].to_numpy() - data.transform.loc) / data.transform.scale).float()[:40]
    y = torch.tensor([int(kind == "dog") for kind in frame["kind"][:40]])
    np.testing.assert_allclose(codes["z"], run.encode({"x": x, "y": y})["z"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"got 'dgo'.*Did you mean 'dog'"):
        run.encode(frame.head(2).assign(kind="dgo"))
    with pytest.raises(ValueError, match="lacks 'kind'"):
        run.encode(frame.drop(columns="kind"))


def test_a_model_without_labels_predicts_none(run):
    with pytest.raises(ValueError, match='given = "y"'):
        run.predict()


def test_a_sampled_table_reads_back_with_its_kinds(mixed, tmp_path):
    run, frame = mixed
    carry_out(run, "sample", n=400, out=tmp_path / "new.csv")
    again = load(tmp_path / "new.csv", id="row")
    assert again.columns.kinds == load(run.spec.data.name).columns.kinds
    assert again.columns.categories == {"stage": ("high", "low", "mid")}
    share = (pd.read_csv(tmp_path / "new.csv")["stage"] == "mid").mean()
    assert 0.05 < share < 0.9


def test_words_come_back_as_words(mixed):
    run, frame = mixed
    found = run.reconstruct(frame.head(50))
    assert set(found["stage"].unique()) <= {"low", "mid", "high"}
    codes = run.encode(frame.head(20).assign(stage=frame["stage"].head(20).astype("category")))
    np.testing.assert_allclose(codes, run.encode(frame.head(20)), rtol=1e-6)


def test_rare_codes_weigh_more(run):
    frame = table()
    found, codes = run.weights(frame), run.encode(frame)
    assert found["weight"].mean() == pytest.approx(1)
    assert found["weight"][codes["z0"].abs().idxmax()] > found["weight"].median()
    even = run.weights(frame, smoothing=1e9)
    np.testing.assert_allclose(even["weight"], 1, rtol=1e-6)


def test_auroc_is_scikit_learns():
    draw = np.random.default_rng(2)
    outlier = draw.random(300) < 0.2
    scores = np.round(draw.normal(size=300) - outlier, 1)  # with ties
    area, error = auroc(scores, outlier)
    assert area == pytest.approx(roc_auc_score(outlier, -scores))
    areas = [auroc(draw.normal(size=300) - flags, flags)[0] for flags in draw.random((400, 300)) < 0.2]
    assert np.std(areas) == pytest.approx(error, rel=0.25)
    with pytest.raises(ValueError, match="outliers and others"):
        auroc(scores, np.zeros(300, bool))


def test_the_command_writes_files_that_hold_the_same(run, tmp_path):
    table().head(40).to_csv(tmp_path / "rows.csv", index=False)
    for name in ("codes.csv", "codes.parquet", "codes.npz"):
        result = CliRunner().invoke(
            app, ["apply", str(run.path), "encode", str(tmp_path / "rows.csv"), "--out", str(tmp_path / name)]
        )
        assert result.exit_code == 0, result.output
    plain, packed = pd.read_csv(tmp_path / "codes.csv", index_col="row"), np.load(tmp_path / "codes.npz")
    np.testing.assert_allclose(plain[["z0", "z1"]], packed["mean"], rtol=1e-6)
    np.testing.assert_allclose(plain, pd.read_parquet(tmp_path / "codes.parquet").set_index("row"), rtol=1e-6)
    assert list(packed["index"]) == list(plain.index)
    printed = CliRunner().invoke(app, ["apply", str(run.path), "encode", str(tmp_path / "rows.csv")])
    np.testing.assert_allclose(pd.read_csv(io.StringIO(printed.stdout), index_col="row"), plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.rename(columns={"length": "lenght"}), "lacks 'length'. The nearest is 'lenght'"),
        (lambda t: t.assign(depth="deep"), "Expected numbers in column 'depth'"),
        (lambda t: t.assign(depth=np.where(t.index == 3, np.nan, t.depth)), "finite number in every cell"),
        (lambda t: t.head(0), "Expected rows"),
    ],
)
def test_strange_tables_are_refused_by_name(run, change, told):
    with pytest.raises(ValueError, match=told):
        run.encode(change(table().head(10)))


def test_new_words_are_refused(mixed):
    run, frame = mixed
    with pytest.raises(ValueError, match=r"got 'hihg'.*Did you mean 'high'"):
        run.encode(frame.head(5).assign(stage=["low", "mid", "hihg", "low", "mid"]))


def test_bad_requests_are_refused(run, tmp_path):
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(ValueError, match="Expected --out to be new"):
        carry_out(run, "sample", n=3, out=tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    with pytest.raises(ValueError, match=r"\.parquet"):
        carry_out(run, "sample", n=3, out=tmp_path / "new.xlsx")
    with pytest.raises(ValueError, match="beside score alone"):
        carry_out(run, "encode", out=tmp_path / "new.csv", outlier="yes")
    with pytest.raises(ValueError, match="no file"):
        carry_out(run, "encode", tmp_path / "none.csv", out=tmp_path / "new.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]
    found = carry_out(run, "score", out=tmp_path / "scores.csv", outlier="yes")
    assert found["auroc"] > 0.6
