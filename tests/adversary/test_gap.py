"""The inference gap under attack: its parts lie within five of their errors of closed forms, whatever the guide.

Random linear-Gaussian models, z ~ N(0, I) and x ~ N(W z, s) with entries of W standard normal: 2 to 100 features, 1 to
30 latents, s from 0.01 to 2, features, latents and s uniform in the logarithm. By turns the guide's family is

- diagonal normals, with scales from the network, of each feature, or shared by all;
- normals with full covariance;
- mixtures of 2 to 5 diagonal normals, for two latents or more, where the columns of W are orthogonal, so that the best
  member is the posterior itself.

The guide's answer is untrained (a network at random, on data as they are), or wrong: a normal whose mean lies off the
posterior's by up to 30 of its standard deviations and whose scales are 0.01 to 100 times those, both uniform in the
logarithm, for each datum. A case is a model, five data and a guide; its score is the largest miss of approximation,
amortization and total in their errors, of a datum or of the mean over data. Amortization and total of a mixture whose
components differ are not known and not scored.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae import VAE, Conditional, inference_gap
from ppl_vae.families import FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear, Table

N = 5
PARTS = {"approximation": "approximation_error", "amortization": "amortization_error", "total": "error"}


def case(seed: int) -> tuple[VAE, Tensor, dict[str, Tensor]]:
    """A pair, its data, and the truth: each part of the gap, (n,) in nats."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    kind, untrained = seed % 5, bool(random.integers(2))
    features, latents = round(draw(2, 100)), round(draw(1, 30))
    noise = draw(0.01, 2.0)
    if kind == 4:
        latents = max(2, min(latents, features))
        family: Any = MixtureNormal(latents, components=int(random.integers(2, 6)))
    elif kind == 3:
        family = FullNormal(latents)
    else:
        family = Normal(latents, scale=("network", "feature", "shared")[kind])
    weight = torch.randn(features, latents, generator=generator, dtype=torch.float64)
    if kind == 4:
        weight = torch.linalg.qr(weight).Q * weight.norm(dim=0)
    torch.manual_seed(seed)  # of the untrained network
    vae: Any = VAE(
        Conditional(StandardNormal(latents)),
        Conditional(Normal(features, scale=noise), Linear()),
        Conditional(family, MLP(hidden=[20]) if untrained else Table(N)),
    ).double()
    vae.likelihood.family.fixed_scale = torch.tensor(noise, dtype=torch.float64)
    with torch.no_grad():
        vae.likelihood.network.weight.copy_(weight)
        vae.likelihood.network.bias.zero_()
    z = torch.randn(N, latents, generator=generator, dtype=torch.float64)
    x = z @ weight.T + noise * torch.randn(N, features, generator=generator, dtype=torch.float64)
    precision = torch.eye(latents, dtype=torch.float64) + weight.T @ weight / noise**2
    loc = torch.linalg.solve(precision, weight.T @ x.T / noise**2).T
    widths = precision.diagonal().rsqrt()
    if not untrained:
        side = torch.randn(N, latents, generator=generator, dtype=torch.float64).sign()
        off = torch.tensor([[draw(0.01, 30.0) for _ in range(latents)] for _ in range(N)]) * side
        times = torch.tensor([[draw(0.01, 100.0)] for _ in range(N)])
        members = family.nearest(loc + off * widths, torch.diag_embed((times * widths) ** -2.0))
        with torch.no_grad():
            vae.posterior.network.value.copy_(members["parameters"])
            if kind in (1, 2):
                family.raw_scale.copy_(members["raw_scale"][0])
    return vae, x, _truth(vae, x, loc, precision, family, kind)


def _truth(vae: Any, x: Tensor, loc: Tensor, precision: Tensor, family: Any, kind: int) -> dict[str, Tensor]:
    """The parts in closed form; the guide's NaN where it is a mixture of components that differ."""
    with torch.no_grad():
        q = vae.approximate(x, index=torch.arange(N))
    each, log_det = precision.diagonal(), torch.logdet(precision)
    best = 0.5 * ((len(each) * each.mean().log() if kind == 2 else each.log().sum()) - log_det)
    if kind in (3, 4):
        best = torch.zeros_like(best)
    root = q.scale_tril if kind == 3 else torch.diag_embed(q.stddev)
    miss = (q.mean - loc).unsqueeze(-1)
    square = ((root.mT @ precision @ root).diagonal(dim1=1, dim2=2).sum(1) + (precision @ miss * miss).sum((1, 2))) / 2
    total = square - 0.5 * (len(each) + log_det) - root.diagonal(dim1=1, dim2=2).log().sum(1)
    if kind == 4 and vae.posterior.wants != "index":
        total = total * math.nan
    return {"approximation": best.expand(N), "amortization": total - best, "total": total}


def score(seed: int) -> float:
    """The largest miss of a case in its own errors, of one datum or of the mean over data."""
    vae, x, truth = case(seed)
    gap = inference_gap(vae, {"x": x, "index": torch.arange(N)}, seed=seed)
    scores = []
    for part, error in PARTS.items():
        miss, errors = getattr(gap, part) - truth[part], getattr(gap, error)
        scores += [miss.abs() / (errors + 2e-10), miss.mean().abs() / (errors.square().sum().sqrt() / N + 2e-10)]
    told = torch.cat([each.reshape(-1) for each in scores if not bool(each.isnan().any())])
    return float(told.max())


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """How many cases miss by more than five and fifty of their errors."""
    scores = [score(number) for number in range(seed, seed + count)]
    beyond = {limit: sum(not value <= limit for value in scores) for limit in (5, 50)}
    return {"cases": count, "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_the_parts_of_the_gap_are_those_of_the_closed_form() -> None:
    assert rates(7)["beyond_5"] == 0
