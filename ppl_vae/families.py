r"""Families: from an unconstrained parameter tensor to a distribution. One final class a family, whatever its role.

The same `Normal` is a prior, a likelihood and an approximate posterior; who may play which role follows from its
support and from its being reparameterised. A constructor's positional parameters are sizes and collaborators, filled
in by whoever builds; its keyword-only parameters are the keys of its table in a spec.
"""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.distributions import FullCovariance, Mixture, elementwise, marginal
from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.networks import Free, Linear, Network, _Given

if TYPE_CHECKING:
    from ppl_vae.conditional import Conditional


__all__ = ["Bernoulli", "ExactNormal", "FullNormal", "MixtureNormal", "Normal", "StandardNormal"]


FLOOR = 1e-6


def positive(raw: Tensor) -> Tensor:
    """Map the reals to scales: softplus plus a floor of 1e-6."""
    return nn.functional.softplus(raw) + FLOOR


def unconstrained(scale: Tensor) -> Tensor:
    """Invert `positive`; scales at or below twice the floor count as that."""
    above = (scale - FLOOR).clamp_min(FLOOR)
    return above + torch.log(-torch.expm1(-above))


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1/n) of each feature over the observed entries of `x`, shape (n, *event).

    A feature that is never observed has mean 0 and standard deviation 1.
    """
    if mask is None:
        scale = torch.where(x.amin(0) == x.amax(0), 0.0, x.std(0, correction=0))
        return x.mean(0), scale
    seen = mask.to(x.dtype)
    filled = torch.where(seen > 0, x, 0.0)
    count = seen.sum(0)
    loc = filled.sum(0) / count.clamp_min(1)
    scale = (((filled - loc) ** 2 * seen).sum(0) / count.clamp_min(1)).sqrt()
    infinity = x.new_tensor(math.inf)
    constant = torch.where(seen > 0, x, infinity).amin(0) == torch.where(seen > 0, x, -infinity).amax(0)
    return loc, torch.where(constant, 0.0, torch.where(count > 0, scale, 1.0))


class Family(nn.Module, ABC):
    """A family of distributions over events of one shape.

    Args:
        event: the shape of an event; an int is short for a 1-tuple.

    Raises:
        ValueError: for an empty shape or a size below 1.
    """

    support: constraints.Constraint = constraints.real
    reparameterised = True

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = torch.Size([event] if isinstance(event, int) else event)
        if not self.event_shape or min(self.event_shape) < 1:
            raise ValueError(f"Expected the event of {type(self).__name__} to have positive sizes; got {event!r}.")

    @abstractmethod
    def start(self) -> Tensor:
        """Give the unconstrained parameters `(p,)` to begin with; their number is the network's size."""

    @abstractmethod
    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        """Turn parameters `(*batch, p)` into a distribution with that batch shape and this event shape.

        Args:
            parameters: unconstrained.
            mask: boolean, broadcastable to `(*batch, *event)`; entries where it is false do not count, whatever stands
                there, NaN included.
        """

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give parameters `(p,)` that begin at the data `x`, shape (n, *event); set scales of one's own likewise."""
        return self.start()

    def network(self) -> Network:
        """Give the network of a conditional that names none."""
        return Free()

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Cut `(*batch, j * size)` into j tensors of shape `(*batch, *event)`."""
        parts = parameters.unflatten(-1, (-1, *self.event_shape))
        return parts.unbind(-1 - len(self.event_shape))

    def _vector(self) -> int:
        if len(self.event_shape) > 1:
            raise ValueError(
                f"Expected {type(self).__name__} to have a vector for its event; got shape "
                f"{tuple(self.event_shape)}. Flatten it."
            )
        return self.event_shape[0]


class StandardNormal(Family):
    r"""Independent standard normals, :math:`N(0, I)`; no parameters."""

    def start(self) -> Tensor:
        return torch.zeros(0)

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        loc = parameters.new_zeros(()).expand(parameters.shape[:-1] + self.event_shape)
        return elementwise(dist.Normal(loc, torch.ones_like(loc)), len(self.event_shape), mask)


class Normal(Family):
    r"""Independent normals, :math:`\prod_j N(x_j;\, \mathrm{loc}_j, \mathrm{scale}_j^2)`.

    Args:
        event: the shape of an event.
        scale: where the standard deviation comes from: `network` (one a feature, from the context), `shared` (one
            learned number), `feature` (one learned number a feature), or a positive number that stays fixed.

    Raises:
        ValueError: for any other scale.
    """

    def __init__(
        self, event: int | tuple[int, ...], *, scale: Literal["network", "shared", "feature"] | float = "network"
    ) -> None:
        super().__init__(event)
        known = isinstance(scale, str) and scale in ("network", "shared", "feature")
        if not known and not (isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf):
            raise ValueError(f"Expected `scale` to be network, shared, feature or a positive number; got {scale!r}.")
        self.scale = scale
        one = unconstrained(torch.ones(()))
        if scale == "shared":
            self.raw_scale = nn.Parameter(one)
        elif scale == "feature":
            self.raw_scale = nn.Parameter(one.repeat(self.event_shape))
        elif not isinstance(scale, str):
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    def start(self) -> Tensor:
        loc = torch.zeros(self.event_shape.numel())
        return torch.cat([loc, unconstrained(torch.ones_like(loc))]) if self.scale == "network" else loc

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        loc, scale = moments(x, mask)
        if self.scale in ("network", "feature"):
            _refuse_constant(scale, str(self.scale))
        if self.scale == "network":
            return torch.cat([loc.flatten(), unconstrained(scale).flatten()])
        if isinstance(self.scale, str):
            with torch.no_grad():
                self.raw_scale.copy_(unconstrained(scale.square().mean().sqrt() if self.scale == "shared" else scale))
        return loc.flatten()

    def own_scale(self) -> Tensor:
        """Give the scale where it does not come from the network: shape () or the event's."""
        return positive(self.raw_scale) if isinstance(self.scale, str) else self.fixed_scale  # type: ignore[return-value]

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        loc, *raw = self._split(parameters)
        scale = positive(raw[0]) if raw else self.own_scale()
        return elementwise(dist.Normal(loc, scale), len(self.event_shape), mask)


class FullNormal(Family):
    r"""A normal with full covariance, :math:`N(\mathrm{loc}, L L^\top)`; the parameters are loc and the triangle L."""

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event)
        row, column = torch.tril_indices(self._vector(), self._vector())
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("column", column, persistent=False)

    row: Tensor
    column: Tensor

    def start(self) -> Tensor:
        return self._pack(torch.zeros(self.event_shape), torch.ones(self.event_shape))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        loc, scale = moments(x, mask)
        _refuse_constant(scale, "of each feature")
        return self._pack(loc, scale)

    def _pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([loc, torch.diag(unconstrained(scale))[self.row, self.column]])

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        size = self.event_shape[0]
        loc, raw = parameters[..., :size], parameters[..., size:]
        lower = parameters.new_zeros(*parameters.shape[:-1], size, size)
        lower[..., self.row, self.column] = raw
        scale_tril = lower.tril(-1) + torch.diag_embed(positive(lower.diagonal(dim1=-2, dim2=-1)))
        return FullCovariance(loc, scale_tril=scale_tril) if mask is None else marginal(loc, scale_tril, mask)


class MixtureNormal(Family):
    r"""A mixture of diagonal normals, :math:`\sum_c \pi_c \prod_j N(x_j;\, \mathrm{loc}_{cj}, \mathrm{scale}_{cj}^2)`.

    Samples are reparameterised (Pathwise Derivatives for Multivariate Distributions, Jankowiak and Karaletsos 2018).

    Args:
        event: the size of an event, a vector; as an approximate posterior at least 2.
        components: the number of components.

    Raises:
        ValueError: for fewer than one component.
    """

    def __init__(self, event: int | tuple[int, ...], *, components: int = 10) -> None:
        super().__init__(event)
        if components < 1:
            raise ValueError(f"Expected `components` to be at least 1; got {components}.")
        self.components = components
        self.reparameterised = self._vector() > 1

    def start(self) -> Tensor:
        return self._pack(torch.zeros(self.event_shape), torch.ones(self.event_shape))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        loc, scale = moments(x, mask)
        _refuse_constant(scale, "of each feature")
        return self._pack(loc, scale)

    def _pack(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Scatter the components about `loc`; equal components would never part."""
        locs = loc + scale * torch.randn(self.components, *self.event_shape).to(loc)
        scales = scale.expand_as(locs)
        return torch.cat([loc.new_zeros(self.components), locs.flatten(), unconstrained(scales).flatten()])

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        logits, rest = parameters[..., : self.components], parameters[..., self.components :]
        locs, raw = rest.unflatten(-1, (2, self.components, self.event_shape[0])).unbind(-3)
        scales = positive(raw)
        if mask is None:
            return Mixture(locs, scales, logits)
        each = elementwise(dist.Normal(locs, scales), 1, mask.unsqueeze(-2))
        weights = dist.Categorical(logits=logits.expand(each.batch_shape))
        return dist.MixtureSameFamily(weights, each, validate_args=False)  # which would refuse a NaN under the mask


class Bernoulli(Family):
    r"""Independent Bernoullis, :math:`\prod_j p_j^{x_j} (1 - p_j)^{1 - x_j}`, by their logits."""

    support = constraints.boolean
    reparameterised = False

    def start(self) -> Tensor:
        return torch.zeros(self.event_shape.numel())

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return moments(x, mask)[0].clamp(1e-3, 1 - 1e-3).logit().flatten()

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        (logits,) = self._split(parameters)
        return elementwise(dist.Bernoulli(logits=logits), len(self.event_shape), mask)


class ExactNormal(Family):
    r"""The exact posterior of a linear-Gaussian likelihood, tied to likelihood *and* prior; no parameters of its own.

    :math:`q(z \mid x) = p(z \mid x) = N(m + \Lambda^{-1} W^\top D^{-1} (x - b - W m),\; \Lambda^{-1})` with
    :math:`\Lambda = S^{-1} + W^\top D^{-1} W` (Bishop 2006, equation 2.116). Whatever the weights, each importance
    weight then equals p(x).

    Args:
        prior: a `Conditional` with a Gaussian family and no context.
        likelihood: a `Conditional` of a `Normal` whose scale is not from the network, on `Linear`.
    """

    def __init__(self, prior: "Conditional", likelihood: "Conditional") -> None:
        super().__init__(tuple(prior.family.event_shape))
        self._vector()
        likelihood.bind(tuple(self.event_shape))
        self._tied = (prior, likelihood)  # a tuple, so that neither is registered a second time
        linear_gaussian(prior, likelihood)

    def start(self) -> Tensor:
        return torch.zeros(0)

    def network(self) -> Network:
        return _Given()

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        pair = linear_gaussian(*self._tied)
        features = pair.bias.shape[0]
        x, *observed = parameters.split(features, -1)
        exact = pair.posterior(x, observed[0] > 0 if observed else None)
        if mask is not None:
            return marginal(exact.loc, exact.scale_tril, mask)
        return FullCovariance(exact.loc, scale_tril=exact.scale_tril)


def linear_gaussian(prior: "Conditional", likelihood: "Conditional") -> LinearGaussian:
    """Read the linear-Gaussian model off a prior and a likelihood, differentiably.

    Raises:
        ValueError: where the pair is not linear-Gaussian; the message says why.
    """
    family, network = likelihood.family, likelihood.network
    if not isinstance(family, Normal) or family.scale == "network":
        raise ValueError(
            "Expected a Normal likelihood whose scale is shared, feature or a number, for a closed form; "
            f"got {type(family).__name__}{' with a scale from the network' if isinstance(family, Normal) else ''}."
        )
    if not isinstance(network, Linear):
        raise ValueError(f"Expected a likelihood on a Linear network, for a closed form; got {type(network).__name__}.")
    if not isinstance(prior.family, StandardNormal | Normal | FullNormal):
        raise ValueError(f"Expected a Gaussian prior, for a closed form; got {type(prior.family).__name__}.")
    start: Any = prior()
    loc = start.mean.flatten()
    tril = start.scale_tril if isinstance(start, FullCovariance) else torch.diag(start.stddev.flatten())
    weight = network.weight / network.scale
    return LinearGaussian(
        loc=loc,
        scale_tril=tril,
        weight=weight,
        bias=network.bias - weight @ network.shift,
        scale=family.own_scale().expand(family.event_shape).flatten(),
    )


def _refuse_constant(scale: Tensor, owner: str) -> None:
    constant = (scale.flatten() == 0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
        raise ValueError(
            f"Expected features that vary, for a scale {owner if owner.startswith('of') else f'of kind {owner}'}; "
            f"got {len(constant)} "
            f"constant features (columns {shown}), where the density grows without bound as the scale falls. "
            'Use scale = "shared" or a number, or leave these features out.'
        )
