"""Plots by class: pictures of each, data decoded under other labels, and the calibration of p(y|x)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.reports import style


def class_pictures(x: Tensor, names: Sequence[str], shape: Sequence[int]) -> Figure:
    """Show pictures of each class, a row per class.

    Args:
        x: pictures, (c, m, *x).
        names: of the c classes.
        shape: of a picture, (height, width).

    Raises:
        ValueError: If names or shape do not fit.
    """
    rows = _named(x, names)
    figure, ax, at, _ = style.mosaic(rows.reshape(-1, rows.shape[-1]), shape, rows.shape[1], left=1.15)
    ax.set_yticks(at, [style.short(name) for name in names])
    return figure


def swaps(x: Tensor, means: Tensor, names: Sequence[str], shape: Sequence[int]) -> Figure:
    """Show pictures, and the mean of p(x|z, y) at their own z under each label y.

    Args:
        x: data, (n, *x).
        means: for each label, (c, n, *x).
        names: of the c classes.
        shape: of a picture, (height, width).

    Raises:
        ValueError: If shapes or names do not fit.
    """
    rows = _named(torch.cat([x.unsqueeze(0), means]), ["data", *names]).swapaxes(0, 1)
    figure, ax, _, at = style.mosaic(
        rows.reshape(-1, rows.shape[-1]), shape, rows.shape[1], bottom=0.3, limits=rows[:, 0]
    )
    labels = ["data", *(style.short(name, 8) for name in names)]
    ax.set_xticks(at, labels, rotation=0 if max(map(len, labels)) < 5 else 20)
    return figure


def calibration_curve(curve: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Plot how often the most probable class is right over its probability, with the number of data of each bin.

    Args:
        curve: bins with `confidence`, `accuracy`, its error `se`, and `n`, as `ClassEvidence.summary` returns them.
        ax: where to draw, by default in a new figure.

    Raises:
        ValueError: If there are no bins.
    """
    if not curve:
        raise ValueError("Expected at least one bin; got none.")
    ax = style.axes_for(ax, (4.5, 4.2))
    x, y, se = (np.array([each[name] for each in curve]) for name in ("confidence", "accuracy", "se"))
    ax.plot([0, 1], [0, 1], color=style.GREY, lw=0.9, label="calibrated")
    bars = np.minimum(1.96 * se, [y, 1 - y])  # a share lies between 0 and 1
    ax.errorbar(x, y, bars, color=style.BLUE, fmt="o", capsize=2, label="right, 95 % of its error")
    for across, up, each in zip(x, y, curve, strict=True):
        ax.annotate(f"{each['n']:,}", (across, up), (-4, -12), textcoords="offset points", ha="right", fontsize="small")
    low = max(min(0.9, x.min() - 0.05, (y - bars[0]).min() - 0.1), -0.1)
    limits = low, 1 + 0.05 * (1 - low)
    names = {"xlabel": "probability of the most probable class", "ylabel": "share of the data that it is right for"}
    ax.set(xlim=limits, ylim=limits, **names)
    ax.legend(frameon=False, loc="upper left")
    return ax


def _named(x: Tensor, names: Sequence[str]) -> style.Array:
    """Rows (c, m, x) of each class."""
    if x.dim() < 3 or len(x) != len(names):
        raise ValueError(f"Expected {len(names)} classes of data (c, m, *x), one per name; got {tuple(x.shape)}.")
    return style.as_array(x.flatten(2))
