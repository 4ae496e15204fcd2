"""Families whose entries are independent given the parameters."""

import inspect
import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.families.distributions import elementwise
from ppl_vae.families.family import FLOOR, Family, moments, positive, refuse_constant, unconstrained
from ppl_vae.families.supports import bounds, typical_moments

Source = Literal["network", "shared", "feature"] | float


class Elementwise(Family):
    """Independent entries, each with a distribution of one class.

    To write such a family, list the parameters of the class and where each comes from in the constructor, and write
    `from_moments`. The class's `arg_constraints` say which parameters are positive: these are mapped by `positive`. The
    others must be real, so choose logits over probabilities.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        kind: The class, one of `pyro.distributions`.
        support: The values that an entry can take; those of the class by default.
        sources: Where each parameter comes from: `network` (one per feature, from the context), `shared` (one learned
            number), `feature` (one learned number per feature), or a number that stays fixed.

    Attributes:
        logarithmic: The positive parameters that range over orders of magnitude, and are learned by their logarithm.
        blunt: The positive parameters that cannot make a density grow without bound at a constant feature.

    Raises:
        ValueError: If a source is none of these.
    """

    logarithmic: ClassVar[tuple[str, ...]] = ()
    blunt: ClassVar[tuple[str, ...]] = ()

    def __init__(self, event: int | tuple[int, ...], kind: Any, support: Any = None, /, **sources: Source) -> None:
        super().__init__(event)
        self.kind, self.sources = kind, sources
        self.support, self.reparameterised = kind.support if support is None else support, kind.has_rsample
        self._positive = [name for name in sources if bounds(kind.arg_constraints[name]) == (0, math.inf)]
        for name, source in sources.items():
            if source in ("shared", "feature"):
                shape = self.event_shape if source == "feature" else ()
                self.register_parameter(f"raw_{name}", nn.Parameter(torch.empty(shape)))
            elif source != "network":
                wanted = "a positive number" if name in self._positive else "a number"
                proper = isinstance(source, int | float) and not isinstance(source, bool) and source == source
                if not proper or (name in self._positive and not 0 < source < math.inf):  # type: ignore[operator]
                    raise ValueError(f"Expected `{name}` to be network, shared, feature or {wanted}; got {source!r}.")
                self.register_buffer(f"fixed_{name}", torch.tensor(float(source)), persistent=False)
        if set(sources.values()) & {"shared", "feature"}:
            self._set_learned(*map(torch.tensor, typical_moments(self.support)))

    @abstractmethod
    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Parameters of the distribution with this mean and standard deviation, or near them."""

    def start(self) -> Tensor:
        return self._pack(self.from_moments(*map(torch.tensor, typical_moments(self.support))))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mean, scale = moments(x, mask)
        for name in self._positive if not self.support.is_discrete else ():
            if self.sources[name] in ("network", "feature") and name not in self.blunt:
                refuse_constant(scale, name, settable=name in inspect.signature(type(self)).parameters)
        self._set_learned(mean, scale)
        return self._pack(self.from_moments(mean, scale))

    def own(self, name: str) -> Tensor:
        """Value of a parameter that does not come from the network: shape () or the event's."""
        if isinstance(self.sources[name], str):
            return self._constrain(name, getattr(self, f"raw_{name}"))
        return getattr(self, f"fixed_{name}")

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        return self.independent(self.values(parameters), mask)

    def independent(self, values: dict[str, Any], mask: Tensor | None) -> TorchDistribution:
        """Distribution of independent entries from the values of their parameters."""
        return elementwise(self.kind(**values), len(self.event_shape), mask, self.support)

    def values(self, parameters: Tensor) -> dict[str, Any]:
        """Values of the parameters of the class, each of shape (*batch, *event)."""
        dims, shape = len(self.event_shape), parameters.shape[:-1] + self.event_shape
        raw = iter(parameters.unflatten(-1, (-1, *self.event_shape)).unbind(-1 - dims))
        return {
            name: self._constrain(name, next(raw)) if source == "network" else self.own(name).expand(shape)
            for name, source in self.sources.items()
        }

    def link(self, name: str) -> Literal["identity", "exp", "softplus"]:
        """How an unconstrained number becomes a value of this parameter; `exp` and `softplus` have the floor 1e-6."""
        return "exp" if name in self.logarithmic else "softplus" if name in self._positive else "identity"

    def _constrain(self, name: str, raw: Tensor) -> Tensor:
        link = self.link(name)
        return raw.exp() + FLOOR if link == "exp" else positive(raw) if link == "softplus" else raw

    def _unconstrain(self, name: str, value: Tensor) -> Tensor:
        if name in self.logarithmic:
            return value.clamp_min(2 * FLOOR).sub(FLOOR).log()
        return unconstrained(value) if name in self._positive else value

    @torch.no_grad()
    def _set_learned(self, mean: Tensor, scale: Tensor) -> None:
        """Set the parameters that the family learns itself; a shared one is that of the pooled standard deviation."""
        each, pooled = self.from_moments(mean, scale), self.from_moments(mean, scale.square().mean().sqrt())
        for name, source in self.sources.items():
            if source in ("shared", "feature"):
                value = each[name] if source == "feature" else pooled[name].mean()
                getattr(self, f"raw_{name}").copy_(self._unconstrain(name, value))

    def _pack(self, values: dict[str, Tensor]) -> Tensor:
        """Unconstrained parameters (p,) of those that come from the network."""
        names = [name for name, source in self.sources.items() if source == "network"]
        raw = [self._unconstrain(name, values[name]).expand(self.event_shape).flatten() for name in names]
        return torch.cat(raw) if raw else torch.zeros(0)


class StandardNormal(Elementwise):
    r"""Independent standard normals, :math:`N(0, I)`; no parameters."""

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, dist.Normal, loc=0.0, scale=1.0)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {}


class Normal(Elementwise):
    r"""Independent normals, :math:`\prod_j N(x_j;\, \mathrm{loc}_j, \mathrm{scale}_j^2)`.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        scale: Where the standard deviation comes from: `network` (one per feature, from the context), `shared` (one
            learned number), `feature` (one learned number per feature), or a positive number that stays fixed.

    Raises:
        ValueError: If `scale` is none of these.
    """

    normals = "all"
    raw_scale: nn.Parameter

    def __init__(self, event: int | tuple[int, ...], *, scale: Source = "network") -> None:
        super().__init__(event, dist.Normal, loc="network", scale=scale)
        self.scale = scale

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"loc": mean, "scale": scale}

    def nearest(self, loc: Tensor, precision: Tensor) -> dict[str, Tensor]:
        each = precision.diagonal(dim1=-2, dim2=-1)
        raw = unconstrained((each.mean(-1) if self.scale == "shared" else each).rsqrt())
        if self.scale == "network":
            return {"parameters": torch.cat([loc, raw], -1)}
        return {"parameters": loc} | ({"raw_scale": raw} if isinstance(self.scale, str) else {})

    def own_scale(self) -> Tensor:
        """Scale that does not come from the network: shape () or the event's."""
        return self.own("scale")


class Bernoulli(Elementwise):
    r"""Independent Bernoullis, :math:`\prod_j p_j^{x_j} (1 - p_j)^{1 - x_j}`, by their logits."""

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, dist.Bernoulli, logits="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": mean.clamp(1e-3, 1 - 1e-3).logit()}
