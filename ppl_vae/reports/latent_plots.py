"""Plots of the latent space: posterior means, the plane of two latents, traversals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from ppl_vae._seeds import fork_rng
from ppl_vae.families.elementwise import Normal, StandardNormal
from ppl_vae.families.supports import bounds, describe_support
from ppl_vae.programs.param_store import device_and_dtype, mode
from ppl_vae.programs.vae import VAE
from ppl_vae.reports import style

TWELVE = (*style.OKABE_ITO, "#882255", "#33FF99", "#0000FF", "#661100")  # as easy to tell apart as Okabe and Ito's


def latent_scatter(
    codes: Tensor,
    labels: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    prior: Tensor | None = None,
    axes: tuple[int, int] | None = (0, 1),
    quantity: str = "label",
    ax: Axes | None = None,
) -> Axes:
    """Scatter posterior means over the prior, coloured by label or by any other number.

    Args:
        codes: posterior means, (n, z) with z at least 2.
        labels: one number per datum, (n,): up to 12 values get a legend, more get a colour bar.
        names: what labels 0, 1, ... are called, if they are called something.
        prior: draws of the prior, (k, z); by default circles at 1, 2 and 3 standard deviations of N(0, I).
        axes: the two latents to show, counted from 0; None for the two principal components of the codes.
        quantity: what the colours of a colour bar are.
        ax: where to draw, by default in a new figure; the legend stands outside.

    Raises:
        ValueError: If there are no data or fewer than two latents, or sizes do not fit.
    """
    latents = [f"$z_{{{axis}}}$" for axis in axes or ()]
    if axes is None:
        codes, prior, latents = _principal(codes, prior)
    points = latent_pairs(codes, axes or (0, 1))
    values = None if labels is None else style.as_array(labels).reshape(-1)
    if values is not None and len(values) != len(points):
        raise ValueError(f"Expected a label for each of {len(points)} data; got {len(values)}.")
    distinct = np.zeros(0) if values is None else np.unique(values)
    if ax is None:
        ax = Figure((6.6, 4.9), dpi=120).add_axes((0.65 / 6.6, 0.55 / 4.9, 4.25 / 6.6, 4.25 / 4.9))
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    area = float(np.clip(6000 / len(points), 5, 30))
    look: dict[str, Any] = {"s": area, "lw": 0.4 * (len(points) <= 1000), "ec": "0.2"}
    across, up = points.T
    if values is None:
        ax.scatter(across, up, color=style.BLUE, label="posterior means", **look)
    elif len(distinct) > len(TWELVE):
        low, high = np.nanquantile(values, [0.02, 0.98])  # a few outliers do not take all colours
        shown = ax.scatter(across, up, c=values, cmap="viridis", vmin=low, vmax=high, **look)
        ax.figure.colorbar(shown, ax=ax, label=style.short(quantity, 40), extend="both")
        beside = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
    else:
        for value, colour in zip(distinct, TWELVE, strict=False):
            which = values == value
            name = style.short(names[int(value)]) if names and value < len(names) else f"{value:g}"
            ax.scatter(across[which], up[which], color=colour, label=name, **look)
    if prior is None:
        drawn = np.array([[-3.0, -3.0], [3.0, 3.0]])
        for radius in (1, 2, 3):
            ax.add_artist(Circle((0, 0), radius, fill=False, color=style.GREY, lw=0.9, zorder=0.5))
        ax.plot([], [], color=style.GREY, lw=0.9, label="N(0, I), 1–3 sd")
    else:
        drawn = latent_pairs(prior, axes or (0, 1))
        ax.scatter(drawn[:, 0], drawn[:, 1], s=max(area / 4, 2.5), color="0.75", lw=0, zorder=0.5)
        ax.scatter([], [], s=area, color="0.75", lw=0, label="prior")
    ax.legend(frameon=False, markerscale=(30 / area) ** 0.5, **beside)
    low, high = (extreme(np.concatenate([points, drawn]), 0) for extreme in (np.min, np.max))
    (left, bottom), half = (low + high) / 2, 0.53 * (high - low).max() or 1.0
    ax.set(xlim=(left - half, left + half), ylim=(bottom - half, bottom + half), aspect="equal", anchor="W")
    ax.set(xlabel=latents[0], ylabel=latents[1])
    return style.bare(ax)


def _principal(codes: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor | None, list[str]]:
    """Codes and draws of the prior on the two principal components of the codes, and the names of these."""
    if codes.dim() != 2 or codes.shape[1] < 2:
        raise ValueError(f"Expected codes of shape (n, z) with two latents or more; got {tuple(codes.shape)}.")
    style.check_some(len(codes))
    flat = codes.detach().double().cpu()
    _, size, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    plane = torch.nn.functional.pad(directions, (0, 0, 0, max(2 - len(directions), 0)))[:2].mT
    shares = torch.nn.functional.pad(size.square() / size.square().sum().clamp_min(1e-30), (0, 2))[:2].tolist()
    names = [f"principal component {i + 1} of the codes ({share:.0%})" for i, share in enumerate(shares)]
    others = None if prior is None else (prior.detach().double().cpu() - flat.mean(0)) @ plane
    return (flat - flat.mean(0)) @ plane, others, names


def latent_grid(
    vae: VAE,
    *,
    shape: Sequence[int],
    size: int = 20,
    gap: int | None = None,
    given: Any = None,
    codes: Tensor | None = None,
) -> Figure:
    r"""Show the mean of p(x|z) over the plane of two latents, at points even in the prior's probability.

    With `codes` the points are a linear grid over their central 98 %, where the data are. Else under a
    `StandardNormal` or `Normal` prior they are :math:`z = \mathrm{loc} + \mathrm{scale}\,\Phi^{-1}(u)`
    with u the midpoints of a square grid on the unit square; under any other prior they are a linear grid over the
    central 95 % of its draws.

    Args:
        vae: a `VAE` with two latents.
        shape: of a picture, (height, width).
        size: points along each axis.
        gap: pixels between pictures, by default one if they are small, else none.
        given: what a conditional VAE depends on, one row, as in `VAE.sample`.
        codes: posterior means, (n, 2).

    Raises:
        TypeError: If the program is not a `VAE`.
        ValueError: If it has another number of latents or they are no plane, or the shape does not fit.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling 2013), Figure 4.
    """
    latents = latent_size(vae)
    if latents != 2:
        raise ValueError(f"Expected exactly two latents, for a plane; got {latents}. Use `traversals`.")
    if bounds(vae.prior.family.support) is None:
        raise ValueError(f"Expected a plane of latents; got {describe_support(vae.prior.family.support)}.")
    if size < 1:
        raise ValueError(f"Expected `size` to be at least 1; got {size}.")
    levels = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    with torch.no_grad(), fork_rng(0, device=device_and_dtype(vae)[0]):
        prior = vae.prior(*vae.context("prior", vae.given_batch(given, 1)))
        if codes is not None:
            points = between(codes.reshape(-1, 2), 0.01, size)
        elif isinstance(vae.prior.family, StandardNormal | Normal):
            loc, scale = (value.reshape(2, 1).double().cpu() for value in (prior.mean, prior.stddev))
            points = loc + scale * torch.special.ndtri(levels)
        else:
            drawn = prior.expand([10_000]).sample().reshape(-1, 2).double().cpu()
            low, high = drawn.quantile(drawn.new_tensor([0.025, 0.975]), 0).unsqueeze(-1)
            points = low + (high - low) * levels
    up, across = torch.meshgrid(points[1].flip(0), points[0], indexing="ij")
    means = decoded(vae, torch.stack([across, up], -1).reshape(-1, 2), given)
    gap = (1 if max(shape) <= 16 else 0) if gap is None else gap
    figure, ax, rows, columns = style.mosaic(means, shape, size, gap=gap, cell=0.36, left=0.6, bottom=0.5)
    for axis, at, values in ((ax.xaxis, columns, points[0].numpy()), (ax.yaxis, rows[::-1], points[1].numpy())):
        low, high = values[0], values[-1]
        ticks = [tick for tick in style.ticks_at(integer=False).tick_values(low, high) if low <= tick <= high]
        axis.set_ticks(np.interp(ticks, values, at).tolist(), [style.number(tick) for tick in ticks])
    ax.set(xlabel="$z_{0}$", ylabel="$z_{1}$")
    return figure


def traversals(
    vae: VAE,
    *,
    shape: Sequence[int] | None = None,
    base: Tensor | None = None,
    count: int = 9,
    latents: Sequence[int] | None = None,
    spread: float = 2.5,
    codes: Tensor | None = None,
    features: Sequence[str] | None = None,
    given: Any = None,
) -> Figure:
    """Show the mean of p(x|z) while one latent varies, one row per latent: as pictures, or curves coloured by value.

    Args:
        vae: any `VAE`.
        shape: of a picture, (height, width); None draws curves.
        base: where the other latents stay, (z,), by default zeros.
        count: values per latent.
        latents: which ones, counted from 0, in this order; by default the first ten.
        spread: the latent goes from -spread to +spread around its base, in units of z.
        codes: draws of the guide over the data, (n, z). Each latent then goes over their central 98 % in place of
            `spread`, and the others stay at their median.
        features: their names, on the axis of curves.
        given: what a conditional VAE depends on, one row, as in `VAE.sample`.

    Raises:
        TypeError: If the program is not a `VAE`.
        ValueError: If a latent does not exist, sizes do not fit, or the latents are not on the real line.
    """
    size = latent_size(vae)
    if bounds(vae.prior.family.support) != (-math.inf, math.inf):
        raise ValueError(f"Expected latents on the real line; got {describe_support(vae.prior.family.support)}.")
    chosen = list(range(min(size, 10)) if latents is None else latents)
    if not chosen:
        raise ValueError("Expected at least one latent; got none.")
    if not all(0 <= index < size for index in chosen):
        raise ValueError(f"Expected `latents` from 0 to {size - 1}; got {chosen}.")
    if count < 1 or not 0 < spread < math.inf:
        raise ValueError(f"Expected `count` at least 1 and a positive `spread`; got {count} and {spread}.")
    if codes is not None and base is None:
        base = codes.detach().cpu().median(0).values
    start = torch.zeros(size) if base is None else base.detach().cpu()
    if start.shape != (size,):
        raise ValueError(f"Expected `base` of shape ({size},); got {tuple(start.shape)}.")
    steps = torch.linspace(-spread, spread, count, dtype=torch.float64) if count > 1 else torch.zeros(1).double()
    z = start.double().repeat(len(chosen), count, 1)
    if codes is None:
        z[torch.arange(len(chosen)), :, chosen] += steps
    else:
        z[torch.arange(len(chosen)), :, chosen] = between(codes[:, chosen], 0.01, count)
        steps = torch.linspace(1, 99, count, dtype=torch.float64)
    means = decoded(vae, z.reshape(-1, size), given)
    names = [f"$z_{{{index}}}$" for index in chosen]
    quantity = "value of the latent" if base is None else "offset of the latent from its base"
    if codes is not None:
        quantity = "latent, from its 1 % to its 99 % quantile over the data"
    if shape is not None:
        figure, ax, rows, columns = style.mosaic(means, shape, count, left=0.4, bottom=0.5)
        ticks = np.unique(np.linspace(0, count - 1, min(count, 5)).round()).astype(int)
        if codes is None:
            ax.set_xticks(columns[ticks], [style.number(float(steps[tick])) for tick in ticks])
        else:
            ax.set_xticks(columns[[0, -1]], ["1 %", "99 %"])
        ax.set_yticks(rows, names)
        ax.set_xlabel(quantity)
        return figure
    tall = 0.7 if len(chosen) > 3 else 1.5
    figure, axes = style.panels(len(chosen), ("feature", ""), size=(6, tall), gap=(0, 0), top=0, most=1, share=True)
    colours = style.shades(count)
    for ax, curves, name in zip(axes, means.reshape(len(chosen), count, -1), names, strict=True):
        for row, colour in zip(curves, colours, strict=True):
            style.curve(ax, row, color=colour)
        ax.set_ylabel(name, rotation=0, labelpad=10, va="center")
    if features is not None and len(features) <= 20:
        axes[-1].set_xticks(range(len(features)), [style.short(name, 14) for name in features], rotation=40, ha="right")
        axes[-1].set_xlabel("")
    low, high = (-spread, spread) if codes is None else (0.01, 0.99)
    edge = (high - low) / max(count - 1, 1) / 2
    mapping = ScalarMappable(Normalize(low - edge, high + edge), ListedColormap(colours))
    figure.set_layout_engine("constrained")
    figure.colorbar(mapping, ax=axes, label=quantity, fraction=0.03)
    return figure


def between(codes: Tensor, tail: float, count: int) -> Tensor:
    """Points evenly from one quantile of each latent to its other, (z, count), in double precision."""
    flat = codes.detach().double().cpu()
    low, high = (flat.quantile(level, 0).unsqueeze(-1) for level in (tail, 1 - tail))
    return low + (high - low) * torch.linspace(0, 1, count, dtype=torch.float64)


def latent_pairs(codes: Tensor, axes: tuple[int, int]) -> style.Array:
    """Two latents of each datum, (n, 2)."""
    if codes.dim() != 2 or codes.shape[1] < 2:
        raise ValueError(f"Expected codes of shape (n, z) with two latents or more; got {tuple(codes.shape)}.")
    if len(set(axes)) != 2 or not all(0 <= axis < codes.shape[1] for axis in axes):
        raise ValueError(f"Expected `axes` to be two latents from 0 to {codes.shape[1] - 1}; got {axes}.")
    return style.flat_rows(codes, max(len(codes), 1))[:, list(axes)]


def latent_size(vae: VAE) -> int:
    """The number of latents; a TypeError for a program that is no `VAE`."""
    if not isinstance(vae, VAE):
        raise TypeError(f"Expected a VAE, whose likelihood has a mean to show; got {type(vae).__name__}.")
    return vae.prior.family.event_shape.numel()


@torch.no_grad()
def decoded(vae: VAE, z: Tensor, given: Any, words: Sequence[int] = ()) -> style.Array:
    """The mean of p(x|z), (n, x), at z, (n, z), and at one row of what is given; of `words` the most frequent draw."""
    device, dtype = device_and_dtype(vae)
    at = z.to(device, dtype).reshape(-1, *vae.prior.family.event_shape)
    with mode(vae):
        others = vae.context("likelihood", vae.given_batch(given, 1))
        x = vae.likelihood(at, *others)
        means = style.as_array(x.mean.flatten(1))
        if words:
            with fork_rng(0, "words", device=device):
                means[:, words] = style.as_array(x.sample((1000,)).flatten(2)[..., words].mode(0).values)
        return means
