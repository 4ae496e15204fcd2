"""Networks of one's own in a spec: their keys, their sizes, their copies in a run, and their buffers."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae import load_run, load_spec
from ppl_vae.data import load
from ppl_vae.networks import Conv
from ppl_vae.runs import evaluated, run, storage
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.schema import json_schema
from ppl_vae.runs.spec import Spec

NET = """
import pathlib
import torch
from torch import nn

pathlib.Path({mark!r}).touch()

class Down(nn.Module):
    def __init__(self, shape, outputs, *, width: int, act: str = "relu"):
        super().__init__()
        self.shape = shape
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
            nn.Linear(9 * width, outputs),
        )

    def forward(self, x):
        return self.layers(x.reshape(len(x), 1, *self.shape))  # takes one batch dimension alone

class Up(nn.Module):
    def __init__(self, context, shape, *, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(context, 16 * width), nn.BatchNorm1d(16 * width), nn.ReLU(), nn.Unflatten(1, (width, 4, 4)),
            nn.ConvTranspose2d(width, 1, 2, stride=2),
        )

    def forward(self, z):
        return self.layers(z)
"""
TEXT = """
[data]
name = "digits"
binarization = "threshold"
[model]
latent = 2
[prior]
family = "StandardNormal"
[likelihood]
family = "Bernoulli"
network = { program = "net.py:Up" }
[posterior]
family = "Normal"
network = { program = "net.py:Down", width = 3 }
[svi]
epochs = 3
[evaluation]
samples = 30
"""


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    """Single precision, as the command line has it, no pictures, and few data."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
    whole = load("digits", binarization="threshold")
    few = {part: {key: value[:200] for key, value in getattr(whole, part).items()} for part in ("train", "test")}
    monkeypatch.setattr(Spec, "load_data", lambda spec: dataclasses.replace(whole, **few))


def write(folder: Path, text: str = TEXT) -> Path:
    (folder / "net.py").write_text(NET.format(mark=str(folder / "mark")))
    (folder / "spec.toml").write_text(text)
    return folder / "spec.toml"


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    return {**report, "train": {key: value for key, value in report["train"].items() if key != "seconds"}}


def test_a_spec_names_networks_of_ones_own(tmp_path):
    spec = load_spec(write(tmp_path))
    assert spec.posterior.network.model_dump() == {"program": f"{tmp_path / 'net.py'}:Down", "width": 3, "act": "relu"}
    assert spec.likelihood.network.width == 4
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "spec.toml").write_text(spec.to_toml())
    assert load_spec(tmp_path / "again" / "spec.toml") == spec
    program = spec.build()
    assert program.posterior.network.layers[-1].out_features == 4
    assert program.likelihood.network.layers[0].in_features == 2
    assert "posterior 4" not in str(spec.check(spec.load_data(), program))
    with pytest.raises(ValueError, match="net.py:Down without --trust-code") as caught:
        load_spec(tmp_path / "spec.toml", trust_code=False)
    assert "net.py:Up without --trust-code" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"posterior.network": {"program": "net.py:Down", "widht": 3, "width": 3}},
         "posterior.network.widht: Expected program, width, act; got the unknown key widht = 3. Did you mean width?"),
        ({"posterior.network": {"program": "net.py:Down"}}, "network.width: Expected a whole number; got none."),
        ({"posterior.network.width": "3"}, 'posterior.network.width: Expected a whole number; got "3".'),
        ({"posterior.network.program": "net.py:Donw"}, "posterior.network.program: Expected"),
        ({"posterior.network.program": "net.py"}, "define the class after the colon as a torch module; it has Down"),
        ({"posterior.network.program": "none.py:Down"}, "Expected a network as file.py:Class"),
        ({"prior": {"family": "Normal", "network": {"program": "net.py:Up"}}}, "network.family: Expected Conv, Free"),
    ],
)  # fmt: skip
def test_its_keys_are_its_constructors(overrides, expected, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_spec(write(tmp_path), overrides)
    assert expected in str(caught.value)


def test_strange_positional_parameters_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Odd(nn.Linear):\n    def __init__(self, depth): ...\n"
    )
    with pytest.raises(ValueError, match="positional parameters of Odd among context, outputs, shape; got depth"):
        load_spec(tmp_path / "spec.toml", {"posterior.network": {"program": "net.py"}})


@pytest.mark.parametrize(
    ("role", "body", "match"),
    [
        (
            "likelihood",
            "return self.linear(x[:, : 2 if len(x) in (2, 200) else 1])",
            "also runs with dims of particles",
        ),
        ("posterior", "return self.linear(x)[:, :3]", r"answer 4 parameters for Normal\(2,\) .*; got 3 for each"),
        ("posterior", "return self.linear(x)[:1]", r"Normal\(2,\) for each of 200 contexts; got 4 for each of 1"),
        ("posterior", "return self.missing(x)", "posterior.network.program: Expected the network of .*net.py .*line 8"),
    ],
)
def test_a_network_that_does_not_fit_is_found_by_check(role, body, match, tmp_path):
    write(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, context, outputs):\n"
        "        super().__init__()\n        self.linear = torch.nn.Linear(context, outputs)\n\n"
        f"    def forward(self, x):\n        {body}\n"
    )
    networks = {f"{each}.network": {"family": "MLP", "hidden": [4]} for each in ("likelihood", "posterior")}
    spec = load_spec(tmp_path / "spec.toml", {**networks, f"{role}.network": {"program": "net.py"}})
    data = spec.load_data()
    with pytest.raises(ValueError, match=match):
        spec.check(data, spec.build(data))


def test_a_run_keeps_its_networks_and_asks_for_trust(tmp_path):
    made = fit_spec(write(tmp_path), out=tmp_path / "run")
    own = tmp_path / "run" / "net.py"
    assert made.spec.programs == {"likelihood.network": f"{own}:Up", "posterior.network": f"{own}:Down"}
    assert not made.program.training
    (tmp_path / "net.py").unlink()
    (tmp_path / "mark").unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(ValueError, match="without --trust-code"):
        load_run(tmp_path / "moved")
    with pytest.raises(ValueError, match="without --trust-code"):
        fit_spec(tmp_path / "moved" / "spec.toml", out=tmp_path / "new")
    assert not (tmp_path / "mark").exists()
    again = load_run(tmp_path / "moved", trust_code=True)
    assert (tmp_path / "mark").exists()
    assert same(again.program.state_dict(), made.program.state_dict())
    assert not again.program.training
    assert any("running_mean" in name for name in again.program.state_dict())
    assert timeless(evaluate_run(tmp_path / "moved", trust_code=True).report)["test"] == made.report["test"]
    copy = tmp_path / "moved" / "net.py"
    copy.write_text(copy.read_text() + "# changed\n")
    with pytest.raises(ValueError, match=r"net\.py.*it is changed"):
        load_run(tmp_path / "moved", trust_code=True)
    copy.unlink()
    with pytest.raises(ValueError, match=r"net\.py.*it is missing"):
        load_run(tmp_path / "moved", trust_code=True)


def test_two_files_of_one_name_are_both_kept(tmp_path):
    write(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "net.py", tmp_path / "other" / "net.py")
    with (tmp_path / "other" / "net.py").open("a") as file:
        file.write("# another\n")
    spec = load_spec(tmp_path / "spec.toml", {"posterior.network.program": "other/net.py:Down", "svi.epochs": 1})
    made = fit_spec(spec, out=tmp_path / "run")
    files = {place: Path(reference.partition(":")[0]).name for place, reference in made.spec.programs.items()}
    assert files == {"likelihood.network": "net.py", "posterior.network": "posterior_net.py"}
    assert (made.path / "posterior_net.py").read_text().endswith("# another\n")
    assert not (made.path / "net.py").read_text().endswith("# another\n")
    assert len(storage.read_metadata(made.path / "model.safetensors")["program"].split()) == 2
    assert same(load_run(made.path, trust_code=True).program.state_dict(), made.program.state_dict())
    (made.path / "net.py").rename(made.path / "third.py")
    (made.path / "posterior_net.py").rename(made.path / "net.py")
    (made.path / "third.py").rename(made.path / "posterior_net.py")
    with pytest.raises(ValueError, match=r"net\.py.*it is changed"):
        load_run(made.path, trust_code=True)
    with pytest.raises(ValueError, match=r"also holds net\.py \(edited\)"):
        fit_spec(spec, out=made.path, force=True)


def test_a_resumed_run_with_batch_normalisation_is_the_run_without_interruption(tmp_path, monkeypatch):
    settings = {"svi.epochs": 4, "svi.schedule": "one-cycle"}
    whole = fit_spec(write(tmp_path), settings, out=tmp_path / "whole")

    def stopping(*given, on_epoch, **more):
        def stop(epoch, state):
            on_epoch(epoch, state)
            if epoch == 1:
                raise KeyboardInterrupt

        return fit(*given, on_epoch=stop, **more)

    fit = run.fit
    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", stopping)
        with pytest.raises(KeyboardInterrupt, match="Go on with: ppl-vae fit .*--trust-code"):
            fit_spec(tmp_path / "spec.toml", settings, out=tmp_path / "part")
    with pytest.raises(ValueError, match="without --trust-code"):
        fit_spec(tmp_path / "part")
    resumed = fit_spec(tmp_path / "part", trust_code=True)
    assert same(resumed.program.state_dict(), whole.program.state_dict())
    assert int(whole.program.state_dict()["posterior.network.layers.1.num_batches_tracked"]) == 4 * 2
    moved = timeless(whole.report)["spec"], timeless(resumed.report)["spec"]
    for spec in moved:
        spec["likelihood"]["network"].pop("program")
        spec["posterior"]["network"].pop("program")
    assert timeless(resumed.report) == timeless(whole.report)


def test_a_state_holds_buffers_and_the_best_has_its_own(tmp_path):
    from ppl_vae import fit

    data = load_spec(write(tmp_path)).load_data()
    x, held_out, program = data.train["x"], data.test["x"], load_spec(tmp_path / "spec.toml").build(data)
    bounds, seen = [], []

    def note(epoch, state):
        seen.append({name: value.clone() for name, value in program.state_dict().items()})

    options = {"epochs": 6, "learning_rate": 1.0, "validation": held_out, "keep": "best"}
    history = fit(program, x, **options, on_epoch=note)
    assert history.best_epoch < 5
    assert same(program.state_dict(), seen[history.best_epoch])
    other, saved = load_spec(tmp_path / "spec.toml").build(data), {}

    def stop(epoch, state):
        bounds.append(state.history.validation[-1])
        if epoch == 2:
            saved.update(state.save())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(other, x, **options, on_epoch=stop)
    third = load_spec(tmp_path / "spec.toml").build(data)
    assert fit(third, x, **options, resume=saved).validation == history.validation
    assert bounds == history.validation[:3]
    assert same(third.state_dict(), program.state_dict())


def test_pictures_travel_with_a_run(tmp_path):
    network = {"family": "Conv", "channels": [4], "hidden": [8]}
    spec = load_spec(write(tmp_path), {"posterior.network": network, "likelihood.network": network, "svi.epochs": 1})
    made = fit_spec(spec, out=tmp_path / "run")
    assert isinstance(made.program.posterior.network, Conv)
    assert same(load_run(made.path).program.state_dict(), made.program.state_dict())
    assert load_run(made.path).report["data"]["columns"]["shape"] == [8, 8]


@pytest.mark.parametrize("role", ["likelihood", "posterior"])
def test_pictures_are_asked_for_by_name(role, tmp_path):
    networks = {f"{each}.network": {"family": "Linear"} for each in ("likelihood", "posterior")}
    spec = load_spec(write(tmp_path), {**networks, f"{role}.network": {"family": "ResidualConv", "channels": [4]}})
    data = spec.load_data()
    data = dataclasses.replace(data, columns=dataclasses.replace(data.columns, shape=None))
    with pytest.raises(ValueError, match=r"spec.toml: Expected pictures, .* for ResidualConv; got other data. Use MLP"):
        spec.build(data)


def test_the_schema_has_room_for_networks_of_ones_own():
    definitions = json_schema()["$defs"]
    kinds = definitions["PosteriorNormal"]["properties"]["network"]["anyOf"]
    own = [definitions[kind["$ref"].split("/")[-1]] for kind in kinds if "$ref" in kind]
    assert [(d["required"], d["additionalProperties"]) for d in own] == [(["program"], True)]
