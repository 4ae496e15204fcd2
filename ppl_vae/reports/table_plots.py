"""Plots of tables by column: data beside samples, errors of the reconstruction, what each latent moves."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.data.columns import Columns
from ppl_vae.reports import style

_MOST = 12  # columns with a panel each
_BARS = 12  # values that have a bar each


def marginals(x: Tensor, samples: Tensor, columns: Columns) -> Figure:
    """Compare each column's values in the data with those of samples, one panel per column, the first twelve.

    Columns of at most twelve whole numbers on end have bars, by their words where they have any; others histograms.

    Args:
        x: data, (n, x).
        samples: draws from the model, (m, x).
        columns: what the columns are.

    Raises:
        ValueError: If there are no data, or the numbers of columns differ.
    """
    data, drawn = _rows(x, samples, columns)
    names = _names(columns)[:_MOST]
    room = 1.0 if set(names) & {*(columns.categories or {})} else 0.6  # for words below the panels
    figure, axes = style.panels(len(names), ("", "share"), size=(1.9, 1.3), gap=(0.6, room), top=0.6)
    for j, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.set_title(style.short(name, 28), fontsize="small", loc="left")
        style.bare(ax)
        pair = [np.sort(part[:, j][np.isfinite(part[:, j])]) for part in (data, drawn)]
        values = np.unique(np.concatenate(pair))
        whole = bool((values == np.rint(values)).all())
        words = (columns.categories or {}).get(name)
        near = whole and len(values) > 0 and values[-1] - values[0] < _BARS
        values = np.arange(values[0], values[-1] + 1) if near else values
        if near or (words and len(values) <= _BARS):
            for shift, part, colour, label in zip((-0.2, 0.2), pair, _COLOURS, _LABELS, strict=True):
                shares = [(part == value).mean() if len(part) else 0.0 for value in values]
                ax.bar(np.arange(len(values)) + shift, shares, 0.4, color=colour, label=label)
            ticks = [style.short(words[int(v)], 10) if words and v < len(words) else f"{v:g}" for v in values]
            ax.set_xticks(range(len(values)), ticks, rotation=30 if words else 0, ha="right" if words else "center")
        else:
            low, high = np.quantile(np.concatenate(pair), [0.005, 0.995]) if len(values) else (0.0, 1.0)
            bins: Any = np.linspace(low, high + (high == low), 26)
            if whole:  # each bin has as many of the whole numbers
                step = math.ceil((high - low + 1) / 25)
                bins = np.arange(math.floor(low) - 0.5, high + step, step)
            for part, colour, label in zip(pair, _COLOURS, _LABELS, strict=True):
                weights = np.full(len(part), 1 / max(len(part), 1))
                ax.hist(part, bins, weights=weights, histtype="step", color=colour, label=label, lw=1.3)
            style.few_ticks(ax.xaxis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    return figure


def scatter_pairs(x: Tensor, samples: Tensor, columns: Columns, *, most: int = 4) -> Figure | None:
    """Scatter pairs of columns, data below the diagonal and samples above it, at most 500 points each.

    Of columns with more than twelve values those that depend most on others, by Spearman's rank correlation, are shown;
    None if there are fewer than two.

    Args:
        x: data, (n, x).
        samples: draws from the model, (m, x).
        columns: what the columns are.
        most: the number of columns to show.
    """
    data, drawn = (part[:500] for part in _rows(x, samples, columns))
    shown = [j for j in range(columns.count) if len(np.unique(data[:, j])) > _BARS]
    if len(shown) < 2:
        return None
    from pandas import DataFrame

    ranks = DataFrame(data[:, shown]).corr("spearman").abs().fillna(0.0).to_numpy() - np.eye(len(shown))
    chosen = np.argsort(-ranks.max(0), kind="stable")[:most]
    shown = sorted(shown[j] for j in chosen)
    names, size = _names(columns), len(shown)
    figure = Figure((1.5 * size + 0.7, 1.5 * size + 0.7), dpi=120, layout="constrained")
    grid = figure.subplots(size, size, squeeze=False)
    for (a, row), (b, column) in itertools.product(enumerate(shown), repeat=2):
        ax: Axes = style.bare(grid[a, b])
        part, colour = (data, style.BLUE) if a > b else (drawn, style.VERMILLION)
        if a == b:
            name = style.short(names[row], 24)
            ax.text(0.5, 0.5, name, ha="center", va="center", transform=ax.transAxes, fontsize="small")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            continue
        ax.plot(part[:, column], part[:, row], ".", color=colour, ms=2, alpha=0.5)
        low, high = np.nanquantile(data[:, [column, row]], [0.002, 0.998], axis=0)
        room = 0.08 * np.where(high > low, high - low, 1.0)
        ax.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
        ax.tick_params(labelsize="x-small", labelbottom=a == size - 1, labelleft=b == 0)
        for axis in (ax.xaxis, ax.yaxis):
            style.few_ticks(axis)
    return figure


def column_errors(x: Tensor, means: Tensor, columns: Columns, *, ax: Axes | None = None) -> Axes:
    """Show how much of each column the reconstruction misses, the worst above.

    For numbers: root mean square error over the column's standard deviation (1 is no better than the mean). For
    codes: the share of data whose nearest code to the mean is another. Missing entries count for nothing.

    Args:
        x: data, (n, x).
        means: means of p(x|z), (n, x).
        columns: what the columns are.
        ax: where to draw, by default in a new figure.
    """
    data, fitted = _rows(x, means, columns)
    errors = []
    for j in range(columns.count):
        seen = np.isfinite(data[:, j])
        one, other = data[seen, j], fitted[seen, j]
        if not len(one):
            errors.append(0.0)
            continue
        coded = columns.kinds is not None and columns.kinds[j] in ("binary", "category", "ordered")
        spread = one.std() or 1.0
        errors.append(float((np.rint(other) != one).mean() if coded else np.sqrt(((one - other) ** 2).mean()) / spread))
    order = np.argsort(errors)[-20:]
    ax = style.axes_for(ax, (5.2, 0.7 + 0.25 * len(order)))
    ax.barh(range(len(order)), [errors[j] for j in order], color=style.BLUE)
    ax.set_yticks(range(len(order)), [style.short(_names(columns)[j], 32) for j in order], fontsize="small")
    ax.axvline(1, color="0.6", lw=1, ls=":")
    ax.set(xlabel="RMSE / standard deviation, or share of wrong words", ylim=(-0.6, len(order) - 0.4))
    return ax


def column_paths(x: Tensor, paths: Tensor, latents: Sequence[int], columns: Columns, *, most: int = _MOST) -> Figure:
    """Show what each column becomes as one latent goes through its range, one panel per column and a line per latent.

    The columns that move most, by the range of the data, come first.

    Args:
        x: data, (n, x).
        paths: columns along the way of each latent, (l, k, x), of words their codes.
        latents: which ones these l are, counted from 0; at most five.
        columns: what the columns are.
        most: the number of columns to show.
    """
    data, along = _rows(x, paths.flatten(0, 1), columns)
    along = along.reshape(*paths.shape[:2], -1)
    ends = np.nanquantile(data, [0.01, 0.99], axis=0)
    low, high = np.minimum(ends[0], along.min((0, 1))), np.maximum(ends[1], along.max((0, 1)))
    moved = (along.max(1) - along.min(1)).max(0) / np.where(high > low, high - low, np.inf)
    shown = np.argsort(-moved, kind="stable")[:most]
    size: Any = {"size": (1.9, 1.3), "gap": (0.75, 0.5), "top": 0.6}
    colours = style.BLUE, style.VERMILLION, style.GREEN, style.OKABE_ITO[3], style.OKABE_ITO[7]
    figure, axes = style.panels(len(shown), ("quantile of the latent", ""), **size)
    for ax, j in zip(axes, shown, strict=True):
        name = _names(columns)[j]
        words, coded = (
            (columns.categories or {}).get(name),
            columns.kinds is not None and columns.kinds[j] == "category",
        )
        for path, latent, colour in zip(along[..., j], latents, colours, strict=False):
            ax.plot(
                path, color=colour, lw=1.4, drawstyle="steps-mid" if coded else "default", label=f"$z_{{{latent}}}$"
            )
        ax.set_title(style.short(name, 28), fontsize="small", loc="left")
        ax.set_xticks([0, along.shape[1] - 1], ["1 %", "99 %"])
        if words and len(words) <= _BARS:
            ax.set_yticks(range(len(words)), [style.short(word, 9) for word in words])
        room = 0.06 * ((high[j] - low[j]) or 1.0)
        ax.set_ylim(low[j] - room, high[j] + room)
        style.bare(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(latents), frameon=False)
    return figure


_COLOURS, _LABELS = (style.BLUE, style.VERMILLION), ("data", "samples")


def _rows(x: Tensor, other: Tensor, columns: Columns) -> tuple[style.Array, style.Array]:
    rows = style.as_array(x.flatten(1)), style.as_array(other.flatten(1))
    style.check_some(min(map(len, rows)))
    if {part.shape[1] for part in rows} != {columns.count}:
        raise ValueError(f"Expected {columns.count} columns; got {rows[0].shape[1]} and {rows[1].shape[1]}.")
    return rows


def _names(columns: Columns) -> Sequence[str]:
    return columns.names or [str(j) for j in range(columns.count)]
