"""Two processes under torchrun against one: the same training, the same evidence, and one run directory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import DIAGNOSTICS, drawing, estimates, exact, rows, trained

from ppl_vae import log_evidence
from ppl_vae.runs.evaluated import evaluate_run

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


SPEC = """
[data]
name = "digits"
[model]
latent = 2
[prior]
family = "StandardNormal"
[likelihood]
family = "Normal"
scale = "shared"
network = { family = "Linear" }
[posterior]
family = "Normal"
network = { family = "Linear" }
[svi]
epochs = 2
[evaluation]
samples = 20
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes of one thread each have come to."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "spec.toml").write_text(SPEC)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    command = [*TORCHRUN, str(HERE / "two_processes.py"), str(folder)]
    before = set(Path("/dev/shm").glob("ppl_vae_*"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = sorted(set(Path("/dev/shm").glob("ppl_vae_*")) - before)
    return {**torch.load(folder / "found.pt", weights_only=False), "folder": folder, "left": left}


def test_without_noise_they_follow_one_process_to_rounding(found):
    for name, options in (("exact", {"epochs": 8, "batch_size": 32, "clip": 1.0}), ("captured", {"epochs": 2})):
        elbo, parameters = trained(exact(), **{"batch_size": 50, **options})
        assert found[name][0] == pytest.approx(elbo, rel=1e-10)
        torch.testing.assert_close(found[name][1], parameters, rtol=1e-8, atol=1e-9)


def test_sums_by_shared_memory_are_those_by_gloo_and_leave_no_file(found):
    assert len(found["sums"]) == 400
    assert all(good for good, _ in found["sums"])
    assert all(used for _, used in found["sums"]) or not Path("/dev/shm").is_dir()
    assert found["left"] == []


def test_with_draws_of_their_own_their_mean_bounds_agree(found):
    alone = torch.tensor([trained(drawing(), epochs=8, batch_size=50, seed=seed)[0][-5:] for seed in range(4)])
    error = alone.std(0)
    assert ((torch.tensor(found["drawn"][0][-5:]) - alone.mean(0)).abs() < 5 * error * (1 + 1 / 4) ** 0.5).all()
    assert found["drawn"][0] != trained(drawing(), epochs=8, batch_size=50)[0]
    assert found["same"]


def test_evidence_that_is_shared_out_is_that_of_one_process(found):
    wanted = log_evidence(drawing(), rows(), 300, seed=4).log_evidence
    torch.testing.assert_close(found["evidence"], wanted, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found["alone"], wanted, rtol=1e-12, atol=0.0)
    assert "64" in found["fails"]


def test_annealing_and_gap_that_are_shared_out_are_those_of_one_process_bit_by_bit(found):
    for name, wanted in estimates(drawing()).items():
        for field, value in vars(wanted).items():
            shared = getattr(found["estimates"][name], field)
            if isinstance(value, str | bool | None):
                assert shared == value
            else:
                torch.testing.assert_close(shared, value, rtol=0, atol=0, equal_nan=True)


def test_what_fails_in_one_process_is_raised_in_the_first(found):
    message, notes = found["odd"]
    assert message == "99 is too much"
    assert "In process 1" in notes[0]
    assert "in model" in notes[0]


def test_a_run_is_evaluated_anew_by_two_processes_as_by_one(found):
    alone = evaluate_run(found["folder"] / "run", diagnostics=DIAGNOSTICS, device="cpu").report
    first, second = found["runs"]
    assert {"reference", "gap"} <= alone.keys()
    assert first["again"] == alone
    assert second["again"] is None


def test_what_they_cannot_do_is_refused(found):
    assert "single process" in found["table"]
    assert "Table" in found["table"]
    assert found["few"] == "Expected at most as many processes as data in a batch, 1; got 2."


def test_the_first_of_two_writes_the_run_and_tells_of_a_mistake(found):
    first, second = found["runs"]
    assert (first["report"]["train"]["processes"], first["report"]["train"]["steps"]) == (2, 30)
    assert first["report"]["test"]["n"] == 297
    assert any("parameters " in text for text in first["said"])
    assert json.loads((found["folder"] / "run" / "report.json").read_text())["train"]["processes"] == 2
    assert "svi.epochs" in first["mistake"]
    assert (second["report"], second["said"], second["mistake"]) == (None, [], "SystemExit(2)")
    assert not (found["folder"] / "other").exists()
