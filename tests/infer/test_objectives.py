"""Beta, free bits, optimisers by name and patience: closed forms, stock Pyro, and what is refused."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn
from twins import MODELS, draws

from ppl_vae import VAE, Conditional, Program, Target, fit
from ppl_vae._seeds import fork_rng
from ppl_vae.evaluation.latents import rates
from ppl_vae.families import FullNormal, Normal, StandardNormal
from ppl_vae.infer import gradients
from ppl_vae.infer.elbo import Beta
from ppl_vae.infer.objectives import make_objective
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.param_store import own_params, scope
from ppl_vae.programs.program import load_program

FROZEN = 1e-30
SGD = {"optimizer": "SGD", "learning_rate": 1.0, "epochs": 1}


def data(n=60):
    """Five features with eigenvalues of about 9, 3, 0.8, 0.2 and 0.1, centred."""
    x = draws(n, 5) / 2 * torch.tensor([9.0, 3.0, 0.8, 0.2, 0.1], dtype=torch.float64).sqrt()
    return x - x.mean(0)


def linear_vae(features=5, latent=2, scale="shared", posterior=FullNormal):
    torch.manual_seed(0)
    return VAE(
        Conditional(StandardNormal(latent)),
        Conditional(Normal(features, scale=scale), Linear()),
        Conditional(posterior(latent), Linear()),
    ).double()


def moved(program, x, **options):
    """One step of plain descent with all data: the gradient of the objective by name, and the history."""
    start = {name: value.clone() for name, value in program.state_dict().items()}
    history = fit(program, x, **{**SGD, "batch_size": len(x), **options})
    step = {name: value.detach() - start[name] for name, value in program.named_parameters()}
    program.load_state_dict(start)
    return step, history


# Beta on PPCA


def tempered(x, q, beta, scale):
    """A linear VAE at the optimum for a weight beta of the KL terms: PPCA with noise beta scale^2, by numpy."""
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
    scale = math.sqrt(values[q:].sum() / (5 - beta * q)) if scale is None else scale
    noise = beta * scale**2
    weight = vectors[:, :q] * np.sqrt(np.maximum(values[:q] - noise, 0.0))
    vae = linear_vae(latent=q, scale="shared", posterior=Normal)
    inverse = np.linalg.inv(weight.T @ weight + noise * np.eye(q))  # diagonal, since the columns are orthogonal
    with torch.no_grad():
        for network in (vae.likelihood.network, vae.posterior.network):
            for parameter in network.parameters():
                parameter.zero_()
        vae.likelihood.network.weight.copy_(torch.tensor(weight))
        vae.likelihood.family.raw_scale.fill_(math.log(math.expm1(scale - 1e-6)))
        vae.posterior.network.weight[:q] = torch.tensor(inverse @ weight.T)
        spread = np.sqrt(noise * np.diag(inverse)) - 1e-6
        vae.posterior.network.bias[q:] = torch.tensor(np.log(np.expm1(spread)))
    return vae, values, scale


def gradients_of(program, x, rounds, *, beta=1.0, elbo="Trace_ELBO", particles=1, seed=0):
    """Gradients of the objective by draws that are apart, by name, with minus objective and ELBO of the last."""
    target, learned = Target(program, x), [*program.parameters()]
    objective = make_objective(target, learned, elbo=elbo, particles=particles, beta=Beta(beta))
    with scope(program, training=True), fork_rng(seed, device=target.device):
        calls = gradients.Gradients(program, objective, learned, capture="off")
        found = [calls(target.batch) for _ in range(rounds)]
    steps = [torch.stack(each) for each in zip(*(each for _, each in found), strict=True)]
    return dict(zip([name for name, _ in program.named_parameters()], steps, strict=True)), found[-1][0]


def is_zero(program, x, names, **options):
    """Whether the mean gradient vanishes within 5 standard errors, for parameters of these names."""
    found = gradients_of(program, x, 25, particles=20, **options)[0]
    return all((found[name].mean(0).abs() <= 5 * found[name].std(0) / 5 + 1e-9).all() for name in names)


WEIGHTS = ("likelihood.network.weight", "posterior.network.weight", "posterior.network.bias")


@pytest.mark.parametrize(("elbo", "beta"), [("Trace_ELBO", 0.5), ("TraceMeanField_ELBO", 2.0)])
def test_with_fixed_noise_beta_acts_as_a_factor_of_the_noise(elbo, beta):
    x = data()
    vae, values, _ = tempered(x, 3, beta, 0.7)
    assert (values[:3] < beta * 0.49).sum() == (beta == 2.0)  # the third latent collapses under beta = 2
    assert is_zero(vae, x, WEIGHTS, elbo=elbo, beta=beta)
    assert not is_zero(vae, x, WEIGHTS, elbo=elbo)
    rate = rates(Target(vae, x)).mean(0).detach().numpy()
    known = 0.5 * np.log(np.maximum(values[:3] / (beta * 0.49), 1.0))  # of PPCA with that noise
    assert rate == pytest.approx(known, abs=1e-6)


def test_with_learned_noise_beta_gives_the_noise_by_the_other_eigenvalues():
    x, beta = data(), 0.5
    vae, values, scale = tempered(x, 2, beta, None)
    assert scale**2 == pytest.approx(values[2:].sum() / (5 - beta * 2))
    names = (*WEIGHTS, "likelihood.family.raw_scale")
    assert is_zero(vae, x, names, elbo="TraceMeanField_ELBO", beta=beta)
    assert not is_zero(vae, x, names, elbo="TraceMeanField_ELBO")


# Beta on other programs


class Scaled:
    """A program whose latent sites are scaled by hand."""

    def __init__(self, program, beta):
        self.program, self.beta = program, beta

    def model(self, x):
        p, s = self.program, self.beta
        scale, noise = nn.functional.softplus(p.raw_scales)
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=s):
                top = pyro.sample("top", dist.Normal(x.new_zeros(p.top), 1.0).to_event(1))
                z = pyro.sample("z", dist.Normal(p.f(top), scale).to_event(1))
            pyro.sample("x", dist.Normal(p.g(z), noise).to_event(1), obs=x)

    def guide(self, x):
        with poutine.scale(scale=self.beta):
            return self.program.guide(x)


def test_beta_scales_the_latent_sites_of_a_stranger_and_nothing_else():
    torch.manual_seed(0)
    program, x = load_program(str(MODELS / "two_level.py"))(3, 2, hidden=5).double(), draws(20, 3)
    found, (loss, bound) = gradients_of(program, x, 1, beta=0.3, seed=5)
    by_hand, stock = Scaled(program, 0.3), Trace_ELBO(max_plate_nesting=1)
    with scope(program, training=True), fork_rng(5, device=x.device):
        known = stock.differentiable_loss(by_hand.model, by_hand.guide, x) / 20
    with scope(program, training=True), fork_rng(5, device=x.device):
        unscaled = stock.loss(program.model, program.guide, x) / 20
    for name, tensor in program.named_parameters():
        (truth,) = torch.autograd.grad(known, tensor, retain_graph=True)
        torch.testing.assert_close(found[name][0], truth, rtol=1e-9, atol=1e-12)
    assert float(loss) == pytest.approx(float(known.detach()), rel=1e-12)
    assert float(bound) == pytest.approx(unscaled, rel=1e-12)


@pytest.mark.parametrize("zero", [False, True])
def test_sums_over_a_guides_classes_are_those_of_stock_pyro_where_a_probability_is_0_too(zero):
    """To the last bit; with a class that has probability 0, and log density minus infinity, to rounding."""
    x, shift = draws(6), torch.tensor([0.0, 0.4, -math.inf if zero else 1.3]).double().requires_grad_()
    slope = torch.tensor([0.3, -0.2, 0.1]).double().requires_grad_()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=shift), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(slope[y], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            logits = x.unsqueeze(-1) * slope + shift
            pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    program = Program(model, guide)
    ours = make_objective(Target(program, {"x": x}), [slope], elbo="TraceEnum_ELBO")(program, {"x": x})
    stock = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x=x)
    pairs = [(ours.surrogate, stock), *zip(*(torch.autograd.grad(one, slope) for one in (ours[1], stock)), strict=True)]
    assert ours.loss == ours.bound == pytest.approx(stock.item(), rel=1e-12)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12 * zero, atol=1e-12 * zero)


def test_beta_with_draws_that_have_no_gradient():
    """A coin by its score: the objective of each datum is a sum over two values."""

    def coin(x):
        with pyro.plate("data", len(x), dim=-1):
            logits = pyro.param("logits", lambda: torch.tensor(0.4, dtype=torch.float64))
            pyro.sample("z", dist.Bernoulli(logits=logits.expand(len(x))))

    def tossed(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.2, dtype=torch.float64)).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x, beta = torch.full((20_000, 1), 1.5, dtype=torch.float64), 0.3
    logits = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    q, z = logits.sigmoid(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    kl = q * (q / 0.2).log() + (1 - q) * ((1 - q) / 0.8).log()
    seen = (torch.stack([q, 1 - q]) * dist.Normal(z, 1.0).log_prob(torch.tensor(1.5))).sum()
    (truth,) = torch.autograd.grad(seen - beta * kl, logits, retain_graph=True)
    (other,) = torch.autograd.grad(seen - kl, logits)
    steps, program = [], Program(tossed, coin)
    for seed in range(12):
        own_params(program)["params"].clear()
        history = fit(program, x, beta=beta, batch_size=20_000, seed=seed, **SGD)
        steps.append(float(own_params(program)["params"]["logits"].detach()) - 0.4)
    error = np.std(steps) / math.sqrt(12)
    assert abs(np.mean(steps) - float(truth)) < 5 * error < abs(float(truth - other))
    assert history.objective[0] == pytest.approx(float((seen - beta * kl).detach()), abs=0.02)
    assert history.elbo[0] == pytest.approx(float((seen - kl).detach()), abs=0.02)


def test_the_weight_rises_step_by_step_once_or_in_cycles():
    once, twice = Beta(2.0, 4), Beta(1.0, 8, cycles=2)
    assert [once.at(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [twice.at(step) for step in range(9)] == [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_the_history_has_elbo_and_objective_and_validation_is_judged_at_the_final_weight():
    x = data(40)
    options = {"elbo": "TraceMeanField_ELBO", "batch_size": 40, "learning_rate": FROZEN, "validation": x}
    options |= {"particles": 50}
    known = fit(linear_vae(posterior=Normal), x, epochs=1, **options)
    rate = float(rates(Target(linear_vae(posterior=Normal), x)).sum(1).mean())
    found = fit(linear_vae(posterior=Normal), x, epochs=4, beta=0.5, warm_up=2, **options)
    assert found.elbo == pytest.approx([known.elbo[0]] * 4, rel=0.05)
    assert found.validation == pytest.approx(known.validation * 4, rel=1e-12)
    weights = [0.25, 0.5, 0.5, 0.5]
    ahead = [one - two for one, two in zip(found.objective, found.elbo, strict=True)]
    assert ahead == pytest.approx([(1 - weight) * rate for weight in weights], rel=1e-6)
    assert found.validation_objective[0] - found.validation[0] == pytest.approx(0.5 * rate, rel=1e-6)


# Free bits


def test_free_bits_are_those_of_the_formula_and_gradient_by_hand():
    x = data(30)
    vae = linear_vae(posterior=Normal, latent=3)
    network = vae.posterior.network
    raw = nn.functional.linear((x - network.shift) / network.scale, network.weight, network.bias)
    loc, scale = raw.chunk(2, -1)
    scale = nn.functional.softplus(scale) + 1e-6
    kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).mean(0)
    for per, groups in (("latent", kl), ("site", kl.sum().unsqueeze(0))):
        free = float(groups.detach().median()) + 1e-3 if per == "latent" else 2 * float(kl.detach().sum())
        plain, known = moved(vae, x, elbo="TraceMeanField_ELBO")
        step, found = moved(vae, x, elbo="TraceMeanField_ELBO", free_bits=free, free_bits_per=per)
        lost = (free - groups).relu().sum()
        assert 0 < (groups.detach() < free).sum() <= len(groups)
        assert found.elbo == known.elbo
        assert known.objective[0] - found.objective[0] == pytest.approx(float(lost.detach()), rel=1e-9)
        (more,) = torch.autograd.grad(-lost, network.weight, retain_graph=True)
        change = step["posterior.network.weight"] - plain["posterior.network.weight"]
        torch.testing.assert_close(change, more, rtol=1e-9, atol=1e-12)
        assert more.abs().max() > 1e-3


def test_with_free_bits_no_latent_stays_collapsed():
    x, active = data(), []
    options = {"elbo": "TraceMeanField_ELBO", "epochs": 100, "batch_size": 60, "learning_rate": 0.1, "capture": "off"}
    for free in (0.0, 0.2):
        vae = linear_vae(latent=3, scale=1.2, posterior=Normal)
        fit(vae, x, free_bits=free, **options)
        active.append(rates(Target(vae, x)).mean(0).detach())
    assert (active[0] < 0.01).sum() == 1  # the third eigenvalue is below the noise
    assert (active[1] > 0.19).all()


def test_free_bits_of_each_step_of_a_sequence_and_of_particles():
    """Inner plates keep groups apart, and particles do not: the same with one and with several, where KL is exact."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("cells", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, len(x)).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        slope = pyro.param("slope", lambda: torch.tensor([[0.1], [2.0]], dtype=torch.float64))
        with pyro.plate("data", len(x), dim=-1), pyro.plate("cells", 2, dim=-2):
            pyro.sample("z", dist.Normal(slope * x.T, 1.0))

    x = draws(50, 2)
    kl = 0.5 * (torch.tensor([0.1, 2.0]) * x).square().mean(0)
    for particles in (1, 3):
        options = {"elbo": "TraceMeanField_ELBO", "epochs": 1, "batch_size": 50, "learning_rate": FROZEN}
        found = fit(Program(model, guide), x, free_bits=1.0, particles=particles, **options)
        lost = found.elbo[0] - found.objective[0]
        assert lost == pytest.approx(float((1 - kl).relu().sum()), rel=1e-6)
        assert 0.5 < lost < 1


# Optimisers, schedules, patience


MADE = {
    "AdamW": ({"weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
    "Adamax": ({"betas": [0.8, 0.9]}, lambda p: torch.optim.Adamax(p, lr=0.05, betas=(0.8, 0.9))),
    "SGD": ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "NAdam": ({"epsilon": 1e-3}, lambda p: torch.optim.NAdam(p, lr=0.05, eps=1e-3)),
    "Adam": ({"weight_decay": 0.2}, lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.2)),
}


@pytest.mark.parametrize("name", MADE)
def test_optimisers_by_name_are_torchs(name):
    keys, make = MADE[name]
    x, options = data(20), {"epochs": 3, "batch_size": 20, "learning_rate": 0.05}
    one, other = linear_vae(), linear_vae()
    fit(one, x, optimizer=name, **keys, **options)
    fit(other, x, optimizer=lambda tensors, lr: make(tensors), **options)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_restarts_of_the_rate():
    options = {"epochs": 6, "batch_size": 20, "learning_rate": 0.1, "schedule": "cosine-restarts"}
    found = fit(linear_vae(), data(20), restarts=2, **options).learning_rate
    assert found == pytest.approx([0.05, 0.1] * 3)  # of periods of two steps


def test_patience_and_keep_judge_the_objective_after_the_warm_up():
    x, values = data(40), [9.0, 8.0, 1.0, 3.0, 2.0, 3.0, 2.5, 5.0]
    rising = list(range(len(values)))

    def run(patience, keep="best", **options):
        scores = iter(zip(values, rising, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ppl_vae.infer.step.Trainer.bound", lambda self, held_out: next(scores))
            options = {"batch_size": 40, "validation": x, "beta": 0.5, **options}
            return fit(linear_vae(), x, epochs=8, warm_up=2, keep=keep, patience=patience, **options)

    history = run(3)
    assert len(history.elbo) == 7  # epochs 4 to 6 were no better than epoch 3
    assert history.best_epoch == 3  # though epoch 0 had the highest value, in the warm-up, and ELBOs were rising
    assert run(4).best_epoch == 7
    saved = []
    run(3, on_epoch=lambda epoch, state: saved.append(copy.deepcopy(state.save())))
    again = fit(
        linear_vae(), x, epochs=8, batch_size=40, validation=x, beta=0.5, warm_up=2, patience=3, resume=saved[-1]
    )
    assert len(again.elbo) == 7  # a run that stopped stays stopped


def within(start, x, options, steps):
    """Runs that go on from within an epoch."""
    for state in (steps[0], steps[3], steps[-1]):
        other = copy.deepcopy(start)
        yield other, fit(other, x, **options, resume=state)


RUNS = [
    {"elbo": "ImportanceWeighted", "particles": 3, "optimizer": "SGD", "momentum": 0.9, "schedule": "cosine-restarts"},
    {"elbo": "Renyi", "alpha": 0.5, "particles": 3, "gradient": "dreg", "optimizer": "Adamax"},
    {"elbo": "Trace_ELBO", "beta": 0.5, "warm_up": 4, "optimizer": "NAdam", "particles": 2},
    {
        "elbo": "TraceMeanField_ELBO",
        "warm_up": 4,
        "cycles": 2,
        "free_bits": 0.3,
        "optimizer": "AdamW",
        "weight_decay": 0.1,
    },
]


@pytest.mark.parametrize("options", RUNS, ids=lambda one: one["elbo"] + one.get("gradient", ""))
def test_each_is_captured_and_resumed_to_the_last_bit(options, monkeypatch, caplog):
    caplog.set_level("INFO", "ppl_vae")
    monkeypatch.setattr(gradients, "EAGER", 2)
    x, saved = draws(18, 5).float(), []
    torch.manual_seed(0)
    start = VAE(
        Conditional(StandardNormal(2)), Conditional(Normal(5), MLP(hidden=[4])), Conditional(Normal(2), MLP(hidden=[4]))
    )
    options = {"epochs": 4, "batch_size": 6, "learning_rate": 0.05, "validation": x, **options}
    for capture, later in (("auto", "auto"), ("graph", "off")):
        saved.clear()
        whole, part, steps = copy.deepcopy(start), copy.deepcopy(start), []
        keep = {"on_epoch": lambda epoch, state: saved.append(copy.deepcopy(state.save()))}
        keep["on_step"] = lambda state, steps=steps: steps.append(copy.deepcopy(state.save()))
        a = fit(whole, x, **options, capture=capture, **keep)
        assert [len(one["place"]["losses"]) for one in steps] == [1, 2] * 4  # between the three steps of each epoch
        b = fit(part, x, **options, resume=saved[0], capture=later)
        assert (a.capture, b.capture) == ({"auto": "fast"}.get(capture, capture), {"auto": "fast"}.get(later, later))
        assert not caplog.records  # which would say why there was no graph
        for resumed, c in ((part, b), *within(start, x, {**options, "capture": capture}, steps)):
            for key in ("objective", "elbo", "validation", "validation_objective", "learning_rate"):
                assert getattr(a, key) == getattr(c, key)
            pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


# What is refused


REFUSED = [
    ({"elbo": "Renyi"}, '`alpha`, such as 0.5, with elbo = "Renyi" and no other; got None with Renyi'),
    ({"elbo": "Renyi", "alpha": 1.0}, "`alpha` to be a number other than 1, which is Trace_ELBO; got 1.0"),
    ({"alpha": 0.5}, 'with elbo = "Renyi" and no other; got 0.5 with Trace_ELBO'),
    (
        {"gradient": "dreg"},
        "`gradient` = plain with elbo = 'Trace_ELBO'; got dreg. Use ImportanceWeighted or Renyi",
    ),
    ({"gradient": "doubly"}, "`gradient` to be one of 'plain', 'stl', 'dreg'; got 'doubly'"),
    (
        {"elbo": "ImportanceWeighted", "beta": 0.5},
        "`beta` = 1.0 with elbo = 'ImportanceWeighted'; got 0.5. Use Trace_",
    ),
    (
        {"elbo": "Renyi", "alpha": 0.0, "free_bits": 0.5},
        "`free_bits` = 0.0 with elbo = 'Renyi'; got 0.5. Use TraceMean",
    ),
    ({"elbo": "ImportanceWeighted", "warm_up": 1}, "`warm_up` = 0 with elbo"),
    ({"free_bits": 0.5}, "`free_bits` = 0.0 with elbo = 'Trace_ELBO'"),
    ({"beta": 0.0}, "`beta` to be a positive number; got 0.0"),
    ({"warm_up": 3, "epochs": 2}, "`warm_up` within the 2 epochs of the run; got 3. Raise `epochs`"),
    ({"warm_up": 2, "epochs": 2, "keep": "best"}, "within the 2 epochs of the run, one after it to judge by; got 2"),
    ({"cycles": 2}, "`cycles` beside `warm_up` alone; got it with warm_up = 0"),
    ({"free_bits_per": "site"}, "`free_bits_per` beside `free_bits` alone"),
    ({"momentum": 0.9}, "`momentum` with optimizer SGD; got 0.9 with Adam"),
    ({"optimizer": "SGD", "betas": [0.9, 0.9]}, "`betas` with optimizer Adam, AdamW, Adamax or NAdam; got"),
    ({"betas": [0.9]}, "`betas` to be two numbers from 0 to below 1"),
    ({"betas": [0.9, 0.9], "schedule": "one-cycle"}, "no `betas` with schedule = 'one-cycle'"),
    ({"optimizer": "Adagrad"}, "`optimizer` to be one of 'Adam', 'AdamW', 'Adamax', 'SGD', 'NAdam'; got 'Adagrad'"),
    ({"weight_decay": -1.0}, "`weight_decay` from 0 to below inf; got -1.0"),
    ({"optimizer": torch.optim.Adam, "weight_decay": 0.1}, "no `weight_decay` beside a function as `optimizer`"),
    ({"restarts": 2}, "`restarts` with schedule = 'cosine-restarts'; got it with 'constant'"),
    ({"patience": 2}, "validation data with patience; got none. Pass `validation` or patience = 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        fit(linear_vae(), data(6), **options)


def test_free_bits_need_terms_in_closed_form_that_factorise():
    options = {"elbo": "TraceMeanField_ELBO", "free_bits": 0.1, "epochs": 1}
    with pytest.raises(ValueError, match="factorises over the latents of site 'z'.*free_bits_per = \"site\""):
        fit(linear_vae(), data(6), **options)
    assert math.isfinite(fit(linear_vae(), data(6), free_bits_per="site", **options).objective[0])
