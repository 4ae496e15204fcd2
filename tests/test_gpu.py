"""The CPU's answers against a GPU's, in double precision; skipped where there is none."""

import copy
from pathlib import Path

import pytest
import torch

from ppl_vae import (
    PPCA,
    VAE,
    Conditional,
    compare_posteriors,
    data,
    exact_log_evidence,
    exact_posterior,
    fit,
    log_evidence,
    log_weights,
)
from ppl_vae.families import Bernoulli, ExactNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.program import load_program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GPU = "cuda"
MODELS = Path(__file__).parents[1] / "models"
TWINS = [
    ("ppca.py", {"features": 6, "latent": 2, "exact": True}),
    ("two_level.py", {"features": 6, "latent": 3, "linear": True}),
    ("state_space.py", {"features": 6, "linear": True}),
]
twins = pytest.mark.parametrize(("name", "options"), TWINS, ids=[name for name, _ in TWINS])


def pair(name, options):
    torch.manual_seed(0)
    program = load_program(str(MODELS / name))(**options)
    return program, copy.deepcopy(program).to(GPU)


def rows(n=40, features=6):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(1)) * 2 + 1


def close(on_gpu, on_cpu, rtol=1e-6):
    assert on_gpu.device.type == GPU
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=rtol, atol=rtol)


def digits(n=200):
    return data.load("digits", dtype=torch.float64).train["x"][:n]


def linear_vae(features, latent):
    return VAE(
        Conditional(StandardNormal(latent)),
        Conditional(Normal(features, scale="shared"), Linear()),
        Conditional(Normal(latent), Linear()),
    )


@twins
def test_twins_have_equal_weights(name, options):
    program, moved = pair(name, options)
    x = rows()
    truth = exact_log_evidence(program, x)
    weights = log_weights(moved, x.to(GPU), 20)
    close(weights, truth.expand(20, 40), rtol=1e-9)
    assert weights.std(0).max() < 1e-9
    assert weights.dtype == torch.float64


@twins
def test_twins_have_the_evidence_and_posterior_of_the_cpu(name, options):
    program, moved = pair(name, options)
    x = rows()
    close(exact_log_evidence(moved, x.to(GPU)), exact_log_evidence(program, x), rtol=1e-9)
    close(log_evidence(moved, x.to(GPU), 30).log_evidence, exact_log_evidence(program, x), rtol=1e-9)
    here, there = exact_posterior(program, x), exact_posterior(moved, x.to(GPU))
    close(there.mean, here.mean, rtol=1e-9)
    close(there.covariance_matrix, here.covariance_matrix, rtol=1e-9)


def test_data_on_the_cpu_are_brought_to_the_program():
    program, moved = pair(*TWINS[0])
    close(log_evidence(moved, rows(), 3).log_evidence, log_evidence(program, rows(), 3).log_evidence)


def test_an_estimate_agrees_within_its_error():
    """The devices draw other numbers; the evidence is one."""
    torch.manual_seed(2)
    x = (torch.rand(50, 6) < 0.4).double()
    vae = VAE(
        Conditional(MixtureNormal(2, components=3)),
        Conditional(Bernoulli(6), MLP(hidden=[5])),
        Conditional(Normal(2), MLP(hidden=[5])),
    ).initialise(x)
    fit(vae, x, epochs=20, batch_size=10, learning_rate=1e-2, device="cpu")
    moved = copy.deepcopy(vae).to(GPU)
    here, there = log_evidence(vae, x, 2000), log_evidence(moved, x.to(GPU), 2000)
    error = (here.mc_se.square() + there.mc_se.cpu().square()).sqrt()
    judged = (here.pareto_k < 0.5) & (there.pareto_k.cpu() < 0.5)
    assert judged.double().mean() > 0.5
    assert ((here.log_evidence - there.log_evidence.cpu()).abs() <= 5 * error + 1e-9)[judged].all()
    again = log_evidence(moved, x.to(GPU), 2000)
    assert torch.equal(again.log_evidence, there.log_evidence)  # one seed, one answer


def test_ppca():
    x = digits()
    here, there = PPCA.fit(x, 5), PPCA.fit(x.to(GPU), 5)
    close(there.loc, here.loc)
    close(there.scale, here.scale)
    close(there.weight @ there.weight.T, here.weight @ here.weight.T)  # a column's sign is free
    close(there.log_evidence(x.to(GPU)), here.log_evidence(x))
    close(log_evidence(there.to_vae(), x.to(GPU), 2).log_evidence, here.log_evidence(x))
    assert there.posterior(x.to(GPU)).mean.device.type == GPU


def test_comparison():
    torch.manual_seed(3)
    x = digits()
    vae = linear_vae(64, 3).initialise(x)
    moved = copy.deepcopy(vae).to(GPU)
    here, there = compare_posteriors(vae, x), compare_posteriors(moved, x.to(GPU))
    for name in ("kl", "wasserstein", "mean_error", "scale_ratio", "gap"):
        close(getattr(there, name), getattr(here, name))


@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO"])
def test_what_a_gpu_has_fitted_the_cpu_judges_alike(elbo):
    torch.manual_seed(4)
    x = digits()
    vae = linear_vae(64, 3).initialise(x)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    options = {"elbo": elbo, "epochs": 20, "batch_size": 64, "learning_rate": 0.05, "schedule": "one-cycle"}
    history = fit(vae, x, **options, device="auto", validation=x[:50], keep="best", clip=10.0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state())
    assert all(p.device.type == GPU for p in vae.parameters())
    assert history.elbo[-1] > history.elbo[0]
    here = copy.deepcopy(vae).cpu()
    close(exact_log_evidence(vae, x.to(GPU)), exact_log_evidence(here, x))
    exact = VAE(here.prior, here.likelihood, Conditional(ExactNormal(here.prior, here.likelihood)))
    moved = copy.deepcopy(exact).to(GPU)
    close(log_evidence(moved, x.to(GPU), 5).log_evidence, log_evidence(exact, x, 5).log_evidence)


def test_an_exact_guide_trains_to_the_same_numbers():
    """Without noise in the loss, a run is the same on both devices."""
    x, runs = digits(), []
    for device in ("cpu", GPU):
        vae = PPCA.fit(x, 3).to_vae()
        with torch.no_grad():
            vae.likelihood.network.weight += 0.1
        history = fit(vae, x, epochs=3, batch_size=32, learning_rate=1e-3, device=device, clip=1.0)
        runs.append((vae.cpu(), torch.tensor(history.elbo)))
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-9, atol=1e-9)
    for here, there in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-7)


def test_one_seed_is_one_run():
    x, runs = digits(), []
    for _ in range(2):
        torch.manual_seed(5)
        vae = linear_vae(64, 2)
        runs.append((fit(vae, x, epochs=2, batch_size=50, device=GPU).elbo, vae.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-12)
    for key, value in runs[0][1].items():
        torch.testing.assert_close(value, runs[1][1][key], rtol=1e-9, atol=1e-12)


def test_batches_come_in_one_order():
    x = digits()
    for epoch in range(3):
        here = data.batches({"x": x}, 37, seed=3, epoch=epoch)
        there = data.batches({"x": x.to(GPU)}, 37, seed=3, epoch=epoch)
        for a, b in zip(here, there, strict=True):
            assert b["x"].device.type == GPU
            assert torch.equal(a["x"], b["x"].cpu())


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_a_refused_run_is_rolled_back():
    vae = linear_vae(64, 2)
    with pytest.raises(ValueError, match="finite loss"):
        fit(
            vae,
            digits(),
            epochs=3,
            batch_size=50,
            learning_rate=1e200,
            optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr),
        )
    assert all(p.isfinite().all() for p in vae.parameters())
