import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse
from matplotlib.text import Text
from scipy.stats import norm
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae import VAE, Conditional, Program
from ppl_vae.evaluation.bounds import BoundCurve
from ppl_vae.families import Bernoulli, FullNormal, Normal, StandardNormal
from ppl_vae.infer.density_grid import DensityGrid
from ppl_vae.networks import MLP
from ppl_vae.reports import data_plots, diagnostic_plots, latent_plots, posterior_plots

SHAPE = (2, 3)


def _vae(latent: int = 2, prior: Any = None) -> VAE:
    torch.manual_seed(1)
    return VAE(
        Conditional(StandardNormal(latent) if prior is None else prior),
        Conditional(Bernoulli(6), MLP(hidden=[8])),
        Conditional(Normal(latent), MLP(hidden=[8])),
    )


def _pair(n: int, latent: int = 2) -> tuple[Tensor, Tensor]:
    root = torch.randn(n, latent, latent)
    return torch.randn(n, latent), root @ root.mT + 0.1 * torch.eye(latent)


def _plane(loc: Tensor, covariance: Tensor, side: int = 61) -> DensityGrid:
    """Put a Gaussian on a grid of 5 standard deviations along its own axes."""
    if not len(loc):
        return DensityGrid(torch.zeros(0, side, side, 2), *torch.zeros(2, 0, side, side), torch.zeros(0))
    q = MultivariateNormal(loc, covariance)
    t = torch.linspace(-5, 5, side)
    steps = torch.cartesian_prod(t, t).reshape(1, side, side, 2)
    points = loc[:, None, None] + torch.einsum("nyz,nrcz->nrcy", q.scale_tril, steps.expand(len(loc), -1, -1, -1))
    density = q.log_prob(points.permute(1, 2, 0, 3)).exp().permute(2, 0, 1)
    mass = density * (10 / (side - 1)) ** 2 * q.scale_tril.diagonal(dim1=1, dim2=2).prod(-1)[:, None, None]
    return DensityGrid(points, density, mass, torch.zeros(len(loc)))


def _regions(n: int, shape: Any = SHAPE) -> Figure:
    return posterior_plots.regions(_plane(*_pair(n)), _pair(n), kl=torch.rand(n), x=torch.rand(n, 6), shape=shape)


def _ellipses(n: int, shape: Any = SHAPE) -> Figure:
    return posterior_plots.ellipses(_pair(n), _pair(n), x=torch.rand(n, 6), shape=shape)


def _reconstructions(n: int, shape: Any = SHAPE) -> Figure:
    return data_plots.reconstructions(torch.rand(n, 6), torch.rand(n, 6), shape=shape)


# One call a function: with n data (latents for `traversals`, points along an axis for `latent_grid`), a shape or none.
CALLS: dict[str, Callable[..., Any]] = {
    "ellipses": _ellipses,
    "latent_grid": lambda n, shape=SHAPE: latent_plots.latent_grid(_vae(), shape=shape or (1, 6), size=n),
    "latent_scatter": lambda n, shape=SHAPE: latent_plots.latent_scatter(torch.randn(n, 3), torch.arange(n)),
    "reconstructions": _reconstructions,
    "regions": _regions,
    "samples": lambda n, shape=SHAPE: data_plots.samples(torch.rand(n, 6), shape=shape),
    "training_curve": lambda n, shape=SHAPE: data_plots.training_curve([-1.0] * n, [-2.0] * n),
    "traversals": lambda n, shape=SHAPE: latent_plots.traversals(_vae(), latents=range(n), shape=shape),
}


def _figure(drawn: Axes | Figure) -> Figure:
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    assert isinstance(figure, Figure)
    return figure


def _picture(figure: Figure) -> np.ndarray:
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def _lines(ax: Axes) -> np.ndarray:
    return np.array([line.get_ydata() for line in ax.lines])


def _legend(holder: Any) -> list[str]:
    legend = holder.legends[0] if isinstance(holder, Figure) else holder.get_legend()
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("name", CALLS)
def test_without_data_it_refuses(name: str) -> None:
    message = (
        "to be at least 1; got 0" if name == "latent_grid" else "Expected at least one (datum|epoch|latent); got none"
    )
    with pytest.raises(ValueError, match=message):
        CALLS[name](0)


@pytest.mark.parametrize("shape", [SHAPE, None], ids=["picture", "no picture"])
@pytest.mark.parametrize("name", CALLS)
def test_one_datum_draws_without_warning_and_leaves_nothing_behind(name: str, shape: Any, tmp_path: Any) -> None:
    figure = _figure(CALLS[name](1, shape))
    figure.savefig(tmp_path / "figure.png", dpi=50)
    drawn = plt.imread(tmp_path / "figure.png")
    assert len(np.unique(drawn.reshape(-1, drawn.shape[-1]), axis=0)) > 1
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_is_written_lies_outside_the_figure_or_on_other_writing(name: str) -> None:
    figure = _figure(CALLS[name](5 if name != "traversals" else 2))
    figure.draw_without_rendering()
    whole = figure.get_window_extent()
    for ax in figure.axes:
        for label in (ax.xaxis.label, ax.yaxis.label, *(ax.get_legend().get_texts() if ax.get_legend() else [])):
            box = label.get_window_extent()
            assert not label.get_text() or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1)
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        inside = [
            b for b in boxes if ax.get_window_extent().x0 - 1 <= (b.x0 + b.x1) / 2 <= ax.get_window_extent().x1 + 1
        ]
        assert not any(a.overlaps(b) for i, a in enumerate(inside) for b in inside[i + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_any_type_that_require_gradients(dtype: torch.dtype) -> None:
    x = torch.rand(3, 6).to(dtype).requires_grad_()
    assert np.array_equal(_lines(data_plots.samples(x).axes[0]), x.detach().double().numpy())
    q = tuple(part.float().requires_grad_() for part in _pair(2))
    assert len(posterior_plots.ellipses(q, _pair(2)).axes) == 2
    vae = _vae().float()
    assert latent_plots.latent_grid(vae, shape=SHAPE, size=2, gap=0).axes
    assert latent_plots.traversals(vae, base=torch.zeros(2, requires_grad=True)).axes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu_the_pictures_are_the_cpus() -> None:
    here, there = _vae(), _vae().cuda()
    for draw in (
        lambda vae: latent_plots.latent_grid(vae, shape=SHAPE),
        lambda vae: latent_plots.traversals(vae, shape=SHAPE),
    ):
        np.testing.assert_allclose(_picture(draw(there)), _picture(draw(here)), atol=1e-10)
    codes = torch.randn(5, 2)
    drawn = latent_plots.latent_scatter(codes.cuda(), torch.arange(5).cuda(), prior=codes.cuda())
    assert np.array_equal(drawn.collections[0].get_offsets(), codes[:1])


def test_training_curve_draws_the_bounds_over_epochs() -> None:
    elbo, validation = [-3.0, -2.0, -1.5], [-3.5, -2.5, -2.0]
    ax = data_plots.training_curve(elbo, validation)
    assert _lines(ax).tolist() == [elbo, validation]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "ELBO (nats per datum)")
    assert _legend(ax) == ["training", "validation"]
    assert data_plots.training_curve(elbo).get_legend() is None


def test_training_curve_is_not_squashed_by_its_first_epochs() -> None:
    elbo = [-100_000.0, -5_000.0, *np.linspace(-110, -90, 98)]
    low, high = data_plots.training_curve(elbo).get_ylim()
    assert -120 < low < -105
    assert -90 < high < -85
    low, high = data_plots.training_curve([float("-inf"), float("nan"), -2.0, -1.0]).get_ylim()
    assert -3 < low < -1.5
    assert data_plots.training_curve([float("nan")]).lines


def test_training_curve_draws_into_given_axes() -> None:
    ax = Figure().add_subplot()
    assert data_plots.training_curve([-1.0], ax=ax) is ax
    assert latent_plots.latent_scatter(torch.randn(3, 2), ax=ax) is ax


def test_reconstructions_put_data_above_their_means() -> None:
    x, means = torch.rand(3, 6), torch.rand(3, 6)
    figure = data_plots.reconstructions(x, means, shape=SHAPE, count=2)
    picture = _picture(figure)  # cells of 2 by 3, a gap of 1
    assert picture.shape == (5, 7)
    for column in range(2):
        across = slice(4 * column, 4 * column + 3)
        np.testing.assert_allclose(picture[:2, across], x[column].reshape(SHAPE))
        np.testing.assert_allclose(picture[3:, across], means[column].reshape(SHAPE))
    assert np.isnan(picture[2]).all()
    assert np.isnan(picture[:, 3]).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["data", "reconstruction"]
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)


def test_many_reconstructions_go_on_below() -> None:
    x, means = torch.rand(12, 6) * 16, torch.rand(12, 6) * 20
    figure = data_plots.reconstructions(x, means, shape=SHAPE, count=99)
    picture = _picture(figure)
    assert picture.shape == (4 * 3 - 1, 10 * 4 - 1)
    np.testing.assert_allclose(picture[6:8, 4:7], x[11].reshape(SHAPE))
    np.testing.assert_allclose(picture[9:11, 4:7], means[11].reshape(SHAPE))
    assert np.isnan(picture[6:, 8:]).all()
    assert figure.axes[0].images[0].get_clim() == (x.min(), x.max())


def test_reconstructions_of_other_data_are_curves_in_a_panel_each() -> None:
    x, means = torch.randn(7, 4), torch.randn(7, 4)
    figure = data_plots.reconstructions(x, means)
    assert len(figure.axes) == 7
    for row, ax in enumerate(figure.axes):
        assert np.array_equal(_lines(ax), torch.stack([x[row], means[row]]))
    assert _legend(figure) == ["data", "reconstruction"]
    assert len(data_plots.reconstructions(x, means, count=3).axes) == 3


def test_samples_fill_a_square() -> None:
    x = torch.randn(5, 2, 3)
    picture = _picture(data_plots.samples(x, shape=SHAPE))
    assert picture.shape == (2 * 3 - 1, 3 * 4 - 1)
    np.testing.assert_allclose(picture[3:, 4:7], x[4])
    assert np.isnan(picture[3:, 7:]).all()
    assert _picture(data_plots.samples(x, shape=SHAPE, count=1)).shape == SHAPE


def test_missing_entries_stay_blank() -> None:
    x = torch.full((1, 6), float("nan"))
    assert np.isnan(_picture(data_plots.samples(x, shape=SHAPE))).all()
    x[0, 0] = 3.0
    assert data_plots.samples(x, shape=SHAPE).axes[0].images[0].get_clim() == (3.0, 4.0)


def test_latent_scatter_by_label() -> None:
    codes, labels = torch.randn(40, 3), torch.arange(40) % 12
    ax = latent_plots.latent_scatter(codes, labels, axes=(2, 0))
    assert len(ax.collections) == 12
    looks = set()
    for label, seen in enumerate(ax.collections):
        assert np.array_equal(seen.get_offsets(), codes[labels == label][:, [2, 0]])
        looks.add(to_hex(seen.get_facecolor()[0]))
    assert len(looks) == 12
    assert _legend(ax) == [*map(str, range(12)), "N(0, I), 1–3 sd"]
    assert [patch.radius for patch in ax.patches if isinstance(patch, Circle)] == [1, 2, 3]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_{2}$", "$z_{0}$")
    assert ax.get_aspect() == 1


def test_latent_scatter_by_many_values_has_a_colour_bar() -> None:
    values = torch.linspace(0, 5, 13)
    ax = latent_plots.latent_scatter(torch.randn(13, 2), values)
    assert np.array_equal(ax.collections[0].get_array(), values)
    assert len(_figure(ax).axes) == 2
    assert _figure(ax).axes[1].get_ylabel() == "label"


def test_latent_scatter_over_draws_of_the_prior() -> None:
    codes, prior = torch.randn(4, 2), 9 * torch.randn(50, 2)
    ax = latent_plots.latent_scatter(codes, prior=prior)
    assert np.array_equal(ax.collections[0].get_offsets(), codes)
    assert np.array_equal(ax.collections[1].get_offsets(), prior)
    assert not [patch for patch in ax.patches if isinstance(patch, Circle)]
    assert _legend(ax) == ["posterior means", "prior"]
    assert ax.get_xlim()[0] < prior[:, 0].min()
    assert ax.get_ylim()[1] > prior[:, 1].max()


def _tiles(vae: VAE, across: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Decode the plane point by point: the first latent to the right, the second upwards."""
    with torch.no_grad():
        rows = [
            np.hstack([vae.likelihood(torch.tensor([a, b])).mean.reshape(SHAPE).numpy() for a in across])
            for b in reversed(up)
        ]
    return np.vstack(rows)


def test_latent_grid_decodes_the_quantiles_of_a_standard_normal() -> None:
    vae, quantiles = _vae(), norm.ppf((np.arange(5) + 0.5) / 5)
    figure = latent_plots.latent_grid(vae, shape=SHAPE, size=5, gap=0)
    np.testing.assert_allclose(_picture(figure), _tiles(vae, quantiles, quantiles), atol=1e-12)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("$z_{0}$", "$z_{1}$")


def test_latent_grid_decodes_the_quantiles_of_a_learned_normal() -> None:
    vae, u = _vae(prior=Normal(2)), (np.arange(4) + 0.5) / 4
    with torch.no_grad():
        next(vae.prior.parameters()).copy_(torch.tensor([1.0, -2.0, 0.5, 2.0]))
        loc, scale = vae.prior().mean.numpy(), vae.prior().stddev.numpy()
    expected = _tiles(vae, norm.ppf(u, loc[0], scale[0]), norm.ppf(u, loc[1], scale[1]))
    np.testing.assert_allclose(
        _picture(latent_plots.latent_grid(vae, shape=SHAPE, size=4, gap=0)), expected, atol=1e-12
    )


def test_latent_grid_spans_the_draws_of_any_other_prior() -> None:
    vae = _vae(prior=FullNormal(2))
    state = torch.get_rng_state()
    picture = _picture(latent_plots.latent_grid(vae, shape=SHAPE, size=3, gap=0))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        ends = norm.ppf(0.975, vae.prior().mean.numpy(), vae.prior().stddev.numpy())
    points = np.linspace(-ends, ends, 7)[1::2]
    np.testing.assert_allclose(picture, _tiles(vae, points[:, 0], points[:, 1]), atol=0.01)


def test_latent_grid_marks_its_axes_where_the_values_are() -> None:
    figure = latent_plots.latent_grid(_vae(), shape=SHAPE, size=21, gap=0)
    ax = figure.axes[0]
    ticks = dict(zip([label.get_text() for label in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert ticks["0"] == pytest.approx(10 * 2 + 0.5)  # the middle of 21 pictures of height 2
    assert ticks["1"] < ticks["0"] < ticks["\N{MINUS SIGN}1"]


def test_traversals_vary_one_latent_a_row() -> None:
    vae, base = _vae(3), torch.tensor([0.3, -1.0, 2.0])
    figure = latent_plots.traversals(vae, shape=SHAPE, base=base, count=3, latents=[2, 0], spread=1.5)
    picture = _picture(figure)
    for row, latent in enumerate([2, 0]):
        for column, offset in enumerate([-1.5, 0.0, 1.5]):
            z = base.clone()
            z[latent] += offset
            cell = picture[3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
            np.testing.assert_allclose(cell, vae.likelihood(z).mean.detach().reshape(SHAPE), atol=1e-12)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["$z_{2}$", "$z_{0}$"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["\N{MINUS SIGN}1.5", "0", "1.5"]
    assert ax.get_xlabel() == "offset of the latent from its base"


def test_traversals_of_other_data_are_curves_coloured_by_value() -> None:
    vae = _vae(12)
    figure = latent_plots.traversals(vae, count=5)
    *panels, bar = figure.axes
    assert len(panels) == 10
    z = torch.zeros(5, 12)
    z[:, 3] = torch.linspace(-2.5, 2.5, 5)
    np.testing.assert_allclose(_lines(panels[3]), vae.likelihood(z).mean.detach(), atol=1e-12)
    colours = [line.get_color() for line in panels[3].lines]
    mapping = bar._colorbar.mappable
    assert [to_hex(mapping.to_rgba(value)) for value in z[:, 3].tolist()] == [to_hex(colour) for colour in colours]
    assert len(set(map(to_hex, colours))) == 5
    assert bar.get_ylabel() == "value of the latent"
    np.testing.assert_allclose(
        _lines(latent_plots.traversals(vae, count=1, latents=[0]).axes[0])[0],
        vae.likelihood(torch.zeros(12)).mean.detach(),
    )


def test_ellipses_are_the_eigenvectors_and_roots_of_the_eigenvalues() -> None:
    q, p = _pair(6, 3), _pair(6, 3)
    figure = posterior_plots.ellipses(q, p, axes=(2, 0), labels=torch.arange(6) + 4)
    assert len(figure.axes) == 6
    assert [ax.get_title("left") for ax in figure.axes] == ["4", "5", "6", "7", "8", "9"]
    for index, ax in enumerate(figure.axes):
        drawn = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
        assert len(drawn) == 4
        for patch, (loc, covariance), deviations in zip(drawn, (p, p, q, q), (2, 1, 2, 1), strict=True):
            assert patch.get_center() == pytest.approx(loc[index, [2, 0]].tolist())
            angle = np.deg2rad(patch.angle)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            half = np.diag([patch.width / 2, patch.height / 2]) / deviations
            block = covariance[index][[2, 0]][:, [2, 0]]
            np.testing.assert_allclose(turn @ half**2 @ turn.T, block, atol=1e-10)
    assert _legend(figure) == ["exact p(z|x)", "approximate q(z|x)"]


def test_ellipses_have_panels_of_one_width_that_hold_them() -> None:
    q, p = _pair(5), _pair(5)
    figure = posterior_plots.ellipses(q, p)
    figure.draw_without_rendering()
    widths = [np.diff(getattr(ax, f"get_{axis}lim")())[0] for ax in figure.axes for axis in "xy"]
    assert np.ptp(widths) < 1e-10
    for index, ax in enumerate(figure.axes):
        assert np.mean(ax.get_xlim()) == pytest.approx(float(p[0][index, 0]))
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=1e-6)
        for patch in ax.patches:
            inner = patch.get_window_extent()
            assert box.x0 <= inner.x0
            assert inner.x1 <= box.x1
            assert box.y0 <= inner.y0
            assert inner.y1 <= box.y1


def test_ellipses_name_the_divergence_and_show_the_datum() -> None:
    q, p, x = _pair(3), _pair(3), torch.rand(3, 6)
    figure = posterior_plots.ellipses(q, p, x=x, shape=SHAPE)
    kl = kl_divergence(MultivariateNormal(*q), MultivariateNormal(*p))
    for index, ax in enumerate(figure.axes[:3]):
        assert ax.get_title("right") == f"KL {kl[index]:.2f} nats"
        (inset,) = ax.child_axes
        np.testing.assert_allclose(inset.images[0].get_array(), x[index].reshape(SHAPE))
    same = posterior_plots.ellipses(p, p)
    assert {ax.get_title("right") for ax in same.axes} == {"KL < 0.01 nats"}
    assert not same.axes[0].child_axes


def _area(curve: np.ndarray) -> float:
    """Give the area within a closed curve, (points, 2), by the shoelace formula."""
    x, y = curve.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def test_regions_hold_what_they_say_of_either_density() -> None:
    q, p = _pair(6), _pair(6)
    as_moments, as_planes = posterior_plots.regions(_plane(*p), q), posterior_plots.regions(_plane(*p), _plane(*q))
    radii = [math.sqrt(-2 * math.log(1 - share)) for share in (0.95, 0.5)]
    for index, (ax, other) in enumerate(zip(as_moments.axes, as_planes.axes, strict=True)):
        filled, lines = ax.collections
        assert filled.filled
        assert not lines.filled
        for path, radius in zip(lines.get_paths(), radii, strict=True):
            expected = math.pi * radius**2 * math.sqrt(p[1][index].det())
            assert _area(path.vertices[:-1]) == pytest.approx(expected, rel=0.02)
            apart = torch.tensor(path.vertices) - p[0][index]
            distance = (apart * torch.linalg.solve(p[1][index], apart.T).T).sum(-1).sqrt()
            torch.testing.assert_close(distance, torch.full_like(distance, radius), rtol=0.02, atol=0)
        for patch, path, radius in zip(ax.patches, other.collections[2].get_paths(), radii, strict=True):
            known = math.pi * radius**2 * math.sqrt(q[1][index].det())
            assert math.pi * patch.width * patch.height / 4 == pytest.approx(known)
            assert _area(path.vertices[:-1]) == pytest.approx(known, rel=0.02)
            centre = np.mean(path.vertices[:-1], 0)
            assert patch.get_center() == pytest.approx(tuple(q[0][index].tolist()))
            np.testing.assert_allclose(centre, q[0][index], atol=0.3 * math.sqrt(q[1][index].diagonal().max()))
    assert _legend(as_moments) == ["exact p(z|x), by quadrature", "guide q(z|x)"]


def test_regions_tell_the_divergence_and_its_error() -> None:
    kl, error = torch.tensor([0.123, 0.001, -0.02, 2.0]), torch.tensor([0.001, 0.001, 0.03, 0.004])
    p = _pair(4)
    titles = [ax.get_title("right") for ax in posterior_plots.regions(_plane(*p), p, kl=kl, error=error).axes]
    assert titles == ["KL 0.12 nats", "KL < 0.01 nats", "KL -0.02 ± 0.03 nats", "KL 2.00 nats"]
    assert not posterior_plots.regions(_plane(*p), p).axes[0].get_title("right")


def test_regions_have_panels_of_one_width_that_hold_them() -> None:
    q, p = _pair(5), _pair(5)
    figure = posterior_plots.regions(_plane(*p), q)
    figure.draw_without_rendering()
    for axis in "xy":
        assert np.ptp([np.diff(getattr(ax, f"get_{axis}lim")())[0] for ax in figure.axes]) < 1e-10
    for ax in figure.axes:
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=1e-6)
        for drawn in (*ax.patches, ax.collections[1]):
            inner = drawn.get_window_extent()
            assert box.x0 <= inner.x0
            assert inner.x1 <= box.x1
            assert box.y0 <= inner.y0
            assert inner.y1 <= box.y1


def test_regions_are_not_covered_by_the_picture_or_the_words() -> None:
    for turn in range(3):
        torch.manual_seed(turn)
        q, p, n = _pair(8), _pair(8), 8
        p = (torch.where(torch.arange(n)[:, None] < 4, q[0], p[0]), q[1])  # half of them alike
        kl, error = torch.linspace(0, 12.34, n), torch.full((n,), 0.05)
        more = {"kl": kl, "error": error, "labels": range(n), "x": torch.rand(n, 64), "shape": (8, 8)}
        figure = posterior_plots.regions(_plane(*p), q, **more)
        figure.draw_without_rendering()
        for row, ax in enumerate(figure.axes):
            box, picture = ax.get_window_extent(), ax.child_axes[0].get_window_extent()
            written = {one.get_text(): one.get_window_extent() for one in ax.get_children() if isinstance(one, Text)}
            label, words = (written[ax.get_title(side)] for side in ("left", "right"))
            assert words.y0 >= box.y1
            assert box.x0 <= label.x0 < label.x1 < words.x0 < words.x1 <= box.x1 + 1
            ticks = [tick.get_window_extent() for tick in figure.axes[row - 4].get_xticklabels()] if row >= 4 else []
            assert not any(tick.overlaps(title) for tick in ticks for title in (label, words))
            paths = [patch.get_transform().transform_path(patch.get_path()) for patch in ax.patches]
            paths += [ax.transData.transform_path(path) for path in ax.collections[1].get_paths()]
            assert not any(path.intersects_bbox(picture, filled=True) for path in paths)


@pytest.mark.parametrize(
    ("mean", "words"),
    [(-1e-9, "0.00"), (-0.0034, "\N{MINUS SIGN}0.0034"), (0.00027, "0.00027"), (-0.126, "\N{MINUS SIGN}0.13")],
)
def test_gap_parts_write_small_means_and_hide_no_bar(mean: float, words: str) -> None:
    ax = diagnostic_plots.gap_parts(torch.tensor([1.2]), torch.tensor([mean]).double())
    assert _legend(ax) == ["approximation, mean 1.20", f"amortization, mean {words}"]
    _figure(ax).draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1


def test_the_bound_is_written_without_an_offset() -> None:
    bound = -176.998 + torch.tensor([[0.0], [1e-4], [2e-4]], dtype=torch.float64)
    ax = diagnostic_plots.bound_over_samples(BoundCurve(torch.tensor([1, 10, 100]), bound, torch.full((3, 1), 1e-5)))
    _figure(ax).draw_without_rendering()
    assert ax.yaxis.get_offset_text().get_text() == ""


def test_the_limits_of_the_tails_are_named_above_the_curve() -> None:
    ax = diagnostic_plots.tail_shapes(torch.linspace(-1, 5, 200))
    _figure(ax).draw_without_rendering()
    assert _legend(ax) == ["0.5: no finite variance above", "0.7: unreliable above"]
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "shapes differ": (lambda: data_plots.reconstructions(torch.rand(2, 6), torch.rand(3, 6)), "of one shape"),
    "pixels": (lambda: data_plots.samples(torch.rand(2, 6), shape=(2, 2)), "of 6 numbers"),
    "three sides": (lambda: data_plots.samples(torch.rand(2, 6), shape=(2, 1, 3)), "of 6 numbers"),
    "no leading n": (lambda: data_plots.samples(torch.rand(6)), r"\(n, \*x\)"),
    "count": (lambda: data_plots.samples(torch.rand(2, 6), count=0), "`count` to be at least 1"),
    "one latent": (lambda: latent_plots.latent_scatter(torch.rand(4, 1)), "two latents or more"),
    "axes": (lambda: latent_plots.latent_scatter(torch.rand(4, 2), axes=(0, 2)), "from 0 to 1"),
    "axes twice": (lambda: latent_plots.latent_scatter(torch.rand(4, 2), axes=(1, 1)), "two latents"),
    "few labels": (lambda: latent_plots.latent_scatter(torch.rand(4, 2), torch.arange(3)), "each of 4 data; got 3"),
    "three latents": (lambda: latent_plots.latent_grid(_vae(3), shape=SHAPE), "exactly two latents"),
    "unknown latent": (lambda: latent_plots.traversals(_vae(), latents=[2]), "from 0 to 1"),
    "base": (lambda: latent_plots.traversals(_vae(), base=torch.zeros(3)), r"shape \(2,\); got \(3,\)"),
    "spread": (lambda: latent_plots.traversals(_vae(), spread=0.0), "positive `spread`"),
    "covariance": (lambda: posterior_plots.ellipses((torch.rand(2, 2), torch.rand(2, 2)), _pair(2)), r"\(2, 2, 2\)"),
    "indefinite": (
        lambda: posterior_plots.ellipses((torch.rand(1, 2), -torch.eye(2)[None]), _pair(1)),
        "of datum 0 is not",
    ),
    "sizes": (lambda: posterior_plots.ellipses(_pair(2), _pair(3)), "posteriors of one shape"),
    "names": (lambda: posterior_plots.ellipses(_pair(2), _pair(2), labels=["a"]), "`labels` for each of 2"),
    "fewer planes": (lambda: posterior_plots.regions(_plane(*_pair(2)), _pair(3)), "2 data of both; got 2 and 3"),
    "more latents": (
        lambda: posterior_plots.regions(_plane(*_pair(2)), _pair(2, 3)),
        "two latents and 2 data of both; got 3",
    ),
    "few KLs": (lambda: posterior_plots.regions(_plane(*_pair(2)), _pair(2), kl=torch.zeros(1)), "`kl` for each of 2"),
    "too many": (lambda: posterior_plots.ellipses(_pair(65), _pair(65)), "at most 64"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_roles_are_asked_for_by_name() -> None:
    vae = _vae()
    with pytest.raises(TypeError, match="Expected a VAE.*got Program"):
        latent_plots.traversals(Program(vae.model, vae.guide))


def test_pictures_in_colour_keep_their_channels() -> None:
    rows = torch.rand(2, 3, 4, 5)
    ax = data_plots.samples(rows.flatten(1), shape=(3, 4, 5)).axes[0]
    shown: Any = ax.images[0].get_array()
    np.testing.assert_allclose(shown[:4, :5, :3], rows[0].permute(1, 2, 0).numpy(), rtol=1e-6)
    assert (shown[:4, :5, 3] == 1).all()
    assert (shown[:4, 5, 3] == 0).all()  # the ground between is transparent
    grey: Any = data_plots.samples(rows[:, :1].flatten(1), shape=(1, 4, 5)).axes[0].images[0].get_array()
    np.testing.assert_allclose(grey[:4, :5], rows[0, 0].numpy(), rtol=1e-6)


def test_labels_have_their_words() -> None:
    ax = latent_plots.latent_scatter(torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]), names=["Adelie", "Gentoo"])
    legend: Any = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()][:3] == ["Adelie", "Gentoo", "2"]
