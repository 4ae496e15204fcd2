"""Imputation under attack: the mean of what is missing lies within five of its stated errors.

Each case is a mixture of one to three linear-Gaussian parts over one to three latents: z ~ N(m_c, I) with the part c
drawn too, x ~ N(W z, s^2) of two to eight features, noise 0.05 to 2, parts up to 12 apart. Of each of six data some
entries are missing, from one to all. The guide is the mixture of normals that is the exact posterior given what is
observed, but off by up to two posterior deviations, with scales from 0.5 to 3 of them and, where there are parts, with
their probabilities flattened. 100 to 5,000 samples, 20 to 2,000 draws. The truth: Gaussian conditioning, part by part.

Counted are data of whose weights the shape is at most 0.7, above which `Imputation` says not to rely on the draws;
they are beyond where the mean of a missing entry is off by more than five times `error`.
"""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae import Program
from ppl_vae.evaluation import Imputation, impute

N = 6


def case(seed: int) -> tuple[Program, dict[str, Tensor], Tensor, int, int]:
    """A program, its batch, the mean of each entry given the observed ones (n, x), samples and draws."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    parts, size, features = 1 + seed % 3, 1 + (seed // 3) % 3, 2 + seed % 7
    samples, draws = (
        round(math.exp(float(uniform(math.log(low), math.log(high))))) for low, high in ((100, 5000), (20, 2000))
    )
    noise = math.exp(float(uniform(math.log(0.05), math.log(2.0))))
    weight = torch.randn(features, size, generator=generator)
    centres = uniform(0, 6) * torch.randn(parts, size, generator=generator)
    shares = uniform(0.05, 1, parts)
    shares = shares / shares.sum()
    part = torch.multinomial(shares, N, replacement=True, generator=generator)
    z = centres[part] + torch.randn(N, size, generator=generator)
    x = z @ weight.T + noise * torch.randn(N, features, generator=generator)
    mask = torch.rand(N, features, generator=generator) < uniform(0, 1, N, 1)
    mask[0] = False
    mask[1:, 0] = True
    mask[1:, 1] = False

    # The posterior of each part, (n, c, z), and its probability given what is observed.
    seen = mask.double()
    precision = torch.eye(size) + torch.einsum("nf,fy,fz->nyz", seen, weight, weight) / noise**2
    pull = torch.einsum("nf,fz->nz", seen * x, weight) / noise**2
    loc = torch.linalg.solve(precision.unsqueeze(1), (pull.unsqueeze(1) + centres).unsqueeze(-1)).squeeze(-1)
    quadratic = 0.5 * ((precision.unsqueeze(1) @ loc.unsqueeze(-1)).squeeze(-1) * loc).sum(-1)
    given = (shares.log() + quadratic - 0.5 * centres.square().sum(-1)).softmax(-1)
    truth = torch.einsum("nc,ncz,fz->nf", given, loc, weight)

    scale_tril = (
        torch.linalg.cholesky(torch.linalg.inv(precision))
        * uniform(math.log(0.5 if seed % 4 == 0 else 0.8), math.log(3.0)).exp()
    )
    width = precision.diagonal(dim1=1, dim2=2).rsqrt().unsqueeze(1)
    off = loc + width * uniform(-2, 2, parts, size) * (seed // 2 % 2)
    flat = (given.clamp_min(1e-300).log() * uniform(0.3, 1.0)).softmax(-1)

    def model(x: Tensor, mask: Tensor, row: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            normals = dist.Normal(centres, 1.0).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(shares), normals))
            pyro.sample("x", dist.Normal(z @ weight.T, noise).mask(mask).to_event(1), obs=x)

    def guide(x: Tensor, mask: Tensor, row: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            normals = dist.MultivariateNormal(off[row], scale_tril=scale_tril[row].unsqueeze(1))
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(flat[row]), normals))

    return Program(model, guide), {"x": x, "mask": mask, "row": torch.arange(N)}, truth, samples, draws


def score(found: Imputation, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Which data count, (n,), and the largest miss of each in stated errors, (n,)."""
    counted = ~(found.evidence.pareto_k > 0.7)
    miss = torch.where(found.mask, 0.0, (found.mean - truth).abs() - 1e-9).clamp_min(0)
    return counted, (miss / found.error.clamp_min(1e-12)).amax(-1)


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """Cases with a datum that is counted, and those beyond five and fifty."""
    counted, beyond = 0, {5: 0, 50: 0}
    for number in range(seed, seed + count):
        program, batch, truth, samples, draws = case(number)
        some, worst = score(impute(program, batch, samples, draws=draws, seed=number), truth)
        counted += int(bool(some.any()))
        for limit in beyond:
            beyond[limit] += int(bool((some & (worst > limit)).any()))
    return {"cases": count, "estimates": counted, "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_what_is_imputed_lies_within_its_error() -> None:
    found = rates(15)
    assert found["beyond_5"] == 0
    assert found["estimates"] > 10


def test_draws_a_deviation_off_would_show() -> None:
    program, batch, truth, _, _ = case(4)
    found = impute(program, batch, 2000, draws=1000)
    assert float(score(found, truth)[1].max()) < 5
    moved = replace(found, draws=found.draws + torch.where(found.mask, 0.0, found.sd))
    assert float(score(moved, truth)[1].min()) > 5
