"""Plots of tables: what is drawn is what numpy counts."""

import numpy as np
import pytest
import torch

from ppl_vae.data import Columns
from ppl_vae.reports.latent_plots import latent_scatter
from ppl_vae.reports.table_plots import column_errors, column_paths, marginals, scatter_pairs

COLUMNS = Columns(
    4,
    names=("length", "sex", "count", "width"),
    kinds=("real", "binary", "count", "real"),
    levels=(0, 2, 0, 0),
    categories={"sex": ("female", "male")},
)


def table(n, seed):
    rng = np.random.default_rng(seed)
    columns = [rng.normal(size=n), rng.integers(0, 2, n), rng.poisson(2, n), rng.normal(size=n)]
    return torch.from_numpy(np.stack([np.asarray(c, float) for c in columns], 1))


def test_bars_are_the_shares_of_each_value_and_histograms_add_up():
    x, drawn = table(200, 0), table(100, 1)
    figure = marginals(x, drawn, COLUMNS)
    length, sex, count, _ = figure.axes[:4]
    shares = [bar.get_height() for bar in sex.patches]
    wanted = [(part[:, 1] == value).double().mean().item() for part in (x, drawn) for value in (0, 1)]
    np.testing.assert_allclose(shares, wanted)
    assert [tick.get_text() for tick in sex.get_xticklabels()] == ["female", "male"]
    assert len(count.patches) == 2 * (1 + torch.cat([x, drawn])[:, 2].max())  # those that do not occur among them
    assert length.get_title(loc="left") == "length"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["data", "samples"]


def test_bins_of_whole_numbers_hold_as_many_of_them_each():
    x = torch.arange(60.0).reshape(-1, 1).double()
    (ax,) = marginals(x, x, Columns(1, names=("count",), kinds=("count",))).axes
    heights = np.unique([np.round(y, 6) for _, y in ax.patches[0].get_xy()])
    assert heights.tolist() == [0.0, 0.05]  # three numbers of sixty in each bin


def test_columns_along_a_latent_are_what_was_decoded_with_the_furthest_first():
    x = table(200, 0)
    paths = torch.zeros(2, 5, 4).double()
    paths[0, :, 3] = torch.linspace(-2, 2, 5)
    paths[1, :, 1] = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0])
    figure = column_paths(x, paths, [4, 0], COLUMNS, most=2)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["sex", "width"]
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), paths[0, :, 3])
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), paths[1, :, 1])
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["female", "male"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$z_{4}$", "$z_{0}$"]


def test_data_lie_below_the_diagonal_and_samples_above():
    x, drawn = table(60, 0), table(50, 1)
    figure = scatter_pairs(x, drawn, COLUMNS)
    (_, above, below, _) = figure.axes
    np.testing.assert_allclose(below.lines[0].get_xdata(), x[:, 0])
    np.testing.assert_allclose(below.lines[0].get_ydata(), x[:, 3])
    np.testing.assert_allclose(above.lines[0].get_xdata(), drawn[:, 3])
    assert scatter_pairs(x[:, [1]], drawn[:, [1]], Columns(1, names=("sex",))) is None


def test_errors_by_column_are_numpys_with_the_worst_above():
    x = table(200, 0)
    means = x + torch.tensor([0.1, 0.0, 0.3, 2.0])
    means[:20, 1] = 1 - means[:20, 1]
    ax = column_errors(x, means, COLUMNS)
    widths = {label.get_text(): bar.get_width() for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=True)}
    std = x.numpy().std(0)
    wanted = {"length": 0.1 / std[0], "sex": 0.1, "count": 0.3 / std[2], "width": 2 / std[3]}
    assert widths == pytest.approx(wanted)
    assert list(widths)[-1] == "width"


def test_another_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="Expected 4 columns; got 4 and 3"):
        marginals(table(5, 0), table(5, 0)[:, :3], COLUMNS)


def test_names_with_dollars_and_other_marks_are_no_formulas(tmp_path):
    """Between two dollars matplotlib reads a formula, and fails where it is none."""
    names = ("price $\\foo$", "$x^$", "a_b", "<b>%s")
    columns = Columns(4, names=names, kinds=("real", "category", "real", "real"), categories={"$x^$": ("$a^$", "b")})
    x = table(60, 0)
    for drawn in (marginals(x, x, columns), scatter_pairs(x, x, columns), column_errors(x, x, columns).figure):
        drawn.savefig(tmp_path / "x.png")
    marks = latent_scatter(x, x[:, 1], names=["$a^$", "b"])
    marks.figure.savefig(tmp_path / "x.png")
    assert marks.get_legend().get_texts()[0].get_text() == r"\$a^\$"
