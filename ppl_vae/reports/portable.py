"""Decoders written out for a page: layers and means as plain operations, their weights in one buffer of float32."""

import base64
import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_vae.families.categories import Categorical, Levels, OrderedCategorical
from ppl_vae.families.conditional import Conditional
from ppl_vae.families.elementwise import Elementwise
from ppl_vae.families.mixed import Mixed
from ppl_vae.networks.conv import Picture
from ppl_vae.networks.linear import Linear
from ppl_vae.networks.mlp import ACTIVATIONS, Layered, Residual
from ppl_vae.networks.network import Amortized

MEANS = (
    *("Normal", "Laplace", "Logistic", "StudentT", "LogNormal", "Gamma", "Beta", "Bernoulli", "ContinuousBernoulli"),
    *("Binomial", "Poisson", "NegativeBinomial", "ZeroInflatedPoisson", "ZeroInflatedNegativeBinomial"),
)


class Buffer:
    """Numbers side by side in float32, each block known by its place."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        self.size = 0

    def add(self, values: Tensor) -> list[int]:
        """Append a tensor, flattened; returns where it begins and how long it is."""
        block = values.detach().double().cpu().numpy().astype("<f4").ravel()
        self.blocks.append(block)
        self.size += block.size
        return [self.size - block.size, block.size]

    def text(self) -> str:
        """All numbers in base64."""
        return base64.b64encode(np.concatenate([np.zeros(0, "<f4"), *self.blocks]).tobytes()).decode()


def write_decoder(likelihood: Conditional, buffer: Buffer) -> dict[str, Any] | None:
    """Write the map from latents (and what is given beside them) to the mean of p(x|z) as operations.

    Args:
        likelihood: what is written.
        buffer: where its weights go.

    Returns:
        `layers`, from a context to unconstrained parameters, and `heads`, from these to means; None for a network or a
        family that has no such form.
    """
    heads = _heads(likelihood.family, buffer)
    network: Any = likelihood.network
    if heads is None or likelihood.wants != "context":
        return None
    try:
        if isinstance(network, Amortized):
            spread = buffer.add(network.scale.expand(network.shift.shape))
            first = {"op": "standardise", "shift": buffer.add(network.shift), "scale": spread}
            layers = [first, *_body(network, buffer)]
        else:
            layers = [_layer(network, buffer)]
    except NotImplementedError:
        return None
    return {"layers": layers, "heads": heads}


def _body(network: Any, buffer: Buffer) -> list[dict[str, Any]]:
    if type(network) is Linear:
        return [_affine(network.weight, network.bias, buffer)]
    if isinstance(network, Layered) and type(network).__module__ == Layered.__module__:
        return [_layer(network.layers, buffer)]
    if isinstance(network, Picture) and type(network).__module__ == Picture.__module__:
        return [_layer(network.layers, buffer), {"op": "add", "b": buffer.add(network.bias)}]
    raise NotImplementedError


def _affine(weight: Tensor, bias: Any, buffer: Buffer) -> dict[str, Any]:
    return {"op": "affine", "w": buffer.add(weight), "b": None if bias is None else buffer.add(bias)}


def _layer(layer: Any, buffer: Buffer) -> dict[str, Any]:
    """One module as an operation.

    Raises:
        NotImplementedError: If it is of another kind.
    """
    kind = type(layer)
    if kind in (nn.Sequential, Residual):
        inner = [_layer(one, buffer) for one in layer if not isinstance(one, nn.Dropout | nn.Flatten)]
        return {"op": "residual" if kind is Residual else "chain", "layers": inner}
    if kind is nn.Linear:
        return _affine(layer.weight, layer.bias, buffer)
    if kind is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.weight is not None:
        return {"op": "norm", "w": buffer.add(layer.weight), "b": buffer.add(layer.bias), "epsilon": layer.eps}
    if kind is nn.GLU:
        return {"op": "glu"}
    if kind is nn.Unflatten:
        return {"op": "shape", "shape": list(layer.unflattened_size)}
    if kind in (nn.Conv2d, nn.ConvTranspose2d) and layer.groups == 1 and set(layer.dilation) == {1}:
        sizes = {"out": layer.out_channels, "kernel": list(layer.kernel_size), "stride": list(layer.stride)}
        sizes |= {"pad": list(layer.padding), "more": list(layer.output_padding)}
        op = "convolve" if kind is nn.Conv2d else "deconvolve"
        return {**_affine(layer.weight, layer.bias, buffer), "op": op, **sizes}
    for name, known in ACTIVATIONS.items():
        if kind is known and vars(layer).get("approximate", "none") == "none":
            return {"op": "act", "kind": name}
    raise NotImplementedError


def _heads(family: Any, buffer: Buffer, columns: Any = None, first: int = 0) -> list[dict[str, Any]] | None:
    """What turns parameters into means, a head for each block of columns; None if the family has no such form."""
    columns = list(range(family.event_shape.numel())) if columns is None else columns
    head: dict[str, Any] = {"kind": type(family).__name__, "columns": columns, "first": first}
    if isinstance(family, Mixed):
        heads: list[dict[str, Any]] = []
        for part, block in zip(family.parts, family.blocks, strict=True):
            own = _heads(part, buffer, block, first)
            if own is None:
                return None
            heads, first = heads + own, first + part.start().numel()  # type: ignore[operator]
        return heads
    if isinstance(family, Elementwise) and type(family).__name__ in MEANS:
        return [head | {"values": [_value(family, name, buffer) for name in family.sources]}]
    if isinstance(family, Categorical | OrderedCategorical):
        return [head | _levels(family)]
    return None


def _value(family: Any, name: str, buffer: Buffer) -> dict[str, Any]:
    """A parameter of an elementwise family: from the network by a link, or numbers of its own."""
    if family.sources[name] != "network":
        return {"name": name, "own": buffer.add(family.own(name).expand(family.event_shape))}
    return {"name": name, "link": family.link(name)}


def _levels(family: Levels) -> dict[str, Any]:
    """How many levels each column has, and for ordered ones their cutpoints."""
    levels = [int(size) for size in family.levels]
    if isinstance(family, Categorical):
        place = (family.valid.flatten().cumsum(0) - 1).reshape(family.valid.shape).flatten(1).T
        return {"levels": levels, "place": [row[:size].tolist() for row, size in zip(place, levels, strict=True)]}
    with torch.no_grad():
        twin = copy.deepcopy(family).double()
        below = twin.logits(torch.zeros(len(levels), dtype=torch.float64)).exp().flatten(1).cumsum(0).T
    return {"levels": levels, "cuts": [row[: n - 1].logit().tolist() for row, n in zip(below, levels, strict=True)]}
