"""Reports: every spec leaves a full one, in words that say what the figures are and what to distrust."""

import copy
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ppl_vae import (
    PPCA,
    VAE,
    Conditional,
    Program,
    Target,
    compare_posteriors,
    families,
    load_run,
    load_spec,
    log_evidence,
)
from ppl_vae.data import datasets, load, loading
from ppl_vae.families import DiscretizedLogistic, Multinomial, NegativeBinomial, Normal, Poisson, StandardNormal
from ppl_vae.networks import Linear
from ppl_vae.reports import figures, findings, latent_plots, measures, remedies
from ppl_vae.runs import evaluated
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.run import fit_spec

MODELS = Path(__file__).parents[2] / "models"
WHOLE = ("eight_schools", "logistic_regression", "regression")  # one datum each: tests/runs/test_whole_runs.py
SPECS = sorted(path for path in MODELS.glob("*.toml") if path.stem not in WHOLE)
NOT_DRAWN = {  # where labels are whole numbers, and where x is made into words before it is observed
    "semi_supervised": {"samples"},
    "dirichlet_allocation": {"samples", "columns"},
}
EMBEDDED = ("digits", "iris", "wine", "breast_cancer", "diabetes", "keywords")
KEYS = {"spec", "seed", "versions", "device", "data", "train", "test", "exact", "baseline"}


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def few(monkeypatch):
    """Let every data set have 100 data to learn from and 40 held out."""
    read = loading.read_dataset

    def shortened(*given):
        raw = read(*given)
        n = raw.n_train or len(raw.x) - 40
        rows = np.r_[0:100, n : n + 40]
        y = None if raw.y is None else raw.y[rows]
        return dataclasses.replace(raw, x=raw.x[rows], y=y, n_train=raw.n_train and 100)

    monkeypatch.setattr(loading, "read_dataset", shortened)


def present(path):
    """Skip with the reason where a spec's data are not on this machine."""
    spec = load_spec(path)
    root = datasets.root_folder(spec.data.root)[0]
    needed = root / "MNIST" / "raw" if spec.data.name == "mnist" else Path(spec.data.name)
    if spec.data.name not in EMBEDDED and not needed.exists():
        pytest.skip(f"no data at {needed}; set PPL_VAE_DATA (now {os.environ.get('PPL_VAE_DATA')})")


def check_whole(folder):
    """Hold a run directory against the contract, and give its report in numbers and words."""
    found = json.loads((folder / "report.json").read_text())
    text = (folder / "report.md").read_text()
    assert KEYS <= found.keys()
    assert {"name", "protocol", "features", "n_train", "n_test"} <= found["data"].keys()
    assert {"epochs", "steps", "seconds", "elbo"} <= found["train"].keys()
    test = found["test"]
    assert {"n", "samples", "bits_per_dim", "rate", "distortion", "active_units", "rates"} <= test.keys()
    assert test["elbo"].keys() == {"mean", "se", "mc_se"}
    assert test["log_evidence"].keys() == {"mean", "se", "mc_se", "bias", "kind", "interval", "jackknife"}
    assert test["ess"].keys() == {"median", "min"}
    assert test["pareto_k"].keys() == {"median", "max", "above_0.5", "above_0.7"}
    assert test["elbo"]["mean"] <= test["log_evidence"]["mean"]
    assert test["rate"] + test["distortion"] == pytest.approx(-test["elbo"]["mean"])
    assert len(test["collapsed"]) == test["latents"] - test["active_units"]
    if test["rates"] is not None and test["n"] <= measures.MOST_DATA:  # they fall short by the total correlation
        assert sum(test["rates"]) <= 1.02 * test["rate"] + 0.1
        assert f"z{np.argmax(test['rates'])} {max(test['rates']):.2f}" in text
    bounded = test["log_evidence"]["kind"] == "lower bound"
    assert bounded == (">= " in text)
    assert bounded == (test["log_evidence"]["jackknife"] is None)
    assert bounded == ("jackknife; no bound" not in text)
    samples = f"--samples {10 * test['samples']}"
    assert bounded == all(remedy in text for remedy in (samples, "--reference ais"))
    line = next(line for line in text.splitlines() if line.startswith("| log evidence |"))
    assert bounded == ("±" not in line)
    for heading in ("Numbers", "What to distrust", "The program", "Reproduce", "Figures"):
        assert f"\n## {heading}\n" in text
    table = [
        line for line in text.partition("## Numbers")[2].partition("\n## ")[0].splitlines() if line.startswith("|")
    ]
    assert {line.count("|") for line in table} == {6}
    told = re.sub(r"^\| \d+ \|.*$", "", text, flags=re.MULTILINE)  # but the strangest rows: a column may be called None
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", told)
    pictures = re.findall(r"!\[.+\]\((figures/.+\.png)\)", text)
    assert {folder / picture for picture in pictures} == set((folder / "figures").iterdir())
    assert all((folder / picture).read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    return found, text, {Path(picture).stem for picture in pictures}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_leaves_a_full_report(path, few, tmp_path, monkeypatch):
    present(path)
    settings = {"svi.epochs": 1, "evaluation.samples": 30}
    made = fit_spec(path, settings, out=tmp_path / path.stem)
    found, text, pictures = check_whole(made.path)
    assert (found["data"]["n_train"], found["test"]["n"]) in ((100, 40), (112, 28), (107, 27))  # a file is split
    assert text.startswith(f"# {path.stem}\n")
    vae = made.spec.model.program is None
    plane = vae and repr(made.program.prior.family.support) == "Real()"
    first = "columns" if found["data"]["columns"].get("names") else "reconstructions"
    first = {first} if found["test"]["latents"] else set()  # where all are summed out, nothing is reconstructed
    rates = found["test"]["rates"]
    told = rates is None or max(rates, default=0.0) > 0.02  # after one epoch all latents may be collapsed
    expected = {"samples", "predictive", *first} | ({"traversals"} if plane and told else set())
    assert "training" not in pictures  # of one epoch there is no curve
    assert expected - NOT_DRAWN.get(path.stem, set()) <= pictures
    assert ("manifold" in pictures) == (plane and told and made.spec.model.latent == 2 and first == {"reconstructions"})
    assert ("posteriors" in pictures) == (vae and told and found["exact"] is not None)
    density = found["data"]["measure"].partition(" given")[0] == "density"
    assert (found["baseline"] is None) == (not density or made.spec.model.latent is None)
    assert load_run(made.path, trust_code=True).report == found
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
    assert evaluate_run(made.path, trust_code=True).report == found


def test_two_epochs_of_mnist_go_well_beyond_plain_settings(tmp_path, monkeypatch):
    """Plain settings (tanh 200-200 at 1e-3, no start at the data's mean) give a test ELBO of -138."""
    present(MODELS / "mnist.toml")
    monkeypatch.setattr(evaluated, "draw_run", lambda *given, **more: given[3].mkdir() or {})
    made = fit_spec(MODELS / "mnist.toml", {"svi.epochs": 2, "evaluation.samples": 5}, out=tmp_path / "mnist")
    assert made.report["test"]["n"] == 10_000
    assert made.report["test"]["elbo"]["mean"] > -130
    assert made.report["test"]["elbo"]["mean"] < -70  # what no VAE of this size reaches


def table(folder, rows=60, columns=5):
    x = np.random.default_rng(0).normal(size=(rows, 2)) @ np.random.default_rng(1).normal(size=(2, columns))
    x += 0.1 * np.random.default_rng(2).normal(size=x.shape)
    file = folder / "own.csv"
    np.savetxt(file, x + 0.3, delimiter=",", header=",".join("abcde"[:columns]), comments="")
    return file


@pytest.mark.parametrize("latent", [1, 2])
def test_a_table_of_ones_own(latent, tmp_path):
    settings = {"data.name": str(table(tmp_path)), "data.scaling": "standardize", "model.latent": latent}
    settings |= {"svi.epochs": 2, "evaluation.samples": 30}
    made = fit_spec(MODELS / "digits.toml", settings, out=tmp_path / "run")
    found, text, pictures = check_whole(made.path)
    assert "own.csv, 48 for training, 12 held out, 5 features (scaling standardize)" in text
    assert ("latents" in pictures) == (latent == 2)
    assert "manifold" not in pictures
    volume = found["data"]["protocol"]["log_volume"]
    stored = (found["test"]["log_evidence"]["mean"] - volume) / -5 / math.log(2)
    assert found["test"]["bits_per_dim"] == pytest.approx(stored)
    data = made.spec.load_data()
    ppca = PPCA.fit(data.train["x"].double(), latent).log_evidence(data.test["x"].double()).mean()
    assert found["baseline"]["ppca"]["log_evidence"] == pytest.approx(float(ppca))


@pytest.mark.parametrize("family", ["Normal", "MixtureNormal"])
def test_the_error_of_the_distance_to_the_exact_posterior(family, few, tmp_path):
    posterior = {"family": family, "network": {"family": "Linear"}}
    settings = {"svi.epochs": 1, "evaluation.samples": 30, "model.latent": 2, "posterior": posterior}
    made = fit_spec(MODELS / "ppca.toml", {**settings, "svi.elbo": "Trace_ELBO"}, out=tmp_path / "run")
    compared = compare_posteriors(made.program, made.spec.load_data().test)
    exact, sampled = made.report["exact"], family == "MixtureNormal"
    assert exact["gap_method"] == ("sampled" if sampled else "closed-form")
    assert exact["gap_mc_se"] == pytest.approx(float(compared.error.square().sum().sqrt()) / 40)
    assert (exact["gap_mc_se"] > 0) == sampled
    lines = (made.path / "report.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| KL of guide to exact posterior, exact log evidence - ELBO")]
    *_, figure, error, kind, _ = (cell.strip() for cell in line.split("|"))
    assert figure == f"{exact['posterior_kl']:.4f}"
    assert (error, kind) == ((f"{exact['gap_mc_se']:.4f}", "estimate") if sampled else ("0", "closed form"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"elbo": "ImportanceWeighted", "particles": 2, "gradient": "stl"},
            ["with K = 2, on average a lower bound of log p(x).", "Its gradient was stl, biased for K > 1."],
        ),
        (
            {"elbo": "Renyi", "alpha": 0.5, "particles": 2, "gradient": "dreg"},
            [
                "a = 0.5, K = 2, a lower bound of log p(x) above the ELBO for 0 <= a < 1 only.",
                "dreg, which has no bias",
            ],
        ),
        (
            {"elbo": "TraceMeanField_ELBO", "beta": 0.5, "warm_up": 1, "free_bits": 0.1},
            ["E_q log p(x | z) - 0.5 sum max(0.1, KL) over each latent, not the ELBO.", "rose over the first 1 epochs"],
        ),
    ],
)
def test_the_objective_is_named_and_stands_beside_the_elbo(options, said, few, tmp_path):
    settings = {f"svi.{key}": value for key, value in {"epochs": 2, **options}.items()}
    made = fit_spec(
        MODELS / "ppca.toml", {**settings, "evaluation.samples": 5, "model.latent": 1}, out=tmp_path / "run"
    )
    text = (made.path / "report.md").read_text()
    last = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["objective"] != last["elbo"]
    assert made.report["train"]["objective"] == last["objective"]
    for words in (*said, f"In the last epoch it was {last['objective']:.3f}", "Reported is the ELBO = E_q"):
        assert words in text


def test_the_jackknife_is_printed_and_named_no_bound(few, tmp_path):
    settings = {"svi.epochs": 200, "evaluation.samples": 400, "model.latent": 1}
    made = fit_spec(MODELS / "ppca.toml", settings, out=tmp_path / "run")
    evidence = log_evidence(made.program, made.spec.load_data().test, 400)
    value = made.report["test"]["log_evidence"]
    assert value["kind"] == "estimate"
    assert value["jackknife"] == pytest.approx(float(evidence.jackknife.mean()))
    text = (made.path / "report.md").read_text()
    assert f"| freed of its first-order bias (jackknife; no bound) |  | {value['jackknife']:.3f} |" in text
    assert f"| its bias to first order (delta method) |  | {value['bias'] + 0.0:.4f} |" in text


def test_pictures_of_any_program_are_those_of_the_same_vae(few, tmp_path, monkeypatch):
    """A VAE's own reconstructions, from its traces alone; and sequences whose sites are steps are drawn, too."""
    seen = {}
    monkeypatch.setattr(figures, "reconstructions", lambda x, means, shape: seen.update(m=means) or Figure())
    monkeypatch.setattr(figures, "samples", lambda x, means, shape: seen.update(x=x) or Figure())
    history = {"elbo": [0.0, 1.0], "validation": []}
    spec = load_spec(MODELS / "ppca.toml", {"model.latent": 2})
    data = spec.load_data()
    vae = spec.build(data)
    target = Target(Program(vae.model, vae.guide), data.train)
    drawn = figures.draw_run(target, dataclasses.replace(data, test=data.train), history, tmp_path)
    assert {"training.png", "reconstructions.png", "samples.png"} == drawn.keys()
    torch.testing.assert_close(seen["m"], vae.reconstruct(data.train["x"][:10]))
    assert seen["x"].shape == (64, 64)
    spec = load_spec(MODELS / "state_space.py")
    data = spec.load_data()
    drawn = figures.draw_run(Target(spec.build(data), data.test), data, history, tmp_path)
    assert {"training.png", "samples.png"} == drawn.keys()
    assert seen["x"].shape == (40, 64)
    assert not torch.equal(seen["x"], data.test["x"])


@pytest.mark.parametrize("family", ["Gamma", "VonMisesFisher", "LogisticNormal", "Normal"])
def test_no_picture_shows_latents_off_their_support(family, tmp_path):
    kind = getattr(families, family)
    posterior = Conditional(kind(2), Linear())
    vae = VAE(Conditional(kind(2)), Conditional(Normal(64), Linear()), posterior)
    data = load("digits")
    data = dataclasses.replace(data, test={key: value[:20] for key, value in data.test.items()})
    drawn = figures.draw_run(Target(vae, data.test["x"]), data, {"elbo": [0.0], "validation": []}, tmp_path)
    assert ("traversals.png" in drawn) == (family == "Normal")
    assert ("manifold.png" in drawn) == (family in ("Normal", "Gamma"))
    if family != "Normal":
        with pytest.raises(ValueError, match="Expected latents on the real line; got"):
            latent_plots.traversals(vae)


def test_samples_of_counts_have_the_size_factors_of_the_data(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "marginals", lambda x, drawn, columns: seen.extend([x, drawn]) or Figure())
    rng = np.random.default_rng(0)
    size = rng.uniform(500, 1500, 200)
    counts = rng.poisson(2 * size[:, None], (200, 3))
    rows = np.column_stack([counts, size])
    np.savetxt(tmp_path / "counts.csv", rows, delimiter=",", header="a,b,c,size", comments="")
    data = load(tmp_path / "counts.csv", size_factor="size")
    vae = VAE(Conditional(StandardNormal(1)), Conditional(Poisson(3), Linear()), Conditional(Normal(1), Linear()))
    vae.initialise(data.train)
    torch.nn.init.zeros_(vae.likelihood.network.weight)
    figures.draw_run(Target(vae, data.test), data, {"elbo": [0.0], "validation": []}, tmp_path / "figures")
    x, drawn = seen
    assert drawn.shape == data.test["x"].shape
    assert drawn.mean() == pytest.approx(2 * float(data.test["size_factor"].mean()), rel=0.02)


def test_one_sample_and_one_datum_give_null_and_no_nan(tmp_path):
    settings = {"data.name": str(table(tmp_path, 6)), "model.latent": 1, "data.test_fraction": 0.1}
    settings |= {"svi.epochs": 1, "evaluation.samples": 1}
    made = fit_spec(MODELS / "digits.toml", settings, out=tmp_path / "run")
    found, text, _ = check_whole(made.path)
    assert found["test"]["n"] == 1
    assert found["test"]["elbo"]["se"] is None
    assert found["test"]["log_evidence"]["mc_se"] is None
    assert found["test"]["pareto_k"] == dict.fromkeys(("median", "max", "above_0.5", "above_0.7"))
    assert "Too few samples per datum" in text
    assert "Only one epoch was trained" in text


def example(**changes):
    """A report with nothing to distrust, changed at dotted keys."""
    found = {
        "data": {"part": "test"},
        "train": {
            "elbo": -100.0,
            "elbo_se": 0.1,
            "lead": {"n": 297, "elbo": 0.4, "elbo_se": 0.3, "log_evidence": 0.3, "log_evidence_se": 0.3},
        },
        "test": {
            "samples": 1000,
            "latents": 4,
            "active_units": 4,
            "collapsed": [],
            "rates": [2.0, 1.0, 1.5, 0.5],
            "elbo": {"mean": -100.2, "se": 0.2, "mc_se": 0.01},
            "log_evidence": {"mean": -99.9, "se": 0.2, "mc_se": 0.02, "bias": -0.001, "kind": "estimate"},
            "pareto_k": {"median": 0.1, "max": 0.4, "above_0.5": 0.0, "above_0.7": 0.0},
            "worst": {"n": 0, "rows": [], "pareto_k": [], "mc_se": [], "mean_without": None},
        },
        "exact": None,
    }
    found = copy.deepcopy(found)
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        here = found
        for parent in parents:
            here = here[parent]
        here[last] = copy.deepcopy(value)
    return found


FLAT = [-100.0] * 20
BAD = {"n": 12, "rows": [7, 2], "pareto_k": [0.93, None], "mc_se": [0.8, 0.6], "mean_without": -99.5}
BAD_WORDS = "weights of 12 data are bad, the worst in rows 7 .k 0.93., 2 .k -.. Without them the mean is -99.5"
GAP = {"total": 0.3, "kind": "lower bound", "approximation": 0.2, "amortization": 0.1}
FAR = {"ppca": {"difference": -2000.0, "se": 0.3, "log_evidence": -100.0}}
WORSE = {"ppca": {"difference": -5.0, "se": 0.3}}
UNLIKE = {"statistics": [{"name": "zeros", "observed": 0.5, "low": 0.0, "high": 0.25, "off": True}]}
WRONG = {"verdict": "miscalibrated", "p_value": 1e-9, "weakest": "the coverage"}


@pytest.mark.parametrize(
    ("changes", "history", "words"),
    [
        ({}, FLAT, None),
        ({"test__log_evidence__kind": "lower bound", "test__worst": BAD}, FLAT, BAD_WORDS),
        ({"test__worst": BAD}, FLAT, "cannot move the mean beyond its interval. .*rows 7 .k 0.93., 2 .k -.. Without"),
        (
            {"test__log_evidence__kind": "lower bound", "test__pareto_k__above_0.5": 0.0},
            FLAT,
            "too near 0.5 for so few samples",
        ),
        ({"test__log_evidence__bias": -0.3}, FLAT, "biased downwards.*about 0.30 nats"),
        ({"test__collapsed": [0, 2, 3]}, FLAT, "3 of 4 latents are collapsed.* of z0, z2, z3 hardly"),
        ({"test__collapsed": [0, 1, 2, 3]}, FLAT, "All latents are collapsed.*, 4 of 4"),
        ({"test__rates": [1.0, 0.02, 2.0, 1e-4]}, FLAT, "2 of 4 latents are collapsed or nearly so.* of z1, z3 is at"),
        ({"test__collapsed": [2]}, FLAT, "1 of 4 latents is collapsed.* mean of z2 hardly varies"),
        ({"train__lead__log_evidence": 10.2}, FLAT, "memorises.*by 10.2 ± 0.3 nats.*over 297 data"),
        ({"train__lead__elbo": 6.8, "train__lead__log_evidence": 0.9}, FLAT, "encoder overfits.*6.8 nats.* 0.9 ± 0.3"),
        ({"train__lead": None}, FLAT, None),
        ({"test__elbo__mean": -100.9}, FLAT, None),
        ({}, [-200.0 + 5 * i for i in range(20)], "still rising.*by 10.00 nats over the last 2 epochs"),
        ({}, [-1e26, -1e25, -1e24], "diverged.* ended at -1.0e.24 nats"),
        ({}, [-100.0, -200.0, -1e7], "diverged"),
        ({"baseline": FAR}, [-9000.0], "diverged.* -9.0e.03 nats per datum, where PPCA has -100.0"),
        ({"data__features": 0}, FLAT, None),
        ({"exact": {"gap": 0.5}}, FLAT, "misses the exact posterior.*0.50 nats"),
        ({"exact": {"gap": 0.01}}, FLAT, None),
        (
            {"reference": {"method": "ais", "n": 9, "n_settled": 6, "converged": False}},
            FLAT,
            "by ais failed.* on 3 of 9",
        ),
        (
            {"reference": {"method": "nuts", "n": 5, "n_settled": 4, "converged": False}},
            FLAT,
            "by nuts failed its own checks.* on 1 of 5",
        ),
        ({"reference": {"method": "quadrature", "n": 9, "n_settled": 9, "converged": True}}, FLAT, None),
        ({"calibration": WRONG}, FLAT, r"miscalibrated.*p = 1e-09\), most clearly in the coverage.*where it may be"),
        ({"calibration": WRONG, "exact": {"gap": 0.02}}, FLAT, "nearly exact.* is 0.020 nats.*only off them"),
        (
            {"calibration": WRONG, "gap": GAP},
            FLAT,
            "off on the held-out data too.* is at least 0.300 nats",
        ),
        ({"calibration": WRONG, "gap": {**GAP, "total": 0.03}}, FLAT, "`--reference auto` tells"),
        (
            {"calibration": WRONG, "reference": {"method": "nuts", "n": 5, "n_settled": 5, "converged": True}},
            FLAT,
            "`--reference auto` tells",
        ),
        ({"calibration": {"verdict": "no fault found", "p_value": 0.3}}, FLAT, None),
        ({"data__part": "train"}, FLAT, "All figures are of the training data"),
        ({"test__log_evidence__mean": None}, FLAT, "not finite"),
        ({"baseline": WORSE}, FLAT, "worse than PPCA.*, by 5.000 ± 0.300 nats.*settled in a poor place"),
        ({"baseline": {"ppca": {"difference": -0.5, "se": 0.3}}}, FLAT, None),
        ({"predictive": UNLIKE}, FLAT, "draws data unlike these.*the zeros is 0.5 .draws: 0 to 0.25.[.]"),
    ],
)
def test_what_to_distrust_follows_from_the_figures(changes, history, words):
    doubts = findings.list_findings(example(**changes), history)
    if words is None:
        assert doubts == []
    else:
        assert len(doubts) == 1
        assert re.search(words, doubts[0])


RISING = [-200.0 + 5 * i for i in range(20)]
SPEC = {
    "data": {"scaling": "none"},
    "model": {"latent": 4},
    "likelihood": {"family": "Normal", "network": {"family": "MLP"}},
    "posterior": {"family": "Normal", "network": {"family": "MLP"}},
    "svi": {"epochs": 20, "keep": "last"},
}
BOUND = {"test__log_evidence__kind": "lower bound"}
MEMORISES = {"train__lead__log_evidence": 10.2}
ENCODER = {"train__lead__elbo": 6.8, "train__lead__log_evidence": 0.9}
EVERYTHING = {**BOUND, "calibration": WRONG, "baseline": WORSE, "test__collapsed": [2]}


@pytest.mark.parametrize(
    ("changes", "history", "advised", "never"),
    [
        ({}, FLAT, [], []),
        ({}, RISING, ["Train longer"], []),
        (BOUND, FLAT, ["--samples 10000", "FullNormal", "--reference ais"], ["longer", "larger", "hidden"]),
        (BOUND, RISING, ["Train longer", "--samples 10000", "--reference ais"], ["richer", "larger"]),
        (MEMORISES, RISING, ['keep = "best"', "`likelihood.network`"], ["longer", "larger", "richer"]),
        ({**MEMORISES, "spec__svi__keep": "best"}, FLAT, ["`likelihood.network`"], ["validation_fraction"]),
        ({**ENCODER, **BOUND}, FLAT, ['keep = "best"', "`posterior.network`"], ["larger", "longer"]),
        ({"baseline": WORSE, "data__columns": {"names": ["a"]}}, RISING, ["Standardise", "Train longer"], ["learning"]),
        ({"baseline": WORSE}, FLAT, ["svi.learning_rate"], ["Standardise", "longer", "warm_up"]),
        ({"baseline": WORSE, "test__collapsed": [0, 1]}, FLAT, ["warm_up"], ["Fewer latents", "learning_rate"]),
        ({"test__collapsed": [0]}, FLAT, ["model.latent = 3"], ["warm_up"]),
        ({"test__collapsed": [0, 1, 2, 3]}, FLAT, ["warm_up"], ["model.latent"]),
        ({"test__collapsed": [0]}, RISING, ["Train longer"], ["model.latent"]),
        ({"gap": {**GAP, "family": "Normal", "amortization": 0.25}}, FLAT, ["larger `posterior.network`"], ["FullN"]),
        ({"gap": {**GAP, "family": "Normal"}}, FLAT, ["FullNormal"], ["larger"]),
        ({"gap": {**GAP, "total": 0.03}}, FLAT, [], ["richer"]),
        (
            {"exact": {"gap": 0.5}, "spec": {"model": {"program": "a.py:A"}}},
            FLAT,
            ["A richer guide comes"],
            ["network"],
        ),
        ({**BOUND, "spec": {}, "data__whole": True}, FLAT, ["parameterisation", "nuts"], ["network", "ais"]),
        (
            {**BOUND, "spec": {"model": {"program": "a.py:A"}}},
            FLAT,
            ["--samples 10000 --trust-code", "ais --trust-code"],
            [],
        ),
        ({**EVERYTHING, **MEMORISES}, RISING, ["keep", "Fewer hidden units"], ["longer", "larger"]),
        ({"train__kept_epoch": 2, **BOUND}, RISING, ["--samples"], ["longer"]),
        (
            {**BOUND, "spec": {"model": {"built": True, "program": "A"}}},
            RISING,
            ["more epochs", "--program FILE.py:NAME"],
            ["svi", "trust"],
        ),
        ({"test__log_evidence__mean": None, **MEMORISES}, FLAT, ["learning_rate"], ["keep", "hidden"]),
    ],
)
def test_what_is_advised_is_never_at_odds(changes, history, advised, never):
    said = remedies.list_remedies(example(**{"spec": SPEC, **changes}), history)
    assert len(said) == len(set(said))
    places = [[number for number, one in enumerate(said) if words in one] for words in advised]
    assert all(places), (advised, said)
    assert places == sorted(places)
    assert not [one for one in said for words in never if words in one]


@pytest.mark.parametrize("changes", [EVERYTHING, {**EVERYTHING, **MEMORISES}, {**EVERYTHING, **ENCODER}])
def test_worse_than_ppca_is_said_first(changes):
    found = findings.list_findings(example(**changes), FLAT)
    assert "worse than PPCA" in found[0]
    assert ("memorises" in found[1]) == (changes.get("train__lead__log_evidence") == 10.2)
    assert "worse than PPCA" in findings.list_findings(example(baseline=WORSE, test__collapsed=[0, 1, 2]), FLAT)[0]
    collapsed = findings.list_findings(example(baseline=WORSE, test__collapsed=[0, 1, 2]), FLAT)[0]
    assert "3 of 4 latents collapsed" in collapsed


def test_json_has_no_nan():
    assert measures.finite({"f": [math.nan, [math.inf]]}) == {"f": [None, [None]]}
    assert measures.finite({"a": [1.0], "b": {"c": math.nan, "d": -math.inf, "e": 2}}) == {
        "a": [1.0],
        "b": {"c": None, "d": None, "e": 2},
    }


@pytest.mark.parametrize(
    ("error", "text"), [(0.0, "0.000"), (0.0004, "0.0004"), (0.0006, "0.001"), (1e-9, "1e-09"), (2.0, "2.000")]
)
def test_no_error_is_rounded_to_none(error, text):
    assert findings.margin(error) == text


def test_bits_per_dimension():
    assert measures.bits_per_dim(-64 * math.log(2), 64) == pytest.approx(1.0)


def linear_vae(likelihood):
    parts = Conditional(likelihood, Linear()), Conditional(Normal(2), Linear())
    return VAE(Conditional(StandardNormal(2)), *parts)


def test_bits_per_dimension_of_a_mass_do_not_depend_on_the_scaling():
    """A probability of stored values needs no volume: it is the same for k and for k / 16."""
    data = load("digits", scaling="unit")
    target = Target(linear_vae(DiscretizedLogistic(64, 17)), {"x": data.test["x"][:5]})
    test = measures.evaluate(target, data, samples=3)[0]["test"]
    assert data.protocol["log_volume"] > 0
    assert test["bits_per_dim"] == pytest.approx(-test["log_evidence"]["mean"] / 64 / math.log(2))


def test_a_mass_given_the_total_is_another_measure():
    x = torch.ones(3, 4)
    each = [measures.measure(Target(linear_vae(family(4)), x)) for family in (NegativeBinomial, Multinomial)]
    assert each == ["probability mass", "probability mass given each total"]


OWN = '''
from ppl_vae import VAE, Conditional
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.networks import Linear


class Own(VAE):
    """A VAE of one's own."""

    def __init__(self, features, latent):
        likelihood = Conditional(Normal(features, scale="shared"), Linear())
        super().__init__(Conditional(StandardNormal(latent)), likelihood, Conditional(Normal(latent), Linear()))
'''


def test_a_subclass_of_vae_in_a_program_file_gets_a_report(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    given = {"model.latent": 2, "svi.epochs": 1, "evaluation.samples": 30}
    text = (fit_spec(tmp_path / "own.py", given, out=tmp_path / "run").path / "report.md").read_text()
    assert "The program `Own` of `own.py`: A VAE of one's own." in text
    assert "samples.png" in text


def test_the_lead_of_the_training_data_is_that_of_their_evidence(tmp_path):
    made = fit_spec(MODELS / "ppca.toml", {"svi.epochs": 2, "evaluation.samples": 30}, out=tmp_path / "run")
    data, lead = made.spec.load_data(), made.report["train"]["lead"]
    parts = [{key: value[:300] for key, value in part.items()} for part in (data.train, data.test)]
    seen, unseen = (log_evidence(made.program, part, 100).log_evidence for part in parts)
    assert lead["log_evidence"] == pytest.approx(float(seen.mean() - unseen.mean()), abs=1e-6)
    error = (seen.var() / len(seen) + unseen.var() / len(unseen)).sqrt()
    assert lead["log_evidence_se"] == pytest.approx(float(error), rel=1e-6)
