"""The scripts in inference/: short, run on a spec's or a program's path, and share the run directory."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pyro
import pytest
import torch

from ppl_vae import exact_log_evidence, exact_posterior, load_run
from ppl_vae.infer.annealing import bidirectional
from ppl_vae.runs import evaluated
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.run import fit_spec

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem: path for path in (ROOT / "inference").glob("*.py")}
SHORT = {"svi.epochs": 2, "evaluation.samples": 30}


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})


def main(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"_script_{name}", SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def test_every_script_is_short():
    assert SCRIPTS.keys() >= {"svi", "importance_weighted", "exact_posterior", "annealed_importance", "nuts"}
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
    with pytest.raises(SystemExit, match=r"holds a finished run\. Choose another\.$"):
        main("svi", ROOT / "models" / source, *short, "--out", tmp_path / "run")
    with pytest.raises(SystemExit, match="got no such file"):
        main("svi", tmp_path / "none.toml")


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


def table(lines):
    """Read the numbers of lines such as `0 -161.020 0.302 yes`, the first of them a whole number."""
    words = {"yes": 1.0, "no": 0.0}
    rows = [line.split() for line in lines if re.match(r" +\d+ +-?\d", line)]
    return [[words[cell] if cell in words else float(cell) for cell in row] for row in rows]


def linear(tmp_path, latent):
    """Path of a run of a linear-Gaussian model with an exact guide, its program, and its data."""
    fit_spec(ROOT / "models" / "ppca_exact.toml", {**SHORT, "model.latent": latent}, out=tmp_path / "run")
    made = load_run(tmp_path / "run")
    return tmp_path / "run", made.program, made.spec.load_data().test["x"]


def test_annealed_importance_brackets_the_evidence(tmp_path, capsys):
    path, program, x = linear(tmp_path, 3)
    settings = ("--data", 8, "--samples", 20, "--leapfrog", 4)
    exact = exact_log_evidence(program, x[:8])
    missed = {}
    for temperatures in (1, 40):
        main("annealed_importance", path, *settings, "--temperatures", temperatures)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"test data, nats per datum: 20 weights, and 16 chains of {temperatures} moves"
        rows = table(lines)
        assert len(rows) == 16
        _, weighted, annealed, error, chains, accepted, settled = torch.tensor(rows[:8]).double().T
        torch.testing.assert_close(weighted, exact, rtol=0, atol=2e-3)  # the guide is exact
        missed[temperatures] = exact - annealed
        failed = [line for line in lines if "did not settle" in line]
        assert len(failed) == (0 if settled.all() else 1)
        if temperatures == 1:
            assert not settled.any()
            assert failed[0].startswith("8 of 8 data did not settle")
            assert failed[0].endswith("Give more --temperatures, or --chains.")
        if temperatures == 40:
            assert (missed[40].abs() < 5 * error + 1e-3).all()
            assert ((accepted > 0.3) & (accepted < 0.95)).all()
            assert ((chains >= 1) & (chains <= 16)).all()
    assert missed[1].mean() > 3  # one move from the prior is not enough
    _, lower, upper, gap = torch.tensor(rows[8:]).double().T
    torch.testing.assert_close(gap, upper - lower, rtol=0, atol=2e-3)
    made = bidirectional(program, x[:8], chains=16, temperatures=40, leapfrog=4)
    truth = exact_log_evidence(program, made.batch)
    for miss in (truth - lower, upper - truth):
        assert miss.mean() > -5 * miss.std() / 8**0.5
    means = [[float(cell) for cell in line.split()[1:]] for line in lines if line.startswith(" mean")]
    assert means == [
        pytest.approx(
            [weighted.mean().item(), annealed.mean().item(), error.square().sum().sqrt().item() / 8], abs=2e-3
        ),
        pytest.approx([lower.mean().item(), upper.mean().item(), gap.mean().item()], abs=2e-3),
    ]


def test_annealing_from_an_exact_guide_has_no_error(tmp_path, capsys):
    path, program, x = linear(tmp_path, 2)
    main("annealed_importance", path, "--start", "guide", "--data", 2, "--temperatures", 3, "--leapfrog", 2)
    rows = table(capsys.readouterr().out.splitlines())
    for row, exact in zip(rows[:2], exact_log_evidence(program, x[:2]), strict=True):
        assert row[2:4] == pytest.approx([exact.item(), 0.0], abs=2e-3)
    for name, count in (("chains", 0), ("data", 0), ("data", -1)):
        with pytest.raises(SystemExit, match=f"Expected `{name}` to be a whole number, at least [12]; got {count}"):
            main("annealed_importance", path, f"--{name}", count)
    with pytest.raises(SystemExit, match="Expected `chains` to be a whole number, at least 2; got 1"):
        main("annealed_importance", path, "--chains", 1)
    with pytest.raises(SystemExit, match="Expected a run directory"):
        main("annealed_importance", tmp_path)


def test_nuts_finds_the_exact_posterior(tmp_path, capsys):
    path, program, x = linear(tmp_path, 2)
    main("nuts", path, "--data", 1, "--draws", 600, "--warmup", 100, "--chains", 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "test data, 2 chains of 600 draws"
    rows = [[float(cell) for cell in line.split()[2:]] for line in lines if "z[" in line]
    mean, scale, guide_mean, guide_scale = torch.tensor(rows).double().T
    r_hat, draws, divergences = re.match(
        r"R-hat ([\d.]+), as good as (\d+) independent draws, divergences (\d+)", lines[-1]
    ).groups()
    assert float(r_hat) < 1.01
    assert int(divergences) == 0
    exact = exact_posterior(program, x[:1])
    for loc, spread, count in ((mean, scale, int(draws)), (guide_mean, guide_scale, 1000)):
        assert ((loc - exact.mean[0]).abs() < 5 * exact.stddev[0] / count**0.5).all()
        assert ((spread / exact.stddev[0] - 1).abs() < 5 / (2 * count) ** 0.5).all()
    with pytest.raises(SystemExit, match="NUTS did not converge on 1 of 1 data: ask for more --warmup and"):
        main("nuts", path, "--data", 1, "--draws", 30, "--warmup", 20, "--chains", 2)
    with pytest.raises(SystemExit, match="`chains` to be at least 2"):
        main("nuts", path, "--chains", 1)
    with pytest.raises(SystemExit, match="Expected a run directory"):
        main("nuts", tmp_path)


def test_a_program_in_a_run_asks_for_trust(tmp_path):
    fit_spec(ROOT / "models" / "ppca.py", {**SHORT, "model.latent": 2}, out=tmp_path / "run")
    short = {
        "importance_weighted": (),
        "exact_posterior": (),
        "annealed_importance": ("--temperatures", 3, "--leapfrog", 2),
        "nuts": ("--draws", 0),
    }
    for name, settings in short.items():
        with pytest.raises(SystemExit, match="without --trust-code"):
            main(name, tmp_path / "run", *settings)
        if name != "nuts":
            main(name, tmp_path / "run", "--trust-code", "--data", 2, *settings)
