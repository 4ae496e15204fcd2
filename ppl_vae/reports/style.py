"""What all plots share: axes and panels in inches, mosaics of grey pictures, colours, numbers in words."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor

Array = npt.NDArray[np.float64]
T = TypeVar("T")
Pair = tuple[T, T]
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
BLUE, GREEN, VERMILLION, GREY = OKABE_ITO[0], OKABE_ITO[2], OKABE_ITO[5], "#8A8A8A"
NEUTRAL = "#7B7B7B"  # of text on a transparent ground, 4.2 to 1 on a light page and on a dark one
_MOST_PANELS = 64


def as_array(x: Tensor) -> Array:
    """A tensor as an array in double precision."""
    return x.detach().double().cpu().numpy()  # type: ignore[no-any-return]


def flat_rows(x: Tensor, count: int) -> Array:
    """The first `count` data as rows, (n, x)."""
    if count < 1:
        raise ValueError(f"Expected `count` to be at least 1; got {count}.")
    if x.dim() < 2:
        raise ValueError(f"Expected data of shape (n, *x); got {tuple(x.shape)}.")
    check_some(len(x))
    return as_array(x[:count].flatten(1))


def check_some(n: int) -> None:
    """Raise a ValueError if there are no data."""
    if n < 1:
        raise ValueError("Expected at least one datum; got none.")


def check_panels(n: int) -> None:
    """Raise a ValueError if there are no data, or more than a figure has panels for."""
    check_some(n)
    if n > _MOST_PANELS:
        raise ValueError(f"Expected at most {_MOST_PANELS} data, a panel each; got {n}.")


def as_pictures(rows: Array, shape: Sequence[int]) -> Array:
    """Rows of pixels as pictures, (n, height, width), or (n, height, width, 3) in colour."""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    colour = len(shape) == 3 and shape[0] == 3
    if (len(shape) != 2 and not colour) or math.prod(shape) != rows.shape[1]:
        raise ValueError(
            f"Expected a shape (height, width) or (3, height, width) of {rows.shape[1]} numbers; got {tuple(shape)}."
        )
    pictures = rows.reshape(-1, *shape)
    return pictures.transpose(0, 2, 3, 1) if colour else pictures


def mosaic(
    rows: Array,
    shape: Sequence[int],
    columns: int,
    *,
    gap: int | None = None,
    cell: float = 0.8,
    left: float = 0.05,
    bottom: float = 0.05,
    limits: Array | None = None,
) -> tuple[Figure, Axes, Array, Array]:
    """Arrange pictures in a grid, as one large picture.

    Black and white are 0 and 1 if all values of `limits` (by default the pictures) lie between, else their range. The
    ground is transparent and the text a neutral grey, so that they suit light and dark pages.

    Args:
        rows: pixels of the pictures, (n, x).
        shape: of a picture, (height, width) or (3, height, width).
        columns: pictures side by side.
        gap: pixels between pictures, by default a sixteenth of their larger side.
        cell: width of a picture in inches.
        left: margin in inches.
        bottom: margin in inches.
        limits: values that set black and white.

    Returns:
        The figure, its axes, and the centres of the rows and of the columns of pictures, in pixels.
    """
    pictures = as_pictures(rows, shape)
    (height, width), colours = pictures.shape[1:3], pictures.shape[3:]
    gap = max(1, round(max(height, width) / 16)) if gap is None else gap
    beyond = ((0, -len(rows) % columns), (0, gap), (0, gap), *((0, 0),) * len(colours))
    padded = np.pad(pictures, beyond, constant_values=np.nan)
    grid = padded.reshape(-1, columns, height + gap, width + gap, *colours).swapaxes(1, 2)
    picture = grid.reshape(-1, columns * (width + gap), *colours)[: -gap or None, : -gap or None]
    shades = rows if limits is None else limits
    shades = shades[np.isfinite(shades)]
    low, high = (shades.min(), shades.max()) if len(shades) else (0.0, 1.0)
    low, high = (0.0, 1.0) if 0 <= low and high <= 1 else (low, high + (high == low))
    ratio = picture.shape[0] / picture.shape[1]
    wide = max(min(max(cell * columns, 1.5), 7.8 - left, 9 / ratio), 0.5)
    size = np.array([wide + left + 0.05, wide * ratio + bottom + 0.05])
    figure = Figure(size.tolist(), dpi=120)
    ax = figure.add_axes((left / size[0], bottom / size[1], wide / size[0], wide * ratio / size[1]))
    shown = ((picture - low) / (high - low)).clip(0, 1) if colours else picture  # a picture in colour has no limits
    if colours:
        shown = np.concatenate([np.nan_to_num(shown), np.isfinite(shown[..., :1])], -1)
    _show(ax, shown, vmin=low, vmax=high)
    ax.tick_params(length=0, labelsize="large")
    ax.xaxis.label.set_fontsize("large")
    ax.yaxis.label.set_fontsize("large")
    clear(figure)
    across, up = (np.arange(count, dtype=np.float64) for count in (columns, len(grid)))
    return figure, ax, up * (height + gap) + (height - 1) / 2, across * (width + gap) + (width - 1) / 2


def clear(figure: Figure) -> None:
    """Make the ground of a figure transparent and its text a neutral grey, so that it suits light and dark pages."""
    figure.set_facecolor("none")
    for ax in figure.axes:
        ax.set_facecolor("none")
        ax.tick_params(labelcolor=NEUTRAL)
        ax.xaxis.label.set(color=NEUTRAL)
        ax.yaxis.label.set(color=NEUTRAL)


def inset(ax: Axes, picture: Array, box: tuple[float, float, float, float], anchor: Any) -> None:
    """Show a small grey picture inside axes, in a box given in fractions of them."""
    _show(ax.inset_axes(box, anchor=anchor), picture)


def _show(ax: Axes, picture: Array, **limits: Any) -> None:
    ax.imshow(picture, cmap="gray", **limits)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def panels(
    n: int, labels: Pair[str], *, size: Pair[float], gap: Pair[float], top: float, most: int = 3, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with n panels of one size in even rows; all lengths are in inches.

    Args:
        n: the number of panels, one per datum.
        labels: of the x axes of the lowest panels, and of the y axes of the leftmost ones.
        size: width and height of a panel.
        gap: between panels, across and down.
        top: margin above the panels.
        most: panels side by side, at most.
        share: whether all panels share their axes.

    Raises:
        ValueError: If n is 0 or above 64.
    """
    check_panels(n)
    rows = math.ceil(n / most)
    columns = math.ceil(n / rows)
    left, right, bottom = 0.65, 0.15, 0.5
    width = left + columns * (size[0] + gap[0]) - gap[0] + right
    height = bottom + rows * (size[1] + gap[1]) - gap[1] + top
    figure = Figure((width, height), dpi=120)
    spacing = {"left": left / width, "right": 1 - right / width, "wspace": gap[0] / size[0]}
    spacing |= {"bottom": bottom / height, "top": 1 - top / height, "hspace": gap[1] / size[1]}
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share, gridspec_kw=spacing)
    for index, ax in enumerate(axes := grid.ravel().tolist()):
        lowest = index >= n - columns
        ax.tick_params(labelsize="small", labelbottom=lowest or not share)
        ax.set(xlabel=labels[0] if lowest else "", ylabel=labels[1] if index % columns == 0 else "")
        if index >= n:
            ax.remove()
    return figure, axes[:n]


def axes_for(ax: Axes | None, size: tuple[float, float] = (5.6, 3.6)) -> Axes:
    """The axes given, or those of a new figure of that size in inches."""
    return bare(Figure(size, dpi=120, layout="constrained").add_subplot() if ax is None else ax)


def curve(ax: Axes, values: Array, **style: Any) -> None:
    """Draw values over their numbers; a single one as a point."""
    ax.plot(np.arange(len(values)), values, marker="o" * (len(values) == 1), **{"lw": 1.2, **style})
    ax.xaxis.set_major_locator(ticks_at())
    bare(ax)


def bare(ax: Axes) -> Axes:
    """Hide the upper and the right edge of the axes."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def legend_above(ax: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def ticks_at(n: int = 5, *, integer: bool = True) -> MaxNLocator:
    """About n ticks, on whole numbers if possible and asked for."""
    return MaxNLocator(n, steps=[1, 2, 5, 10], integer=integer, min_n_ticks=1)


def few_ticks(axis: Axis) -> None:
    """A few numbers along an axis of a small panel, large ones as 80k, so that they do not collide."""
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2))
    if max(map(abs, axis.get_view_interval())) >= 1e4:
        axis.set_major_formatter(EngFormatter(sep=""))


def shades(count: int) -> Array:
    """Colours from dark to light, (count, 4)."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count))  # type: ignore[no-any-return]


def short(text: str, most: int = 18) -> str:
    """Cut a text of the user's, and let its dollars stand, between which matplotlib would read a formula."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def number(value: float) -> str:
    """A number in three digits, with a true minus."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def chance(p: float) -> str:
    """A p-value in words, one too small for double precision as such."""
    return f"p = {p:.2g}" if p >= 1e-16 else "p < 1e-16"
