"""Simulation-based calibration and coverage: exact guides pass, wrong ones fail."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.fft import dct
from sklearn.datasets import load_digits
from torch import Tensor
from twins import TWINS, draws, linear_vae, perturbed

from ppl_vae import PPCA, VAE, Conditional, Program
from ppl_vae.evaluation.calibration import Calibration, calibrate
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear, Table
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.simulation import simulate
from ppl_vae.programs.traces import check_batch
from ppl_vae.reports.diagnostic_plots import rank_histograms

twins = pytest.mark.parametrize("twin", TWINS)


@twins
def test_an_exact_guide_passes_and_a_narrow_one_fails(twin: str) -> None:
    """A31, for every wiring: several sites, inner plates, sites a step, masks."""
    t = TWINS[twin]()
    found = calibrate(t.program, t.batch, seed=3)
    assert found.ranks.shape == (1000, t.loc.shape[1])
    assert found.ranks.min() == 0
    assert found.ranks.max() == 99
    assert found.verdict == "no fault found"
    narrow = calibrate(perturbed(t.program, 0.7, 0.0), t.batch, seed=3)
    assert (narrow.p_values < 1e-3).all()
    assert narrow.coverage_p_value < 1e-3
    assert narrow.verdict == "miscalibrated"
    middle = narrow.coverage[50]
    assert abs(found.coverage[50] - 0.5) < 5 * (0.25 / 1000) ** 0.5 < abs(middle - 0.5) + 0.05


@pytest.mark.parametrize("factor", [0.7, 1.4])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_too_wide_and_shifted_guides_fail(factor: float, shift: float) -> None:
    t = TWINS["ppca_vae"]()
    assert calibrate(perturbed(t.program, factor, shift), t.batch).verdict == "miscalibrated"


def test_a_guide_that_ignores_the_data_fails_though_its_ranks_are_uniform() -> None:
    """Draws from the prior have uniform ranks whatever x, and so have distances; log p(x, z) knows of x."""
    vae = linear_vae(StandardNormal(2), Normal(5, scale="shared"))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))

    found = calibrate(Program(vae.model, guide), draws(3, 5))
    assert (found.p_values > 1e-3).all()
    assert found.coverage_p_value > 1e-3
    assert found.joint_p_value < 1e-6
    assert found.verdict == "miscalibrated"


def test_right_marginals_of_a_wrong_dependence_fail() -> None:
    t = TWINS["full_prior"]()

    def guide(x: Tensor) -> None:
        exact = t.program.approximate(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(exact.loc, exact.variance**0.5).to_event(1))

    found = calibrate(Program(t.program.model, guide), t.batch)
    assert (found.p_values > 1e-3).all()
    assert found.verdict == "miscalibrated"


def test_a_rotated_mean_field_guide_fails() -> None:
    """A31: M = 10, the best diagonal guide, at a gap of 0.81 nats."""
    x = torch.from_numpy(load_digits().data)
    plain = PPCA.fit(x, 10)
    ppca = PPCA(plain.loc, plain.weight @ torch.from_numpy(dct(np.eye(10), norm="ortho", axis=0)).T, plain.scale)
    exact: Any = ppca.to_vae()
    vae: Any = VAE(
        Conditional(StandardNormal(10)),
        Conditional(Normal(64, scale="shared"), Linear()),
        Conditional(Normal(10, scale="feature"), Linear()),
    )
    vae.likelihood.load_state_dict(exact.likelihood.state_dict())
    precision = torch.eye(10) + ppca.weight.T @ ppca.weight / ppca.scale**2
    gain = torch.linalg.solve(precision, ppca.weight.T / ppca.scale**2)
    with torch.no_grad():
        vae.posterior.network.weight.copy_(gain)
        vae.posterior.network.bias.copy_(-gain @ ppca.loc)
        vae.posterior.family.raw_scale.copy_((precision.diagonal() ** -0.5 - 1e-6).expm1().log())
    assert calibrate(exact).verdict == "no fault found"
    found = calibrate(vae)
    assert found.verdict == "miscalibrated"
    assert found.coverage_p_value < 1e-3
    assert (found.p_values < 1e-3).sum() > 5


def test_the_verdict_seldom_fails_an_exact_guide() -> None:
    """Over 100 seeds the adjusted p-values stay above what chance gives, and the single ones are uniform."""
    t = TWINS["feature_scale"]()
    found = [calibrate(t.program, t.batch, simulations=400, seed=seed) for seed in range(100)]
    assert sum(one.p_value < 0.05 for one in found) <= stats.binom(100, 0.05).ppf(0.9995)
    singles = torch.cat([one.p_values for one in found]).numpy()
    assert stats.kstest(singles, "uniform").pvalue > 1e-4
    assert stats.kstest([one.coverage_p_value for one in found], "uniform").pvalue > 1e-4
    assert stats.kstest([one.joint_p_value for one in found], "uniform").pvalue > 1e-4
    assert len({one.p_value for one in found}) > 20


@pytest.mark.parametrize("factor", [1.0, 1.15])
@pytest.mark.parametrize("number", [99, 50, 7])
def test_p_values_of_ranks_are_scipys(number: int, factor: float) -> None:
    """With 50 draws the bins are of two sizes, with 7 there is one for each rank."""
    t = TWINS["ppca_vae"]()
    found = calibrate(perturbed(t.program, factor, 0.0), t.batch, draws=number, simulations=500)
    bins = min(20, number + 1)
    expected = 500 * np.bincount(np.arange(number + 1) * bins // (number + 1)) / (number + 1)
    for ranks, p_value in zip([*found.ranks.T, found.joint_ranks], [*found.p_values, found.joint_p_value], strict=True):
        counts = np.bincount(ranks.numpy() * bins // (number + 1), minlength=bins)
        assert float(p_value) == pytest.approx(stats.chisquare(counts, expected).pvalue, rel=1e-8, abs=1e-12)
        assert (float(p_value) > 1e-4) or factor != 1.0


@pytest.mark.parametrize("n", [15, 100, 1000])
def test_the_p_value_of_coverage_is_scipys(n: int) -> None:
    """The greatest distance of coverage from its levels is seen on a grid of 100, so it is known to 1 / 100."""
    t = TWINS["ppca_vae"]()
    for seed, factor in enumerate((1.0, 1.05, 0.9, 1.3)):
        found = calibrate(perturbed(t.program, factor, 0.0), t.batch, simulations=n, seed=seed)
        apart = float((found.coverage - found.levels).abs().max())
        low, high = stats.kstwo.sf(apart + 0.01, n), stats.kstwo.sf(apart, n)
        assert low - 1e-9 <= found.coverage_p_value <= high + 1e-9


@twins
def test_simulated_data_have_the_moments_of_the_model(twin: str) -> None:
    """The joint draws of (z, x) are whitened by the exact posterior: z given x stands where it should."""
    t = TWINS[twin]()
    n = 3000
    batch = {key: value[torch.arange(n) % len(value)] for key, value in t.batch.items()}
    batch = check_batch(t.program, batch)
    with scope(t.program), torch.no_grad():
        drawn, z = simulate(t.program, batch)
    from ppl_vae import exact_posterior

    exact = exact_posterior(t.program, drawn)
    apart = torch.linalg.solve_triangular(exact.scale_tril, (z - exact.loc).unsqueeze(-1), upper=False).squeeze(-1)
    assert (apart.mean(0).abs() < 5 / n**0.5).all()
    assert ((apart.T @ apart / n - torch.eye(z.shape[1])).abs() < 5 * (2 / n) ** 0.5).all()
    rows = drawn["x"][: len(t.batch["x"])]
    assert not drawn["x"].isnan().any()
    assert rows.shape == t.batch["x"].shape
    assert not torch.equal(rows.nan_to_num(), t.batch["x"].nan_to_num())


def test_binary_data_and_no_placeholders() -> None:
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(9), MLP(hidden=[8])),
        Conditional(Normal(2), MLP(hidden=[8])),
    )
    found = calibrate(vae, simulations=200, draws=20)
    assert found.ranks.shape == (200, 2)
    assert found.ranks.max() <= 20
    assert torch.equal(calibrate(vae, torch.zeros(1, 9), simulations=200, draws=20).ranks, found.ranks)


def test_discrete_latents_have_uniform_ranks_too() -> None:
    """Ties are settled by lot."""

    def posterior(x: Tensor) -> Tensor:
        return torch.sigmoid(dist.Normal(1.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(posterior(x[:, 0])))

    def wrong(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(posterior(x[:, 0] + 1)))

    assert calibrate(Program(model, guide), torch.zeros(1, 1)).verdict == "no fault found"
    assert calibrate(Program(model, wrong), torch.zeros(1, 1)).verdict == "miscalibrated"


def test_discrete_latents_may_be_indices() -> None:
    """An entry of a table needs a whole number: the sites keep the type that they are drawn in."""
    table, log_weights = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor([0.2, 0.5, 0.3]).log()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=log_weights))
            a = pyro.sample("a", dist.Normal(table[k], 0.5))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x[:, 0])

    def guide_of(shift: float) -> Any:
        def guide(x: Tensor) -> None:
            scores = log_weights + dist.Normal(table, 1.25**0.5).log_prob(x[:, :1] + shift)
            with pyro.plate("data", len(x), dim=-1):
                k = pyro.sample("k", dist.Categorical(logits=scores))
                pyro.sample("a", dist.Normal(0.8 * table[k] + 0.2 * x[:, 0], 0.2**0.5))

        return guide

    found = calibrate(Program(model, guide_of(0.0)), torch.zeros(1, 1))
    assert found.verdict == "no fault found"
    assert found.ranks.shape == (1000, 2)
    assert calibrate(Program(model, guide_of(1.0)), torch.zeros(1, 1)).verdict == "miscalibrated"


def calibration(p_values: list[float], coverage: float, joint: float) -> Calibration:
    """Ranks of 200 simulations, with these p-values."""
    ranks = torch.arange(200).unsqueeze(-1).repeat(1, len(p_values)) % 100
    levels = torch.linspace(0, 1, 101)
    return Calibration(ranks, torch.tensor(p_values), levels, levels, coverage, ranks[:, 0] // 2, joint, 99, 1e-3)


def test_the_weakest_test_has_a_name() -> None:
    assert calibration([0.5, 0.1], 0.2, 0.3).weakest == "the rank of z1"
    assert calibration([0.5, 0.3], 0.2, 0.3).weakest == "the coverage"
    assert calibration([0.5, 0.3], 0.2, 0.1).weakest == "the rank of log p(x, z)"
    assert calibration([0.5, 0.3], 0.2, 0.1).p_value == pytest.approx(0.4)


def test_the_ranks_of_log_p_are_kept_and_tested() -> None:
    t = TWINS["plain_ppca"]()
    found = calibrate(t.program, t.batch, simulations=200)
    assert found.joint_ranks.shape == (200,)
    counts = np.bincount(found.joint_ranks.numpy() // 10, minlength=10)
    assert found.joint_p_value == pytest.approx(stats.chisquare(counts).pvalue)


def test_the_picture_has_a_panel_of_log_p_and_the_worst_latents() -> None:
    figure = rank_histograms(calibration([0.5, 0.1, 0.9, 0.01, 0.3], 0.2, 0.03), most=3)
    titles = [ax.get_title() for ax in figure.axes]
    named = ["$z_{1}$, p = 0.1", "$z_{3}$, p = 0.01", "$z_{4}$, p = 0.3", "log p(x, z), p = 0.03", "coverage, p = 0.2"]
    assert titles == named
    ranks, joint = figure.axes[0], figure.axes[3]
    heights = [next(patch for patch in ax.patches if hasattr(patch, "get_data")).get_data() for ax in (ranks, joint)]
    np.testing.assert_array_equal(heights[0].values, [10] * 20)
    np.testing.assert_array_equal(heights[1].values, [20] * 10 + [0] * 10)
    assert [ax.get_ylabel() for ax in figure.axes] == ["count", "", "", "count", "share of truths in it"]
    assert "the 3 of 5 latents with the smallest p\ngrey: where 99 %" in figure.texts[0].get_text()
    places = [ax.get_position().x0 for ax in figure.axes]
    assert np.ptp(np.diff(places[:3])) < 1e-9
    assert places[3:] == places[:2]
    assert "of 5 latents" not in rank_histograms(calibration([0.5] * 5, 0.2, 0.3)).texts[0].get_text()


def test_the_picture_writes_nothing_on_other_writing() -> None:
    figure = rank_histograms(calibration([0.5, 1.2e-31, 3.4e-5] + 7 * [0.2], 1.2e-12, 3.4e-21))
    figure.draw_without_rendering()
    whole, boxes = figure.get_window_extent(), [figure.texts[0].get_window_extent()]
    for ax in figure.axes:
        ticks = []
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            ticks += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ticks]
        boxes += [text.get_window_extent() for text in texts if text.get_text()]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= whole.x1 and b.y1 <= whole.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_seed_settles_all_and_leaves_the_world_alone() -> None:
    t = TWINS["two_level"]()
    before = {key: value.clone() for key, value in t.program.state_dict().items()}
    state, x = torch.get_rng_state(), t.batch["x"].clone()
    first, again, other = (calibrate(t.program, t.batch, simulations=150, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.ranks, again.ranks)
    assert torch.equal(first.coverage, again.coverage)
    assert not torch.equal(first.ranks, other.ranks)
    assert torch.equal(t.batch["x"], x)
    assert all(torch.equal(value, t.program.state_dict()[key]) for key, value in before.items())
    assert not list(pyro.get_param_store().keys())


def bad(kind: str) -> Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = x.mean(-1) if kind == "context" else x.new_zeros(len(x))
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            if kind == "factor":
                pyro.factor("f", -(z**2))
            value = x[:, 0] ** 2 + 0.5 if kind == "transformed" else x[:, 0]
            pyro.sample("a", dist.Normal(z, 1.0), obs=value)
            if kind == "twice":
                pyro.sample("b", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    return Program(model, guide)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("factor", "site 'f' is a factor"),
        ("transformed", "site 'a' observes something made of them"),
        ("twice", "observed once; some are observed at several sites"),
        ("context", "changed with the placeholders"),
    ],
)
def test_models_that_data_cannot_be_drawn_from_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(bad(kind), torch.zeros(5, 1))


@pytest.mark.parametrize("kind", ["table", "index", "position"])
def test_guides_that_keep_one_row_per_datum_are_refused(kind: str) -> None:
    x, rows = draws(12, 4), draws(12, 2)
    likelihood = Conditional(Normal(4, scale="shared"), Linear())
    program: Any = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(Normal(2), Table(12)))
    if kind != "table":
        vae: Any = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(Normal(2), Linear()))

        def guide(x: Tensor, index: Tensor | None = None) -> None:
            own = rows if index is None else rows[index]
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(own[: len(x)], 1.0).to_event(1))

        def model(x: Tensor, index: Tensor | None = None) -> None:
            vae.model(x)

        program = Program(model if kind == "index" else vae.model, guide if kind == "index" else lambda x: guide(x))
    with pytest.raises(ValueError, match="keeps one row per datum, and simulated data have none"):
        calibrate(program, x, simulations=20)


def test_settings_are_refused() -> None:
    t = TWINS["plain_ppca"]()
    for options, message in (
        ({"draws": 0}, "Expected `draws` to be a whole number, at least 1; got 0"),
        ({"draws": 9.5}, "Expected `draws` to be a whole number, at least 1; got 9.5"),
        ({"simulations": 1}, "Expected `simulations` to be a whole number, at least 2; got 1"),
        ({"level": 0.0}, "Expected `level` to be above 0 and below 1; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(t.program, t.batch, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected placeholder data `x` for a"):
        calibrate(t.program)
    numpys = calibrate(t.program, t.batch, draws=np.int64(9), simulations=np.int64(20))  # type: ignore[arg-type]
    assert torch.equal(numpys.ranks, calibrate(t.program, t.batch, draws=9, simulations=20).ranks)


def test_ranks_count_the_draws_below_and_settle_ties_by_lot() -> None:
    def latents(low: float) -> Tensor:
        pyro.sample("same", dist.Bernoulli(torch.ones(())))
        z: Tensor = pyro.sample("low", dist.Normal(torch.tensor(low), 0.1))
        return z

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(latents(10.0), 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            latents(-10.0)

    found = calibrate(Program(model, guide), torch.zeros(1, 1), draws=3, simulations=600)
    assert (found.ranks[:, 1] == 3).all()
    counts = torch.bincount(found.ranks[:, 0], minlength=4)
    assert ((counts - 150).abs() < 5 * (600 * 3 / 16) ** 0.5).all()


def test_coverage_does_not_depend_on_the_units_of_a_latent() -> None:
    def pair(unit: float) -> Program:
        units = torch.tensor([1.0, unit])

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), units).to_event(1))
                pyro.sample("x", dist.Normal(z / units, 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(units * x / 2, units * 0.6).to_event(1))

        return Program(model, guide)

    plain, scaled = (calibrate(pair(unit), torch.zeros(1, 2), simulations=200) for unit in (1.0, 1024.0))
    assert torch.equal(plain.ranks, scaled.ranks)
    assert torch.equal(plain.coverage, scaled.coverage)


def test_the_coverage_of_a_guide_that_is_too_sure_lies_below_its_levels() -> None:
    t = TWINS["ppca_vae"]()
    found = calibrate(perturbed(t.program, 0.5, 0.0), t.batch, simulations=500)
    inner = (found.levels > 0.2) & (found.levels < 0.95)
    assert (found.coverage[inner] < found.levels[inner] - 0.05).all()


def test_any_one_test_decides_the_verdict_after_bonferroni() -> None:
    for p_values in (([0.4, 2e-4], 0.5, 0.5), ([0.4, 0.6], 2e-4, 0.5), ([0.4, 0.6], 0.5, 2e-4)):
        found = calibration(*p_values)
        assert found.p_value == pytest.approx(8e-4)
        assert found.verdict == "miscalibrated"
    assert calibration([0.4, 0.6], 3e-4, 0.5).verdict == "no fault found"
