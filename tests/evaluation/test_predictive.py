"""Predictive checks: statistics are numpy's, their spread is known in closed form, and p-values are uniform."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from twins import TWINS

from ppl_vae import VAE, Conditional, Program
from ppl_vae.data import mask_missing
from ppl_vae.evaluation import predictive_check
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import Linear


def noisy(scale=0.5):
    """x = z + noise, z ~ N(0, 1); its guide plays no part."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    return Program(model, guide)


def test_statistics_of_draws_have_the_spread_of_means_and_are_numpys():
    """The mean of n draws of N(0, 1.25) has the standard deviation sqrt(1.25 / n)."""
    x, k = torch.randn(50) * 1.25**0.5, 2000
    check = predictive_check(noisy(), {"x": x}, draws=k)
    assert check.names == ["mean", "sd", "smallest", "largest"]
    values = x.numpy()
    np.testing.assert_allclose(check.observed, [values.mean(), values.std(), values.min(), values.max()])
    spread = (1.25 / 50) ** 0.5
    assert abs(check.drawn[:, 0].mean()) < 5 * spread / k**0.5
    assert abs(check.drawn[:, 0].std() - spread) < 5 * spread / (2 * k) ** 0.5
    expected = 1.25 * 49 / 50  # of the mean square around the mean
    assert abs(check.drawn[:, 1].square().mean() - expected) < 5 * expected * (2 / 49 / k) ** 0.5
    below = (check.drawn <= check.observed).double().mean(0)
    np.testing.assert_allclose(check.p_values, 2 * torch.minimum(below, 1 - below), atol=2 / k)
    again = predictive_check(noisy(), {"x": x}, draws=k)
    assert torch.equal(check.drawn, again.drawn)


def test_p_values_are_uniform_on_data_of_the_model_and_a_wrong_one_is_named():
    checks = [predictive_check(noisy(), {"x": torch.randn(30) * 1.25**0.5}, draws=100, seed=i) for i in range(100)]
    values = torch.stack([check.p_values for check in checks])
    assert ((values < 0.2).double().mean(0) - 0.2).abs().max() < 5 * (0.16 / 100) ** 0.5
    assert not any(bool(check.off.any()) for check in checks)
    wrong = predictive_check(noisy(), {"x": 3 + torch.randn(30)}, draws=100)
    assert wrong.off[0]
    first = wrong.summary()["statistics"][0]
    assert (first["name"], first["off"], first["high"] < first["observed"]) == ("mean", True, True)


def test_columns_have_names_and_units_and_leave_out_what_is_missing():
    torch.manual_seed(0)
    parts = Conditional(Normal(2), Linear()), Conditional(Normal(1), Linear())
    vae = VAE(Conditional(StandardNormal(1)), *parts)
    x = torch.randn(20, 2)
    x[3, 1] = torch.nan
    check = predictive_check(vae, mask_missing(x), draws=10, names=["a", "b"], units=lambda rows: 10 * rows + 1)
    assert check.names == [f"{what} of {name}" for what in ("mean", "sd", "smallest", "largest") for name in "ab"]
    np.testing.assert_allclose(check.observed[1], 1 + 10 * np.nanmean(x[:, 1].numpy()), rtol=1e-6)


def test_of_two_values_the_mean_is_all_and_what_is_constant_is_left_out():
    parts = Conditional(Bernoulli(3), Linear()), Conditional(Normal(1), Linear())
    check = predictive_check(VAE(Conditional(StandardNormal(1)), *parts), torch.ones(9, 3).tril(), draws=20)
    assert check.names == ["mean"]


def test_shared_latents_come_from_the_guide():
    """m given y is N(sum / (n + 1), 1 / (n + 1)), so a new mean of y has the variance 1 / (n + 1) + 1 / n."""
    y = torch.tensor([1.0, 0.2, -0.4, 2.0, 1.0])

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def guide(y):
        pyro.sample("m", dist.Normal(3.8 / 6, 6**-0.5))

    k, spread = 1000, (1 / 6 + 1 / 5) ** 0.5
    check = predictive_check(Program(model, guide), {"y": y}, draws=k)
    assert check.n == 1
    assert abs(check.drawn[:, 0].mean() - 3.8 / 6) < 5 * spread / k**0.5
    assert abs(check.drawn[:, 0].std() - spread) < 5 * spread / (2 * k) ** 0.5


@pytest.mark.parametrize("name", sorted(TWINS))
def test_every_wiring_can_be_checked(name):
    t = TWINS[name]()
    check = predictive_check(t.program, t.batch, draws=4)
    assert len(check.names) == len(check.observed) == check.drawn.shape[1] > 0
    assert check.drawn.isfinite().all()


def test_what_the_mask_of_a_site_hides_counts_for_nothing():
    """Words that pad a document are no data, as in `models/dirichlet_allocation.py`."""
    x = torch.cat([torch.randn(40, 2), torch.full((40, 1), 99.0)], 1)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", 3, dim=-2), poutine.mask(mask=(x != 99).T):
                pyro.sample("x", dist.Normal(0.1 * z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    check = predictive_check(Program(model, guide), x, draws=50)
    assert abs(check.observed[0] - x[:, :2].double().mean()) < 1e-6
    assert check.drawn[:, check.names.index("largest")].max() < 10
    assert not check.off.any()


def test_the_steps_of_a_sequence_are_pooled():
    """Each of ten sites is N(0, 1), so the sd of n data and ten steps has the error 1 / sqrt(20 n)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            for step in range(10):
                pyro.sample(f"x_{step}", dist.Normal(0 * z, 1.0), obs=x[:, step])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    check = predictive_check(Program(model, guide), torch.randn(40, 10), draws=200)
    assert check.names == ["mean", "sd", "smallest", "largest"]
    assert abs(check.drawn[:, 1].mean() - 1) < 5 / (800 * 200) ** 0.5 + 1 / 800
    assert abs(check.drawn[:, 1].std() * 800**0.5 - 1) < 5 / 400**0.5


def test_what_cannot_be_checked_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("x", -((x - z) ** 2))

    with pytest.raises(ValueError, match="observes what it could draw"):
        predictive_check(Program(model, noisy().guide), {"x": torch.randn(5)})

    def shared(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    with pytest.raises(ValueError, match="fewer entries than the data"):
        predictive_check(Program(shared, guide), {"x": torch.randn(5, 3)})
    with pytest.raises(ValueError, match="draws"):
        predictive_check(noisy(), {"x": torch.randn(5)}, draws=1)


def test_words_have_shares_in_place_of_moments_of_their_codes():
    """A word of probability 1/2 has a share of standard deviation sqrt(1 / 4n) over sets of n."""

    def model(x):
        with pyro.plate("data", len(x)):
            codes = dist.Categorical(torch.tensor([0.25, 0.25, 0.5])).expand([2]).to_event(1)
            pyro.sample("x", codes, obs=x)

    def guide(x):
        pass

    x, k = torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 1.0], [1.0, 1.0]]), 2000
    words = {"who": ("Adelie", "Chinstrap", "Gentoo"), "sex": ("female", "male")}
    check = predictive_check(Program(model, guide), {"x": x}, draws=k, names=["who", "sex"], words=words)
    shares = {f"share of {word} in who": value for word, value in zip(words["who"], (0.25, 0.25, 0.5), strict=True)}
    assert dict(zip(check.names, check.observed.tolist(), strict=True)) == shares | {"share of male in sex": 0.75}
    gentoo = check.drawn[:, check.names.index("share of Gentoo in who")]
    assert abs(gentoo.mean() - 0.5) < 5 * (0.25 / 4 / k) ** 0.5
    np.testing.assert_allclose(gentoo * 4, (gentoo * 4).round())


def test_codes_of_a_categorical_site_have_shares_in_place_of_moments():
    p = torch.tensor([0.5, 0.3, 0.2])

    def model(y, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Categorical(p), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(y, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.7))

    torch.manual_seed(0)
    y, x = torch.multinomial(p.expand(400, 3), 1)[:, 0], torch.randn(400, 1) * 2**0.5
    check = predictive_check(Program(model, guide), {"y": y, "x": x}, draws=300)
    rows = dict(zip(check.names, zip(check.observed.tolist(), check.drawn.T, strict=True), strict=True))
    assert not {"mean of y", "sd of y", "largest of y"} & rows.keys()
    assert "mean of x" in rows
    for code in range(3):
        own, drawn = rows[f"share of {code} in y"]
        assert own == float((y == code).double().mean())
        assert abs(drawn.mean() - p[code]) < 5 * drawn.std() / 300**0.5
        assert float(drawn.std()) == pytest.approx(float((p[code] * (1 - p[code]) / 400).sqrt()), rel=0.25)
