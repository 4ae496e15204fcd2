"""Sweeps: grids, errors over data and seeds held against numpy, and members that fail or are stopped."""

import json

import numpy as np
import pytest
import torch
from small import small_spec

from ppl_vae.runs import storage
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.sweep import Member, parse_grid, run_sweep, summarise, told
from ppl_vae.runs.workers import side_by_side


@pytest.fixture
def spec(tmp_path):
    return small_spec(tmp_path / "project", {"data.validation_fraction": 0.2})


def test_grids_are_read_from_text_and_files(tmp_path):
    (tmp_path / "grid.toml").write_text('[svi]\nseed = [0, 1]\n[prior]\nfamily = ["StandardNormal"]\n')
    found = parse_grid(["model.latent=1,2", "likelihood.network.hidden=[5],[5,5]", "a.b=x,y"], tmp_path / "grid.toml")
    assert found == {
        "svi.seed": [0, 1],
        "prior.family": ["StandardNormal"],
        "model.latent": [1, 2],
        "likelihood.network.hidden": [[5], [5, 5]],
        "a.b": ["x", "y"],
    }


@pytest.mark.parametrize("texts", [[], ["svi.seed"], ["svi.seed=0", "svi.seed=1"]])
def test_grids_without_values_are_refused(texts):
    with pytest.raises(ValueError, match="Expected"):
        parse_grid(texts)


def write_run(folder, values, *, validation, kind="estimate"):
    """Write the files of a run that a summary reads."""
    folder.mkdir(parents=True)
    storage.write_tensors({"log_evidence": torch.as_tensor(values)}, folder / "evidence.safetensors")
    evidence = {"mean": float(np.mean(values)), "se": 0.1, "mc_se": 0.02, "kind": kind}
    report = {
        "spec": {"svi": {}},
        "data": {"protocol": {"digest": "same"}},
        "train": {"epochs": len(validation), "seconds": 2.0},
        "test": {"log_evidence": evidence, "elbo": {"mean": float(np.mean(values)) - 1}},
        "exact": None,
        "baseline": {"ppca": {"log_evidence": -9.0}},
    }
    (folder / "report.json").write_text(json.dumps(report))
    lines = [
        {"epoch": i, "elbo": 0, "validation": v, "learning_rate": 0, "seconds": 0} for i, v in enumerate(validation)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_errors_over_data_and_seeds_are_numpys(tmp_path):
    draw, members, values = np.random.default_rng(0), [], {}
    for latent in (1, 2):
        for seed in range(3):
            values[latent, seed] = draw.normal(size=50) + 0.2 * draw.normal() + latent
            member = Member({"model.latent": latent, "svi.seed": seed}, tmp_path / f"{latent}-{seed}")
            write_run(member.folder, values[latent, seed], validation=[-9.0, -5.0 + latent])
            members.append(member)
    found = summarise(members)
    one, two = (np.stack([values[latent, seed] for seed in range(3)]) for latent in (1, 2))
    row = found["settings"][0]
    assert row["log_evidence"]["mean"] == pytest.approx(one.mean())
    assert row["log_evidence"]["se"] == pytest.approx(one.mean(0).std(ddof=1) / np.sqrt(50))
    assert row["log_evidence"]["se_seeds"] == pytest.approx(one.mean(1).std(ddof=1) / np.sqrt(3))
    assert row["log_evidence"]["mc_se"] == pytest.approx(0.02 / np.sqrt(3))
    assert found["chosen"] == 1  # by the validation part
    apart = one.mean(0) - two.mean(0)
    welch = np.sqrt(one.mean(1).var(ddof=1) / 3 + two.mean(1).var(ddof=1) / 3)
    assert row["difference"]["mean"] == pytest.approx(apart.mean())
    assert row["difference"]["se"] == pytest.approx(apart.std(ddof=1) / np.sqrt(50))
    assert row["difference"]["se_seeds"] == pytest.approx(welch)
    assert "(chosen)" in told(found).splitlines()[7]


def test_the_best_by_test_data_is_not_chosen(tmp_path):
    members = [Member({"model.latent": k, "svi.epochs": 9}, tmp_path / str(k)) for k in (1, 2)]
    write_run(members[0].folder, np.full(5, -1.0), validation=[-9.0])
    write_run(members[1].folder, np.full(5, -2.0), validation=[-8.0])
    found = summarise(members)
    assert found["chosen"] == 1
    assert found["settings"][1]["log_evidence"]["se_seeds"] is None
    assert "unknown" in told(found)
    assert "All have svi.epochs = 9.\n" in told(found)
    assert "\n| model.latent = 1 | -1.000 |" in told(found)


def test_a_member_that_fails_ends_no_other_and_is_trained_when_the_sweep_goes_on(spec, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.npy"
    grid = {"data.name": ["table.npy", str(other)]}
    found = run_sweep(spec, grid, out, workers=1)
    (name,) = found["failed"]
    assert name != "data.name=table.npy"
    assert "no such file" in found["failed"][name]
    assert [row["values"] for row in found["settings"]] == [{"data.name": "table.npy"}]
    first = out / "data.name=table.npy"
    before = (first / "report.json").stat().st_mtime_ns
    np.save(other, np.random.default_rng(0).normal(size=(40, 3)))
    again = run_sweep(spec, grid, out)
    assert [row["values"]["data.name"] for row in again["settings"]] == ["table.npy", str(other)]
    assert not again["failed"]
    assert (first / "report.json").stat().st_mtime_ns == before
    names = {path.name for path in out.iterdir()}
    assert names == {"sweep.json", "sweep.md", "sweep.html", "sweep.png", first.name, name}
    torch.set_default_dtype(torch.float32)
    alone = fit_spec(spec, out=tmp_path / "alone")
    assert load_run(first).report["test"] == alone.report["test"]  # to the bit, in whatever process


def test_wrong_settings_and_folders_are_refused_before_anything_is_trained(spec, tmp_path):
    with pytest.raises(ValueError, match=r"svi\.epoch: .*with svi\.epoch = 1"):
        run_sweep(spec, {"svi.epoch": [1, 2]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other things"):
        run_sweep(spec, {"svi.seed": [0]}, tmp_path / "mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sweep.json").write_text(json.dumps({"digest": "other"}))
    with pytest.raises(ValueError, match="has changed since"):
        run_sweep(spec, {"svi.seed": [0]}, tmp_path / "old")


def test_a_log_takes_no_file_that_is_there(tmp_path):
    (tmp_path / "a.log").write_text("mine")
    assert list(side_by_side(print, {tmp_path / "a": ("said",)}, 1)) == [(tmp_path / "a", None)]
    ((_, wrong),) = side_by_side(int, {tmp_path / "a": ("x",)}, 1)
    assert "invalid literal" in wrong
    assert {path.name for path in tmp_path.iterdir()} == {"a.log", "a-2.log"}
    assert (tmp_path / "a.log").read_text() == "mine"
    assert "invalid literal" in (tmp_path / "a-2.log").read_text()
