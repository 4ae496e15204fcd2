"""Specs: every file of models/ and every swap between them, and each kind of mistake with the message that mends it."""

import dataclasses
import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ppl_vae import families, fit, networks
from ppl_vae.programs.param_store import own_params
from ppl_vae.runs.catalogue import components
from ppl_vae.runs.schema import ROLES, SECTIONS, json_schema
from ppl_vae.runs.spec import load_spec
from ppl_vae.runs.spec_file import parse_override

MODELS = Path(__file__).parents[2] / "models"
FILES = sorted(MODELS.glob("*.toml"))
RAW = {path.stem: tomllib.loads(path.read_text()) for path in FILES}
DIGITS = MODELS / "digits.toml"
MLP = {"family": "MLP", "hidden": [4]}
SMALL = {"svi.epochs": 1, "svi.batch_size": 20, "svi.schedule": "constant"}
_loaded = {}


def few(spec):
    """20 data of each part, of labels that the first 20 have; a data set is read once for all tests."""
    key = repr(spec.data)
    if key not in _loaded:
        root = Path(os.environ.get("PPL_VAE_DATA", "none"))
        if spec.data.name == "mnist" and not (root / "MNIST").is_dir():
            pytest.skip("MNIST is not at hand: set PPL_VAE_DATA")
        if Path(spec.data.name).suffix and not Path(spec.data.name).is_file():
            pytest.skip(f"{Path(spec.data.name).name} is not at hand: set PPL_VAE_DATA")
        data = spec.load_data()
        parts = {part: getattr(data, part) for part in ("train", "validation", "test")}
        labels = data.train.get("y", torch.empty(0))[:20]
        rows = {
            part: torch.isin(tensors["y"], labels).nonzero()[:20, 0] if tensors and len(labels) else torch.arange(20)
            for part, tensors in parts.items()
        }
        small = {
            part: tensors and {key: value[rows[part][rows[part] < len(value)]] for key, value in tensors.items()}
            for part, tensors in parts.items()
        }
        _loaded[key] = dataclasses.replace(data, **small, stored=None)
    return _loaded[key]


def step(spec, data):
    """Take one step, and say whether every learned number stayed finite."""
    program = spec.build(data)
    history = fit(program, data.train, **spec.training, device="cpu", progress=False)
    assert history.steps == 1
    learned = program.parameters() if hasattr(program, "parameters") else own_params(program)["params"].values()
    return all(bool(p.isfinite().all()) for p in learned)


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refusal(overrides, path=DIGITS):
    with pytest.raises(ValueError) as caught:
        load_spec(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_spec_loads_round_trips_builds_and_takes_a_step(path, tmp_path):
    assert 10 <= len(path.read_text().splitlines()) <= 32
    tied = RAW[path.stem].get("prior", {}).get("family") == "VampPrior"
    spec = load_spec(path, {**SMALL, "prior.components": 10} if tied else SMALL)
    again = load_spec(write(tmp_path, spec.to_toml()))
    assert again == spec
    assert again.to_toml() == spec.to_toml()
    data = few(spec)
    text = str(spec.check(dataclasses.replace(data, name="here")))
    assert "steps in 1 epochs" in text
    assert "nan" not in text
    assert step(spec, data)


def test_mixture_specs_differ_in_the_prior_alone():
    for base in ("digits", "mnist"):
        differing = [s for s in SECTIONS if RAW[base].get(s) != RAW[f"{base}_mixture"].get(s)]
        assert differing == ["prior"]


def swaps():
    """Every file on digits with the data or the model of another, each outcome once; `test_swaps` swaps the parts."""
    seen, cases = [], []
    for base, here in RAW.items():
        for other, there in RAW.items():
            for table in SECTIONS:
                if here.get(table) == there.get(table) or table not in ("data", "model"):
                    continue
                swapped = {**here, table: there[table]}
                essence = [swapped.get(section) for section in ("data", "model", *ROLES)]
                if essence not in seen and swapped["data"]["name"] == "digits":
                    seen.append(essence)
                    cases.append(pytest.param(base, table, there[table], id=f"{base}-{table}-of-{other}"))
    return cases


@pytest.mark.parametrize(("base", "table", "value"), swaps())
def test_one_table_swaps_run_or_are_refused_by_name(base, table, value):
    try:
        spec = load_spec(MODELS / f"{base}.toml", {table: value, **SMALL})
        spec.check(few(spec))
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(MODELS / f"{base}.toml"))
        assert "Expected" in message
        assert re.search("got |one raised: |found invalid values", message)  # the last two of one's own programs
    else:
        assert step(spec, few(spec))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"svi.seed": "5"}, 'svi.seed: Expected a whole number; got "5".'),
        ({"svi.batch_size": True}, "svi.batch_size: Expected a whole number; got true."),
        ({"svi.batch_size": 2.5}, "svi.batch_size: Expected a whole number; got 2.5."),
        ({"svi.epochs": 0}, "svi.epochs: Expected `epochs` to be a whole number, at least 1; got 0."),
        ({"svi.learning_rate": 0}, "svi.learning_rate: Expected `learning_rate` to be a positive number; got 0"),
        ({"svi.clip": -1}, "svi.clip: Expected `clip` to be 0 (off) or a positive number; got -1"),
        ({"svi.seed": -1}, "svi.seed: Expected a seed"),
        ({"svi.schedule": "cosin"}, '"cosine" or "cosine-restarts"; got "cosin". Did you mean cosine?'),
        ({"svi.epoch": 3}, "got the unknown key epoch = 3. Did you mean epochs?"),
        ({"svi": 3}, "svi: Expected a table; got 3."),
        ({"svi.epochs.x": 3}, "svi.epochs: Expected a whole number"),
        ({"svi.keep": "best"}, "Try --set data.validation_fraction=0.1"),
        ({"evaluation.samples": 0}, "evaluation.samples: Expected at least 1; got 0."),
        ({"epochs": 3}, "epochs: Expected the tables data, model, prior"),
        ({"epochs": 3}, "Did you mean svi.epochs?"),
        ({"priors.family": "Normal"}, "Did you mean prior?"),
        ({"data.name": "digit"}, "data.name: Expected `name` to be 'digits', 'iris', "),
        ({"data.name": "digit"}, "got 'digit'. Did you mean 'digits'?"),
        ({"data.seed": -1}, "data.seed: Expected a seed"),
        ({"data.binarization": "dinamic"}, "data.binarization: Expected"),
        ({"data.validation_fraction": 1.5}, "data.validation_fraction: Expected `validation_fraction` in [0, 1)"),
        ({"data.binarization": "static", "data.scaling": "standardize"}, "data: Expected scaling"),
        ({"data.binarization": "static"}, "Normal likelihood that learns its scale"),
        ({"data.binarization": "static"}, "--set data.binarization=none"),
        ({"data.root": "there"}, "data.root: Expected no `root` for digits"),
        ({"data.test_fraction": 0.1}, "data.test_fraction: Expected no `test_fraction` for digits"),
        ({"data.name": "mnist", "data.test_fraction": 0.1}, "Expected no `test_fraction` for mnist"),
        ({"data.name": "a.csv", "data.root": "b"}, "Expected no `root` for the path of a file"),
        ({"data.name": "a.npy", "data.array": "b"}, "Expected no `array` for a file that is neither .npz"),
        ({"model.latent": 0}, "model.latent: Expected at least 1; got 0."),
        ({"model.latent": None}, "Try --set model.latent=2"),
        (
            {"model.hidden": 3},
            "model.hidden: Expected latent, program, given, given_to; got the unknown key hidden = 3.",
        ),
        ({"model.program": "two_level.py:TwoLevel"}, "prior: Expected no such table beside model.program"),
        ({"model.program": "none.py:A"}, "model.program: Expected a program as file.py:Class"),
        ({"prior": {}}, "prior.family: Expected Beta, ContinuousBernoulli, "),
        ({"prior.family": "MixtureNormals"}, "Did you mean MixtureNormal?"),
        ({"prior.family": "normal"}, "Did you mean Normal?"),
        ({"prior.family": "Bernoulli"}, "Bernoulli can be likelihood, not prior."),
        ({"prior.components": 3}, "prior.components: Expected family; got the unknown key components = 3."),
        ({"prior.components": 3}, "--set 'prior={family = \"StandardNormal\"}'"),
        ({"prior.family": "MixtureNormal", "prior.components": 0}, "prior.components: Expected `components` to be"),
        ({"prior.network": MLP}, "prior.network: Expected family; got the unknown key network"),
        (
            {"prior": {"family": "Normal", "network": MLP}},
            "prior.network.family: Expected the network Free where nothing is given; got MLP.",
        ),
        ({"likelihood": {"family": "Bernoulli"}}, "likelihood.network: Expected a network (Conv, GatedMLP, Lin"),
        ({"likelihood": {"family": "StandardNormal"}}, "StandardNormal can be prior, not likelihood."),
        ({"likelihood.scale": "feture"}, 'likelihood.scale: Expected "network", "shared" or "feature" or a number'),
        ({"likelihood.scale": "feture"}, 'got "feture". Did you mean feature?'),
        ({"likelihood.scale": -1}, "likelihood.scale: Expected `scale` to be network, shared, feature or a positive"),
        ({"likelihood.scale": True}, "or a number; got true."),
        ({"likelihood.network.hidden": [3, "a"]}, 'likelihood.network.hidden[1]: Expected a whole number; got "a".'),
        ({"likelihood.network.hidden": 3}, "likelihood.network.hidden: Expected a list; got 3."),
        ({"likelihood.network.hidden": []}, "likelihood.network.hidden: Expected `hidden` to list one or more"),
        ({"likelihood.network": {"family": "MLP"}}, "likelihood.network.hidden: Expected list[int]; got none."),
        ({"likelihood.network": {"family": "Table"}}, "likelihood.network.family: Expected Conv, GatedMLP, Linear, M"),
        ({"likelihood.network.family": "Linear"}, "--set 'likelihood.network={family = \"Linear\"}'"),
        ({"posterior.family": "Bernoulli"}, "Bernoulli can be likelihood, not posterior."),
        ({"posterior": {"family": "ExactNormal"}}, "posterior: Expected a likelihood on a Linear network"),
        ({"posterior.family": "ExactNormal"}, "posterior.network: Expected family; got the unknown key network"),
        ({"posterior.network": {"family": "Table"}, "data.validation_fraction": 0.1}, "knows its training data alone"),
        (
            {"posterior": {"family": "MixtureNormal", "network": MLP}, "model.latent": 1},
            "posterior: Expected a reparameterised posterior on the support of the prior StandardNormal",
        ),
        (
            {"prior": {"family": "Gamma"}, "posterior": {"family": "Normal", "network": MLP}},
            "of the prior Gamma, the positive numbers; got Normal(10,). Use Gamma, LogNormal.",
        ),
    ],
)
def test_mistakes_name_file_path_value_and_what_is_allowed(overrides, expected):
    message = refusal(overrides)
    assert message.startswith(f"{DIGITS}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.latent": None}, "model.latent: Expected `latent` for TwoLevel; got none."),
        ({"model.hiden": 3}, "Did you mean hidden?"),
        ({"model.hidden": "3"}, 'model.hidden: Expected a whole number; got "3".'),
        ({"model.program": "two_level.py:Two"}, "model.program: Expected"),
        ({"model.program": "state_space.py:StateSpace", "model": {"program": "state_space.py", "latent": 2}},
         "model.latent: Expected no `latent` for StateSpace; got 2."),
        ({"prior": {"family": "Normal"}}, "prior: Expected no such table beside model.program"),
    ],
)  # fmt: skip
def test_a_programs_keys_are_its_constructors(overrides, expected):
    assert expected in refusal(overrides, MODELS / "two_level.toml")


def test_code_runs_only_if_trusted(tmp_path):
    (tmp_path / "bad.py").write_text("raise RuntimeError('it ran')\n")
    path = write(tmp_path, '[data]\nname = "digits"\n[model]\nprogram = "bad.py:A"\nsize = 3\n')
    with pytest.raises(ValueError, match=r"model\.program: Expected .* to import; it raised RuntimeError: it ran"):
        load_spec(path)
    with pytest.raises(ValueError, match=r"model\.program: Cannot run .*bad\.py:A without --trust-code") as caught:
        load_spec(path, trust_code=False)
    assert "it ran" not in str(caught.value)
    load_spec(DIGITS, trust_code=False)


def test_strange_positional_parameters_are_refused(tmp_path):
    (tmp_path / "odd.py").write_text(
        "class Odd:\n    def __init__(self, features, width): ...\n    def model(self, x): ...\n"
        "    def guide(self, x): ...\n"
    )
    path = write(tmp_path, '[data]\nname = "digits"\n[model]\nprogram = "odd.py"\n')
    with pytest.raises(ValueError, match="positional parameters of Odd among features, latent, .*; got width"):
        load_spec(path)


def test_all_mistakes_come_at_once_in_the_order_of_the_file():
    wrong = {"svi.seed": "5", "svi.epochs": 0, "likelihood.scael": 1, "posterior.network.hidden": [0], "foo": 1}
    lines = refusal(wrong | {"prior.family": "Normol", "data.binarization": "x"}).splitlines()
    assert lines[0] == f"{DIGITS}: 7 mistakes:"
    paths = [line.strip().split(":")[0] for line in lines[1:]]
    assert paths == [
        "data.binarization", "prior.family", "likelihood.scael", "posterior.network.hidden", "svi.epochs", "svi.seed",
        "foo",
    ]  # fmt: skip
    assert "pydantic" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Expected a spec with the tables data, model, .*; got the empty file"),
        ("[svi]\nepochs = \n", r"run.toml, line 2, column 10: Expected TOML; got a mistake"),
        ("# nothing\n", "4 mistakes|5 mistakes"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(text, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_spec(write(tmp_path, text))


def test_missing_files_folders_and_other_encodings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file. Did you mean .*digits.toml\?"):
        load_spec(MODELS / "digit.toml")
    with pytest.raises(ValueError, match="got the folder .*, which holds .*digits.toml"):
        load_spec(MODELS)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'\n")
    with pytest.raises(ValueError, match="Expected a TOML file in UTF-8"):
        load_spec(tmp_path / "latin.toml")


def test_overrides_reach_in_and_replace_whole_tables():
    spec = load_spec(DIGITS, {"svi.epochs": 3, "likelihood.network.hidden": (50,), "evaluation.samples": 7})
    assert (spec.svi.epochs, spec.likelihood.network.hidden, spec.evaluation.samples) == (3, [50], 7)
    mixed = load_spec(DIGITS, {"prior": {"family": "MixtureNormal", "components": 5}})
    assert mixed.prior.components == 5
    assert load_spec(DIGITS, {"svi.learning_rate": 1}).svi.learning_rate == 1.0
    with pytest.raises(ValueError, match="data.name.x: Expected data.name to be a table"):
        load_spec(DIGITS, {"data.name.x": 3})
    with pytest.raises(ValueError, match="keys with dots between them"):
        load_spec(DIGITS, {"svi.": 3})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("svi.epochs=3", "svi.epochs", 3),
        ("svi.learning_rate=3e-3", "svi.learning_rate", 3e-3),
        ("data.binarization=dynamic", "data.binarization", "dynamic"),
        ('data.name="a b.csv"', "data.name", "a b.csv"),
        ("data.name=a=b.csv", "data.name", "a=b.csv"),
        ('prior={family="MixtureNormal", components=5}', "prior", {"family": "MixtureNormal", "components": 5}),
        ("likelihood.network.hidden = [50, 50]", "likelihood.network.hidden", [50, 50]),
        ("data.download=true", "data.download", True),
        ("a=1\nb=2", "a", "1\nb=2"),
        ("a=", "a", ""),
    ],
)
def test_a_value_is_toml_or_else_a_string(text, key, value):
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["svi.epochs", "=3", " =3"])
def test_an_override_needs_key_and_value(text):
    with pytest.raises(ValueError, match="Expected KEY=VALUE, such as svi.epochs=3; got"):
        parse_override(text)


def test_a_spec_is_frozen_and_complete():
    spec = load_spec(DIGITS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.svi = None
    with pytest.raises(ValidationError):
        spec.svi.epochs = 3
    plain = spec.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["svi"]["clip"] == 0.0
    assert not {"root", "array", "test_fraction", "download"} & plain["data"].keys()
    assert "program" not in plain["model"]


def test_paths_are_relative_to_the_spec_then_to_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "specs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "far.csv").write_text("1,2\n3,4\n5,7\n")
    (tmp_path / "specs" / "near.csv").write_text("1,2\n3,4\n5,7\n")
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "specs", DIGITS.read_text())
    for name, folder in (("near.csv", "specs"), ("far.csv", "data"), ("none.csv", "specs")):
        spec = load_spec(Path("specs/run.toml"), {"data.name": name})
        assert spec.data.name == str((tmp_path / folder / name).resolve())
    assert load_spec(path, {"data.name": "near.csv"}).load_data().features == 2
    with pytest.raises(ValueError, match=r"run.toml: Expected a data file at .*specs/none.csv; got no such file"):
        load_spec(path, {"data.name": "none.csv"}).load_data()
    rooted = load_spec(path, {"data.name": "mnist", "data.root": "../data"})
    assert rooted.data.root == str((tmp_path / "data").resolve())


def test_building_depends_on_the_seed_alone_and_leaves_the_random_state():
    spec = load_spec(DIGITS, {"prior": {"family": "MixtureNormal"}})
    data, before = few(spec), torch.get_rng_state()
    first, second = spec.build(data), spec.build(data)
    spec.check(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = load_spec(DIGITS, {"prior": {"family": "MixtureNormal"}, "svi.seed": 1}).build(data)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_table_has_a_row_for_each_datum():
    spec = load_spec(DIGITS, {"posterior.network": {"family": "Table"}} | SMALL)
    assert spec.build(few(spec)).posterior.network.rows == 20
    assert step(spec, few(spec))


def test_check_says_what_is_to_come():
    check = load_spec(DIGITS, {"svi.batch_size": 15, "svi.epochs": 3}).check(few(load_spec(DIGITS)))
    assert (check.latents, check.observed, check.kl) == ({"z": (10,)}, {"x": (64,)}, {"z": "analytic"})
    assert check.steps == 6
    assert check.parameters["likelihood"] == 11 * 200 + 201 * 200 + 201 * 64 + 1
    assert check.memory > 4 * 8 * sum(check.parameters.values())
    assert json.loads(json.dumps(check.to_dict()))["n_train"] == 20
    assert "z (n, 10) latent, KL analytic; x (n, 64) observed" in str(check)
    sampled = load_spec(DIGITS, {"prior": {"family": "MixtureNormal"}}).check(few(load_spec(DIGITS)))
    assert sampled.kl == {"z": "sampled"}
    assert load_spec(DIGITS, {"svi.elbo": "Trace_ELBO"}).check(few(load_spec(DIGITS))).kl == {"z": "sampled"}
    assert load_spec(DIGITS, {"svi.batch_size": 5000}).check(few(load_spec(DIGITS))).steps == 100


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            {"likelihood": {"family": "Bernoulli", "network": MLP}},
            r"digits.toml: Expected data in the support of Bernoulli.*--set data.binarization=dynamic\.$",
        ),
        (
            {"likelihood": {"family": "Bernoulli", "network": MLP}, "data.scaling": "standardize"},
            r"--set data.binarization=dynamic --set data.scaling=none\.$",
        ),
        ({"likelihood.scale": "feature"}, r"3 constant features.*--set likelihood.scale=shared\.$"),
        ({"likelihood.scale": "network"}, r"3 constant features.*--set likelihood.scale=shared\.$"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_remedy(overrides, match):
    spec = load_spec(DIGITS, overrides)
    with pytest.raises(ValueError, match=match):
        spec.check(spec.load_data())


UPWARD = """
import pyro, pyro.distributions as dist
class Upward:
    def __init__(self, features): ...
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            loc = b[..., None].expand(SHAPE)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            b = pyro.sample("b", dist.Normal(x.mean(-1), 1.0))
            pyro.sample("a", dist.Normal(b, 1.0))
"""


def upward(folder, shape):
    (folder / "upward.py").write_text(UPWARD.replace("SHAPE", shape))
    text = '[data]\nname = "digits"\n[model]\nprogram = "upward.py"\n[svi]\nelbo = "TraceMeanField_ELBO"\n'
    return load_spec(write(folder, text))


def test_an_objective_that_gives_a_wrong_bound_is_refused(tmp_path):
    spec = upward(tmp_path, "*b.shape, 64")
    with pytest.raises(ValueError, match=r"run.toml: Expected model and guide to visit the latent sites in one order"):
        spec.check(few(spec))
    check = load_spec(spec.path, {"svi.elbo": "Trace_ELBO"}).check(few(spec))
    assert check.latents == {"a": (), "b": ()}
    assert "a (n) latent, KL sampled" in str(check)


def test_a_program_that_takes_no_particles_is_refused(tmp_path):
    spec = load_spec(upward(tmp_path, "x.shape").path, {"svi.elbo": "Trace_ELBO"})
    with pytest.raises(
        ValueError, match=r"Expected a program that also runs with dims of particles .* it raised: expand"
    ):
        spec.check(few(spec))


KINDS = """
import pyro, pyro.distributions as dist, torch
class Kind:
    def __init__(self, features): ...
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", PRIOR)
            loc = z.sum(-2)[..., None].expand(*z.shape[:-2], len(x), 64)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", GUIDE)
"""


def kind(folder, prior, guide):
    (folder / "kind.py").write_text(KINDS.replace("PRIOR", prior).replace("GUIDE", guide))
    text = '[data]\nname = "digits"\n[model]\nprogram = "kind.py"\n[svi]\nelbo = "TraceMeanField_ELBO"\n'
    return load_spec(write(folder, text))


def test_a_site_is_shown_with_its_inner_plates(tmp_path):
    spec = kind(tmp_path, "dist.Normal(0.0, 1.0)", 'dist.Normal(pyro.param("a", torch.zeros(())), 1.0)')
    check = spec.check(few(spec))
    assert check.latents == {"z": (3,)}
    assert "z (n, 3) latent, KL analytic; x (n, 64) observed" in str(check)


def test_discrete_sites_have_no_analytic_objective(tmp_path):
    spec = kind(tmp_path, "dist.Poisson(1.0)", 'dist.Poisson(pyro.param("a", torch.ones(())).exp())')
    with pytest.raises(ValueError, match=r"run.toml: Expected reparameterised sites.*got 'z'.*Use Trace_ELBO"):
        spec.check(few(spec))
    assert load_spec(spec.path, {"svi.elbo": "Trace_ELBO"}).check(few(spec)).kl == {"z": "sampled"}


def test_rows_by_position_are_refused_in_a_run(tmp_path):
    spec = kind(tmp_path, "dist.Normal(0.0, 1.0)", 'dist.Normal(pyro.param("a", lambda: torch.zeros(len(x))), 1.0)')
    with pytest.raises(ValueError, match="takes any part of the data.*one row per datum.*Take `index`"):
        spec.check(few(spec))


def test_the_schema_covers_every_family_and_network():
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert list(schema["properties"]) == list(SECTIONS)
    assert schema["additionalProperties"] is False
    named = {d["properties"]["family"]["const"] for d in schema["$defs"].values() if "family" in d["properties"]}
    assert named == {*families.__all__, *networks.__all__}
    assert schema["$defs"]["Svi"]["properties"]["schedule"]["enum"] == [
        "constant",
        "one-cycle",
        "cosine",
        "cosine-restarts",
    ]


def test_components_are_listed_by_role():
    listed = {role: {c.name: c for c in components(role)} for role in (*ROLES, "network")}
    assert set(listed["network"]) == set(networks.__all__)
    assert set().union(*(listed[role] for role in ROLES)) == set(families.__all__)
    assert "Bernoulli" not in listed["prior"]
    assert listed["likelihood"].keys() & {"StandardNormal", "ExactNormal"} == set()
    assert "ExactNormal" in listed["posterior"]
    assert listed["prior"]["MixtureNormal"].keys == {"components": 10}
    assert listed["network"]["GatedMLP"].keys == {"hidden": None}
    assert listed["network"]["Conv"].keys == {
        "channels": [32, 64], "kernel": 3, "hidden": [256], "activation": "relu"
    }  # fmt: skip
    assert all(c.doc.endswith(".") and ":math:" not in c.doc for c in components())
    with pytest.raises(
        ValueError, match="one of prior, likelihood, posterior, network; got 'priors'. Did you mean prior"
    ):
        components("priors")


def test_a_new_family_is_one_class(monkeypatch):
    class Wide(families.StandardNormal):
        """Normals that are wide."""

        def __init__(self, event, *, width: float = 2.0) -> None:
            super().__init__(event)
            if width <= 0:
                raise ValueError(f"Expected `width` to be positive; got {width}.")
            self.width = width

    monkeypatch.setattr(families, "Wide", Wide, raising=False)
    monkeypatch.setattr(families, "__all__", [*families.__all__, "Wide"])
    assert json_schema()["$defs"]["PriorWide"]["properties"]["width"]["default"] == 2.0
    assert "Wide" in [c.name for c in components("prior")]
    spec = load_spec(DIGITS, {"prior": {"family": "Wide", "width": 3}} | SMALL)
    assert spec.build(few(spec)).prior.family.width == 3.0
    assert "prior.width: Expected `width` to be positive; got -1.0." in refusal(
        {"prior": {"family": "Wide", "width": -1}}
    )
