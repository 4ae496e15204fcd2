"""Runs of programs that were built and trained in Python: what `save_run` leaves is a run like any other."""

import json
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from ppl_vae import VAE, Conditional, Program, check_program, exact_log_evidence, fit, load_run, save_run
from ppl_vae.data import as_data, load
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.infer import History
from ppl_vae.networks import MLP, Linear, Table
from ppl_vae.runs import compare_runs, evaluate_run
from ppl_vae.runs.check_run import check_run
from ppl_vae.runs.explore import write_explorer

WINE = load("wine", scaling="standardize")
SETTINGS = {"epochs": 2, "elbo": "TraceMeanField_ELBO"}


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


def vae(seed=0):
    torch.manual_seed(seed)
    parts = Conditional(Normal(13, scale="shared"), Linear()), Conditional(Normal(2), MLP(hidden=[5]))
    return VAE(Conditional(StandardNormal(2)), *parts).initialise(WINE.train)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    program = vae()
    return save_run(program, WINE, fit(program, WINE, **SETTINGS), tmp_path_factory.mktemp("runs") / "a", samples=30)


def test_it_is_whole_and_says_what_is_known(saved):
    files = check_run(saved.path).files
    assert {"spec.toml", "report.md", "report.json", "metrics.jsonl", "figures/latents.png"} <= files.keys()
    assert set(files.values()) == {"as written"}
    spec = saved.report["spec"]
    assert (spec["svi"]["elbo"], spec["svi"]["epochs"], spec["data"]["name"]) == ("TraceMeanField_ELBO", 2, "wine")
    assert spec["posterior"] == {
        "family": "Normal",
        "scale": "network",
        "network": {"family": "MLP", "hidden": [5], "activation": "tanh", "normalization": "none", "dropout": 0.0,
                    "residual": False},
    }  # fmt: skip
    report = (saved.path / "report.md").read_text()
    assert "built in Python" in report
    assert "ppl-vae fit spec.toml" not in report
    assert saved.report["exact"]["log_evidence"] == pytest.approx(
        exact_log_evidence(saved.program, WINE.test).mean().item()
    )


def test_it_loads_into_the_program_alone(saved):
    other = vae(seed=1)
    before = other.likelihood.network.weight.detach().clone()
    again = load_run(saved.path, program=other)
    assert not torch.equal(before, other.likelihood.network.weight)
    assert again.report == saved.report
    assert again.score(samples=20).equals(saved.score(samples=20))
    assert again.encode().equals(saved.encode())
    with pytest.raises(ValueError, match="which was built in Python"):
        load_run(saved.path)
    with pytest.raises(ValueError, match="which was built in Python"):
        evaluate_run(saved.path)
    wrong = VAE(*(Conditional(StandardNormal(1)), Conditional(Normal(13), Linear()), Conditional(Normal(1), Linear())))
    with pytest.raises(ValueError, match="to hold this program's weights"):
        load_run(saved.path, program=wrong)


BUILT = """
import torch
from ppl_vae import VAE, Conditional
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.networks import MLP, Linear

def build():
    parts = Conditional(Normal(13, scale="shared"), Linear()), Conditional(Normal(2), MLP(hidden=[5]))
    return VAE(Conditional(StandardNormal(2)), *parts)

def broken():
    raise KeyError("no")

ready, nothing = build(), 3
"""


def test_a_file_that_builds_it_can_be_named(saved, tmp_path):
    (file := tmp_path / "mine.py").write_text(BUILT)
    shutil.copytree(saved.path, tmp_path / "run")
    page = write_explorer(tmp_path / "run", tmp_path / "a.html", program=f"{file}:build")
    assert page.read_text().lower().startswith("<!doctype html>")
    again = load_run(tmp_path / "run", program=f"{file}:ready")
    assert again.encode().equals(saved.encode())
    evaluated = evaluate_run(tmp_path / "run", samples=30, program=f"{file}:build")
    assert evaluated.report["test"] == saved.report["test"]
    for name, why in {
        "": "a name after the colon",
        "none": "got nothing",
        "nothing": "got int",
        "broken": "KeyError",
    }.items():
        with pytest.raises(ValueError, match=why):
            load_run(tmp_path / "run", program=f"{file}:{name}")
    with pytest.raises(ValueError, match="is not a Python file"):
        load_run(tmp_path / "run", program="mine.txt:build")


def test_compare_takes_it(saved, tmp_path):
    program = vae()
    other = save_run(program, WINE, fit(program, WINE, epochs=1), tmp_path / "b", samples=30)
    compared = compare_runs([saved.path, other.path])
    evidence = [run.report["test"]["log_evidence"]["mean"] for run in (saved, other)]
    assert compared["differences"][0]["mean"] == pytest.approx(evidence[0] - evidence[1])
    with pytest.raises(ValueError, match="Expected --out to be new"):
        save_run(program, WINE, fit(program, WINE, epochs=1), other.path)


def test_a_notebook_shows_it(saved):
    shown = saved._repr_html_()
    assert "nats per held-out datum" in shown
    assert 'src="data:image/png;base64,' in shown
    assert "<script" not in shown


def model(x):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale).to_event(1), obs=x)


def guide(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(slope * x.mean(-1), 0.5))


def test_what_a_loop_of_stock_pyro_learned_is_saved_and_readable(tmp_path):
    x = torch.randn(60, 3) + 2
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
        bounds = [-svi.step(x) / 60 for _ in range(30)]
        history = History(elbo=bounds, seconds=[0.1 * k for k in range(30)], steps=30)
        run = save_run(Program(model, guide), as_data(x[:40], x[40:]), history, tmp_path / "a", samples=50)
        learned = {name: pyro.param(name).item() for name in ("loc", "scale", "slope")}
    assert learned["scale"] != 3
    assert {name: value.item() for name, value in run.params.items()} == pytest.approx(learned)
    again = load_run(run.path, program=Program(model, guide))
    assert {name: value.item() for name, value in again.params.items()} == pytest.approx(learned)
    assert run.report["test"]["n"] == 20
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["elbo"] == bounds[-1]
    with pytest.raises(ValueError, match="were in memory when it was saved. Give them"):
        again.score()
    assert len(again.encode(x[40:].numpy())) == 20


def test_weights_that_the_program_does_not_hold_are_refused(tmp_path):
    net = nn.Linear(1, 3)

    def decoding(x):
        pyro.module("decoder", net)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def of_one(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    program, x = Program(decoding, of_one), torch.randn(20, 3)
    with pytest.raises(ValueError, match=r"holds its modules; got one that calls pyro.module\('decoder'\)"):
        save_run(program, as_data(x, x), fit(program, x, epochs=1), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_whole_data_set_and_rows_of_a_table(tmp_path):
    def schools(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    program, data = Program(schools), as_data({"y": torch.tensor([1.0, 2.0, 4.0])}, name="schools")
    run = save_run(program, data, fit(program, data, epochs=20), tmp_path / "a", samples=30)
    assert "check" in run.report
    parts = Conditional(Normal(13, scale="shared"), Linear()), Conditional(Normal(2), Table(142))
    program = VAE(Conditional(StandardNormal(2)), *parts).initialise(WINE.train)
    run = save_run(program, WINE, fit(program, WINE, epochs=1), tmp_path / "b", samples=30)
    assert run.report["data"]["part"] == "train"


def test_a_history_without_times_is_refused(tmp_path):
    with pytest.raises(TypeError, match="Expected a History.*; got dict"):
        save_run(vae(), WINE, {"elbo": [1.0]}, tmp_path / "a")
    with pytest.raises(ValueError, match="2 bounds and 0 times"):
        save_run(vae(), WINE, History(elbo=[1.0, 2.0]), tmp_path / "a")


def test_entries_of_a_batch_are_read_again(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,y\n" + "".join(f"{k % 7},{k % 5},{k}.5\n" for k in range(40)))
    data = load(tmp_path / "t.csv").with_entries(["y"])

    def regression(x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.sum(-1), 1.0))
            pyro.sample("y", dist.Normal(z, pyro.param("sd", torch.tensor(9.0))), obs=y)

    def amortized(x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.5)) * y, 1.0))

    program = Program(regression, amortized)
    run = save_run(program, data, fit(program, data, epochs=1), tmp_path / "a", samples=20)
    again = load_run(run.path, program=Program(regression, amortized)).spec.load_data()
    assert again.protocol == data.protocol
    assert again.train.keys() == {"x", "y"}
    assert not (run.path / "figures" / "samples.png").exists()  # x is given, not drawn
    assert "The program `regression`." in (run.path / "report.md").read_text()


def test_the_only_observed_site_is_reconstructed_whatever_its_name(tmp_path):
    x = torch.rand(30, 4)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("obs", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 4), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.5)) * x.sum(-1), 1.0))

    program = Program(model, guide)
    run = save_run(program, as_data(x[:20], x[20:], shape=(2, 2)), fit(program, x[:20], epochs=2), tmp_path / "a")
    assert {"reconstructions.png", "samples.png"} <= {path.name for path in (run.path / "figures").iterdir()}


class Squeezing(nn.Module):
    """A guide that loses the dimension of the data where there is one datum."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand_by([]).to_event(1), obs=x)

    def guide(self, x):
        loc = x.mean(-1).squeeze() if len(x) == 1 else x.mean(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc[: len(x)], 1.0))


def test_a_program_that_cannot_score_the_last_block_is_refused_before_training():
    program = Squeezing()
    with pytest.raises(ValueError, match="scores 1 data at once, as its evaluation asks; it failed: IndexError"):
        check_program(program, as_data(torch.randn(50, 3), torch.randn(101, 3)))
    assert check_program(program, as_data(torch.randn(50, 3), torch.randn(100, 3)), epochs=3).steps == 3


def test_check_program_takes_what_fit_takes():
    program = vae()
    assert check_program(program, WINE, epochs=3, batch_size=50).steps == 9
    assert check_program(program, WINE.train["x"], epochs=3, batch_size=50).steps == 9
    with pytest.raises(TypeError, match="epoch"):
        check_program(program, WINE, epoch=3)
    with pytest.raises(ValueError, match="`epochs`"):
        check_program(program, WINE, epochs=0)
    with pytest.raises(ValueError, match="Expected data of shape"):
        check_program(program, torch.zeros(5, 4))


@pytest.mark.parametrize("shape", [(), (4, 6), (3, 2, 2)])
def test_data_in_memory(shape):
    train, test = torch.randn(9, *(shape or (5,))), torch.randn(4, *(shape or (5,)))
    data = as_data(train, test, validation=test, name="own")
    assert torch.equal(data.epoch(3)["x"], train)
    assert (data.features, data.shape) == (train[0].numel(), shape or None)
    assert data.protocol["split"] == {"by": "as given", "n_train": 9, "n_validation": 4, "n_test": 4}
    assert data.protocol["digest"] != as_data(train, test + 1).protocol["digest"]
    assert data.protocol["digest"] == as_data(2 * train, test).protocol["digest"]
    with pytest.raises(ValueError, match="Expected the entries x in each part; got y"):
        as_data(train, {"y": test})
    with pytest.raises(ValueError, match="Expected names of"):
        as_data(train, columns=["a"])
