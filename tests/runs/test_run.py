"""Run directories: atomic, self-contained, the same numbers to the bit, and refused by name where they are damaged."""

import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.distributions import MultivariateNormal

from ppl_vae import Target, load_run, load_spec, log_evidence, log_weights
from ppl_vae.programs.linear_models import PPCA
from ppl_vae.runs import evaluated, places, run, storage
from ppl_vae.runs.compare import compare_runs
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import Spec

MODELS = Path(__file__).parents[2] / "models"
SHORT = {"svi.epochs": 3, "evaluation.samples": 30}
PROGRAM = '''
import pathlib, pyro, torch
import pyro.distributions as dist
from pyro.distributions import constraints

pathlib.Path(MARK).touch()

class Odd:
    """No module; its guide learns by pyro.param."""

    def __init__(self, features, latent):
        self.latent = latent
        self.weight = torch.linspace(0.0, 1.0, latent * features).reshape(latent, features)

    def model(self, x):
        scale = pyro.param("scale", torch.tensor(5.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.to(z), scale).to_event(1), obs=x)

    def guide(self, x):
        slope = pyro.param("slope", torch.zeros(self.latent))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) * slope, 1.0).to_event(1))
'''


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    """Single precision, as the command line has it, and no pictures, which test_report.py draws."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of ppca.toml; copied by those who damage it."""
    return fit_spec(MODELS / "ppca.toml", SHORT, out=tmp_path_factory.mktemp("runs") / "ppca")


@pytest.fixture
def twin(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def odd(folder):
    """Write a program file, and give it with the mark that it leaves when it is executed."""
    file, mark = folder / "odd.py", folder / "mark"
    file.write_text(PROGRAM.replace("MARK", repr(str(mark))))
    return file, mark


def tensors(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(report):
    return {**report, "train": {key: value for key, value in report["train"].items() if key != "seconds"}}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_report_json_says_what_can_be_recomputed(finished):
    report, x = finished.report, finished.spec.load_data()
    assert json.loads((finished.path / "report.json").read_text()) == report
    weights = log_weights(finished.program, x.test, 30, seed=0)
    test = report["test"]
    assert (test["n"], test["samples"]) == (297, 30)
    assert test["elbo"]["mean"] == pytest.approx(float(weights.mean(0).mean()), abs=1e-9)
    evidence = weights.logsumexp(0) - math.log(30)
    assert test["log_evidence"]["mean"] == pytest.approx(float(evidence.mean()), abs=1e-9)
    assert test["log_evidence"]["se"] == pytest.approx(float(evidence.std()) / 297**0.5, abs=1e-9)
    assert test["rate"] + test["distortion"] == pytest.approx(-test["elbo"]["mean"], abs=1e-9)
    assert test["bits_per_dim"] == pytest.approx(-float(evidence.mean()) / 64 / math.log(2))
    train = log_weights(finished.program, {"x": x.train["x"][:1000]}, 10, seed=0)
    assert report["train"]["elbo"] == pytest.approx(float(train.mean()), abs=1e-9)
    assert (report["train"]["epochs"], report["train"]["steps"]) == (3, 45)
    vae = copy.deepcopy(finished.program).double()
    weight = next(p for p in vae.likelihood.parameters() if p.shape == (64, 10))
    vae.requires_grad_(False)
    origin = vae.likelihood(torch.zeros(1, 10, dtype=torch.float64))
    covariance = weight @ weight.T + origin.variance[0, 0] * torch.eye(64, dtype=torch.float64)
    exact = MultivariateNormal(origin.mean[0], covariance).log_prob(x.test["x"].double()).mean()
    assert report["exact"]["log_evidence"] == pytest.approx(float(exact), rel=1e-6)
    assert report["exact"]["gap"] == pytest.approx(report["exact"]["posterior_kl"], abs=1e-6)
    assert report["exact"]["gap"] == pytest.approx(float(exact) - test["elbo"]["mean"], abs=0.5)
    baseline = PPCA.fit(x.train["x"].double(), 10).log_evidence(x.test["x"].double()).mean()
    assert report["baseline"]["ppca"]["log_evidence"] == pytest.approx(float(baseline), abs=1e-9)


def test_a_run_loads_from_anywhere_and_gives_the_same_numbers_to_the_bit(finished, twin, monkeypatch):
    def absent(*given, **more):
        raise AssertionError("read the data")

    torch.set_default_dtype(torch.float64)  # the run's own precision counts
    with monkeypatch.context() as patch:
        patch.setattr(Spec, "load_data", absent)
        loaded = load_run(twin)
    assert loaded.spec == finished.spec
    assert loaded.report == finished.report
    assert same(loaded.program.state_dict(), tensors(finished.path))
    x = finished.spec.load_data().test
    again = log_evidence(loaded.program, x, 30, seed=0).summary()
    known = finished.report["test"]["log_evidence"]
    assert {**again["log_evidence"], "jackknife": known["jackknife"]} == known
    assert again["elbo"] == finished.report["test"]["elbo"]
    assert evaluate_run(twin).report == finished.report
    assert evaluate_run(twin, samples=50).report["test"]["samples"] == 50
    assert "--samples 50" in (twin / "report.md").read_text()


def test_the_spec_of_a_run_reproduces_it(finished, tmp_path):
    again = fit_spec(finished.path / "spec.toml", out=tmp_path / "again")
    assert again.spec == finished.spec
    assert same(tensors(again.path), tensors(finished.path))
    assert timeless(again.report) == timeless(finished.report)


@pytest.mark.parametrize(
    "settings",
    [
        {"svi.schedule": "constant", "svi.particles": 2, "svi.epochs": 5},  # in the end from a captured graph
        {"svi.schedule": "one-cycle", "svi.keep": "best", "data.validation_fraction": 0.2},
        {"svi.schedule": "cosine", "svi.clip": 1.0, "data.dequantization": "uniform", "svi.precision": "bfloat16"},
    ],
    ids=lambda settings: settings["svi.schedule"],
)
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_an_interrupted_run_goes_on_to_the_same_numbers_to_the_bit(settings, when, tmp_path, monkeypatch):
    settings = {**SHORT, **settings}
    monkeypatch.setattr("ppl_vae.programs.precision.LEAST", 1)
    whole = fit_spec(MODELS / "ppca.toml", settings, out=tmp_path / "whole")
    assert whole.report["spec"]["svi"]["precision"] == settings.get("svi.precision", "full")
    part = tmp_path / "part"

    def stopped(*given, **more):
        raise KeyboardInterrupt

    def stopping(*given, on_epoch, **more):
        def stop(epoch, state):
            on_epoch(epoch, state)
            if epoch == 1:
                raise KeyboardInterrupt

        return fit(*given, on_epoch=stop, **more)

    fit = run.fit
    with monkeypatch.context() as patch:
        patch.setattr(*((run, "fit", stopping) if when == "training" else (evaluated, "evaluate", stopped)))
        with pytest.raises(KeyboardInterrupt, match=f"Go on with: ppl-vae fit {part}"):
            fit_spec(MODELS / "ppca.toml", settings, out=part)
    kept = {path.name for path in part.iterdir()}
    assert kept == {"spec.toml", "metrics.jsonl", "model.safetensors", "state.safetensors", "manifest.json"}
    assert len((part / "metrics.jsonl").read_text().splitlines()) == (
        2 if when == "training" else settings["svi.epochs"]
    )
    with pytest.raises(ValueError, match="was interrupted. Go on with: ppl-vae fit"):
        load_run(part)
    with pytest.raises(ValueError, match="Expected neither --set, --from nor --out"):
        fit_spec(part, {"svi.epochs": 9})
    resumed = fit_spec(part)
    assert resumed.path == part
    assert same(tensors(part), tensors(whole.path))
    assert timeless(resumed.report) == timeless(whole.report)
    assert not (part / "state.safetensors").exists()
    with pytest.raises(ValueError, match="is a finished run"):
        fit_spec(part)


def test_a_run_goes_on_from_within_a_long_epoch_to_the_same_bits(tmp_path, monkeypatch):
    """The state is kept after a step of the first epoch and one of the second, and the run killed a step later."""
    changes = {**SHORT, "svi.batch_size": 200, "svi.checkpoint": "1 s"}
    whole, said, steps = fit_spec(MODELS / "ppca.toml", changes, out=tmp_path / "whole"), [], []

    def due(self):
        steps.append(len(steps))
        if len(steps) in (4, 13):
            raise KeyboardInterrupt
        return len(steps) in (3, 12)

    with monkeypatch.context() as patch:
        patch.setattr(run.Pace, "is_due_within", due)
        with pytest.raises(KeyboardInterrupt, match=r"after epoch 0 of 3 and 3 steps; its state is in .* Go on with"):
            fit_spec(MODELS / "ppca.toml", changes, out=tmp_path / "part", say=said.append)
        assert any("after epoch 0 of 3 and 3 steps and every 1 s" in text for text in said)
        with pytest.raises(KeyboardInterrupt, match="after epoch 1 of 3 and [0-9] steps"):
            fit_spec(tmp_path / "part")
    resumed = fit_spec(tmp_path / "part", say=said.append)
    assert "goes on after epoch 1 of 3 and" in said[-2]
    assert same(tensors(resumed.path), tensors(whole.path))
    assert timeless(resumed.report) == timeless(whole.report)


def test_an_interrupt_in_the_first_epoch_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", stopped)
    with pytest.raises(KeyboardInterrupt, match="nothing was kept"):
        fit_spec(MODELS / "ppca.toml", SHORT, out=tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_fault_in_the_evaluation_does_not_lose_the_training(tmp_path, monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("a fault of ours")

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(evaluated, "evaluate", broken)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            fit_spec(MODELS / "ppca.toml", SHORT, out=tmp_path / "run", say=said.append)
    assert "Go on with: ppl-vae fit" in said[-1]
    assert fit_spec(tmp_path / "run").report["train"]["epochs"] == 3


def test_a_full_disk_leaves_nothing_new_and_the_old_whole(finished, twin, tmp_path, monkeypatch):
    def full(*given, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(twin)
    for module, name in ((safetensors.torch, "save"), (os, "posix_fallocate")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            for source, out in ((MODELS / "ppca.toml", tmp_path / "new"), (MODELS / "ppca.toml", twin)):
                with pytest.raises(OSError, match="No space") as caught:
                    fit_spec(source, SHORT, out=out, force=True)
                assert caught.value.errno == errno.ENOSPC
            if name == "save":
                with pytest.raises(OSError, match="No space"):
                    evaluate_run(twin)
        assert contents(twin) == before
        assert [path.name for path in tmp_path.iterdir()] == [twin.name]


def test_a_failed_rename_puts_the_old_directory_back(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.path, tmp_path / "run")
    before = contents(tmp_path / "run")
    rename = Path.rename

    def failing(self, target):
        if "partial" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with places.claimed(tmp_path / "run") as place:
        monkeypatch.setattr(places, "_exchanged", lambda *given: False)  # a file system without exchange
        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output"), place.replacing() as partial:
            (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert contents(tmp_path / "run") == before


def test_a_finished_run_is_overwritten_by_force_only(twin, tmp_path, monkeypatch):
    before = contents(twin)
    with pytest.raises(ValueError, match="holds a finished run. Choose another, or give --force"):
        fit_spec(MODELS / "ppca.toml", SHORT, out=twin)
    assert contents(twin) == before
    assert (
        fit_spec(MODELS / "ppca.toml", {**SHORT, "svi.epochs": 1}, out=twin, force=True).report["train"]["epochs"] == 1
    )
    monkeypatch.chdir(tmp_path)
    for name in ("ppca", "ppca-2"):
        assert fit_spec(MODELS / "ppca.toml", {**SHORT, "svi.epochs": 1}).path == Path("runs") / name


def project(folder):
    """A person's project, with a spec of the name that a run's spec has."""
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / "thesis.tex").touch()
    shutil.copy(MODELS / "ppca.toml", folder / "spec.toml")


@pytest.mark.parametrize("force", [False, True])
def test_a_project_with_a_spec_is_no_run_to_replace(force, tmp_path, monkeypatch):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"also holds \.git, spec\.toml, thesis\.tex\. Nothing there was changed"):
        fit_spec("spec.toml", SHORT, out=".", force=force)
    assert contents(tmp_path) == before
    for name in (".git", "thesis.tex"):
        shutil.rmtree(name, ignore_errors=True)
        Path(name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"also holds spec\.toml\."):  # a person's own, and no run
        fit_spec("spec.toml", SHORT, out=".", force=force)


def strangers(folder):
    """What a person may have put into a run, by the name that the refusal gives."""
    return {
        "notes.txt": lambda: (folder / "notes.txt").write_text("mine"),
        "notes": lambda: (folder / "notes").mkdir(),
        "figures/mine.png": lambda: (folder / "figures" / "mine.png").touch(),
        "report.json": lambda: (
            (folder / "report.json").rename(folder.parent / "r")
            and (folder / "report.json").symlink_to(folder.parent / "r")
        ),
        "other.py": lambda: (folder / "other.py").touch(),
        ".git": lambda: (folder / ".git").mkdir(),
    }


@pytest.mark.parametrize("name", strangers(Path()))
def test_a_run_that_holds_anything_else_is_not_replaced(name, twin):
    (twin / "figures").mkdir(exist_ok=True)
    strangers(twin)[name]()
    before = contents(twin)
    with pytest.raises(ValueError, match=f"also holds {re.escape(name)}"):
        fit_spec(MODELS / "ppca.toml", SHORT, out=twin, force=True)
    with pytest.raises(ValueError, match=f"(also holds|lacks) {re.escape(name)}"):
        evaluate_run(twin)
    with pytest.raises(ValueError, match=f"also holds {re.escape(name)}"), places.claimed(twin):
        raise AssertionError
    assert contents(twin) == before


def test_what_is_put_into_a_run_while_it_is_replaced_stays(twin):
    match = r"also holds late\.txt.* The new run is in .*elsewhere-2\."
    with places.claimed(twin) as place, pytest.raises(ValueError, match=match), place.replacing() as partial:
        ((twin / "late.txt").write_text("mine"), (partial / "spec.toml").write_text("new"))
    assert (twin / "late.txt").read_text() == "mine"
    assert (twin.parent / "elsewhere-2" / "spec.toml").read_text() == "new"
    assert {path.name for path in twin.parent.iterdir()} == {twin.name, "elsewhere-2"}


def test_another_run_in_the_same_place_is_not_replaced(finished, twin):
    """As when somebody copies a run there, which asks for no lock."""
    with places.claimed(twin) as place:
        shutil.rmtree(twin)
        shutil.copytree(finished.path, twin)
        storage.seal(twin, {"other": 1})
        before = contents(twin)
        with pytest.raises(ValueError, match="to be as it was at the start"), place.replacing() as partial:
            (partial / "spec.toml").write_text("new")
    assert contents(twin) == before


FILES = ["spec.toml", "metrics.jsonl", "model.safetensors", "report.json", "evidence.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "half", "empty", "noise"])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_run_is_refused_by_the_name_of_the_file(name, damage, finished, twin):
    file = twin / name
    if damage == "missing":
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(256)) * 4}[damage])
    before = contents(twin)
    with pytest.raises(ValueError, match=name.replace(".", "\\.")):
        compare_runs([finished.path, twin]) if name == "evidence.safetensors" else evaluate_run(twin)
    assert contents(twin) == before


def test_a_spec_cut_between_tables_is_refused(twin):
    text = (twin / "spec.toml").read_text()
    (twin / "spec.toml").write_text(text[: text.index("[svi]")])
    with pytest.raises(ValueError, match="to say what was fitted; it was changed or cut"):
        load_run(twin)


def as_format_1(folder):
    """Make a run what it would be in format 1: without manifest, names of data sets and newer keys."""
    file, text = folder / "model.safetensors", (folder / "spec.toml").read_text()
    (folder / "spec.toml").write_text(text.replace("particles = 1\n", "").replace('checkpoint = "60 s"\n', ""))
    metadata = run.storage.read_metadata(file)
    fitted = json.loads(metadata["spec"])
    assert fitted["svi"].pop("particles") == 1
    assert fitted["svi"].pop("checkpoint") == "60 s"
    fitted["data"].pop("name", None)
    older = {**metadata, "format_version": "1", "spec": json.dumps(fitted, sort_keys=True)}
    safetensors.torch.save_file(tensors(folder), file, older)
    (folder / "manifest.json").unlink()


def test_a_run_of_format_1_that_is_older_than_a_key_of_its_spec_loads_and_becomes_format_2(twin, finished):
    as_format_1(twin)
    assert storage.read_manifest(twin) == {}
    loaded = load_run(twin)
    assert (loaded.spec.svi.particles, loaded.spec.svi.checkpoint) == (1, "60 s")
    assert same(loaded.program.state_dict(), tensors(twin))
    text = (twin / "spec.toml").read_text()
    (twin / "spec.toml").write_text(text.replace("batch_size = 100", "batch_size = 99"))
    with pytest.raises(ValueError, match="spec.toml to say what was fitted"):
        load_run(twin)
    (twin / "spec.toml").write_text(text)
    assert evaluate_run(twin).report["test"] == finished.report["test"]
    assert storage.read_manifest(twin)["files"].keys() >= {"report.json", "spec.toml", "model.safetensors"}
    assert same(load_run(twin).program.state_dict(), tensors(twin))


def test_a_run_without_its_manifest_is_refused(twin):
    (twin / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"lacks manifest\.json"):
        load_run(twin)


@pytest.mark.parametrize(("number", "match"), [("3", "newer ppl_vae: upgrade"), (None, "not written by ppl_vae")])
def test_other_formats_are_refused(number, match, twin):
    metadata = {} if number is None else {"format_version": number}
    safetensors.torch.save_file(tensors(twin), twin / "model.safetensors", metadata)
    (twin / "manifest.json").unlink()
    with pytest.raises(ValueError, match=match):
        load_run(twin)


def test_foreign_places_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, match in ((tmp_path, "holds none"), (tmp_path / "file", "is a file"), (tmp_path / "no", "is missing")):
        with pytest.raises(ValueError, match=match):
            load_run(path)


def test_data_that_changed_are_refused_and_moved_data_found(tmp_path):
    x = torch.randn(40, 3, dtype=torch.float64)
    file = tmp_path / "table.csv"

    def write(rows):
        file.write_text("a,b,c\n" + "".join(",".join(map(str, row)) + "\n" for row in rows.tolist()))

    write(x)
    settings = {**SHORT, "data.name": str(file), "model.latent": 2}
    made = fit_spec(MODELS / "ppca.toml", settings, out=tmp_path / "run")
    assert made.report["data"]["features"] == 3
    write(x + 1)
    with pytest.raises(ValueError, match="was fitted to; table.csv has changed since"):
        evaluate_run(made.path)
    write(x)
    (tmp_path / "moved").mkdir()
    file.rename(tmp_path / "moved" / "table.csv")
    assert same(load_run(made.path).program.state_dict(), tensors(made.path))
    with pytest.raises(ValueError, match=r"spec\.toml.*got no such file"):
        evaluate_run(made.path)
    spec = made.path / "spec.toml"
    spec.write_text(spec.read_text().replace(str(file), str(tmp_path / "moved" / "table.csv")))
    assert evaluate_run(made.path).report["test"] == made.report["test"]


def test_the_program_of_an_interrupted_run_runs_only_on_trust(tmp_path, monkeypatch):
    file, mark = odd(tmp_path)

    def stopped(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluated, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt, match="Go on with: ppl-vae fit .* --trust-code"):
            fit_spec(f"{file}:Odd", {**SHORT, "model.latent": 2}, out=tmp_path / "theirs")
    shutil.move(tmp_path / "theirs", tmp_path / "downloaded")
    mark.unlink()
    before = contents(tmp_path / "downloaded")
    for source in ("downloaded", "downloaded/spec.toml"):
        with pytest.raises(ValueError, match="without --trust-code"):
            fit_spec(tmp_path / source, out=None if source == "downloaded" else tmp_path / "new")
    assert not mark.exists()
    assert contents(tmp_path / "downloaded") == before
    assert fit_spec(tmp_path / "downloaded", trust_code=True).report["train"]["epochs"] == 3
    assert mark.exists()


def test_a_programs_own_copy_is_used_and_asks_for_trust(tmp_path):
    file, mark = odd(tmp_path)
    made = fit_spec(f"{file}:Odd", {**SHORT, "model.latent": 2}, out=tmp_path / "run")
    assert made.spec.model.program == f"{tmp_path / 'run' / 'odd.py'}:Odd"
    file.unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    mark.unlink()
    with pytest.raises(ValueError, match="without --trust-code"):
        load_run(tmp_path / "moved")
    assert not mark.exists()
    again = evaluate_run(tmp_path / "moved", trust_code=True)
    assert mark.exists()
    assert again.report["test"] == made.report["test"]
    assert {"scale", "slope"} == vars(again.program)["_ppl_vae_params"]["params"].keys()
    mark.unlink()
    own = tmp_path / "moved" / "odd.py"
    own.write_text(own.read_text() + "\n# changed\n")
    with pytest.raises(ValueError, match=r"odd\.py.*it is changed"):
        load_run(tmp_path / "moved", trust_code=True)
    own.unlink()
    with pytest.raises(ValueError, match=r"odd\.py.*it is missing"):
        load_run(tmp_path / "moved", trust_code=True)
    assert not mark.exists()


MODULE = """
import pyro, torch
import pyro.distributions as dist
from ppl_vae.program import unique_name  # where every copy of a program in a run imports it from

class Own(torch.nn.Module):
    def __init__(self, features, latent, *, hidden: int = 3):
        super().__init__()
        self.decoder = torch.nn.Linear(latent, features)
        self.encoder = torch.nn.Linear(features, latent)

    def model(self, x):
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.decoder.in_features), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 5.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))
"""


def test_a_run_of_format_2_loads(tmp_path):
    """What lies in a run directory may grow; what lies there now stays readable."""
    (tmp_path / "own.py").write_text(MODULE)
    made = fit_spec(tmp_path / "own.py", {**SHORT, "model.latent": 2, "model.hidden": 4}, out=tmp_path / "run")
    text = [path.name for path in made.path.iterdir() if path.suffix in (".toml", ".json", ".jsonl", ".md", ".py")]
    assert sorted(text) == ["manifest.json", "metrics.jsonl", "own.py", "report.json", "report.md", "spec.toml"]
    names = {"decoder.weight", "decoder.bias", "encoder.weight", "encoder.bias"}
    assert tensors(made.path).keys() == names
    metadata = storage.read_metadata(made.path / "model.safetensors")
    assert metadata.keys() == {"format_version", "ppl_vae", "spec", "program", "constraints"}
    assert (metadata["format_version"], metadata["constraints"]) == ("2", "{}")
    assert json.loads(metadata["spec"])["model"] == {"latent": 2, "hidden": 4}
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest.keys() == {"digest", "format", "ppl_vae", "files", "trained", "evaluated"}
    assert manifest["files"].keys() == {path.name for path in made.path.glob("*.*")} - {"manifest.json"}
    for name, (size, sha) in manifest["files"].items():
        held = (made.path / name).read_bytes()
        assert (size, sha) == (len(held), hashlib.sha256(held).hexdigest())
    assert manifest["evaluated"] == manifest["trained"][0]
    assert manifest["evaluated"].keys() >= {"processor", "threads", "torch", "device"}
    line = json.loads((made.path / "metrics.jsonl").read_text().splitlines()[0])
    assert line.keys() >= {"epoch", "elbo", "validation", "learning_rate", "seconds"}
    assert line["validation"] is None
    evidence = storage.read_tensors(made.path / "evidence.safetensors")
    assert {"log_evidence", "elbo", "mc_se", "bias", "ess", "pareto_k"} <= evidence.keys()
    again = load_run(made.path, trust_code=True)
    assert (again.spec.to_dict(), again.report) == (made.spec.to_dict(), made.report)
    assert same(again.program.state_dict(), made.program.state_dict())


def test_a_program_is_a_spec_on_the_digits():
    spec = load_spec(MODELS / "vae.py", {"svi.epochs": 2})
    assert (spec.data.name, spec.model.latent, spec.svi.epochs) == ("digits", 10, 2)
    assert load_spec(f"{MODELS / 'vae.py'}:VAE", {"model.latent": 3, "model.hidden": 7}).model.hidden == 7
    assert load_spec(MODELS / "state_space.py").model.latent is None
    with pytest.raises(ValueError, match=r"Expected a program at .*got no such file. Did you mean .*vae\.py"):
        load_spec(MODELS / "vea.py")


def test_a_table_is_judged_on_its_own_data_and_says_so(finished, tmp_path):
    settings = {**SHORT, "posterior.network": {"family": "Table"}, "posterior.scale": "network"}
    made = fit_spec(MODELS / "ppca.toml", settings, out=tmp_path / "table")
    assert made.report["data"]["part"] == "train"
    assert made.report["test"]["n"] == 1500
    x = made.spec.load_data().train
    known = log_weights(made.program, x, 30, seed=0).mean()
    assert made.report["test"]["elbo"]["mean"] == pytest.approx(float(known), abs=1e-9)
    assert made.report["train"]["elbo"] == made.report["test"]["elbo"]["mean"]
    text = (made.path / "report.md").read_text()
    assert "All figures are of the training data" in text
    assert "| ELBO | -" in text  # in one column alone
    with pytest.raises(ValueError, match="the part that was evaluated is test .* and train"):
        compare_runs([finished.path, made.path])


def test_differences_are_paired(finished, twin, tmp_path):
    other = fit_spec(MODELS / "ppca.toml", {**SHORT, "svi.epochs": 1}, out=tmp_path / "other")
    compared = compare_runs([finished.path, other.path, twin])
    x = finished.spec.load_data().test
    a, b = (log_evidence(one.program, x, 30).log_evidence for one in (finished, other))
    first = compared["differences"][0]
    assert set(first) == {"a", "b", "mean", "se"}
    assert (first["a"], first["b"]) == (str(finished.path), str(other.path))
    assert first["mean"] == pytest.approx(float((a - b).mean()), abs=0.05)
    assert first["se"] < float(torch.stack([a.std(), b.std()]).norm()) / 297**0.5
    assert [one["mean"] for one in compared["differences"]][1] == 0
    assert compared["differences"][2]["mean"] == pytest.approx(-first["mean"])
    assert [one["path"] for one in compared["runs"]] == [str(finished.path), str(other.path), str(twin)]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"data.seed": 1}, "data.seed is 0 .* and 1"),
        ({"data.scaling": "unit"}, 'data.scaling is "none" .* and "unit"'),
        ({"data.dequantization": "uniform"}, "data.dequantization"),
        (
            {"data.binarization": "static", "likelihood": {"family": "Bernoulli", "network": {"family": "Linear"}}},
            "the likelihood's figure is a density .* and a probability mass",
        ),
    ],
    ids=str,
)
def test_figures_of_another_measure_do_not_compare(settings, match, finished, twin):
    report = json.loads((twin / "report.json").read_text())
    spec = load_spec(MODELS / "ppca.toml", settings)
    data = spec.load_data()
    report["data"]["protocol"] = data.protocol
    report["data"]["measure"] = evaluated.measure(Target(spec.build(data), data.test))
    (twin / "report.json").write_text(json.dumps(report))
    (twin / "manifest.json").unlink()
    storage.seal(twin, {})
    with pytest.raises(ValueError, match=match):
        compare_runs([finished.path, twin])


@pytest.mark.parametrize("data", [-0.0, None, [], {}, "protocol"], ids=str)
def test_a_report_whose_data_are_of_another_kind_is_refused(data, tmp_path):
    parts = dict.fromkeys(("spec", "train", "test", "exact", "baseline"), {})
    (tmp_path / "report.json").write_text(json.dumps({**parts, "data": data}))
    with pytest.raises(ValueError, match="report.json to be a report"):
        storage.read_report(tmp_path)


def test_fewer_than_two_runs_do_not_compare(finished):
    with pytest.raises(ValueError, match="two or more runs"):
        compare_runs([finished.path])


def test_a_constraint_that_no_file_can_name_is_refused(tmp_path):
    file, _ = odd(tmp_path)
    file.write_text(file.read_text().replace("constraints.positive", "constraints.greater_than(0.5)"))
    with pytest.raises(ValueError, match=r"Expected a constraint that a file can name for pyro.param\('scale'\)"):
        fit_spec(file, SHORT, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_state_round_trips_without_pickles(tmp_path):
    state = {"a": [torch.arange(3), {"b": math.inf, 1: None}], "c": (True, 0.1)}
    storage.write_state(state, tmp_path / "state")
    again = storage.read_state(tmp_path / "state")
    assert torch.equal(again["a"][0], state["a"][0])
    assert (again["a"][1], again["c"]) == (state["a"][1], [True, 0.1])
    storage.write_tensors({"a": torch.zeros(1)}, tmp_path / "other")
    for name in ("other", "none"):
        with pytest.raises(ValueError, match=name):
            storage.read_state(tmp_path / name)


def test_a_tied_parameter_is_saved(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    learned, metadata = storage.learned_state(module)
    storage.write_tensors(learned, tmp_path / "w", **metadata)
    other = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    other[1].weight = other[0].weight
    storage.load_learned_state(other, tmp_path / "w")
    assert torch.equal(other[1].weight, module[0].weight)
    with pytest.raises(ValueError, match="to hold this program's weights"):
        storage.load_learned_state(torch.nn.Linear(3, 3), tmp_path / "w")


NAMED = """
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn


class Named(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.network = nn.Linear(1, features)

    def model(self, x):
        pyro.module(f"named {id(self)}", self)
        scale = pyro.param(f"scale {id(self)}", lambda: torch.full((3,), 3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.network(z), scale).to_event(1), obs=x)

    def guide(self, x):
        slope = pyro.param(f"slope {id(self.network)}", lambda: torch.zeros(x.shape[-1]))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x @ slope).unsqueeze(-1), 0.5).to_event(1))
"""


def test_what_is_named_by_an_id_lasts_through_copies_and_files(tmp_path):
    z = torch.randn(90, 1)
    np.save(tmp_path / "x.npy", (z + 0.3 * torch.randn(90, 3)).numpy())
    (tmp_path / "named.py").write_text(NAMED)
    svi = "epochs = 60\nbatch_size = 24\nlearning_rate = 0.05"
    text = f'data.name = "x.npy"\nmodel.program = "named.py:Named"\n[svi]\n{svi}\n[evaluation]\nsamples = 200\n'
    (tmp_path / "named.toml").write_text(text)
    torch.set_default_dtype(torch.float32)
    run = fit_spec(tmp_path / "named.toml", out=tmp_path / "run")
    scale = next(value for name, value in run.params.items() if name.startswith("scale"))
    assert scale.max() < 1.0  # learned, from 3
    x = run.spec.load_data().test["x"]
    known = log_evidence(run.program, x, 200)
    assert known.rounding.max() < 1e-3  # the copy in double precision has what was learned
    again = load_run(tmp_path / "run", trust_code=True)
    assert torch.equal(log_evidence(again.program, x, 200).log_evidence, known.log_evidence)
    taken = fit_spec(tmp_path / "named.toml", {"svi.start": run.path, "svi.epochs": 1}, out=tmp_path / "next")
    assert taken.report["train"]["start"]["new"] == []


def test_runs_are_frozen(finished):
    with pytest.raises(dataclasses.FrozenInstanceError):
        finished.path = Path()
