"""Counts that share a row's total."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.families.family import Family


class _Multinomial(TorchDistribution):
    """A multinomial whose total differs from row to row. A density is given the total of the row that is scored."""

    arg_constraints = {"logits": constraints.real_vector, "total": constraints.nonnegative}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, total: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        shape = torch.broadcast_shapes(total.shape, logits.shape[:-1])
        self.total, self.logits = total.expand(shape), logits.expand(*shape, logits.shape[-1])
        super().__init__(shape, logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TorchDistribution:
        batch_shape = torch.Size(batch_shape)
        new = _Multinomial(self.total.expand(batch_shape), self.logits, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def log_probs(self) -> Tensor:
        """Log probabilities of the features."""
        return self.logits.log_softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value.sum(-1) + 1).lgamma() + (value * self.log_probs - (value + 1).lgamma()).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            probs, left = self.log_probs.exp().expand(shape), self.total.expand(shape[:-1])
            rest = probs.flip(-1).cumsum(-1).flip(-1)
            counts = []
            for share in (probs / rest.clamp_min(torch.finfo(rest.dtype).tiny)).clamp_max(1).unbind(-1):
                counts.append(dist.Binomial(left, share, validate_args=False).sample())
                left = left - counts[-1]
            return torch.stack(counts, -1)

    @property
    def mean(self) -> Tensor:
        return self.total.unsqueeze(-1) * self.log_probs.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 - self.log_probs.exp())


class Multinomial(Family):
    r"""Counts given their total, :math:`(\sum_j x_j)! \prod_j p_j^{x_j} / x_j!`, by the logits of p.

    The total of a row is taken as given: the density is that of how it is divided. So no entry of a row may be missing.

    Args:
        event: The size of an event, a vector.
    """

    support = constraints.nonnegative_integer
    reparameterised = False
    encoding = "log1p"
    total: Tensor

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event)
        self._vector()
        self.register_buffer("total", torch.ones(()))

    def start(self) -> Tensor:
        return torch.zeros(self.event_shape)

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._refuse(mask, "Use NegativeBinomial or Poisson.")
        each = x.mean(0)
        self.total.copy_(each.sum().round().clamp_min(1))
        return (each + 1e-3 * each.mean().clamp_min(1e-3)).log()

    def distribution(
        self, parameters: Tensor, mask: Tensor | None = None, *, total: Tensor | None = None
    ) -> TorchDistribution:
        """Distribution, as of every family.

        Args:
            parameters: Unconstrained.
            mask: As of every family.
            total: The total of each row, shape (*batch,), for draws and moments; by default the training data's mean.
        """
        self._refuse(mask, "Use NegativeBinomial or Poisson.")
        return _Multinomial(self.total if total is None else total, parameters)
