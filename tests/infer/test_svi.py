"""Training: known optima, the estimators' expectation, a hand-written step, and what is refused or rolled back."""

import copy
import functools
import math
import os
import random
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae import (
    PPCA,
    VAE,
    Conditional,
    Program,
    Target,
    compare_posteriors,
    data,
    exact_log_evidence,
    exact_posterior,
    fit,
    log_evidence,
    log_weights,
)
from ppl_vae.data import minibatches, permutation
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer.step import State
from ppl_vae.networks import MLP, Linear, Table
from ppl_vae.programs.param_store import scope

OBJECTIVES = ("Trace_ELBO", "TraceMeanField_ELBO")
FROZEN = 1e-30  # a learning rate that moves no number in double precision

# Pyro warns of a NaN before fit() explains it; here a warning is an error.
pyro_warns = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")


@functools.cache
def digits():
    return data.load("digits", dtype=torch.float64).train["x"]


def linear_vae(features, latent, network=None):
    return VAE(
        Conditional(StandardNormal(latent)),
        Conditional(Normal(features, scale="shared"), Linear()),
        Conditional(Normal(latent), Linear() if network is None else network),
    )


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sgd(tensors, lr):
    return torch.optim.SGD(tensors, lr=lr)


def within(estimates, truth, limit=5.0):
    """Whether the mean of independent estimates (rows) lies within `limit` standard errors of the truth."""
    estimates = torch.as_tensor(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    return bool(((estimates.mean(0) - truth).abs() <= limit * error + 1e-12).all())


def closed_bound(vae, x):
    """The bound of a linear VAE by hand: E log N(x; Wz + b, s^2) - KL(N(m, S) || N(0, I)), differentiable."""
    network, guide = vae.likelihood.network, vae.posterior.network
    raw = nn.functional.linear((x - guide.shift) / guide.scale, guide.weight, guide.bias)
    loc, scale = raw.chunk(2, -1)
    scale = nn.functional.softplus(scale) + 1e-6
    noise = nn.functional.softplus(vae.likelihood.family.raw_scale) + 1e-6
    error = (x - loc @ network.weight.T - network.bias).square().sum(-1)
    spread = (scale.square() * network.weight.square().sum(0)).sum(-1)
    distortion = -0.5 * (error + spread) / noise**2 - x.shape[1] * (noise.log() + 0.5 * math.log(2 * math.pi))
    rate = 0.5 * (scale.square() + loc.square() - 1 - 2 * scale.log()).sum(-1)
    return (distortion - rate).mean()


# A8, A9, A10: known optima


def test_linear_vae_reaches_ppca():
    torch.manual_seed(0)
    vae = linear_vae(64, 5).initialise(digits())
    history = fit(
        vae, digits(), elbo="TraceMeanField_ELBO", epochs=400, batch_size=500, learning_rate=0.1, schedule="one-cycle"
    )
    ppca = PPCA.fit(digits(), 5)
    best, reached = ppca.log_evidence(digits()).mean(), exact_log_evidence(vae, digits()).mean()
    assert best - 0.05 < reached <= best + 1e-9
    weight = vae.likelihood.network.weight.detach()
    columns = nn.functional.normalize(weight, dim=0)
    assert (columns.T @ columns - torch.eye(5)).abs().max() < 0.15
    cosines = torch.linalg.svdvals(torch.linalg.qr(weight)[0].T @ torch.linalg.qr(ppca.weight)[0])
    assert torch.rad2deg(torch.acos(cosines.clamp(max=1))).max() < 1
    assert abs(float(vae.likelihood.family.own_scale().detach() / ppca.scale) - 1) < 0.01
    bound = closed_bound(vae, digits()).detach()
    assert reached - 0.05 < bound <= reached
    assert history.steps == 1200
    assert abs(history.elbo[-1] - float(bound)) < 0.2


def rotated(latent, x):
    """PPCA's optimum turned by the orthonormal DCT-II, which no mean-field posterior fits, and its gap by formula."""
    ppca = PPCA.fit(x, latent)
    j, i = torch.meshgrid(torch.arange(latent), torch.arange(latent), indexing="ij")
    turn = torch.cos(math.pi / latent * (i + 0.5) * j) * math.sqrt(2 / latent)
    turn[0] /= math.sqrt(2)
    assert torch.allclose(turn @ turn.T, torch.eye(latent))
    weight = ppca.weight @ turn.T
    precision = weight.T @ weight / ppca.scale**2 + torch.eye(latent)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet)
    return PPCA(ppca.loc, weight, ppca.scale), gap


def with_guide(ppca, network):
    exact = ppca.to_vae()
    vae = linear_vae(*ppca.weight.shape, network)
    vae.likelihood.load_state_dict(exact.likelihood.state_dict())
    return vae


def test_mean_field_guide_reaches_its_gap_at_a_rotated_optimum():
    x = digits()
    ppca, gap = rotated(10, x)
    assert 0.5 < gap < 1.2  # 0.811 on all 1,797 digits
    vae = with_guide(ppca, Linear())
    vae.posterior.network.centre(x.mean(0), x.std())
    before = state(vae.likelihood)
    fit(
        vae,
        x,
        elbo="TraceMeanField_ELBO",
        epochs=200,
        batch_size=500,
        learning_rate=0.05,
        schedule="one-cycle",
        parameters=list(vae.posterior.parameters()),
    )
    assert equal(before, state(vae.likelihood))
    truth = ppca.log_evidence(x).mean() - gap
    assert truth - 0.02 < closed_bound(vae, x).detach() <= truth + 1e-9
    assert abs(compare_posteriors(vae, x).gap.mean() - gap) < 0.02
    estimate = log_evidence(vae, x, 100).summary()["elbo"]
    assert abs(estimate["mean"] - float(truth)) < 0.02 + 5 * estimate["mc_se"]


def test_table_guide_reaches_the_same_gap_row_by_row():
    x = digits()
    ppca, gap = rotated(10, x)
    few = x[:100]
    vae = with_guide(ppca, Table(len(few)))
    before = state(vae.likelihood)
    fit(
        vae,
        few,
        elbo="TraceMeanField_ELBO",
        epochs=400,
        batch_size=50,
        particles=20,
        learning_rate=0.1,
        schedule="one-cycle",
        parameters=list(vae.posterior.parameters()),
    )
    assert equal(before, state(vae.likelihood))
    reached = compare_posteriors(vae, few).gap
    assert (reached > float(gap) - 1e-9).all()  # no mean-field posterior is nearer, at any datum
    assert abs(reached.mean() - gap) < 0.02
    exact = exact_posterior(vae, few)
    deviation = (vae.posterior.network.value[:, :10].detach() - exact.mean) / exact.stddev
    assert deviation.abs().max() < 0.5  # the rows are in the order of the data


def test_what_is_not_learned_gathers_no_gradient_and_nothing_is_left_behind():
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    vae = linear_vae(3, 2)
    fit(vae, x, epochs=2, batch_size=10, parameters=list(vae.posterior.parameters()))
    assert all(p.grad is None or not p.grad.any() for p in vae.parameters())
    fit(vae, x, epochs=2, batch_size=10)
    assert all(p.grad is None or not p.grad.any() for p in vae.parameters())


def test_exact_guide_has_no_noise_under_trace_elbo():
    x = digits()[:200]
    ppca = PPCA.fit(x, 3)
    vae, truth = ppca.to_vae(), float(ppca.log_evidence(x).mean())
    options = {"learning_rate": FROZEN, "optimizer": sgd}
    sampled = torch.tensor(fit(vae, x, epochs=20, batch_size=64, **options).elbo)
    assert (sampled - truth).abs().max() < 1e-8
    assert sampled.std() < 1e-12 * abs(truth)
    analytic = torch.tensor(fit(vae, x, elbo="TraceMeanField_ELBO", epochs=100, batch_size=64, **options).elbo)
    assert within(analytic, truth)
    assert 1e-3 < analytic.std() < 1


# The estimators in expectation


@pytest.mark.parametrize("elbo", OBJECTIVES)
def test_value_and_gradient_agree_with_the_closed_form(elbo):
    torch.manual_seed(1)
    x = torch.randn(12, 4) * 2 + 1
    vae = linear_vae(4, 2).initialise(x)
    with torch.no_grad():
        for p in vae.parameters():
            p += 0.3 * torch.randn_like(p)
    start = state(vae)
    bound = closed_bound(vae, x)
    names, tensors = zip(*vae.named_parameters(), strict=True)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(bound, tensors)])
    values, gradients = [], []
    for seed in range(60):
        vae.load_state_dict(start)
        history = fit(
            vae, x, elbo=elbo, epochs=1, batch_size=12, particles=200, learning_rate=1.0, optimizer=sgd, seed=seed
        )
        after = dict(vae.named_parameters())
        gradients.append(torch.cat([(after[name].detach() - start[name]).flatten() for name in names]))
        values += history.elbo
    assert within(values, float(bound.detach()))
    assert within(torch.stack(gradients), truth)
    assert truth.abs().min() > 1e-4  # a gradient of zero would prove little


def test_both_objectives_agree_on_a_nonlinear_vae():
    torch.manual_seed(2)
    x = torch.randn(10, 3).sign().clamp_min(0)
    vae = VAE(
        Conditional(Normal(2)),
        Conditional(Bernoulli(3), MLP(hidden=[4])),
        Conditional(Normal(2), MLP(hidden=[4])),
    ).initialise(x)
    with torch.no_grad():
        for p in vae.parameters():
            p += 0.3 * torch.randn_like(p)
    start, runs = state(vae), {}
    for elbo in OBJECTIVES:
        rows = []
        for seed in range(50):
            vae.load_state_dict(start)
            options = {"epochs": 1, "batch_size": 10, "particles": 300, "learning_rate": 1.0, "optimizer": sgd}
            value = fit(vae, x, elbo=elbo, seed=seed + 100 * OBJECTIVES.index(elbo), **options).elbo
            moved = [(after.detach() - start[name]).flatten() for name, after in vae.named_parameters()]
            rows.append(torch.cat([torch.tensor(value), *moved]))
        runs[elbo] = torch.stack(rows)
    a, b = runs.values()
    error = ((a.var(0) + b.var(0)) / 50).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error).all()
    assert (b.std(0)[0] < a.std(0)[0]).item()  # the analytic KL takes noise away


# A33: batches, and the last, ragged one


@pytest.mark.parametrize("size", [1, 7, 32, 50, 1000])
def test_an_epoch_is_the_mean_over_data_whatever_the_batches(size):
    x = digits()[:50]
    ppca = PPCA.fit(x, 3)
    history = fit(ppca.to_vae(), x, epochs=2, batch_size=size, learning_rate=FROZEN, optimizer=sgd)
    assert history.elbo == pytest.approx([float(ppca.log_evidence(x).mean())] * 2, rel=1e-12)
    assert history.steps == 2 * math.ceil(50 / size)


@pytest.mark.parametrize("elbo", OBJECTIVES)
def test_random_batches_have_the_full_data_loss_on_average(elbo):
    torch.manual_seed(3)
    x = torch.randn(23, 3)
    vae = linear_vae(3, 2)
    truth = float(closed_bound(vae, x).detach())
    for size in (5, 23):
        history = fit(vae, x, elbo=elbo, epochs=100, batch_size=size, learning_rate=FROZEN, optimizer=sgd)
        assert within(history.elbo, truth)


def test_the_ragged_batch_weighs_by_its_data_where_the_loss_moves():
    """Losses differ batch by batch, and the parameters move: recompute each from the recorded parameters."""
    x = digits()[:25] / 16
    vae = PPCA.fit(x, 2).to_vae()
    states = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            states.append(copy.deepcopy(vae))
            return super().step(closure)

    history = fit(vae, x, epochs=1, batch_size=10, learning_rate=1e-4, optimizer=lambda p, lr: Recording(p, lr=lr))
    parts = [batch["x"] for batch in minibatches({"x": x}, 10, seed=0, epoch=0)]
    assert [len(part) for part in parts] == [10, 10, 5]
    by_hand = sum(float(exact_log_evidence(then, part).sum()) for then, part in zip(states, parts, strict=True))
    assert history.elbo[0] == pytest.approx(by_hand / 25, rel=1e-10)


def test_sums_over_events_and_means_over_data():
    x = digits()[:30]
    ppca, after = PPCA.fit(x, 2), []
    for rows in (x, x.repeat(2, 1)):
        vae = ppca.to_vae()
        with torch.no_grad():
            vae.likelihood.network.bias += 1
        history = fit(vae, rows, epochs=1, batch_size=len(rows), learning_rate=1e-2, optimizer=sgd)
        after.append((state(vae), history.elbo[0]))
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-12)
    for key in after[0][0]:
        torch.testing.assert_close(after[0][0][key], after[1][0][key], rtol=1e-10, atol=1e-12)
    wide = torch.cat([x, x], 1)  # twice the features at latent 0 effect: W = 0
    bounds = []
    for values in (x, wide):
        vae = linear_vae(values.shape[1], 2)
        with torch.no_grad():
            vae.likelihood.network.weight.zero_()
            vae.posterior.network.weight.zero_()
        bounds += fit(vae, values, epochs=1, batch_size=30, learning_rate=FROZEN, optimizer=sgd).elbo
    assert bounds[1] == pytest.approx(2 * bounds[0], rel=1e-12)


# A34: reproducible, and nothing global is touched


def test_one_seed_is_one_run():
    torch.manual_seed(4)
    x = torch.randn(40, 5)
    start, runs = linear_vae(5, 2), []
    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(noise)
        vae = copy.deepcopy(start)
        runs.append((fit(vae, x, epochs=3, batch_size=16, learning_rate=1e-2, seed=seed), state(vae)))
    (a, a_state), (b, b_state), (c, c_state) = runs
    assert a.elbo == b.elbo
    assert a.learning_rate == b.learning_rate
    assert equal(a_state, b_state)
    assert a.elbo != c.elbo
    assert not equal(a_state, c_state)


@pytest.mark.parametrize("schedule", ["constant", "one-cycle", "cosine"])
def test_a_resumed_run_is_the_run_without_interruption(schedule):
    torch.manual_seed(4)
    x, held_out = torch.randn(40, 5), torch.randn(10, 5)
    start, saved = linear_vae(5, 2), {}
    options = {"epochs": 6, "batch_size": 16, "learning_rate": 0.05, "schedule": schedule, "clip": 1.0}
    options |= {"validation": held_out, "keep": "best"}
    whole, part = copy.deepcopy(start), copy.deepcopy(start)
    a = fit(whole, x, **options)

    def stop(epoch, then):
        if epoch == 2:
            saved.update(copy.deepcopy(then.save()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(part, x, **options, on_epoch=stop)
    for noise in (98, 99):  # a saved state may be used more than once
        torch.manual_seed(noise)
        seen, other = [], linear_vae(5, 2)
        b = fit(other, x, **options, resume=saved, on_epoch=lambda epoch, then, seen=seen: seen.append(epoch))
        assert seen == [3, 4, 5]
        assert a.elbo == b.elbo
        assert a.validation == b.validation
        assert a.learning_rate == b.learning_rate
        assert (a.steps, a.best_epoch) == (b.steps, b.best_epoch)
        assert equal(state(whole), state(other))


def test_an_interrupt_leaves_the_state_between_epochs():
    torch.manual_seed(4)
    x, states, calls = torch.randn(40, 5), [], []

    class Interrupted(torch.optim.Adam):
        def step(self, closure=None):
            calls.append(1)
            if len(calls) == 8:
                raise KeyboardInterrupt
            return super().step(closure)

    vae = linear_vae(5, 2)
    with pytest.raises(KeyboardInterrupt):
        fit(
            vae,
            x,
            epochs=4,
            batch_size=16,
            optimizer=lambda p, lr: Interrupted(p, lr=lr),
            on_epoch=lambda epoch, then: states.append(state(vae)),
        )
    assert len(states) == 2
    assert equal(state(vae), states[-1])


@pyro_warns
def test_global_random_state_is_left_alone():
    x = torch.randn(10, 3)
    for program, raises in ((linear_vae(3, 2), False), (Blowing(3.0), True)):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        try:
            fit(program, x, epochs=5, batch_size=5, learning_rate=0.5, optimizer=sgd, validation=x)
        except ValueError:
            assert raises
        else:
            assert not raises
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]


def test_global_parameter_store_is_left_alone():
    store, x = pyro.get_param_store(), torch.randn(10, 1)
    for program in (linear_vae(1, 1), Program(bare_model, bare_guide)):
        fit(program, x, epochs=2)
        assert len(store) == 0
    foreign = pyro.param("foreign", torch.tensor(3.0), constraint=dist.constraints.positive)
    kept = store._params["foreign"]
    for program in (linear_vae(1, 1), Program(bare_model, bare_guide)):
        fit(program, x, epochs=2)
        assert set(store.keys()) == {"foreign"}
        assert store._params["foreign"] is kept
        assert torch.equal(pyro.param("foreign"), foreign)


def test_no_pyro_setting_changes():
    x = torch.randn(10, 3)
    before = pyro.settings.get()
    with pyro.validation_enabled(False):
        fit(linear_vae(3, 2), x, epochs=2)
        assert not pyro.settings.get("validate_distributions_pyro")
    fit(linear_vae(3, 2), x, epochs=2)
    assert pyro.settings.get() == before
    assert torch.is_grad_enabled()


# What may be fitted


class Plain(nn.Module):
    """x ~ N(A z + b, s^2) by hand, with a record of each full batch and its noise."""

    def __init__(self, features=3, latent=2):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(latent, 5), nn.Tanh(), nn.Linear(5, features))
        self.encoder = nn.Linear(features, 2 * latent)
        self.raw_scale = nn.Parameter(torch.zeros(()))
        self.latent, self.seen, self.noise = latent, [], []

    def model(self, x):
        pyro.module(f"plain_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.raw_scale.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module(f"plain_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))
        self.seen.append(x)
        self.noise.append(((z - loc) / raw.exp()).detach())


def test_a_tensor_an_array_and_a_dict_are_the_same_data():
    torch.manual_seed(5)
    x = torch.randn(20, 3)
    start, runs = linear_vae(3, 2), []
    for given in (x, x.numpy(), {"x": x}, {"x": x, "y": torch.arange(20)}, {"x": x, "mask": torch.ones(20, 3)}):
        vae = copy.deepcopy(start)
        fit(vae, given, epochs=2, batch_size=8)
        runs.append(state(vae))
    assert all(equal(runs[0], run) for run in runs[1:4])
    for key in runs[0]:  # a mask of ones runs through other operations
        torch.testing.assert_close(runs[0][key], runs[4][key], rtol=1e-10, atol=1e-12)


def test_a_target_is_fitted_and_forgets_what_it_knew():
    torch.manual_seed(5)
    x = torch.randn(20, 3)
    start = linear_vae(3, 2)
    plain, vae = copy.deepcopy(start), copy.deepcopy(start)
    target = Target(vae, x)
    before = exact_log_evidence(target)
    a = fit(plain, x, epochs=2, batch_size=8, learning_rate=0.1)
    b = fit(target, epochs=2, batch_size=8, learning_rate=0.1)
    assert a.elbo == b.elbo
    assert equal(state(plain), state(vae))
    assert not torch.equal(exact_log_evidence(target), before)
    assert torch.equal(exact_log_evidence(target), exact_log_evidence(plain, x))
    with pytest.raises(TypeError, match="target alone, which holds its data"):
        fit(target, x)
    with pytest.raises(TypeError, match="data `x` beside a VAE; got none"):
        fit(plain)


def test_missing_entries_do_not_count():
    torch.manual_seed(5)
    x, mask, runs = torch.randn(20, 3), torch.rand(20, 3) < 0.7, []
    start = linear_vae(3, 2)
    for filler in (0.0, 1e6, math.nan):
        vae = copy.deepcopy(start)
        history = fit(vae, {"x": torch.where(mask, x, filler), "mask": mask}, epochs=2, batch_size=8)
        runs.append((history.elbo, state(vae)))
    assert all(run[0] == runs[0][0] and equal(run[1], runs[0][1]) for run in runs)


def test_dynamic_binarization_draws_anew_each_epoch():
    loaded = data.load("digits", binarization="dynamic", dtype=torch.float64)
    program, n = Plain(64), 1500
    fit(program, loaded, epochs=3, batch_size=n)
    seen = [x for x in program.seen if len(x) == n]
    assert len(seen) == 3
    for epoch, x in enumerate(seen):
        order = permutation(n, seed=0, epoch=epoch)
        assert torch.equal(x, loaded.epoch(epoch)["x"][order])
    unshuffled = [x[permutation(n, seed=0, epoch=epoch).argsort()] for epoch, x in enumerate(seen)]
    assert 0.02 < (unshuffled[0] != unshuffled[1]).double().mean() < 0.5
    assert set(unshuffled[1].unique().tolist()) == {0.0, 1.0}


def test_static_data_stay_the_same_each_epoch():
    loaded = data.load("digits", binarization="static", dtype=torch.float64)
    program, tensor = Plain(64), Plain(64)
    tensor.load_state_dict(program.state_dict())
    a = fit(program, loaded, epochs=2, batch_size=500)
    b = fit(tensor, loaded.train["x"], epochs=2, batch_size=500)
    assert a.elbo == b.elbo
    assert equal(state(program), state(tensor))


class Indexed(nn.Module):
    """A row of its own for each datum, in plain Pyro, by `index`."""

    def __init__(self, n):
        super().__init__()
        self.loc, self.seen = nn.Parameter(torch.zeros(n)), []

    def model(self, x, index):
        pyro.module(f"indexed_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(self, x, index):
        pyro.module(f"indexed_{id(self)}", self)
        self.seen.append((x, index))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc[index], math.sqrt(0.5)))


def test_data_are_numbered_for_whoever_asks():
    x = torch.randn(30, 1)
    program = Indexed(30)
    fit(program, x, epochs=150, batch_size=8, learning_rate=0.05, schedule="one-cycle", particles=100)
    assert all(torch.equal(part, x[index]) for part, index in program.seen)
    torch.testing.assert_close(program.loc.detach(), x[:, 0] / 2, rtol=0, atol=0.1)  # the exact posterior's mean
    given = torch.arange(30).flip(0)
    program = Indexed(30)
    fit(program, {"x": x, "index": given}, epochs=1, batch_size=30)
    assert torch.equal(program.seen[-1][1], given[permutation(30, seed=0, epoch=0)])


def bare_model(x):
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def bare_guide(x):
    slope = pyro.param("slope", lambda: torch.tensor(0.1))
    bias = pyro.param("bias", lambda: torch.tensor(0.0))
    scale = pyro.param("scale", lambda: torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(slope * x[:, 0] + bias, scale))


def bare_values(program):
    with scope(program):
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_bare_parameters_reach_their_optimum():
    torch.manual_seed(6)
    x = torch.randn(100, 1) + 2
    program = Program(bare_model, bare_guide)
    fit(program, x, epochs=300, batch_size=100, learning_rate=0.1, schedule="one-cycle", particles=10)
    values, mean = bare_values(program), float(x.mean())
    assert {key: float(value) for key, value in values.items()} == pytest.approx(
        {"loc": mean, "slope": 0.5, "bias": mean / 2, "scale": math.sqrt(0.5)}, abs=0.05
    )
    assert len(pyro.get_param_store()) == 0
    truth = dist.Normal(values["loc"], math.sqrt(2)).log_prob(x[:, 0])
    torch.testing.assert_close(log_evidence(program, x, 500).log_evidence, truth, rtol=0, atol=0.05)


def test_bare_parameters_of_two_programs_are_apart():
    low, high = torch.randn(50, 1) - 3, torch.randn(50, 1) + 3
    a, b = Program(bare_model, bare_guide), Program(bare_model, bare_guide)
    for _ in range(3):
        fit(a, low, epochs=50, learning_rate=0.05, particles=10)
        fit(b, high, epochs=50, learning_rate=0.05, particles=10)
    assert bare_values(a)["loc"] < -2
    assert bare_values(b)["loc"] > 2
    before = bare_values(a)
    fit(a, low, epochs=1, learning_rate=FROZEN, optimizer=sgd)  # goes on from where it stood
    assert equal(before, bare_values(a))


def test_inner_plates_are_summed():
    """z ~ N(0, 1) and three x ~ N(z, 1) a datum in an inner plate, with the exact guide."""
    x = torch.randn(15, 3)

    def model(x):
        mean = pyro.param("mean", lambda: torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(mean, 1.0).expand([len(x)]))
            with pyro.plate("inner", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            mean = pyro.param("mean", lambda: torch.tensor(0.0))
            pyro.sample("z", dist.Normal((x.sum(1) + mean) / 4, 0.5))

    program = Program(model, guide)
    covariance = torch.eye(3) + 1
    truth = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).mean()
    for particles in (1, 4):
        history = fit(program, x, epochs=1, batch_size=4, particles=particles, learning_rate=FROZEN, optimizer=sgd)
        assert history.elbo[0] == pytest.approx(float(truth), rel=1e-12)


def test_a_guide_need_not_take_all_of_the_batch():
    x, shift = torch.randn(20, 1), torch.randn(20)
    slope = nn.Parameter(torch.tensor(0.0))

    def model(x, shift):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        pyro.param("slope", slope)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(slope * x[:, 0], 1.0))

    given = {"x": x, "shift": shift}
    fit(Program(model, guide), given, epochs=100, batch_size=20, learning_rate=0.05, particles=20)
    best = (x[:, 0] * (x[:, 0] + shift) / 2).sum() / x.square().sum()  # least squares on the posterior's mean
    assert slope.item() == pytest.approx(float(best), abs=0.1)


# The step by hand


class PlainStep:
    """The same mathematics in torch alone: loss, gradient, clipping, optimiser."""

    def __init__(self, program, elbo, rate, clip):
        self.twin, self.elbo, self.clip = copy.deepcopy(program), elbo, clip
        self.parameters = list(self.twin.parameters())
        self.adam = torch.optim.Adam(self.parameters, lr=rate)

    def __call__(self, x, noise):
        loc, raw = self.twin.encoder(x).chunk(2, -1)
        z = loc + raw.exp() * noise  # (particles,) n, z
        s = self.twin.raw_scale
        constant = 0.5 * math.log(2 * math.pi)
        likelihood = (-0.5 * ((x - self.twin.decoder(z)) / s.exp()) ** 2 - s - constant).sum(-1)
        if self.elbo == "Trace_ELBO":
            kl = ((-raw - 0.5 * noise**2) + 0.5 * z**2).sum(-1)
        else:
            kl = 0.5 * ((2 * raw).exp() + loc**2 - 1 - 2 * raw).sum(-1)
        loss = (kl - likelihood).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g * min(1.0, self.clip / (norm + 1e-6)) if self.clip else g
        self.adam.step()
        return float(loss.detach()), norm


@pytest.mark.parametrize("elbo", OBJECTIVES)
@pytest.mark.parametrize(("clip", "particles"), [(0.0, 1), (0.0, 3), (0.3, 1), (0.3, 3)])
def test_training_equals_a_hand_written_loop(elbo, clip, particles):
    torch.manual_seed(7)
    x, n = torch.randn(10, 3) * 3, 10
    program = Plain()
    by_hand = PlainStep(program, elbo, 0.01, clip)
    epochs = 6
    history = fit(
        program, x, elbo=elbo, epochs=epochs, batch_size=n, learning_rate=0.01, clip=clip, particles=particles
    )
    noise = [eps for eps in program.noise if eps.shape[-2] == n]
    assert len(noise) == epochs
    norms = []
    for epoch, eps in enumerate(noise):
        assert eps.shape == (n, 2) if particles == 1 else eps.numel() == particles * n * 2
        (batch,) = minibatches({"x": x}, n, seed=0, epoch=epoch)
        loss, norm = by_hand(batch["x"], eps)
        norms.append(norm)
        assert history.elbo[epoch] == pytest.approx(-loss, rel=1e-12)
    assert min(norms) > 0.3  # clipping had something to do
    for mine, theirs in zip(program.parameters(), by_hand.parameters, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-10, atol=1e-12)


def test_clip_is_the_global_norm_per_datum():
    torch.manual_seed(8)
    x = torch.randn(30, 3) * 10
    program = Plain()
    start = [p.detach().clone() for p in program.parameters()]

    def moved(**options):
        with torch.no_grad():
            for p, value in zip(program.parameters(), start, strict=True):
                p.copy_(value)
        fit(program, x, epochs=1, batch_size=30, learning_rate=1.0, optimizer=sgd, **options)
        change = [(p.detach() - value).flatten() for p, value in zip(program.parameters(), start, strict=True)]
        return torch.cat(change)

    free, clipped = moved(), moved(clip=0.25)
    assert free.norm() > 1
    assert clipped.norm() == pytest.approx(0.25, rel=1e-5)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
    torch.testing.assert_close(moved(clip=2 * float(free.norm())), free)


# Schedules, optimisers, validation


@pytest.mark.parametrize("schedule", ["constant", "one-cycle", "cosine"])
def test_learning_rates_are_torchs(schedule):
    x, epochs, rates = torch.randn(25, 3), 4, []

    class Recording(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def record(tensors, lr):
        assert lr == 0.02
        return Recording(tensors, lr=lr)

    history = fit(
        linear_vae(3, 2), x, epochs=epochs, batch_size=10, learning_rate=0.02, schedule=schedule, optimizer=record
    )
    other = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(other, factor=1.0),
        "one-cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(other, 0.02, total_steps=12),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(other, 12),
    }[schedule]()
    expected = []
    for _ in range(12):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
        if len(expected) % 3 == 0:
            assert history.learning_rate[len(expected) // 3 - 1] == pytest.approx(
                other.param_groups[0]["lr"], abs=1e-12
            )
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(0.02, rel=0.05)


def test_one_step_under_each_schedule():
    for schedule in ("constant", "one-cycle", "cosine"):
        history = fit(linear_vae(3, 2), torch.randn(5, 3), epochs=1, batch_size=5, schedule=schedule)
        assert history.steps == 1


def test_history_has_an_entry_an_epoch():
    seen = []
    x = torch.randn(20, 3)
    vae = linear_vae(3, 2)

    def on_epoch(epoch, then):
        seen.append((epoch, len(then.history.elbo), state(vae)["likelihood.network.weight"]))

    history = fit(vae, x, epochs=3, batch_size=8, on_epoch=on_epoch)
    assert [entry[:2] for entry in seen] == [(0, 1), (1, 2), (2, 3)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert [len(getattr(history, name)) for name in ("elbo", "learning_rate", "seconds")] == [3, 3, 3]
    assert history.validation == []
    assert history.best_epoch is None
    assert history.steps == 9
    assert history.seconds == sorted(history.seconds)
    assert all(type(value) is float for value in history.elbo)


def test_validation_bound_is_the_held_out_evidence_of_an_exact_guide():
    x = digits()[:120] / 16
    train, held_out = x[:100], x[100:]
    vae, truth = PPCA.fit(train, 2).to_vae(), []

    def on_epoch(epoch, then):
        truth.append(float(exact_log_evidence(vae, held_out).mean()))

    history = fit(vae, train, epochs=4, batch_size=7, learning_rate=0.02, validation=held_out, on_epoch=on_epoch)
    assert history.validation == pytest.approx(truth, rel=1e-10)
    assert len(set(truth)) == 4


def test_validation_draws_are_the_same_each_epoch_and_do_not_disturb():
    torch.manual_seed(9)
    x = torch.randn(40, 3)
    start = linear_vae(3, 2)
    history = fit(start, x[:30], epochs=4, learning_rate=FROZEN, optimizer=sgd, validation=x[30:])
    assert len(set(history.validation)) == 1
    with_it, without = copy.deepcopy(start), copy.deepcopy(start)
    a = fit(with_it, x[:30], epochs=3, batch_size=7, validation=x[30:])
    b = fit(without, x[:30], epochs=3, batch_size=7)
    assert a.elbo == b.elbo
    assert equal(state(with_it), state(without))


@pytest.mark.parametrize("keep", ["best", "last"])
def test_best_state_is_restored(keep):
    torch.manual_seed(10)
    x = torch.randn(12, 6)
    held_out = torch.randn(100, 6)
    vae, states = linear_vae(6, 3), []
    history = fit(
        vae,
        x,
        epochs=40,
        batch_size=12,
        learning_rate=0.1,
        validation=held_out,
        keep=keep,
        on_epoch=lambda epoch, then: states.append(state(vae)),
    )
    best = max(range(40), key=history.validation.__getitem__)
    assert 0 < best < 39  # it learns, then fits twelve rows too well
    assert history.validation[-1] < history.validation[best]
    assert equal(state(vae), states[best if keep == "best" else -1])
    assert history.best_epoch == (best if keep == "best" else None)


def test_progress_is_silent_unless_asked_for(capfd):
    x = torch.randn(10, 3)
    fit(linear_vae(3, 2), x, epochs=2)
    fit(linear_vae(3, 2), x, epochs=2, progress=False)
    assert capfd.readouterr() == ("", "")
    fit(linear_vae(3, 2), x, epochs=2, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err or "epoch" in err


# NaN


class Blowing(nn.Module):
    """x ~ N(theta + z, 1) around data far away: theta climbs, and at a limit the location turns NaN."""

    def __init__(self, limit, how="nan"):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.0))
        self.other = nn.Parameter(torch.tensor(0.5))
        self.limit, self.how = limit, how

    def model(self, x):
        pyro.module(f"blowing_{id(self)}", self)
        loc = self.theta
        if float(loc.detach()) > self.limit:
            loc = loc * math.nan if self.how == "nan" else loc + (loc - loc).sqrt()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x[:, 0] + 50)

    def guide(self, x):
        pyro.module(f"blowing_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.other * x[:, 0], 1.0))


def recorder(kind, states, program, **options):
    class Recording(kind):
        def step(self, closure=None):
            done = super().step(closure)
            states.append(state(program))
            return done

    return lambda tensors, lr: Recording(tensors, lr=lr, **options)


@pyro_warns
@pytest.mark.parametrize("schedule", ["constant", "one-cycle", "cosine"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("bad", [4, 6, 9])
def test_nan_is_named_and_rolled_back(schedule, kind, bad):
    """A twin without the fault shows where the parameters stood before each step."""
    torch.manual_seed(11)
    x, twin, free, states = torch.randn(23, 1), Blowing(math.inf), [], []
    options = {"epochs": 4, "batch_size": 5, "learning_rate": 0.05, "schedule": schedule}
    fit(twin, x, **options, optimizer=recorder(kind, free, twin))
    limit = float(free[bad - 3]["theta"] + free[bad - 2]["theta"]) / 2  # passed by the step before, counted from 1
    program = Blowing(limit)
    with pytest.raises(ValueError, match="finite loss.*NaN") as caught:
        fit(program, x, **options, optimizer=recorder(kind, states, program))
    assert f"step {bad} (epoch {(bad - 1) // 5 + 1})" in str(caught.value)
    assert "'x' of the model" in str(caught.value)
    assert states[bad - 1]["theta"].isnan()
    assert equal(state(program), free[bad - 2])
    program.limit = math.inf  # the cause mended, training goes on
    assert math.isfinite(fit(program, x, epochs=1).elbo[0])


@pyro_warns
@pytest.mark.parametrize("rate", [1e155, 1e300])
def test_a_huge_learning_rate_is_refused_and_rolled_back(rate):
    torch.manual_seed(12)
    vae, states = linear_vae(3, 2), []
    with pytest.raises(ValueError, match=r"turned NaN or infinite at step \d+ \(epoch \d+\), at site .*learning_rate"):
        fit(
            vae,
            torch.randn(20, 3),
            epochs=5,
            batch_size=5,
            learning_rate=rate,
            optimizer=recorder(torch.optim.SGD, states, vae),
        )
    assert all(value.isfinite().all() for value in state(vae).values())


@pyro_warns
@pytest.mark.parametrize("elbo", OBJECTIVES)
def test_a_gradient_of_nan_leaves_no_nan_behind(elbo):
    """The loss is finite while the gradient is NaN: the last good state is the one before that step."""
    program, states = Blowing(5.0, "gradient"), []
    with pytest.raises(ValueError, match="finite"):
        fit(
            program,
            torch.randn(20, 1),
            elbo=elbo,
            epochs=20,
            batch_size=5,
            learning_rate=0.02,
            optimizer=recorder(torch.optim.SGD, states, program),
        )
    first = next(i for i, then in enumerate(states) if then["theta"] > 5)
    assert equal(state(program), states[first])


@pyro_warns
def test_a_gradient_of_nan_at_the_very_last_step_is_refused():
    x, states = torch.randn(20, 1), []
    trial = Blowing(math.inf)
    fit(trial, x, epochs=1, batch_size=1, learning_rate=0.01, optimizer=recorder(torch.optim.SGD, states, trial))
    before, after = float(states[-3]["theta"]), float(states[-2]["theta"])
    program = Blowing((before + after) / 2, "gradient")  # the twentieth step is the first above
    with pytest.raises(ValueError, match="finite"):
        fit(program, x, epochs=1, batch_size=1, learning_rate=0.01, optimizer=sgd)
    assert float(program.theta.detach()) == after


@pyro_warns
def test_bare_parameters_are_kept_through_a_nan():
    x = torch.randn(20, 1)

    def model(x):
        theta = pyro.param("theta", lambda: torch.tensor(0.0))
        loc = theta * math.nan if float(theta.detach()) > 5 else theta
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x[:, 0] + 50)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    program = Program(model, guide)
    with pytest.raises(ValueError, match="'x' of the model"):
        fit(program, x, epochs=20, batch_size=5, learning_rate=0.02, optimizer=sgd)
    assert 5 < float(bare_values(program)["theta"]) < 7  # where it stood, not where it began
    assert len(pyro.get_param_store()) == 0


@pyro_warns
def test_nan_under_dynamic_binarization_replays_the_same_draws():
    loaded = data.load("digits", binarization="dynamic", dtype=torch.float64)
    program, states = Blowing(5.0), []
    with pytest.raises(ValueError, match="step"):
        fit(
            program,
            loaded,
            epochs=5,
            batch_size=350,
            learning_rate=0.015,
            optimizer=recorder(torch.optim.SGD, states, program),
        )
    bad = next(i for i, then in enumerate(states) if then["theta"] > 5) + 2
    assert bad > 6  # beyond the first epoch
    assert bad % 5 != 1
    assert equal(state(program), states[bad - 2])


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elbo": "ELBO"}, "`elbo` to be one of 'Trace_ELBO', 'TraceMeanField_ELBO', .*; got 'ELBO'"),
        ({"elbo": "RenyiELBO"}, "`elbo`"),
        ({"schedule": "linear"}, "`schedule` to be one of 'constant', 'one-cycle', 'cosine', .*; got 'linear'"),
        ({"keep": "first"}, "`keep` to be one of 'last', 'best'; got 'first'"),
        ({"keep": "best"}, "validation data.*keep"),
        ({"epochs": 0}, "`epochs`.*got 0"),
        ({"epochs": -1}, "`epochs`"),
        ({"epochs": 2.5}, "`epochs`.*got 2.5"),
        ({"batch_size": 0}, "`batch_size`.*got 0"),
        ({"batch_size": 1.0}, "`batch_size`"),
        ({"particles": 0}, "`particles`.*got 0"),
        ({"learning_rate": 0.0}, "`learning_rate`.*got 0"),
        ({"learning_rate": -1e-3}, "`learning_rate`"),
        ({"learning_rate": math.nan}, "`learning_rate`.*got nan"),
        ({"learning_rate": math.inf}, "`learning_rate`.*got inf"),
        ({"clip": -1.0}, "`clip`.*got -1"),
        ({"clip": math.nan}, "`clip`"),
        ({"clip": math.inf}, "`clip`"),
        ({"device": "tpu"}, "`device` to be auto, cpu or cuda; got 'tpu'"),
        ({"seed": -1}, "seed.*got -1"),
    ],
)
def test_settings_are_refused(options, message):
    vae = linear_vae(3, 2)
    before = state(vae)
    with pytest.raises(ValueError, match=message):
        fit(vae, torch.randn(10, 3), **{"epochs": 1, **options})
    assert equal(before, state(vae))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="CUDA.*device = 'auto' or 'cpu'"):
        fit(linear_vae(3, 2), torch.randn(10, 3), epochs=1, device="cuda")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "at least one datum; got n = 0"),
        (torch.tensor([[0.0, 1.0, math.nan]]), "finite numbers in `x`; got nan in row 0, column 2"),
        (torch.tensor([[0.0, 1.0, 0.3]]), "support of Bernoulli.*got 0.3 at row 0, column 2.*binarization"),
        (torch.zeros(4, 5), r"shape \(n, 3\); got \(4, 5\)"),
        (torch.zeros(3), r"shape \(n, x\); got \(3,\)"),
        ({"z": torch.zeros(4, 3)}, "Expected data named x.*; got z"),
    ],
)
def test_data_are_refused(x, message):
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(3), Linear()),
        Conditional(Normal(2), Linear()),
    )
    before = state(vae)
    with pytest.raises(ValueError, match=message):
        fit(vae, x, epochs=1)
    with pytest.raises(ValueError, match=message):
        fit(vae, torch.zeros(2, 3), validation=x, epochs=1)
    assert equal(before, state(vae))


class TwoSites(nn.Module):
    """top -> z -> x with a guide in either order."""

    def __init__(self, top_down):
        super().__init__()
        self.a, self.b, self.top_down = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.5)), top_down

    def model(self, x):
        pyro.module(f"two_sites_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(0.0, 1.0).expand([len(x)]))
            z = pyro.sample("z", dist.Normal(self.a * top, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(self, x):
        pyro.module(f"two_sites_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            if self.top_down:
                top = pyro.sample("top", dist.Normal(self.b * x[:, 0], 1.0))
                pyro.sample("z", dist.Normal((x[:, 0] + top) / 2, 1.0))
            else:
                z = pyro.sample("z", dist.Normal(self.b * x[:, 0], 1.0))
                pyro.sample("top", dist.Normal(z / 2, 1.0))


def test_mean_field_objective_is_refused_for_a_bottom_up_guide():
    x = torch.randn(10, 1)
    program = TwoSites(top_down=False)
    before = state(program)
    with pytest.raises(ValueError, match="latent sites in one order, top, z, for TraceMeanField_ELBO"):
        fit(program, x, elbo="TraceMeanField_ELBO", epochs=1)
    assert equal(before, state(program))
    fit(program, x, elbo="Trace_ELBO", epochs=1)
    assert not equal(before, state(program))


@pytest.mark.parametrize("elbo", OBJECTIVES)
def test_a_top_down_guide_over_two_sites_has_the_right_bound(elbo):
    """Either objective's mean is the mean log weight, an estimate from the traces alone."""
    x = torch.randn(10, 1)
    program = TwoSites(top_down=True)
    weights = log_weights(program, x, 20_000).mean(1)
    history = fit(program, x, elbo=elbo, epochs=200, batch_size=10, particles=50, learning_rate=FROZEN, optimizer=sgd)
    values = torch.tensor(history.elbo)
    error = (weights.var() / len(weights) + values.var() / len(values)).sqrt()
    assert abs(values.mean() - weights.mean()) < 5 * error


def test_a_program_with_nothing_to_learn_is_refused():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="something to learn"):
        fit(Program(model, guide), torch.randn(5, 1), epochs=1)


# Beside others


def test_interleaved_programs_do_not_touch_each_other():
    torch.manual_seed(13)
    x, y = torch.randn(30, 3), torch.randn(30, 3) * 4 + 2
    a, b = linear_vae(3, 2), linear_vae(3, 2)
    alone = [(copy.deepcopy(a), x), (copy.deepcopy(b), y)]
    for turn in range(3):
        for program, rows in ((a, x), (b, y)):
            fit(program, rows, epochs=2, batch_size=10, learning_rate=1e-2, seed=turn)
    for program, rows in alone:
        for turn in range(3):
            fit(program, rows, epochs=2, batch_size=10, learning_rate=1e-2, seed=turn)
    assert equal(state(a), state(alone[0][0]))
    assert equal(state(b), state(alone[1][0]))
    assert not equal(state(a), state(b))


def test_stock_svi_goes_on_from_where_fit_stopped():
    torch.manual_seed(14)
    x = torch.randn(50, 4) @ torch.randn(4, 4)
    vae = linear_vae(4, 2).initialise(x)
    fit(vae, x, epochs=20, batch_size=25, learning_rate=0.02)
    middle, bound = state(vae), float(closed_bound(vae, x).detach())
    plain, other = copy.deepcopy(vae), linear_vae(4, 2)
    untouched = state(other)
    objective = pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-6}), objective)
    pyro.set_rng_seed(3)
    svi.step(x)
    pyro.set_rng_seed(3)
    loss = objective.differentiable_loss(plain.model, plain.guide, x)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    for (key, now), gradient in zip(vae.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(now.detach(), middle[key] - 1e-6 * gradient, rtol=0, atol=1e-12)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), objective)
    for _ in range(150):
        svi.step(x)
    assert float(closed_bound(vae, x).detach()) > bound + 0.1
    assert all(not torch.equal(value, middle[key]) for key, value in vae.named_parameters())
    assert equal(untouched, state(other))
    after = state(vae)
    fit(vae, x, epochs=1, learning_rate=FROZEN, optimizer=sgd)
    assert equal(after, state(vae))


# A25, A26: where every run on MNIST begins


def mnist(**options):
    root = os.environ.get("PPL_VAE_DATA")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("MNIST is not here: set PPL_VAE_DATA to the folder that holds MNIST/raw")
    return data.load("mnist", root=root, **options)


def test_mnist_base_rates():
    grey, family = mnist(), Bernoulli(784)
    rates = family.fit_start(grey.train["x"]).double()
    test = grey.test["x"].double()
    with pyro.validation_enabled(False):  # linear in x: at grey values, the expectation over their binarisation
        expected = -float(family.distribution(rates).log_prob(test).mean())
        uniform = -float(family.distribution(family.start()).log_prob(test).mean())
    assert expected == pytest.approx(205.967165, abs=1e-4)
    assert uniform == pytest.approx(784 * math.log(2), abs=1e-9)
    entropy = torch.special.entr(test) + torch.special.entr(1 - test)
    assert float(entropy.sum(1).mean()) == pytest.approx(45.534486, abs=1e-5)
    drawn = torch.bernoulli(test)
    error = float((rates.square() * test * (1 - test)).sum().sqrt()) / len(test)  # of the binarisation alone
    assert abs(-float(family.distribution(rates).log_prob(drawn).mean()) - expected) < 5 * error


def test_a_state_without_buffers_goes_on():
    """Older runs kept what is learned alone."""
    parts = Conditional(Normal(3), Linear()), Conditional(Normal(2), Linear())
    vae = VAE(Conditional(StandardNormal(2)), *parts).initialise(torch.randn(20, 3))
    learned = list(vae.parameters())
    optimizer = torch.optim.Adam(learned)
    state = State(learned, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), module=vae)
    saved, before = state.save(), state.values()
    assert len(before) > len(learned)
    saved["learned"] = saved["learned"][: len(learned)]
    nn.init.zeros_(learned[0])
    state.load(saved)
    assert all(map(torch.equal, before, state.values()))


@pytest.mark.parametrize("capture", ["off", "graph"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_a_fused_optimizer_takes_gradients_and_parameters_of_any_layout(kind, capture):
    """Gradients of one number expanded or by columns, and parameters with gaps, as an unfused one takes them."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            start = torch.arange(24.0).reshape(4, 6) / 24
            self.shared, self.columns = nn.Parameter(start[0].clone()), nn.Parameter(start.clone())
            self.turned, self.gaps = nn.Parameter(start.clone().T), nn.Parameter(start.clone()[:, ::2])

        def model(self, x):
            pyro.module(f"odd {id(self)}", self)
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
                loc = (
                    z
                    + self.shared.sum()
                    + (self.columns.T * (1 + torch.arange(6.0)[:, None]) / 9).sum()
                    + self.gaps.sum()
                )
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])

        def guide(self, x):
            pyro.module(f"odd {id(self)}", self)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.turned.mean() + (self.turned * torch.ones(6, 4)).sum(), 1.0))

    x, rate, found = torch.randn(20, 1), 0.001, {}
    unfused = functools.partial(getattr(torch.optim, kind), **({"weight_decay": 0.0} if kind == "AdamW" else {}))
    for optimizer in (kind, lambda tensors, lr: unfused(tensors, lr=lr)):
        program = Odd()
        fit(program, x, epochs=10, learning_rate=rate, optimizer=optimizer, capture=capture)
        found[str(optimizer)] = [*program.parameters()]
    for ours, theirs, start in zip(*found.values(), Odd().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert (ours - start).abs().min() > 1e-4  # each entry has learned
