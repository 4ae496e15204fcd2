"""Plots of paths through the latent space: from one datum to another, and along an attribute."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.programs.vae import VAE
from ppl_vae.reports import style
from ppl_vae.reports.latent_plots import decoded, latent_size


def interpolation(
    vae: VAE, ends: Tensor, *, shape: Sequence[int] | None = None, count: int = 11, given: Any = None
) -> Figure:
    r"""Show the mean of p(x|z) on the way from one code to another, on the line and on the great circle.

    The line passes nearer to 0 than either end, where few draws of N(0, I) in many dimensions lie; the great circle,
    :math:`z(t) = (\sin((1 - t)\omega) z_0 + \sin(t \omega) z_1) / \sin \omega` with :math:`\omega` the angle between
    the ends, keeps away from it.

    Args:
        vae: any `VAE`.
        ends: codes of two data, (2, z).
        shape: of a picture, (height, width); None draws curves.
        count: points on the way, both ends among them.
        given: what a conditional VAE depends on, one row, as in `VAE.sample`.

    Raises:
        TypeError: If the program is not a `VAE`.
        ValueError: If the shapes do not fit.
    """
    size = latent_size(vae)
    if ends.shape != (2, size):
        raise ValueError(f"Expected codes of two data, of shape (2, {size}); got {tuple(ends.shape)}.")
    way = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(-1)
    means = decoded(vae, torch.cat([straight(ends, way), great_circle(ends, way)]), given)
    return _rows(means.reshape(2, count, -1), shape, ["line", "great circle"], ("one datum", "another"))


def straight(ends: Tensor, way: Tensor) -> Tensor:
    """Points on the line between two codes (2, z) at shares of the way (k, 1)."""
    first, last = ends.detach().double().cpu()
    return first + way * (last - first)


def great_circle(ends: Tensor, way: Tensor) -> Tensor:
    """Points on the great circle, whose lengths lie between those of the ends; on the line where there is no angle."""
    first, last = ends.detach().double().cpu()
    cosine = torch.nn.functional.cosine_similarity(first, last, 0).clamp(-1, 1)
    angle = cosine.arccos()
    if angle.sin() < 1e-6:
        return straight(ends, way)
    return (((1 - way) * angle).sin() * first + (way * angle).sin() * last) / angle.sin()


def attribute(
    vae: VAE,
    codes: Tensor,
    values: Tensor,
    *,
    shape: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    name: str = "attribute",
    count: int = 7,
    given: Any = None,
) -> Figure:
    """Show data decoded with less and more of an attribute, one row per datum, the datum as it is in the middle.

    The direction is that of a regression of the codes on the attribute: for labels of 0 and 1 the difference of the
    means of the codes. Along it each code moves by up to two standard deviations of the attribute.

    Args:
        vae: any `VAE`.
        codes: posterior means, (n, z).
        values: of the attribute, (n,).
        shape: of a picture, (height, width); None draws curves.
        rows: the data that are shown, by default the first five.
        name: of the attribute.
        count: steps from less to more.
        given: what a conditional VAE depends on, one row, as in `VAE.sample`.

    Raises:
        TypeError: If the program is not a `VAE`.
        ValueError: If the shapes do not fit, or the attribute is the same for all data.
    """
    size, flat, known = latent_size(vae), codes.detach().double().cpu(), values.detach().double().cpu()
    if flat.shape != (len(known), size) or known.dim() != 1:
        raise ValueError(
            f"Expected codes (n, {size}) and values (n,); got {tuple(flat.shape)} and {tuple(values.shape)}."
        )
    if not len(known) or float(known.std(correction=0)) == 0:
        raise ValueError("Expected an attribute that varies over the data; it is the same for all.")
    apart = (known - known.mean()) / known.std(correction=0)
    direction = (apart.unsqueeze(-1) * (flat - flat.mean(0))).mean(0)  # by how much a standard deviation moves the code
    shown = list(range(min(5, len(flat)))) if rows is None else [*rows]
    steps = torch.linspace(-2, 2, count, dtype=torch.float64)
    z = flat[shown].unsqueeze(1) + steps.unsqueeze(-1) * direction
    means = decoded(vae, z.reshape(-1, size), given).reshape(len(shown), count, -1)
    return _rows(means, shape, [f"datum {row}" for row in shown], (f"less {name}", f"more {name}"))


def _rows(means: style.Array, shape: Sequence[int] | None, names: Sequence[str], ends: tuple[str, str]) -> Figure:
    """Means (rows, steps, x), as pictures or as curves that grow lighter."""
    rows, count, _ = means.shape
    if shape is not None:
        figure, ax, up, across = style.mosaic(means.reshape(rows * count, -1), shape, count, left=1.1, bottom=0.3)
        ax.set_yticks(up, [style.short(name) for name in names])
        ax.set_xticks(across[[0, -1]], [style.short(end, 24) for end in ends])
        return figure
    figure, axes = style.panels(rows, ("feature", ""), size=(6, 1.2), gap=(0, 0.3), top=0.3, most=1, share=True)
    for ax, curves, name in zip(axes, means, names, strict=True):
        for shade, curve in zip(style.shades(count), curves, strict=True):
            style.curve(ax, curve, color=shade)
        ax.set_title(f"{style.short(name)}: dark {ends[0]}, light {ends[1]}", fontsize="small", loc="left")
    return figure
