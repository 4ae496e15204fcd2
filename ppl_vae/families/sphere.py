"""Families on the unit sphere."""

import math
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints, register_kl

from ppl_vae.families.bessel import debye, log_bessel
from ppl_vae.families.family import Family, positive, unconstrained
from ppl_vae.families.supports import Sphere

_PROPOSALS = 20  # of each draw; at least 65 % of them are accepted, so one in a billion draws has none
_NODES = 64  # of the integral in a draw's gradient


class VonMisesFisher(Family):
    r"""Unit vectors around a mean direction, :math:`\log p(x) = \kappa\, \mathrm{loc}^\top x + \log C(\kappa)`.

    The parameters are a vector, whose direction is loc, and the concentration :math:`\kappa`. Draws are by rejection
    with 20 proposals each, whatever happens: at least 65 % of them are accepted, so fewer than one draw in a billion
    has none; it then keeps the first, which leaves the law right to 1e-9. Their gradients are exact: that of the
    cosine between draw and loc is implicit in its distribution function, an integral by 64 nodes.

    Args:
        event: The size of a vector, at least 2: the sphere in that many dimensions.

    Raises:
        ValueError: If the size is below 2.

    References:
        Simulation of the von Mises Fisher distribution (Wood 1994); Hyperspherical Variational Auto-Encoders
        (Davidson, Falorsi, De Cao, Kipf and Tomczak 2018); Implicit Reparameterization Gradients (Figurnov, Mohamed
        and Mnih 2018), equation 5.
    """

    support = Sphere()
    series: Tensor
    nodes: Tensor

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event)
        self.register_buffer("series", debye(self._vector(2)), persistent=False)
        nodes = torch.tensor(np.stack(np.polynomial.legendre.leggauss(_NODES)).tolist())
        self.register_buffer("nodes", torch.stack([(nodes[0] + 1) / 2, nodes[1] / 2]), persistent=False)

    def start(self) -> Tensor:
        size = self.event_shape[0]
        return self._pack(torch.full((size,), size**-0.5), torch.tensor([float(size)]))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Direction and length of the mean, by the approximation of Banerjee, Dhillon, Ghosh and Sra (2005)."""
        self._refuse(mask)
        mean = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)).mean(0)
        length = mean.norm().clamp(1e-3, 1 - 1e-6)
        return self._pack(mean, (length * (len(mean) - length**2) / (1 - length**2)).unsqueeze(0))

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        raw, kappa = parameters[..., :-1], positive(parameters[..., -1])
        raw = raw / raw.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny)
        somewhere = (torch.arange(raw.shape[-1], device=raw.device) == 0).to(raw.dtype)
        loc = nn.functional.normalize(torch.where((raw != 0).any(-1, keepdim=True), raw, somewhere), dim=-1)
        return Fisher(loc, kappa, *log_bessel(kappa, len(somewhere), self.series), self.nodes)

    def _pack(self, direction: Tensor, kappa: Tensor) -> Tensor:
        return torch.cat([direction, unconstrained(kappa)])


class HypersphericalUniform(Family):
    """The uniform distribution on the unit sphere; no parameters.

    Args:
        event: The size of a vector, at least 2.

    Raises:
        ValueError: If the size is below 2.
    """

    support = Sphere()

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event)
        self._vector(2)

    def start(self) -> Tensor:
        return torch.zeros(0)

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        none = parameters.new_zeros(parameters.shape[:-1])
        loc = torch.eye(*self.event_shape, dtype=none.dtype, device=none.device)[0]
        return Fisher(loc.expand(*none.shape, -1), none, none, none, none)


class Fisher(TorchDistribution):
    """The von Mises-Fisher distribution, uniform at concentration 0.

    Args:
        loc: Unit vectors, (*batch, size).
        concentration: Of shape (*batch,).
        log_bessel: Logarithm g of the integral of exp(concentration * loc.x) over the uniform distribution, (*batch,).
        length: Mean resultant length A, the derivative of g.
        nodes: Nodes and weights of an integral from 0 to 1, (2, nodes).
    """

    arg_constraints = {"loc": Sphere(), "concentration": constraints.nonnegative}
    support = Sphere()
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        concentration: Tensor,
        log_bessel: Tensor,
        length: Tensor,
        nodes: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.concentration, self.log_bessel, self.length = loc, concentration, log_bessel, length
        self.nodes = nodes
        super().__init__(concentration.shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Fisher":
        shape = torch.Size(batch_shape)
        kappa, value, length = (part.expand(shape) for part in (self.concentration, self.log_bessel, self.length))
        return Fisher(self.loc.expand(shape + self.event_shape), kappa, value, length, self.nodes, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = self.event_shape[0] / 2
        area = math.log(2) + half * math.log(math.pi) - math.lgamma(half)
        return self.concentration * (self.loc * value).sum(-1) - self.log_bessel - area

    @property
    def mean(self) -> Tensor:
        return self.length.unsqueeze(-1) * self.loc

    @property
    def variance(self) -> Tensor:
        size = self.event_shape[0]
        tiny = self.concentration == 0
        across = torch.where(tiny, 1 / size, self.length / torch.where(tiny, 1.0, self.concentration)).unsqueeze(-1)
        along = (1 - (size - 1) * across - self.length.unsqueeze(-1) ** 2).clamp_min(0.0)
        return across + (along - across) * self.loc**2

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc = self.loc.expand(self._extended_shape(sample_shape))
        fixed = self.concentration.detach().expand(loc.shape[:-1])
        with torch.no_grad():
            drop = self._draw_drop(fixed)  # 1 - cosine
            slope = self._slope(drop, fixed) if self.concentration.requires_grad else None
            tangent = nn.functional.normalize(torch.randn_like(loc[..., 1:]), dim=-1)
        if slope is not None:
            drop = drop - slope * (self.concentration - fixed)
        side = torch.where(loc[..., :1] < 0, 1.0, -1.0).to(loc)  # the mirror maps the pole farther from loc to it
        drop = drop.unsqueeze(-1)
        from_pole = torch.cat([side * (1 - drop), (drop * (2 - drop)).sqrt() * tangent], -1)
        mirror = torch.cat([side - loc[..., :1], -loc[..., 1:]], -1)
        return from_pole - mirror * ((mirror * from_pole).sum(-1, keepdim=True) / (1 + loc[..., :1].abs()))

    def _draw_drop(self, kappa: Tensor) -> Tensor:
        """Draw 1 - cosine by rejection from a fixed number of proposals; written so that nothing cancels."""
        size = self.event_shape[0] - 1
        b = size / (2 * kappa + torch.hypot(2 * kappa, torch.full_like(kappa, size)))
        edge = 2 * b / (1 + b)
        half = torch.full((_PROPOSALS, *kappa.shape), size / 2, dtype=kappa.dtype, device=kappa.device)
        beta = torch.distributions.Beta(half, half, validate_args=False).sample()
        drop = 2 * b * beta / (1 - beta + b * beta)
        score = kappa * (edge - drop) + size * ((edge + drop * (1 - edge)) / (edge * (2 - edge))).log()
        first = (torch.rand_like(drop).log() <= score).to(torch.uint8).argmax(0, keepdim=True)
        tiny = torch.finfo(kappa.dtype).tiny
        return drop.gather(0, first).squeeze(0).clamp(tiny, 2 - torch.finfo(kappa.dtype).eps)

    def _slope(self, drop: Tensor, kappa: Tensor) -> Tensor:
        r"""Derivative of the cosine c of a draw in the concentration.

        By its distribution function F and density f it is :math:`-F_\kappa(c) / f(c) = \int_c^1 (t - A) f(t) \, dt /
        f(c)`, here with :math:`t = \cos(v\, \theta)`, :math:`c = \cos \theta`.
        """
        v, weights = self.nodes
        angle = 2 * (drop / 2).sqrt().asin().unsqueeze(-1)
        rise = 2 * (angle * (1 + v) / 2).sin() * (angle * (1 - v) / 2).sin()
        ratio = kappa.unsqueeze(-1) * rise + (self.event_shape[0] - 2) * ((angle * v).sin() / angle.sin()).log()
        apart = (1 - self.length).unsqueeze(-1) - 2 * (angle * v / 2).sin() ** 2
        return (angle.sin() * angle).squeeze(-1) * (apart * ratio.exp() * weights).sum(-1)


@register_kl(Fisher, Fisher)
def _kl_fisher(q: Fisher, p: Fisher) -> Tensor:
    cosine = (q.loc * p.loc).sum(-1)
    return q.length * (q.concentration - p.concentration * cosine) - q.log_bessel + p.log_bessel
