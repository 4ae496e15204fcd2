r"""The aggregate posterior, the guide averaged over data, beside the prior.

The mean rate is the sum of two parts: the mutual information of x and z under the guide, and the KL of the aggregate
posterior :math:`q(z) = \frac1n \sum_i q(z \mid x_i)` from the prior (ELBO Surgery, Hoffman and Johnson 2016).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.programs.target import BLOCK, Target

_ENTRIES = 2**22  # numbers that latent variables scored against many data may hold
_PAIRED = 2000  # draws, at the most, whose distances are compared by pairs


@dataclass(frozen=True)
class Aggregate:
    r"""The aggregate posterior :math:`q(z) = \frac1n \sum_i q(z \mid x_i)` of n data beside the prior; nats.

    Args:
        rate: mean of :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`, which is `mutual_information` + `kl`.
        mutual_information: of z and the datum that it came from: at most ln n, and on average a lower bound of that of
            z and x over the population.
        upper: the same with each datum left out of its own mixture: on average an upper bound of it.
        kl: :math:`\mathrm{KL}(q(z) \,\|\, p(z))`, for this mixture of n; it shrinks as n grows.
        error: standard error over the data, that of the draws included; the largest of these four.
        mmd: squared maximum mean discrepancy between q(z) and p(z), unbiased, without unit, from one draw for each of
            at most 2,000 data; NaN below four.
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
def aggregate(program: Any, x: Any = None, *, draws: int = 1, seed: int = 0) -> Aggregate:
    """Compare the aggregate posterior with the prior, by sampling.

    Each draw is scored under the guide's answer for each datum, so the work grows with the square of the data, while
    memory is that of a block: 10,000 data and 20 latents take some 20 s on one core for a normal guide, minutes for a
    mixture of ten. If that is too long, use fewer data; all but `rate` and `mmd` depend on how many there are.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict, at least two; none beside a `Target`.
        draws: samples per datum.
        seed: of the draws; the global random state is left alone.

    Returns:
        Rate, mutual information, KL and MMD.

    Raises:
        ValueError: If there are fewer than two data or one draw, or the data do not fit.
    """
    target, draws = Target.of(program, x), check_int("draws", draws)
    n = target.n
    if n < 2:
        raise ValueError(f"Expected at least two data; got {n}.")
    drawn, priors, fresh = [], [], []
    for number, block in enumerate(target.blocks()):
        with block.running(seed, "aggregate", number):
            guide = block.trace("guide", draws)
            model = block.trace("model", draws, block.replaying(guide))
            fresh.append(block.flatten(block.trace("model", 1))[0])
        drawn.append(block.flatten(guide))
        priors.append(block.log_density(model, draws, model.stochastic_nodes))
    z, prior = torch.cat(drawn, 1).flatten(0, 1), torch.cat(priors, 1).flatten()
    source = torch.arange(n, device=target.device).repeat(draws)
    own, others = torch.empty_like(prior), torch.full_like(prior, -math.inf)
    for number, block in enumerate(target.blocks()):
        score = _score(block, z, seed)
        column = source - number * BLOCK
        here = (column >= 0) & (column < block.n)
        own[here] = score[here, column[here]]
        score[here, column[here]] = -math.inf
        others = torch.logaddexp(others, score.logsumexp(1))
    mixture = torch.logaddexp(others, own) - math.log(n)
    terms = torch.stack([own - prior, own - mixture, own - others + math.log(n - 1), mixture - prior])
    spread = terms.unflatten(1, (draws, n)).mean(1).std(1) / n**0.5
    some = min(n, _PAIRED)
    distance, distance_error = mmd(z[:some], torch.cat(fresh)[:some]) if n >= 4 else (math.nan, math.nan)
    rate, information, upper, kl = terms.mean(1).tolist()
    return Aggregate(rate, information, upper, kl, float(spread.max()), distance, distance_error, n)


def _score(target: Target, z: Tensor, seed: int) -> Tensor:
    """Log density under the guide of each of m latent vectors (m, z) for each datum, in nats, (m, n)."""
    scores = []
    for some in z.split(max(1, _ENTRIES // (target.n * max(z.shape[1], 1)))):
        with target.running(seed, "score"):
            scores.append(target.score("guide", some.unsqueeze(1).expand(-1, target.n, -1)))
    return torch.cat(scores)


def mmd(first: Tensor, second: Tensor) -> tuple[float, float]:
    r"""Estimate the squared maximum mean discrepancy of two distributions, without bias, and its standard error.

    :math:`\frac{1}{m (m - 1)} \sum_{i \ne j} h_{ij}` with :math:`h_{ij} = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) -
    k(x_j, y_i)` and a Gaussian kernel as wide as the median distance. The error is that of a U-statistic of order two;
    it also holds if the two distributions are equal.

    Args:
        first: independent draws, shape (m, z), at least four.
        second: as many draws from the other, independent of these.

    Returns:
        The estimate, which may fall below 0, and its standard error.

    Raises:
        ValueError: If the shapes differ, or there are fewer than four draws.

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
