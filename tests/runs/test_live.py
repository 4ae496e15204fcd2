"""A training is seen while it goes on: lines of metrics, words every ten seconds, trackers."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ppl_vae import _progress, fit
from ppl_vae.cli import app
from ppl_vae.evaluation import log_evidence
from ppl_vae.infer.annealing import annealed_importance
from ppl_vae.programs.linear_models import PPCA
from ppl_vae.runs import evaluated, storage
from ppl_vae.runs.check_run import check_run
from ppl_vae.runs.metrics import METRICS
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.stops import Stopped
from ppl_vae.runs.trackers import latest, tensorboard

PPCA_SPEC = Path(__file__).parents[2] / "models" / "ppca.toml"
SHORT = {"svi.epochs": 4, "evaluation.samples": 5, "model.latent": 1, "svi.checkpoint": "2 epochs"}


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: {})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_grow_by_an_epoch_and_are_those_of_the_run(tmp_path):
    seen, figures = [], []

    def look(epoch, state):
        seen.append(lines(tmp_path / "run"))
        figures.append(latest(state))

    fit_spec(PPCA_SPEC, SHORT, out=tmp_path / "run", on_epoch=look)
    whole = lines(tmp_path / "run")
    assert [len(some) for some in seen] == [1, 2, 3, 4]
    assert seen[-1] == whole
    assert all(some == whole[: len(some)] for some in seen)
    assert [line["elbo"] for line in whole] == [each["elbo"] for each in figures]
    assert figures[0].keys() == {"elbo", "objective", "learning_rate", "seconds"}


def stop_after(epochs, code=signal.SIGINT):
    def look(epoch, state):
        if epoch + 1 == epochs:
            raise Stopped(number=code)

    return look


def test_an_interrupted_run_goes_on_from_its_state_whatever_stands_behind_it(tmp_path):
    """A killed process may have left epochs beyond its last state, and half a line."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit_spec(PPCA_SPEC, SHORT, out=out, on_epoch=stop_after(2))
    kept = lines(out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**kept[-1], "epoch": 2}) + "\n" + '{"epoch": 3, "el')
    assert check_run(out).files["metrics.jsonl"] == "as written"
    made = fit_spec(out)
    assert [line["epoch"] for line in lines(out)] == [0, 1, 2, 3]
    assert lines(out)[:2] == kept
    assert len(storage.read_metrics(out, 4)["elbo"]) == 4
    assert made.report["train"]["epochs"] == 4


def test_what_a_killed_first_try_left_is_no_obstacle_and_other_files_are(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    row = {"epoch": 0, **dict.fromkeys(METRICS, 1.0)}
    for torn in (json.dumps(row) + "\n" + '{"epo', '{"epo', json.dumps(row), ""):  # "": between opening and writing
        (out / "metrics.jsonl").write_text(torn)
        fit_spec(PPCA_SPEC, {**SHORT, "svi.epochs": 1}, out=out, force=True)
        assert [line["epoch"] for line in lines(out)] == [0]
        shutil.rmtree(out)
        out.mkdir()
    for text in ('{"loss": 1}\n', json.dumps({**row, "note": "mine"}) + "\n", "dear diary\n", '{"epoch": 5, "x"'):
        other = tmp_path / str(len(text))
        other.mkdir()
        (other / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"also holds metrics\.jsonl"):
            fit_spec(PPCA_SPEC, SHORT, out=other)
        assert (other / "metrics.jsonl").read_text() == text


def test_metrics_of_another_run_stay_while_it_is_replaced(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit_spec(PPCA_SPEC, SHORT, out=out, on_epoch=stop_after(2))
    interrupted = (out / "metrics.jsonl").read_bytes()

    def compare(epoch, state):
        assert (out / "metrics.jsonl").read_bytes() == interrupted

    fit_spec(PPCA_SPEC, {**SHORT, "svi.epochs": 1}, out=out, on_epoch=compare)
    before, seen = (out / "metrics.jsonl").read_bytes(), []

    def look(epoch, state):
        seen.append((out / "metrics.jsonl").read_bytes())

    fit_spec(PPCA_SPEC, {**SHORT, "svi.epochs": 2, "svi.checkpoint": "off"}, out=out, force=True, on_epoch=look)
    assert seen == [before, before]
    assert len(lines(out)) == 2


@pytest.fixture
def clock(monkeypatch):
    """A clock on which six seconds pass from one look to the next."""
    now = iter(range(0, 10**6, 6))
    monkeypatch.setattr(_progress.time, "monotonic", lambda: float(next(now)))


def test_a_line_every_ten_seconds(clock):
    said = []
    with _progress.reporting(said.append):
        assert list(_progress.track(range(6), "work: {} steps", 6, note=lambda: ", fine")) == [*range(6)]
    assert said == ["work: 2 of 6 steps, fine, 24 s left", "work: 4 of 6 steps, fine, 12 s left"]
    assert list(_progress.track(range(3), "work {}", 3)) == [0, 1, 2]
    assert len(said) == 2
    with _progress.reporting(said.append):
        list(_progress.track(range(1000, 2000), "{}", 2000, done=1000))
    assert said[2] == "1,002 of 2,000, 1.7 h left"


def test_training_evaluation_and_annealing_tell_how_far_they_are(clock, tmp_path):
    said = []
    x = torch.randn(250, 3, dtype=torch.float64)
    program = PPCA.fit(x, 1).to_vae()
    with _progress.reporting(said.append):
        log_evidence(program, x, 10)
        annealed_importance(program, x[:3], chains=2, temperatures=8, tuning=2)
        history = fit(program, x, epochs=5, progress=False)
    told = [line.partition(":")[0] for line in said]
    assert {"evidence by 10 samples each", "annealing of 3 data", "training"} == set(told)
    first = next(line for line in said if line.startswith("training"))
    assert first == f"training: epoch 2 of 5, bound {history.elbo[1]:.3f} nats per datum, 18 s left"


def test_the_command_line_says_it_off_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(_progress, "EVERY", 0.0)
    options = [part for key, value in SHORT.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    done = CliRunner().invoke(app, ["fit", str(PPCA_SPEC), *options, "--out", str(tmp_path / "run"), "--json"])
    assert "training: epoch 3 of 4, bound -" in done.stderr
    assert "evidence by 5 samples each: 1 of 3 blocks of data, " in done.stderr
    assert json.loads(done.stdout)["train"]["epochs"] == 4


def test_tensorboard_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"Install ppl-vae\[tensorboard\]"):
        tensorboard("board")


def test_tensorboard_gets_each_figure(monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, *given):
            written.append(given)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("board", (), {"SummaryWriter": Writer}))
    x = torch.randn(20, 3)
    history = fit(PPCA.fit(x, 1).to_vae(), x, epochs=2, on_epoch=tensorboard(tmp_path), progress=False)
    assert [value for name, value, _ in written if name == "elbo"] == history.elbo
    assert [epoch for name, _, epoch in written if name == "learning_rate"] == [0, 1]
