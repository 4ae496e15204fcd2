"""NUTS over global latents: what ArviZ makes of its chains, and a public reference."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae import Program, reference_posterior
from ppl_vae.evaluation import to_datatree
from ppl_vae.infer.nuts import _bfmi, _Sampler
from ppl_vae.infer.reference import Reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

CHAINS = 32
SCHOOLS = {
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
    "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
}


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


PROGRAM = Program(eight_schools)


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.set_default_dtype(torch.float64)
    return reference_posterior(PROGRAM, SCHOOLS, "nuts", draws=50, warmup=100, chains=CHAINS)


def test_eight_schools_have_the_means_of_posteriordb(reference: Reference) -> None:
    """Means and their errors of `eight_schools-eight_schools_noncentered` (posteriordb: Magnusson et al. 2024)."""
    names = [f"theta{school}" for school in range(8)] + ["mu", "tau"]
    means = [6.1505, 4.9396, 3.9059, 4.7960, 3.6144, 4.0511, 6.3172, 4.8840, 4.4105, 3.6021]
    errors = [0.0557, 0.0462, 0.0542, 0.0475, 0.0461, 0.0485, 0.0499, 0.0543, 0.0330, 0.0319]
    mu, tau, z = reference.draws[:, 0, 0], reference.draws[:, 0, 1], reference.draws[:, 0, 2:]
    draws = [*(mu.unsqueeze(-1) + tau.unsqueeze(-1) * z).T, mu, tau]
    for name, own, mean, error in zip(names, draws, means, errors, strict=True):
        chains = own.unflatten(0, (-1, CHAINS)).T.numpy()
        doubt = math.hypot(float(arviz.mcse(chains)), error)
        assert abs(chains.mean() - mean) < 4 * doubt, name
        assert doubt < 0.4
    assert float(reference.diagnostics["r_hat"]) < 1.05
    assert float(reference.diagnostics["bfmi"]) > 0.3


def test_arviz_reads_the_same_chains(reference: Reference) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = to_datatree(PROGRAM, SCHOOLS, reference=reference)
        assert tree.posterior["z"].shape == (CHAINS, 50, 8)
        chains = reference.draws.unflatten(0, (-1, CHAINS))
        np.testing.assert_allclose(tree.posterior["mu"][3], chains[:, 3, 0, 0], rtol=1e-6)
        exact = tree.posterior.assign(mu=(("chain", "draw"), chains[:, :, 0, 0].T.numpy()))
        told = reference.diagnostics
        assert float(arviz.rhat(tree).to_array().max()) == pytest.approx(float(told["r_hat"]), rel=1e-4)
        tail = float(arviz.ess(tree, method="tail").to_array().min())
        assert tail == pytest.approx(float(told["ess_tail"]), rel=0.01)
        assert float(arviz.ess(tree).to_array().min()) >= 0.99 * float(told["ess"])  # which also asks for the spreads
        assert float(arviz.mcse(exact)["mu"]) == pytest.approx(float(told["mcse_mean"][0, 0]), rel=1e-9)
        assert arviz.bfmi(tree).min() == pytest.approx(float(told["bfmi"]), rel=1e-5)
        assert int(tree.sample_stats["diverging"].sum()) == int(told["divergences"])
        assert arviz.loo(tree).n_data_points == 8
    assert tree.prior["mu"].shape == (1, 50)
    np.testing.assert_allclose(tree.observed_data["y"], SCHOOLS["y"])
    mean = (tree.posterior["mu"] + tree.posterior["tau"] * tree.posterior["z"]).values
    truth = dist.Normal(torch.tensor(mean), SCHOOLS["sigma"]).log_prob(SCHOOLS["y"])
    np.testing.assert_allclose(tree.log_likelihood["y"], truth, rtol=1e-4)


def test_other_references_have_no_chains(reference: Reference) -> None:
    quadrature = Reference(*[torch.zeros(1)] * 2, torch.zeros(1, 1), torch.ones(1, 1, 1), "quadrature", None, {})
    with pytest.raises(ValueError, match=r"these 1 data by NUTS; got one of 1 data by quadrature"):
        to_datatree(PROGRAM, SCHOOLS, reference=quadrature)


def test_energy_that_wanders_slowly_is_told() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(200, 4, 3))
    slow = np.cumsum(noise, 0)
    for energy, low in ((noise, False), (slow, True)):
        ours = _bfmi(torch.tensor(energy))
        np.testing.assert_allclose(ours, [arviz.bfmi(energy[:, :, i].T).min() for i in range(3)], rtol=1e-9)
        assert ((ours < 0.3) == low).all()


def test_early_steps_are_each_chains_own() -> None:
    sampler = _Sampler(None, torch.eye(2)[None])  # type: ignore[arg-type]
    for _ in range(30):
        sampler.adapt(torch.tensor([[0.0], [1.0]]))
    assert float(sampler.step[0]) < 0.05 < float(sampler.step[1])
    sampler.rescale(torch.eye(2)[None])
    sampler.deepest = 10
    sampler.adapt(torch.tensor([[0.0], [1.0]]))
    assert sampler.step.shape == (1,)
