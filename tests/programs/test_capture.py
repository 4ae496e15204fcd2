"""A captured function against itself: replays, what is computed once, and what cannot be replayed."""

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from ppl_vae import VAE, Conditional
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer.hmc import slope
from ppl_vae.networks import MLP, Conv, GatedMLP, Linear, ResidualConv
from ppl_vae.programs.capture import Captured
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.param_store import mode

WEIGHT = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
DATA = torch.linspace(0, 1, 20, dtype=torch.float64).reshape(5, 4)


def network(u: Tensor) -> tuple[Tensor, ...]:
    """A likelihood and its gradient, with constants, views and identities among its operations."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        loc, scale = torch.zeros(4, dtype=u.dtype), torch.ones(4, dtype=u.dtype).log().exp()
        mean = (u.reshape(-1, 1, 3).transpose(0, 1).reshape(u.shape) @ WEIGHT.tanh()).tanh().unflatten(-1, (1, 4))
        error = ((DATA - mean.unbind(-2)[0] - loc) / scale) ** 1.0
        value = -(torch.cat([error], -1).square() * 1.0).sum(-1) + 0.0
        slope = torch.autograd.grad(value, u, torch.ones_like(value))[0]
    return value.detach(), slope


def points(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Counted:
    """A function that counts its own calls: a replay makes none."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, u: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return self.function(u)


def replayed(captured: Captured, u: Tensor) -> bool:
    """Whether a call leaves the captured function, a `Counted`, alone."""
    calls = captured.function.calls
    captured(u)
    return captured.function.calls == calls


def cost(function: Callable[[Tensor], object], u: Tensor) -> tuple[int, int]:
    """How many operations a call runs, and how many bytes it allocates."""
    with torch.no_grad(), profile(profile_memory=True) as run:
        function(u)
    return len(run.events()), sum(max(event.self_cpu_memory_usage, 0) for event in run.events())


def test_replays_are_the_function_at_every_point_and_cost_fewer_operations():
    captured = Captured(Counted(network))
    for u in points(12, 5, 3):
        for answer, wanted in zip(captured(u), network(u), strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-14, atol=1e-14)
    assert replayed(captured, u)
    assert 2 * cost(captured, u)[0] < cost(network, u)[0]


def test_expanded_and_transposed_points_are_evaluated_alike():
    captured = Captured(network)
    for u in points(6, 5, 3):
        captured(u)
    for given in (u[:1].expand(5, 3), u.T.contiguous().T):
        for answer, wanted in zip(captured(given), network(given.contiguous()), strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-14, atol=1e-14)


def test_the_gradient_alone_leaves_the_value_out():
    both, slope = Captured(network), Captured(lambda u: network(u)[1:])
    for u in points(6, 5, 3):
        assert torch.equal(both(u)[1], slope(u)[0])
    assert cost(slope, u)[0] < cost(both, u)[0]


def test_each_shape_is_captured_by_itself():
    captured = Captured(Counted(network))
    for u in (*points(6, 5, 3), *points(6, 2, 5, 3)):
        for answer, wanted in zip(captured(u), network(u), strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-14, atol=1e-14)
    assert replayed(captured, points(1, 5, 3)[0])
    assert replayed(captured, points(1, 2, 5, 3)[0])


def test_each_type_is_captured_by_itself():
    captured = Captured(Counted(lambda u: ((u @ WEIGHT.to(u)).exp().cos(),)))
    for u in (*points(6, 5, 3).float(), *points(6, 5, 3)):
        answer, wanted = captured(u)[0], captured.function(u)[0]
        assert answer.dtype == u.dtype
        torch.testing.assert_close(answer, wanted)
    assert replayed(captured, u)
    assert replayed(captured, u.float())


def likelihood(u: Tensor) -> tuple[Tensor, ...]:
    """A Bernoulli log likelihood, validated, of far-out logits among others."""
    logits = 30 * u.tanh()
    return (pyro.distributions.Bernoulli(logits=logits).log_prob((u > 0.3).to(u) * 0 + 1.0), logits)


def test_faster_operations_are_equal_to_rounding():
    captured = Captured(Counted(likelihood))
    with pyro.validation_enabled(True):
        for u in 3 * points(8, 50, 3):
            for answer, wanted in zip(captured(u), likelihood(u), strict=True):
                torch.testing.assert_close(answer, wanted, rtol=1e-13, atol=1e-13)
    assert replayed(captured, u)


def tangled(u: Tensor) -> tuple[Tensor, ...]:
    """Results that are used late, returned or viewed, so that a later operation must not overwrite them."""
    a = u @ WEIGHT
    b = a.exp()
    c = b * a.sum(0)  # b is given back below
    square = (u @ WEIGHT).T @ a
    d = square.sin() + square.T  # a view of what could be overwritten, with its entries elsewhere
    row = (square * 3)[0]
    e = square.cos() * row + d
    other = (u @ WEIGHT).T @ b
    g = (other + other.T).sin()  # the last use of it, from two sides
    head = c[:2]
    f = (c + 1).tanh()
    return b, e, f * head.sum(), head, f[1:].relu(), u.neg().exp().neg(), g


def test_memory_is_kept_and_nothing_is_lost_by_it():
    captured, earlier = Captured(Counted(tangled)), []
    for u in points(9, 5, 3):
        given = u.clone()
        earlier.append((captured(u), tangled(u)))
        assert torch.equal(u, given)
    for answers, wanted in earlier:  # the answers of earlier replays too
        for one, other in zip(answers, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert replayed(captured, u)
    assert 2 * cost(captured, u)[1] < cost(tangled, u)[1]


def test_a_chain_of_products_allocates_its_answer_alone():
    matrix = WEIGHT[:, :3] + torch.eye(3, dtype=WEIGHT.dtype)

    def chain(u: Tensor) -> tuple[Tensor, ...]:
        for _ in range(7):
            u = u @ matrix
        return (u.sum(-1),)

    captured = Captured(chain)
    for u in points(6, 5, 3):
        torch.testing.assert_close(captured(u)[0], chain(u)[0], rtol=1e-12, atol=1e-12)
    assert cost(captured, u)[1] <= 64 * len(u) < cost(chain, u)[1]


def rises(u: Tensor) -> tuple[Tensor, ...]:
    return (torch.zeros_like(u).add_(u).mul_(u).exp(),)


def branches(u: Tensor) -> tuple[Tensor, ...]:
    return (u if bool(u.sum() > 0) else -u,)


def draws(u: Tensor) -> tuple[Tensor, ...]:
    return (u + torch.randn_like(u),)


def counts(u: Tensor) -> tuple[Tensor, ...]:
    return (u * (1.0 if float(u[0, 0]) > 0.0 else 2.0),)


def test_operations_in_place_are_replayed_as_they_are():
    captured = Captured(Counted(rises))
    for u in points(8, 5, 3):
        assert torch.equal(captured(u)[0], rises(u)[0])
    assert replayed(captured, u)


def picks(u: Tensor) -> tuple[Tensor, ...]:
    return (u[u > -0.5].sum() / len(u[u > -0.5]),)


@pytest.mark.parametrize("function", [branches, draws, counts, picks])
def test_what_cannot_be_replayed_stays_as_it_is_and_the_log_says_so(function, caplog):
    caplog.set_level("INFO", "ppl_vae")
    captured = Captured(Counted(function))
    for u in points(6, 5, 3):
        captured(u)
    assert not replayed(captured, u)
    assert "step by step" in caplog.text


def test_what_is_not_finite_is_replayed():
    captured = Captured(Counted(lambda u: (u.log(), u.sign() / 0.0)))
    for u in points(7, 5, 3):
        logs, ratios = captured(u)
    assert replayed(captured, u)
    assert logs.isnan().any()
    assert ratios.isinf().all()


def decoders() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A network of each kind, as the decoder of a VAE, and the shape of its data."""
    return {
        "Linear": (Linear(), (12,)),
        "MLP": (MLP(hidden=[6, 6], normalization="layer", dropout=0.5, residual=True), (12,)),
        "GatedMLP": (GatedMLP(hidden=[6]), (12,)),
        "Conv": (Conv((3, 4), channels=[2, 3], hidden=[4]), (3, 4)),
        "ResidualConv": (ResidualConv((3, 2, 2), channels=[2, 3], hidden=[4]), (3, 2, 2)),
        "own": (nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 1, 3, padding=1)), (3, 4)),
    }


@pytest.mark.parametrize("name", decoders())
def test_the_density_of_a_vae_is_captured_with_each_network(name: str) -> None:
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(12), decoders()[name][0]),
        Conditional(Normal(2), Linear()),
    ).double()
    joint = Joint(vae, (torch.rand(5, 12) < 0.5).double())

    def ends(u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad(), mode(vae):
            u = u.detach().requires_grad_()
            values = joint.log_probs(u)
            return *(value.detach() for value in values), slope(torch.stack(values), u)

    captured = Captured(Counted(ends))
    for u in points(8, 3, 5, 2):
        for answer, wanted in zip(captured(u), ends(u), strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-12, atol=1e-12)
    assert replayed(captured, u)
    assert vae.training
