import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from families.cases import grid, linear_pair, near_start, perturb, real_line
from torch import Tensor

from ppl_vae import PPCA, VAE, Conditional, fit, log_evidence
from ppl_vae.families import Flow, FullNormal, Normal, StandardNormal
from ppl_vae.families.exact_normal import linear_gaussian
from ppl_vae.infer.reference import reference_posterior
from ppl_vae.networks import MLP, Linear

KINDS: Any = ["autoregressive", "spline", "coupling", "inverse-autoregressive"]


def _flow(kind: Any, size: int, context: int = 0) -> tuple[Flow, Any]:
    """A flow far from a normal, and its distribution."""
    family = Flow(size, kind=kind, transforms=3, hidden=[8], context=context)
    perturb(family)
    return family, family.distribution(near_start(family))


@pytest.mark.parametrize("size", [2, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a28_the_map_has_its_inverse_and_its_volume(kind: str, size: int) -> None:
    for context in (0, 3):
        _, d = _flow(kind, size, context)
        noise = torch.randn(size)
        value, volume = d.there(noise)
        back, less = d.back(value)
        slope = torch.autograd.functional.jacobian(lambda at, d=d: d.there(at)[0], noise)
        torch.testing.assert_close(back, noise, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(volume, slope.slogdet().logabsdet, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(less, -volume, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_near_a_normal_at_the_data(kind: str, size: int) -> None:
    x = torch.randn(300, size) * 7 + 100
    family = Flow(size, kind=kind, context=2)
    d: Any = family.distribution(family.fit_start(x))
    normal = torch.distributions.Normal(x.mean(0), x.std(0, correction=0))
    assert (d.log_prob(x) - normal.log_prob(x).sum(-1)).abs().max() < 0.4
    assert (d.log_prob(x) - normal.log_prob(x).sum(-1)).mean().abs() < 0.05
    torch.testing.assert_close(d.mean, normal.mean, atol=0.5, rtol=0)
    torch.testing.assert_close(d.stddev, normal.stddev, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_density_and_of_draws(kind: str) -> None:
    family = Flow(2, kind=kind, transforms=2, hidden=[8])
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    d: Any = family.distribution(near_start(family)).expand([3])
    points, weights = grid(real_line(2), real_line(2))
    mass = weights * d.log_prob(points.unsqueeze(1)).exp()[:, 0].detach()
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    mean = mass @ points
    spread = (mass @ (points - mean).square()).sqrt()
    assert d.mean.shape == d.stddev.shape == (3, 2)
    assert ((d.mean - mean).abs() < 0.03 * spread).all()
    torch.testing.assert_close(d.stddev, spread.expand(3, 2), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_what_was_drawn_costs_no_inverse_and_is_scoring_anew(kind: str) -> None:
    family = Flow(3, kind=kind, transforms=2, hidden=[5], context=2)
    perturb(family)
    raw = near_start(family, 4).requires_grad_()
    d: Any = family.distribution(raw)

    def gradients(value: Tensor, *more: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value.sum(), [raw, *family.parameters(), *more], retain_graph=True))

    z = d.rsample((6,))
    kept, anew = d.log_prob(z), d.log_prob(z + 0.0)
    torch.testing.assert_close(kept, anew, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(kept), gradients(anew), rtol=1e-7, atol=1e-8)
    fixed = d.sample((6,))  # whose score has a gradient in the parameters, at the value as it stands
    torch.testing.assert_close(gradients(d.log_prob(fixed)), gradients(d.log_prob(fixed.clone())))
    fixed = d.sample((6,)).requires_grad_()
    assert gradients(d.log_prob(fixed), fixed)[-1].abs().max() > 0

    def never(value: Any) -> Any:
        raise AssertionError("the inverse was taken")

    z, d.back = d.rsample((6,)), never
    assert d.log_prob(z).shape == (6, 4)
    with torch.no_grad():
        z = d.sample((6,))
        assert d.log_prob(z).shape == (6, 4)


def test_context_conditions_the_shape() -> None:
    """Without context all members have one shape; with it the skewness of an entry varies."""
    for context in (0, 2):
        family = Flow(2, kind="spline", context=context, hidden=[8])
        perturb(family)
        raw = family.start().repeat(2, 1)
        if context:
            raw[1, -context:] = torch.tensor([3.0, -2.0])
        d: Any = family.distribution(raw)
        same = torch.allclose(d.there(torch.ones(2, 2))[0][0], d.there(torch.ones(2, 2))[0][1])
        assert same == (context == 0)


def test_building_one_changes_nothing_global_and_nothing_else_imports_zuko() -> None:
    code = """
import sys, torch
from ppl_vae import VAE, Conditional, families
families.VonMisesFisher(2), families.LogisticNormal(2), families.MixtureNormal(2)
assert "zuko" not in sys.modules
before = torch.distributions.Distribution._validate_args
torch.manual_seed(0)
flow = families.Flow(3)
assert "zuko" in sys.modules and torch.distributions.Distribution._validate_args == before == True
state = torch.get_rng_state()
repr(flow)
assert torch.equal(state, torch.get_rng_state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "planar"}, "`kind` to be one of 'autoregressive', 'spline', 'coupling'.*; got 'planar'"),
        ({"transforms": 0}, "`transforms` to be a whole number, at least 1; got 0"),
        ({"context": -1}, "`context` to be a whole number, at least 0; got -1"),
        ({"hidden": []}, r"`hidden` to list one or more positive widths; got \[\]"),
    ],
)
def test_other_settings_are_refused(keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow(2, **keys)


def test_a_flow_prior_reaches_the_evidence_of_ppca() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, generator=generator)
    x = torch.randn(400, 2, generator=generator) @ weight.T + 0.5 * torch.randn(400, 4, generator=generator)
    best = PPCA.fit(x, 2).log_evidence(x).mean().item()
    torch.manual_seed(0)
    vae = VAE(
        Conditional(Flow(2, hidden=[16])),
        Conditional(Normal(4, scale="shared"), Linear()),
        Conditional(FullNormal(2), Linear()),
    ).initialise(x)
    settings: Any = {"elbo": "Trace_ELBO", "schedule": "one-cycle", "clip": 0.0, "particles": 1}
    fit(vae, x, epochs=80, batch_size=200, learning_rate=5e-2, **settings)
    reached = log_evidence(vae, x, 200).log_evidence.mean().item()
    assert best - 0.05 < reached < best + 0.1


@pytest.mark.parametrize("kind", ["coupling", "inverse-autoregressive"])
def test_a_flow_guide_estimates_the_exact_evidence(kind: str) -> None:
    prior, likelihood = linear_pair(2, 4, scale=1.5)
    vae = VAE(prior, likelihood, Conditional(Flow(2, kind=kind, hidden=[8], context=2), MLP(hidden=[8])))
    x = torch.randn(10, 4)
    truth = linear_gaussian(prior, likelihood, torch.zeros(0)).log_evidence(x).detach()
    ours = log_evidence(vae, x, 2000)
    apart = (ours.log_evidence.exp() - truth.exp()).mean() / truth.exp().mean()
    assert abs(apart.item()) < 0.1
    assert (ours.log_evidence.mean() - truth.mean()).abs() < 0.1


@pytest.mark.parametrize("kind", ["autoregressive", "inverse-autoregressive"])
def test_a_flow_prior_goes_through_quadrature(kind: str) -> None:
    """Beside importance sampling from the prior itself."""
    family = Flow(2, kind=kind, hidden=[8])
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prior = Conditional(family)
    vae = VAE(prior, Conditional(Normal(3, scale=1.0), Linear()), Conditional(FullNormal(2), Linear()))
    x, draws = torch.randn(3, 3), 200_000
    exact = reference_posterior(vae, x, "quadrature", points=2**16, tolerance=1e-4)
    with torch.no_grad():
        z = vae.prior().sample((draws,))
        log = vae.likelihood(z.unsqueeze(1)).log_prob(x)
    estimate = log.logsumexp(0) - math.log(draws)
    error = (log - estimate).exp().std(0) / draws**0.5
    assert ((estimate - exact.log_evidence).abs() < 5 * error + 1e-3).all()


class Banana(torch.nn.Module):
    """The mean z1 - 2 z0^2, whose posterior is bent around a parabola."""

    def forward(self, z: Tensor) -> Tensor:
        return z[:, 1:] - 2 * z[:, :1] ** 2


def _banana(family: Any) -> tuple[VAE, Tensor]:
    """A pair with this mean, its guide fitted to a single x."""
    torch.manual_seed(0)
    likelihood = Conditional(Normal(1, scale=0.3), Banana())
    vae = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(family, Linear()))
    x = torch.full((64, 1), 0.5)
    settings: Any = {"elbo": "Trace_ELBO", "schedule": "one-cycle", "learning_rate": 4e-2, "batch_size": 64}
    fit(vae, x, epochs=150, progress=False, **settings)
    return vae, x


def test_a_flow_bends_around_a_banana_where_a_normal_does_not() -> None:
    gaps, truth = {}, None
    for name, family in (("flow", Flow(2, kind="inverse-autoregressive", hidden=[16])), ("normal", FullNormal(2))):
        vae, x = _banana(family)
        truth = truth or reference_posterior(vae, x[:1], "quadrature")
        ours = log_evidence(vae, x[:1], 5000)
        gaps[name] = float(truth.log_evidence - ours.elbo)
        assert abs(float(ours.log_evidence - truth.log_evidence)) < 5 * float(ours.mc_se + truth.error)
    assert 0 < 2 * gaps["flow"] < gaps["normal"], gaps
