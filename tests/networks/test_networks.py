import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor, nn

from ppl_vae import networks
from ppl_vae.networks import MLP, Free, Linear, Network, Table, join
from ppl_vae.networks.mlp import ACTIVATIONS, Activation

# name -> (constructor, size of the context)
NETWORKS: dict[str, tuple[Callable[[], Network], int]] = {
    "Free": (Free, 0),
    "Linear": (Linear, 4),
    "MLP(one)": (lambda: MLP(hidden=[6]), 4),
    "MLP(two)": (lambda: MLP(hidden=[6, 5], activation="relu"), 4),
    "Table": (lambda: Table(9), 4),
}


def _built(name: str, size: int = 3) -> Any:
    make, context = NETWORKS[name]
    network = make()
    network.build(context, torch.arange(float(size)))
    return network


def _context(name: str, *batch: int) -> Tensor:
    if name == "Table":
        return torch.randint(9, batch)
    return torch.randn(*batch, NETWORKS[name][1])


def _sizes(*shapes: tuple[int, ...]) -> list[torch.Size]:
    return [torch.Size(shape) for shape in shapes]


def test_the_table_holds_every_network() -> None:
    assert {type(make()).__name__ for make, _ in NETWORKS.values()} == set(networks.__all__)


# join ----------------------------------------------------------------------------------------------------------------


def test_join_broadcasts_unexpanded_batches() -> None:
    a, b = torch.randn(4, 1, 1, 2), torch.randn(5, 9, 3)
    joined = join([a, b], _sizes((2,), (3,)))
    expected = np.concatenate(
        [np.broadcast_to(a.numpy(), (4, 5, 9, 2)), np.broadcast_to(b.numpy(), (4, 5, 9, 3))], axis=-1
    )
    assert joined.shape == (4, 5, 9, 5)
    assert np.array_equal(joined.numpy(), expected)


def test_join_flattens_events_of_any_shape() -> None:
    a, b, c = torch.randn(7, 2, 3), torch.randn(4, 1, 5), torch.randn(())
    joined = join([a, b, c], _sizes((2, 3), (5,), ()))
    assert joined.shape == (4, 7, 12)
    for k, n in np.ndindex(4, 7):
        assert joined[k, n].tolist() == [*a[n].flatten().tolist(), *b[k, 0].tolist(), c.item()]


def test_join_of_one_context_is_that_context() -> None:
    a = torch.randn(4, 2, 3)
    assert torch.equal(join([a], _sizes((2, 3))), a.reshape(4, 6))
    assert torch.equal(join([a], _sizes((3,))), a)


def test_join_of_no_data() -> None:
    assert join([torch.zeros(0, 2), torch.zeros(0, 3)], _sizes((2,), (3,))).shape == (0, 5)


@pytest.mark.parametrize(
    ("contexts", "shapes", "message"),
    [
        ([torch.zeros(3, 2)], [(2,), (3,)], r"Expected 2 contexts of shapes \(2,\), \(3,\); got 1\."),
        ([torch.zeros(3, 2)], [], r"Expected 0 contexts of shapes none; got 1\."),
        ([torch.zeros(3, 4)], [(2,)], r"trailing dimensions are \(2,\); got shape \(3, 4\)"),
        ([torch.zeros(2)], [(2, 2)], r"trailing dimensions are \(2, 2\); got shape \(2,\)"),
    ],
)
def test_join_refuses_what_was_not_declared(contexts: Any, shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(contexts, _sizes(*shapes))


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("batch", [[], [3], [2, 3]], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes(name: str, batch: list[int], size: int) -> None:
    answer = _built(name, size)(_context(name, *batch))
    assert answer.shape == ((size,) if name == "Free" else (*batch, size))


def test_free_answers_its_value_whatever_the_context() -> None:
    network = _built("Free")
    assert network().tolist() == [0, 1, 2]
    assert [name for name, _ in network.named_parameters()] == ["value"]


def test_free_without_parameters_has_nothing_to_learn() -> None:
    network = Free()
    network.build(0, torch.zeros(0))
    assert not list(network.parameters())
    assert not network.state_dict()
    assert network().shape == (0,)
    assert network.float()().dtype == torch.float32


def test_linear_is_affine_in_the_standardised_context() -> None:
    network, context = _built("Linear"), torch.randn(2, 5, 4)
    assert network.weight.shape == (3, 4)
    w, b = network.weight.detach().numpy(), network.bias.detach().numpy()
    np.testing.assert_allclose(network(context).detach(), context.numpy() @ w.T + b, rtol=1e-12, atol=1e-14)
    shift = torch.randn(4)
    network.centre(shift, torch.tensor(2.5))
    expected = (context.numpy() - shift.numpy()) / 2.5 @ w.T + b
    np.testing.assert_allclose(network(context).detach(), expected, rtol=1e-12, atol=1e-14)


FORMULAS: dict[str, Callable[[Any], Any]] = {
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "elu": lambda a: np.where(a > 0, a, np.expm1(a)),
    "gelu": lambda a: a * scipy.special.ndtr(a),
    "silu": lambda a: a * scipy.special.expit(a),
    "softplus": lambda a: np.logaddexp(a, 0),
    "sigmoid": scipy.special.expit,
}


def test_every_activation_has_a_formula() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS) == set(get_args(Activation))


@pytest.mark.parametrize("hidden", [[7], [7, 5, 6]], ids=str)
@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp_is_layers_with_activations_between(activation: Any, hidden: list[int]) -> None:
    network: Any = MLP(hidden=hidden, activation=activation)
    network.build(4, torch.randn(3))
    shift = torch.randn(4)
    network.centre(shift, torch.tensor(0.5))
    context = torch.randn(6, 4)
    layers = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [*hidden, 3]
    answer = (context.numpy() - shift.numpy()) / 0.5
    for depth, layer in enumerate(layers):
        answer = answer @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        answer = FORMULAS[activation](answer) if depth < len(hidden) else answer
    np.testing.assert_allclose(network(context).detach(), answer, rtol=1e-10, atol=1e-12)


def test_table_answers_the_rows_asked_for() -> None:
    network = _built("Table")
    with torch.no_grad():
        network.value.copy_(torch.randn(9, 3))
    index = torch.tensor([[8, 0], [3, 3]])
    assert np.array_equal(network(index).detach().numpy(), network.value.detach().numpy()[index.numpy()])
    network(index).sum().backward()
    assert network.value.grad[:, 0].tolist() == [1, 0, 0, 2, 0, 0, 0, 0, 1]


# Starts and buffers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("again", [False, True], ids=["build", "restart"])
def test_the_output_begins_at_start(name: str, again: bool) -> None:
    """At the centre of the context for Linear, up to the last layer's weights for MLP, everywhere for the others."""
    network, start = _built(name), torch.arange(3.0)
    context = _context(name, 5)
    if again:
        start = torch.randn(3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        network.restart(start)
    if name.startswith("MLP"):
        nn.init.zeros_(network.layers[-1].weight)
    if name == "Linear":
        shift = torch.randn(4)
        network.centre(shift, torch.tensor(3.0))
        context = shift.expand(5, 4)
    torch.testing.assert_close(network(context), start.expand_as(network(context)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NETWORKS)
def test_start_is_copied(name: str) -> None:
    make, context = NETWORKS[name]
    network, start, other = make(), torch.zeros(3), torch.ones(3)
    network.build(context, start)
    network.restart(other)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert (start.tolist(), other.tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("name", ["Linear", "MLP(one)", "MLP(two)"])
def test_shift_and_scale_are_buffers(name: str) -> None:
    network, twin, context = _built(name), _built(name), _context(name, 6)
    network.centre(torch.randn(4), torch.tensor(2.0))
    assert {key for key, _ in network.named_buffers()} == {"shift", "scale"}
    assert not {"shift", "scale"} & {key for key, _ in network.named_parameters()}
    assert {"shift", "scale"} <= set(network.state_dict())
    twin.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(twin(context), network(context))
    assert torch.equal(copy.deepcopy(network)(context), network(context))
    assert network.float()(context.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ["Linear", "MLP(one)"])
def test_centring_standardises_the_context(name: str) -> None:
    network, context, shift = _built(name), _context(name, 6), torch.randn(4)
    plain, scale = copy.deepcopy(network), torch.tensor(2.0)
    network.centre(shift, scale)
    torch.testing.assert_close(network(context), plain((context - shift) / scale))
    twin = _built(name)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin(context), network(context))


@pytest.mark.parametrize("name", ["Linear", "MLP(one)", "MLP(two)"])
def test_what_is_not_observed_stands_at_its_average(name: str) -> None:
    network, context = _built(name), _context(name, 6)
    shift = torch.randn(4)
    network.centre(shift, torch.tensor(1.5))
    observed = torch.rand(6, 4) < 0.5
    observed[0], observed[1] = True, False
    answer = network(torch.where(observed, context, math.nan), observed)
    torch.testing.assert_close(answer, network(torch.where(observed, context, shift)))
    torch.testing.assert_close(answer[0], network(context)[0])
    answer.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = _built(name)
    network(_context(name, 50)).pow(2).sum().backward()
    assert list(network.parameters())
    for key, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, key


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [[], [0], [4, -1]], ids=str)
def test_mlp_refuses_no_or_empty_layers(hidden: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`hidden` to list one or more positive widths; got .* use Linear"):
        MLP(hidden=hidden)


def test_mlp_refuses_unknown_activations() -> None:
    with pytest.raises(ValueError, match="`activation` to be one of 'tanh', 'relu', .*'sigmoid'; got 'swish'"):
        MLP(hidden=[3], activation="swish")  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [0, -3])
def test_table_refuses_to_have_no_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=f"`rows` to be a whole number, at least 1; got {rows}"):
        Table(rows)


def test_free_refuses_a_context() -> None:
    with pytest.raises(ValueError, match="context of size 4, such as Linear or MLP; got Free"):
        Free().build(4, torch.zeros(3))
