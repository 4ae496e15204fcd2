r"""The aggregate posterior, the guide averaged over data, beside the prior.

The mean rate of data parts into the mutual information of x and z under the guide and the distance of the aggregate
posterior :math:`q(z) = \frac1n \sum_i q(z \mid x_i)` from the prior (ELBO Surgery, Hoffman and Johnson 2016).
"""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.programs._old_draws import layout_of, packed, site_values
from ppl_vae.programs.latent_vector import Layout
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.traces import check_batch, conditioned, log_density, structure, trace_pair

_DATA = 100  # data at a time
_ENTRIES = 2**22  # numbers that latent variables scored against many data may hold
_PAIRED = 2000  # draws, at the most, whose distances are compared by pairs


@dataclass(frozen=True)
class Aggregate:
    r"""The aggregate posterior :math:`q(z) = \frac1n \sum_i q(z \mid x_i)` of n data beside the prior; nats.

    Args:
        rate: mean of :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z))`, which is `mutual_information` + `kl`.
        mutual_information: of z and which of the n data it came from: at most ln n, and on average a lower bound of
            that of z and x over the population.
        upper: the same with each datum left out of its own mixture: on average an upper bound of it.
        kl: :math:`\mathrm{KL}(q(z) \,\|\, p(z))`, for this mixture of n; it shrinks as n grows.
        error: standard error over the data, with that of the draws in it, the largest of these four.
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
    draws = check_int("draws", draws)
    batch = check_batch(program, as_batch(x))
    first = next(iter(batch.values()))
    n = len(first)
    if n < 2:
        raise ValueError(f"Expected at least two data; got {n}.")
    found = structure(program, batch, seed=seed)
    parts = [{key: value[i : i + _DATA] for key, value in batch.items()} for i in range(0, n, _DATA)]
    layouts, drawn, priors, fresh = [], [], [], []
    for number, part in enumerate(parts):
        with scope(program), fork_rng(seed, "aggregate", number, device=first.device):
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
        with scope(program), fork_rng(seed, "score", device=z.device):
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
