"""The command line: what it prints where, its exit status, and one plain message for each mistake."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from ppl_vae import demo
from ppl_vae.cli import app
from ppl_vae.reports import diagnostics
from ppl_vae.runs import evaluated, run, storage
from ppl_vae.runs.console import diagnostic_lines, headline

MODELS = Path(__file__).parents[1] / "models"
SHORT = ["--set", "svi.epochs=2", "--set", "evaluation.samples=30"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "MPLBACKEND": "Agg"}
ENVIRONMENT["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # tests run without a shell around them
PPCA = str(MODELS / "ppca.toml")


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch, tmp_path):
    """Single precision, as the command line has it, no pictures, in a folder of its own."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ppca"
    assert invoke("fit", PPCA, *SHORT, "--out", out).exit_code == 0
    return out


def invoke(*arguments):
    handler = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert signal.getsignal(signal.SIGTERM) is handler
    return result


def refused(*arguments):
    """Run a command that must be refused plainly, whatever is asked for, and give the message."""
    for more in ([], ["--json"]):
        result = invoke(*arguments, *more)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.count("ppl-vae: ") == 1
        assert "Traceback" not in result.stderr
        assert isinstance(result.exception, SystemExit)
    return result.stderr


def python(*arguments, **more):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **more
    )


def test_help_and_a_file_that_is_no_toml_wait_for_neither_torch_nor_pyro(tmp_path):
    (tmp_path / "bad.toml").write_text("[data\n")
    for arguments, status in ((["--help"], 0), (["fit", "bad.toml"], 2), (["check", "none.toml"], 2)):
        result = python("-X", "importtime", "-m", "ppl_vae", *arguments, cwd=tmp_path)
        assert result.returncode == status
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "import time:" in line}
        assert "typer" in imported
        assert not {"torch", "pyro", "matplotlib"} & imported


@pytest.mark.parametrize("command", [[], *([name] for name in ("fit", "evaluate", "compare", "check", "list", "demo"))])
def test_each_command_has_help(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout or not command


@pytest.mark.parametrize("name", list(get_command(app).commands))
def test_each_command_shows_an_example_that_parses(name):
    command = get_command(app).commands[name]
    words = command.epilog.removeprefix("Example: ppl-vae ").partition(" > ")[0].split()
    assert words[0] == name
    command.make_context(name, words[1:])
    assert "Example: ppl-vae" in invoke(name, "--help").stdout


def test_the_version_and_completion():
    assert invoke("--version").stdout == f"ppl-vae {version('ppl-vae')}\n"
    assert "--install-completion" in invoke("--help").stdout
    shown = python("-m", "ppl_vae", "--show-completion", "bash")
    assert shown.returncode == 0
    assert "COMPREPLY" in shown.stdout


def test_a_missing_file_is_named_by_all_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "root"))
    (tmp_path / "specs").mkdir()
    shutil.copy(PPCA, tmp_path / "specs" / "a.toml")
    message = refused("check", "specs/a.toml", "--set", "data.name=none.csv")
    for folder in ("specs", "root", "."):
        assert str((tmp_path / folder).resolve() / "none.csv") in message


def test_every_json_is_one_object_and_nothing_else(finished, tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text((MODELS / "vae.py").read_text() + "\nprint('a loud program')\n")
    monkeypatch.setattr(demo, "run_demo", lambda out, workers, say: say("a row") or {"table": "text", "rows": []})
    commands = {
        "fit": ["fit", PPCA, *SHORT, "--out", tmp_path / "a"],
        "program": ["fit", "loud.py", *SHORT, "--set", "model.hidden=5", "--out", tmp_path / "b"],
        "evaluate": ["evaluate", finished, "--samples", 40],
        "compare": ["compare", finished, tmp_path / "a"],
        "check": ["check", PPCA],
        "list": ["list", "network"],
        "demo": ["demo"],
    }
    said = {}
    for name, arguments in commands.items():
        result = invoke(*arguments, "--json")
        assert result.exit_code == 0, result.output
        said[name] = json.loads(result.stdout), result.stderr
    assert said["fit"][0] == json.loads((tmp_path / "a" / "report.json").read_text())
    assert said["evaluate"][0] == json.loads((finished / "report.json").read_text())
    assert said["evaluate"][0]["test"]["samples"] == 40
    assert {"spec", "seed", "versions", "device", "data", "train", "test", "exact", "baseline"} <= said["fit"][0].keys()
    assert said["compare"][0].keys() == {"runs", "differences"}
    assert said["check"][0]["steps"] == 4500
    assert {one["name"] for one in said["list"][0]["components"]} >= {"MLP", "Linear", "Table", "Free"}
    assert said["demo"] == ({"table": "text", "rows": []}, "a row\n")
    assert f"runs the code of {tmp_path / 'loud.py'}" in said["program"][1]
    assert "a loud program" in said["program"][1]


def test_the_explorer_of_a_run_is_one_new_file(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    made = invoke("explore", "run", "--json")
    assert json.loads(made.stdout) == {"out": str(tmp_path / "run.html")}
    assert "run: latent space" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "Expected --out to be new" in refused("explore", "run")
    assert invoke("explore", "run", "--out", "deep/a.html").stdout == "deep/a.html\n"
    assert "is missing" in refused("explore", "none")


def test_text_for_people(finished, tmp_path):
    made = invoke("fit", PPCA, *SHORT, "--out", tmp_path / "a", "--set", "svi.seed=1")
    assert "nats per held-out datum" in made.stdout
    assert str(tmp_path / "a" / "report.html") in made.stdout
    assert "z (n, 10) latent, KL analytic; x (n, 64) observed" in made.stderr
    table = invoke("compare", finished, tmp_path / "a").stdout.splitlines()
    assert table[0].split() == ["run", "ELBO", "log", "evidence", "exact", "PPCA"]
    assert len({len(line) for line in table[:4]}) == 1
    assert f"{finished} - {tmp_path / 'a'}: " in "\n".join(table)
    assert "steps in 300 epochs" in invoke("check", PPCA).stdout
    assert "components = 10" in invoke("list", "prior").stdout


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("svi.epoch=3", "svi.epoch: Expected"),
        ("model.latnet=3", "Did you mean latent?"),
        ("prior={family='StandardNorml'}", "Did you mean StandardNormal?"),
        ("svi.learning_rate=-0.1", "positive number; got -0.1"),
        ("svi.epochs='many'", "svi.epochs: Expected a whole number"),
        ("evaluation.samples=0", "evaluation.samples: Expected at least 1; got 0"),
        ("data.name=mnits", "Did you mean"),
        ("data.name=/none/x.csv", "got no such file"),
        ("svi.seed", "Expected KEY=VALUE"),
        ("data.binarization=dynamic", "Try --set data.binarization=none"),
    ],
)
def test_mistakes_in_a_spec(change, expected, tmp_path):
    message = refused("fit", PPCA, "--set", change)
    assert expected in message
    assert PPCA in message or "KEY=VALUE" in message
    assert expected in refused("check", PPCA, "--set", change)
    assert not list(tmp_path.iterdir())


def data_files(folder):
    (folder / "empty.csv").touch()
    (folder / "text.csv").write_text("a,b\n1,2\n3,four\n5,6\n")
    (folder / "ragged.csv").write_text("1,2\n3\n5,6\n")
    (folder / "nan.csv").write_text("1,2\n3,nan\n5,6\n")
    np.savez(folder / "keys.npz", images=np.ones((9, 3)), others=np.ones((9, 3)))
    (folder / "cut.npz").write_bytes((folder / "keys.npz").read_bytes()[:100])
    np.save(folder / "nan.npy", np.full((9, 3), np.nan))
    (folder / "folder.csv").mkdir()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty.csv", "Expected rows of numbers"),
        ("text.csv", "line 3, column 'b'; got 'four'"),
        ("ragged.csv", "line 2, as in its first row; got 1"),
        ("nan.csv", "got some in 'column 2' (1): line 2"),
        ("nan.npy", "got some in 'column 1' (9), 'column 2' (9), 'column 3' (9): 9 rows, the first in row 0"),
        ("keys.npz", "'images', 'others'"),
        ("cut.npz", "Expected a NumPy file"),
        ("folder.csv", "in the folder"),
    ],
)
def test_mistakes_in_data(name, expected, tmp_path):
    data_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    message = refused("fit", PPCA, "--set", f"data.name={tmp_path / name}", "--set", "model.latent=1")
    assert expected in message
    assert name in message
    assert PPCA in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "Expected a program"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("class P:\n    def guide(self, x): ...\n", "with `model` and `guide`; it has none"),
        (
            "class P:\n    def __init__(self, features): ...\n    def model(self, x):\n        x.nothing()\n"
            "    def guide(self, x): ...\n",
            "line 4 raised AttributeError",
        ),
    ],
)
def test_mistakes_in_a_program(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    (tmp_path / "own.toml").write_text('[data]\nname = "digits"\n[model]\nprogram = "own.py"\n')
    for source in ("own.toml", "own.py"):
        message = refused("fit", source)
        assert expected in message
        assert "own.py" in message
    assert not (tmp_path / "runs").exists()


def test_mistakes_in_a_path(finished, tmp_path):
    assert "Did you mean" in refused("fit", MODELS / "digit.toml")
    assert "digits.toml" in refused("fit", MODELS)
    assert "is a finished run" in refused("fit", finished)
    assert "holds a finished run" in refused("fit", PPCA, "--out", finished)
    (tmp_path / "empty.toml").touch()
    assert "empty file" in refused("check", "empty.toml")
    assert "is missing" in refused("evaluate", tmp_path / "none")
    assert "is a file" in refused("evaluate", PPCA)
    assert "`samples`" in refused("evaluate", finished, "--samples", 0)
    assert "two or more runs" in refused("compare", finished)
    assert "holds none of its files" in refused("compare", finished, tmp_path)
    assert "Expected a role" in refused("list", "priors")
    (tmp_path / "file").touch()
    assert "file" in refused("fit", PPCA, *SHORT, "--out", tmp_path / "file" / "run")
    assert not (tmp_path / "runs").exists()


def test_a_run_of_a_newer_format_or_cut_short(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "FORMAT", "3")
        storage.seal(tmp_path / "run", {})
    assert "newer ppl_vae" in refused("evaluate", tmp_path / "run")
    shutil.copy(finished / "manifest.json", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(weights[:-9])
    for command in (["evaluate"], ["compare", finished]):
        assert "model.safetensors" in refused(*command, tmp_path / "run")


def part(report, heading):
    """The words under a heading."""
    return report.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_a_closer_look_is_in_report_json_and_pictures(tmp_path):
    short = ["--set", "svi.epochs=2", "--set", "evaluation.samples=30", "--set", "model.latent=2"]
    assert invoke("fit", PPCA, *short, "--out", "two").exit_code == 0
    asked = ["--reference", "auto", "--gap", "--calibration", "--data", "4"]
    made = invoke("evaluate", "two", *asked, "--json")
    assert made.exit_code == 0, made.output
    report, text = json.loads((tmp_path / "two" / "report.json").read_text()), Path("two/report.md").read_text()
    assert report == json.loads(made.stdout)
    exact = report["reference"]
    assert (exact["method"], exact["n"], exact["converged"]) == ("closed-form", 4, True)
    assert exact["log_evidence"] == pytest.approx(np.mean(exact["each"]["log_evidence"]))
    assert report["bound"]["samples"] == [1, 2, 5, 10, 20, 30]
    assert "gap" not in exact
    assert report["bound"]["mean"][0] == pytest.approx(exact["log_evidence"] - report["gap"]["total"], abs=0.5)
    assert len(report["pareto_k"]) == report["test"]["n"]
    assert report["gap"]["total"] == pytest.approx(report["gap"]["approximation"] + report["gap"]["amortization"])
    assert [len(row) for row in report["calibration"]["ranks"]["counts"]] == [20, 20]
    for heading in ("**Reference** by closed-form", "**The bound over", "**The gap**", "**Calibration**"):
        assert f"- {heading}" in part(text, "Diagnostics")
    printed = headline(report).splitlines()[-3:]
    assert printed[0] == f"reference        {exact['log_evidence']:.3f} (closed-form, 4 data)"
    assert re.match(
        rf"gap              {report['gap']['total']:.3f} ± .* over 4 data: family -?[\d.]+ ± .*, network", printed[1]
    )
    assert re.match(r"calibration      (no fault found|miscalibrated) \(p = .*, 500 simulations\)$", printed[2])
    wrong = report["calibration"]["verdict"] == "miscalibrated"
    assert ("**The guide is miscalibrated**" in part(text, "What to distrust")) == wrong
    assert "ppl-vae evaluate again --samples 30 --reference auto --gap --calibration --data 4\n" in text
    names = {"reference.png", "bound.png", "pareto_k.png", "gap.png", "calibration.png"}
    assert {path.name for path in (tmp_path / "two" / "figures").iterdir()} == names
    for name in names:
        assert f"(figures/{name})" in text
        assert (tmp_path / "two" / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    assert invoke("evaluate", "two").exit_code == 0
    assert "reference" not in json.loads((tmp_path / "two" / "report.json").read_text())
    assert "report anew" in " ".join(invoke("evaluate", "--help").stdout.split())


def test_bounds_and_failures_of_a_closer_look_are_printed_as_such():
    reference = {"method": "ais", "n": 50, "n_settled": 0, "converged": False, "kind": "lower bound"}
    gap = {"kind": "lower bound", "n": 50, "total": 1.5, "error": 0.1}
    gap |= {"approximation": 1.0, "approximation_error": 0.2, "amortization": 0.5, "amortization_error": 0.3}
    assert diagnostic_lines({}) == []
    assert diagnostic_lines({"reference": {**reference, "log_evidence": -9.0, "error": 0.25}, "gap": gap}) == [
        "reference     >= -9.000 ± 0.25 (lower bound on average, ais, 50 data; its own checks failed)",
        "gap           >= 1.500 ± 0.100 over 50 data: family >= 1.000 ± 0.200, network 0.500 ± 0.300",
    ]
    reference |= {"method": "quadrature", "kind": "estimate", "n_settled": 40, "log_evidence": -9.0, "error": 1e-9}
    assert diagnostic_lines({"reference": reference}) == [
        "reference        -9.000 ± 1e-09 (quadrature, 40 of 50 data; its own checks failed)"
    ]
    reference |= {"kind": None, "n_settled": 0, "log_evidence": None, "error": None}
    assert diagnostic_lines({"reference": reference}) == [
        "reference        none settled (quadrature, 50 data; its own checks failed)"
    ]


def test_a_reference_that_did_not_converge_is_told_and_the_status_is_1(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    original = diagnostics.reference_posterior

    def hasty(*given, **more):
        return original(*given, draws=20, warmup=5, chains=2, **more)

    monkeypatch.setattr(diagnostics, "reference_posterior", hasty)
    for more in ([], ["--json"]):
        result = invoke("evaluate", tmp_path / "run", "--reference", "nuts", "--data", 2, *more)
        assert result.exit_code == 1
        assert "Expected a reference that passes its own checks" in result.stderr
        assert "Traceback" not in result.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert json.loads(result.stdout) == report
    assert report["reference"]["converged"] is False
    each = report["reference"]["each"]
    passed = [r_hat < 1.01 and ess > 400 for r_hat, ess in zip(each["r_hat"], each["ess"], strict=True)]
    assert report["reference"]["n_settled"] == sum(passed) == 0
    assert report["reference"]["diagnostics"]["ess"]["max"] == max(each["ess"]) < 400
    assert report["reference"]["diagnostics"]["divergences"] >= 0
    text = (tmp_path / "run" / "report.md").read_text()
    words = part(text, "Diagnostics")
    assert "- **The reference posterior by nuts failed its own checks** on 2 of 2" in part(text, "What to distrust")
    assert headline(report).endswith("\nreference        no log p(x) (nuts, 2 data; its own checks failed)")
    assert "**Its own checks failed** on 2 of 2 data" in words
    assert "python inference/nuts.py RUN --warmup" in words
    assert "R-hat is " in words
    assert f"40 draws are as good as {report['reference']['diagnostics']['ess']['min']:.0f} independent ones" in words


def test_annealing_takes_its_settings_from_the_command_line(tmp_path, monkeypatch):
    small = ["--set", "svi.epochs=1", "--set", "evaluation.samples=30", "--set", "likelihood.network.hidden=[5]"]
    sharp = ["--set", "model.latent=4", "--set", "likelihood.scale=0.5"]
    assert invoke("fit", MODELS / "digits.toml", *small, *sharp, "--out", "run").exit_code == 0
    given = {}
    original = diagnostics.reference_posterior

    def noted(target, **settings):
        given.update(settings)
        return original(target, **settings)

    monkeypatch.setattr(diagnostics, "reference_posterior", noted)
    asked = ["--data", 2, "--temperatures", 3, "--chains", 5]
    for method in ("ais", "auto"):
        result = invoke("evaluate", "run", "--reference", method, *asked)
        assert result.exit_code == 1
        assert (given["method"], given["temperatures"], given["chains"]) == (method, 3, 5)
    report = json.loads(Path("run/report.json").read_text())["reference"]
    assert (report["method"], report["draws"], report["n"], report["n_settled"]) == ("ais", 5, 2, 0)
    text = Path("run/report.md").read_text()
    assert "ppl-vae evaluate RUN --reference ais --temperatures N" in part(text, "Diagnostics")
    assert "--reference auto --data 2 --temperatures 3 --chains 5\n" in part(text, "Reproduce")
    assert "--temperatures" in invoke("evaluate", "--help").stdout


def test_auto_refuses_settings_of_annealing_where_it_takes_another(finished):
    before = (finished / "report.json").read_bytes()
    message = "with --reference auto, which is closed-form here"
    assert message in refused("evaluate", finished, "--reference", "auto", "--temperatures", 9)
    assert (finished / "report.json").read_bytes() == before


def test_small_errors_and_single_data_are_printed_as_such():
    gap = {"kind": "estimate", "n": 1, "total": 0.5, "error": 0.0004}
    gap |= {"approximation": 0.5, "approximation_error": 0.0, "amortization": 0.0, "amortization_error": 0.02}
    assert diagnostic_lines({"gap": gap}) == [
        "gap              0.500 ± 0.0004 over 1 datum: family 0.500 ± 0.000, network 0.000 ± 0.020"
    ]


def test_references_that_a_program_does_not_allow_leave_the_report_as_it_was(tmp_path, monkeypatch):
    small = ["--set", "svi.epochs=1", "--set", "evaluation.samples=30"]
    many = ["--set", "model.latent=50", "--set", "likelihood.network.hidden=[5]"]
    assert invoke("fit", MODELS / "digits.toml", *small, *many, "--out", "many").exit_code == 0
    assert invoke("fit", MODELS / "vae.py", *small, "--set", "model.hidden=5", "--out", "own").exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def slow(*given, **more):
        raise AssertionError("evaluated before it refused")

    monkeypatch.setattr(evaluated, "evaluate", slow)
    linear = refused("evaluate", "many", "--reference", "closed-form")
    assert "Expected a linear-Gaussian model" in linear
    assert "This program allows 'ais', 'nuts'" in linear
    few = refused("evaluate", "many", "--reference", "quadrature", "--gap", "--calibration")
    assert "at most 3 latent variables for method='quadrature'; got 50" in few
    assert "allows 'ais', 'nuts', and 'closed-form' if it is linear-Gaussian" in few
    assert "--data together with --reference or --gap" in refused("evaluate", "many", "--data", "9")
    assert "at least 1; got 0" in refused("evaluate", "many", "--gap", "--data", "0")
    assert "at most 297, which are all there are" in refused("evaluate", "many", "--gap", "--data", "99999")
    annealed = "Expected --temperatures together with --reference ais, whose setting it is; got it"
    assert f"{annealed} alone." in refused("evaluate", "many", "--temperatures", "9")
    assert f"{annealed} with --reference nuts." in refused(
        "evaluate", "many", "--reference", "nuts", "--temperatures", 9
    )
    assert "Expected --chains together" in refused("evaluate", "many", "--gap", "--chains", "0")
    assert "`temperatures` to be" in refused("evaluate", "many", "--reference", "auto", "--temperatures", "0")
    assert "`chains` to be a whole number, at least 2" in refused(
        "evaluate", "many", "--reference", "ais", "--chains", "1"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written(code, tmp_path, monkeypatch):
    def failing(*given, **more):
        raise OSError(code, os.strerror(code), str(tmp_path / "somewhere"))

    monkeypatch.setattr(Path, "write_text", failing)
    message = refused("fit", PPCA, *SHORT, "--out", tmp_path / "new")
    assert os.strerror(code) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["fit"], ["fit", PPCA, "--epochs", "3"], ["train"], ["fit", PPCA, "--device", "tpu"]]
)
def test_unknown_words(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage" in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(run, "fit_spec", broken)
    result = invoke("fit", PPCA)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_last_epoch_and_fit_goes_on_to_the_same_numbers(number, status, tmp_path):
    (tmp_path / "tell.py").write_text(
        "import sys\nfrom ppl_vae.runs import run\nfrom ppl_vae.cli import main\nfit = run.fit\n"
        "def telling(*given, on_epoch, **more):\n"
        "    def told(epoch, state):\n"
        "        on_epoch(epoch, state)\n"
        "        print('epoch', epoch, file=sys.stderr, flush=True)\n"
        "        if epoch == 3:\n"
        "            sys.stdin.readline()\n"
        "    return fit(*given, on_epoch=told, **more)\n"
        "run.fit = telling\nmain()\n"
    )
    settings = ["--set", "svi.epochs=40", "--set", "evaluation.samples=30"]
    command = [sys.executable, "tell.py", "fit", PPCA, *settings, "--out", "part"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=ENVIRONMENT, cwd=tmp_path) as process:
        for line in process.stderr:
            if line.startswith("epoch 3"):
                process.send_signal(number)
                break
        rest = process.communicate("go on\n")[1]
    assert process.returncode == status
    assert "Go on with: ppl-vae fit part" in rest
    assert "Traceback" not in rest
    done = len((tmp_path / "part" / "metrics.jsonl").read_text().splitlines())
    assert 3 < done < 40
    if number == signal.SIGTERM:
        return
    assert invoke("fit", "part").exit_code == 0
    assert invoke("fit", PPCA, *settings, "--out", "whole").exit_code == 0
    part, whole = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("part", "whole"))
    assert part["test"] == whole["test"]
    assert part["train"]["elbo"] == whole["train"]["elbo"]
