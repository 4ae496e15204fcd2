"""Families of categories, in levels 0, 1, 2, ... of which each feature may have another number."""

import math
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from ppl_vae.families.distributions import elementwise
from ppl_vae.families.family import Family, positive, unconstrained
from ppl_vae.families.supports import Steps


class _Levels(dist.Categorical):
    """Pyro's categorical over floats, with the moments of the codes."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        return (self.probs * self._codes()).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self.probs * (self._codes() - self.mean.unsqueeze(-1)) ** 2).sum(-1)

    def _codes(self) -> Tensor:
        return torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)


class Levels(Family):
    """Categories by the logits of each level; a subclass writes the logits.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        levels: How many levels each feature has, or one number for all.

    Raises:
        ValueError: If there is not a number of levels, at least 1, for each feature.
    """

    reparameterised = False
    encoding = "one-hot"
    valid: Tensor

    def __init__(self, event: int | tuple[int, ...], levels: int | tuple[int, ...]) -> None:
        super().__init__(event)
        count = self.event_shape.numel()
        self.levels = (levels,) * count if isinstance(levels, int) else tuple(levels)
        none = [str(column) for column, size in enumerate(self.levels) if size < 1]
        if len(self.levels) != count or none:
            got = f"none in columns {', '.join(none[:8])}{', ...' * (len(none) > 8)}" if none else len(self.levels)
            raise ValueError(
                f"Expected the levels of {count} features, each at least 1; got {got}. For other columns use Mixed."
            )
        sizes = torch.tensor(self.levels).reshape(self.event_shape)
        self.support = Steps(sizes)
        codes = torch.arange(max(2, *self.levels)).reshape(-1, *(1 for _ in self.event_shape))
        self.register_buffer("valid", codes < sizes, persistent=False)

    @abstractmethod
    def logits(self, parameters: Tensor) -> Tensor:
        """Log probabilities, shape (*batch, most levels, *event), and -inf for levels that a feature lacks."""

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        dims = len(self.event_shape)
        logits = self.logits(parameters).movedim(-1 - dims, -1)
        levels = _Levels(logits=logits)
        levels.logits = logits  # as they are, which are normalised
        return elementwise(levels, dims, mask, self.support)

    def frequencies(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Share of each level, shape (most levels, *event), a half added to each count."""
        seen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        counts = [((x == code) & seen).sum(0) for code in range(len(self.valid))]
        smooth = torch.where(self.valid, torch.stack(counts).to(x.dtype) + 0.5, 0.0)
        return smooth / smooth.sum(0)


class Categorical(Levels):
    r"""Independent categories, by the logits of each, :math:`\prod_j p_{j x_j}`.

    x holds the codes 0, 1, ... as floats.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        levels: How many levels each feature has, or one number for all.
    """

    def start(self) -> Tensor:
        return torch.zeros(sum(self.levels))

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.frequencies(x, mask).log()[self.valid]

    def logits(self, parameters: Tensor) -> Tensor:
        return _scatter(parameters, self.valid, -math.inf).log_softmax(-1 - len(self.event_shape))


class OrderedCategorical(Levels):
    r"""Independent categories in order, by learned cuts, :math:`P(x_j \le k) = 1 / (1 + e^{\eta_j - c_{jk}})`.

    The network gives one predictor :math:`\eta_j` per feature; the family learns the cutpoints
    :math:`c_{j0} < c_{j1} < \dots` (Regression models for ordinal data, McCullagh 1980).

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        levels: How many levels each feature has, or one number for all.
    """

    def __init__(self, event: int | tuple[int, ...], levels: int | tuple[int, ...]) -> None:
        super().__init__(event, levels)
        self.raw_cutpoints = nn.Parameter(torch.empty(sum(self.levels) - self.event_shape.numel()))
        self._cut(self.valid / self.valid.sum(0))

    def start(self) -> Tensor:
        return torch.zeros(self.event_shape.numel())

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._cut(self.frequencies(x, mask))
        return self.start().to(x)

    def logits(self, parameters: Tensor) -> Tensor:
        raw = _scatter(self.raw_cutpoints, self.valid[1:], math.inf)
        gaps, end = positive(raw[1:]), torch.full_like(raw[:1], math.inf)
        above = torch.cat([raw[:1], gaps]).cumsum(0) - parameters.unflatten(-1, (1, *self.event_shape))
        below, dims = logsigmoid(above), (0, 0) * len(self.event_shape)
        inner = torch.log(-torch.expm1(-torch.cat([end, gaps, end])))  # as in a logistic in bins: nothing cancels
        return pad(below, (*dims, 0, 1)) + pad(below - above, (*dims, 1, 0)) + inner

    @torch.no_grad()
    def _cut(self, frequencies: Tensor) -> None:
        cutpoints = frequencies.cumsum(0)[:-1].clamp(1e-6, 1 - 1e-6).logit()
        raw = torch.cat([cutpoints[:1], unconstrained(cutpoints.diff(dim=0))])
        self.raw_cutpoints.copy_(raw[self.valid[1:]])


def _scatter(values: Tensor, where: Tensor, fill: float) -> Tensor:
    """Values (*batch, p) at the p places of `where` that are true, in their order."""
    if not values.shape[-1]:
        return values.new_full((*values.shape[:-1], *where.shape), fill)
    if values.shape[-1] == where.numel():
        return values.unflatten(-1, where.shape)
    place = (where.flatten().cumsum(0) - 1).clamp_min(0).reshape(where.shape)
    return torch.where(where, values[..., place], fill)
