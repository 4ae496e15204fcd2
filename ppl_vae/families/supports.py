"""Supports: which values a distribution can take, by kind and bounds."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints


class Sphere(constraints.Constraint):
    """Vectors of length 1, to a tolerance of 1e-4."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.norm(dim=-1) - 1).abs() < 1e-4

    def __repr__(self) -> str:
        return "the unit sphere"


class OpenInterval(constraints.interval):
    """The numbers between two bounds, without the bounds."""

    def check(self, value: Tensor) -> Tensor:
        return (self.lower_bound < value) & (value < self.upper_bound)


class Steps(constraints.Constraint):
    """The numbers 0, step, 2 step, ..., as many as there are levels: one number, or one for each entry."""

    is_discrete = True

    def __init__(self, levels: int | tuple[int, ...] | Tensor, step: float | Tensor = 1.0) -> None:
        self.levels, self.step = levels, step
        self.lower_bound = 0.0

    @property
    def upper_bound(self) -> float:
        return float(self.step) * (float(torch.as_tensor(self.levels).max()) - 1)

    def check(self, value: Tensor) -> Tensor:
        place, levels = value / self.step, torch.as_tensor(self.levels, device=value.device)
        return ((place - place.round()).abs() < 0.01) & (place > -0.5) & (place < levels - 0.5)

    @property
    def words(self) -> str:
        """The support in words."""
        if self.step != 1:
            return f"0, 1/{1 / self.step:.0f}, ..., 1"
        return f"the codes 0, 1, ... below {' or '.join(map(str, torch.as_tensor(self.levels).unique().tolist()))}"


unit = OpenInterval(0.0, 1.0)


def of_entries(support: Any) -> Any:
    """Support of each entry of an independent event, or of a mixture's component."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def bounds(support: Any) -> tuple[float, float] | None:
    """Least and largest value of an entry, infinite for the real line; None if the support has no such bounds."""
    support = of_entries(support)
    if isinstance(support, type(constraints.boolean)):
        return 0.0, 1.0
    if isinstance(support, type(constraints.real)):
        return -math.inf, math.inf
    if not (hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
        return None
    low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
    return float(low.min()), float(high.max())


def same_support(a: Any, b: Any) -> bool:
    """Whether two supports hold the same values. Whether an interval is open or closed does not matter."""
    if bounds(a) is None or bounds(b) is None:
        return repr(a) == repr(b)
    steps = [getattr(each, "step", 1.0) for each in (a, b)]
    return bounds(a) == bounds(b) and a.is_discrete == b.is_discrete and steps[0] == steps[1]


def typical_moments(support: Any) -> tuple[float, float]:
    """Mean and standard deviation to begin with: those of a uniform distribution if the support is an interval."""
    low, high = bounds(support) or (-math.inf, math.inf)
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2, (high - low) / math.sqrt(12)
    return low + 1 if math.isfinite(low) else high - 1 if math.isfinite(high) else 0.0, 1.0


def value_inside(support: Any) -> float:
    """A value that lies in a support, to stand where an entry is hidden."""
    mean, _ = typical_moments(support)
    return (bounds(support) or (mean,))[0] if support.is_discrete else mean


def describe_support(support: Any) -> str:
    """A support in words, such as `the whole numbers from 0 to 15`."""
    inner, limits = of_entries(support), bounds(support)
    if inner is constraints.simplex:
        return "shares that sum to 1"
    if limits is None or hasattr(inner, "words"):
        return getattr(inner, "words", None) or str(inner).removesuffix("()")
    low, high = limits
    if isinstance(inner, type(constraints.boolean)):
        return "{0, 1}"
    if limits == (-math.inf, math.inf):
        return "the real numbers"
    start, end = (f"{bound:g}" for bound in limits)
    if inner.is_discrete:
        return f"the whole numbers from {start}" + (f" to {end}" if math.isfinite(high) else "")
    if not math.isfinite(high):
        return "the positive numbers" if low == 0 else f"the numbers above {start}"
    return f"the numbers below {end}" if not math.isfinite(low) else f"the interval from {start} to {end}"
