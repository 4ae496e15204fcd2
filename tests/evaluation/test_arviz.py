"""ArviZ's groups of a program, in either of its containers, in a file that needs no ppl_vae."""

import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from twins import TWINS, draws, perturbed

from ppl_vae import VAE, Conditional, Program, exact_posterior
from ppl_vae.evaluation import evidence
from ppl_vae.evaluation.arviz import to_datatree
from ppl_vae.evaluation.pareto import pareto_k
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

GROUPS = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
}


@pytest.fixture(params=["here", "0.x", "1.x"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ArviZ that is installed, and two fakes that have of each generation what the adapter asks for."""
    if request.param == "here":
        return "0.x" if arviz.__version__.startswith("0.") else "1.x"
    fake: Any = types.ModuleType("arviz")
    fake.__version__ = "0.23.4"
    if request.param == "0.x":

        class InferenceData:
            def __init__(self, **groups: xarray.Dataset) -> None:
                assert all(isinstance(group, xarray.Dataset) for group in groups.values())
                vars(self).update(groups)

            def groups(self) -> list[str]:
                return list(vars(self))

            def __getitem__(self, name: str) -> xarray.Dataset:
                return vars(self)[name]

        fake.InferenceData = InferenceData
    else:
        fake.__version__, fake.InferenceData = "1.3.0", xarray.DataTree
    monkeypatch.setitem(sys.modules, "arviz", fake)
    return request.param


def names(tree: Any, version: str) -> set[str]:
    if version == "0.x":
        return set(tree.groups())
    assert isinstance(tree, xarray.DataTree)
    return set(tree.children)


@pytest.mark.parametrize("twin", ["ppca_vae", "masked", "picture", "two_level", "state_space", "inner_plate"])
def test_groups_of_every_wiring(twin: str, version: str) -> None:
    t = TWINS[twin]()
    ids = [f"row {i}" for i in range(6)]
    tree = to_datatree(perturbed(t.program, 1.1, 0.1), t.batch, draws=150, labels=list("aabbcc"), ids=ids)
    assert names(tree, version) == GROUPS | {"constant_data", "reweighted"}
    for group in GROUPS | {"constant_data", "reweighted"}:
        data = tree[group]
        assert data.attrs["inference_library"] == "ppl_vae"
        assert {"created_at", "inference_library_version", "seed"} <= data.attrs.keys()
        if "prior" not in group:
            assert data["obs"].values.tolist() == ids
        for value in data.data_vars.values():
            if group not in ("constant_data", "observed_data") and value.name not in ("elbo", "pareto_k"):
                assert value.dims[:2] == ("chain", "draw")
                assert value.shape[:2] == (1, 150)
            if group not in ("constant_data", "sample_stats"):
                assert value.dtype == np.float32
    seen, predicted = tree["observed_data"], tree["posterior_predictive"]
    assert set(seen.data_vars) == set(predicted.data_vars) == set(tree["log_likelihood"].data_vars)
    for name in seen.data_vars:
        assert predicted[name].shape == (1, 150, *seen[name].shape)
        assert tree["prior_predictive"][name].shape == (1, 150, *seen[name].shape[1:])
        assert tree["log_likelihood"][name].dims == ("chain", "draw", "obs")
        assert np.isfinite(predicted[name]).all()
    latents = sum(value[0, 0, 0].size for value in tree["posterior"].data_vars.values())
    assert latents == t.loc.shape[1]
    if "x" in seen:
        x = t.batch["x"].numpy()
        expected = np.where(t.batch["mask"].numpy(), x, np.nan) if "mask" in t.batch else x
        np.testing.assert_allclose(seen["x"], expected, rtol=1e-6)
    assert tree["constant_data"]["labels"].values.tolist() == list("aabbcc")
    assert ("mask" in tree["constant_data"]) is ("mask" in t.batch)


def test_numbers_are_those_of_the_program() -> None:
    """With the exact guide: moments by the closed form, weights the evidence, their parts by hand."""
    t = TWINS["ppca_vae"]()
    tree = to_datatree(t.program, t.batch, draws=1000, seed=2)
    z = tree["posterior"]["z"].values[0]
    exact = exact_posterior(t.program, t.batch)
    spread = exact.variance.sqrt().numpy()
    assert (np.abs(z.mean(0) - exact.loc.numpy()) < 5 * spread / 1000**0.5).all()
    np.testing.assert_allclose(tree["sample_stats"]["log_weight"][0, 3], t.log_evidence, atol=1e-9)
    np.testing.assert_allclose(tree["sample_stats"]["elbo"], t.log_evidence, atol=1e-9)
    with torch.no_grad():
        score = t.program.likelihood(torch.from_numpy(z).double()).log_prob(t.batch["x"])
        prior = t.program.prior().log_prob(torch.from_numpy(tree["prior"]["z"].values[0]).double())
        predicted = t.program.likelihood(exact.loc)
    np.testing.assert_allclose(tree["log_likelihood"]["x"][0], score, rtol=1e-4, atol=1e-2)
    assert abs(prior.mean().item() + 1.5 * (1 + np.log(2 * np.pi))) < 0.3
    deviation = tree["posterior_predictive"]["x"].values[0].mean(0) - predicted.mean.numpy()
    total = tree["posterior_predictive"]["x"].values[0].std(0)
    assert (np.abs(deviation) < 5 * total / 1000**0.5).all()
    wrong = to_datatree(perturbed(t.program, 0.8, 0.2), t.batch, draws=300)
    weights = torch.from_numpy(wrong["sample_stats"]["log_weight"].values[0])
    np.testing.assert_allclose(wrong["sample_stats"]["pareto_k"], pareto_k(weights))
    assert (wrong["sample_stats"]["elbo"].values < t.log_evidence).all()


def binary() -> tuple[VAE, torch.Tensor]:
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(9), MLP(hidden=[8])),
        Conditional(Normal(2), MLP(hidden=[8])),
    )
    return vae, (draws(130, 9) > 0).double()


def test_seeds_blocks_and_the_world() -> None:
    vae, x = binary()
    state = torch.get_rng_state()
    first, again, other = (to_datatree(vae, x, draws=120, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    assert first["posterior"]["z"].shape == (1, 120, 130, 2)
    np.testing.assert_array_equal(first["posterior_predictive"]["x"], again["posterior_predictive"]["x"])
    assert not np.array_equal(first["posterior"]["z"], other["posterior"]["z"])
    assert set(np.unique(first["posterior_predictive"]["x"])) == {0.0, 1.0}
    flat = first["posterior"]["z"].values[0].reshape(120, -1)
    assert len(np.unique(flat)) > 0.999 * flat.size


def test_a_saved_file_opens_with_arviz_alone(tmp_path: Path) -> None:
    """In a process that never imports ppl_vae, where ArviZ's own functions run on it."""
    vae, x = binary()
    path = tmp_path / "posterior.nc"
    tree = to_datatree(vae, x[:8], draws=50, labels=range(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree.to_netcdf(str(path), engine="h5netcdf")
    script = f"""
import sys, warnings
warnings.simplefilter("ignore")
import matplotlib; matplotlib.use("Agg")
import arviz as az
tree = az.from_netcdf({str(path)!r})
old = az.__version__.startswith("0.")
assert set({sorted(GROUPS)!r}) <= set(tree.groups() if old else tree.children)
table = az.summary(tree, kind="stats", var_names=["z"])
assert len(table) == 16, table
assert "r_hat" not in table
if old:
    az.plot_trace(tree, var_names=["z"], coords={{"obs": [0]}})
    az.plot_ppc(tree, num_pp_samples=5)
    assert abs(float(az.hdi(tree, var_names=["z"])["z"].mean())) < 5
assert tree["observed_data"]["x"].shape == (8, 9)
assert tree["constant_data"]["labels"].values.tolist() == list(range(8))
assert "ppl_vae" not in sys.modules
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "ran", done.stderr


def test_arviz_is_imported_late() -> None:
    code = "import sys, ppl_vae.evaluation.arviz; assert 'arviz' not in sys.modules; print('late')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(evidence.__file__).parents[2],
        check=False,
    )
    assert done.stdout.strip() == "late", done.stderr


def named(first: str, second: str, seen: str = "x") -> Program:
    """Give a program of two latent sites and an observed one, by these names; the first has two entries."""

    def latents(x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = pyro.sample(first, dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample(second, dist.Normal(x.new_zeros(()), 1.0))
        return z

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(seen, dist.Normal(latents(x), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            latents(x)

    return Program(model, guide)


@pytest.mark.parametrize("sites", [("z", "obs"), ("draw", "u"), ("z", "u", "chain"), ("z", "z_dim_0")])
def test_sites_named_like_a_dimension_are_refused_by_name(sites: tuple[str, ...]) -> None:
    clash = ({"chain", "draw", "obs", "z_dim_0"} & set(sites)).pop()
    with pytest.raises(ValueError, match=f"Expected sites .* than the dimensions of .* got '{clash}'. Rename it"):
        to_datatree(named(*sites), draws(4, 2), draws=5)


def test_other_names_are_free() -> None:
    tree = to_datatree(named("elbo", "elbo_dim_1", "data_dim_0"), draws(4, 2), draws=np.int64(5))  # type: ignore[arg-type]
    assert tree["posterior"]["elbo"].shape == (1, 5, 4, 2)
    assert tree["sample_stats"]["elbo"].shape == (4,)


def test_what_does_not_fit_is_refused() -> None:
    vae, x = binary()
    for options, message in (
        ({"draws": 0}, "Expected `draws` to be a whole number, at least 1; got 0"),
        ({"draws": 2.5}, "Expected `draws` to be a whole number, at least 1; got 2.5"),
        ({"labels": [1, 2]}, "Expected `labels` to have an entry for each of the 130 data; got 2"),
        ({"ids": range(3)}, "Expected `ids` to have an entry for each of the 130 data; got 3"),
        ({"draws": 10**6}, "Expected at most 268,435,456 numbers of predictions; got 1000000 draws of 130 data"),
    ):
        with pytest.raises(ValueError, match=message):
            to_datatree(vae, x, **options)  # type: ignore[arg-type]
