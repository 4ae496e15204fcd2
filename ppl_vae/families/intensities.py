"""Families of intensities in a whole number of levels, such as those of 8-bit pictures."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from ppl_vae._checks import check_int
from ppl_vae.families.distributions import Entry, SameFamily, elementwise, thin
from ppl_vae.families.elementwise import Elementwise, Source
from ppl_vae.families.family import Family, moments, positive, unconstrained
from ppl_vae.families.supports import Steps


class _DiscretizedLogistic(Entry):
    """A logistic in bins about 0, 1 / (levels - 1), ..., 1, of which the outer two are open."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive, "levels": constraints.positive_integer}

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return Steps(self.levels, 1 / (self.levels - 1))

    def log_density(self, value: Tensor) -> Tensor:
        """With logistic function s, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), in which nothing cancels."""
        half = 0.5 / (thin(self.levels) - 1)
        low, high = value < half, value > 1 - half
        place, reach = (value - self.loc) / self.scale, half / self.scale
        below = torch.where(high, 0.0, logsigmoid(reach + place))
        above = torch.where(low, 0.0, logsigmoid(reach - place))
        width = torch.log(-torch.expm1(-2 * reach))
        return below + above + torch.where(low | high, 0.0, width)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            steps = self.levels - 1
            x = self.loc + self.scale * self.uniform(sample_shape).logit()
            return (x * steps).round().clamp_min(0).minimum(steps) / steps

    @property
    def mean(self) -> Tensor:
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance by the chances of each level and those above it, in double precision as they cancel."""
        loc, scale, steps = self.loc.double(), self.scale.double(), self.levels.double() - 1
        first, second = torch.zeros_like(loc), torch.zeros_like(loc)
        for level in range(1, int(self.levels.max())):
            above = torch.sigmoid((loc - (level - 0.5) / steps) / scale)
            first, second = first + above, second + (2 * level - 1) * above
        return (first / steps).to(self.loc), ((second - first.square()) / steps**2).to(self.loc)


class DiscretizedLogistic(Elementwise):
    r"""Independent logistics in bins, for intensities, :math:`k / (\mathrm{levels} - 1)`. The outer bins are open.

    The mass of an intensity is that of a logistic within half a step of it, of 0 all below, of 1 all above, so that
    masses sum to one (Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al. 2016; the open
    bins as in PixelCNN++, Salimans et al. 2017).

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        levels: The number of levels, 256 for 8 bits; or as many equal numbers as features.
        scale: Where the scale comes from: `network` (one per feature, from the context), `shared` (one learned number),
            `feature` (one learned number per feature), or a positive number that stays fixed.

    Raises:
        ValueError: If there are not at least 2 levels, or features differ in them.
    """

    def __init__(
        self, event: int | tuple[int, ...], levels: int | tuple[int, ...], *, scale: Source = "network"
    ) -> None:
        self.count = _common(levels)
        support = Steps(self.count, 1 / (self.count - 1))
        super().__init__(event, _DiscretizedLogistic, support, loc="network", scale=scale, levels=float(self.count))
        self.levels = (self.count,) * self.event_shape.numel()

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"loc": mean, "scale": _logistic_scale(scale, self.count)}


class MixtureDiscretizedLogistic(Family):
    r"""Independent mixtures of logistics in bins, for intensities, :math:`k / (\mathrm{levels} - 1)`.

    PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications (Salimans et
    al. 2017), each feature with a mixture of its own.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        levels: The number of levels, 256 for 8 bits; or as many equal numbers as features.
        components: The number of components.

    Raises:
        ValueError: If there are not at least 2 levels and 1 component, or features differ in their levels.
    """

    reparameterised = False

    def __init__(self, event: int | tuple[int, ...], levels: int | tuple[int, ...], *, components: int = 5) -> None:
        super().__init__(event)
        self.count, self.components = _common(levels), check_int("components", components)
        self.levels = (self.count,) * self.event_shape.numel()
        self.support = Steps(self.count, 1 / (self.count - 1))
        self.register_buffer("each", torch.tensor(float(self.count)), persistent=False)

    def start(self) -> Tensor:
        return self._pack(torch.full(self.event_shape, 0.5), torch.full(self.event_shape, 0.3))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._pack(*moments(x, mask))

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        dims = len(self.event_shape)
        parts = parameters.unflatten(-1, (3, self.components, *self.event_shape)).movedim(-1 - dims, -1)
        logits, loc, raw = parts.unbind(-2 - dims)
        logistics = _DiscretizedLogistic(loc=loc, scale=positive(raw), levels=self.each)
        return elementwise(SameFamily(dist.Categorical(logits=logits), logistics), dims, mask, self.support)

    def _pack(self, mean: Tensor, scale: Tensor) -> Tensor:
        """Components side by side; equal ones would never part."""
        place = (torch.arange(self.components).to(mean) + 0.5) / self.components
        place = place.reshape(-1, *(1 for _ in self.event_shape)).logit()
        loc = mean + place * _logistic_scale(scale, self.count)
        width = _logistic_scale(scale, self.count).expand_as(loc)
        return torch.cat([torch.zeros_like(loc).flatten(), loc.flatten(), unconstrained(width).flatten()])


def _common(levels: int | tuple[int, ...]) -> int:
    """Number of levels that all features have."""
    each = {levels} if isinstance(levels, int) else set(levels)
    if len(each) != 1 or min(each) < 2:
        got = ", ".join(map(str, sorted(each))) if min(each, default=0) > 0 else "columns without levels"
        raise ValueError(f"Expected one number of levels for all features, at least 2; got {got}.")
    return check_int("levels", each.pop())


def _logistic_scale(spread: Tensor, levels: int) -> Tensor:
    """Scale of a logistic of this standard deviation, at least a quarter of a step."""
    return (spread * math.sqrt(3) / math.pi).clamp_min(0.25 / (levels - 1))
