"""The mathematics of the families in hand-written PyTorch, as a user of PyTorch would write it.

A log density takes the values, or what the decoder gives and the data, and the `Hand` whose parameters it may need.
PyTorch's own distributions stand where they are what one would use, without their checks.
"""

import math
from typing import Any

import numpy as np
import scipy.special
import torch
from torch import Tensor
from torch import distributions as dist
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    logsigmoid,
    normalize,
    one_hot,
    softplus,
)

FEATURES, HIDDEN, LATENT = 784, 400, 20
LEVELS, TRIALS, COMPONENTS, RANK = 4, 8, 5, 2
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def positive(raw: Tensor) -> Tensor:
    """The scale of a raw parameter."""
    return softplus(raw) + 1e-6


def both(out: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale from the network."""
    loc, raw = out.chunk(2, -1)
    return loc, positive(raw)


def normal(x: Tensor, loc: Tensor | float, scale: Tensor) -> Tensor:
    """Log density of independent normals, summed over the last dim."""
    return (-0.5 * ((x - loc) / scale) ** 2 - scale.log() - HALF_LOG_TWO_PI).sum(-1)


# Priors ---------------------------------------------------------------------------------------------------------------


def standard(z: Tensor, hand: Any) -> Tensor:
    """Log density of the standard normal."""
    return (-0.5 * z**2 - HALF_LOG_TWO_PI).sum(-1)


def mixture(z: Tensor, hand: Any) -> Tensor:
    """Log density of a mixture of ten normals with diagonal covariances."""
    each = normal(z.unsqueeze(-2), hand.loc, positive(hand.raw))
    return (hand.logits.log_softmax(-1) + each).logsumexp(-1)


def triangle(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors and their diagonals, from their entries by rows."""
    rows, columns = torch.tril_indices(LATENT, LATENT)
    lower = entries.new_zeros(len(entries), LATENT, LATENT)
    lower[:, rows, columns] = entries
    scale = positive(lower.diagonal(dim1=1, dim2=2))
    return lower.tril(-1) + scale.diag_embed(), scale


def mixture_full(z: Tensor, hand: Any) -> Tensor:
    """Log density of a mixture of ten normals with full covariances."""
    factor, _ = triangle(hand.rows[:, LATENT:])
    each = dist.MultivariateNormal(hand.rows[:, :LATENT], scale_tril=factor, validate_args=False)
    weights = dist.Categorical(logits=hand.logits, validate_args=False)
    return dist.MixtureSameFamily(weights, each, validate_args=False).log_prob(z)


def vamp(z: Tensor, hand: Any) -> Tensor:
    """Log density of the guide's average over pseudo-inputs."""
    loc, scale = both(hand.encode(hand.inputs))
    return normal(z.unsqueeze(-2), loc, scale).logsumexp(-1) - math.log(len(loc))


def exemplars(z: Tensor, hand: Any) -> Tensor:
    """Log density of normals of one width around the guide's means at some data."""
    loc, _ = both(hand.encode(hand.given))
    scale = positive(hand.raw_scale)
    apart = ((z.unsqueeze(-2) - loc) ** 2).sum(-1)
    each = -0.5 * apart / scale**2 - LATENT * (scale.log() + HALF_LOG_TWO_PI)
    return each.logsumexp(-1) - math.log(len(loc))


def flow(z: Tensor, hand: Any) -> Tensor:
    """Log density of a flow of zuko's between two locations and scales."""
    scale = positive(hand.raw)
    return hand.flow().log_prob((z - hand.loc) / scale) - scale.log().sum(-1)


def shares(z: Tensor, hand: Any) -> Tensor:
    """Log density of shares whose logarithms are normal, at the draw just made."""
    return normal(hand.drawn[0], hand.loc, positive(hand.raw)) - hand.drawn[1]


def uniform(z: Tensor, hand: Any) -> Tensor:
    """Log density of the uniform distribution on the sphere."""
    return z.new_full(z.shape[:-1], math.lgamma(LATENT / 2) - math.log(2) - LATENT / 2 * math.log(math.pi))


# Likelihoods ----------------------------------------------------------------------------------------------------------


def bernoulli(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of binary pixels."""
    return -binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1)


def categorical(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of codes."""
    return -cross_entropy(out.unflatten(-1, (LEVELS, FEATURES)), x.long(), reduction="none").sum(-1)


def ordered(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of codes in order, by the differences of the distribution function."""
    raw = hand.raw_cutpoints.view(LEVELS - 1, FEATURES)
    cuts = torch.cat([raw[:1], positive(raw[1:])]).cumsum(0)
    below = torch.sigmoid(cuts - out.unsqueeze(-2))
    edges = torch.cat([torch.zeros_like(below[:, :1]), below, torch.ones_like(below[:, :1])], 1)
    return edges.diff(dim=1).gather(1, x.long().unsqueeze(1)).log().sum((1, 2))


def both_normal(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of normal pixels whose scales come from the network."""
    return normal(x, *both(out))


def one_normal(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of normal pixels with one scale."""
    return normal(x, out, positive(hand.raw_scale).expand_as(out))


def laplace(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of Laplace pixels."""
    loc, scale = both(out)
    return (-(x - loc).abs() / scale - (2 * scale).log()).sum(-1)


def logistic(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of logistic pixels."""
    loc, scale = both(out)
    t = (x - loc) / scale
    return (-t - 2 * softplus(-t) - scale.log()).sum(-1)


def student_t(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of pixels by Student's t with one number of degrees of freedom."""
    return dist.StudentT(positive(hand.raw_df), *both(out), validate_args=False).log_prob(x).sum(-1)


def log_normal(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of log-normal pixels."""
    log = x.log()
    return normal(log, *both(out)) - log.sum(-1)


def gamma(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of gamma pixels."""
    a, b = positive(out).chunk(2, -1)
    return (a * b.log() + (a - 1) * x.log() - b * x - a.lgamma()).sum(-1)


def beta(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of beta pixels."""
    a, b = positive(out).chunk(2, -1)
    return ((a - 1) * x.log() + (b - 1) * (1 - x).log() + (a + b).lgamma() - a.lgamma() - b.lgamma()).sum(-1)


def kumaraswamy(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of Kumaraswamy pixels."""
    a, b = positive(out).chunk(2, -1)
    log = x.log()
    return (a.log() + b.log() + (a - 1) * log + (b - 1) * torch.log1p(-(a * log).exp())).sum(-1)


def continuous_bernoulli(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of continuous Bernoulli pixels."""
    return dist.ContinuousBernoulli(logits=out, validate_args=False).log_prob(x).sum(-1)


def truncated_normal(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log density of normal pixels between 0 and 1."""
    loc, scale = both(out)
    mass = torch.special.ndtr((1 - loc) / scale) - torch.special.ndtr(-loc / scale)
    return normal(x, loc, scale) - mass.log().sum(-1)


def poisson(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of counts."""
    rate = positive(out)
    return (x * rate.log() - rate - (x + 1).lgamma()).sum(-1)


def negative_binomial_each(rate: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of each count whose variance exceeds its mean."""
    r = hand.raw_dispersion.exp() + 1e-6
    total = (r + rate).log()
    return (
        r * (r.log() - total)
        + x * (rate.log() - total)
        + (x + r).lgamma()
        - r.lgamma()
        - (x + 1).lgamma()
    )  # fmt: skip


def negative_binomial(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of counts whose variance exceeds their mean."""
    return negative_binomial_each(positive(out), x, hand).sum(-1)


def with_zeros(log: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """Log probability of counts with more zeros, from that without."""
    log = log - softplus(gate)
    return torch.where(x == 0, torch.logaddexp(logsigmoid(gate), log), log).sum(-1)


def zero_inflated_poisson(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of counts with more zeros."""
    raw, gate = out.chunk(2, -1)
    rate = positive(raw)
    return with_zeros(x * rate.log() - rate - (x + 1).lgamma(), gate, x)


def zero_inflated_negative_binomial(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of counts whose variance exceeds their mean, with more zeros."""
    raw, gate = out.chunk(2, -1)
    return with_zeros(negative_binomial_each(positive(raw), x, hand), gate, x)


def binomial(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of counts out of some trials."""
    ways = math.lgamma(TRIALS + 1) - (x + 1).lgamma() - (TRIALS - x + 1).lgamma()
    return (ways + x * out - TRIALS * softplus(out)).sum(-1)


def multinomial(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of counts given their total."""
    return (x.sum(-1) + 1).lgamma() + (x * out.log_softmax(-1) - (x + 1).lgamma()).sum(-1)


def bins(loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Log probability of 8-bit pixels by a logistic in bins, after PixelCNN++."""
    middle = x - loc
    up, down = (middle + 0.5 / 255) / scale, (middle - 0.5 / 255) / scale
    inner = (torch.sigmoid(up) - torch.sigmoid(down)).clamp_min(1e-12).log()
    return torch.where(x < 0.001, logsigmoid(up), torch.where(x > 0.999, -softplus(down), inner))


def discretized_logistic(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of 8-bit pixels."""
    return bins(*both(out), x).sum(-1)


def mixture_discretized_logistic(out: Tensor, x: Tensor, hand: Any) -> Tensor:
    """Log probability of 8-bit pixels by a mixture for each."""
    logits, loc, raw = out.unflatten(-1, (3, COMPONENTS, FEATURES)).unbind(1)
    return (logits.log_softmax(1) + bins(loc, positive(raw), x.unsqueeze(1))).logsumexp(1).sum(-1)


# Data, and what a guide sees of them ----------------------------------------------------------------------------------


def as_is(x: Tensor) -> Tensor:
    """The data as they are."""
    return x


def codes_apart(x: Tensor) -> Tensor:
    """A column for each code."""
    return one_hot(x.long(), LEVELS).flatten(1).to(x)


def binary(given: Tensor) -> Tensor:
    """Make binary pixels, few of them 1."""
    return (given < 0.13).float()


def inner(given: Tensor) -> Tensor:
    """Make numbers off 0 and 1."""
    return given.clamp(1e-3, 1 - 1e-3)


def counts(given: Tensor) -> Tensor:
    """Make counts."""
    return torch.poisson(3 * given)


def up_to(levels: int) -> Any:
    """Make whole numbers from 0, as many as there are levels."""
    return lambda given: (levels * given).floor()


def bytes_of(given: Tensor) -> Tensor:
    """Make 8-bit pixels."""
    return (255 * given).round() / 255


# Draws of the guide, with their log densities -------------------------------------------------------------------------


def draw_diagonal(raw: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """A draw of a diagonal normal and its log density."""
    loc, scale = both(raw)
    noise = torch.randn_like(loc)
    return loc + scale * noise, (-0.5 * noise**2 - scale.log() - HALF_LOG_TWO_PI).sum(-1)


def draw_full(raw: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """A draw of a normal with any covariance, by its Cholesky factor, and its log density."""
    loc, (factor, scale) = raw[:, :LATENT], triangle(raw[:, LATENT:])
    noise = torch.randn_like(loc)
    z = loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)
    return z, (-0.5 * noise**2 - scale.log() - HALF_LOG_TWO_PI).sum(-1)


def draw_low_rank(raw: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """A draw of a normal with a low-rank covariance and its log density."""
    loc, wide, columns = raw.split([LATENT, LATENT, LATENT * RANK], -1)
    scale = positive(wide)
    factor = scale.unsqueeze(-1) * columns.unflatten(-1, (LATENT, RANK))
    q = dist.LowRankMultivariateNormal(loc, factor, scale**2, validate_args=False)
    z = q.rsample()
    return z, q.log_prob(z)


def draw_flow(raw: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """A draw of an inverse autoregressive flow of zuko's and its log density."""
    loc, scale = both(raw)
    noise = torch.randn_like(loc)
    value, volume = hand.flow.transform().call_and_ladj(noise)
    return loc + scale * value, standard(noise, hand) - volume - scale.log().sum(-1)


def draw_shares(raw: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """A draw of shares whose logarithms are normal and its log density."""
    loc, scale = both(raw)
    y = loc + scale * torch.randn_like(loc)
    logs = (y @ hand.basis.T).log_softmax(-1)
    hand.drawn = y, logs.sum(-1) + 0.5 * math.log(LATENT)
    return logs.exp(), normal(y, loc, scale) - hand.drawn[1]


class LogBessel(torch.autograd.Function):
    """Logarithm of a modified Bessel function of the first kind, by SciPy, as users of the sphere do."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, order: float) -> Tensor:
        """The value."""
        k = kappa.detach().double().numpy()
        value = scipy.special.ive(order, k)
        ctx.save_for_backward(torch.from_numpy(scipy.special.ive(order + 1, k) / value + order / k).to(kappa))
        return torch.from_numpy(np.log(value) + k).to(kappa)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        """The gradient."""
        return gradient[0] * ctx.saved_tensors[0], None


def draw_sphere(raw: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """A draw of a von Mises-Fisher distribution by rejection (Davidson et al. 2018), and its log density."""
    loc, kappa, size = normalize(raw[:, :-1], dim=-1), positive(raw[:, -1]), LATENT - 1
    b = (-2 * kappa + (4 * kappa**2 + size**2).sqrt()) / size
    a = (size + 2 * kappa + (4 * kappa**2 + size**2).sqrt()) / 4
    d = 4 * a * b / (1 + b) - size * math.log(size)
    cosine, left = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    proposals = dist.Beta(size / 2, size / 2, validate_args=False)
    while bool(left.any()):
        e, u = proposals.sample(kappa.shape), torch.rand_like(kappa)
        proposed = (1 - (1 + b) * e) / (1 - (1 - b) * e)
        t = 2 * a * b / (1 - (1 - b) * e)
        kept = left & (size * t.log() - t + d >= u.log())
        cosine, left = torch.where(kept, proposed, cosine), left & ~kept
    tangent = normalize(torch.randn_like(loc[:, 1:]), dim=-1)
    side = (1 - cosine**2).clamp_min(1e-10).sqrt().unsqueeze(-1) * tangent
    pole = torch.zeros_like(loc)
    pole[:, 0] = 1
    mirror = normalize(pole - loc, dim=-1)
    z = torch.cat([cosine.unsqueeze(-1), side], -1)
    z = z - 2 * (z * mirror).sum(-1, keepdim=True) * mirror
    order = LATENT / 2 - 1
    log_bessel = LogBessel.apply(kappa, order)
    log_q = kappa * (loc * z).sum(-1) + order * kappa.log() - LATENT * HALF_LOG_TWO_PI - log_bessel
    return z, log_q
