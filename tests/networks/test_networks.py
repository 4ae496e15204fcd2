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
from ppl_vae.networks import MLP, Conv, Free, GatedMLP, Linear, Network, ResidualConv, Table, join
from ppl_vae.networks.mlp import ACTIVATIONS, Activation

# name -> (constructor, size of the context)
NETWORKS: dict[str, tuple[Callable[[], Network], int]] = {
    "Free": (Free, 0),
    "Linear": (Linear, 4),
    "MLP(one)": (lambda: MLP(hidden=[6]), 4),
    "MLP(two)": (lambda: MLP(hidden=[6, 5], activation="relu"), 4),
    "MLP(layer)": (lambda: MLP(hidden=[6, 5], normalization="layer"), 4),
    "MLP(dropout)": (lambda: MLP(hidden=[6], dropout=0.3), 4),
    "MLP(residual)": (lambda: MLP(hidden=[6, 6, 5, 5], residual=True), 4),
    "GatedMLP": (lambda: GatedMLP(hidden=[6, 5]), 4),
    "Conv(encoder)": (lambda: Conv((5, 7), channels=[2, 3], hidden=[4], activation="tanh"), 35),
    "Conv(decoder)": (lambda: Conv((5, 7), channels=[2, 3], hidden=[4], activation="tanh"), 4),
    "ResidualConv(encoder)": (lambda: ResidualConv((3, 9, 6), channels=[2, 3], hidden=[], activation="elu"), 162),
    "ResidualConv(decoder)": (lambda: ResidualConv((3, 9, 6), channels=[2, 3], hidden=[], activation="elu"), 4),
    "Table": (lambda: Table(9), 4),
}
PIXELS = {"Conv(decoder)": 35, "ResidualConv(decoder)": 162}
AMORTIZED = [name for name in NETWORKS if name not in ("Free", "Table")]


def _start(name: str, size: int = 3) -> Tensor:
    """Parameters to start from; a decoder's number is a multiple of the pixels."""
    return torch.arange(float(size)).repeat(PIXELS.get(name, 1))


def _built(name: str, size: int = 3) -> Any:
    make, context = NETWORKS[name]
    network = make()
    network.build(context, _start(name, size))
    return network.eval()


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
    network, context = _built(name, size), _context(name, *batch)
    answer, width = network(context), size * PIXELS.get(name, 1)
    assert answer.shape == ((width,) if name == "Free" else (*batch, width))
    if name != "Free":  # each row by itself
        for place in np.ndindex(*batch):
            torch.testing.assert_close(answer[place], network(context[place]))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_data_are_no_parameters(name: str) -> None:
    if name != "Free":
        assert _built(name)(_context(name, 2, 0)).shape == (2, 0, 3 * PIXELS.get(name, 1))


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


def _affine(layer: Any, h: Any) -> Any:
    return h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def test_layer_normalisation_comes_before_the_activation() -> None:
    network: Any = MLP(hidden=[6], normalization="layer")
    network.build(4, torch.randn(3))
    nn.init.normal_(network.layers[1].weight)
    nn.init.normal_(network.layers[1].bias)
    context = torch.randn(7, 4)
    h = _affine(network.layers[0], context.numpy())
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    h = np.tanh(h * network.layers[1].weight.detach().numpy() + network.layers[1].bias.detach().numpy())
    np.testing.assert_allclose(network(context).detach(), _affine(network.layers[-1], h), rtol=1e-10, atol=1e-12)


def test_residual_layers_are_added_where_the_widths_are_equal() -> None:
    network: Any = MLP(hidden=[6, 6, 5], residual=True)
    network.build(4, torch.randn(3))
    context = torch.randn(7, 4)
    first, second, third, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    h = np.tanh(_affine(first, context.numpy()))
    h = h + np.tanh(_affine(second, h))
    h = np.tanh(_affine(third, h))
    np.testing.assert_allclose(network(context).detach(), _affine(last, h), rtol=1e-10, atol=1e-12)


def test_gates_multiply_affine_maps() -> None:
    network: Any = GatedMLP(hidden=[6, 5])
    network.build(4, torch.randn(3))
    context = torch.randn(7, 4)
    h = context.numpy()
    first, second, last = (layer for layer in network.layers if isinstance(layer, nn.Linear))
    for layer in (first, second):
        a, b = np.split(_affine(layer, h), 2, axis=1)
        h = a * scipy.special.expit(b)
    np.testing.assert_allclose(network(context).detach(), _affine(last, h), rtol=1e-10, atol=1e-12)


def test_gated_weights_begin_by_he() -> None:
    network: Any = GatedMLP(hidden=[300, 200])
    network.build(100, torch.zeros(50))
    for layer in network.layers[:-1]:
        if isinstance(layer, nn.Linear):
            ratio = layer.weight.var() * layer.in_features / 2
            assert abs(ratio - 1) < 5 * math.sqrt(2 / layer.weight.numel())


def test_dropout_sets_a_share_to_zero_in_training_mode_alone() -> None:
    network: Any = MLP(hidden=[6], dropout=0.3)
    network.build(4, torch.randn(3))
    context = torch.randn(2, 4)
    plain: Any = MLP(hidden=[6])
    plain.build(4, torch.zeros(3))
    plain.layers[0].load_state_dict(network.layers[0].state_dict())
    plain.layers[-1].load_state_dict(network.layers[-1].state_dict())
    many = network.train()(context.expand(20_000, 2, 4))
    assert torch.equal(network.eval()(context), plain(context))
    error = many.std(0) / math.sqrt(len(many))
    assert bool(((many.mean(0) - plain(context)).abs() < 5 * error).all())
    weight, h = plain.layers[-1].weight, plain.layers[:-1](context)
    variance = (h.square() @ weight.square().T) * 0.3 / 0.7  # of a Bernoulli(0.7) / 0.7
    torch.testing.assert_close(many.var(0), variance, rtol=0.1, atol=0)


# Pictures ------------------------------------------------------------------------------------------------------------

SHAPES = [(8, 8), (28, 28), (5, 7), (20, 28), (1, 1), (1, 2), (1, 8, 8), (3, 9, 6)]


def _convolved(picture: Any, layer: Any) -> Any:
    """Cross-correlation with stride 2 over a picture (c, h, w) with zeros around it, by loops."""
    weight, bias, pad = layer.weight.detach().numpy(), layer.bias.detach().numpy(), layer.kernel_size[0] // 2
    around = np.pad(picture, ((0, 0), (pad, pad), (pad, pad)))
    height, width = (math.ceil(side / 2) for side in picture.shape[1:])
    answer = np.empty((len(weight), height, width))
    for out, i, j in np.ndindex(*answer.shape):
        window = around[:, 2 * i : 2 * i + 2 * pad + 1, 2 * j : 2 * j + 2 * pad + 1]
        answer[out, i, j] = (window * weight[out]).sum() + bias[out]
    return answer


def _spread(picture: Any, layer: Any, shape: tuple[int, int]) -> Any:
    """Its transpose: each pixel adds a window, two pixels apart, and what lies outside is cut off."""
    weight, pad = layer.weight.detach().numpy(), layer.kernel_size[0] // 2
    answer = np.zeros((weight.shape[1], shape[0] + 2 * pad + 1, shape[1] + 2 * pad + 1))
    for c, i, j in np.ndindex(*picture.shape):
        answer[:, 2 * i : 2 * i + 2 * pad + 1, 2 * j : 2 * j + 2 * pad + 1] += picture[c, i, j] * weight[c]
    answer = answer[:, pad : pad + shape[0], pad : pad + shape[1]]
    return answer if layer.bias is None else answer + layer.bias.detach().numpy()[:, None, None]


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 4, 6)], ids=str)
def test_an_encoder_is_convolutions_then_layers(shape: tuple[int, ...], kernel: int, others: int) -> None:
    """What is given beside the picture joins behind the convolutions."""
    network: Any = Conv(shape, channels=[2, 3], kernel=kernel, hidden=[4], activation="tanh")
    network.others, pixels = others, math.prod(shape)
    network.build(pixels + others, torch.randn(5))
    network.centre(torch.randn(pixels + others), torch.tensor(2.0))
    context = torch.randn(pixels + others)
    first, second, dense, last = (layer for layer in network.layers if hasattr(layer, "weight"))
    standard = ((context - network.shift) / 2).numpy()
    picture = standard[:pixels].reshape(-1, *shape[-2:])
    picture = np.tanh(_convolved(np.tanh(_convolved(picture, first)), second))
    joined = np.concatenate([picture.flatten(), standard[pixels:]])
    answer = last.weight.detach().numpy() @ np.tanh(_affine(dense, joined)) + network.bias.detach().numpy()
    np.testing.assert_allclose(network(context).detach(), answer, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 4, 6)], ids=str)
def test_a_decoder_is_layers_then_transposed_convolutions(shape: tuple[int, ...], kernel: int) -> None:
    network: Any = Conv(shape, channels=[2, 3], kernel=kernel, hidden=[4], activation="tanh")
    network.build(6, torch.randn(2 * math.prod(shape)))
    dense, wide, first, second = (layer for layer in network.layers if hasattr(layer, "weight"))
    height, width = shape[-2:]
    half, quarter = ([math.ceil(side / by) for side in (height, width)] for by in (2, 4))
    context = torch.randn(6)
    h = np.tanh(_affine(wide, np.tanh(_affine(dense, context.numpy())))).reshape(3, *quarter)
    h = _spread(np.tanh(_spread(h, first, half)), second, (height, width))
    assert h.shape == (2 * (shape[0] if len(shape) == 3 else 1), height, width)
    np.testing.assert_allclose(network(context).detach(), h.flatten() + network.bias.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("kind", [Conv, ResidualConv])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pictures_of_any_size_come_out_as_they_went_in(kind: Any, shape: tuple[int, ...]) -> None:
    pixels = math.prod(shape)
    for channels in ([2], [2, 3], [2, 3, 2]):
        encoder, decoder = kind(shape, channels=channels), kind(shape, channels=channels)
        encoder.build(pixels, torch.zeros(5))
        decoder.build(pixels + 1, torch.zeros(2 * pixels))
        assert encoder(torch.randn(2, 3, pixels)).shape == (2, 3, 5)
        assert decoder(torch.randn(2, 3, pixels + 1)).shape == (2, 3, 2 * pixels)


def test_many_pictures_without_gradients_are_those_with_gradients() -> None:
    for name in ("Conv(encoder)", "Conv(decoder)"):
        network, context = _built(name), _context(name, 7, 100)
        with torch.no_grad():
            parts = network(context)
        torch.testing.assert_close(parts, network(context), rtol=1e-12, atol=1e-12)


def test_residual_blocks_leave_the_convolutions_as_they_are_if_they_are_zero() -> None:
    for context, outputs in ((35, 3), (4, 35)):
        plain, residual = Conv((5, 7), channels=[2, 3]), ResidualConv((5, 7), channels=[2, 3])
        plain.build(context, torch.zeros(outputs))
        residual.build(context, torch.zeros(outputs))
        blocks = [block for block in residual.layers if isinstance(block, nn.Sequential)]
        assert len(blocks) == 2
        x, block = torch.randn(6, *((2, 3, 4) if context == 35 else (3, 2, 2))), blocks[0]
        expected = x + block[3](torch.relu(block[1](torch.relu(x))))
        torch.testing.assert_close(block(x), expected)
        for part in blocks:
            nn.init.zeros_(part[3].weight)
            nn.init.zeros_(part[3].bias)
        own = [layer for layer in residual.layers if not isinstance(layer, nn.Sequential)]
        nn.Sequential(*own).load_state_dict(
            {
                f"{place}.{key}": value
                for place, layer in enumerate(plain.layers)
                for key, value in layer.state_dict().items()
            }
        )
        picture = torch.randn(3, context)
        torch.testing.assert_close(residual(picture), plain(picture))


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
    """At the centre of the context for Linear, up to the last layer's weights for most, everywhere for the others."""
    network, start = _built(name), _start(name)
    context = _context(name, 5)
    if again:
        start = torch.randn(start.shape)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        network.restart(start)
    if hasattr(network, "layers"):
        nn.init.zeros_(network.layers[-1].weight)
    if name == "Linear":
        shift = torch.randn(4)
        network.centre(shift, torch.tensor(3.0))
        context = shift.expand(5, 4)
    torch.testing.assert_close(network(context), start.expand_as(network(context)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NETWORKS)
def test_start_is_copied(name: str) -> None:
    make, context = NETWORKS[name]
    network, start, other = make(), 0 * _start(name), 0 * _start(name) + 1
    network.build(context, start)
    network.restart(other)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert (set(start.tolist()), set(other.tolist())) == ({0}, {1})


@pytest.mark.parametrize("name", AMORTIZED)
def test_shift_and_scale_are_buffers(name: str) -> None:
    network, twin, context = _built(name), _built(name), _context(name, 6)
    network.centre(torch.randn(NETWORKS[name][1]), torch.tensor(2.0))
    assert {key for key, _ in network.named_buffers()} == {"shift", "scale"}
    assert not {"shift", "scale"} & {key for key, _ in network.named_parameters()}
    assert {"shift", "scale"} <= set(network.state_dict())
    twin.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(twin(context), network(context))
    assert torch.equal(copy.deepcopy(network)(context), network(context))
    assert network.float()(context.float()).dtype == torch.float32


@pytest.mark.parametrize("name", AMORTIZED)
def test_centring_standardises_the_context(name: str) -> None:
    network, context, shift = _built(name), _context(name, 6), torch.randn(NETWORKS[name][1])
    plain, scale = copy.deepcopy(network), torch.tensor(2.0)
    network.centre(shift, scale)
    torch.testing.assert_close(network(context), plain((context - shift) / scale))
    twin = _built(name)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin(context), network(context))


@pytest.mark.parametrize("name", AMORTIZED)
def test_what_is_not_observed_stands_at_its_average(name: str) -> None:
    network, context = _built(name), _context(name, 6)
    shift = torch.randn(NETWORKS[name][1])
    network.centre(shift, torch.tensor(1.5))
    observed = torch.rand(context.shape) < 0.5
    observed[0], observed[1] = True, False
    answer = network(torch.where(observed, context, math.nan), observed)
    torch.testing.assert_close(answer, network(torch.where(observed, context, shift)))
    torch.testing.assert_close(answer[0], network(context)[0])
    answer.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = _built(name).train()
    network(_context(name, 50)).pow(2).sum().backward()
    assert list(network.parameters())
    for key, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, key


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
@pytest.mark.parametrize("hidden", [[], [0], [4, -1]], ids=str)
def test_mlp_refuses_no_or_empty_layers(hidden: list[int], kind: Any) -> None:
    with pytest.raises(ValueError, match=r"`hidden` to list one or more positive widths; got .* use Linear"):
        kind(hidden=hidden)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"normalization": "batch"}, "`normalization` to be one of 'none', 'layer'; got 'batch'"),
        ({"dropout": 1.0}, "`dropout` to be a number from 0 to below 1; got 1.0"),
        ({"dropout": -0.1}, "`dropout` to be a number from 0 to below 1; got -0.1"),
        ({"residual": True}, r"neighbours of equal width in `hidden`, for `residual` to connect; got \[3, 4\]"),
    ],
)
def test_mlp_refuses_settings_out_of_range(settings: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MLP(hidden=[3, 4], **settings)


@pytest.mark.parametrize("kind", [Conv, ResidualConv])
@pytest.mark.parametrize(
    ("shape", "settings", "match"),
    [
        (None, {}, r"Expected pictures, of shape .* for the network {kind}; got data without a shape. Use MLP"),
        ((4,), {}, r"for the network {kind}; got \(4,\)"),
        ((4, 0), {}, r"`shape\[1\]` to be a whole number, at least 1; got 0"),
        ((4, 4), {"channels": []}, r"`channels` to list one or more positive numbers; got \[\]. Or use MLP"),
        ((4, 4), {"channels": [3, 0]}, r"`channels\[1\]` to be a whole number, at least 1; got 0"),
        ((4, 4), {"hidden": [-1]}, r"`hidden\[0\]` to be a whole number, at least 1; got -1"),
        ((4, 4), {"kernel": 4}, "`kernel` to be odd, so that pictures of any size fit; got 4"),
        ((4, 4), {"kernel": 0}, "`kernel` to be a whole number, at least 1; got 0"),
        ((4, 4), {"activation": "swish"}, "`activation` to be one of 'tanh'"),
    ],
    ids=str,
)
def test_networks_of_pictures_refuse_what_is_no_picture(kind: Any, shape: Any, settings: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match.format(kind=kind.__name__)):
        kind(shape, **settings)


def test_a_picture_that_fits_neither_side_is_refused() -> None:
    with pytest.raises(ValueError, match="context of 16 pixels, or a number .* got a context of size 3 and 17"):
        Conv((4, 4)).build(3, torch.zeros(17))


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
