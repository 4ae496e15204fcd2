"""The check of a run, the pace of its states, and signals."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ppl_vae.cli import app
from ppl_vae.runs import check_run as module
from ppl_vae.runs import evaluated, pace, run, stops, storage
from ppl_vae.runs.check_run import check_run
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.pace import Pace
from ppl_vae.runs.run import fit_spec

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = {"svi.epochs": 2, "evaluation.samples": 30}
    return fit_spec(MODELS / "ppca.toml", settings, out=tmp_path_factory.mktemp("runs") / "ppca").path


def test_each_file_is_judged_and_so_is_the_machine(finished, tmp_path, monkeypatch):
    checked = check_run(finished)
    assert checked.same_bits
    assert checked.finished
    assert set(checked.files.values()) == {"as written"}
    assert checked.files.keys() == {
        path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()
    }
    twin = tmp_path / "twin"
    shutil.copytree(finished, twin)
    (twin / "report.md").write_text("my notes")
    (twin / ".DS_Store").touch()
    with (twin / "metrics.jsonl").open("a") as file:
        file.write('{"later": 1}\n')
    edited = check_run(twin)
    assert edited.same_bits
    assert {name for name, state in edited.files.items() if state == "edited"} == {"report.md", "metrics.jsonl"}
    assert edited.files[".DS_Store"] == "not of the run"
    assert load_run(twin).report == load_run(finished).report  # notes and the desktop's files do not matter
    assert storage.read_metrics(twin, 2) == storage.read_metrics(finished, 2)
    (twin / "evidence.safetensors").unlink()
    (twin / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"evidence\.safetensors"):
        check_run(twin)
    shutil.copy(finished / "evidence.safetensors", twin)
    assert check_run(twin).damaged == ["report.json"]
    result = CliRunner().invoke(app, ["check", str(twin), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["damaged"] == ["report.json"]
    other = {**module.machine(torch.device("cpu")), "threads": 99}
    monkeypatch.setattr(module, "machine", lambda device: other)
    there = check_run(finished)
    assert not there.same_bits
    assert [line for line in there.differences if line.startswith("threads")] == there.differences
    assert "cannot be expected here: threads" in str(there)


def test_weights_are_written_with_the_mode_of_the_user(finished):
    wanted = 0o666 & ~_umask()
    assert {path.stat().st_mode & 0o777 for path in finished.iterdir() if path.is_file()} == {wanted}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_pace_is_by_time_by_epochs_or_off(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])

    def due(text, length, cost, epochs):
        now[0] = 0.0
        one, kept = Pace(text), []
        for epoch in range(epochs):
            now[0] += length
            if one.is_due():
                kept.append(epoch)
                with one.keeping():
                    now[0] += cost
        return kept

    assert due("off", 100.0, 0.0, 9) == []
    assert due("3 epochs", 1.0, 0.0, 9) == [2, 5, 8]
    assert due("60 s", 25.0, 0.0, 9) == [2, 5, 8]
    assert due("1 min", 100.0, 0.0, 3) == [0, 1, 2]
    assert due("60 s", 30.0, 3.0, 30) == [1, 11, 21]  # at most a hundredth of the time
    for text in ("often", "0 s", "60", "-1 s", "1 epochs ", ""):
        with pytest.raises(ValueError, match="Expected `checkpoint` such as"):
            Pace(text)


def test_a_state_that_cannot_be_kept_does_not_stop_the_training(tmp_path, monkeypatch):
    said, write = [], storage.write_state

    def full(*given, **more):
        monkeypatch.setattr(storage, "write_state", write)
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "write_state", full)
    settings = {"svi.epochs": 3, "evaluation.samples": 30, "svi.checkpoint": "1 epoch"}
    made = fit_spec(MODELS / "ppca.toml", settings, out=tmp_path / "run", say=said.append)
    assert any("after epoch 1 of 3 cannot be kept, and training goes on: No space" in text for text in said)
    assert made.report["train"]["epochs"] == 3
    assert not (made.path / "state.safetensors").exists()


def test_a_program_is_stored_as_it_ran(tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    text = (MODELS / "vae.py").read_text()
    file.write_text(text)
    fit, said = run.fit, []

    def edited(*given, **more):
        file.write_text("raise SystemExit")
        return fit(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", edited)
        settings = {"svi.epochs": 1, "evaluation.samples": 30, "model.hidden": 5}
        made = fit_spec(file, settings, out=tmp_path / "run", say=said.append)
    assert (made.path / "own.py").read_text() == text
    assert said[0] == f"runs the code of {file}"
    assert load_run(made.path, trust_code=True).report == made.report
    with pytest.raises(ValueError, match="own.py to import; it raised SystemExit"):
        fit_spec(file)


def test_a_training_that_fails_keeps_the_last_whole_epoch(tmp_path, monkeypatch):
    fit, said = run.fit, []

    def failing(*given, on_epoch, **more):
        def fail(epoch, state):
            on_epoch(epoch, state)
            if epoch == 1:
                raise ValueError("Expected a finite loss; it turned NaN")

        return fit(*given, on_epoch=fail, **more)

    settings = {"svi.epochs": 3, "evaluation.samples": 30}
    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", failing)
        with pytest.raises(ValueError, match="finite loss"):
            fit_spec(MODELS / "ppca.toml", settings, out=tmp_path / "run", say=said.append)
    assert f"the training failed after epoch 2 of 3; its state is in {tmp_path / 'run'}" in said[-1]
    assert fit_spec(tmp_path / "run").report["train"]["epochs"] == 3


def test_signals_are_held_off_and_raised_once():
    written = []

    def write():
        with stops.held_off():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
            written.append("all")
        written.append("more")

    with pytest.raises(stops.Stopped) as caught, stops.listening():
        write()
    assert written == ["all"]
    assert caught.value.number == signal.SIGUSR1
    with stops.listening():
        with pytest.raises(stops.Stopped):
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)  # the second must wait
        with pytest.raises(stops.Stopped):
            stops.look()  # what was swallowed comes again
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops.listening():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)
