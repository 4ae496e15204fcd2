"""Rows: guides that keep one row per datum, by position or by `index`, and the data that they know."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from ppl_vae import PPCA, VAE, Conditional, Program, Target, fit, log_evidence
from ppl_vae.evaluation import codes
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.networks import MLP, Linear, Table
from ppl_vae.programs.param_store import scope, to_double
from ppl_vae.programs.sites import structure
from ppl_vae.programs.traces import check_batch

N = 12


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def guided(locate: Any) -> Program:
    def guide(x: Tensor) -> None:
        loc = locate(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 0.4))

    return Program(model, guide)


def table(size: int) -> Tensor:
    return pyro.param("loc", lambda: torch.zeros(size))


class Dropped(nn.Module):
    """An amortized guide whose answers differ from run to run while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.network(x)[:, 0], 0.4))


class Normed(nn.Module):
    """An amortized guide whose answers depend on the other data of the batch, but not on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.network(x - x.mean(0))[:, 0], 0.4))


BY_POSITION = {
    "as many as data": lambda: guided(lambda x: table(len(x))),
    "all": lambda: guided(lambda x: table(N)),
    "first": lambda: guided(lambda x: table(N)[: len(x)]),
    "last": lambda: guided(lambda x: table(N)[-len(x) :]),
    "by plate": lambda: guided(lambda x: table(N)[torch.arange(len(x))]),
    "every other": lambda: guided(lambda x: table(2)[torch.arange(len(x)) % 2]),
    "constant": lambda: guided(lambda x: pyro.param("a", torch.ones(())) * torch.arange(len(x))),
    "beside a line": lambda: guided(lambda x: x[:, 0] * pyro.param("a", torch.zeros(())) + table(N)[: len(x)]),
    "AutoNormal": lambda: Program(model, AutoNormal(model)),
}
BY_DATUM = {
    "line": lambda: guided(lambda x: x[:, 0] * pyro.param("a", torch.zeros(()))),
    "random start": lambda: guided(lambda x: x[:, 0] * pyro.param("a", lambda: torch.randn(()))),
    "shared": lambda: guided(lambda x: pyro.param("a", torch.zeros(())).expand(len(x))),
    "dropout": lambda: Program(model, Dropped()),
    "beside the batch": lambda: Program(model, Normed()),
}


@pytest.mark.parametrize(
    ("kind", "n"), [(kind, n) for kind in BY_POSITION for n in (2, 3, N) if kind != "all" or n == N]
)  # "all" takes all data or none
def test_rows_by_position_are_seen(kind: str, n: int) -> None:
    assert structure(BY_POSITION[kind](), {"x": torch.randn(n, 1)}).rows == n


@pytest.mark.parametrize("kind", BY_DATUM)
@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guides_without_rows_are_let_through(kind: str, n: int, dtype: torch.dtype) -> None:
    program = BY_DATUM[kind]().to(dtype)
    assert structure(program, {"x": torch.randn(n, 1, dtype=dtype)}).rows is None


def test_narrow_amortized_guides_are_let_through_in_single_precision() -> None:
    """Their densities feel every rounding of a location."""
    torch.manual_seed(0)
    x = 100 * torch.randn(50, 8)
    vae = VAE(
        Conditional(StandardNormal(3)),
        Conditional(Normal(8), MLP(hidden=[16])),
        Conditional(Normal(3), MLP(hidden=[16])),
    ).initialise(x)
    with torch.no_grad():
        vae.posterior.network.layers[-1].bias[3:] = -12.0
    assert structure(vae.float(), {"x": x.float()}).rows is None


def test_a_look_at_a_program_leaves_nothing_behind() -> None:
    x = torch.randn(N, 1)
    for make in (BY_POSITION["as many as data"], BY_DATUM["random start"]):
        program = make()
        assert Target(program, x).structure.latents == ("z",)
        with scope(program):
            assert len(pyro.get_param_store()) == 0
    guide = AutoNormal(model)
    program = Program(model, guide)
    assert Target(program, x).structure.rows == N
    assert guide.prototype_trace is None
    assert list(program.parameters()) == []
    vae = PPCA.fit(torch.randn(20, 4), 2).to_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    y, state = torch.randn(5, 4), torch.get_rng_state()
    assert Target(vae, y).structure.rows is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_copies_of_autoguides_work_and_leave_the_original_whole() -> None:
    x = torch.randn(N, 1)
    program = Program(model, AutoNormal(model))
    fit(program, x, epochs=2)
    twin = to_double(program)
    assert twin.guide.model is program.guide.model
    assert callable(twin.guide.model)
    assert next(twin.parameters()).dtype == torch.float64


@pytest.mark.parametrize("kind", sorted(set(BY_POSITION) - {"constant", "every other"}))
def test_what_knows_only_its_data_answers_for_no_others(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 1)
    program = BY_POSITION[kind]()
    fit(program, x, epochs=300, learning_rate=0.05, particles=10)
    exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 0])
    evidence = log_evidence(program, x, 500)
    assert (evidence.log_evidence - exact).abs().max() < 0.05
    mean, variance = codes(program, x)
    assert mean.shape == variance.shape == (N, 1)
    for other in (x[:1], x[:2], x[:5], x[5:], x.flip(0), x + 1, torch.cat([x, x])):
        for verb in (lambda data: log_evidence(program, data, 5), lambda data: codes(program, data, 2)):
            with pytest.raises(ValueError, match="data that|one row per datum|data that this guide keeps"):
                verb(other)


def _on_table(rows: int) -> VAE:
    return VAE(Conditional(StandardNormal(2)), Conditional(Normal(3), Linear()), Conditional(Normal(2), Table(rows)))


def test_a_table_answers_for_its_own_data_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    vae = _on_table(20)
    with pytest.raises(ValueError, match="Expected `index`.*got 7 other data without it.*amortized"):
        log_evidence(vae, x[:7], 5)
    fit(vae, x, epochs=2)
    whole = log_evidence(vae, x, 5).elbo
    assert len(whole) == 20
    for other in (x[10:], x.flip(0), torch.randn(20, 3)):
        for verb in (lambda data: log_evidence(vae, data, 5), vae.reconstruct):
            with pytest.raises(ValueError, match="Expected `index`"):
                verb(other)
    part = log_evidence(vae, {"x": x[10:], "index": torch.arange(10, 20)}, 5).elbo
    assert len(part) == 10
    fit(vae, {"x": x[:10], "index": torch.arange(10)}, epochs=1)
    fit(vae, x[:10] + 1, epochs=1)  # what it is fitted to, it knows
    log_evidence(vae, x[:10] + 1, 5)
    with pytest.raises(ValueError, match="Expected `index`"):
        fit(vae, x, epochs=1, validation=x[:5])


def test_a_program_that_does_not_remember_is_asked_for_as_many_data_as_rows() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(9))

        def model(self, x: Tensor, index: Tensor) -> None:
            model(x)

        def guide(self, x: Tensor, index: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.loc[index], 0.4))

    program, x = Indexed(), torch.randn(9, 1)
    assert check_batch(program, {"x": x})["index"].tolist() == list(range(9))
    with pytest.raises(ValueError, match="Expected `index`.*got 4 other data"):
        check_batch(program, {"x": x[:4]})
    fit(program, x, epochs=2)
    other = Indexed()
    other.load_state_dict(program.state_dict())
    assert log_evidence(other, x, 5).elbo.shape == (9,)
    assert log_evidence(copy.deepcopy(program), x, 5).elbo.shape == (9,)
    with pytest.raises(ValueError, match="Expected `index`"):
        log_evidence(copy.deepcopy(program), x.flip(0), 5)


def test_an_amortized_vae_takes_any_data_without_index() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    vae = VAE(Conditional(StandardNormal(2)), Conditional(Normal(3), Linear()), Conditional(Normal(2), Linear()))
    fit(vae, x, epochs=2)
    for program in (vae, Program(vae.model, vae.guide)):
        assert log_evidence(program, x[3:9], 5).elbo.shape == (6,)


def test_a_program_that_cannot_take_particles_is_refused_at_once() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = nn.Linear(4, 3), nn.Linear(3, 4)

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                loc = self.decoder(z.flatten(1))
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    program, x = Flat(), torch.randn(10, 3)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    for verb in (lambda: fit(program, x, epochs=1), lambda: log_evidence(program, x, 5)):
        with pytest.raises(ValueError, match="also runs with dims of particles left of the data's.*it raised"):
            verb()
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_rows_that_data_share_are_remembered_where_a_part_does_not_show_them() -> None:
    x = torch.randn(N, 1)
    program = guided(lambda x: table(3)[torch.arange(len(x)) // 4])
    fit(program, x, epochs=2)
    assert log_evidence(program, x, 5).elbo.shape == (N,)
    for part in (x[:3], x[4:7]):
        with pytest.raises(ValueError, match="data that this program was fitted to"):
            log_evidence(program, part, 5)
