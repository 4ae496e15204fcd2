"""The table of families that every test of `test_families.py` goes through, with what the tests must know of each.

To add a family, add a `Case`: how to make it, its log density by numpy or scipy, its support as points and weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import scipy.stats
import torch
from scipy.special import expit, gammaln, log_softmax, logsumexp, softmax
from torch import Tensor

from ppl_vae import VAE, Conditional, families
from ppl_vae.data import Columns
from ppl_vae.families import ExactNormal, Family, same_support
from ppl_vae.networks import MLP, Linear

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


def unit_interval(size: int) -> Nodes:
    """By x = 1 / (1 + exp(-t)), so that densities may grow at 0 and 1."""
    t = torch.arange(-34, 34, 0.02 if size == 1 else 0.25)
    x = t.sigmoid()
    return x, (t[1] - t[0]) * x * (-t).sigmoid()


def positive_numbers(size: int) -> Nodes:
    """By x = exp(t)."""
    t = torch.arange(-60, 16, 0.02) if size == 1 else torch.arange(-40, 9, 0.15)
    return t.exp(), (t[1] - t[0]) * t.exp()


def counts(size: int) -> Nodes:
    x = torch.arange(3000.0 if size == 1 else 700.0)
    return x, torch.ones_like(x)


def grid(*axes: Nodes) -> Nodes:
    """Nodes of independent entries."""
    points, weights = (torch.cartesian_prod(*each).reshape(-1, len(axes)) for each in zip(*axes, strict=True))
    return points, weights.prod(-1)


def product(axis: Callable[[int], Nodes]) -> Callable[[Family], Nodes]:
    """Nodes of a family whose entries have one support, `axis` for events of that size."""
    return lambda family: grid(*[axis(family.event_shape.numel())] * family.event_shape.numel())


def level_nodes(family: Any) -> Nodes:
    """Nodes of a family of levels: all values of each entry."""
    step = family.support.step
    return grid(*((step * torch.arange(float(count)), torch.ones(count)) for count in family.levels))


# Draws of events, whatever the parameters -----------------------------------------------------------------------------


def normal_points(family: Family, *batch: int) -> Tensor:
    return torch.randn(*batch, *family.event_shape)


def positive_points(family: Family, *batch: int) -> Tensor:
    return torch.randn(*batch, *family.event_shape).exp()


def unit_points(family: Family, *batch: int) -> Tensor:
    return 0.01 + 0.98 * torch.rand(*batch, *family.event_shape)


def below(count: int) -> Callable[..., Tensor]:
    """Whole numbers from 0 to count - 1."""
    return lambda family, *batch: torch.randint(count, (*batch, *family.event_shape)).to(torch.get_default_dtype())


def level_points(family: Any, *batch: int) -> Tensor:
    each = torch.rand(*batch, len(family.levels)) * torch.tensor(family.levels)
    return family.support.step * each.floor()


# Parameters -----------------------------------------------------------------------------------------------------------


def near_start(family: Family, *batch: int) -> Tensor:
    start = family.start()
    return start + 0.6 * torch.randn(*batch, start.numel())


def about_zero(family: Family, *batch: int) -> Tensor:
    return torch.randn(*batch, family.start().numel())


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
        masks: Whether entries may be hidden.
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
    masks: bool = True

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
    if isinstance(family, families.LowRankNormal):
        scale = softplus(parameters[size : 2 * size])
        columns = scale[:, None] * parameters[2 * size :].reshape(size, family.rank)
        return parameters[:size], columns @ columns.T + np.diag(scale**2)
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


def mixture_of_full(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    count = family.components
    rows = parameters[count:].reshape(count, -1)
    each = np.array([gaussian(family.each, row, x, keep) for row in rows])
    return float(logsumexp(each + log_softmax(parameters[:count])))


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


# Families of independent entries, by the law of an entry --------------------------------------------------------------


REAL = ("loc", "logits", "gate_logits")


def entry_values(family: Any, parameters: Array) -> list[Array]:
    """Parameters of each entry in the family's order, from those of the network and those that the family learns."""
    parts = iter(parameters.reshape(-1, family.event_shape.numel()))
    values: list[Any] = []
    for name, source in family.sources.items():
        if not isinstance(source, str):
            values.append(source)
            continue
        part = next(parts) if source == "network" else getattr(family, f"raw_{name}").detach().numpy()
        values.append(part if name in REAL else np.exp(part) + 1e-6 if name == "dispersion" else softplus(part))
    return [np.broadcast_to(value, family.event_shape) for value in values]


def entries(law: Callable[..., Array]) -> Callable[[Any, Array, Array, Any], float]:
    """Log density of a family from that of its entries, `law(x, *values)`."""
    return lambda family, parameters, x, keep: float(law(x, *entry_values(family, parameters))[keep].sum())


def _kumaraswamy(x: Array, a: Array, b: Array) -> Array:
    return np.log(a * b) + (a - 1) * np.log(x) + (b - 1) * np.log1p(-(x**a))


def _continuous_bernoulli(x: Array, logits: Array) -> Array:
    return logits * x + np.log(logits / np.expm1(logits))


def _truncated(low: float, high: float) -> Case:
    def law(x: Array, loc: Array, scale: Array, *_: Array) -> Array:
        return scipy.stats.truncnorm.logpdf(x, (low - loc) / scale, (high - loc) / scale, loc, scale)

    axis, points = (unit_interval, unit_points) if high == 1 else (positive_numbers, positive_points)
    make = partial(families.TruncatedNormal, low=low, high=high)
    return Case(make, entries(law), product(axis), points, tolerance=1e-7)


def _negative_binomial(x: Array, mean: Array, dispersion: Array) -> Array:
    return scipy.stats.nbinom.logpmf(x, dispersion, dispersion / (dispersion + mean))


def _with_zeros(log: Array, x: Array, gate_logits: Array) -> Array:
    """A component at zero beside another."""
    gate = expit(gate_logits)
    return np.log(gate * (x == 0) + (1 - gate) * np.exp(log))


def _zero_inflated_negative_binomial(x: Array, mean: Array, dispersion: Array, gate_logits: Array) -> Array:
    return _with_zeros(_negative_binomial(x, mean, dispersion), x, gate_logits)


def _multinomial(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    chance = softmax(parameters[keep])
    return float(scipy.stats.multinomial.logpmf(x[keep], x[keep].sum(), chance / chance.sum()))


def _totals(size: int) -> families.Multinomial:
    family = families.Multinomial(size)
    family.total.fill_(5)
    return family


def _divisions(family: Any) -> Nodes:
    """All ways to divide the total."""
    points, _ = grid(*[(torch.arange(6.0), torch.ones(6))] * family.event_shape[0])
    points = points[points.sum(-1) == 5]
    return points, torch.ones(len(points))


def _categorical(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    """The logits of level 0 of each feature come first, then those of level 1 of each that has it, ..."""
    of_level = [[j for j, count in enumerate(family.levels) if count > code] for code in range(max(family.levels))]
    order = [(j, code) for code, features in enumerate(of_level) for j in features]
    chances = [softmax([parameters[order.index((j, code))] for code in range(n)]) for j, n in enumerate(family.levels)]
    return float(sum(np.log(chances[j][int(x[j])]) for j in np.flatnonzero(keep)))


def _ordered(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    raw = family.raw_cutpoints.detach().numpy()
    order = [(j, code) for code in range(max(family.levels)) for j, n in enumerate(family.levels) if n > code + 1]
    total = 0.0
    for j in np.flatnonzero(keep):
        own = [raw[order.index((j, code))] for code in range(family.levels[j] - 1)]
        cutpoints = np.cumsum([own[0], *softplus(own[1:])]) if own else np.zeros(0)
        below = np.concatenate([[0.0], expit(cutpoints - parameters[j]), [1.0]])
        total += float(np.log(np.diff(below)[int(x[j])]))
    return total


LEVELS = (3, 2, 5, 4)


def _of_levels(kind: Any) -> Callable[[int], Family]:
    return lambda size: kind(size, LEVELS[:size])


def binned_logistic(x: Array, loc: Array, scale: Array, levels: Any) -> Array:
    half = 0.5 / (levels - 1)
    above = np.where(x > 1 - half, np.inf, x + half)
    under = np.where(x < half, -np.inf, x - half)
    law = scipy.stats.logistic(loc, scale)
    return np.log(np.where(x < loc, law.cdf(above) - law.cdf(under), law.sf(under) - law.sf(above)))


def _mixture_of_bins(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    logits, loc, raw = parameters.reshape(3, family.components, -1)
    each = binned_logistic(x, loc, softplus(raw), family.levels[0])
    return float(logsumexp(each + log_softmax(logits, 0), 0)[keep].sum())


def _mixed(size: int) -> families.Mixed:
    names = tuple("abcd"[:size])
    kinds = {name: ("Bernoulli", "Poisson")[j % 2] for j, name in enumerate(names)}
    return families.Mixed(size, Columns(size, names=names), kinds=kinds)


def _each_block(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    even = np.arange(len(x)) % 2 == 0
    ones, rest = parameters[: even.sum()], parameters[even.sum() :]
    log = np.empty(len(x))
    log[even] = scipy.stats.bernoulli.logpmf(x[even], expit(ones))
    log[~even] = scipy.stats.poisson.logpmf(x[~even], softplus(rest))
    return float(log[keep].sum())


def _zeros_and_counts(family: Any) -> Nodes:
    axes = [(torch.arange(2.0), torch.ones(2)), counts(2)]
    return grid(*(axes[j % 2] for j in range(family.event_shape[0])))


# Flows, the sphere, the simplex and priors tied to the guide ----------------------------------------------------------


def _by_its_jacobian(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    """The density of the noise times the determinant of the map that leads to it, by automatic differentiation."""
    size = len(x)
    d = family.distribution(torch.tensor(parameters))
    noise = d.back(torch.tensor(x))[0].detach().numpy()
    slope = torch.autograd.functional.jacobian(lambda at: d.back(at)[0], torch.tensor(x)).numpy()
    assert slope.shape == (size, size)
    return float(scipy.stats.norm.logpdf(noise).sum() + np.linalg.slogdet(slope)[1])


def _flow(kind: Any, context: int = 0, **known: Any) -> Case:
    def make(size: int) -> families.Flow:
        return families.Flow(size, kind=kind, transforms=2, hidden=[5], context=context)

    return Case(make, _by_its_jacobian, moments=False, masks=False, **({"tolerance": 1e-8} | known))


def sphere(family: Family) -> Nodes:
    """Angles of the circle, or angles and cosines of the sphere."""
    turn = torch.arange(0, 2 * np.pi, 2 * np.pi / 400)
    circle, weight = torch.stack([turn.cos(), turn.sin()], -1), torch.full_like(turn, 2 * np.pi / 400)
    if family.event_shape[0] == 2:
        return circle, weight
    height, weights = (torch.tensor(each) for each in np.polynomial.legendre.leggauss(100))
    ring = (1 - height**2).sqrt()[:, None, None] * circle
    points = torch.cat([ring, height[:, None, None].expand(-1, len(turn), 1)], -1)
    return points.flatten(0, 1), (weights[:, None] * weight).flatten()


def sphere_points(family: Family, *batch: int) -> Tensor:
    return torch.nn.functional.normalize(normal_points(family, *batch), dim=-1)


def _fisher(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    loc = parameters[:-1] / np.linalg.norm(parameters[:-1])
    return float(scipy.stats.vonmises_fisher(loc, softplus(parameters[-1])).logpdf(x))


def _uniform(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    return float(gammaln(len(x) / 2) - np.log(2) - len(x) / 2 * np.log(np.pi))


def simplex(family: Family) -> Nodes:
    """Shares of what the shares before have left."""
    first, weight = unit_interval(family.event_shape[0] - 1)
    if family.event_shape[0] == 2:
        return torch.stack([first, 1 - first], -1), weight
    a, b = torch.meshgrid(first, first, indexing="ij")
    points = torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)], -1)
    return points.flatten(0, 1), (weight[:, None] * weight * (1 - a)).flatten()


def _shares(family: Any, parameters: Array, x: Array, keep: Any) -> float:
    basis = scipy.linalg.helmert(len(x))
    slope = basis[:, :-1] / x[:-1] - basis[:, -1:] / x[-1]
    loc, raw = np.split(parameters, 2)
    return float(scipy.stats.norm.logpdf(basis @ np.log(x), loc, softplus(raw)).sum() + np.linalg.slogdet(slope)[1])


def encoder(size: int, features: int = 5) -> Conditional:
    """A linear guide with random weights."""
    posterior = Conditional(families.Normal(size), Linear(), context=features)
    perturb(posterior)
    return posterior


def _tied(kind: Any, **settings: Any) -> Case:
    """The tied priors are mixtures of normals, whose means and widths are linear in the inputs."""

    def law(family: Any, parameters: Array, x: Array, keep: Any) -> float:
        network: Any = family.tied[0].network
        weight, bias = network.weight.detach().numpy(), network.bias.detach().numpy()
        loc, raw = np.split(family.inputs.detach().numpy() @ weight.T + bias, 2, -1)
        width = softplus(raw if kind is families.VampPrior else family.raw_scale.item())
        logits = np.zeros(len(loc)) if settings.get("weights") != "learned" else family.logits.detach().numpy()
        return float(logsumexp(scipy.stats.norm.logpdf(x, loc, width).sum(-1) + log_softmax(logits)))

    def make(size: int) -> Any:
        return kind(size, encoder(size), components=3, **settings)

    return Case(make, law, masks=False)


COUNTS: Any = {"nodes": product(counts), "points": below(6)}
UNIT: Any = {"nodes": product(unit_interval), "points": unit_points, "tolerance": 1e-5}
POSITIVE: Any = {"nodes": product(positive_numbers), "points": positive_points, "tolerance": 1e-5}
SPHERE: Any = {"nodes": sphere, "points": sphere_points, "sizes": (2, 3), "masks": False}
OF_LEVELS: Any = {"nodes": level_nodes, "points": level_points}

CASES: dict[str, Case] = {
    "StandardNormal": Case(families.StandardNormal, gaussian),
    "Normal(network)": Case(families.Normal, gaussian),
    "Normal(shared)": Case(partial(families.Normal, scale="shared"), gaussian),
    "Normal(feature)": Case(partial(families.Normal, scale="feature"), gaussian),
    "Normal(0.7)": Case(partial(families.Normal, scale=0.7), gaussian),
    "FullNormal": Case(families.FullNormal, gaussian, extremes="each"),
    "MixtureNormal": Case(partial(families.MixtureNormal, components=3), mixture),
    "MixtureFullNormal": Case(partial(families.MixtureFullNormal, components=3), mixture_of_full, extremes="each"),
    "LowRankNormal": Case(partial(families.LowRankNormal, rank=2), gaussian),
    "Flow(autoregressive)": _flow("autoregressive"),
    "Flow(spline)": _flow("spline", sizes=(1, 1), tolerance=1e-3),
    "Flow(coupling)": _flow("coupling"),
    "Flow(inverse-autoregressive)": _flow("inverse-autoregressive"),
    "Flow(context)": _flow("autoregressive", context=2),
    "VonMisesFisher": Case(families.VonMisesFisher, _fisher, **SPHERE),
    "HypersphericalUniform": Case(families.HypersphericalUniform, _uniform, **SPHERE),
    "LogisticNormal": Case(
        families.LogisticNormal,
        _shares,
        simplex,
        lambda f, *b: normal_points(f, *b).softmax(-1),
        sizes=(2, 3),
        tolerance=1e-5,
        moments=False,
        masks=False,
    ),
    "VampPrior": _tied(families.VampPrior),
    "VampPrior(data)": _tied(families.VampPrior, inputs="data", weights="learned"),
    "ExemplarPrior": _tied(families.ExemplarPrior),
    "ExactNormal": Case(_exact, gaussian, parameters=_data, extremes="none"),
    "Laplace": Case(families.Laplace, entries(scipy.stats.laplace.logpdf), tolerance=1e-3),
    "StudentT": Case(families.StudentT, entries(scipy.stats.t.logpdf), tolerance=1e-5),
    "StudentT(4.5)": Case(
        partial(families.StudentT, df=4.5, scale="feature"), entries(scipy.stats.t.logpdf), tolerance=1e-4
    ),
    "Logistic": Case(families.Logistic, entries(scipy.stats.logistic.logpdf), tolerance=1e-6),
    "LogNormal": Case(
        families.LogNormal,
        entries(lambda x, loc, scale: scipy.stats.lognorm.logpdf(x, scale, scale=np.exp(loc))),
        **POSITIVE,
    ),
    "Gamma": Case(families.Gamma, entries(lambda x, a, b: scipy.stats.gamma.logpdf(x, a, scale=1 / b)), **POSITIVE),
    "Beta": Case(families.Beta, entries(scipy.stats.beta.logpdf), **UNIT),
    "Kumaraswamy": Case(families.Kumaraswamy, entries(_kumaraswamy), **UNIT),
    "ContinuousBernoulli": Case(families.ContinuousBernoulli, entries(_continuous_bernoulli), **UNIT),
    "TruncatedNormal": _truncated(0.0, 1.0),
    "TruncatedNormal(0, inf)": _truncated(0.0, np.inf),
    "Bernoulli": Case(
        families.Bernoulli,
        entries(lambda x, logits: scipy.stats.bernoulli.logpmf(x, expit(logits))),
        product(lambda size: (torch.arange(2.0), torch.ones(2))),
        below(2),
    ),
    "Binomial": Case(
        partial(families.Binomial, trials=7),
        entries(lambda x, trials, logits: scipy.stats.binom.logpmf(x, trials, expit(logits))),
        product(lambda size: (torch.arange(8.0), torch.ones(8))),
        below(8),
    ),
    "Poisson": Case(families.Poisson, entries(scipy.stats.poisson.logpmf), **COUNTS),
    "NegativeBinomial": Case(families.NegativeBinomial, entries(_negative_binomial), **COUNTS),
    "NegativeBinomial(network)": Case(
        partial(families.NegativeBinomial, dispersion="network"),
        entries(_negative_binomial),
        parameters=about_zero,
        **COUNTS,
    ),
    "ZeroInflatedPoisson": Case(
        families.ZeroInflatedPoisson,
        entries(lambda x, rate, gate: _with_zeros(scipy.stats.poisson.logpmf(x, rate), x, gate)),
        parameters=about_zero,
        **COUNTS,
    ),
    "ZeroInflatedNegativeBinomial": Case(
        partial(families.ZeroInflatedNegativeBinomial, dispersion=0.8),
        entries(_zero_inflated_negative_binomial),
        parameters=about_zero,
        **COUNTS,
    ),
    "Multinomial": Case(_totals, _multinomial, _divisions, below(5), about_zero, sizes=(2, 3), masks=False),
    "Categorical": Case(_of_levels(families.Categorical), _categorical, **OF_LEVELS),
    "OrderedCategorical": Case(_of_levels(families.OrderedCategorical), _ordered, **OF_LEVELS),
    "DiscretizedLogistic": Case(
        partial(families.DiscretizedLogistic, levels=12), entries(binned_logistic), **OF_LEVELS
    ),
    "MixtureDiscretizedLogistic": Case(
        partial(families.MixtureDiscretizedLogistic, levels=12, components=3), _mixture_of_bins, **OF_LEVELS
    ),
    "Mixed": Case(_mixed, _each_block, _zeros_and_counts, below(2), extremes="each"),
}

# A prior and an approximate posterior for each kind of latent variable, to try a family in either role with
PARTNERS: dict[str, tuple[Callable[[int], Family], Callable[[int], Family]]] = {
    "real": (families.StandardNormal, families.Normal),
    "positive": (families.Gamma, families.LogNormal),
    "unit": (families.Beta, families.Kumaraswamy),
    "sphere": (families.HypersphericalUniform, families.VonMisesFisher),
    "simplex": (families.LogisticNormal, families.LogisticNormal),
}


def partner_of(case: Case) -> Any:
    """A prior and a posterior on the support of this family, if there are any."""
    support = case.make(2).support
    for prior, posterior in PARTNERS.values():
        if same_support(prior(2).support, support):
            return prior, posterior
    return None


def roles_of(case: Case) -> list[str]:
    family = case.make(2)
    if isinstance(family, ExactNormal):
        return ["posterior"]
    sized, partner = family.start().numel() > 0, partner_of(case) is not None
    able = {"prior": partner, "likelihood": sized, "posterior": partner and sized and family.reparameterised}
    return [role for role, can in able.items() if can]


ROLES = [pytest.param(case, role, id=f"{name}-{role}") for name, case in CASES.items() for role in roles_of(case)]


def vae_of(case: Case, role: str) -> VAE:
    family: Any = case.build(2)
    if isinstance(family, ExactNormal):
        return VAE(*family.tied, Conditional(family))
    if family.tied:
        return VAE(Conditional(family), Conditional(families.Normal(5), MLP(hidden=[4])), *family.tied)
    prior, posterior = partner_of(case) if role != "likelihood" else (families.StandardNormal, families.Normal)
    parts = {
        "prior": Conditional(family if role == "prior" else prior(2)),
        "likelihood": Conditional(case.build() if role == "likelihood" else families.Normal(5), MLP(hidden=[4])),
        "posterior": Conditional(family if role == "posterior" else posterior(2), MLP(hidden=[4])),
    }
    return VAE(**parts)
