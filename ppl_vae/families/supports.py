"""Supports: which values a distribution can take, by kind and bounds."""

import math
from typing import Any

from torch import Tensor
from torch.distributions import constraints


class Sphere(constraints.Constraint):
    """Vectors of length 1, to a tolerance of 1e-4."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.norm(dim=-1) - 1).abs() < 1e-4

    def __repr__(self) -> str:
        return "the unit sphere"


def bounds(support: Any) -> tuple[float, float] | None:
    """Least and largest value of an entry, infinite for the real line; None if the support has no such bounds."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.boolean)):
        return 0.0, 1.0
    if isinstance(support, type(constraints.real)):
        return -math.inf, math.inf
    if not (hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
        return None
    return float(getattr(support, "lower_bound", -math.inf)), float(getattr(support, "upper_bound", math.inf))


def same_support(a: Any, b: Any) -> bool:
    """Whether two supports hold the same values. Whether an interval is open or closed does not matter."""
    if bounds(a) is None or bounds(b) is None:
        return repr(a) == repr(b)
    return bounds(a) == bounds(b) and a.is_discrete == b.is_discrete


def typical_moments(support: Any) -> tuple[float, float]:
    """Mean and standard deviation to begin with: those of a uniform distribution if the support is an interval."""
    low, high = bounds(support) or (-math.inf, math.inf)
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2, (high - low) / math.sqrt(12)
    return low + 1 if math.isfinite(low) else high - 1 if math.isfinite(high) else 0.0, 1.0


def value_inside(support: Any) -> float:
    """A value that lies in a support, to stand where an entry is hidden."""
    mean, _ = typical_moments(support)
    return float(math.floor(mean)) if support.is_discrete else mean
