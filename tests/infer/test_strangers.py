"""Programs that others wrote: Pyro's autoguides and discrete sites, trained as stock SVI does or refused by name."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor

from ppl_vae import Program, fit, log_evidence

N = 25


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])


def optimum(x: Tensor) -> Tensor:
    """The bound of the best mean-field guide: log p(x) less the KL of the posterior's correlation."""
    precision = torch.ones(2, 2) / 0.25 + torch.eye(2)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet)
    return dist.Normal(0.0, math.sqrt(2.25)).log_prob(x[:, 0]).mean() - gap


OPTIONS = {"epochs": 400, "learning_rate": 0.05, "particles": 10, "progress": False}


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDelta"])
def test_autoguides_with_a_row_per_datum_train_on_the_whole_as_stock_svi_does(name):
    torch.manual_seed(0)
    x = 1.5 * torch.randn(N, 1)
    program = Program(model, getattr(autoguide, name)(model))
    history = fit(program, x, **OPTIONS, schedule="one-cycle")
    guide = getattr(autoguide, name)(model)
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO(10, vectorize_particles=True))
    for _ in range(400):
        svi.step(x)
    pyro.get_param_store()
    stock = -torch.tensor([svi.evaluate_loss(x) for _ in range(20)]).mean() / N
    pyro.clear_param_store()
    assert history.elbo[-1] == pytest.approx(float(stock), abs=0.05)
    if name == "AutoNormal":
        truth = float(optimum(x))
        assert history.elbo[-1] == pytest.approx(truth, abs=0.05)
        evidence = log_evidence(program, x, 2000)
        assert float(evidence.elbo.mean()) == pytest.approx(truth, abs=0.03)
        exact = dist.Normal(0.0, 1.5).log_prob(x[:, 0])
        error = float(evidence.mc_se.square().sum().sqrt()) / N
        assert abs(float((evidence.log_evidence - exact).mean())) < 5 * error + 1e-3
    else:
        with pytest.raises(ValueError, match="latent sites with a density; got 'z', a point"):
            log_evidence(program, x, 10)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDelta"])
def test_autoguides_are_refused_for_batches_and_validation(name):
    x = torch.randn(N, 1)
    program = Program(model, getattr(autoguide, name)(model))
    with pytest.raises(ValueError, match="no batches of 10: this guide keeps one row per datum.*`index`, or fit with"):
        fit(program, x, batch_size=10, epochs=1)
    with pytest.raises(ValueError, match="no validation data: this guide keeps one row per datum"):
        fit(program, x, validation=x, epochs=1)
    fit(program, x, epochs=1)
    with pytest.raises(ValueError, match="no batches of 24"):
        fit(program, x, batch_size=24, epochs=1)
    with pytest.raises(ValueError, match="data that this guide keeps one row each for|that this program was fitted to"):
        fit(program, x[:10], epochs=1)


def test_a_list_of_autoguides_trains_as_one():
    torch.manual_seed(0)
    x = 1.5 * torch.randn(N, 1)
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(pyro.poutine.block(model, expose=["z"])))
    history = fit(Program(model, guide), x, **OPTIONS, schedule="one-cycle")
    assert history.elbo[-1] == pytest.approx(float(optimum(x)), abs=0.05)


def test_an_autoguide_within_a_function_is_refused():
    guide = autoguide.AutoNormal(model)
    with pytest.raises(ValueError, match="one row each for.*Pass an autoguide itself"):
        fit(Program(model, lambda x: guide(x)), torch.randn(N, 1), epochs=1)


def test_the_analytic_objective_is_refused_for_draws_without_gradient():
    def counting(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        rate = pyro.param("rate", lambda: torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Poisson(rate))

    program, x = Program(counting, guide), torch.randn(N, 1) + 2
    with pytest.raises(ValueError, match="reparameterised sites.*TraceMeanField_ELBO; got 'z'.*Use Trace_ELBO"):
        fit(program, x, elbo="TraceMeanField_ELBO", epochs=1)
    assert math.isfinite(fit(program, x, elbo="Trace_ELBO", epochs=1).elbo[0])
