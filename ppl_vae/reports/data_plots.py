"""Plots of training and of data: the bound over epochs, reconstructions, samples."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.reports import style


def training_curve(
    elbo: Sequence[float], validation: Sequence[float] = (), *, kept: int | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the bound over the epochs, of training and validation data.

    The y axis starts a little below the 10 % quantile of the bounds, so that the first epochs do not squash the rest.

    Args:
        elbo: nats per datum, one entry per epoch.
        validation: likewise, or empty.
        kept: the epoch whose state was kept, counted from 1, marked by a line.
        ax: where to draw, by default in a new figure.

    Raises:
        ValueError: If there is no epoch.
    """
    if not len(elbo):
        raise ValueError("Expected at least one epoch; got none.")
    ax = style.axes_for(ax)
    finite = []
    for bounds, label, colour in ((elbo, "training", style.BLUE), (validation, "validation", style.VERMILLION)):
        values = np.array([float(value) for value in bounds])
        if len(values):
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, label=label, marker="o" * (len(values) == 1))
            finite.append(values[np.isfinite(values)])
    every = np.concatenate(finite)
    if len(every) and every.max() > every.min():
        low, high = min(np.quantile(values, 0.1) for values in finite if len(values)), every.max()
        low = max(low - 0.25 * (high - low), every.min())
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    last = max(len(elbo), len(validation))
    margin = max(0.5, 0.03 * last)
    ax.set(xlim=(1 - margin, last + margin), xlabel="epoch", ylabel="ELBO (nats per datum)")
    ax.xaxis.set_major_locator(style.ticks_at(8))
    ax.grid(axis="y", color="0.92")
    if kept is not None:
        ax.axvline(kept, color=style.GREY, lw=1, ls=":", label=f"kept: epoch {kept}")
    if len(validation) or kept is not None:
        ax.legend(frameon=False, loc="lower right")
    return ax


def reconstructions(x: Tensor, means: Tensor, *, shape: Sequence[int] | None = None, count: int = 10) -> Figure:
    """Show data and their reconstructions: as grey pictures, or as curves over the features.

    Args:
        x: data, (n, *x).
        means: their reconstructions, as `x`.
        shape: of a picture, (height, width); None draws curves, one panel per datum.
        count: how many of the first data to show.

    Raises:
        ValueError: If there are no data, or shapes do not fit.
    """
    if x.shape != means.shape:
        raise ValueError(f"Expected data and means of one shape; got {tuple(x.shape)} and {tuple(means.shape)}.")
    data, fitted = style.flat_rows(x, count), style.flat_rows(means, count)
    n = len(data)
    if shape is not None:
        return _pairs(data, fitted, ("data", "reconstruction"), shape)
    size = (1.5, 1.3) if n > 1 else (3.3, 2.2)
    figure, axes = style.panels(n, ("feature", "value"), size=size, gap=(0.2, 0.15), top=0.4, most=5, share=True)
    for ax, one, other in zip(axes, data, fitted, strict=True):
        style.curve(ax, one, color="0.3", label="data")
        style.curve(ax, other, color=style.VERMILLION, label="reconstruction")
    figure.legend(handles=list(axes[0].lines), loc="upper center", ncols=2, frameon=False)
    return figure


def samples(x: Tensor, *, means: Tensor | None = None, shape: Sequence[int] | None = None, count: int = 64) -> Figure:
    """Show samples: as a square of grey pictures, or as curves over the features in one panel.

    Args:
        x: samples, (n, *x).
        means: of p(x|z) at the z that they were drawn from, (n, *x). The first ones stand below their pictures, whose
            noise may hide what a decoder has learned.
        shape: of a picture, (height, width); None draws curves.
        count: how many of the first to show.

    Raises:
        ValueError: If there are no samples, or the shape does not fit.
    """
    data = style.flat_rows(x, count)
    if shape is not None and means is not None:
        return _pairs(data[:20], style.flat_rows(means, 20), ("draw", "its mean"), shape)
    if shape is not None:
        return style.mosaic(data, shape, math.ceil(math.sqrt(len(data))))[0]
    figure = Figure((5.6, 3.6), dpi=120, layout="constrained")
    ax = figure.add_subplot(xlabel="feature", ylabel="value")
    for row in data:
        style.curve(ax, row, color=style.BLUE, alpha=max(0.15, min(1.0, 8 / len(data))))
    return figure


def _pairs(above: style.Array, below: style.Array, names: tuple[str, str], shape: Sequence[int]) -> Figure:
    """Rows of ten pictures, each with its other below it; the upper ones set black and white."""
    columns = min(len(above), 10)
    blocks = [np.pad(part, ((0, -len(above) % columns), (0, 0)), constant_values=np.nan) for part in (above, below)]
    pairs = np.stack([part.reshape(-1, columns, part.shape[1]) for part in blocks], 1)
    figure, ax, at, _ = style.mosaic(pairs.reshape(-1, above.shape[1]), shape, columns, left=1.35, limits=above)
    ax.set_yticks(at, [*names] * len(pairs))
    return figure
