r"""What the latent variables are used for: codes, active units, rates, and the aggregate posterior.

The rate of a datum, :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`, is what the latent variables say of it, in nats. Its
mean over data parts into the mutual information of x and z under the guide and the distance of the aggregate posterior
:math:`q(z) = \frac1n \sum_i q(z \mid x_i)` from the prior (ELBO Surgery, Hoffman and Johnson 2016).

In the linear case all of this is known. PPCA's posterior has :math:`\mathrm{Var}_x\, E[z_j \mid x] = 1 - \sigma^2 /
\lambda_j` and a mean rate of :math:`\frac12 \sum_j \ln (\lambda_j / \sigma^2)`: a latent collapses where the noise
variance exceeds its eigenvalue (Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse, Lucas, Tucker,
Grosse and Norouzi 2019), so that the active latents of PPCA can be counted by eigenvalues.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MixtureOfDiagNormals
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from ppl_vae.batches import as_batch, whole
from ppl_vae.evidence import _blocks
from ppl_vae.exact import Layout, conditioned
from ppl_vae.traces import Structure, batch_of, log_density, place, prepare, scope, seeded, structure, trace_pair

__all__ = [
    "Aggregate",
    "RateDistortion",
    "active_units",
    "aggregate",
    "codes",
    "guide_draws",
    "mmd",
    "rate_distortion",
    "rates",
]

_DATA = 100  # data at a time
_ENTRIES = 2**22  # numbers that latent variables scored against many data may hold
_PAIRED = 2000  # draws, at the most, whose distances are compared by pairs


@torch.no_grad()
def codes(program: Any, x: Any, draws: int = 100, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Give mean and variance of the latent variables under the guide, by sampling.

    Args:
        program: any program; several latent sites stand side by side in the model's order.
        x: data, a tensor (n, *x) or a batch dict.
        draws: samples a datum, at least 2.
        seed: of the draws; the global random state is left alone.

    Returns:
        :math:`E_{q(z \mid x)}[z]` and :math:`\mathrm{Var}_{q(z \mid x)}[z]`, each of shape (n, z), in double precision.

    Raises:
        ValueError: for fewer than two draws, or data that do not fit.
    """
    draws = whole("draws", draws, 2)
    batch = prepare(program, as_batch(x))
    found = structure(program, batch, seed=seed)
    first = next(iter(batch.values()))
    means, variances = [], []
    for number, start in enumerate(range(0, len(first), _DATA)):
        part = {key: value[start : start + _DATA] for key, value in batch.items()}
        with scope(program), seeded(seed, "codes", number, device=first.device):
            z, _ = guide_draws(program, part, draws, found)
        means.append(z.mean(0))
        variances.append(z.var(0))
    return torch.cat(means), torch.cat(variances)


def guide_draws(program: Any, batch: dict[str, Tensor], draws: int, found: Structure) -> tuple[Tensor, Layout]:
    """Draw the latent variables from the guide.

    Returns:
        Draws (k, n, z) in double precision, several sites side by side in the model's order, and how they lie.
    """
    particles = pyro.plate("particles", draws, dim=-1 - found.nesting)
    trace = poutine.trace(particles(program.guide)).get_trace(**batch_of(program.guide, batch))
    return packed(trace, found), layout_of(trace, found)


def packed(trace: Any, found: Structure) -> Tensor:
    """Give the latent variables of a trace with particles, shape (k, n, z), in double precision."""
    values = {name: trace.nodes[name]["value"] for name in found.latents}
    return layout_of(trace, found).pack(values).double()


def site_values(program: Any, layout: Layout, z: Tensor) -> dict[str, Tensor]:
    """Take latent vectors (k, n, z) apart, site by site, in the program's precision."""
    dtype = place(program)[1] or torch.get_default_dtype()
    return {name: value.to(dtype) for name, value in layout.unpack(z).items()}


def layout_of(trace: Any, found: Structure) -> Layout:
    """Say how the latent variables of a trace with particles lie side by side."""
    sites = [(name, trace.nodes[name]["value"], trace.nodes[name]["fn"].event_dim) for name in found.latents]
    return Layout(sites, found.nesting)


def active_units(program: Any, x: Any, *, threshold: float = 0.01, draws: int = 100, seed: int = 0) -> Tensor:
    r"""Say of each latent whether it is active: :math:`\mathrm{Var}_x\, E_{q(z \mid x)}[z_j]` above a threshold.

    The variance of the sampled means is freed of what the sampling adds to it.

    Args:
        program: any program.
        x: data, at least two.
        threshold: in units of z squared.
        draws: samples a datum.
        seed: of the draws.

    Returns:
        Boolean, shape (z,).

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), section 5.2.
    """
    mean, variance = codes(program, x, draws, seed=seed)
    if len(mean) < 2:
        return torch.zeros(mean.shape[1], dtype=torch.bool)
    return mean.var(0) - variance.mean(0) / draws > threshold


@torch.no_grad()
def rates(program: Any, x: Any, *, draws: int = 100, seed: int = 0) -> Tensor:
    r"""Give the rate of each latent, :math:`\mathrm{KL}(q(z_j \mid x) \,\|\, p(z_j))`, of the marginals.

    A normal against a normal, correlated or not, is in closed form, given the latents it depends on; anything else is
    sampled. Where the prior factorises, the sum falls short of the rate of all latents by what they tell of each other
    under the guide, its total correlation :math:`\mathrm{KL}(q(z \mid x) \,\|\, \prod_j q(z_j \mid x))`; so it is the
    rate where the guide factorises too.

    Args:
        program: any program whose latent sites have marginals with a density in guide and model: elementwise
            distributions, multivariate normals, mixtures of these.
        x: data, a tensor (n, *x) or a batch dict.
        draws: samples a datum, for what is not in closed form.
        seed: of the draws; the global random state is left alone.

    Returns:
        Nats, shape (n, z), in double precision; sampled ones may fall below 0.

    Raises:
        ValueError: for a site whose marginals have no known density, such as a flow's, or as in `codes`.
    """
    draws = whole("draws", draws)
    batch = prepare(program, as_batch(x))
    found = structure(program, batch, seed=seed)
    first = next(iter(batch.values()))
    parts = []
    for number, start in enumerate(range(0, len(first), _DATA)):
        part = {key: value[start : start + _DATA] for key, value in batch.items()}
        total: Any = 0.0
        for block, done in enumerate(range(0, draws, _DATA)):
            with scope(program), seeded(seed, "rates", number, block, device=first.device):
                model, guide = trace_pair(program, part, min(_DATA, draws - done), found.nesting)
            terms = {name: _rate(name, guide.nodes[name], model.nodes[name]) for name in found.latents}
            total = total + layout_of(model, found).pack(terms).double().sum(0)
        parts.append(total / draws)
    return torch.cat(parts)


def _rate(name: str, q: Any, p: Any) -> Tensor:
    """Give the KL of each element of a site, sampled where it has no closed form, in the shape of its value."""
    value, each = p["value"], []
    for role, site in (("guide", q), ("model", p)):
        marginals = _marginals(site["fn"])
        if marginals is None:
            raise ValueError(
                "Expected latents whose marginals have a density, for a rate of each; site "
                f"'{name}' of the {role} is a {type(site['fn']).__name__}. "
                "log_evidence(program, x, samples).rate is that of all of them."
            )
        each.append(marginals)
    guide, prior = each
    if isinstance(guide, Normal) and isinstance(prior, Normal):
        terms = _masked(_masked(kl_divergence(guide, prior), q), p)
    else:
        terms = _masked(guide.log_prob(value), q) - _masked(prior.log_prob(value), p)
    return terms.expand(value.shape)


def _masked(terms: Tensor, site: Any) -> Tensor:
    """Drop what a site's mask hides, as the evidence does."""
    mask = site["mask"]
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return scale_and_mask(terms, 1.0, mask)  # type: ignore[no-any-return]


def _marginals(fn: Any) -> Any:
    """Give the distribution of each element of an event by itself, `None` where its density is not known."""
    if isinstance(fn, Independent):
        return _marginals(fn.base_dist)
    if isinstance(fn, MultivariateNormal | LowRankMultivariateNormal):
        return Normal(fn.loc, fn.variance.sqrt())
    if isinstance(fn, MixtureOfDiagNormals):
        weights, parts = fn.categorical, Normal(fn.locs, fn.coord_scale)
    elif isinstance(fn, MixtureSameFamily) and fn.event_shape:
        weights, parts = fn.mixture_distribution, _marginals(fn.component_distribution)
    else:
        return None if fn.event_shape else fn
    if not isinstance(parts, Normal):
        return None
    component = weights.logits.dim() - 1
    loc, scale = (value.movedim(component, -1) for value in (parts.loc, parts.scale))
    between = (1,) * (loc.dim() - weights.logits.dim())
    logits = weights.logits.reshape(*weights.logits.shape[:-1], *between, -1)
    return MixtureSameFamily(Categorical(logits=logits.expand(loc.shape)), Normal(loc, scale))


@dataclass(frozen=True)
class Aggregate:
    r"""The aggregate posterior :math:`q(z) = \frac1n \sum_i q(z \mid x_i)` of n data beside the prior; nats.

    Args:
        rate: mean of :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`, which is `mutual_information` + `kl`.
        mutual_information: of z and which of the n data it came from: at most ln n, and on average a lower bound of
            that of z and x over the population.
        upper: the same with each datum left out of its own mixture: on average an upper bound of it.
        kl: :math:`\mathrm{KL}(q(z) \,\|\, p(z))`, for this mixture of n; it shrinks as n grows.
        error: Monte Carlo standard error, the largest of these four.
        mmd: squared maximum mean discrepancy between q(z) and p(z), unbiased, without unit, by a draw each of at most
            2,000 data; NaN below four.
        mmd_error: its standard error.
        n: data.

    References:
        ELBO Surgery (Hoffman and Johnson 2016); On Variational Bounds of Mutual Information (Poole, Ozair, van den
        Oord, Alemi and Tucker 2019), equations 10 and 13.
    """

    rate: float
    mutual_information: float
    upper: float
    kl: float
    error: float
    mmd: float
    mmd_error: float
    n: int


@torch.no_grad()
def aggregate(program: Any, x: Any, *, draws: int = 1, seed: int = 0) -> Aggregate:
    """Compare the aggregate posterior with the prior, by sampling.

    Each draw is scored under the guide's answer for each datum, so the work grows with the square of the data, while
    memory is that of a block: 10,000 data and 20 latents take some 20 s on one core for a normal guide, minutes for a
    mixture of ten. Give fewer data where that is too long; all but `rate` and `mmd` depend on how many there are.

    Args:
        program: any program.
        x: data, a tensor (n, *x) or a batch dict, at least two.
        draws: samples a datum.
        seed: of the draws; the global random state is left alone.

    Returns:
        Rate, mutual information, KL and MMD.

    Raises:
        ValueError: for fewer than two data or one draw, or data that do not fit.
    """
    draws = whole("draws", draws)
    batch = prepare(program, as_batch(x))
    first = next(iter(batch.values()))
    n = len(first)
    if n < 2:
        raise ValueError(f"Expected at least two data; got {n}.")
    found = structure(program, batch, seed=seed)
    parts = [{key: value[i : i + _DATA] for key, value in batch.items()} for i in range(0, n, _DATA)]
    layouts, drawn, priors, fresh = [], [], [], []
    for number, part in enumerate(parts):
        with scope(program), seeded(seed, "aggregate", number, device=first.device):
            model, _ = trace_pair(program, part, draws, found.nesting)
            particles = pyro.plate("particles", 1, dim=-1 - found.nesting)
            fresh.append(packed(poutine.trace(particles(program.model)).get_trace(**part), found)[0])
        layouts.append(layout_of(model, found))
        drawn.append(packed(model, found))
        priors.append(log_density(model, draws, drawn[-1].shape[1], model.stochastic_nodes))
    z, prior = torch.cat(drawn, 1).flatten(0, 1), torch.cat(priors, 1).flatten()
    source = torch.arange(n, device=first.device).repeat(draws)
    own, others = torch.empty_like(prior), torch.full_like(prior, -math.inf)
    for number, (part, layout) in enumerate(zip(parts, layouts, strict=True)):
        score = _score(program, part, layout, z, seed)
        column = source - number * _DATA
        here = (column >= 0) & (column < score.shape[1])
        own[here] = score[here, column[here]]
        score[here, column[here]] = -math.inf
        others = torch.logaddexp(others, score.logsumexp(1))
    mixture = torch.logaddexp(others, own) - math.log(n)
    terms = torch.stack([own - prior, own - mixture, own - others + math.log(n - 1), mixture - prior])
    spread = terms.unflatten(1, (draws, n)).mean(1).std(1) / n**0.5
    some = min(n, _PAIRED)
    distance, doubt = mmd(z[:some], torch.cat(fresh)[:some]) if n >= 4 else (math.nan, math.nan)
    rate, information, upper, kl = terms.mean(1).tolist()
    return Aggregate(rate, information, upper, kl, float(spread.max()), distance, doubt, n)


def _score(program: Any, batch: dict[str, Tensor], layout: Layout, z: Tensor, seed: int) -> Tensor:
    """Give the guide's log density of each of m latent vectors (m, z) for each datum, in nats, shape (m, n)."""
    n = len(next(iter(batch.values())))
    scores = []
    for some in z.split(max(1, _ENTRIES // (n * max(z.shape[1], 1)))):
        values = site_values(program, layout, some.unsqueeze(1).expand(-1, n, -1))
        with scope(program), seeded(seed, "score", device=z.device):
            scores.append(conditioned(program.guide, values, batch, len(some), layout.nesting))
    return torch.cat(scores)


def mmd(first: Tensor, second: Tensor) -> tuple[float, float]:
    r"""Estimate the squared maximum mean discrepancy of two distributions, without bias, and its standard error.

    :math:`\frac{1}{m (m - 1)} \sum_{i \ne j} h_{ij}` with :math:`h_{ij} = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) -
    k(x_j, y_i)` and a Gaussian kernel as wide as the median distance. The error is that of a U-statistic of order two;
    it holds where the two are equal as well.

    Args:
        first: independent draws, shape (m, z), at least four.
        second: as many from the other, independent of these.

    Returns:
        The estimate, which may fall below 0, and its standard error.

    Raises:
        ValueError: for shapes that differ or fewer than four draws.

    References:
        A Kernel Two-Sample Test (Gretton, Borgwardt, Rasch, Schoelkopf and Smola 2012), lemma 6.
    """
    if first.shape != second.shape or first.dim() != 2 or len(first) < 4:
        raise ValueError(
            f"Expected two sets of as many draws (m, z), at least four; got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    m = len(first)
    both = torch.cat([first, second]).double()
    apart = torch.cdist(both, both).square()
    upper = apart[tuple(torch.triu_indices(2 * m, 2 * m, 1))]
    kernel = torch.exp(-apart / (2 * upper.median().clamp_min(torch.finfo(apart.dtype).tiny)))
    cross = kernel[:m, m:]
    h = kernel[:m, :m] + kernel[m:, m:] - cross - cross.mT
    h.fill_diagonal_(0.0)
    value = h.sum() / (m * (m - 1))
    rows = h.sum(1) / (m - 1)
    pairs = h.square().sum() / (m * (m - 1)) - value**2
    single = rows.var() - pairs / (m - 1)
    variance = (4 * (m - 2) * single + 2 * pairs) / (m * (m - 1))
    return float(value), float(variance.clamp_min(pairs / (m * (m - 1))).sqrt())


@dataclass(frozen=True)
class RateDistortion:
    r"""Rate and distortion over a setting, such as the observation scale or beta; nats a datum, shape (s,).

    Args:
        settings: the settings.
        rate: mean over data of :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`.
        distortion: mean over data of :math:`-E_q \log p(x \mid z)`; the ELBO is -(rate + distortion).
        rate_error: Monte Carlo standard error of `rate`.
        distortion_error: Monte Carlo standard error of `distortion`.

    References:
        Fixing a Broken ELBO (Alemi, Poole, Fischer, Dillon, Saurous and Murphy 2018).
    """

    settings: Tensor
    rate: Tensor
    distortion: Tensor
    rate_error: Tensor
    distortion_error: Tensor


@torch.no_grad()
def rate_distortion(
    refit: Callable[[float], Any], settings: Iterable[float], x: Any, *, draws: int = 100, seed: int = 0
) -> RateDistortion:
    """Trace the rate-distortion curve of a family of programs, a point a setting.

    Args:
        refit: gives the program at a setting, fitted; called once each, with gradients on.
        settings: such as observation scales or betas.
        x: data, a tensor (n, *x) or a batch dict.
        draws: samples a datum, at least 2; the same ones at each setting.
        seed: of the draws; the global random state is left alone.

    Returns:
        Rate and distortion at each setting, with their errors.

    Raises:
        ValueError: for fewer than two draws, no setting, or data that do not fit.

    Example:
        >>> import torch
        >>> from ppl_vae import PPCA
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> best = PPCA.fit(x, 1)
        >>> curve = rate_distortion(
        ...     lambda scale: PPCA(best.loc, best.weight, torch.tensor(scale)).to_vae(), [0.5, 1.0, 2.0], x
        ... )
        >>> bool((curve.rate.diff() < 0).all())
        True
    """
    values, draws = [float(setting) for setting in settings], whole("draws", draws, 2)
    if not values:
        raise ValueError("Expected at least one of `settings`; got none.")
    points = []
    for setting in values:
        with torch.enable_grad():
            program = refit(setting)
        parts = []
        for _, blocks in _blocks(program, x, draws, seed):
            weights, likelihood = (torch.cat(each) for each in zip(*blocks, strict=True))
            both = torch.stack([likelihood - weights, -likelihood])
            parts.append(torch.stack([both.mean(1), both.var(1) / draws]))
        mean, variance = torch.cat(parts, -1)
        points.append(torch.cat([mean.mean(-1), variance.sum(-1).sqrt() / variance.shape[-1]]))
    return RateDistortion(torch.tensor(values, dtype=torch.float64), *torch.stack(points, 1))
