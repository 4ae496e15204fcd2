"""The inference gap and its two parts, against their closed forms on PPCA and their signs elsewhere."""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from scipy import stats
from scipy.fft import dct
from scipy.special import gammaln, logsumexp
from sklearn.datasets import load_digits
from torch import Tensor
from twins import TWINS, draws, linear_vae, randomise

from ppl_vae import PPCA, VAE, Conditional, Program, Target, compare_posteriors, exact_posterior, fit, log_evidence
from ppl_vae.evaluation.gap import Gap, inference_gap
from ppl_vae.families import Bernoulli, FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear, Table

PARTS = ("total", "approximation", "amortization")


def rotated(latent: int) -> tuple[PPCA, float, Tensor]:
    """PPCA of the digits turned by the orthonormal DCT-II, the gap of its best mean-field guide, and the data."""
    x = torch.from_numpy(load_digits().data)
    ppca = PPCA.fit(x, latent)
    turned = PPCA(ppca.loc, ppca.weight @ torch.from_numpy(dct(np.eye(latent), norm="ortho", axis=0)).T, ppca.scale)
    precision = torch.eye(latent) + turned.weight.T @ turned.weight / turned.scale**2
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    return turned, gap.item(), x


def guided(ppca: PPCA, family: Any, network: Any) -> VAE:
    features, latent = ppca.weight.shape
    vae = VAE(
        Conditional(StandardNormal(latent)),
        Conditional(Normal(features, scale="shared"), Linear()),
        Conditional(family, network),
    )
    vae.likelihood.load_state_dict(ppca.to_vae().likelihood.state_dict())
    return vae


def mean(gap: Gap, part: str) -> tuple[float, float]:
    """Mean of a part over data, and its Monte Carlo error."""
    errors = getattr(gap, "error" if part == "total" else f"{part}_error")
    return getattr(gap, part).mean().item(), errors.square().sum().sqrt().item() / len(errors)


def test_both_parts_of_rotated_ppca_are_those_of_the_closed_forms() -> None:
    """A8 and A32: the family's part does not depend on the datum; the network's is what is left of the exact KL."""
    ppca, known, x = rotated(10)
    assert known == pytest.approx(0.81132250, abs=1e-8)
    vae = guided(ppca, Normal(10), MLP(hidden=[16]))
    vae.posterior.network.centre(x.mean(0), x.std())  # type: ignore[operator]
    fit(vae, x, epochs=3, learning_rate=1e-2, parameters=list(vae.posterior.parameters()), progress=False)
    gap = inference_gap(vae, x[:60], draws=5000)
    exact = compare_posteriors(vae, x[:60]).gap
    assert exact.mean() > 5
    average, error = mean(gap, "approximation")
    assert error < 0.003
    assert abs(average - known) < 0.01
    average, error = mean(gap, "amortization")
    assert abs(average - (exact.mean().item() - known)) < 0.01 + 5 * error
    assert ((gap.total - exact).abs() < 5 * gap.error).all()
    torch.testing.assert_close(gap.approximation + gap.amortization, gap.total)


@pytest.mark.parametrize("scale", ["shared", "feature", "network"])
def test_a_known_wrong_network_is_told_from_the_family(scale: Any) -> None:
    """A linear network attains the best mean-field guide; shifted by d, it leaves half d' P d to amortization."""
    ppca, known, x = rotated(5)
    precision = torch.eye(5) + ppca.weight.T @ ppca.weight / ppca.scale**2
    gain = torch.linalg.solve(precision, ppca.weight.T / ppca.scale**2)
    best = precision.diagonal() ** -0.5
    vae: Any = guided(ppca, Normal(5, scale=scale), Linear())
    if scale == "shared":  # the best isotropic member has the trace of P
        best = (precision.diagonal().mean() ** -0.5).repeat(5)
        known = 0.5 * (5 * precision.diagonal().mean().log() - torch.logdet(precision)).item()
    raw = (best - 1e-6).expm1().log()
    shift = 0.5 * best
    network = vae.posterior.network
    with torch.no_grad():
        network.weight.zero_()
        network.weight[:5] = gain
        network.bias[:5] = -gain @ ppca.loc + shift
        if scale == "network":
            network.bias[5:] = raw
        else:
            vae.posterior.family.raw_scale.copy_(raw[0] if scale == "shared" else raw)
    gap = inference_gap(vae, x[:40], draws=2000)
    average, error = mean(gap, "approximation")
    assert abs(average - known) < 0.01 + 5 * error
    average, error = mean(gap, "amortization")
    assert abs(average - 0.5 * (shift @ precision @ shift).item()) < 0.01 + 5 * error
    assert average > 0.05


def test_a_small_fault_of_the_network_is_not_charged_to_the_family() -> None:
    """As above, with a shift of a tenth of the best scales."""
    ppca, known, x = rotated(5)
    precision = torch.eye(5) + ppca.weight.T @ ppca.weight / ppca.scale**2
    gain = torch.linalg.solve(precision, ppca.weight.T / ppca.scale**2)
    best = precision.diagonal() ** -0.5
    vae: Any = guided(ppca, Normal(5, scale="feature"), Linear())
    with torch.no_grad():
        vae.posterior.network.weight.copy_(gain)
        vae.posterior.network.bias.copy_(-gain @ ppca.loc + 0.1 * best)
        vae.posterior.family.raw_scale.copy_((best - 1e-6).expm1().log())
    gap = inference_gap(vae, x[:60], draws=5000)
    shift = 0.1 * best
    for part, value in (("approximation", known), ("amortization", 0.5 * (shift @ precision @ shift).item())):
        average, error = mean(gap, part)
        assert error < 0.003
        assert abs(average - value) < 0.001 + 5 * error
    assert gap.amortization.mean() > 0.02


@pytest.mark.parametrize("given", [False, True])
def test_the_errors_are_the_spread_over_repeats(given: bool) -> None:
    """A datum many times over: each copy has draws of its own."""
    torch.manual_seed(1)
    vae = nonlinear(Normal(2))
    x = (torch.from_numpy(load_digits().data[500:501]) > 8).double().repeat(300, 1)
    truth = torch.full((300,), -20.0, dtype=torch.float64) if given else None
    gap = inference_gap(vae, x, log_evidence=truth, draws=1000)
    for part in PARTS:
        error = getattr(gap, "error" if part == "total" else f"{part}_error")
        ratio = getattr(gap, part).std().item() / error.square().mean().sqrt().item()
        assert 0.8 < ratio < 1.25, part


def test_the_error_of_the_evidence_is_in_those_of_total_and_approximation() -> None:
    vae = nonlinear(Normal(2))
    x = (torch.from_numpy(load_digits().data[500:505]) > 8).double()
    truth, doubt = torch.full((5,), -20.0).double(), torch.linspace(0.1, 2.0, 5).double()
    sure = inference_gap(vae, x, log_evidence=truth, draws=50, steps=5)
    gap = inference_gap(vae, x, log_evidence=SimpleNamespace(log_evidence=truth, error=doubt), draws=50, steps=5)
    torch.testing.assert_close(gap.error, (sure.error**2 + doubt**2).sqrt())
    torch.testing.assert_close(gap.approximation_error, (sure.approximation_error**2 + doubt**2).sqrt())
    assert torch.equal(gap.amortization_error, sure.amortization_error)


def test_each_datum_gets_its_own_copy_of_a_shared_scale() -> None:
    """With one latent and entries missing, posteriors differ in width, and a normal of its own is each of them."""
    weight = torch.tensor([[1.0], [2.0], [-1.5], [0.5]])
    ppca = PPCA(torch.zeros(4), weight, torch.tensor(0.7))
    vae: Any = guided(ppca, Normal(1, scale="shared"), MLP(hidden=[4])).double()
    x = draws(6, 4)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 1:], mask[2, :3], mask[3, 1] = False, False, False
    gap = inference_gap(vae, {"x": x, "mask": mask}, draws=2000)
    assert (gap.approximation.abs() < 0.002 + 5 * gap.approximation_error).all()
    assert gap.approximation_error.max() < 0.01


@pytest.mark.parametrize("width", [1e-3, 1e-4])
def test_narrow_posteriors_are_met(width: float) -> None:
    """A wide guide, far off in units of the posterior: steps are in those units, whatever the guide's."""
    ppca = PPCA(torch.zeros(4), torch.tensor([[1.0], [2.0], [-1.5], [0.5]]), torch.tensor(3 * width))
    vae: Any = guided(ppca, Normal(1), Linear())
    gap = inference_gap(vae, vae.sample(5), draws=100)
    assert gap.approximation.abs().max() < 1e-6
    assert gap.amortization.min() > 100


def test_posteriors_too_narrow_for_the_family_raise_a_warning() -> None:
    ppca = PPCA(torch.zeros(4), torch.tensor([[1.0], [2.0], [-1.5], [0.5]]), torch.tensor(1e-5))
    vae: Any = guided(ppca, Normal(1), Linear())  # whose own scale is about 1
    with pytest.warns(UserWarning, match=r"of 5 data are narrower than 1e-05.*Rescale the latent variables"):
        inference_gap(vae, vae.sample(5), draws=100)


@pytest.mark.parametrize("family", [FullNormal(10), MixtureNormal(10), Normal(10)], ids=repr)
def test_a_guide_before_any_training_leaves_the_family_its_part_alone(family: Any) -> None:
    """Of raw digits, up to 16, under an exact model: the guide is thousands of nats off, or more."""
    ppca, known, x = rotated(10)
    vae = guided(ppca, family, MLP(hidden=[50]))
    gap = inference_gap(vae, x[:10])
    assert gap.amortization.min() > 20
    bound = 1e-9 if isinstance(family, FullNormal) else known
    assert (gap.approximation < bound + 5 * gap.approximation_error).all()
    if isinstance(family, Normal):
        assert ((gap.approximation - known).abs() < 5 * gap.approximation_error).all()


def test_what_is_left_to_gain_is_in_the_errors() -> None:
    """A climb of two steps knows that it is short."""
    torch.manual_seed(1)
    vae = nonlinear(MixtureNormal(2, components=3))
    x = (torch.from_numpy(load_digits().data[500:510]) > 8).double()
    truth = log_evidence(vae, x, 5000)
    short, whole = (inference_gap(vae, x, log_evidence=truth, steps=steps) for steps in (2, 1000))
    missed = whole.best_elbo - short.best_elbo
    assert (missed < 5 * (short.approximation_error + whole.approximation_error)).all()
    assert missed.max() > 0.02
    torch.testing.assert_close(short.error, whole.error, rtol=0.2, atol=0.0)  # log p(x) - ELBO has no climb in it


def test_a_guide_at_its_best_has_no_amortization_gap_and_an_exact_one_no_gap() -> None:
    x = draws(6, 7)
    exact = TWINS["ppca_vae"]().program
    none = inference_gap(exact, x, draws=10)
    assert all(getattr(none, part).abs().max() < 1e-9 for part in PARTS)
    target = exact_posterior(exact, x)
    full: Any = VAE(
        Conditional(StandardNormal(3)),
        Conditional(Normal(7, scale="shared"), Linear()),
        Conditional(FullNormal(3), Table(6)),
    )
    full.likelihood.load_state_dict(exact.likelihood.state_dict())
    family = full.posterior.family
    with torch.no_grad():
        tril = target.scale_tril.clone()
        tril.diagonal(dim1=-2, dim2=-1).copy_((tril.diagonal(dim1=-2, dim2=-1) - 1e-6).expm1().log())
        full.posterior.network.value.copy_(torch.cat([target.loc, tril[:, family.row, family.column]], -1))
    assert compare_posteriors(full, x).kl.abs().max() < 1e-9
    none = inference_gap(full, x, draws=1000)
    assert all(getattr(none, part).abs().max() < 0.002 for part in PARTS)
    with torch.no_grad():
        full.posterior.network.value.add_(0.3)
    some = inference_gap(full, x, draws=1000)
    assert (some.approximation.abs() < 0.01).all()
    assert (some.amortization > 5 * some.amortization_error).all()


def nonlinear(family: Any) -> VAE:
    x = (torch.from_numpy(load_digits().data) > 8).double()
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(64), MLP(hidden=[16])),
        Conditional(family, MLP(hidden=[16])),
    ).initialise(x[:500])
    fit(vae, x[:500], epochs=8, learning_rate=1e-2, progress=False)
    return vae


@pytest.mark.parametrize("family", [Normal(2), FullNormal(2), MixtureNormal(2, components=3)], ids=repr)
def test_neither_part_is_negative_for_a_nonlinear_pair(family: Any) -> None:
    torch.manual_seed(1)
    vae = nonlinear(family)
    x = (torch.from_numpy(load_digits().data[500:530]) > 8).double()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    gap = inference_gap(vae, x, draws=500, seed=3)
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None or not p.grad.any() for p in vae.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    for part in PARTS:
        value = getattr(gap, part)
        assert value.shape == (30,)
        assert value.dtype == torch.float64
        assert (value > -5 * getattr(gap, "error" if part == "total" else f"{part}_error") - 1e-9).all()
    assert gap.amortization.mean() > 0.05
    estimate = log_evidence(vae, x, 5000)
    assert ((gap.elbo - estimate.elbo).abs() < 5 * (gap.amortization_error + gap.error + 0.1)).all()
    assert abs((gap.log_evidence - estimate.log_evidence).mean().item()) < 0.05
    again = inference_gap(vae, x, draws=500, seed=3)
    assert all(torch.equal(getattr(gap, part), getattr(again, part)) for part in PARTS)
    given = inference_gap(vae, x, log_evidence=estimate, draws=500, seed=3, steps=1)
    torch.testing.assert_close(given.total, estimate.log_evidence - given.elbo)


def test_a_lost_guide_is_charged_to_the_network() -> None:
    """Hundreds of standard deviations off."""
    x = draws(5, 7)
    exact: Any = TWINS["ppca_vae"]().program
    vae: Any = VAE(
        Conditional(StandardNormal(3)),
        Conditional(Normal(7, scale="shared"), Linear()),
        Conditional(Normal(3), Table(5)),
    )
    vae.likelihood.load_state_dict(exact.likelihood.state_dict())
    with torch.no_grad():
        vae.posterior.network.value[:, :3] = 300.0
    gap = inference_gap(vae, x, draws=200)
    precision = torch.linalg.inv(exact_posterior(exact, x).covariance_matrix)
    known = 0.5 * (precision.diagonal(dim1=1, dim2=2).log().sum(1) - torch.logdet(precision))
    assert ((gap.approximation - known).abs() < 5 * gap.approximation_error).all()
    assert (gap.amortization > 1e3).all()


class Bumps(torch.nn.Module):
    """A narrow bump of height 1 and a wide one of half that, which draws whoever begins between them."""

    def forward(self, z: Tensor) -> Tensor:
        return (-50 * (z - 2) ** 2).exp() + 0.5 * (-0.5 * (z + 0.5) ** 2).exp()


def test_a_mode_that_neither_guide_nor_prior_leads_to_by_slopes_is_found() -> None:
    vae: Any = VAE(
        Conditional(StandardNormal(1)), Conditional(Normal(1, scale=0.1), Bumps()), Conditional(Normal(1), Table(3))
    )
    with torch.no_grad():
        vae.posterior.network.value[:] = torch.tensor([-0.5, -1.0])
    x = torch.ones(3, 1)
    grid = torch.linspace(-8, 8, 100_001)
    joint = Target(vae, {"x": x[:1], "index": torch.zeros(1, dtype=torch.long)}).score_sites(
        "model", {"z": grid.reshape(-1, 1, 1)}
    )[:, 0]
    truth = (joint.logsumexp(0) + math.log(16 / 1e5)).expand(3)
    gap = inference_gap(vae, x, log_evidence=truth, draws=500)
    assert gap.from_prior.all()
    assert (gap.approximation < 1).all()  # of the mode at 2, where the other one leaves 8 nats
    assert (gap.amortization > 8).all()


def test_the_guide_is_the_better_start_where_no_draw_of_the_prior_leads() -> None:
    """A bump four and a half standard deviations out, which the guide sits on."""

    class Bump(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (-50 * (z - 4.5) ** 2).exp()

    vae: Any = VAE(
        Conditional(StandardNormal(1)), Conditional(Normal(1, scale=0.02), Bump()), Conditional(Normal(1), Table(3))
    )
    with torch.no_grad():
        vae.posterior.network.value[:] = torch.tensor([4.5, -4.0])
    gap = inference_gap(vae, torch.ones(3, 1), draws=500)
    assert not gap.from_prior.any()
    assert (gap.amortization > -0.01 - 5 * gap.amortization_error).all()


def test_missing_entries_do_not_count() -> None:
    t = TWINS["masked"]()
    vae = VAE(
        copy.deepcopy(t.program.prior), copy.deepcopy(t.program.likelihood), Conditional(FullNormal(3), MLP(hidden=[4]))
    ).double()
    gap = inference_gap(vae, t.batch, draws=500)
    np.testing.assert_allclose(gap.log_evidence, t.log_evidence, rtol=0, atol=1e-9)
    assert (gap.approximation.abs() < 0.02).all()


def test_memory_and_blocks() -> None:
    """`entries` bounds the numbers that are decoded at a time, and changes nothing but the draws."""
    sizes: list[int] = []

    class Watched(Linear):
        def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
            answer = super().forward(context, observed)
            sizes.append(answer.numel())
            return answer

    vae: Any = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Normal(3, scale="shared"), Watched()),
        Conditional(Normal(2), MLP(hidden=[4])),
    ).double()
    vae.likelihood.load_state_dict(linear_vae(StandardNormal(2), Normal(3, scale="shared")).likelihood.state_dict())
    x = draws(7, 3)
    truth = log_evidence(vae, x, 5000)
    whole = inference_gap(vae, x, log_evidence=truth, draws=500)
    sizes.clear()
    parts = inference_gap(vae, x, log_evidence=truth, draws=500, entries=100)
    assert max(sizes) <= 100
    assert ((whole.approximation - parts.approximation).abs() < 0.01 + 5 * 2 * whole.approximation_error).all()


def test_a_target_serves_as_program_and_data() -> None:
    vae: Any = VAE(
        Conditional(StandardNormal(2)), Conditional(Bernoulli(5), Linear()), Conditional(Normal(2), MLP(hidden=[4]))
    )
    randomise(vae)
    x = (draws(4, 5) > 0).double()
    target, pair = inference_gap(Target(vae, x), draws=20, steps=5), inference_gap(vae, x, draws=20, steps=5)
    assert all(torch.equal(getattr(target, part), getattr(pair, part)) for part in PARTS)


def test_the_climb_stays_at_the_exact_posterior() -> None:
    """A27: there each draw's gradient is 0. Gradients with noise would lead away, by some 1e-3 nats at the last."""
    t = TWINS["full_prior"]()
    exact = exact_posterior(t.program, t.batch)
    n, latent = exact.loc.shape
    vae: Any = VAE(t.program.prior, t.program.likelihood, Conditional(FullNormal(latent), Table(n))).double()
    family = vae.posterior.family
    with torch.no_grad():
        tril = exact.scale_tril.clone()
        tril.diagonal(dim1=-2, dim2=-1).copy_((tril.diagonal(dim1=-2, dim2=-1) - 1e-6).expm1().log())
        vae.posterior.network.value.copy_(torch.cat([exact.loc, tril[:, family.row, family.column]], -1))
    gap = inference_gap(vae, t.batch, draws=500)
    for part in (*PARTS, "error", "approximation_error", "amortization_error"):
        assert getattr(gap, part).abs().max() < 1e-9, part


def test_what_has_no_gap_is_refused() -> None:
    vae, x = linear_vae(StandardNormal(2), Normal(5, scale="shared")), draws(4, 5)
    assert inference_gap(Program(vae.model, vae.guide), x, draws=5).family is None
    for options, message in (
        ({"draws": 1}, "Expected `draws` to be a whole number, at least 2; got 1"),
        ({"steps": 0}, "Expected `steps` to be a whole number, at least 1; got 0"),
        ({"log_evidence": torch.zeros(3)}, r"Expected `log_evidence` of shape \(4,\).*got \(3,\)"),
        (
            {"log_evidence": torch.tensor([0.0, math.nan, 0.0, 0.0])},
            "Expected `log_evidence` to be known; got NaN for 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            inference_gap(vae, x, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected data of shape \(n, 5\); got \(4, 6\)"):
        inference_gap(vae, draws(4, 6))


def test_a_model_that_is_written_to_is_caught() -> None:
    class Leaky(Linear):
        def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                self.bias.add_(1e-3)
            return super().forward(context, observed)

    vae = VAE(
        Conditional(StandardNormal(2)), Conditional(Bernoulli(5), Leaky()), Conditional(Normal(2), MLP(hidden=[4]))
    )
    randomise(vae)
    with pytest.raises(RuntimeError, match="Expected the model to stay frozen"):
        inference_gap(vae, (draws(4, 5) > 0).double(), draws=2, steps=1)


def test_shares_with_enumerated_sites_beside_them() -> None:
    """A mixture whose weights alone are unknown: its evidence is the sum over the assignments of five data."""
    x, locs = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]), torch.tensor([0.5, 11.0, 3.0])

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])))
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[part], 2.0), obs=x)

    program = Program(model, "AutoNormal")
    batch = {"x": x}
    fit(program, batch, elbo="TraceEnum_ELBO", epochs=50, batch_size=5, learning_rate=0.1)
    seen = stats.norm(locs.numpy(), 2.0).logpdf(x.numpy()[:, None])
    terms = []
    for parts in itertools.product(range(3), repeat=5):
        alpha = np.array([0.5, 1.0, 2.0])
        counts = alpha + np.bincount(parts, minlength=3)
        dirichlet = gammaln(counts).sum() - gammaln(alpha).sum() + gammaln(alpha.sum()) - gammaln(counts.sum())
        terms.append(dirichlet + seen[range(5), list(parts)].sum())
    gap = inference_gap(program, batch, draws=1000, steps=50)
    assert gap.family == "Normal"
    assert abs(float(gap.total + gap.elbo) - logsumexp(terms)) < 5 * float(gap.error)
    assert 0 < float(gap.approximation) < float(gap.total) + 5 * float(gap.amortization_error)


def test_a_guide_with_one_row_for_each_datum_takes_more_data_than_a_block_holds() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    program, x = Program(model, "AutoNormal"), torch.linspace(-2, 2, 12).unsqueeze(1)
    fit(program, x, epochs=2, batch_size=12, progress=False)
    gap = inference_gap(program, x, draws=20, steps=20, entries=1)
    exact = stats.norm(0.0, math.sqrt(2)).logpdf(x[:, 0].numpy())
    assert torch.allclose(gap.best_elbo, torch.from_numpy(exact), atol=1e-6)  # the family holds the posterior
