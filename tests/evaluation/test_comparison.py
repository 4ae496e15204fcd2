"""The guide beside a reference posterior: on twins against the closed form, on a nonlinear pair against numpy."""

import dataclasses
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor
from twins import TWINS, array, perturbed, randomise

from ppl_vae import VAE, Conditional, Program, compare_posteriors
from ppl_vae.families import Bernoulli, MixtureNormal, Normal, StandardNormal
from ppl_vae.infer.reference import Reference, reference_posterior
from ppl_vae.networks import MLP

MOMENTS = ("wasserstein", "mean_error", "scale_ratio")


def pair(posterior: Any, latents: int = 2) -> tuple[VAE, Tensor]:
    """Give a VAE with a tanh network and random weights, and data from it."""
    likelihood = Conditional(Bernoulli(12), MLP(hidden=[8], activation="tanh"))
    vae = VAE(Conditional(StandardNormal(latents)), likelihood, Conditional(posterior, MLP(hidden=[4])))
    randomise(vae.double())
    return vae, vae.sample(3, seed=3)


@pytest.mark.parametrize(
    ("twin", "method"), [(name, "closed-form") for name in TWINS] + [("fixed_scale", "quadrature")]
)
def test_a_reference_finds_what_the_closed_form_finds(twin: str, method: Any) -> None:
    t = TWINS[twin]()
    wrong = perturbed(t.program, 1.2, 0.2)
    reference = reference_posterior(wrong, t.batch, method)
    exact, found = compare_posteriors(wrong, t.batch), compare_posteriors(wrong, t.batch, reference=reference)
    assert all(value.shape == (6,) and value.dtype == torch.float64 for value in vars(found).values())
    assert ((found.kl - exact.kl).abs() < 5 * found.error).all()
    assert torch.equal(found.kl, found.gap)
    for name in MOMENTS:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-6, atol=1e-6)
    shifted = dataclasses.replace(
        reference, log_evidence=reference.log_evidence + 3, loc=reference.loc + reference.covariance.diagonal(0, 1, 2)
    )
    seen = compare_posteriors(wrong, t.batch, reference=shifted)
    assert ((seen.kl - exact.kl).abs() > 5 * seen.error).all()
    for name in MOMENTS[:2]:
        assert ((getattr(seen, name) / getattr(exact, name) - 1).abs() > 0.01).all()


def test_an_exact_guide_is_at_no_distance_from_its_reference() -> None:
    """All weights are equal, so that the draws bring no error."""
    t = TWINS["full_prior"]()
    found = compare_posteriors(t.program, t.batch, reference=reference_posterior(t.program, t.batch), draws=2)
    assert found.kl.abs().max() < 1e-9
    assert found.error.max() < 1e-9
    assert found.wasserstein.max() < 1e-6


def grid(vae: Any, x: Tensor) -> tuple[Any, Any, Any, Any]:
    """Give KL(q || p), log p(x), and the moments of p by numpy's sums over a lattice."""
    line = np.linspace(-14, 14, 801)
    z = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    cell = (line[1] - line[0]) ** 2
    layers = [
        (array(part.weight), array(part.bias))
        for part in vae.likelihood.network.modules()
        if hasattr(part, "in_features")
    ]
    (first, a), (second, b) = layers
    logits = np.tanh(z @ first.T + a) @ second.T + b
    with torch.no_grad():
        log_q = array(vae.approximate(x).log_prob(torch.from_numpy(z).unsqueeze(1))).T  # (n, lattice)
    prior = -0.5 * (z**2).sum(-1) - np.log(2 * np.pi)
    joint = array(x) @ logits.T - np.logaddexp(0, logits).sum(-1) + prior
    evidence = logsumexp(joint, 1) + np.log(cell)
    p, q = (np.exp(log) * cell for log in (joint - evidence[:, None], log_q))
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-6)
    loc = p @ z
    covariance = np.einsum("nk,ky,kz->nyz", p, z, z) - np.einsum("ny,nz->nyz", loc, loc)
    return (q * (log_q - joint + evidence[:, None])).sum(1), evidence, loc, covariance


@pytest.mark.parametrize("family", [Normal(2), MixtureNormal(2, components=3)], ids=["Normal", "MixtureNormal"])
def test_a_nonlinear_pair_against_sums_over_a_lattice(family: Any) -> None:
    vae, x = pair(family)
    kl, evidence, loc, covariance = grid(vae, x)
    reference = reference_posterior(vae, x, "quadrature")
    found = compare_posteriors(vae, x, reference=reference, draws=5000)
    assert (np.abs(array(found.kl) - kl) < 5 * array(found.error)).all()
    assert (kl > 20 * array(found.error)).all()
    with torch.no_grad():
        q: Any = vae.approximate(x)
    scale = np.sqrt(np.diagonal(covariance, 0, 1, 2))
    apart = np.linalg.norm((array(q.mean) - loc) / scale, axis=1)
    ratio = np.exp(np.log(array(q.variance) ** 0.5 / scale).mean(1))
    close = 1e-4 if isinstance(family, Normal) else 0.1
    np.testing.assert_allclose(array(found.mean_error), apart, rtol=close)
    np.testing.assert_allclose(array(found.scale_ratio), ratio, rtol=close)
    doubtful = dataclasses.replace(reference, error=torch.full((3,), 0.5))
    wider = compare_posteriors(vae, x, reference=doubtful, draws=5000).error
    torch.testing.assert_close(wider, (found.error**2 + 0.25).sqrt(), rtol=1e-6, atol=0)
    shifted = dataclasses.replace(reference, log_evidence=torch.from_numpy(evidence - 0.5 * kl))
    assert (np.abs(array(compare_posteriors(vae, x, reference=shifted, draws=5000).kl) - kl) > 0.4 * kl).all()


def test_nuts_has_moments_and_no_evidence() -> None:
    t = TWINS["fixed_scale"]()
    batch = {"x": t.batch["x"][:1]}
    wrong = perturbed(t.program, 1.3, 0.5)
    reference = reference_posterior(wrong, batch, "nuts", draws=100, warmup=50, chains=2)
    found, exact = compare_posteriors(wrong, batch, reference=reference), compare_posteriors(wrong, batch)
    for value in (found.kl, found.gap, found.error):
        assert value.isnan().all()
    assert torch.allclose(found.mean_error, exact.mean_error, atol=5 * (2 / 100) ** 0.5)
    assert torch.allclose(found.scale_ratio, exact.scale_ratio, rtol=5 / 200**0.5)


def test_fewer_effective_chains_than_latents_have_a_distance_too() -> None:
    """The covariance of two points among three latents is singular; against the singular root by scipy's formula."""
    vae, x = pair(Normal(3), 3)
    z = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loc, apart = z.mean(0), (z[0] - z[1]).unsqueeze(-1) / 2
    covariance = apart @ apart.mT  # of one direction: its root is the matrix over its length
    zero = torch.zeros(3, dtype=torch.float64)
    reference = Reference(zero, zero, loc, covariance, "ais", None, {"z": (3,)})
    found = compare_posteriors(vae, x, reference=reference)
    with torch.no_grad():
        q: Any = vae.approximate(x)
    spread = torch.diag_embed(q.variance)
    cross = (apart.mT @ spread @ apart).flatten().sqrt()
    expected = (q.mean - loc).square().sum(1) + (q.variance.sum(1) + apart.square().sum((1, 2)) - 2 * cross)
    torch.testing.assert_close(found.wasserstein, expected.sqrt(), rtol=1e-6, atol=1e-6)


class OneWay(dist.torch_transform.TransformModule):
    """An affine map that keeps what it has mapped, but knows no way back from anything else."""

    domain = codomain = dist.constraints.real
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)

    def _call(self, x: Tensor) -> Tensor:
        return 0.8 * x + 0.3

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, math.log(0.8))


def test_a_guide_that_scores_its_own_draws_alone_is_sampled() -> None:
    """A flow without an inverse that is N(0.3, 0.8^2): beside its Gaussian twin, of which all is known."""
    t = TWINS["one_by_one"]()

    def comparison(q: Any, **more: Any) -> Any:
        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", q.expand([len(x), 1]).to_event(1))

        return compare_posteriors(Program(t.program.model, guide), t.batch, draws=4000, **more)

    zero = torch.zeros((), dtype=torch.float64)
    exact = comparison(dist.Normal(zero + 0.3, 0.8))
    flow = dist.TransformedDistribution(dist.Normal(zero, 1.0), [OneWay()])
    for more in ({}, {"reference": reference_posterior(t.program, t.batch)}):
        found = comparison(flow, **more)
        assert (found.error > 0).all()
        assert ((found.kl - exact.kl).abs() < 5 * found.error).all()
        torch.testing.assert_close(found.scale_ratio, exact.scale_ratio, rtol=5 / 8000**0.5, atol=0)


def test_what_does_not_fit_names_the_remedy() -> None:
    vae, x = pair(Normal(2))
    with pytest.raises(ValueError, match=r"not quadratic\. .* reference=reference_posterior\(program, x\)\)"):
        compare_posteriors(vae, x)
    reference = reference_posterior(vae, x[:2], "quadrature", tolerance=1e-2)
    with pytest.raises(ValueError, match=r"Expected `reference` .* shape \(3, 2\); got \(2, 2\)"):
        compare_posteriors(vae, x, reference=reference)
    with pytest.raises(ValueError, match=r"Expected `reference` to be a Reference .*; got Tensor"):
        compare_posteriors(vae, x, reference=torch.zeros(3))
    for draws in (1, 2.5):
        with pytest.raises(ValueError, match="Expected `draws` to be a whole number, at least 2; got"):
            compare_posteriors(vae, x[:2], reference=reference, draws=draws)  # type: ignore[arg-type]
    mixture, x = pair(MixtureNormal(2, components=3))
    with pytest.raises(ValueError, match="Expected `draws` to exceed the number of latents, 2, by two or more"):
        compare_posteriors(mixture, x[:2], reference=reference, draws=3)
