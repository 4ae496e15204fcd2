r"""What the latent variables are used for: codes, active units, rates, and distortion.

The rate of a datum, :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`, is what the latent variables say about it, in nats.

In the linear case all of this is known. PPCA's posterior has :math:`\mathrm{Var}_x\, E[z_j \mid x] = 1 - \sigma^2 /
\lambda_j` and a mean rate of :math:`\frac12 \sum_j \ln (\lambda_j / \sigma^2)`: a latent collapses where the noise
variance exceeds its eigenvalue (Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse, Lucas, Tucker,
Grosse and Norouzi 2019), so that the active latents of PPCA can be counted by eigenvalues.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MixtureOfDiagNormals
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch import distributions as td

from ppl_vae._checks import check_int
from ppl_vae.evaluation.weights import trace_blocks, weight_blocks
from ppl_vae.programs.target import Target

_DRAWS = 100  # draws at a time


@torch.no_grad()
def codes(program: Any, x: Any = None, draws: int = 100, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of the latent variables under the guide, by sampling.

    Args:
        program: any program, or a `Target`; several latent sites stand side by side in the model's order.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        draws: samples per datum, at least 2.
        seed: of the draws; the global random state is left alone.

    Returns:
        :math:`E_{q(z \mid x)}[z]` and :math:`\mathrm{Var}_{q(z \mid x)}[z]`, each of shape (n, z), in double precision.

    Raises:
        ValueError: If there are fewer than two draws, or the data do not fit.
    """
    target, draws = Target.of(program, x), check_int("draws", draws, 2)
    if not target.structure.latents:  # all are enumerated
        return (torch.zeros(target.n, 0, dtype=torch.float64, device=target.device),) * 2
    moments = []
    for number, block in enumerate(target.blocks()):
        with block.running(seed, "codes", number):
            z = block.draws(draws)
        moments.append(torch.stack([z.mean(0), z.var(0)]))
    mean, variance = torch.cat(moments, 1)
    return mean, variance


def guide_moments(target: Target, *, seed: int = 0, block: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent variables under the guide, each (n, z) in double precision.

    They are exact where there is one latent site whose distribution knows its moments, else by 1,000 draws.

    Args:
        target: the program and its data.
        seed: of the draws.
        block: the number of the block that the data are, which fixes the draws too.
    """
    with torch.no_grad(), target.running(seed, "encode", block):
        site: Any = target.trace("guide", 1).nodes[target.structure.latents[0]]
    try:
        known = [site["fn"].mean, site["fn"].variance.sqrt()]
    except (NotImplementedError, AttributeError):
        known = []
    if len(target.structure.latents) == 1 and known and all(bool(value.isfinite().all()) for value in known):
        name, shape = target.structure.latents[0], site["value"].shape
        mean, sd = (target.layout.pack({name: value.expand(shape)})[0].double() for value in known)
        return mean, sd
    mean, variance = codes(target, draws=1000, seed=seed)
    return mean, variance.sqrt()


def active_units(program: Any, x: Any = None, *, threshold: float = 0.01, draws: int = 100, seed: int = 0) -> Tensor:
    r"""Whether each latent is active: :math:`\mathrm{Var}_x\, E_{q(z \mid x)}[z_j]` lies above a threshold.

    The variance of the sampled means is corrected for what the sampling adds to it.

    Args:
        program: any program, or a `Target`.
        x: data, at least two; none beside a `Target`.
        threshold: in units of z squared.
        draws: samples per datum.
        seed: of the draws.

    Returns:
        Boolean, shape (z,).

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), section 5.2.
    """
    mean, variance = codes(program, x, draws, seed=seed)
    if len(mean) < 2 or not mean.numel():
        return torch.zeros(mean.shape[1], dtype=torch.bool)
    return mean.var(0) - variance.mean(0) / draws > threshold


@torch.no_grad()
def rates(program: Any, x: Any = None, *, draws: int = 100, seed: int = 0) -> Tensor:
    r"""Rate of each latent, :math:`\mathrm{KL}(q(z_j \mid x) \,\|\, p(z_j))`, of the marginals.

    For a normal against a normal, correlated or not, it is in closed form, given the latents it depends on; anything
    else is sampled. If the prior factorises, the sum falls short of the rate of all latents by their total correlation
    under the guide, :math:`\mathrm{KL}(q(z \mid x) \,\|\, \prod_j q(z_j \mid x))`; so it is that rate if the guide
    factorises too.

    Args:
        program: any program, or a `Target`, whose latent sites have marginals with a density in guide and model:
            elementwise distributions, multivariate normals, mixtures of these.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        draws: samples per datum, for what is not in closed form.
        seed: of the draws; the global random state is left alone.

    Returns:
        Nats, shape (n, z), in double precision; sampled rates may fall below 0.

    Raises:
        ValueError: If the marginals of a site have no known density, as those of a flow, or as in `codes`.
    """
    target, draws = Target.of(program, x), check_int("draws", draws)
    if names := target.structure.enumerated:
        raise ValueError(
            f"Expected latents whose marginals have a density, for a rate of each; theirs are sums over '{names[0]}'. "
            "log_evidence(program, x, samples).rate is that of all of them."
        )
    parts = []
    for number, block in enumerate(target.blocks()):
        total: Any = 0.0
        for _, model, guide in trace_blocks(block, draws, _DRAWS, seed, "rates", number):
            terms = {name: _rate(name, guide.nodes[name], model.nodes[name]) for name in block.structure.latents}
            total = total + block.layout.pack(terms).double().sum(0)
        parts.append(total / draws)
    return torch.cat(parts)


def _rate(name: str, q: Any, p: Any) -> Tensor:
    """KL of each element of a site, sampled if it has no closed form, in the shape of the site's value."""
    guide, prior = _marginals(q["fn"]), _marginals(p["fn"])
    for role, site, marginals in (("guide", q, guide), ("model", p, prior)):
        if marginals is None:
            raise ValueError(
                "Expected latents whose marginals have a density, for a rate of each; site "
                f"'{name}' of the {role} is a {type(site['fn']).__name__}. "
                "log_evidence(program, x, samples).rate is that of all of them."
            )
    value = p["value"]
    if isinstance(guide, td.Normal) and isinstance(prior, td.Normal):
        terms = _masked(_masked(td.kl_divergence(guide, prior), q), p)
    else:
        terms = _masked(guide.log_prob(value), q) - _masked(prior.log_prob(value), p)
    return terms.expand(value.shape)


def _masked(terms: Tensor, site: Any) -> Tensor:
    """Zero the terms that a site's mask hides, as the evidence does."""
    mask = site["mask"]
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return scale_and_mask(terms, 1.0, mask)  # type: ignore[no-any-return]


def _marginals(fn: Any) -> Any:
    """Distribution of each element of an event by itself, or None if its density is not known."""
    if isinstance(fn, td.Independent):
        return _marginals(fn.base_dist)
    if isinstance(fn, td.MultivariateNormal | td.LowRankMultivariateNormal):
        return td.Normal(fn.loc, fn.variance.sqrt())
    if isinstance(fn, MixtureOfDiagNormals):
        weights, parts = fn.categorical, td.Normal(fn.locs, fn.coord_scale)
    elif isinstance(fn, td.MixtureSameFamily) and fn.event_shape:
        weights, parts = fn.mixture_distribution, _marginals(fn.component_distribution)
    else:
        return None if fn.event_shape else fn
    if not isinstance(parts, td.Normal):
        return None
    component = weights.logits.dim() - 1
    loc, scale = (value.movedim(component, -1) for value in (parts.loc, parts.scale))
    between = (1,) * (loc.dim() - weights.logits.dim())
    logits = weights.logits.reshape(*weights.logits.shape[:-1], *between, -1)
    return td.MixtureSameFamily(td.Categorical(logits=logits.expand(loc.shape)), td.Normal(loc, scale))


@dataclass(frozen=True)
class RateDistortion:
    r"""Rate and distortion over a setting, such as the observation scale or beta, in nats per datum, shape (s,).

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
    """Compute the rate-distortion curve of a family of programs, one point per setting.

    Args:
        refit: returns the fitted program at a setting; called once for each, with gradients on.
        settings: such as observation scales or betas.
        x: data, a tensor (n, *x) or a batch dict.
        draws: samples per datum, at least 2; the same ones at each setting.
        seed: of the draws; the global random state is left alone.

    Returns:
        Rate and distortion at each setting, with their errors.

    Raises:
        ValueError: If there are fewer than two draws or no settings, or the data do not fit.

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
    values, draws = [float(setting) for setting in settings], check_int("draws", draws, 2)
    if not values:
        raise ValueError("Expected at least one of `settings`; got none.")
    points = []
    for setting in values:
        with torch.enable_grad():
            program = refit(setting)
        parts = []
        for block in weight_blocks(Target.of(program, x), draws, seed):
            pairs = [(some.weights, some.likelihood) for some in block]
            weights, likelihood = (torch.cat(each) for each in zip(*pairs, strict=True))
            both = torch.stack([likelihood - weights, -likelihood])
            parts.append(torch.stack([both.mean(1), both.var(1) / draws]))
        mean, variance = torch.cat(parts, -1)
        points.append(torch.cat([mean.mean(-1), variance.sum(-1).sqrt() / variance.shape[-1]]))
    return RateDistortion(torch.tensor(values, dtype=torch.float64), *torch.stack(points, 1))
