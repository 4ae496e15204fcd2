import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from families.cases import CASES, LEVELS, near_start
from torch import Tensor
from torch.func import functional_call

from ppl_vae.families import (
    Binomial,
    Categorical,
    Multinomial,
    NegativeBinomial,
    OrderedCategorical,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from ppl_vae.families.family import unconstrained


def _negative_binomial(mean: Any, dispersion: Any, dtype: Any = torch.float64) -> Any:
    raw = torch.stack([unconstrained(torch.tensor(mean)), torch.tensor(dispersion - 1e-6).log()]).to(dtype)
    return NegativeBinomial(1, dispersion="network").to(dtype).distribution(raw)


@pytest.mark.parametrize("mean", [0.01, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dispersion", [0.01, 0.5, 7.0, 49.9, 50.1, 1e3, 1e6, 1e8])
def test_negative_binomial_is_scipys_for_every_dispersion(mean: float, dispersion: float) -> None:
    x = np.array([0.0, 1.0, 2.0, 17.0, 1e3, 2e4])
    chance = dispersion / (dispersion + mean)
    log_failure = -np.log1p(dispersion / mean)  # scipy's log(1 - p) cancels for a large dispersion
    rising = np.array([sum(np.log1p(np.arange(k) / dispersion)) for k in x.astype(int)])
    exact = rising + x * np.log(dispersion) - scipy.special.gammaln(x + 1) + x * log_failure
    exact -= dispersion * np.log1p(mean / dispersion)
    if dispersion < 1e4:
        np.testing.assert_allclose(exact, scipy.stats.nbinom.logpmf(x, dispersion, chance), rtol=1e-8)
    for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        d = _negative_binomial(mean, dispersion, dtype)
        ours = d.log_prob(torch.tensor(x, dtype=dtype).unsqueeze(-1))
        near = rel * (10 + scipy.special.gammaln(x + 1) / 1000)  # gamma functions of this size are subtracted
        assert (np.abs(ours.numpy() - exact) < rel * np.abs(exact) + near).all()
    assert d.mean.item() == pytest.approx(mean, rel=1e-5)
    assert d.variance.item() == pytest.approx(mean + mean**2 / dispersion, rel=1e-4)


def test_negative_binomial_is_a_poisson_with_a_gamma_rate() -> None:
    d = _negative_binomial(3.0, 0.7)
    rates = scipy.stats.gamma(0.7, scale=3.0 / 0.7)
    for x in (0, 1, 5):
        mass = rates.expect(lambda rate, x=x: scipy.stats.poisson.pmf(x, rate), epsabs=1e-12, limit=500)
        assert d.log_prob(torch.tensor([float(x)])).item() == pytest.approx(math.log(mass), rel=1e-6)


SIZED = [Poisson, NegativeBinomial, ZeroInflatedPoisson, ZeroInflatedNegativeBinomial]


@pytest.mark.parametrize("kind", SIZED)
def test_size_factors_multiply_the_rate(kind: Any) -> None:
    family = kind(3)
    raw, x, size = near_start(family, 2, 5), torch.randint(5, (5, 3)).double(), torch.rand(5) + 0.5
    d = family.distribution(raw, size_factor=size)
    torch.testing.assert_close(d.mean, size.unsqueeze(-1) * family.distribution(raw).mean)
    moved = raw.clone()
    moved[..., :3] = unconstrained(size.unsqueeze(-1) * (torch.nn.functional.softplus(raw[..., :3]) + 1e-6))
    mask = torch.rand(5, 3) < 0.5
    for seen in (None, mask):
        ours = family.distribution(raw, seen, size_factor=size).log_prob(x)
        torch.testing.assert_close(ours, family.distribution(moved, seen).log_prob(x), rtol=1e-10, atol=1e-10)
    assert family.takes == ("size_factor",)
    wide = kind((1, 3)).distribution(raw, size_factor=size).log_prob(x.unsqueeze(1))
    torch.testing.assert_close(wide, d.log_prob(x))


# Recovery -------------------------------------------------------------------------------------------------------------

TRUTH: dict[str, tuple[Any, list[float]]] = {
    "Binomial": (lambda: Binomial(1, trials=8), [-1.1]),
    "Poisson": (lambda: Poisson(1), [2.5]),
    "NegativeBinomial": (lambda: NegativeBinomial(1, dispersion="network"), [3.0, 0.3]),
    "NegativeBinomial(feature)": (lambda: NegativeBinomial(1), [3.0, 0.3]),
    "ZeroInflatedPoisson": (lambda: ZeroInflatedPoisson(1), [2.0, -0.4]),
    "ZeroInflatedNegativeBinomial": (lambda: ZeroInflatedNegativeBinomial(1), [8.0, -1.0, 1.5]),
    "Categorical": (lambda: Categorical(1, 4), [0.5, -1.0, 0.0, 1.0]),
    "OrderedCategorical": (lambda: OrderedCategorical(1, 4), [0.0, -1.0, 0.4, 0.9]),
    "Multinomial": (lambda: Multinomial(3), [0.3, -0.5, 0.1]),
}


@pytest.mark.parametrize("name", TRUTH)
def test_maximum_likelihood_from_the_start_recovers_the_parameters(name: str) -> None:
    """Within five standard errors by the information; the last values are those that the family learns itself."""
    make, truth = TRUTH[name]
    family, true = make(), torch.tensor(truth)
    own = {key: value.shape for key, value in family.named_parameters()}
    width = family.start().numel()

    def log_likelihood(flat: Tensor) -> Tensor:
        parts = dict(zip(own, flat[width:].split([s.numel() for s in own.values()]), strict=True)) if own else {}
        shaped = {f"family.{key}": value.reshape(own[key]) for key, value in parts.items()}
        module = torch.nn.Module()
        module.family = family
        module.forward = lambda raw: family.distribution(raw).log_prob(x).sum()  # type: ignore[method-assign]
        return functional_call(module, shaped, (flat[:width],))

    with torch.no_grad():
        for value, key in zip(true[width:].split([s.numel() for s in own.values()]) if own else (), own, strict=True):
            family.get_parameter(key).copy_(value.reshape(own[key]))
        given = {"total": torch.full((3000,), 6.0)} if name == "Multinomial" else {}
        x = family.distribution(true[:width].expand(3000, width), **given).sample()
    start = family.fit_start(x)
    flat = torch.cat([start, *(p.detach().flatten() for p in family.parameters())])
    flat.requires_grad_()
    optimiser = torch.optim.LBFGS([flat], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -log_likelihood(flat) / len(x)
        loss.backward()
        return loss

    optimiser.step(closure)
    information = -torch.autograd.functional.hessian(log_likelihood, flat.detach())
    error = torch.linalg.pinv(information, rtol=1e-8, hermitian=True).diagonal().sqrt()
    free = torch.linalg.pinv(information, rtol=1e-8, hermitian=True) @ information  # leaves out what is not identified
    assert (information.diagonal() > 0).all()
    assert ((free @ (flat.detach() - true)).abs() < 5 * error).all()


# Multinomial and categories -------------------------------------------------------------------------------------------


def test_multinomial_takes_the_totals_of_the_rows() -> None:
    family = Multinomial(4)
    raw = torch.randn(5, 4)
    totals = torch.tensor([0.0, 1.0, 7.0, 1000.0, 3e5])
    d: Any = family.distribution(raw, total=totals)
    draws = d.sample((400,))
    assert (draws.sum(-1) == totals).all()
    chances = scipy.special.softmax(raw.numpy(), -1)
    np.testing.assert_allclose(d.mean, totals.numpy()[:, None] * chances, rtol=1e-10)
    error = (d.variance / 400).sqrt()
    assert ((draws.mean(0) - d.mean).abs() <= 5 * error).all()
    with pytest.raises(ValueError, match="without missing entries for Multinomial.* Use NegativeBinomial or Poisson"):
        family.distribution(raw, torch.tensor([True, False, True, True]), total=totals)
    assert family.takes == ("total",)


def test_multinomial_learns_its_total_from_the_data() -> None:
    family = Multinomial(3)
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 1.0], [2.0, 2.0, 2.0], [4.0, 0.0, 3.0]])
    raw = family.fit_start(x)
    assert family.total == 6
    assert family.distribution(raw).sample((7,)).sum(-1).tolist() == [6] * 7
    np.testing.assert_allclose(raw.softmax(-1), x.sum(0) / x.sum(), rtol=1e-2)
    again = Multinomial(3)
    again.load_state_dict(family.state_dict())
    assert again.total == 6


def test_poissons_given_their_sum_are_multinomial() -> None:
    x, rates = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([1.0, 0.4, 2.0])
    ours = Multinomial(3).distribution(rates.log()).log_prob(x).item()
    each = scipy.stats.poisson.logpmf(x, rates).sum() - scipy.stats.poisson.logpmf(7, rates.sum())
    assert ours == pytest.approx(each, rel=1e-10)


@pytest.mark.parametrize("kind", [Categorical, OrderedCategorical])
@pytest.mark.parametrize("masked", [False, True])
def test_categories_start_at_their_shares(kind: Any, masked: bool) -> None:
    x = CASES["Categorical"].points(kind(4, LEVELS), 50)
    mask = torch.rand(50, 4) < 0.6 if masked else torch.ones(50, 4, dtype=torch.bool)
    family = kind(4, LEVELS)
    raw = family.fit_start(torch.where(mask, x, 0.0), mask if masked else None)
    for j, count in enumerate(LEVELS):
        seen = x[:, j][mask[:, j]]
        for code in range(count):
            share = ((seen == code).sum() + 0.5) / (len(seen) + 0.5 * count)
            only = torch.arange(4) == j
            mass = family.distribution(raw, only).log_prob(torch.full((4,), float(code))).exp()
            assert mass.item() == pytest.approx(share.item(), rel=1e-4)


def test_levels_that_a_feature_lacks_have_no_mass_and_are_refused() -> None:
    for kind in (Categorical, OrderedCategorical):
        family = kind(2, (2, 5))
        assert family.support.check(torch.tensor([1.0, 4.0])).all()
        assert family.support.check(torch.tensor([[2.0, 4.0], [0.5, 5.0], [-1.0, 0.0]])).tolist() == [
            [False, True],
            [False, False],
            [False, True],
        ]
        only = torch.tensor([True, False])
        d = family.distribution(near_start(family), only)
        assert torch.stack(
            [d.log_prob(torch.full((2,), float(k))) for k in (0, 1)]
        ).exp().sum().item() == pytest.approx(1)
        assert not family.reparameterised


def test_a_column_of_one_level_is_certain() -> None:
    for kind in (Categorical, OrderedCategorical):
        family = kind(2, (1, 1))
        raw = family.fit_start(torch.zeros(5, 2))
        assert family.distribution(raw).log_prob(torch.zeros(2)).item() == pytest.approx(0)


def test_a_picture_of_categories_is_its_flat_vector() -> None:
    levels = (3, 2, 5, 4, 2, 3)
    for kind in (Categorical, OrderedCategorical):
        flat, picture = kind(6, levels), kind((2, 3), levels)
        raw, x = near_start(flat, 4), CASES["Categorical"].points(flat, 4)
        torch.testing.assert_close(
            picture.distribution(raw).log_prob(x.reshape(4, 2, 3)), flat.distribution(raw).log_prob(x)
        )
        picture.fit_start(x.reshape(4, 2, 3))


@pytest.mark.parametrize("levels", [(2, 3, 4), (0, 2), 0])
def test_levels_must_fit_the_features(levels: Any) -> None:
    with pytest.raises(ValueError, match="the levels of 2 features, each at least 1; got"):
        Categorical(2, levels)


def test_trials_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="`trials` to be a whole number, at least 1; got 0"):
        Binomial(2, trials=0)
