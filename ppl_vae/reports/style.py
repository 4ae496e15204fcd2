"""What pictures are laid out with: axes and panels in inches, mosaics of grey pictures, colours."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

Array = npt.NDArray[np.float64]
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
BLUE, GREEN, VERMILLION, GREY = OKABE_ITO[0], OKABE_ITO[2], OKABE_ITO[5], "#8A8A8A"
_SQUARES = 64  # at the most
Corner = tuple[bool, bool]  # of a panel: whether the right one, and whether the upper one
INSET, WORDS = (0.24, 0.24), (0.62, 0.07)  # of a panel's sides: the small picture, and the KL


def as_array(x: Tensor) -> Array:
    """Give an array in double precision."""
    return x.detach().double().cpu().numpy()  # type: ignore[no-any-return]


def flat_rows(x: Tensor, count: int) -> Array:
    """Give the first data, flat, shape (n, x)."""
    if count < 1:
        raise ValueError(f"Expected `count` to be at least 1; got {count}.")
    if x.dim() < 2:
        raise ValueError(f"Expected data of shape (n, *x); got {tuple(x.shape)}.")
    if not len(x):
        raise ValueError("Expected at least one datum; got none.")
    return as_array(x[:count].flatten(1))


def as_pictures(rows: Array, shape: Sequence[int]) -> Array:
    """Give pictures of shape (n, height, width)."""
    if len(shape) != 2 or math.prod(shape) != rows.shape[1]:
        raise ValueError(f"Expected a shape (height, width) of {rows.shape[1]} pixels; got {tuple(shape)}.")
    return rows.reshape(-1, *shape)


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
    """Lay pictures out as one, with margins in inches; give the centres of its rows and columns of pictures too.

    Black and white are 0 and 1 where all values of `limits` (the pictures by default) lie between, else their range.
    """
    pictures, (height, width) = as_pictures(rows, shape), shape
    gap = max(1, round(max(shape) / 16)) if gap is None else gap
    padded = np.pad(pictures, ((0, -len(rows) % columns), (0, gap), (0, gap)), constant_values=np.nan)
    grid = padded.reshape(-1, columns, height + gap, width + gap).transpose(0, 2, 1, 3)
    picture = grid.reshape(-1, columns * (width + gap))[: -gap or None, : -gap or None]
    seen = rows if limits is None else limits
    seen = seen[np.isfinite(seen)]
    low, high = (seen.min(), seen.max()) if len(seen) else (0.0, 1.0)
    low, high = (0.0, 1.0) if 0 <= low and high <= 1 else (low, high + (high == low))
    ratio = picture.shape[0] / picture.shape[1]
    wide = max(min(max(cell * columns, 1.5), 7.8 - left, 9 / ratio), 0.5)
    size = np.array([wide + left + 0.05, wide * ratio + bottom + 0.05])
    figure = Figure(size.tolist(), dpi=120)
    ax = figure.add_axes((left / size[0], bottom / size[1], wide / size[0], wide * ratio / size[1]))
    ax.imshow(picture, cmap="gray", vmin=low, vmax=high)
    ax.set(xticks=[], yticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    across, up = (np.arange(count, dtype=np.float64) for count in (columns, len(grid)))
    return figure, ax, up * (height + gap) + (height - 1) / 2, across * (width + gap) + (width - 1) / 2


def panels_of(n: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Give a figure with a panel each, in rows, on shared axes."""
    rows = -(-n // columns)
    figure = Figure((max(width * columns + 0.5, 4.0), height * rows + 0.8), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    for index, ax in enumerate(grid):
        ax.tick_params(labelsize="small", labelbottom=index >= n - columns)
        if index >= n:
            ax.remove()
    return figure, grid[:n]


def enough(n: int) -> None:
    """Refuse no data, and more than have a panel each."""
    if not n:
        raise ValueError("Expected at least one datum; got none.")
    if n > _SQUARES:
        raise ValueError(f"Expected at most {_SQUARES} data, a panel each; got {n}.")


def squares(
    corners: Sequence[tuple[Corner, Corner]],
    *,
    kl: Tensor | None = None,
    error: Tensor | None = None,
    labels: Sequence[object] | Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Give a figure with a square panel of two latents for each datum, in rows of four.

    Args:
        corners: where there is room for the picture, and where for the KL.
        kl: in nats, (n,), or none.
        error: its standard error, likewise.
        labels: what stands above each panel.
        axes: the numbers of the two latents.
        x: data, shape (n, *x), for a small picture in each panel.
        shape: of such a picture, (height, width).

    Raises:
        ValueError: for no data or more than 64, or sizes that do not fit.
    """
    n = len(corners)
    enough(n)
    for name, given in (("labels", labels), ("x", x), ("kl", kl), ("error", error)):
        if given is not None and len(given) != n:
            raise ValueError(f"Expected `{name}` for each of {n} data; got {len(given)}.")
    pictures = None if x is None or shape is None else as_pictures(flat_rows(x, n), shape)
    columns = min(n, 4)
    rows, side, across, below = -(-n // columns), 1.7 if n > 1 else 3.3, 0.45, 0.3 if labels is None else 0.55
    width, height = 0.65 + columns * (side + across) - across + 0.1, 0.8 + rows * (side + below)  # in inches
    figure = Figure((width, height), dpi=120)
    spacing = {"left": 0.65 / width, "right": 1 - 0.1 / width, "wspace": across / side, "hspace": below / side}
    spacing |= {"bottom": 0.5 / height, "top": 1 - (0.3 + below) / height}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=spacing).ravel().tolist()
    for spare in panels[n:]:
        spare.remove()
    for index, (ax, (there, spot)) in enumerate(zip(panels[:n], corners, strict=True)):
        ax.set_xlabel(f"$z_{{{axes[0]}}}$" if index >= n - columns else "")
        ax.set_ylabel(f"$z_{{{axes[1]}}}$" if index % columns == 0 else "")
        ax.locator_params(nbins=4)
        ax.tick_params(color="0.6", labelsize="small")
        ax.spines[:].set_color("0.6")
        if kl is not None:
            value, doubt = float(kl[index]), 0.0 if error is None else float(error[index])
            divergence = f"{value:.2f} ± {doubt:.2f}" if doubt >= 0.005 else f"{value:.2f}"
            words = f"KL {'< 0.01' if max(value, doubt) < 0.005 else divergence} nats"
            (right, top), place = spot, (0.97 if spot[0] else 0.03, 0.97 if spot[1] else 0.03)
            align: dict[str, Any] = {"ha": "right" if right else "left", "va": "top" if top else "bottom"}
            ax.text(*place, words, **align, transform=ax.transAxes, fontsize=7.5, color="0.25")
        if labels is not None:
            label = labels[index]
            ax.set_title(str(label.item() if isinstance(label, Tensor) else label), fontsize="medium")
        if pictures is not None:
            (wide, high), (right, top) = INSET, there
            box = (0.97 - wide if right else 0.03, 0.97 - high if top else 0.03, wide, high)
            inset = ax.inset_axes(box, anchor=("N" if top else "S") + ("E" if right else "W"))  # type: ignore[arg-type]
            inset.imshow(pictures[index], cmap="gray")
            inset.set(xticks=[], yticks=[])
            inset.spines[:].set_visible(False)
    return figure, panels[:n]


def axes_for(ax: Axes | None, size: tuple[float, float] = (7, 4)) -> Axes:
    """Give the axes, or new ones in a figure of their own, in inches."""
    return bare(Figure(size, dpi=120, layout="constrained").add_subplot() if ax is None else ax)


def curve(ax: Axes, values: Array, **style: Any) -> None:
    """Draw values over their numbers, one alone as a point."""
    ax.plot(np.arange(len(values)), values, marker="o" * (len(values) == 1), **{"lw": 1.2, **style})
    ax.xaxis.set_major_locator(ticks_at())
    bare(ax)


def bare(ax: Axes) -> Axes:
    """Take away the frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def ticks_at(n: int = 5) -> MaxNLocator:
    """Place about n ticks on whole numbers where that will do."""
    return MaxNLocator(n, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def number(value: float) -> str:
    """Write a number in three digits, with a true minus."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
