"""Runs on data with missing cells: from `new` to the report, and back to the table."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ppl_vae import PPCA, Target, fit, impute
from ppl_vae.reports.measures import evaluate
from ppl_vae.runs.loaded import load_run
from ppl_vae.runs.new import write_spec
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import load_spec

FEW: dict[str, Any] = {"svi.epochs": 2, "evaluation.samples": 40}


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size = rng.normal(size=80)
    numbers = {name: 10 * j + size + 0.5 * rng.normal(size=80) for j, name in enumerate("abc")}
    table = pd.DataFrame({**numbers, "word": rng.choice(["x", "y", "z"], 80), "whole": rng.normal(size=80)})
    hidden = rng.random((80, 5)) < 0.2
    hidden[:, 4] = False
    return table.mask(pd.DataFrame(hidden, columns=table.columns))


def written(frame: pd.DataFrame, folder: Path, **overrides: Any) -> Path:
    frame.to_csv(folder / "t.csv", index=False)
    write_spec(folder / "t.toml", str(folder / "t.csv"), overrides)
    return folder / "t.toml"


def test_from_new_to_the_imputed_table(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = written(frame, tmp_path)
    assert 'missing = "model"' in path.read_text()
    assert "missing cells are modelled" in path.read_text()
    spec = load_spec(path, FEW)
    data = spec.load_data()
    told = str(spec.check(data))
    shares = re.findall(r"(\w+) ([\d.]+)%", told.split("missing     ")[1].splitlines()[0])
    train = frame.iloc[data.row_numbers["train"]].isna().mean()
    assert dict(shares) == {name: f"{100 * share:.1f}" for name, share in train.items() if share}
    assert "and by an indicator of 1 for missing" in told
    run = fit_spec(spec, out=tmp_path / "run", device="cpu")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["missing"]["columns"] == pytest.approx({name: share for name, share in train.items() if share})
    assert report["missing"]["incomplete"] == int(frame.iloc[data.row_numbers["test"]].isna().any(axis=1).sum())
    assert (report["baseline"], report["missing"]["pareto_k"] is None) == (None, False)  # a mass and a density
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Missing in the training part: " in text
    assert "hold if entries are missing at random" in text
    assert "incomplete data, by which `impute` may be judged" in text
    loaded: Any = load_run(tmp_path / "run")
    assert loaded.program.posterior.encoding.hidden.tolist() == [0, 1, 2, 3]
    found = impute(loaded.program, data.test, 50, draws=30)
    assert torch.equal(found.draws, impute(run.program, data.test, 50, draws=30).draws)
    back, own = data.to_table(found.completed(data.columns), "test"), frame.iloc[data.row_numbers["test"]]
    assert not back.isna().any(axis=None)
    for name in "abc":
        seen = own[name].notna()
        np.testing.assert_allclose(back[name][seen], own[name][seen], rtol=1e-5)
    assert (back["word"].astype(str) == own["word"])[own["word"].notna()].all()


def test_the_baseline_is_ppca_by_em_on_the_same_cells(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = written(frame.drop(columns=["word", "whole"]).dropna(how="all"), tmp_path)
    spec = load_spec(path, {**FEW, "model.latent": 1})
    data = spec.load_data()
    report = evaluate(Target(spec.build(data), data.test), data, samples=40, latent=1)[0]
    ppca = PPCA.fit(data.train["x"].double(), 1, data.train["mask"], tolerance=1e-6)
    evidence = ppca.log_evidence(data.test["x"].double(), data.test["mask"]).mean().item()
    assert report["baseline"]["ppca"]["log_evidence"] == pytest.approx(evidence, abs=1e-9)
    shown = data.test["mask"].double().mean(0).numpy()
    nats = report["test"]["log_evidence"]["mean"] - (shown * np.log(data.transform.scale)).sum()
    assert report["test"]["bits_per_dim"] == pytest.approx(-nats / (shown.sum() * np.log(2)))


def test_mistakes_are_named_before_anything_is_trained(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = written(frame, tmp_path)
    flow = load_spec(path, {**FEW, "likelihood": {"family": "Flow", "network": {"family": "MLP", "hidden": [4]}}})
    with pytest.raises(ValueError, match=r"t\.toml: Expected data without missing entries for Flow, .*; got a mask"):
        flow.check(flow.load_data())
    with pytest.raises(ValueError, match="data.missing: .*'refuse', 'model', 'drop rows'; got 'keep'"):
        load_spec(path, {"data.missing": "keep"})
    frame.loc[7, "whole"] = np.nan
    frame.loc[[7, 30], list("abc")] = np.nan
    frame.loc[[7, 30], "word"] = None
    frame.to_csv(tmp_path / "t.csv", index=False)
    made = load_spec(path, {**FEW, "data.test_fraction": 0.05})
    assert 7 in made.load_data().row_numbers["train"]
    with pytest.raises(ValueError, match=r"got nothing in row 7 of the source \(counted from 0\), 1 such in all"):
        made.check(made.load_data())
    frame.assign(b=np.nan).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match=r"t\.toml: .*missing throughout: 'b'\. .*leave_out = \[\"b\"\]"):
        made.load_data()


OWN = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Own(nn.Module):
    \"\"\"Factor analysis of the observed entries.\"\"\"

    def __init__(self, features, latent):
        super().__init__()
        self.decode, self.encode = nn.Linear(latent, features), nn.Linear(2 * features, latent)
        self.latent = latent

    def model(self, x{mask}):
        pyro.module("own", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            likelihood = dist.Normal(self.decode(z), 1.0)
            pyro.sample("x", likelihood{hide}.to_event(1), obs=torch.where({seen}, x, 0.0))

    def guide(self, x{mask}):
        pyro.module("own", self)
        seen = torch.cat([torch.where({seen}, x, 0.0), ({seen}).to(x)], -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encode(seen), 1.0).to_event(1))
"""


def test_programs_of_ones_own_take_the_mask(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.drop(columns="word").to_csv(tmp_path / "t.csv", index=False)
    text = '[data]\nname = "t.csv"\nmissing = "model"\n[model]\nprogram = "own.py"\nlatent = 2\n'
    (tmp_path / "own.toml").write_text(text)
    (tmp_path / "own.py").write_text(OWN.format(mask=", mask", hide=".mask(mask)", seen="mask"))
    spec = load_spec(tmp_path / "own.toml")
    data, program = spec.load_data(), spec.build()
    assert "sees them as the program says" in str(spec.check(data, program))
    history = fit(program, data, epochs=2, batch_size=30, validation=data.test)
    assert np.isfinite([*history.elbo, *history.validation]).all()
    assert bool(impute(program, data.test, 50, draws=9).draws.isfinite().all())
    (tmp_path / "bare.py").write_text(OWN.format(mask="", hide="", seen="x.isfinite()"))
    spec = load_spec(tmp_path / "own.toml", {"model.program": "bare.py"})
    with pytest.raises(ValueError, match=r"own\.toml: Expected a model that takes `mask` .*; got one that takes x\."):
        spec.check(spec.load_data())
