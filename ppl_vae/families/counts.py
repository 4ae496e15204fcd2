"""Families of counts."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from ppl_vae._checks import check_int
from ppl_vae.families.distributions import Entry, thin
from ppl_vae.families.elementwise import Elementwise, Source


class _Binomial(dist.Binomial):
    """Pyro's binomial, which computes what depends on the number of trials alone once, not for each entry."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        trials = thin(self.total_count)
        ways = (trials + 1).lgamma() - (value + 1).lgamma() - (trials - value + 1).lgamma()
        return ways + value * self.logits - trials * softplus(self.logits)


class Binomial(Elementwise):
    r"""Independent binomials, :math:`\prod_j \binom{T}{x_j} p_j^{x_j} (1 - p_j)^{T - x_j}`, by their logits.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        trials: The number T of trials of each entry.
    """

    encoding = "log1p"
    support = constraints.nonnegative_integer
    reparameterised = False

    def __init__(self, event: int | tuple[int, ...], *, trials: int) -> None:
        self.trials = check_int("trials", trials)
        support = constraints.integer_interval(0, self.trials)
        super().__init__(event, _Binomial, support, total_count=float(trials), logits="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": (mean / self.trials).clamp(1e-3, 1 - 1e-3).logit()}


class Rates(Elementwise):
    """Counts with a rate from the network, which a size factor multiplies. The rate is the first parameter."""

    encoding = "log1p"
    logarithmic: ClassVar[tuple[str, ...]] = ("dispersion",)

    def distribution(
        self, parameters: Tensor, mask: Tensor | None = None, *, size_factor: Tensor | None = None
    ) -> TorchDistribution:
        """Distribution, as of every family.

        Args:
            parameters: Unconstrained.
            mask: As of every family.
            size_factor: Multiplies the rate of each datum, shape (*batch,).
        """
        values = self.values(parameters)
        if size_factor is not None:
            values["rate"] = values["rate"] * size_factor.reshape(*size_factor.shape, *(1 for _ in self.event_shape))
        return self.independent(values, mask)


class Poisson(Rates):
    r"""Independent Poissons, by their rates, :math:`\prod_j \lambda_j^{x_j} e^{-\lambda_j} / x_j!`."""

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, dist.Poisson, rate="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"rate": mean.clamp_min(1e-3)}


class _NegativeBinomial(Entry):
    """A Poisson whose rate is gamma-distributed with mean `rate` and concentration `dispersion`."""

    arg_constraints = {"rate": constraints.positive, "dispersion": constraints.positive}
    support = constraints.nonnegative_integer

    def log_density(self, value: Tensor) -> Tensor:
        r = thin(self.dispersion)
        near, far = r.clamp_max(50), r.clamp_min(50)
        exact = (near + value).lgamma() - near.lgamma() - value * near.log()
        part = torch.log1p(value / far)  # Stirling's series, for r > 50, where those of the gamma function cancel
        inverse = 1 / (far + value)
        series = (far + value - 0.5) * part - value + (inverse - 1 / far) / 12 - (inverse**3 - far**-3) / 360
        rising = torch.where(r < 50, exact, series) - (value + 1).lgamma()
        return rising - (r + value) * (self.rate / r).log1p() + torch.xlogy(value, self.rate)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            rate = dist.Gamma(self.dispersion, self.dispersion / self.rate, validate_args=False).sample(sample_shape)
            return torch.poisson(rate)

    @property
    def mean(self) -> Tensor:
        return self.rate

    @property
    def variance(self) -> Tensor:
        return self.rate + self.rate.square() / self.dispersion


class NegativeBinomial(Rates):
    r"""Independent negative binomials, by mean and dispersion. The variance is :math:`m_j + m_j^2 / r_j`.

    A Poisson whose rate varies by a gamma distribution (Deep generative modeling for single-cell transcriptomics, Lopez
    et al. 2018); it nears a Poisson as the dispersion r grows.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        dispersion: Where r comes from: `network` (one per feature, from the context), `shared` (one learned number),
            `feature` (one learned number per feature), or a positive number that stays fixed.
    """

    def __init__(self, event: int | tuple[int, ...], *, dispersion: Source = "feature") -> None:
        super().__init__(event, _NegativeBinomial, rate="network", dispersion=dispersion)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        rate = mean.clamp_min(1e-3)
        return {"rate": rate, "dispersion": _dispersion(rate, scale.square() - rate)}


class _ZeroInflatedPoisson(Entry):
    """Zero with the probability of the gate, else what `counts` says."""

    arg_constraints = {"rate": constraints.positive, "gate_logits": constraints.real}
    support = constraints.nonnegative_integer

    def counts(self) -> TorchDistribution:
        return dist.Poisson(self.rate, validate_args=False)

    def log_density(self, value: Tensor) -> Tensor:
        log = logsigmoid(-self.gate_logits) + self.counts().log_prob(value)
        return torch.where(value == 0, torch.logaddexp(logsigmoid(self.gate_logits), log), log)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            kept = self.uniform(sample_shape) > self.gate_logits.sigmoid()
            return kept * self.counts().sample(torch.Size(sample_shape))

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.gate_logits) * self.rate

    @property
    def variance(self) -> Tensor:
        kept = torch.sigmoid(-self.gate_logits)
        return kept * (self.counts().variance + (1 - kept) * self.rate.square())


class ZeroInflatedPoisson(Rates):
    r"""Independent Poissons with more zeros. An entry is 0 with probability :math:`g_j`, else Poisson.

    The gate g comes from the network by its logits (Zero-inflated Poisson regression, Lambert 1992).
    """

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, _ZeroInflatedPoisson, rate="network", gate_logits="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        mean = mean.clamp_min(1e-3)
        gate = (1 - mean / (scale.square() / mean + mean - 1).clamp_min(1e-3)).clamp(0.01, 0.99)
        return {"rate": mean / (1 - gate), "gate_logits": gate.logit()}


class _ZeroInflatedNegativeBinomial(_ZeroInflatedPoisson):
    arg_constraints = {**_NegativeBinomial.arg_constraints, "gate_logits": constraints.real}

    def counts(self) -> TorchDistribution:
        return _NegativeBinomial(rate=self.rate, dispersion=self.dispersion, validate_args=False)


class ZeroInflatedNegativeBinomial(Rates):
    r"""Independent negative binomials with more zeros. An entry is 0 with probability :math:`g_j`, else as there.

    The gate g comes from the network by its logits, beside the mean of the other entries (Deep generative modeling for
    single-cell transcriptomics, Lopez et al. 2018).

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        dispersion: As of `NegativeBinomial`.
    """

    def __init__(self, event: int | tuple[int, ...], *, dispersion: Source = "feature") -> None:
        super().__init__(
            event, _ZeroInflatedNegativeBinomial, rate="network", dispersion=dispersion, gate_logits="network"
        )

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        gate = 0.05
        rate = mean.clamp_min(1e-3) / (1 - gate)
        surplus = (scale.square() + mean.square()) / (1 - gate) - rate - rate.square()
        return {
            "rate": rate,
            "dispersion": _dispersion(rate, surplus),
            "gate_logits": torch.full_like(rate, math.log(gate / (1 - gate))),
        }


def _dispersion(rate: Tensor, surplus: Tensor) -> Tensor:
    """Dispersion for a variance that is larger than the rate by `surplus`."""
    return (rate.square() / surplus.clamp_min(1e-9)).clamp(0.05, 100)
