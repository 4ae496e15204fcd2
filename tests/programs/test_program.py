import copy
import gc
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.ops.stats import effective_sample_size
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae import VAE, Conditional, Program, fit, log_weights, unique_name
from ppl_vae._seeds import fork_rng
from ppl_vae.families import Bernoulli, ExactNormal, Family, FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear, Table
from ppl_vae.programs import learned_params
from ppl_vae.programs.program import load_program
from ppl_vae.programs.sites import structure
from ppl_vae.programs.traces import check_batch

CPU = torch.device("cpu")
PRIORS: dict[str, Callable[[], Family]] = {
    "StandardNormal": lambda: StandardNormal(2),
    "Normal": lambda: Normal(2),
    "Normal(shared)": lambda: Normal(2, scale="shared"),
    "FullNormal": lambda: FullNormal(2),
    "MixtureNormal": lambda: MixtureNormal(2, components=3),
}


def _vae(prior: str = "StandardNormal", likelihood: Family | None = None) -> VAE:
    return VAE(
        prior=Conditional(PRIORS[prior]()),
        likelihood=Conditional(Normal(5) if likelihood is None else likelihood, MLP(hidden=[4])),
        posterior=Conditional(Normal(2), MLP(hidden=[4])),
    )


def _linear(latent: int = 2, features: int = 5) -> VAE:
    """Give a linear-Gaussian VAE with random parameters, whose guide is the exact posterior."""
    prior = Conditional(StandardNormal(latent))
    likelihood = Conditional(Normal(features, scale="feature"), Linear(), context=latent)
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter))
    return vae


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _moved(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in module.named_parameters() if not torch.equal(value, before[name])]


def _params() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


# Names and the parameter store ----------------------------------------------------------------------------------------


def test_unique_name_is_kept_by_the_instance_alone() -> None:
    module = _vae()
    name = unique_name(module)
    assert unique_name(module) == name
    assert name != unique_name(copy.deepcopy(module))
    assert name != unique_name(_vae())
    assert "$$$" not in name


def test_unique_name_is_not_given_again_after_garbage_collection() -> None:
    names = []
    for _ in range(50):
        names.append(unique_name(nn.Linear(1, 1)))
        gc.collect(0)
    assert len(set(names)) == 50


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("prior", PRIORS)
def test_two_programs_train_under_stock_svi(prior: str, elbo: Any) -> None:
    """With equal names in the store, the second would never move."""
    x = torch.randn(20, 5)
    first = _vae(prior)
    for program in (first, _vae(prior), copy.deepcopy(first)):
        before, others = _values(program), _values(first)
        svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-2}), elbo())
        losses = [svi.step(x=x) for _ in range(3)]
        assert np.isfinite(losses).all()
        assert _moved(program, before) == list(before)
        if program is not first:
            assert not _moved(first, others)


def test_stock_svi_and_fit_take_turns() -> None:
    x, vae = torch.randn(20, 5), _vae("Normal")
    for _ in range(2):
        before = _values(vae)
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(x=x)
        assert _moved(vae, before) == list(before)
        before = _values(vae)
        fit(vae, x, epochs=1, device="cpu", learning_rate=1e-2)
        assert _moved(vae, before) == list(before)


def test_fit_leaves_the_store_as_it_was() -> None:
    pyro.param("loc", torch.tensor(7.0))
    fit(_vae("Normal"), torch.randn(20, 5), epochs=1, device="cpu")
    assert _params() == {"loc": 7.0}


def _bare() -> Program:
    """Give z ~ N(0, 1), x ~ N(z + loc, 1) as bare functions; the guide may become the posterior N((x - loc)/2, 1/2)."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        bias = pyro.param("bias", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2 + bias, scale))

    return Program(model, guide)


def _train(program: Program, x: Tensor, epochs: int) -> list[float]:
    settings: Any = {"elbo": "TraceMeanField_ELBO", "batch_size": 50, "learning_rate": 0.05, "device": "cpu"}
    return fit(program, x, epochs=epochs, **settings).elbo


def test_bare_parameters_train_and_are_remembered() -> None:
    x = 3 + 2**0.5 * torch.randn(50, 1)
    program = _bare()
    rising = _train(program, x, 200)
    variance = ((x - x.mean()) ** 2).mean().item()
    best = -0.5 * math.log(4 * math.pi) - variance / 4  # log p(x) at loc = mean, as p(x) = N(loc, 2)
    assert _params() == {}
    assert rising[0] < best - 1
    assert rising[-1] > best - 0.1
    assert _train(program, x, 1)[0] > best - 0.1
    assert _train(_bare(), x, 1)[0] < best - 1


def test_bare_parameters_of_one_name_are_each_programs_own() -> None:
    a, b = torch.randn(50, 1) + 3, torch.randn(50, 1) - 3
    first, second = _bare(), _bare()
    _train(first, a, 200)
    high = _train(first, a, 1)[0]
    assert _train(second, b, 1)[0] < high - 1
    _train(second, b, 200)
    assert _train(first, a, 1)[0] == pytest.approx(high, abs=0.1)


def test_a_parameter_of_that_name_in_the_store_stays_as_it_was() -> None:
    pyro.param("loc", torch.tensor(-1.0))
    program, x = _bare(), 3 + torch.randn(50, 1)
    rising = _train(program, x, 200)
    assert _params() == {"loc": -1.0}
    assert rising[0] + 1 < rising[-1]  # it begins there, and learns all the same
    assert learned_params(program)["loc"].item() == pytest.approx(x.mean().item(), abs=0.1)


def test_the_store_is_left_alone_when_a_program_fails() -> None:
    pyro.param("mine", torch.tensor(7.0))
    program = _bare()

    def model(x: Tensor) -> None:
        program.model(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        _train(Program(model, program.guide), torch.randn(9, 1), 1)
    assert _params() == {"mine": 7.0}


@dataclass
class _Plain:
    """A program that is no module, and cannot be hashed."""

    model: Any
    guide: Any


@pytest.mark.parametrize("make", [_Plain, lambda model, guide: SimpleNamespace(model=model, guide=guide)])
def test_any_object_with_model_and_guide_is_a_program(make: Any) -> None:
    x, bare = 3 + torch.randn(50, 1), _bare()
    program = make(bare.model, bare.guide)
    assert structure(program, {"x": x}).latents == ("z",)
    first = _train(program, x, 20)[-1]
    assert _train(program, x, 1)[0] > first - 0.5 > _train(make(bare.model, bare.guide), x, 1)[0]
    assert _params() == {}


def test_program_registers_modules() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> None:
            pass

    program = Program(Part(), Part())
    assert {name for name, _ in program.named_parameters()} == {"model.weight", "guide.weight"}


@pytest.mark.parametrize("name", ["model", "guide"])
def test_program_refuses_what_cannot_be_called(name: str) -> None:
    parts: Any = {"model": print, "guide": print, name: 3}
    with pytest.raises(TypeError, match=f"`{name}` to be a function or module of the batch; got 3"):
        Program(**parts)


# Structure ------------------------------------------------------------------------------------------------------------


def _two(order: tuple[str, str], *, kind: Any = dist.Normal) -> Program:
    """Give a program of two latent sites whose guide visits them in `order`."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name in order:
                pyro.sample(name, kind(x[:, 0], 1.0))

    return Program(model, guide)


def test_structure_of_a_vae() -> None:
    found = structure(_vae(), {"x": torch.randn(3, 5)})
    assert (found.latents, found.observed, found.nesting) == (("z",), ("x",), 1)
    assert (found.kl, found.same_order) == ({"z": "analytic"}, True)


def test_structure_sees_the_order_of_the_sites() -> None:
    x = torch.randn(3, 1)
    down, up = (structure(_two(order), {"x": x}) for order in (("top", "z"), ("z", "top")))
    assert down.latents == up.latents == ("top", "z")
    assert (down.same_order, up.same_order) == (True, False)


def test_fit_refuses_the_mean_field_bound_for_a_bottom_up_guide() -> None:
    with pytest.raises(ValueError, match=r"visit the latent sites in one order, top, z, for TraceMeanField_ELBO"):
        fit(_two(("z", "top")), torch.randn(3, 1), elbo="TraceMeanField_ELBO", epochs=1, device="cpu")


def test_structure_tells_analytic_from_sampled_terms() -> None:
    found = structure(_two(("top", "z"), kind=dist.Logistic), {"x": torch.randn(3, 1)})
    assert found.kl == {"top": "sampled", "z": "sampled"}
    assert structure(_two(("top", "z")), {"x": torch.randn(3, 1)}).kl == {"top": "analytic", "z": "analytic"}
    assert structure(_vae("MixtureNormal"), {"x": torch.randn(3, 5)}).kl == {"z": "sampled"}


def test_structure_counts_inner_plates() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 5, dim=-2):
                z = pyro.sample("z", dist.Normal(top, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("top", dist.Normal(x.mean(-1), 1.0))
            with pyro.plate("features", 5, dim=-2):
                pyro.sample("z", dist.Normal(x.T, 1.0))

    found = structure(Program(model, guide), {"x": torch.randn(3, 5)})
    assert (found.nesting, found.latents, found.observed) == (2, ("top", "z"), ("x",))


def test_structure_leaves_store_and_random_state_alone() -> None:
    before = torch.get_rng_state()
    structure(_bare(), {"x": torch.randn(3, 1)})
    structure(_vae(), {"x": torch.zeros(3, 5)})
    assert _params() == {}
    torch.set_rng_state(before)
    expected = torch.randn(3)
    torch.set_rng_state(before)
    structure(_two(("top", "z")), {"x": torch.zeros(3, 1)})
    assert torch.equal(torch.randn(3), expected)


def _guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def _no_plate(x: Tensor, observe: bool = True) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    if observe:
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:, 0])


def _other_plate(x: Tensor, observe: bool = True) -> None:
    with pyro.plate("batch", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def _inner_data(x: Tensor, observe: bool = True) -> None:
    with pyro.plate("features", 1, dim=-1), pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _outside(x: Tensor, observe: bool = True) -> None:
    if observe:
        pyro.sample("shared", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_other_plate, r"plate 'data' at dim -1; all sites are in 'batch'.*data_plate='batch'"),
        (_inner_data, r"data plate 'data' as the outermost one at dim -1; it is at dim -2"),
    ],
)
@pytest.mark.parametrize("function", [structure, lambda program, batch: fit(program, batch, epochs=1, device="cpu")])
def test_programs_whose_data_plate_is_misplaced_are_refused(function: Any, model: Any, message: str) -> None:
    def scored(x: Tensor) -> None:
        model(x)
        pyro.param("p", torch.tensor(0.0))

    def guide(x: Tensor) -> None:
        model(x, observe=False)

    with pytest.raises(ValueError, match=message):
        function(Program(scored, guide), {"x": torch.randn(2, 1)})
    assert structure(Program(scored, guide, data_plate=None), {"x": torch.randn(2, 1)}).whole


def test_another_plate_holds_the_data_where_the_program_says_so() -> None:
    def guide(x: Tensor) -> None:
        _other_plate(x, observe=False)

    x = torch.randn(5, 1)
    weights = log_weights(Program(_other_plate, guide, data_plate="batch"), x, 3)
    assert weights.shape == (3, 5)
    whole = log_weights(Program(_other_plate, guide, data_plate=None), x, 3)
    assert torch.allclose(weights.sum(1, keepdim=True), whole)


@pytest.mark.parametrize(("model", "guide"), [(_no_plate, _no_plate), (_outside, _outside), (_outside, _no_plate)])
def test_the_whole_counts_as_one_where_a_site_is_outside_the_data_plate(model: Any, guide: Any) -> None:
    found = structure(Program(model, lambda x: guide(x, observe=False)), {"x": torch.randn(4, 1)})
    assert found.whole
    assert found.shapes["z"] == (4,)


def test_latent_sites_must_match() -> None:
    def extra(x: Tensor) -> None:
        _guide(x)
        with pyro.plate("more", len(x)):
            pyro.sample("w", dist.Normal(x[:, 0], 1.0))

    def missing(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("top", dist.Normal(x[:, 0], 1.0))

    x = torch.randn(2, 1)
    model = _two(("top", "z")).model
    with pytest.raises(ValueError, match=r"only the model has \['z'\], only the guide has none"):
        structure(Program(model, missing), {"x": x})
    with pytest.raises(ValueError, match=r"only the model has \['top'\], only the guide has \['w'\]"):
        structure(Program(model, extra), {"x": x})


# Pyro's other tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_predictive_draws_from_prior_and_posterior(prior: str, parallel: bool) -> None:
    vae, x = _vae(prior), torch.randn(6, 5)
    free = Predictive(poutine.uncondition(vae.model), num_samples=7, parallel=parallel)(x=x)
    assert {key: value.shape for key, value in free.items()} == {"z": (7, 6, 2), "x": (7, 6, 5)}
    codes = Predictive(vae.guide, num_samples=7, parallel=parallel)(x=x)
    assert codes["z"].shape == (7, 6, 2)
    drawn = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=7, parallel=parallel)(x=x)
    assert {key: value.shape for key, value in drawn.items()}["x"] == (7, 6, 5)


def test_predictive_agrees_with_the_closed_form() -> None:
    vae, x, draws = _linear(), torch.randn(3, 5), 4_000
    exact: Any = vae.approximate(x)
    drawn = Predictive(
        poutine.uncondition(vae.model), guide=vae.guide, num_samples=draws, parallel=True, return_sites=["z", "x"]
    )(x=x)
    network: Any = vae.likelihood.network
    w, noise = network.weight, vae.likelihood.family.own_scale()  # type: ignore[operator]
    for name, loc, covariance in (
        ("z", exact.mean, exact.covariance_matrix),
        ("x", exact.mean @ w.T + network.bias, w @ exact.covariance_matrix @ w.T + torch.diag(noise**2)),
    ):
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        assert ((drawn[name].mean(0) - loc).abs() < 5 * (variance / draws).sqrt()).all()
        assert ((drawn[name].var(0) / variance - 1).abs() < 5 * (2 / draws) ** 0.5).all()


@pytest.mark.parametrize("latent", [1, 2])
def test_nuts_finds_the_exact_posterior(latent: int) -> None:
    vae, x = _linear(latent), torch.randn(2, 5)
    exact: Any = vae.approximate(x)
    mcmc = MCMC(NUTS(vae.model), num_samples=250, warmup_steps=100, disable_progbar=True)
    mcmc.run(x=x)
    z = mcmc.get_samples()["z"]
    assert z.shape == (250, 2, latent)
    ess = effective_sample_size(z.unsqueeze(0), 0, 1).clamp(10, 250)
    assert ((z.mean(0) - exact.mean).abs() < 5 * (exact.variance / ess).sqrt()).all()
    assert ((z.var(0) / exact.variance - 1).abs() < 5 * (2 / ess).sqrt()).all()


# Random states --------------------------------------------------------------------------------------------------------


def _break_under(seed: int) -> None:
    with fork_rng(seed, device=CPU):
        torch.randn(3)
        raise RuntimeError("broken")


def test_seeded_is_set_by_its_key_and_leaves_the_global_state() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    draws = []
    for key in ((0,), (0,), (1,), (0, 0), (0, 1)):
        with fork_rng(*key, device=CPU):
            draws.append(torch.randn(3).tolist())
    with pytest.raises(RuntimeError, match="broken"):
        _break_under(3)
    assert torch.equal(torch.randn(4), expected)
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("prior", PRIORS)
def test_sample_and_reconstruct(prior: str) -> None:
    vae, x = _vae(prior), torch.randn(6, 5)
    state = torch.get_rng_state()
    drawn, shown = vae.sample(7, seed=1), vae.reconstruct(x, seed=1)
    assert (drawn.shape, shown.shape) == ((7, 5), (6, 5))
    assert torch.equal(drawn, vae.sample(7, seed=1))
    assert torch.equal(shown, vae.reconstruct(x, seed=1))
    assert not torch.equal(drawn, vae.sample(7, seed=2))
    assert not torch.equal(shown, vae.reconstruct(x, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    assert not drawn.requires_grad
    assert not shown.requires_grad


@pytest.mark.parametrize("family", [Normal, Bernoulli, FullNormal, MixtureNormal])
def test_every_likelihood_samples_and_reconstructs(family: Any) -> None:
    vae = _vae(likelihood=family(5))
    x = (torch.rand(6, 5) < 0.5).to(torch.get_default_dtype())
    assert vae.sample(7).shape == (7, 5)
    shown = vae.reconstruct(x)
    assert shown.shape == (6, 5)
    if family is Bernoulli:
        assert ((shown > 0) & (shown < 1)).all()


def test_samples_have_the_moments_of_the_model() -> None:
    vae, n = _linear(), 40_000
    network: Any = vae.likelihood.network
    noise = vae.likelihood.family.own_scale()  # type: ignore[operator]
    covariance = (network.weight @ network.weight.T + torch.diag(noise**2)).detach()
    x = vae.sample(n)
    variance = covariance.diagonal()
    assert ((x.mean(0) - network.bias).abs() < 5 * (variance / n).sqrt()).all()
    error = ((variance.outer(variance) + covariance**2) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * error).all()


def test_reconstruct_takes_masks_and_one_draw_of_z() -> None:
    vae, x = _linear(), torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.5
    shown = vae.reconstruct({"x": torch.where(mask, x, math.nan), "mask": mask}, seed=3)
    with fork_rng(3, device=CPU), torch.no_grad():
        z = vae.approximate(x, mask).sample()
    torch.testing.assert_close(shown, vae.likelihood(z).mean.detach())


# A VAE and its parts --------------------------------------------------------------------------------------------------


def _parts(**other: Any) -> dict[str, Any]:
    return {
        "prior": Conditional(StandardNormal(2)),
        "likelihood": Conditional(Normal(5), Linear()),
        "posterior": Conditional(Normal(2), Linear()),
    } | other


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "latent sizes": (
        lambda: _parts(prior=Conditional(StandardNormal(3))),
        ValueError,
        r"prior and posterior of one latent shape; got \(3,\) and \(2,\)",
    ),
    "likelihood's context": (
        lambda: _parts(likelihood=Conditional(Normal(5), Linear(), context=3)),
        ValueError,
        r"context of shapes \[\(3,\)\], as built; got \[\(2,\)\]",
    ),
    "posterior's context": (
        lambda: _parts(posterior=Conditional(Normal(2), Linear(), context=4)),
        ValueError,
        r"context of shapes \[\(4,\)\], as built; got \[\(5,\)\]",
    ),
    "Bernoulli posterior": (
        lambda: _parts(posterior=Conditional(Bernoulli(2), Linear())),
        ValueError,
        r"reparameterised posterior on the support of the prior StandardNormal, the real numbers; got Bernoulli\(2,\)",
    ),
    "Bernoulli prior": (
        lambda: _parts(prior=Conditional(Bernoulli(2))),
        ValueError,
        r"on the support of the prior Bernoulli, {0, 1}; got Normal\(2,\)",
    ),
    "mixture of one dimension": (
        lambda: _parts(prior=Conditional(StandardNormal(1)), posterior=Conditional(MixtureNormal(1), Linear())),
        ValueError,
        r"reparameterised posterior .*; got MixtureNormal\(1,\)",
    ),
    "prior with context": (
        lambda: _parts(prior=Conditional(Normal(2), Linear(), context=5)),
        ValueError,
        r"prior without context; got one of shapes \[\(5,\)\]",
    ),
    "likelihood without network": (
        lambda: _parts(likelihood=Conditional(Normal(5))),
        ValueError,
        "takes a context of size 2, such as Linear or MLP; got Free",
    ),
    "family for prior": (lambda: _parts(prior=StandardNormal(2)), TypeError, "`prior` to be a Conditional; got"),
    "network for likelihood": (lambda: _parts(likelihood=Linear()), TypeError, "`likelihood` to be a Conditional"),
    "none for posterior": (lambda: _parts(posterior=None), TypeError, "`posterior` to be a Conditional; got None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        VAE(**make())


def test_shapes_of_pictures_go_through() -> None:
    vae = VAE(
        Conditional(StandardNormal((2, 2))),
        Conditional(Normal((3, 4)), MLP(hidden=[5])),
        Conditional(Normal((2, 2)), MLP(hidden=[5])),
    )
    x = torch.randn(6, 3, 4)
    vae.initialise(x)
    assert vae.sample(7).shape == (7, 3, 4)
    assert vae.reconstruct(x).shape == (6, 3, 4)
    assert math.isfinite(fit(vae, x, epochs=1, device="cpu", particles=2, elbo="TraceMeanField_ELBO").elbo[0])


# Data that do not fit -------------------------------------------------------------------------------------------------


def _refused(program: Any, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(program, x, epochs=1, device="cpu")


def test_data_of_another_shape_are_refused() -> None:
    _refused(_vae(), torch.randn(3, 4), r"data of shape \(n, 5\); got \(3, 4\)")
    _refused(_vae(likelihood=Normal((2, 3))), torch.randn(3, 6), r"data of shape \(n, 2, 3\); got \(3, 6\)")


def test_grey_pixels_under_a_bernoulli_are_refused() -> None:
    x = torch.zeros(4, 5)
    x[2, 3], x[3, 0] = 0.5, 7.0
    message = r"support of Bernoulli, \{0, 1\}, at site 'x'; got 0.5 at row 2, column 3 and 2 such values"
    _refused(_vae(likelihood=Bernoulli(5)), x, message)
    _refused(_vae(likelihood=Bernoulli(5)), x, r'Binarise the data \(binarization = "dynamic"')
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 3] = False
    _refused(_vae(likelihood=Bernoulli(5)), {"x": x, "mask": mask}, "got 7 at row 3, column 0 and 1 such values")
    mask[3, 0] = False
    fit(_vae(likelihood=Bernoulli(5)), {"x": x, "mask": mask}, epochs=1, device="cpu")


def test_a_nan_is_named_by_row_and_column() -> None:
    x = torch.zeros(4, 5)
    x[1, 2] = math.nan
    _refused(_vae(), x, r"finite numbers in `x`; got nan in row 1, column 2")
    with pytest.raises(ValueError, match="nan in row 1, column 2"):
        _vae().initialise(x)


@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO"])
@pytest.mark.parametrize("family", [Normal, FullNormal, MixtureNormal])
def test_a_nan_under_the_mask_trains(family: Any, elbo: Any) -> None:
    x, mask = torch.randn(20, 5), torch.rand(20, 5) < 0.6
    vae = _vae(likelihood=family(5))
    batch = {"x": torch.where(mask, x, math.nan), "mask": mask}
    vae.initialise(**batch)
    before = _values(vae)
    history = fit(vae, batch, elbo=elbo, epochs=2, device="cpu")
    assert np.isfinite(history.elbo).all()
    assert _moved(vae, before) == list(before)
    assert all(value.isfinite().all() for value in vae.parameters())


def _table(rows: int) -> VAE:
    return VAE(**_parts(posterior=Conditional(Normal(2), Table(rows))))


def test_a_table_needs_a_row_for_each_datum() -> None:
    x = torch.randn(6, 5)
    _refused(_table(5), x, r"index is below the table's 5 rows; got 5.*Linear or MLP network for new data")
    _refused(_table(6), {"x": x, "index": torch.tensor([0, 1, 2, 3, 4, 6])}, r"table's 6 rows; got 6")
    _refused(_table(6), {"x": x, "index": torch.tensor([0, 1, 2, 3, 4, -1])}, "index")
    assert math.isfinite(fit(_table(6), x, epochs=1, device="cpu").elbo[0])


def test_a_table_needs_the_index() -> None:
    x = torch.randn(6, 5)
    with pytest.raises(
        ValueError, match="`index`, the number of each datum in its data set, for a posterior on a Table"
    ):
        _table(6).guide(x)
    assert check_batch(_table(6), {"x": x})["index"].tolist() == [0, 1, 2, 3, 4, 5]
    assert _table(6).reconstruct(x).shape == (6, 5)


def test_a_table_keeps_each_datums_row_through_shuffled_batches() -> None:
    """With a likelihood N(z, s^2) each row's mean converges to x / (1 + s^2), whatever the order of the data."""
    x = torch.randn(12, 2)
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Normal(2, scale=0.5), Linear()),
        Conditional(Normal(2, scale=0.4), Table(12)),
    )
    likelihood: Any = vae.likelihood.network
    with torch.no_grad():
        likelihood.weight.copy_(torch.eye(2))
    rows: Any = vae.posterior.network
    fit(
        vae, x, elbo="TraceMeanField_ELBO", epochs=160, batch_size=5, learning_rate=0.1, schedule="one-cycle",
        particles=8, device="cpu", parameters=[rows.value],
    )  # fmt: skip
    torch.testing.assert_close(rows.value.detach(), x / 1.25, rtol=0, atol=0.1)


def test_prepare_brings_data_to_the_programs_type() -> None:
    batch = check_batch(_vae().float(), {"x": torch.randn(3, 5), "y": torch.arange(3)})
    assert batch["x"].dtype == torch.float32
    assert set(batch) == {"x", "index"}
    with pytest.raises(ValueError, match="Expected data named x, mask, index, size_factor; got images"):
        check_batch(_vae(), {"images": torch.zeros(3, 5)})


# The starting point ---------------------------------------------------------------------------------------------------


def _silence(vae: VAE) -> Any:
    """Zero the likelihood's last weights, so that its answer is its bias, and give the distribution."""
    network: Any = vae.likelihood.network
    nn.init.zeros_(network.layers[-1].weight)
    return vae.likelihood(torch.randn(4, 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["network", "shared", "feature", 0.7])
def test_initialise_begins_at_mean_and_deviation(scale: Any, masked: bool) -> None:
    x = torch.randn(300, 5) * torch.tensor([0.1, 1.0, 2.0, 3.0, 10.0]) + torch.arange(5.0)
    mask = torch.rand(300, 5) < 0.7
    holes = torch.where(mask, x, math.nan) if masked else x
    vae = _vae(likelihood=Normal(5, scale=scale))
    assert vae.initialise(holes, mask if masked else None) is vae
    loc, deviation = np.nanmean(holes.numpy(), 0), np.nanstd(holes.numpy(), 0)
    d = _silence(vae)
    expected = {"shared": np.full(5, np.sqrt((deviation**2).mean())), "0.7": np.full(5, 0.7)}
    np.testing.assert_allclose(d.mean[0].detach(), loc, rtol=1e-9)
    np.testing.assert_allclose(d.stddev[0].detach(), expected.get(str(scale), deviation), rtol=1e-8)
    network: Any = vae.posterior.network
    np.testing.assert_allclose(network.shift, loc, rtol=1e-12)
    np.testing.assert_allclose(network.scale, np.sqrt((deviation**2).mean()), rtol=1e-12)


def test_initialise_begins_at_the_logit_of_the_clipped_mean() -> None:
    x = (torch.rand(200, 5) < torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])).to(torch.get_default_dtype())
    vae = _vae(likelihood=Bernoulli(5)).initialise(x)
    np.testing.assert_allclose(_silence(vae).mean[0].detach(), x.mean(0).clip(1e-3, 1 - 1e-3), rtol=1e-10)


def test_initialise_refuses_constant_features_under_scales_of_their_own() -> None:
    x = torch.randn(20, 5)
    x[:, 3] = 1.0
    with pytest.raises(ValueError, match=r"columns 3\)"):
        _vae(likelihood=Normal(5, scale="feature")).initialise(x)
    vae = _vae(likelihood=Normal(5, scale="shared")).initialise(x)
    assert torch.isfinite(vae.reconstruct(x)).all()


def test_initialise_takes_constant_data_under_one_scale() -> None:
    vae = _vae(likelihood=Normal(5, scale=0.5)).initialise(torch.ones(20, 5))
    assert torch.isfinite(vae.reconstruct(torch.ones(20, 5))).all()


def test_initialise_lets_modules_of_ones_own_be() -> None:
    vae = VAE(**_parts(likelihood=Conditional(Normal(5), nn.Linear(2, 10))))
    before = _values(vae.likelihood)
    vae.initialise(torch.randn(20, 5))
    assert not _moved(vae.likelihood, before)


def test_initialise_makes_the_bound_start_higher() -> None:
    x = 100 + 20 * torch.randn(100, 5)
    torch.manual_seed(1)
    vae = _vae()
    cold = Trace_ELBO(num_particles=20).loss(vae.model, vae.guide, x)
    warm = Trace_ELBO(num_particles=20).loss(vae.initialise(x).model, vae.guide, x)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 400) * 5 * 100
    assert warm < 1.2 * entropy < cold


# Program files --------------------------------------------------------------------------------------------------------

FILE = """
from torch import nn
from ppl_vae import VAE  # imported, hence no program of this file


class One(nn.Module):
    def model(self, x): ...
    def guide(self, x): ...


class Helper:
    def model(self): ...
"""


def _write(folder: Path, text: str, name: str = "program.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_class_has_one_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, FILE)
    modules = set(sys.modules)
    first = load_program(f"{path}:One")
    assert first.__name__ == "One"
    assert load_program(f"{path}:One") is first
    assert load_program(str(path)) is first
    monkeypatch.chdir(tmp_path)
    assert load_program("program.py:One") is first
    assert load_program(f"{tmp_path}/../{tmp_path.name}/program.py:One") is first
    assert len(set(sys.modules) - modules) == 1
    assert "program" not in set(sys.modules) - modules


def test_files_of_one_name_are_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = _write(tmp_path / "a", FILE), _write(tmp_path / "b", FILE)
    assert load_program(str(first)) is not load_program(str(second))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file\.py:Class; got '.*none\.py:One', and .*none\.py is not a Python file"):
        load_program(f"{tmp_path}/none.py:One")
    with pytest.raises(ValueError, match="is not a Python file"):
        load_program(f"{_write(tmp_path, FILE, 'program.txt')}:One")
    with pytest.raises(ValueError, match="is not a Python file"):
        load_program(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "to import; it raised ZeroDivisionError: division by zero"),
        ("import no_such_module_at_all", "it raised ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def (", "it raised SyntaxError"),
    ],
)
def test_a_file_that_raises_is_refused_and_may_be_mended(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            load_program(f"{path}:One")
    _write(tmp_path, FILE + "\n# longer than before, so that no stale bytecode is read\n")
    assert load_program(f"{path}:One").__name__ == "One"


def test_a_class_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, FILE)
    for wanted in ("Two", "Helper", "VAE", "nn"):
        with pytest.raises(ValueError, match=f"the class {wanted} with `model` and `guide`; it has One"):
            load_program(f"{path}:{wanted}")
    with pytest.raises(ValueError, match="it has none"):
        load_program(f"{_write(tmp_path, 'x = 1', 'empty.py')}:One")


def test_a_class_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    path = _write(tmp_path, FILE + re.sub("One", "Two", FILE))
    with pytest.raises(ValueError, match="the class after the colon with `model` and `guide`; it has One, Two"):
        load_program(str(path))
    assert load_program(f"{path}:Two").__name__ == "Two"
