"""The exact posterior of a linear-Gaussian pair, as a family."""

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from ppl_vae.families.conditional import Conditional
from ppl_vae.families.distributions import FullCovariance, full_covariance
from ppl_vae.families.elementwise import Normal, StandardNormal
from ppl_vae.families.family import Family
from ppl_vae.families.full_normal import FullNormal
from ppl_vae.families.linear_gaussian import LinearGaussian
from ppl_vae.networks.linear import Linear
from ppl_vae.networks.network import Identity, Network


class ExactNormal(Family):
    r"""The exact posterior of a linear-Gaussian likelihood, tied to likelihood *and* prior; no parameters of its own.

    :math:`q(z \mid x) = p(z \mid x) = N(m + \Lambda^{-1} W^\top D^{-1} (x - b - W m),\; \Lambda^{-1})` with
    :math:`\Lambda = S^{-1} + W^\top D^{-1} W` (Bishop 2006, equation 2.116). Whatever the weights, each importance
    weight then equals p(x). If prior or likelihood depend on something given, y, then m, S and b do.

    Args:
        prior: A `Conditional` with a Gaussian family, and no context but what is given.
        likelihood: A `Conditional` of a `Normal` whose scale is not from the network, on `Linear`.

    Raises:
        ValueError: If the pair is not linear-Gaussian.
    """

    def __init__(self, prior: Conditional, likelihood: Conditional) -> None:
        super().__init__(tuple(prior.family.event_shape))
        self._vector()
        if likelihood.context is None:
            likelihood.bind(tuple(self.event_shape))
        self.tied = (prior, likelihood)  # a tuple, so that neither is registered a second time
        self.given = sum(shape.numel() for shape in prior.context or (likelihood.context or ())[1:])
        linear_gaussian(prior, likelihood, torch.zeros(self.given))

    def start(self) -> Tensor:
        return torch.zeros(0)

    def network(self) -> Network:
        return Identity()

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        prior, likelihood = self.tied
        width = likelihood.family.event_shape.numel()
        context, *observed = parameters.split(width + self.given, -1)
        pair = linear_gaussian(prior, likelihood, context[..., width:])
        exact = pair.posterior(context[..., :width], observed[0][..., :width] > 0 if observed else None)
        return full_covariance(exact.loc, exact.scale_tril, mask)


def linear_gaussian(prior: Conditional, likelihood: Conditional, given: Tensor) -> LinearGaussian:
    """Read the linear-Gaussian model off a prior and a likelihood, differentiably, at what is `given`, (*batch, g).

    Raises:
        ValueError: If the pair is not linear-Gaussian; the message says why.
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
    start: Any = prior(*(given.to(network.weight),) if prior.context else ())
    event = len(prior.family.event_shape)
    tril = start.scale_tril if isinstance(start, FullCovariance) else torch.diag_embed(start.stddev.flatten(-event))
    weight = network.weight / network.scale
    bias = network.bias - weight @ network.shift
    if len(likelihood.context or ()) > 1:
        size = prior.family.event_shape.numel()
        weight, others = weight[:, :size], weight[:, size:]
        bias = bias + given.to(weight) @ others.mT
    scale = family.own_scale().expand(family.event_shape).flatten()
    return LinearGaussian(start.mean.flatten(-event), tril, weight, bias, scale)
