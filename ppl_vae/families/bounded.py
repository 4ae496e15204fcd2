"""Families of numbers between 0 and 1."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, register_kl

from ppl_vae.families.distributions import Entry
from ppl_vae.families.elementwise import Elementwise
from ppl_vae.families.supports import unit


class _Beta(dist.Beta):
    """A beta distribution whose draws stay off 0 and 1, where its density may have no bound."""

    support = unit

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return _inside(super().rsample(sample_shape))


class Beta(Elementwise):
    r"""Independent betas between 0 and 1, :math:`\prod_j x_j^{a_j - 1} (1 - x_j)^{b_j - 1} / B(a_j, b_j)`."""

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, _Beta, concentration1="network", concentration0="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        mean = mean.clamp(1e-3, 1 - 1e-3)
        total = (mean * (1 - mean) / scale.square() - 1).clamp(0.1, 1e6)
        return {"concentration1": mean * total, "concentration0": (1 - mean) * total}


class _Kumaraswamy(Entry):
    """The Kumaraswamy distribution by logarithms, so that it holds near 0 and 1 in single precision."""

    arg_constraints = {"concentration1": constraints.positive, "concentration0": constraints.positive}
    support = unit
    has_rsample = True

    def log_density(self, value: Tensor) -> Tensor:
        a, b, log = self.concentration1, self.concentration0, value.log()
        return a.log() + b.log() + (a - 1) * log + (b - 1) * _log1mexp(a * log)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        tail = self.uniform(sample_shape).log() / self.concentration0
        return _inside((_log1mexp(tail) / self.concentration1).exp())

    @property
    def mean(self) -> Tensor:
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        return (self._moment(2) - self.mean.square()).clamp_min(0)

    def _moment(self, order: int) -> Tensor:
        a, b = 1 + order / self.concentration1, self.concentration0
        return (a.lgamma() + (1 + b).lgamma() - (a + b).lgamma()).exp()


class Kumaraswamy(Elementwise):
    r"""Independent Kumaraswamys between 0 and 1, :math:`\prod_j a_j b_j x_j^{a_j - 1} (1 - x_j^{a_j})^{b_j - 1}`.

    Much like a beta distribution, and cheaper to draw from (A generalized probability density function for
    double-bounded random processes, Kumaraswamy 1980).
    """

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, _Kumaraswamy, concentration1="network", concentration0="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        mean = mean.clamp(1e-3, 1 - 1e-3)
        scale = torch.minimum(scale, (mean * (1 - mean) / 1.5).sqrt())
        most = -9 / mean.log()  # a sharper start would need b above e^9
        a = b = torch.ones_like(mean)
        for _ in range(60):
            now = _Kumaraswamy(concentration1=a, concentration0=b)
            a = torch.minimum(a * (now.stddev * mean / (scale * now.mean)).clamp(0.5, 2), most)
            b = b * (now.mean / mean).pow(a).clamp(0.5, 2)
        return {"concentration1": a, "concentration0": b}


class _ContinuousBernoulli(Entry):
    r"""The density :math:`e^{\lambda x - A(\lambda)}` on [0, 1], with series where A is a difference of large terms."""

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def log_density(self, value: Tensor) -> Tensor:
        return self.logits * (value - 0.5) - self.log_sinhc()

    def log_sinhc(self) -> Tensor:
        r"""Log normaliser without its linear term, :math:`\log(\sinh t / t)` at half the logit."""
        t, near = self._half()
        small = torch.where(near, self.logits / 2, 0.0).square()
        series = small / 6 - small**2 / 180 + small**3 / 2835 - small**4 / 37800
        return torch.where(near, series, t + torch.log(-torch.expm1(-2 * t)) - (2 * t).log())

    @property
    def mean(self) -> Tensor:
        t, near = self._half()
        small = torch.where(near, self.logits / 2, 0.0)
        series = small / 3 - small**3 / 45 + 2 * small**5 / 945 - small**7 / 4725
        return 0.5 + torch.where(near, series, self.logits.sign() * (1 / t.tanh() - 1 / t)) / 2

    @property
    def variance(self) -> Tensor:
        t, near = self._half()
        small = torch.where(near, self.logits / 2, 0.0).square()
        series = 1 / 3 - small / 15 + 2 * small**2 / 189 - small**3 / 675 + 2 * small**4 / 10395
        return torch.where(near, series, t**-2 - 4 * (-2 * t).exp() / torch.expm1(-2 * t) ** 2) / 4

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Inverse of the distribution function: log(1 + u (e^a - 1)) / a, with a <= 0, mirrored for a > 0."""
        u, near = self.uniform(sample_shape), self.logits.abs() < 0.01
        down = -torch.where(near, 1.0, self.logits.abs())
        far = torch.log1p(u * torch.expm1(down)) / down
        small, v = torch.where(near, self.logits, 0.0), u * (1 - u)
        series = u + v * small / 2 * (1 + (1 - 2 * u) * small / 3 + (1 - 6 * v) * small**2 / 12)
        return torch.where(near, series, torch.where(self.logits > 0, 1 - far, far))

    def _half(self) -> tuple[Tensor, Tensor]:
        """Half the size of the logit, at least 0.1, and where it is smaller than that."""
        half = self.logits.abs() / 2
        return half.clamp_min(0.1), half < 0.1


class ContinuousBernoulli(Elementwise):
    r"""Independent continuous Bernoullis, by their logits, :math:`\prod_j C_j\, p_j^{x_j} (1 - p_j)^{1 - x_j}`.

    For intensities between 0 and 1, both included, where a Bernoulli is no density (The continuous Bernoulli: fixing a
    pervasive error in variational autoencoders, Loaiza-Ganem and Cunningham 2019).
    """

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, _ContinuousBernoulli, logits="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        mean, logits = mean.clamp(1e-3, 1 - 1e-3), torch.zeros_like(mean)
        for _ in range(30):  # Newton, which does not overshoot
            now = _ContinuousBernoulli(logits=logits)
            logits = logits + (mean - now.mean) / now.variance
        return {"logits": logits}


@register_kl(_ContinuousBernoulli, _ContinuousBernoulli)
def _kl_continuous_bernoulli(q: Any, p: Any) -> Tensor:
    return (q.logits - p.logits) * (q.mean - 0.5) - q.log_sinhc() + p.log_sinhc()


def _log1mexp(x: Tensor) -> Tensor:
    """Logarithm of 1 - exp(x), for x < 0."""
    return torch.log(-torch.expm1(x))


def _inside(x: Tensor) -> Tensor:
    info = torch.finfo(x.dtype)
    return x.clamp(info.tiny, 1 - info.eps / 2)
