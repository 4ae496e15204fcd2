"""Runs that begin with weights of others, and finished runs in the hands of Pyro and ArviZ."""

import json

import numpy as np
import pyro
import pytest
import safetensors.torch
import torch
from small import small_spec

from ppl_vae import Target, load_run
from ppl_vae.programs.param_store import own_params
from ppl_vae.runs import evaluated, storage
from ppl_vae.runs import run as runs
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.start import frozen, learned_by, take_weights

IRIS = {"data.name": "iris", "data.scaling": "standardize", "model.latent": 2, "svi.batch_size": 100}
MLP = {"posterior.network": {"family": "MLP", "hidden": [4]}}
PROGRAM = """
import pathlib, pyro, torch
import pyro.distributions as dist
from pyro.distributions import constraints
pathlib.Path(MARK).touch()
class Own:
    def __init__(self, features): ...
    def model(self, x):
        scale = pyro.param("scale", lambda: torch.full((2,), 3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale.mean()).to_event(1), obs=x)
    def guide(self, x):
        slope = pyro.param("slope", lambda: torch.zeros(SIZE))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) * slope.sum(), 1.0))
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return small_spec(tmp_path_factory.mktemp("specs"), IRIS)


@pytest.fixture(scope="module")
def first(spec):
    """A finished run; single precision, as the command line has it, and no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
        torch.set_default_dtype(torch.float32)
        return fit_spec(spec, out=spec.parent / "first")


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_another_guide_on_a_frozen_model(spec, first, tmp_path):
    said = []
    changes = {**MLP, "svi.start": first.path, "svi.freeze": "taken"}
    other = fit_spec(spec, changes, out=tmp_path / "other", say=said.append)
    old, new = weights(first.path), weights(other.path)
    shared = [name for name in old if name.startswith("likelihood")]
    assert all(torch.equal(old[name], new[name]) for name in shared)
    record = other.report["train"]["start"]
    assert set(shared) <= set(record["taken"])
    assert "posterior.network.layers.0.weight" in record["new"]
    assert record["left"] == ["posterior.network.bias", "posterior.network.weight"]
    assert record["digest"] == storage.digest(first.path / "model.safetensors")
    assert any("has no place for: posterior.network.bias" in text for text in said)
    assert set(other.spec.svi.freeze) == {
        "likelihood.family.raw_scale",
        *(n for n in shared if n[-5:] in ("eight", ".bias")),
    }
    assert f"began with weights of `{first.path.name}`" in (other.path / "report.md").read_text()
    again = evaluate_run(other.path, samples=25)  # knows it still
    assert again.report["train"]["start"] == record
    assert load_run(other.path).spec.svi.freeze == other.spec.svi.freeze
    fresh = fit_spec(spec, MLP, out=tmp_path / "fresh")
    assert not torch.equal(weights(fresh.path)["likelihood.network.weight"], old["likelihood.network.weight"])


def test_fine_tuning_goes_on_from_the_weights_that_were_taken(spec, first, tmp_path):
    more = fit_spec(spec, {"svi.start": first.path, "svi.epochs": 1, "svi.learning_rate": 1e-12}, out=tmp_path / "more")
    old, new = weights(first.path), weights(more.path)
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    assert more.report["train"]["start"]["new"] == []
    assert more.report["test"]["elbo"]["mean"] == pytest.approx(first.report["test"]["elbo"]["mean"], abs=1e-3)


def test_an_interrupted_run_with_a_start_goes_on_to_the_same_bits_without_it(spec, first, tmp_path, monkeypatch):
    changes = {**MLP, "svi.start": str(first.path), "svi.freeze": ["likelihood"], "svi.checkpoint": "1 epoch"}
    changes["svi.epochs"] = 3
    whole = fit_spec(spec, changes, out=tmp_path / "whole")

    def once(self, *given, plain=runs.Pace.is_due):
        monkeypatch.setattr(runs.Pace, "is_due", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Pace, "is_due", once)
        with pytest.raises(KeyboardInterrupt):
            fit_spec(spec, changes, out=tmp_path / "part")
        monkeypatch.undo()
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
    (first.path).rename(tmp_path / "moved")
    try:
        part = fit_spec(tmp_path / "part")
    finally:
        (tmp_path / "moved").rename(first.path)
    one, two = weights(whole.path), weights(part.path)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert part.report["train"]["start"] == whole.report["train"]["start"]


def test_what_fits_nowhere_is_refused(spec, first, tmp_path):
    wine = {"data.name": "wine", "model.latent": 7, "svi.start": first.path}
    with pytest.raises(ValueError, match=r"fit this program by name and shape; got none: it has .*weight \(4, 2\)"):
        fit_spec(spec, wine, out=tmp_path / "wine")
    assert not (tmp_path / "wine").exists()
    with pytest.raises(
        ValueError, match=r"svi\.freeze to be 'taken', beside svi\.start.*got 'likelyhood'.*likelihood\?"
    ):
        fit_spec(spec, {"svi.freeze": ["likelyhood"]}, out=tmp_path / "none")
    with pytest.raises(ValueError, match="Expected a run directory"):
        fit_spec(spec, {"svi.start": tmp_path}, out=tmp_path / "none")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in first.path.iterdir():
        if file.is_file():
            (damaged / file.name).write_bytes(file.read_bytes())
    flipped = bytearray((damaged / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged"):
        fit_spec(spec, {"svi.start": damaged}, out=tmp_path / "none")


def test_buffers_are_taken_with_those_beside_them_or_not_at_all(first, spec):
    from ppl_vae import load_spec

    wider = load_spec(spec, {"model.latent": 3}).build()
    scale = wider.likelihood.network.scale.clone()
    record = take_weights(wider, first.path)
    assert "posterior.network.shift" in record["taken"]
    assert "posterior.network.scale" in record["taken"]
    assert {"likelihood.network.scale", "likelihood.network.shift"} <= set(record["new"]) & set(record["left"])
    assert torch.equal(wider.likelihood.network.scale, scale)
    names = frozen(wider, ["likelihood"])
    assert len(learned_by(wider, names)) == 2  # weight and bias of the posterior


def test_no_code_of_the_run_is_executed_and_what_pyro_param_keeps_is_taken(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 2)))
    for name, size in (("one", 3), ("two", 4)):
        code = PROGRAM.replace("MARK", repr(str(tmp_path / name))).replace("SIZE", str(size))
        (tmp_path / f"{name}.py").write_text(code)
        text = f'data.name = "x.npy"\nmodel.program = "{name}.py:Own"\nsvi.epochs = 2\nevaluation.samples = 5\n'
        (tmp_path / f"{name}.toml").write_text(text)
    one = fit_spec(tmp_path / "one.toml", out=tmp_path / "first")
    (tmp_path / "one").unlink()
    changes = {"svi.start": one.path, "svi.freeze": "taken"}
    two = fit_spec(tmp_path / "two.toml", changes, out=tmp_path / "second")
    assert not (tmp_path / "one").exists()
    assert torch.equal(own_params(one.program)["params"]["scale"], own_params(two.program)["params"]["scale"])
    assert two.report["train"]["start"]["new"] == ["pyro.param:slope"]


def test_predictive_is_pyros_over_the_fitted_pair(first):
    data = first.spec.load_data()
    batch = {"x": data.test["x"][:5]}
    pyro.set_rng_seed(0)
    drawn = first.predictive(20_000)(**batch)
    table = first.encode(dict(batch))
    error = torch.tensor(table[["z0 sd", "z1 sd"]].to_numpy()) / 20_000**0.5
    off = drawn["z"].double().mean(0).cpu() - torch.tensor(table[["z0", "z1"]].to_numpy())
    assert bool((off.abs() < 5 * error).all())
    mean, spread = drawn["x"].double().mean(0), drawn["x"].double().std(0)
    expected = data.transform.inverse(mean)
    known = first.reconstruct(dict(batch)).to_numpy()  # by draws of its own, 100 a row
    assert (np.abs(expected - known) < 5 * spread.numpy() * data.transform.scale / 10).all()
    one = first.predictive(3, parallel=False)(**batch)
    assert one["x"].shape == (3, 5, 4)
    assert one["z"].shape == (3, 5, 2)


def test_arviz_gets_the_rows_that_a_run_was_evaluated_on_or_others(first):
    tree, data = first.to_datatree(draws=50), first.spec.load_data()
    assert list(tree["posterior"]["obs"].values) == list(data.row_numbers["test"])
    assert tree["log_likelihood"]["x"].shape == (1, 50, 30)
    known = [data.classes[k] for k in data.test["y"]]
    assert list(tree["constant_data"]["labels"].values) == known
    weights = torch.from_numpy(np.asarray(tree["sample_stats"]["log_weight"]))[0]
    elbo, error = weights.mean(0).mean(), weights.std(0).mean() / 50**0.5
    assert abs(float(elbo) - first.report["test"]["elbo"]["mean"]) < 5 * float(error)
    rows = data.to_table(data.test["x"][:4]).to_numpy()
    other = first.to_datatree(rows, draws=20)
    assert np.allclose(other["observed_data"]["x"].values, data.test["x"][:4], atol=1e-5)
    z = Target(first.program, {"x": data.test["x"][:4]})
    assert other["posterior"]["z"].shape == (1, 20, z.n, 2)
    assert json.loads(json.dumps(other["posterior"].attrs))["seed"] == 0
