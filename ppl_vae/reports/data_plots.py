"""Pictures of training and of data: the curve, reconstructions, samples."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.reports.style import BLUE, VERMILLION, axes_for, curve, flat_rows, mosaic, panels_of, ticks_at


def training_curve(elbo: Sequence[float], validation: Sequence[float] = (), *, ax: Axes | None = None) -> Axes:
    """Plot the bound over epochs, of training and of validation data.

    The axis begins somewhat below the 10 % quantile of the bounds, so that the first epochs do not squash the rest.

    Args:
        elbo: nats per datum, an entry an epoch.
        validation: likewise, or empty.
        ax: where to draw.

    Raises:
        ValueError: where there is no epoch.
    """
    if not len(elbo):
        raise ValueError("Expected at least one epoch; got none.")
    ax = axes_for(ax)
    finite = []
    for given, label, colour in ((elbo, "training", BLUE), (validation, "validation", VERMILLION)):
        values = np.array([float(value) for value in given])
        if len(values):
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, label=label, marker="o" * (len(values) == 1))
            finite.append(values[np.isfinite(values)])
    seen = np.concatenate(finite)
    if len(seen) and seen.max() > seen.min():
        low, high = min(np.quantile(values, 0.1) for values in finite if len(values)), seen.max()
        low = max(low - 0.25 * (high - low), seen.min())
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    last = max(len(elbo), len(validation))
    margin = max(0.5, 0.03 * last)
    ax.set(xlim=(1 - margin, last + margin), xlabel="epoch", ylabel="ELBO (nats per datum)")
    ax.xaxis.set_major_locator(ticks_at(8))
    ax.grid(axis="y", color="0.92")
    if len(validation):
        ax.legend(frameon=False, loc="lower right")
    return ax


def reconstructions(x: Tensor, means: Tensor, *, shape: Sequence[int] | None = None, count: int = 10) -> Figure:
    """Draw data above their reconstruction, as grey pictures, or else both as curves over the features, a panel each.

    Args:
        x: data, shape (n, *x).
        means: their reconstructions, as `x`.
        shape: of a picture, (height, width); none for other data.
        count: how many of the first data to show.

    Raises:
        ValueError: for no data, or shapes that do not fit.
    """
    if x.shape != means.shape:
        raise ValueError(f"Expected data and means of one shape; got {tuple(x.shape)} and {tuple(means.shape)}.")
    data, fitted = flat_rows(x, count), flat_rows(means, count)
    n = len(data)
    if shape is not None:
        columns = min(n, 10)
        blocks = [np.pad(part, ((0, -n % columns), (0, 0)), constant_values=np.nan) for part in (data, fitted)]
        pairs = np.stack([part.reshape(-1, columns, part.shape[1]) for part in blocks], 1)
        figure, ax, at, _ = mosaic(pairs.reshape(-1, data.shape[1]), shape, columns, left=1.15, limits=data)
        ax.set_yticks(at, ["data", "reconstruction"] * len(pairs))
        return figure
    figure, panels = panels_of(n, min(n, 5), 1.7, 1.6)
    for ax, one, other in zip(panels, data, fitted, strict=True):
        curve(ax, one, color="0.3", label="data")
        curve(ax, other, color=VERMILLION, label="reconstruction")
    figure.legend(handles=list(panels[0].lines), loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("feature", fontsize="medium")
    figure.supylabel("value", fontsize="medium")
    return figure


def samples(x: Tensor, *, shape: Sequence[int] | None = None, count: int = 64) -> Figure:
    """Draw samples as a square of grey pictures, or else as curves over the features in one panel.

    Args:
        x: samples, shape (n, *x).
        shape: of a picture, (height, width); none for other data.
        count: how many of the first to show.

    Raises:
        ValueError: for no samples, or a shape that does not fit.
    """
    data = flat_rows(x, count)
    if shape is not None:
        return mosaic(data, shape, math.ceil(math.sqrt(len(data))))[0]
    figure = Figure((7, 4), dpi=120, layout="constrained")
    ax = figure.add_subplot(xlabel="feature", ylabel="value")
    for row in data:
        curve(ax, row, color=BLUE, alpha=max(0.15, min(1.0, 8 / len(data))))
    return figure
