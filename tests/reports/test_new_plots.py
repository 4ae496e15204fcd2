"""Pictures of ways through the latent space, of checks and of bounds: what is drawn is what numpy and torch compute."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from ppl_vae import VAE, Conditional, Program, reports
from ppl_vae.data import Columns, load
from ppl_vae.evaluation.bounds import BoundCurve
from ppl_vae.evaluation.predictive import PredictiveCheck
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP
from ppl_vae.programs.target import Target
from ppl_vae.reports import figures, measures

SHAPE = (2, 3)


def vae_of(latent=3):
    torch.manual_seed(1)
    parts = Conditional(Bernoulli(6), MLP(hidden=[8])), Conditional(Normal(latent), MLP(hidden=[8]))
    return VAE(Conditional(StandardNormal(latent)), *parts)


def cells(figure, rows, columns):
    """The pictures of a mosaic with gaps of one pixel, (rows, columns, *SHAPE)."""
    image = np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)
    return np.array([[image[3 * r : 3 * r + 2, 4 * c : 4 * c + 3] for c in range(columns)] for r in range(rows)])


def decode(vae, z):
    return vae.likelihood(torch.as_tensor(z)).mean.detach().reshape(*np.shape(z)[:-1], *SHAPE).numpy()


def test_interpolations_go_on_the_line_and_on_the_circle():
    vae, ends = vae_of(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    shown = cells(reports.interpolation(vae, ends, shape=SHAPE, count=3), 2, 3)
    half = np.sin(np.pi / 4)  # half of a right angle, over its sine of 1
    circle = [ends[0].numpy(), np.array([half, 2 * half, 0.0]), ends[1].numpy()]
    np.testing.assert_allclose(shown[0], decode(vae, np.stack([ends[0], [0.5, 1.0, 0.0], ends[1]])), atol=1e-12)
    np.testing.assert_allclose(shown[1], decode(vae, np.stack(circle)), atol=1e-12)
    same = cells(reports.interpolation(vae, ends[[0, 0]], shape=SHAPE, count=2), 2, 2)
    np.testing.assert_allclose(same, np.broadcast_to(decode(vae, ends[0].numpy()), same.shape), atol=1e-12)
    assert len(reports.interpolation(vae, ends).axes) == 2
    with pytest.raises(ValueError, match=r"shape \(2, 3\); got \(3, 3\)"):
        reports.interpolation(vae, torch.zeros(3, 3))
    with pytest.raises(TypeError, match="Expected a VAE"):
        reports.interpolation(Program(vae.model, vae.guide), ends)


def test_an_attribute_goes_along_the_regression_of_the_codes_on_it():
    vae, codes, values = vae_of(), torch.randn(40, 3), torch.randn(40)
    shown = cells(reports.attribute(vae, codes, values, shape=SHAPE, rows=[7, 2], count=3), 2, 3)
    slope = LinearRegression().fit(values.numpy()[:, None], codes.numpy()).coef_[:, 0] * values.numpy().std()
    wanted = np.stack([codes[row].numpy() + step * slope for row in (7, 2) for step in (-2, 0, 2)])
    np.testing.assert_allclose(shown, decode(vae, wanted).reshape(2, 3, *SHAPE), atol=1e-12)
    classes = torch.arange(40) % 2
    apart = (codes[classes == 1].mean(0) - codes[classes == 0].mean(0)).numpy() / 2  # a standard deviation is one half
    shown = cells(reports.attribute(vae, codes, classes, shape=SHAPE, rows=[0], count=3), 1, 3)
    np.testing.assert_allclose(shown[0, 2], decode(vae, codes[0].numpy() + 2 * apart), atol=1e-12)
    with pytest.raises(ValueError, match="that varies"):
        reports.attribute(vae, codes, torch.ones(40))
    with pytest.raises(ValueError, match=r"values of shape \(n,\)|values \(n,\)"):
        reports.attribute(vae, codes, values[:3])


def test_traversals_and_grids_go_over_the_range_of_the_data():
    vae, codes = vae_of(), torch.randn(500, 3)
    figure = reports.traversals(vae, shape=SHAPE, codes=codes, latents=[2, 0], count=3)
    low, middle, high = np.quantile(codes, [0.01, 0.5, 0.99], axis=0, method="linear")
    z = np.tile(codes.median(0).values.numpy(), (2, 3, 1))
    for row, latent in enumerate([2, 0]):
        z[row, :, latent] = np.linspace(low[latent], high[latent], 3)
    np.testing.assert_allclose(cells(figure, 2, 3), decode(vae, z), atol=1e-12)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1 %", "99 %"]
    plane, flat = vae_of(2), codes[:, :2]
    shown = cells(reports.latent_grid(plane, shape=SHAPE, size=3, codes=flat), 3, 3)
    up, across = (np.linspace(low[axis], high[axis], 3) for axis in (1, 0))
    wanted = np.stack([[[a, u] for a in across] for u in up[::-1]])
    np.testing.assert_allclose(shown, decode(plane, wanted), atol=1e-12)
    curves = reports.traversals(vae, codes=codes, features=list("abcdef"), count=4)
    assert [t.get_text() for t in curves.axes[2].get_xticklabels()] == list("abcdef")


def test_many_latents_are_shown_on_the_principal_components_that_scikit_learn_finds():
    codes, values = torch.randn(60, 5) * torch.tensor([1.0, 3.0, 0.5, 2.0, 0.1]), torch.randn(60)
    ax = reports.latent_scatter(codes, values, axes=None, quantity="log p(x), nats")
    found = PCA(2).fit(codes.numpy())
    shown = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(np.abs(shown), np.abs(found.transform(codes.numpy())), atol=1e-9)
    assert f"({found.explained_variance_ratio_[0]:.0%})" in ax.get_xlabel()
    assert ax.figure.axes[1].get_ylabel() == "log p(x), nats"
    with pytest.raises(ValueError, match="two latents or more"):
        reports.latent_scatter(torch.randn(5, 1), axes=None)


def test_pairs_are_those_of_the_most_dependent_columns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    x[:, 5] = np.exp(x[:, 2])  # the same ranks
    x[:, 4] = -x[:, 0] + 0.1 * rng.normal(size=200)
    columns = Columns(6, names=tuple("abcdef"))
    figure = reports.scatter_pairs(torch.from_numpy(x), torch.from_numpy(x), columns)
    names = [ax.texts[0].get_text() for ax in figure.axes if ax.texts]
    assert names == ["a", "c", "e", "f"]


def test_draws_stand_above_their_means():
    x, means = torch.rand(3, 6), torch.rand(3, 6)
    figure = reports.samples(x, means=means, shape=SHAPE)
    shown = cells(figure, 2, 3)
    np.testing.assert_allclose(shown[0], x.reshape(3, *SHAPE))
    np.testing.assert_allclose(shown[1], means.reshape(3, *SHAPE))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["draw", "its mean"]


def test_the_epoch_that_was_kept_is_marked():
    ax = reports.training_curve([-3.0, -2.0, -1.0], [-3.0, -2.0, -2.5], kept=2)
    assert ax.lines[-1].get_xdata()[0] == 2
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["training", "validation", "kept: epoch 2"]


def test_points_without_a_known_error_are_hollow():
    error = torch.tensor([[0.1, 0.1], [0.2, 0.2], [float("nan")] * 2])
    curve = BoundCurve(torch.tensor([1, 10, 100]), torch.tensor([[-3.0, -3], [-2.0, -2], [-1.0, -1]]), error)
    ax = reports.bound_over_samples(curve)
    points = {line.get_label(): line for line in ax.lines}
    hollow = points["its error is not known"]
    assert (hollow.get_xdata().tolist(), hollow.get_markerfacecolor()) == ([100], "white")
    bars = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(
        [bar[1, 1] - bar[0, 1] for bar in bars], 4 * np.array([0.1, 0.2]) / np.sqrt(2), rtol=1e-6
    )
    whole = reports.bound_over_samples(dataclasses.replace(curve, error=error.nan_to_num(0.3)))
    assert [t.get_text() for t in whole.get_legend().get_texts()] == ["bound, ± 2 errors"]


def test_coverage_is_drawn_over_the_band_of_the_binomial():
    levels = torch.linspace(0, 1, 11)
    found = SimpleNamespace(levels=levels, coverage=levels**2, ranks=torch.zeros(200, 1))
    ax = reports.expected_coverage(found)
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), levels**2)
    corners = ax.collections[0].get_paths()[0].vertices
    at_half = sorted({y for x, y in corners if abs(x - 0.5) < 1e-6})
    np.testing.assert_allclose(at_half, stats.binom.ppf([0.025, 0.975], 200, 0.5) / 200)


def test_checks_show_what_is_furthest_out_first():
    drawn = torch.randn(50, 3)
    check = PredictiveCheck(["mean", "$\\foo$ of a", "sd"], torch.tensor([0.1, 9.0, 0.5]), drawn, 20)
    figure = reports.predictive_checks(check, most=2)
    first, second = figure.axes
    assert first.get_title().startswith(r"\$\foo\$ of a")
    assert f"p = {2 / 51:.2f}" in first.get_title()
    assert first.lines[0].get_xdata()[0] == 9.0
    assert sum(bar.get_height() for bar in second.patches) == 50
    figure.draw_without_rendering()


def test_moments_are_those_of_guide_and_reference():
    guide, other = {"mean": [1.0, 2.0], "sd": [0.1, 0.2], "error": [0, 0]}, {"mean": [1.5, 2.5], "sd": [0.3, 0.4]}
    sites = {"z": {"guide": guide, "reweighted": guide, "nuts": other, "mean_error": [0.1, -3.0], "mean_bound": None}}
    ax = reports.moments(sites)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["z[1]", "z[0]"]
    reference, own = (container.lines[0] for container in ax.containers)
    np.testing.assert_allclose(reference.get_xdata(), [2.5, 1.5])
    np.testing.assert_allclose(own.get_xdata(), [2.0, 1.0])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["nuts", "guide"]
    assert [t.get_text() for t in reports.moments(sites, most=1).get_yticklabels()] == ["z[1]"]


def test_data_and_draws_have_colours_that_the_colour_blind_tell_apart():
    """Of Okabe and Ito, whose colours differ in lightness too."""
    figure = reports.marginals(torch.rand(40, 1), torch.rand(40, 1), Columns(1, names=("a",)))
    colours = [to_hex(patch.get_edgecolor()) for patch in figure.axes[0].patches[:2]]
    assert colours == ["#0072b2", "#d55e00"]  # blue and vermillion


def test_the_strangest_rows_have_their_rarest_values(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    words = np.where(np.arange(50) % 5 == 0, "seldom", "often")
    lines = ["a,b,c,word", *(",".join([*map(str, row), word]) for row, word in zip(x.tolist(), words, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = load(tmp_path / "t.csv", scaling="standardize")
    vae = VAE(
        Conditional(StandardNormal(1)), Conditional(Normal(4), MLP(hidden=[8])), Conditional(Normal(1), MLP(hidden=[8]))
    )
    target = Target(vae.to(data.train["x"].dtype), data.test)
    evidence = torch.arange(target.n).double()
    evidence[2] = -99
    rows = measures.strangest(target, data, evidence, most=2)
    assert [row["row"] for row in rows] == [2, 0]
    assert rows[0]["log_evidence"] == -99
    own = data.transform.inverse(data.test["x"])[2]
    shown = rows[0]["values"]
    assert len(shown) == 4
    assert all(value == f"{own['abc'.index(name)]:.4g}" for name, value in shown.items() if name != "word")
    assert shown["word"] in ("seldom", "often")
    assert measures.strangest(target, dataclasses.replace(data, columns=Columns(4)), evidence) is None


def test_a_picture_that_would_say_nothing_is_not_drawn(tmp_path):
    """One epoch is no curve, and latents that the data do not move are not shown."""
    data = load("digits")
    data = dataclasses.replace(data, test={key: value[:20] for key, value in data.test.items()})
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Normal(64, scale="shared"), MLP(hidden=[8])),
        Conditional(Normal(2), MLP(hidden=[8])),
    )
    vae.initialise(data.train)
    target = Target(vae.to(data.train["x"].dtype), data.test)
    report = {"test": {"rates": [0.0, 0.001]}}
    drawn = figures.draw_run(target, data, {"elbo": [0.0], "validation": []}, tmp_path, report=report)
    assert drawn.keys() == {"reconstructions.png", "samples.png"}
    report = {"test": {"rates": [0.0, 1.0]}}
    drawn = figures.draw_run(target, data, {"elbo": [0.0, 1.0], "validation": []}, tmp_path, report=report)
    assert {"training.png", "traversals.png", "latents.png", "manifold.png"} <= drawn.keys()
