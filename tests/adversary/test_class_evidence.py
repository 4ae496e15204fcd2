"""Class evidence under attack: p(y|x) is within five of its stated errors, and a verdict called certain is right.

Each case has two to six classes, under each of which x is linear-Gaussian: z ~ N(0, I) of one to four latents, x ~
N(W_y z + m_y, s_y^2) of one to six features. Classes lie 0 to 6 apart, their loadings differ by a little or
altogether, noise is from 0.1 to 1. The guide is the posterior of each class but off by up to one posterior deviation
in each latent, with scales from 0.8 to 3 of them, in a quarter of the cases from 0.4; in a third it is off by up to
eight more under classes other than that of the datum, as a trained guide is that has not seen such pairs. Data are
drawn from the classes, from between two of them, or far out; 60 to 4,000 samples. Two thirds of the class priors are
uniform, the others have classes of probability down to 1e-4. The truth: normal densities in closed form.

Counted are data whose classes all have an estimate (`settled`). They are beyond where some log odds, whose error is
the hypotenuse of its two classes' errors, are off by more than five of them and both biases, or where p(y|x) is off by
more than five of its own errors, with the second order of a lognormal added. Any verdict that is neither uncertain nor
open is beyond where another class is ahead by as much.
"""

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae import Program
from ppl_vae.evaluation import ClassEvidence, class_evidence

N = 8


def case(seed: int) -> tuple[Program, Tensor, Tensor, Tensor, int]:
    """A program, data (n, x), log p(x|y) of each class (n, c), the prior of the classes (c,), and the samples."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    classes, size, features = 2 + seed % 5, 1 + seed % 4, 1 + seed % 6
    samples = round(float(uniform(math.log(60), math.log(4000)).exp()))
    alike = (seed // 3) % 2 == 0
    weight = torch.randn(features, size, generator=generator) + (0.1 if alike else 1.0) * torch.randn(
        classes, features, size, generator=generator
    )
    loc = uniform(0, 6) * torch.randn(classes, features, generator=generator)
    noise = uniform(math.log(0.1), 0.0, classes).exp()
    precision = torch.eye(size) + weight.mT @ weight / noise.reshape(-1, 1, 1) ** 2
    encoder = torch.linalg.solve(precision, weight.mT) / noise.reshape(-1, 1, 1) ** 2
    width = precision.diagonal(dim1=1, dim2=2).rsqrt()
    source = torch.arange(N) % classes
    strangers = uniform(0, 8) if seed % 3 == 1 else torch.zeros(())
    shift = width * uniform(-1, 1, classes, size) * (seed // 2 % 3 > 0)
    lost = width * torch.randn(classes, size, generator=generator).sign() * strangers / math.sqrt(size)
    scale = width * uniform(math.log(0.4 if seed % 4 == 0 else 0.8), math.log(3.0), classes, 1).exp()
    law = [
        dist.MultivariateNormal(m, w @ w.T + s**2 * torch.eye(features))
        for m, w, s in zip(loc, weight, noise, strict=True)
    ]
    drawn = torch.stack(
        [law[int(c)].mean + law[int(c)].scale_tril @ torch.randn(features, generator=generator) for c in source]
    )
    x = torch.where((torch.arange(N) < 6).unsqueeze(-1), drawn, (drawn + loc[(source + 1) % classes]) / 2)
    x[-1] = drawn[-1] + 10 * torch.randn(features, generator=generator)
    prior = torch.ones(classes) if seed % 3 else uniform(-9, 0, classes).exp()

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            mean = (weight[y] @ z.unsqueeze(-1)).squeeze(-1) + loc[y]
            pyro.sample("x", dist.Normal(mean, noise[y].unsqueeze(-1)).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        own = (encoder[y] @ (x - loc[y]).unsqueeze(-1)).squeeze(-1) + shift[y]
        own = torch.where((y == source[: len(x)]).unsqueeze(-1), own, own + lost[y])
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(own, scale[y]).to_event(1))

    truth = torch.stack([each.log_prob(x) for each in law], -1)
    return Program(model, guide), x, truth, prior / prior.sum(), samples


def score(found: ClassEvidence, truth: Tensor, prior: Tensor) -> tuple[int, Any]:
    """How many data count, and the largest miss in stated errors."""
    best = found.best.unsqueeze(-1)
    others = torch.ones_like(truth, dtype=torch.bool).scatter(-1, best, False)

    def ahead(values: Tensor) -> Tensor:
        return (values.gather(-1, best) - values)[others].reshape(len(values), -1)

    error = torch.hypot(found.mc_se, found.mc_se.gather(-1, best))[others].reshape(len(truth), -1)
    bias = (found.bias.abs() + found.bias.abs().gather(-1, best))[others].reshape(len(truth), -1)
    odds, right = ahead(prior.log() + found.log_evidence), ahead(prior.log() + truth)
    apart = ((odds - right).abs() - bias - 1e-9).clamp_min(0) / error.clamp_min(1e-12)
    settled = found.settled.all(-1)
    exact = (prior.log() + truth).softmax(-1)
    step = found.error + found.mc_se.square() * found.probability  # a lognormal's second order
    off = ((found.probability - exact).abs() - 1e-9).clamp_min(0) / step.clamp_min(1e-15)
    certain = ~found.uncertain & ~found.open
    wrong = certain & (found.best != (prior.log() + truth).argmax(-1))
    against = ((-right - bias).amax(-1) / error.amax(-1).clamp_min(1e-12)).clamp_min(0)
    worst = torch.maximum(
        torch.where(settled, torch.maximum(apart.amax(-1), off.amax(-1)), 0.0), torch.where(wrong, against, 0.0)
    )
    return int(settled.sum()), worst


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """Cases with a datum that is counted, and those beyond five and fifty."""
    counted, beyond = 0, {5: 0, 50: 0}
    for number in range(seed, seed + count):
        program, x, truth, prior, samples = case(number)
        found = class_evidence(program, x, samples, classes=truth.shape[1], class_prior=prior, seed=number)
        some, worst = score(found, truth, prior)
        counted += some > 0
        for limit in beyond:
            beyond[limit] += int(bool((worst > limit).any()))
    return {"cases": count, "estimates": counted, "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_the_probabilities_of_classes_are_within_their_errors() -> None:
    found = rates(15)
    assert found["beyond_5"] == 0
    assert found["estimates"] >= 2


def test_errors_that_are_ten_times_too_small_would_show() -> None:
    program, x, truth, prior, _ = case(0)
    found = class_evidence(program, x, 20_000, classes=truth.shape[1], class_prior=prior)
    assert bool(found.settled.all())
    assert float(score(found, truth, prior)[1].max()) < 5
    small = replace(found, mc_se=found.mc_se / 10, bias=found.bias / 100)
    assert float(score(small, truth, prior)[1].max()) > 5
