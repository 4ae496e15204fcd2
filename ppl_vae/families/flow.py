"""Normalising flows, by zuko."""

from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_int
from ppl_vae.families.distributions import Pushed
from ppl_vae.families.family import Centred, positive, unconstrained

Kind = Literal["autoregressive", "spline", "coupling", "inverse-autoregressive"]
_KINDS = ("autoregressive", "spline", "coupling", "inverse-autoregressive")
_BINS = 8  # of a spline


class Flow(Centred):
    r"""A standard normal u bent by a flow, :math:`x = \mathrm{loc} + \mathrm{scale} \cdot T(u)`.

    The parameters are loc and scale, one of each per entry, and `context` further numbers that the transform T is
    conditioned on. T has weights of its own and starts near the identity, so that the flow starts near a normal.

    Scoring a value and drawing one go through T in opposite directions, of which one takes a single pass of the
    networks, the other as many as there are entries: a prior or likelihood should be cheap to score (`autoregressive`,
    `spline`), a guide cheap to sample (`inverse-autoregressive`); `coupling` is cheap in both and bends less. Scoring
    what was just drawn costs nothing. Mean and variance are averages over 512 fixed draws of u.

    Args:
        event: The size of an event, a vector.
        kind: The transforms: affine autoregressive ones (`autoregressive`), rational-quadratic splines on [-5, 5]
            (`spline`), affine ones of one half of the entries given the other (`coupling`), or the first in the other
            direction (`inverse-autoregressive`).
        transforms: How many of them follow each other, with the order of the entries reversed.
        hidden: The widths of the hidden layers of their networks.
        context: How many numbers condition the transforms; without any, the shape is the same for all contexts.

    Raises:
        ValueError: If the kind is unknown, or a size too small.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou and Murray 2017); Improved Variational
        Inference with Inverse Autoregressive Flow (Kingma et al. 2016); Density Estimation Using Real NVP (Dinh,
        Sohl-Dickstein and Bengio 2017); Neural Spline Flows (Durkan, Bekasov, Murray and Papamakarios 2019).
    """

    def __init__(
        self,
        event: int | tuple[int, ...],
        *,
        kind: Kind = "autoregressive",
        transforms: int = 3,
        hidden: list[int] = [64, 64],  # noqa: B006  never changed
        context: int = 0,
    ) -> None:
        super().__init__(event)
        check_choice("kind", kind, _KINDS)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"Expected `hidden` to list one or more positive widths; got {hidden!r}.")
        self.kind, self.hidden = kind, list(hidden)
        self.context = check_int("context", context, 0)
        number, size = check_int("transforms", transforms), self._vector()
        self.layers = nn.ModuleList(_layer(kind, size, self.context, self.hidden, i % 2 == 1) for i in range(number))

    def __repr__(self) -> str:
        return f"Flow({self.event_shape[0]}, {self.kind}, transforms={len(self.layers)}, hidden={self.hidden})"

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        loc, raw, rest = parameters.split([*self.event_shape, *self.event_shape, self.context], -1)
        scale = positive(raw)
        steps = [layer(rest if self.context else None) for layer in self.layers]
        others = [step.inv for step in reversed(steps)]
        if self.kind != "inverse-autoregressive":  # zuko's cheap direction leads from the value to the noise
            steps, others = others, steps

        def there(noise: Tensor) -> tuple[Tensor, Tensor]:
            value, volume = _through(steps, noise)
            return loc + scale * value, volume + scale.log().sum(-1)

        def back(value: Tensor) -> tuple[Tensor, Tensor]:
            noise, volume = _through(others, (value - loc) / scale)
            return noise, volume - scale.log().sum(-1)

        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return Pushed(base, there, back, loc.shape[-1])

    def pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([loc, unconstrained(scale), loc.new_zeros(self.context)])


def _through(steps: list[Any], value: Tensor) -> tuple[Tensor, Tensor]:
    """The value after all steps, and the log of the volume that they add."""
    volume = value.new_zeros(())
    for step in steps:
        value, more = step.call_and_ladj(value)
        volume = volume + more
    return value, volume


def _layer(kind: Kind, size: int, context: int, hidden: list[int], flipped: bool) -> nn.Module:
    """One of zuko's transforms, near the identity."""
    before = torch.distributions.Distribution._validate_args
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.transforms import MonotonicRQSTransform

    torch.distributions.Distribution._validate_args = before  # which zuko's import has switched off for everyone
    order = torch.arange(size).flip(0) if flipped else torch.arange(size)
    settings: dict[str, Any] = {"hidden_features": hidden, "activation": nn.Tanh}
    if kind == "spline":
        settings |= {"univariate": MonotonicRQSTransform, "shapes": [(_BINS,), (_BINS,), (_BINS - 1,)]}
    layer = MaskedAutoregressiveTransform(size, context, 2 if kind == "coupling" else None, order, **settings)
    last = [layer.hyper[-1].weight, layer.hyper[-1].bias] if size > 1 or context else list(layer.phi)
    with torch.no_grad():
        for weight in last:
            weight.mul_(0.01)
    return layer
