"""Captured training held against training by Pyro, step by step: the same numbers, or the log says why not."""

import copy
import gc
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from families.cases import ROLES, Case, vae_of
from pyro.infer import autoguide
from torch import Tensor, nn
from twins import MODELS

from ppl_vae import VAE, Conditional, Program, fit
from ppl_vae.families import Bernoulli, MixtureNormal, Normal, StandardNormal
from ppl_vae.infer import gradients
from ppl_vae.networks import MLP, Conv, Linear, ResidualConv, Table
from ppl_vae.programs.param_store import copied, own_params
from ppl_vae.programs.program import load_program

OPTIONS: dict[str, Any] = {"epochs": 4, "batch_size": 6, "learning_rate": 0.05, "device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """A step is captured after two others of its shape."""
    monkeypatch.setattr(gradients, "EAGER", 2)


SEEN: list[int] = []


@pytest.fixture
def calls(monkeypatch):
    """How often Pyro was asked for a loss, but by runs that `assert_same` takes for itself."""
    seen = SEEN
    seen.clear()
    by_pyro = gradients.Gradients.loss

    def loss(self, batch):
        seen.append(len(next(iter(batch.values()))))
        return by_pyro(self, batch)

    monkeypatch.setattr(gradients.Gradients, "loss", loss)
    return seen


def learned(program: Any) -> dict[str, Tensor]:
    own = dict(program.state_dict()) if isinstance(program, nn.Module) else {}
    return {**own, **{name: value.detach() for name, value in own_params(program)["params"].items()}}


def assert_same(program: Any, x: Any, exact: bool = True, **options: Any) -> Any:
    """That training by Pyro and captured training end at the same numbers; returns the captured program.

    Of a replay of the same operations they are the same to the last bit.
    """
    twin, third = copied(program), copied(program)
    a = fit(program, x, **{**OPTIONS, **options})
    b = fit(twin, x, **{**OPTIONS, **options}, capture="off")
    if exact:
        before = len(SEEN)
        c = fit(third, x, **{**OPTIONS, **options}, capture="graph")
        del SEEN[before:]
        assert (c.elbo, c.validation, c.capture) == (b.elbo, b.validation, "graph")
        same, ours = learned(third), learned(twin)
        assert all(torch.equal(value.nan_to_num(), ours[name].nan_to_num()) for name, value in same.items())
    assert a.elbo == pytest.approx(b.elbo, rel=1e-6)
    assert a.validation == pytest.approx(b.validation, rel=1e-6)
    ours, others = learned(program), learned(twin)
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], rtol=1e-6, atol=1e-7, equal_nan=True)
    return program


def was_captured(calls: list[int], steps: int, kinds: int = 1) -> bool:
    """Whether Pyro was asked at four steps of a shape and no more; the other run asked at each."""
    return len(calls) == 4 * kinds + steps


@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO"])
def test_both_objectives_with_particles_and_clip(elbo, calls):
    x = (torch.rand(30, 5) < 0.4).double()
    for particles, clip, schedule in ((1, 0.0, "one-cycle"), (3, 0.1, "cosine")):
        calls.clear()
        vae = VAE(
            Conditional(MixtureNormal(2, components=3)),
            Conditional(Bernoulli(5), MLP(hidden=[6])),
            Conditional(Normal(2), MLP(hidden=[6])),
        ).double()
        options = {"particles": particles, "clip": clip, "schedule": schedule, "elbo": elbo}
        assert_same(vae, x, **options)
        assert was_captured(calls, 20)


def one_role_each() -> list[Any]:
    """A role for each class of families, the roles in turn."""
    roles: dict[str, list[Any]] = {}
    for param in ROLES:
        roles.setdefault(type(param.values[0].make(2)).__name__, []).append(param)
    return [each[number % len(each)] for number, each in enumerate(roles.values())]


@pytest.mark.parametrize(("case", "role"), one_role_each())
def test_each_family(case: Case, role: str, calls: list[int]) -> None:
    torch.manual_seed(0)
    vae = vae_of(case, role)
    likelihood = vae.likelihood.family
    x = case.points(likelihood, 6) if role == "likelihood" else torch.randn(6, *likelihood.event_shape)
    assert_same(vae, x, epochs=5, elbo="TraceMeanField_ELBO" if role == "prior" else "Trace_ELBO")
    assert was_captured(calls, 5)


NETWORKS: dict[str, Any] = {
    "dropout": lambda: MLP(hidden=[6, 6], normalization="layer", dropout=0.5, residual=True),
    "Conv": lambda: Conv((2, 3), channels=[2, 3], hidden=[4]),
    "ResidualConv": lambda: ResidualConv((2, 3), channels=[2, 3], hidden=[4]),
    "own": lambda: nn.Sequential(nn.Linear(6, 4), nn.ELU()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_masks_validation_and_a_ragged_batch(name, calls):
    torch.manual_seed(0)
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Normal(6), MLP(hidden=[4])),
        Conditional(Normal(2), NETWORKS[name]()),
    )
    x = {"x": torch.randn(16, 6), "mask": torch.rand(16, 6) < 0.8}
    assert_same(vae, x, validation={key: value[:5] for key, value in x.items()}, keep="best", epochs=5)
    validated = calls.count(5)
    assert validated == 10
    assert calls.count(6) == 4 + 10
    assert calls.count(4) == 2 + 5  # the last of each epoch


def test_a_large_batch_is_no_other_step_for_its_rounding():
    """Sums over thousands of data differ in rounding from one library to another, by more than a millionth."""
    torch.manual_seed(0)
    x = (torch.rand(6144, 784) < 0.13).float()
    parts = [(StandardNormal(20), None), (Bernoulli(784), MLP(hidden=[400])), (Normal(20), MLP(hidden=[400]))]
    vae = VAE(*(Conditional(*part) if part[1] else Conditional(part[0]) for part in parts))
    history = fit(vae, x, epochs=2, batch_size=2048, device="cpu", progress=False)
    assert history.capture == "fast"


def test_a_table_by_index(calls):
    vae = VAE(Conditional(StandardNormal(2)), Conditional(Normal(3), Linear()), Conditional(Normal(2), Table(30)))
    assert_same(vae, torch.randn(30, 3))
    assert was_captured(calls, 20)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("name", "sizes"), [("two_level", (3, 2)), ("state_space", (3,))])
def test_program_files(name, sizes, linear, calls):
    program: Any = load_program(str(MODELS / f"{name}.py"))(*sizes, linear=linear)
    assert_same(program, torch.randn(30, 3), particles=2)
    assert was_captured(calls, 20)


ENUMERATED: dict[str, Any] = {
    "mixture": ((5,), {"components": 3}, lambda: torch.randn(30, 5)),
    "hidden_markov": ((8,), {"steps": 4, "states": 3}, lambda: torch.randn(30, 8)),
    "dirichlet_allocation": ((7,), {"topics": 3, "words": 6}, lambda: torch.randint(0, 4, (30, 7)).double()),
    "semi_supervised": (
        (5, 2),
        {"classes": 3, "hidden": 4},
        lambda: {"x": torch.randn(30, 5), "y": torch.arange(30).remainder(4) - 1},
    ),
}


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("name", ENUMERATED)
def test_sums_over_discrete_latents(name, particles, calls):
    sizes, options, data = ENUMERATED[name]
    torch.manual_seed(0)
    program: Any = load_program(str(MODELS / f"{name}.py"))(*sizes, **options)
    assert_same(program, data(), elbo="TraceEnum_ELBO", particles=particles)
    assert was_captured(calls, 20)


def model(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def guide(x: Tensor) -> None:
    slope = pyro.param("slope", lambda: torch.tensor(0.1))
    scale = pyro.param("scale", lambda: torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(slope * x[:, 0], scale))


def inner(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        with pyro.plate("inner", 3, dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(-1, 3).T)


def coin(x: Tensor) -> None:
    """Draws that are not reparameterised, whose gradient is that of the score."""
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", lambda: torch.tensor(0.2)) * x[:, 0]))


def tossed(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def test_bare_parameters_inner_plates_and_scores(calls):
    for program in (Program(model, guide), Program(inner, guide), Program(tossed, coin)):
        calls.clear()
        assert_same(program, torch.randn(30, 1))
        assert was_captured(calls, 20)


def test_an_autoguide(calls):
    def prior(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])

    assert_same(Program(prior, autoguide.AutoNormal(prior)), torch.randn(6, 1), epochs=8)
    assert was_captured(calls, 8)


@pytest.mark.parametrize("size", [6, 30])
def test_a_data_set_that_is_one_datum_whole_and_in_parts(size, calls):
    program: Any = load_program(str(MODELS / "regression.py"))()
    x, w = torch.randn(30, 2), torch.tensor([1.0, -0.5])
    assert_same(program, {"x": x, "y": x @ w + 0.1 * torch.randn(30)}, batch_size=size, epochs=5, particles=2)
    assert was_captured(calls, 5 * 30 // size)


def linear_vae() -> VAE:
    return VAE(Conditional(StandardNormal(2)), Conditional(Normal(5), Linear()), Conditional(Normal(2), Linear()))


@pytest.mark.parametrize("after", [0, 2])
def test_a_resumed_run_is_the_run_without_interruption_to_the_last_bit(after):
    torch.manual_seed(0)
    x, start, saved = torch.randn(20, 5), linear_vae(), []
    options = {**OPTIONS, "clip": 0.5, "schedule": "one-cycle"}
    whole, part = copy.deepcopy(start), copy.deepcopy(start)
    a = fit(whole, x, **options, on_epoch=lambda epoch, state: saved.append(copy.deepcopy(state.save())))
    b = fit(part, x, **options, resume=saved[after])
    assert a.elbo == b.elbo
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), part.parameters(), strict=True))


def test_a_gradient_shared_by_two_parameters_is_clipped_once(calls):
    def sums(x):
        loc = pyro.param("a", lambda: torch.tensor(0.0)) + pyro.param("b", lambda: torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x[:, 0])

    def own(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0 * x[:, 0], 1.0))

    program = Program(sums, own)
    options = {"clip": 0.1, "learning_rate": 1.0, "optimizer": lambda tensors, lr: torch.optim.SGD(tensors, lr=lr)}
    assert_same(program, 100 + torch.randn(6, 1), epochs=5, **options)
    assert was_captured(calls, 5)
    moved = torch.stack([value.detach() for value in own_params(program)["params"].values()])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.5))  # five steps of length 0.1


class Branching(nn.Module):
    """A program that cannot be captured, or whose own numbers change."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.count, self.weight = kind, 0, 1.0
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.norm = nn.BatchNorm1d(1)
        self.last: Any = None

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            if self.kind == "value" and bool(self.slope > 0.2):
                z = 2 * z
            if self.kind == "shape":
                z = z + 0.1 * x[x > 0].sum()
            if self.kind == "numpy":
                z = z + float(self.slope.detach().numpy())
            if self.kind == "counts":
                self.count += 1
            if self.kind == "keeps":
                self.last = z.detach()
            if self.kind == "item":
                z = z + self.slope.exp().item()
            if self.kind == "codes":
                z = z + self.slope * nn.functional.one_hot((x[:, 0] > 0).long(), num_classes=2)[:, 1]
            pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        pyro.module(f"branching_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            seen = self.norm(x) if self.kind == "buffer" else x
            pyro.sample("z", dist.Normal(self.slope * seen[:, 0], 1.0))


REASONS = {
    "value": "data-dependent",
    "shape": "a shape depends on values",
    "numpy": "the loss or a gradient is not that",
    "counts": "changes its 'count'",
    "keeps": "changes its 'last'",
    "buffer": "changes a buffer",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_captured_goes_on_by_pyro_and_the_log_says_why_once(kind, calls, caplog):
    caplog.set_level("INFO", "ppl_vae")
    program = assert_same(Branching(kind), torch.randn(20, 1), exact=False)
    assert len(calls) == 32
    assert [record.name for record in caplog.records] == ["ppl_vae.infer.gradients"]
    assert "step by step" in caplog.text
    assert REASONS[kind] in caplog.text
    if kind == "buffer":
        assert int(program.norm.num_batches_tracked) == 16


@pytest.mark.parametrize("kind", ["item", "codes"])
def test_numbers_that_are_read_stay_numbers_of_the_step(kind, calls):
    assert_same(Branching(kind), torch.randn(30, 1))
    assert was_captured(calls, 20)


def test_what_is_changed_between_epochs_counts(calls):
    def change(program):
        def on_epoch(epoch, state):
            program.weight = 1.0 + epoch

        return on_epoch

    torch.manual_seed(0)
    x, program = torch.randn(30, 1), Branching("none")
    twin = copy.deepcopy(program)
    a = fit(program, x, **OPTIONS, on_epoch=change(program))
    calls.clear()
    b = fit(twin, x, **OPTIONS, on_epoch=change(twin), capture="off")
    assert a.elbo == b.elbo
    assert torch.equal(program.slope, twin.slope)


def test_a_run_without_capture_asks_pyro_at_each_step(calls):
    fit(linear_vae(), torch.randn(30, 5), **OPTIONS, capture="off")
    assert len(calls) == 20


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_a_nan_in_a_captured_step_names_its_site(calls):
    """The scale of x passes zero after a while, and its log density is no number then."""

    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(1.0))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
                pyro.sample("x", dist.Normal(z, self.theta), obs=x[:, 0])

        def guide(self, x):
            pyro.module(f"shrinking_{id(self)}", self)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x[:, 0], 1e-3))

    messages, left = [], []
    for capture in ("auto", "off"):
        program = Shrinking()
        options = {**OPTIONS, "learning_rate": 0.1, "optimizer": lambda tensors, lr: torch.optim.SGD(tensors, lr=lr)}
        with pytest.raises(ValueError, match="finite loss.*site 'x' of the model") as caught:
            fit(program, torch.linspace(-1, 1, 60).unsqueeze(1), **options, capture=capture)
        messages.append(str(caught.value))
        left.append(float(program.theta.detach()))
        if capture == "auto":
            assert len(calls) == 4 + 2 * 2  # and the first two again, twice, to find the step
    assert messages[0] == messages[1]
    assert left[0] == left[1]
    assert math.isfinite(left[0])


def test_two_programs_in_turn_do_not_touch_each_other():
    torch.manual_seed(0)
    x, a, b = torch.randn(30, 5), linear_vae(), linear_vae()
    alone = copy.deepcopy(b)
    fit(alone, x, **OPTIONS)
    fit(b, x, **OPTIONS, on_epoch=lambda epoch, state: fit(a, x, **OPTIONS))
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), b.parameters(), strict=True))


def test_memory_does_not_grow(calls):
    held = []

    def count(epoch, state):
        gc.collect()
        held.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))

    fit(linear_vae(), torch.randn(20, 5), **{**OPTIONS, "epochs": 30}, on_epoch=count)
    assert len(calls) == 6
    assert len(set(held[8:])) == 1
