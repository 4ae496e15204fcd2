"""The scripts in inference/: short, run on a spec's or a program's path, and share the run directory."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pyro
import pytest
import torch

from ppl_vae import load_run, run
from ppl_vae.run import evaluate_run, fit_spec

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem: path for path in (ROOT / "inference").glob("*.py")}
SHORT = {"svi.epochs": 2, "evaluation.samples": 30}


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(run, "figures", lambda *given, **more: given[3].mkdir() or {})


def main(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"_script_{name}", SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def test_every_script_is_short():
    assert SCRIPTS.keys() >= {"svi", "importance_weighted", "exact_posterior"}
    for path in SCRIPTS.values():
        assert len(path.read_text().splitlines()) <= 60
        assert "main" in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("source", ["ppca.toml", "two_level.toml", "vae.py", "vae.py:VAE"])
def test_svi_leaves_a_run(source, tmp_path, capsys):
    short = ["--set", "svi.epochs=2", "--set", "evaluation.samples=30"]
    main("svi", ROOT / "models" / source, *short, "--out", tmp_path / "run")
    assert re.search(r"epoch +2 +ELBO +-\d+\.\d+ nats per datum", capsys.readouterr().out)
    pyro.clear_param_store()
    made = load_run(tmp_path / "run", trust_code=True)
    assert made.report["train"]["steps"] == 30
    bounds = [json.loads(line)["elbo"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert bounds[1] > bounds[0]
    assert evaluate_run(tmp_path / "run", trust_code=True).report == made.report
    with pytest.raises(ValueError, match="holds a finished run"):
        main("svi", ROOT / "models" / source, *short, "--out", tmp_path / "run")


def test_the_visible_loop_finds_what_fit_finds(tmp_path):
    settings = {"svi.epochs": 20, "svi.schedule": "constant", "svi.learning_rate": 0.1, "evaluation.samples": 30}
    known = fit_spec(ROOT / "models" / "ppca.toml", settings, out=tmp_path / "fit").report
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    main("svi", ROOT / "models" / "ppca.toml", *changes, "--out", tmp_path / "svi")
    report = load_run(tmp_path / "svi").report
    assert report["test"]["elbo"]["mean"] == pytest.approx(known["test"]["elbo"]["mean"], abs=0.5)
    assert report["spec"]["svi"]["schedule"] == "constant"


def test_importance_weighted_agrees_with_the_library(tmp_path, capsys):
    fit_spec(ROOT / "models" / "digits.toml", {**SHORT, "model.latent": 2}, out=tmp_path / "run")
    main("importance_weighted", tmp_path / "run", "--samples", 50, "--data", 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("20 data of the test part, 50 weights each")
    figures = [re.findall(r"-?\d+\.\d+", line) for line in lines[1:]]
    assert len(figures) == 5
    assert all(float(mine) == pytest.approx(float(theirs), abs=2e-5) for mine, theirs in figures)
    with pytest.raises(SystemExit, match="`samples`"):
        main("importance_weighted", tmp_path / "run", "--samples", 0)
    with pytest.raises(SystemExit, match="Expected a linear-Gaussian model"):
        main("exact_posterior", tmp_path / "run")


def test_exact_posterior_prints_the_gap(tmp_path, capsys):
    made = fit_spec(ROOT / "models" / "ppca_exact.toml", SHORT, out=tmp_path / "run")
    main("exact_posterior", tmp_path / "run", "--data", 3)
    rows = [[float(cell) for cell in line.split()] for line in capsys.readouterr().out.splitlines()[2:5]]
    for value, bound, gap, kl, _, error, ratio in rows:
        assert value == pytest.approx(bound, abs=0.02)
        assert [gap, kl, error] == pytest.approx([0.0, 0.0, 0.0], abs=1e-3)
        assert ratio == pytest.approx(1.0, abs=1e-3)
    assert made.report["exact"]["gap"] == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(SystemExit, match="Expected a run directory"):
        main("exact_posterior", tmp_path)


def test_a_program_in_a_run_asks_for_trust(tmp_path):
    fit_spec(ROOT / "models" / "ppca.py", {**SHORT, "model.latent": 2}, out=tmp_path / "run")
    for name in ("importance_weighted", "exact_posterior"):
        with pytest.raises(SystemExit, match="give --trust-code"):
            main(name, tmp_path / "run")
        main(name, tmp_path / "run", "--trust-code", "--data", 2)
