import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from families.cases import encoder, perturb
from torch import Tensor

from ppl_vae import VAE, Conditional
from ppl_vae.evaluation.aggregate_posterior import aggregate
from ppl_vae.families import (
    ExactNormal,
    ExemplarPrior,
    Flow,
    FullNormal,
    LowRankNormal,
    MixtureNormal,
    Normal,
    StandardNormal,
    VampPrior,
    VonMisesFisher,
)
from ppl_vae.families.linear_gaussian import LinearGaussian
from ppl_vae.infer.reference import reference_posterior
from ppl_vae.networks import MLP, Linear, Table
from ppl_vae.runs.schema import plays
from ppl_vae.runs.spec import Spec

KINDS: Any = [VampPrior, ExemplarPrior]


def _vae(kind: Any = VampPrior, components: int = 3, **settings: Any) -> VAE:
    posterior = encoder(2)
    prior = Conditional(kind(2, posterior, components=components, **settings))
    return VAE(prior, Conditional(Normal(5, scale="shared"), Linear()), posterior)


@pytest.mark.parametrize("family", [Normal, FullNormal, LowRankNormal, MixtureNormal, Flow, VonMisesFisher])
def test_a29_one_input_is_the_guide_there_and_equal_ones_are_one(family: Any) -> None:
    posterior = Conditional(family(3), MLP(hidden=[4]), context=5)
    perturb(posterior)
    prior = VampPrior(3, posterior, components=4)
    z = posterior(torch.randn(20, 5)).sample()
    with torch.no_grad():
        prior.inputs[1:] = prior.inputs[0]
        ours: Any = prior.distribution(torch.zeros(0))
        q: Any = posterior(prior.inputs[0])
    torch.testing.assert_close(ours.log_prob(z), q.log_prob(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.mean, q.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.variance, q.variance, rtol=1e-9, atol=1e-12)
    single = VampPrior(3, posterior, components=1)
    with torch.no_grad():
        single.inputs.copy_(prior.inputs[:1])
        torch.testing.assert_close(
            single.distribution(torch.zeros(0)).log_prob(z), q.log_prob(z), rtol=1e-10, atol=1e-10
        )
    assert repr(prior.support) == repr(posterior.family.support)


def test_with_all_data_for_inputs_it_is_the_aggregate_posterior() -> None:
    x, vae = torch.randn(50, 5), _vae(components=50, inputs="data")
    vae.prior.family.observe(x)
    ours = aggregate(vae, x, draws=3)
    assert abs(ours.kl) < 1e-12
    assert ours.rate == pytest.approx(ours.mutual_information, abs=1e-12)


def test_evidence_on_a_linear_gaussian_likelihood_is_a_sum_of_closed_forms() -> None:
    """One of the components is 40 deviations off."""
    vae = _vae()
    perturb(vae)
    guide: Any = vae.posterior.network
    with torch.no_grad():
        guide.weight[2:] = 0.0  # so that all components are of one width
        vae.prior.family.inputs[2] *= 100
        q: Any = vae.posterior(vae.prior.family.inputs)
        network: Any = vae.likelihood.network
        scale = vae.likelihood.family.own_scale().expand(5)
        x = vae.sample(6)
        far = vae.likelihood(q.mean[2]).mean
        x = torch.cat([x, far[None]])
        parts = [
            LinearGaussian(loc, torch.diag(width), network.weight, network.bias, scale).log_evidence(x)
            for loc, width in zip(q.mean, q.stddev, strict=True)
        ]
    assert ((q.mean[2] - q.mean[0]).abs() / q.stddev[0]).max() > 40
    truth = torch.stack(parts).logsumexp(0) - math.log(3)
    exact = reference_posterior(vae, x, "quadrature", points=2**14)
    torch.testing.assert_close(exact.log_evidence, truth, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_from_the_mixture_and_large_batches_are_scored_in_parts(kind: Any) -> None:
    vae = _vae(kind, components=40)
    d: Any = vae.prior()
    z = d.expand([60_000]).sample()
    assert z.shape == (60_000, 2)
    error = (d.variance / len(z)).sqrt()
    assert ((z.mean(0) - d.mean).abs() < 5 * error).all()
    with torch.no_grad():
        torch.testing.assert_close(d.log_prob(z)[-5:], d.log_prob(z[-5:]), rtol=1e-12, atol=0)
        assert d.log_prob(z.reshape(3, 20_000, 2)).shape == (3, 20_000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_in_evaluation_mode_and_then_back_in_its_own(kind: Any) -> None:
    network = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)
    )
    posterior = Conditional(Normal(2), network, context=5)
    prior = kind(2, posterior, components=3)
    network[2].eval()
    before, state = [part.training for part in posterior.modules()], copy.deepcopy(network.state_dict())
    z = torch.randn(4, 2)
    scores = [prior.distribution(torch.zeros(0)).log_prob(z) for _ in range(2)]
    assert torch.equal(scores[0], scores[1])
    assert [part.training for part in posterior.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    network.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        prior.distribution(torch.zeros(0))
    assert [part.training for part in posterior.modules()] == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_tie_survives_copies_casts_and_state_dicts(kind: Any) -> None:
    vae, z = _vae(kind), torch.randn(4, 2)
    names = [name for name, _ in vae.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(vae.parameters()))
    assert "prior.family.inputs" in vae.state_dict()
    assert not [name for name in vae.state_dict() if name.startswith("prior") and "network.weight" in name]
    before = vae.prior().log_prob(z)
    twin = copy.deepcopy(vae)
    perturb(twin.posterior)
    assert not torch.allclose(twin.prior().log_prob(z), before)
    assert torch.equal(vae.prior().log_prob(z), before)
    narrow = copy.deepcopy(vae).float()
    torch.testing.assert_close(narrow.prior().log_prob(z.float()).double(), before, rtol=1e-4, atol=1e-4)
    assert narrow.double().prior().log_prob(z).dtype == torch.float64
    other = _vae(kind)
    assert not torch.allclose(other.prior().log_prob(z), before)
    other.load_state_dict(vae.state_dict(), strict=True)
    assert torch.equal(other.prior().log_prob(z), before)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_begin_at_data(kind: Any) -> None:
    vae, x, mask = _vae(kind, components=6), torch.randn(9, 5), torch.rand(9, 5) < 0.7
    vae.initialise(x)
    rows = [(x == row).all(1).nonzero().item() for row in vae.prior.family.inputs]
    assert len(set(rows)) == 6
    vae.prior.family.observe(torch.where(mask, x, math.nan), mask)
    mean = np.nanmean(torch.where(mask, x, math.nan).numpy(), 0)
    filled = torch.where(mask, x, torch.tensor(mean))
    for row in vae.prior.family.inputs:
        assert (filled - row).abs().amax(1).min() < 1e-12
    with pytest.raises(ValueError, match=rf"more components of the {kind.__name__} than training data, 5; got 6.*=5"):
        vae.initialise(x[:5])


def test_inputs_are_learned_or_not() -> None:
    learned = [name for name, _ in _vae().named_parameters()]
    assert "prior.family.inputs" in learned
    fixed = [name for name, _ in _vae(inputs="data", weights="learned").named_parameters()]
    assert "prior.family.inputs" not in fixed
    assert "prior.family.logits" in fixed


def _exact() -> Conditional:
    prior, likelihood = Conditional(StandardNormal(2)), Conditional(Normal(5, scale="shared"), Linear(), context=2)
    return Conditional(ExactNormal(prior, likelihood), context=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_exact, "not tied to the prior, for a {}; got ExactNormal"),
        (lambda: Conditional(Normal(2), Table(9), context=5), "amortized network, such as MLP, for a {}; got Table"),
        (lambda: Conditional(Normal(2), Linear()), "that is built, for a {}: give it `context=`"),
    ],
)
def test_guides_that_no_prior_can_be_made_of_are_refused(kind: Any, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(kind.__name__)):
        kind(2, make())


def test_a_prior_tied_to_another_guide_is_refused() -> None:
    prior = Conditional(VampPrior(2, encoder(2), components=3))
    with pytest.raises(
        ValueError, match="VampPrior that is tied to the posterior of this VAE; got one that is tied to an"
    ):
        VAE(prior, Conditional(Normal(5), Linear()), encoder(2))


def test_other_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="`inputs` to be one of 'learned', 'data'; got 'noise'"):
        VampPrior(2, encoder(2), inputs="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`components` to be a whole number, at least 1; got 0"):
        ExemplarPrior(2, encoder(2), components=0)


# In a spec -----------------------------------------------------------------------------------------------------------


def _tables(prior: dict[str, Any], posterior: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"name": "digits"},
        "model": {"latent": 2},
        "prior": prior,
        "likelihood": {"family": "Normal", "scale": "shared", "network": {"family": "Linear"}},
        "posterior": posterior,
    }


NORMAL: Any = {"family": "Normal", "network": {"family": "MLP", "hidden": [4]}}


def test_they_are_priors_alone() -> None:
    for kind in KINDS:
        assert [role for role in ("prior", "likelihood", "posterior") if plays(kind, role)] == ["prior"]
    assert [role for role in ("prior", "likelihood", "posterior") if plays(ExactNormal, role)] == ["posterior"]


@pytest.mark.parametrize("family", ["VampPrior", "ExemplarPrior"])
def test_a_spec_builds_one_and_starts_at_the_data(family: str) -> None:
    spec = Spec.from_dict(_tables({"family": family, "components": 20}, NORMAL))
    data = spec.load_data()
    program: Any = spec.build(data)
    inputs: Tensor = program.prior.family.inputs.detach()
    assert inputs.shape == (20, 64)
    assert torch.cdist(inputs, data.train["x"].to(inputs)).amin(1).max() < 1e-6
    again: Any = spec.build(data)
    assert torch.equal(again.prior.family.inputs, inputs)


@pytest.mark.parametrize(
    ("keys", "posterior", "message"),
    [
        (
            {},
            {"family": "ExactNormal"},
            "prior: Expected a VampPrior beside a posterior that is not tied.*got ExactNormal",
        ),
        ({}, NORMAL | {"network": {"family": "Table"}}, "prior: .*amortized network.*for a VampPrior; got Table"),
        ({"components": 0}, NORMAL, "prior: Expected `components` to be a whole number, at least 1; got 0"),
        ({"inputs": "noise"}, NORMAL, "prior.inputs"),
    ],
)
def test_a_spec_refuses_what_python_refuses(keys: Any, posterior: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec.from_dict(_tables({"family": "VampPrior", **keys}, posterior))
