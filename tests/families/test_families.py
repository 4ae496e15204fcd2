import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from families.cases import CASES, ROLES, Case, roles_of, vae_of
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from ppl_vae import families

BATCHES: list[list[int]] = [[], [3], [2, 3]]


def _parameters_of(family: Any, raw: Tensor) -> list[Tensor]:
    """What the density depends on: those of the network and those that the family learns."""
    return [part for part in (raw, *family.parameters()) if part.numel()]


def test_the_table_holds_every_family() -> None:
    assert {type(case.make(2)).__name__ for case in CASES.values()} == set(families.__all__)
    assert {f"Normal({kind})" for kind in ("network", "shared", "feature", "0.7")} <= set(CASES)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_shapes_and_expand(case: Case) -> None:
    for batch in BATCHES:
        family = case.build()
        d = family.distribution(case.parameters(family, *batch))
        assert (d.batch_shape, d.event_shape) == (torch.Size(batch), torch.Size([case.size]))
        draws = d.sample((5,))
        assert (draws.shape, draws.dtype) == ((5, *batch, case.size), torch.float64)
        assert family.support.check(draws).all()
        x = case.points(family, *batch)
        assert d.log_prob(x).shape == torch.Size(batch)
        wide = d.expand([6, *batch])
        assert (wide.batch_shape, wide.event_shape) == ((6, *batch), (case.size,))
        assert wide.sample().shape == (6, *batch, case.size)
        torch.testing.assert_close(wide.log_prob(x), d.log_prob(x).expand(6, *batch), rtol=1e-13, atol=0)
        if case.moments:
            assert wide.mean.shape == wide.variance.shape == (6, *batch, case.size)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_density_is_that_of_scipy(case: Case) -> None:
    family = case.build()
    raw, x = case.parameters(family, 2, 3), case.points(family, 2, 3)
    ours = family.distribution(raw).log_prob(x)
    for index in np.ndindex(2, 3):
        assert ours[index].item() == pytest.approx(case.density(family, raw[index], x[index]), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_density_integrates_to_one_with_its_moments_and_draws(case: Case, which: int) -> None:
    """The mass, the moments, and that draws have the means of cosines that the density has."""
    family = case.build(case.sizes[which])
    d = family.distribution(case.parameters(family))
    points, weights = case.nodes(family)
    mass = weights * d.log_prob(points).exp()
    assert mass.sum().item() == pytest.approx(1, abs=case.tolerance)
    mean = mass @ points
    spread = (mass @ (points - mean).square()).sqrt()
    if case.moments:
        close = 100 * case.tolerance
        torch.testing.assert_close(d.mean, mean, rtol=close, atol=close)
        torch.testing.assert_close(d.variance, spread**2, rtol=close, atol=close)
    n, draws = 20_000, d.sample((20_000,))
    waves = torch.randn(len(mean), 12) / spread.clamp(0.1, 10).unsqueeze(-1)
    waves[:, :2] *= 4
    shift = 6 * torch.rand(12)
    expected, ours = (torch.cos((at - mean) @ waves + shift) for at in (points, draws))
    error = (mass @ expected.square() - (mass @ expected) ** 2).clamp_min(0).sqrt() / math.sqrt(n)
    assert ((ours.mean(0) - mass @ expected).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.extremes != "none"])
def test_extreme_parameters_are_finite_in_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    family = case.build().to(dtype)
    for part in family.tied:
        part.to(dtype)
    x = case.points(family, 2).to(dtype)
    start = family.start().to(dtype)
    rows = start.numel()
    for extreme in (-50.0, 50.0):
        each = torch.where(torch.eye(rows, dtype=torch.bool), extreme, start)
        both = torch.full((int(case.extremes == "all"), rows), extreme)
        raw = torch.cat([each, both.to(dtype)]).unsqueeze(1).requires_grad_()
        value = family.distribution(raw).log_prob(x)
        assert value.isfinite().all()
        if wanted := _parameters_of(family, raw):
            assert all(bool(part.isfinite().all()) for part in torch.autograd.grad(value.sum(), wanted))
    for extreme in (-50.0, 50.0):
        for parameter in family.parameters():
            torch.nn.init.constant_(parameter, extreme)
        value = family.distribution(start).log_prob(x)
        assert value.isfinite().all()
        if own := list(family.parameters()):
            assert all(bool(part.isfinite().all()) for part in torch.autograd.grad(value.sum(), own))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradients_of_the_density_are_those_of_finite_differences(case: Case) -> None:
    family = case.build(max(case.sizes[-1], 3))
    raw, x = case.parameters(family, 2).requires_grad_(), case.points(family, 2)
    mask = torch.arange(x[0].numel()).expand_as(x) != torch.tensor([[1], [99]])
    if raw.numel():
        for hidden in (None, mask)[: 1 + case.masks]:
            assert torch.autograd.gradcheck(
                lambda raw, hidden=hidden: family.distribution(raw, hidden).log_prob(x), raw
            )


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_density_and_draws_agree_between_precisions(case: Case) -> None:
    family = case.build()
    raw, x = case.parameters(family, 3), case.points(family, 3)
    wide = family.distribution(raw).log_prob(x)
    for part in family.tied:
        part.float()
    d = family.float().distribution(raw.float())
    assert (d.log_prob(x.float()).dtype, d.sample().dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(d.log_prob(x.float()).double(), wide, rtol=1e-4, atol=1e-4)


# Masks ---------------------------------------------------------------------------------------------------------------


MASKED = [pytest.param(case, id=name) for name, case in CASES.items() if case.masks]


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.masks], ids=lambda case: "")
def test_a_mask_is_refused_where_entries_have_no_marginals(case: Case) -> None:
    family = case.build()
    raw = case.parameters(family, 2)
    with pytest.raises(ValueError, match=f"without missing entries for {type(family).__name__}, whose.*; got a mask"):
        family.distribution(raw, torch.ones(2, case.size, dtype=torch.bool))


@pytest.mark.parametrize("case", MASKED)
def test_masked_density_is_that_of_the_observed_entries(case: Case) -> None:
    family = case.build()
    raw, x = case.parameters(family, 6), case.points(family, 6)
    mask = torch.rand(6, case.size) < 0.5
    mask[0], mask[1] = True, False
    d = family.distribution(raw, mask)
    assert (d.batch_shape, d.event_shape) == ((6,), (case.size,))
    ours = d.log_prob(torch.where(mask, x, 1.0))
    for row in range(6):
        expected = case.density(family, raw[row], x[row], mask[row])
        assert ours[row].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(ours[0], family.distribution(raw[0]).log_prob(x[0]))


@pytest.mark.parametrize("case", MASKED)
def test_a_nan_under_the_mask_does_no_harm(case: Case) -> None:
    family = case.build()
    raw, x = case.parameters(family, 5).requires_grad_(), case.points(family, 5)
    mask = torch.rand(5, case.size) < 0.5
    mask[0], mask[1] = True, False
    answers = []
    for hidden in (0.0, math.nan, math.inf, 1e30):
        value = family.distribution(raw, mask).log_prob(torch.where(mask, x, hidden))
        answers.append(value)
        if value.requires_grad:
            gradients = torch.autograd.grad(value.sum(), [raw, *family.parameters()], retain_graph=True)
            assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    for value in answers[1:]:
        assert torch.equal(value, answers[0])


@pytest.mark.parametrize("case", MASKED)
def test_masks_broadcast_against_particles_and_expand(case: Case) -> None:
    family = case.build()
    raw, x, mask = case.parameters(family, 4, 5), case.points(family, 5), torch.rand(5, case.size) < 0.5
    d = family.distribution(raw, mask)
    wide = d.expand([2, 4, 5])
    one = family.distribution(raw, mask[0])
    hidden = torch.where(mask, x, math.nan)
    assert (d.batch_shape, d.log_prob(hidden).shape) == ((4, 5), (4, 5))
    assert (wide.batch_shape, wide.log_prob(hidden).shape) == ((2, 4, 5), (2, 4, 5))
    torch.testing.assert_close(wide.log_prob(hidden)[1], d.log_prob(hidden))
    for k, n in np.ndindex(4, 5):
        assert d.log_prob(hidden)[k, n].item() == pytest.approx(
            case.density(family, raw[k, n], x[n], mask[n]), rel=1e-9, abs=1e-9
        )
        assert one.log_prob(x)[k, n].item() == pytest.approx(
            case.density(family, raw[k, n], x[n], mask[0]), rel=1e-9, abs=1e-9
        )


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_state_dict_deepcopy_and_repr_keep_the_family(case: Case) -> None:
    family = case.build()
    raw, x = case.parameters(family, 2), case.points(family, 2)
    before = family.distribution(raw).log_prob(x)
    twin = copy.deepcopy(family)
    assert type(family).__name__ in repr(family)
    assert repr(twin) == repr(family)
    assert torch.equal(twin.distribution(raw).log_prob(x), before)
    if not family.tied:  # which is not its own state alone
        other = case.make(case.size)
        other.load_state_dict(family.state_dict(), strict=True)
        assert torch.equal(other.distribution(raw).log_prob(x), before)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(family.distribution(raw).log_prob(x), before)
    if list(twin.parameters()):
        assert not torch.equal(twin.distribution(raw).log_prob(x), before)


# Roles ---------------------------------------------------------------------------------------------------------------


def test_roles_follow_from_support_and_reparameterisation() -> None:
    roles = {name: roles_of(case) for name, case in CASES.items()}
    assert roles["Bernoulli"] == ["likelihood"]
    assert roles["StandardNormal"] == ["prior"]
    assert roles["FullNormal"] == roles["MixtureNormal"] == ["prior", "likelihood", "posterior"]


@pytest.mark.parametrize(("elbo", "dtype"), [(Trace_ELBO, torch.float32), (TraceMeanField_ELBO, torch.float64)])
@pytest.mark.parametrize(("case", "role"), ROLES)
def test_gradient_reaches_every_parameter(case: Case, role: str, elbo: Any, dtype: torch.dtype) -> None:
    vae = vae_of(case, role).to(dtype)
    likelihood = vae.likelihood.family
    x = (case.points(likelihood, 7) if role == "likelihood" else torch.randn(7, *likelihood.event_shape)).to(dtype)
    loss = elbo().differentiable_loss(vae.model, vae.guide, x)
    assert loss.dtype == dtype
    loss.backward()
    assert dict(vae.named_parameters())
    for key, parameter in vae.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key
