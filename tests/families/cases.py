"""The table of families that every test of `test_families.py` goes through, with what the tests must know of each.

To add a family, add a `Case`: how to make it, its log density by numpy or scipy, its support as points and weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
from scipy.special import expit, logsumexp
from torch import Tensor

from ppl_vae import Conditional, families
from ppl_vae.families import ExactNormal, Family
from ppl_vae.networks import Linear

Array = npt.NDArray[np.float64]
Nodes = tuple[Tensor, Tensor]


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))


def softplus(raw: Any) -> Array:
    return np.logaddexp(0.0, raw) + 1e-6


# Supports: points, and weights by which a sum over them is an integral over the support -------------------------------


def real_line(size: int) -> Nodes:
    """By x = sinh(t), so that heavy tails are reached."""
    t = torch.arange(-12, 12, 0.004) if size == 1 else torch.arange(-5, 5, 0.03)
    return t.sinh(), (t[1] - t[0]) * t.cosh()


def product(axis: Callable[[int], Nodes]) -> Callable[[Family], Nodes]:
    """Nodes of a family whose entries have one support, `axis` for events of that size."""

    def nodes(family: Family) -> Nodes:
        size = family.event_shape.numel()
        points, weights = axis(size)
        grid = torch.cartesian_prod(*[points] * size).reshape(-1, size)
        return grid, torch.cartesian_prod(*[weights] * size).reshape(-1, size).prod(-1)

    return nodes


def codes(count: int) -> Callable[[Family], Nodes]:
    """Nodes of entries 0, 1, ..., count - 1."""
    return product(lambda size: (torch.arange(count).double(), torch.ones(count)))


# Draws of events, whatever the parameters -----------------------------------------------------------------------------


def normal_points(family: Family, *batch: int) -> Tensor:
    return torch.randn(*batch, *family.event_shape)


def code_points(count: int) -> Callable[..., Tensor]:
    return lambda family, *batch: torch.randint(count, (*batch, *family.event_shape)).to(torch.get_default_dtype())


# Parameters -----------------------------------------------------------------------------------------------------------


def near_start(family: Family, *batch: int) -> Tensor:
    start = family.start()
    return start + 0.6 * torch.randn(*batch, start.numel())


@dataclass(frozen=True)
class Case:
    """A family with settings, and what the tests must know of it.

    Attributes:
        make: The family for an event of that size.
        log_density: Log density of the entries of an event `x` (size,) where `keep` is true, from unconstrained
            parameters (p,), by numpy or scipy: `log_density(family, parameters, x, keep)`.
        nodes: Points (m, size) of the support and weights (m,) that integrate over it.
        points: Events of the support, shape (*batch, size): `points(family, *batch)`.
        parameters: Random parameters (*batch, p): `parameters(family, *batch)`.
        sizes: The sizes of an event for integrals.
        size: The size of an event elsewhere.
        tolerance: How near to one the integral of the density is.
        moments: Whether mean and variance are finite, and the distribution has them.
        extremes: Whether all its parameters may be extreme at once, each alone, or none.
    """

    make: Callable[[int], Family]
    log_density: Callable[[Any, Array, Array, Any], float]
    nodes: Callable[[Any], Nodes] = product(real_line)
    points: Callable[..., Tensor] = normal_points
    parameters: Callable[..., Tensor] = near_start
    sizes: tuple[int, ...] = (1, 2)
    size: int = 4
    tolerance: float = 1e-9
    moments: bool = True
    extremes: Literal["all", "each", "none"] = "all"

    def build(self, size: int | None = None) -> Any:
        """Family with random values of the parameters that it learns itself."""
        family = self.make(self.size if size is None else size)
        perturb(family)
        return family

    def density(self, family: Family, parameters: Tensor, x: Tensor, keep: Any = None) -> float:
        """Log density of one event, or of its entries in `keep`."""
        seen = np.ones(len(x), bool) if keep is None else np.asarray(keep)
        return self.log_density(family, parameters.detach().numpy(), x.detach().numpy(), seen) if seen.any() else 0.0


# Normals, by their mean and covariance --------------------------------------------------------------------------------


def gaussian_moments(family: Any, parameters: Array) -> tuple[Array, Array]:
    """Mean and covariance from unconstrained parameters, by numpy."""
    size = family.event_shape[0]
    if isinstance(family, families.StandardNormal):
        return np.zeros(size), np.eye(size)
    if isinstance(family, families.FullNormal):
        lower = np.zeros((size, size))
        lower[np.tril_indices(size)] = parameters[size:]
        lower[np.diag_indices(size)] = softplus(lower.diagonal())
        return parameters[:size], lower @ lower.T
    if isinstance(family, ExactNormal):
        prior, likelihood = family.tied
        net: Any = likelihood.network
        return posterior_moments(
            *gaussian_moments(prior.family, prior.unconstrained().detach().numpy()),
            net.weight.detach().numpy(),
            net.bias.detach().numpy(),
            normal_scale(likelihood.family, np.zeros(0)),
            parameters,
        )
    return parameters[:size], np.diag(normal_scale(family, parameters) ** 2)


def normal_scale(family: Any, parameters: Array) -> Array:
    size = family.event_shape[0]
    if family.scale == "network":
        return softplus(parameters[size:])
    own = softplus(family.raw_scale.detach().numpy()) if isinstance(family.scale, str) else family.scale
    return np.broadcast_to(own, (size,))


def posterior_moments(m: Array, s: Array, w: Array, b: Array, noise: Array, x: Array) -> tuple[Array, Array]:
    """Bishop 2.116: covariance (S^-1 + W^T D^-1 W)^-1."""
    covariance = np.linalg.inv(np.linalg.inv(s) + w.T @ np.diag(noise**-2) @ w)
    return m + covariance @ w.T @ ((x - b - w @ m) / noise**2), covariance


def gaussian(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    loc, covariance = gaussian_moments(family, parameters)
    return float(scipy.stats.multivariate_normal.logpdf(x[keep], loc[keep], covariance[np.ix_(keep, keep)]))


def mixture(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    count, size = family.components, family.event_shape[0]
    locs, scales = parameters[count:].reshape(2, count, size)
    each = scipy.stats.norm.logpdf(x[keep], locs[:, keep], softplus(scales)[:, keep]).sum(-1)
    return float(logsumexp(each + parameters[:count] - logsumexp(parameters[:count])))


def linear_pair(latent: int, features: int, scale: Any = "shared", prior: Family | None = None) -> tuple[Any, Any]:
    """A linear-Gaussian prior and likelihood with random parameters."""
    first = Conditional(families.StandardNormal(latent) if prior is None else prior)
    second = Conditional(families.Normal(features, scale=scale), Linear(), context=latent)
    perturb(first)
    perturb(second)
    return first, second


def _exact(size: int) -> ExactNormal:
    return ExactNormal(*linear_pair(size, size + 2))


def _data(family: Any, *batch: int) -> Tensor:
    """Parameters of an `ExactNormal`, which are data."""
    return 0.6 * torch.randn(*batch, family.tied[1].family.event_shape[0])


def _bernoulli(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    return float(scipy.stats.bernoulli.logpmf(x, expit(parameters))[keep].sum())


CASES: dict[str, Case] = {
    "StandardNormal": Case(families.StandardNormal, gaussian),
    "Normal(network)": Case(families.Normal, gaussian),
    "Normal(shared)": Case(lambda size: families.Normal(size, scale="shared"), gaussian),
    "Normal(feature)": Case(lambda size: families.Normal(size, scale="feature"), gaussian),
    "Normal(0.7)": Case(lambda size: families.Normal(size, scale=0.7), gaussian),
    "FullNormal": Case(families.FullNormal, gaussian, extremes="each"),
    "MixtureNormal": Case(lambda size: families.MixtureNormal(size, components=3), mixture),
    "Bernoulli": Case(families.Bernoulli, _bernoulli, codes(2), code_points(2)),
    "ExactNormal": Case(_exact, gaussian, parameters=_data, extremes="none"),
}

# A prior and an approximate posterior for each kind of latent variable, to try a family in either role with
PARTNERS: dict[str, tuple[Callable[[int], Family], Callable[[int], Family]]] = {
    "real": (families.StandardNormal, families.Normal),
}
