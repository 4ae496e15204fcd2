"""A captured function against itself: replays, what is computed once, and what cannot be replayed."""

import pyro
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.programs.capture import Captured

WEIGHT = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
DATA = torch.linspace(0, 1, 20, dtype=torch.float64).reshape(5, 4)


def network(u: Tensor) -> tuple[Tensor, ...]:
    """Give a likelihood and its gradient, with constants, views and identities among its operations."""
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


def nodes(captured: Captured, shape: torch.Size) -> int:
    return sum(node.op == "call_function" for node in captured.graphs[shape, torch.float64].__self__.graph.nodes)


def test_replays_are_the_function_at_every_point_and_cost_fewer_operations():
    captured = Captured(network)
    for u in points(12, 5, 3):
        for found, wanted in zip(captured(u), network(u), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    assert captured.graphs[u.shape, u.dtype] is not network
    plain = make_fx(lambda given: network(given))(u)
    assert 2 * nodes(captured, u.shape) < sum(node.op == "call_function" for node in plain.graph.nodes)


def test_expanded_and_transposed_points_are_evaluated_alike():
    captured = Captured(network)
    for u in points(6, 5, 3):
        captured(u)
    for given in (u[:1].expand(5, 3), u.T.contiguous().T):
        for found, wanted in zip(captured(given), network(given.contiguous()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_the_gradient_alone_leaves_the_value_out():
    both, slope = Captured(network), Captured(lambda u: network(u)[1:])
    for u in points(6, 5, 3):
        assert torch.equal(both(u)[1], slope(u)[0])
    assert nodes(slope, u.shape) < nodes(both, u.shape)


def test_each_shape_has_a_graph_of_its_own():
    captured = Captured(network)
    for u in (*points(6, 5, 3), *points(6, 2, 5, 3)):
        for found, wanted in zip(captured(u), network(u), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    assert len(captured.graphs) == 2


def test_each_type_has_a_graph_of_its_own():
    captured = Captured(lambda u: ((u @ WEIGHT.to(u)).exp().cos(),))
    for u in (*points(6, 5, 3).float(), *points(6, 5, 3)):
        found, wanted = captured(u)[0], captured.function(u)[0]
        assert found.dtype == u.dtype
        torch.testing.assert_close(found, wanted)
    assert len(captured.graphs) == 2


def likelihood(u: Tensor) -> tuple[Tensor, ...]:
    """Give a Bernoulli log likelihood, validated, of far-out logits among others."""
    logits = 30 * u.tanh()
    return (pyro.distributions.Bernoulli(logits=logits).log_prob((u > 0.3).to(u) * 0 + 1.0), logits)


def test_what_is_written_anew_is_equal_to_rounding():
    captured = Captured(likelihood)
    with pyro.validation_enabled(True):
        for u in 3 * points(8, 50, 3):
            for found, wanted in zip(captured(u), likelihood(u), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    graph = captured.graphs[u.shape, u.dtype].__self__.graph
    assert not {"tanh", "binary_cross_entropy_with_logits"} & {node.name for node in graph.nodes}


def tangled(u: Tensor) -> tuple[Tensor, ...]:
    """Use, give back and look sideways at what later operations could be written over."""
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
    captured, earlier = Captured(tangled), []
    for u in points(9, 5, 3):
        given = u.clone()
        earlier.append((captured(u), tangled(u)))
        assert torch.equal(u, given)
    for found, wanted in earlier:  # the answers of earlier replays too
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    calls = [node for node in captured.graphs[u.shape, u.dtype].__self__.graph.nodes if node.op == "call_function"]
    over = [node for node in calls if {"out", "grad_input"} & set(node.kwargs)]
    assert len(over) >= 8
    assert any(node.kwargs["out"].op == "get_attr" for node in over)
    assert any(node.kwargs["out"] in node.args for node in over)


def test_a_chain_of_products_needs_two_pieces_of_memory():
    matrix = WEIGHT[:, :3] + torch.eye(3, dtype=WEIGHT.dtype)

    def chain(u: Tensor) -> tuple[Tensor, ...]:
        for _ in range(7):
            u = u @ matrix
        return (u.sum(-1),)

    captured = Captured(chain)
    for u in points(6, 5, 3):
        torch.testing.assert_close(captured(u)[0], chain(u)[0], rtol=1e-12, atol=1e-12)
    kept = [name for name in vars(captured.graphs[u.shape, u.dtype].__self__) if name.startswith("kept")]
    assert len(kept) == 2


def rises(u: Tensor) -> tuple[Tensor, ...]:
    return (torch.zeros_like(u).add_(u).mul_(u).exp(),)


def branches(u: Tensor) -> tuple[Tensor, ...]:
    return (u if bool(u.sum() > 0) else -u,)


def draws(u: Tensor) -> tuple[Tensor, ...]:
    return (u + torch.randn_like(u),)


def counts(u: Tensor) -> tuple[Tensor, ...]:
    return (u * (1.0 if float(u[0, 0]) > 0.0 else 2.0),)


def test_operations_in_place_are_replayed_as_they_are():
    captured = Captured(rises)
    for u in points(8, 5, 3):
        assert torch.equal(captured(u)[0], rises(u)[0])
    assert captured.graphs[u.shape, u.dtype] is not rises


def picks(u: Tensor) -> tuple[Tensor, ...]:
    return (u[u > -0.5].sum() / len(u[u > -0.5]),)


@pytest.mark.parametrize("function", [branches, draws, counts, picks])
def test_what_cannot_be_replayed_stays_as_it_is_and_the_log_says_so(function, caplog):
    caplog.set_level("INFO", "ppl_vae")
    captured = Captured(function)
    for u in points(6, 5, 3):
        captured(u)
    assert captured.graphs[u.shape, u.dtype] is function
    assert "step by step" in caplog.text


def test_what_is_not_finite_is_replayed():
    captured = Captured(lambda u: (u.log(), u.sign() / 0.0))
    for u in points(7, 5, 3):
        found = captured(u)
    assert captured.graphs[u.shape, u.dtype] is not captured.function
    assert found[0].isnan().any()
    assert found[1].isinf().all()
