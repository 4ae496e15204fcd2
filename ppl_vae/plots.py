r"""Pictures: training, reconstructions, the latent space, the approximate posterior over the exact one.

Every function gives back a matplotlib object and keeps no global state: nothing is shown, and no figure is left open.
Where `ax=None`, an axes in a figure of its own is made. Colours can be told apart by the colour-blind.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, Patch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae.families import Normal, StandardNormal
from ppl_vae.panels import (
    BLUE,
    GREY,
    INSET,
    OKABE_ITO,
    VERMILLION,
    WORDS,
    Array,
    Corner,
    as_array,
    axes_for,
    bare,
    curve,
    enough,
    flat_rows,
    mosaic,
    number,
    panels_of,
    squares,
    ticks_at,
)
from ppl_vae.plane import Plane
from ppl_vae.program import VAE
from ppl_vae.traces import place, seeded

__all__ = [
    "ellipses",
    "latent_grid",
    "latent_scatter",
    "reconstructions",
    "regions",
    "samples",
    "training_curve",
    "traversals",
]

TWELVE = (*OKABE_ITO, "#882255", "#33FF99", "#0000FF", "#661100")  # as far apart as those of Okabe and Ito
SHARES = (0.95, 0.5)  # of the mass that regions hold
_EXACT: tuple[dict[str, Any], ...] = (
    {"facecolor": BLUE + "30", "edgecolor": BLUE + "60"},
    {"facecolor": BLUE + "60", "edgecolor": BLUE + "90"},
)
_APPROXIMATE: tuple[dict[str, Any], ...] = 2 * ({"fill": False, "edgecolor": VERMILLION, "lw": 1.6},)


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


def latent_scatter(
    codes: Tensor,
    labels: Tensor | None = None,
    *,
    prior: Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    ax: Axes | None = None,
) -> Axes:
    """Scatter posterior means over the prior, coloured by label.

    Args:
        codes: posterior means, shape (n, z), z >= 2.
        labels: a number a datum, shape (n,): up to 12 values get a legend, more of them a colour bar.
        prior: draws of the prior, shape (k, z); none for circles at 1, 2 and 3 standard deviations of N(0, I).
        axes: the two latents to show, counted from 0.
        ax: where to draw; the legend stands outside it.

    Raises:
        ValueError: for no data, fewer than two latents, or sizes that do not fit.
    """
    points = _latents(codes, axes)
    values = None if labels is None else as_array(labels).reshape(-1)
    if values is not None and len(values) != len(points):
        raise ValueError(f"Expected a label for each of {len(points)} data; got {len(values)}.")
    known = np.zeros(0) if values is None else np.unique(values)
    if ax is None:
        ax = Figure((7.4, 5.5), dpi=120).add_axes((0.65 / 7.4, 0.55 / 5.5, 4.85 / 7.4, 4.85 / 5.5))
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    style: dict[str, Any] = {
        "s": float(np.clip(6000 / len(points), 5, 30)),
        "lw": 0.2 * (len(points) <= 1000),
        "ec": "0.2",
    }
    if values is None:
        ax.scatter(points[:, 0], points[:, 1], color=BLUE, label="posterior means", **style)
    elif len(known) > 12:
        shown = ax.scatter(points[:, 0], points[:, 1], c=values, cmap="viridis", **style)
        ax.figure.colorbar(shown, ax=ax, label="label")
        beside = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
    else:
        for value, colour in zip(known, TWELVE, strict=False):
            across, up = points[values == value].T
            ax.scatter(across, up, color=colour, label=f"{value:g}", **style)
    if prior is None:
        for radius in (1, 2, 3):
            ax.add_artist(Circle((0, 0), radius, fill=False, color=GREY, lw=0.9, zorder=0.5))
        ax.plot([], [], color=GREY, lw=0.9, label="N(0, I), 1–3 sd")
    drawn = np.array([[-3.0, -3.0], [3.0, 3.0]]) if prior is None else _latents(prior, axes)
    if prior is not None:
        ax.scatter(drawn[:, 0], drawn[:, 1], s=style["s"] / 4, color="0.8", lw=0, zorder=0.5, label="prior")
    ax.legend(frameon=False, markerscale=(30 / style["s"]) ** 0.5, **beside)
    low, high = (extreme(np.concatenate([points, drawn]), 0) for extreme in (np.min, np.max))
    (left, bottom), half = (low + high) / 2, 0.53 * (high - low).max() or 1.0
    ax.set(xlim=(left - half, left + half), ylim=(bottom - half, bottom + half), aspect="equal", anchor="W")
    ax.set(xlabel=f"$z_{{{axes[0]}}}$", ylabel=f"$z_{{{axes[1]}}}$")
    return bare(ax)


def latent_grid(vae: VAE, *, shape: Sequence[int], size: int = 20, gap: int | None = None) -> Figure:
    r"""Tile the mean of p(x|z) over the plane of two latents, even in the prior's probability.

    Under a `StandardNormal` or `Normal` prior the points are :math:`z = \mathrm{loc} + \mathrm{scale}\,\Phi^{-1}(u)`
    with u the midpoints of a square grid on the unit square; under any other prior they are a linear grid over the
    central 95 % of its draws.

    Args:
        vae: a `VAE` with two latents.
        shape: of a picture, (height, width).
        size: points along each axis.
        gap: pixels between pictures; by default one where these are small, else none.

    Raises:
        TypeError: for a program that is no `VAE`.
        ValueError: for another number of latents, or a shape that does not fit.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling 2013), Figure 4.
    """
    latents = _latent_size(vae)
    if latents != 2:
        raise ValueError(f"Expected exactly two latents, for a plane; got {latents}. Use `traversals`.")
    if size < 1:
        raise ValueError(f"Expected `size` to be at least 1; got {size}.")
    levels = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    with torch.no_grad(), seeded(0, device=place(vae)[0]):
        prior = vae.prior()
        if isinstance(vae.prior.family, StandardNormal | Normal):
            loc, scale = (value.reshape(2, 1).double().cpu() for value in (prior.mean, prior.stddev))
            points = loc + scale * torch.special.ndtri(levels)
        else:
            drawn = prior.expand([10_000]).sample().reshape(-1, 2).double().cpu()
            low, high = drawn.quantile(drawn.new_tensor([0.025, 0.975]), 0).unsqueeze(-1)
            points = low + (high - low) * levels
    up, across = torch.meshgrid(points[1].flip(0), points[0], indexing="ij")
    means = _decode(vae, torch.stack([across, up], -1).reshape(-1, 2))
    gap = (1 if max(shape) <= 16 else 0) if gap is None else gap
    figure, ax, rows, columns = mosaic(means, shape, size, gap=gap, cell=0.36, left=0.6, bottom=0.5)
    for axis, at, values in ((ax.xaxis, columns, points[0].numpy()), (ax.yaxis, rows[::-1], points[1].numpy())):
        ticks = [tick for tick in ticks_at().tick_values(values[0], values[-1]) if values[0] <= tick <= values[-1]]
        axis.set_ticks(np.interp(ticks, values, at).tolist(), [number(tick) for tick in ticks])
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
) -> Figure:
    """Draw the mean of p(x|z) while one latent varies, a row a latent: as pictures, or curves coloured by its value.

    Args:
        vae: any `VAE`.
        shape: of a picture, (height, width); none for other data.
        base: where the other latents stay, shape (z,); zeros by default.
        count: values a latent.
        latents: which ones, counted from 0; the first ten by default.
        spread: the latent goes from -spread to +spread around its base, in units of z.

    Raises:
        TypeError: for a program that is no `VAE`.
        ValueError: for latents that do not exist, or sizes that do not fit.
    """
    size = _latent_size(vae)
    chosen = list(range(min(size, 10)) if latents is None else latents)
    if not chosen:
        raise ValueError("Expected at least one latent; got none.")
    if not all(0 <= index < size for index in chosen):
        raise ValueError(f"Expected `latents` from 0 to {size - 1}; got {chosen}.")
    if count < 1 or not 0 < spread < math.inf:
        raise ValueError(f"Expected `count` at least 1 and a positive `spread`; got {count} and {spread}.")
    start = torch.zeros(size) if base is None else base.detach().cpu()
    if start.shape != (size,):
        raise ValueError(f"Expected `base` of shape ({size},); got {tuple(start.shape)}.")
    steps = torch.linspace(-spread, spread, count, dtype=torch.float64) if count > 1 else torch.zeros(1).double()
    z = start.double().repeat(len(chosen), count, 1)
    z[torch.arange(len(chosen)), :, chosen] += steps
    means = _decode(vae, z.reshape(-1, size))
    names = [f"$z_{{{index}}}$" for index in chosen]
    quantity = "value of the latent" if base is None else "offset of the latent from its base"
    if shape is not None:
        figure, ax, rows, columns = mosaic(means, shape, count, left=0.4, bottom=0.5)
        ticks = np.unique(np.linspace(0, count - 1, min(count, 5)).round()).astype(int)
        ax.set_xticks(columns[ticks], [number(float(steps[tick])) for tick in ticks])
        ax.set_yticks(rows, names)
        ax.set_xlabel(quantity)
        return figure
    figure, panels = panels_of(len(chosen), 1, 7, 0.8 if len(chosen) > 3 else 1.6)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count))
    for ax, curves, name in zip(panels, means.reshape(len(chosen), count, -1), names, strict=True):
        for row, colour in zip(curves, colours, strict=True):
            curve(ax, row, color=colour)
        ax.set_ylabel(name, rotation=0, labelpad=10, va="center")
    panels[-1].set_xlabel("feature")
    edge = spread * (1 + 1 / max(count - 1, 1))
    mapping = ScalarMappable(Normalize(-edge, edge), ListedColormap(colours))
    figure.colorbar(mapping, ax=panels, label=quantity, fraction=0.03)
    return figure


def ellipses(
    approximate: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    *,
    labels: Sequence[object] | Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Figure:
    r"""Draw the approximate posterior over the exact one, a panel a datum, by ellipses of 1 and 2 standard deviations.

    They hold :math:`1 - e^{-1/2} = 39 \%` and :math:`1 - e^{-2} = 86 \%` of a Gaussian. All panels are of one width in
    z, each centred on its exact mean; in each stands :math:`\mathrm{KL}(q \,\|\, p)` over all latents, in nats.

    Args:
        approximate: mean (n, z) and covariance (n, z, z) of q(z|x), z >= 2.
        exact: likewise of p(z|x).
        labels: what stands above each panel.
        axes: the two latents to show, counted from 0.
        x: data, shape (n, *x), for a small picture in each panel.
        shape: of such a picture, (height, width).

    Raises:
        ValueError: for no data or more than 64, sizes that do not fit, or covariances that are not positive definite.
    """
    q, p = (_gaussian(*given, axes) for given in (approximate, exact))
    pair = list(axes)
    if q.loc.shape != p.loc.shape:
        raise ValueError(f"Expected posteriors of one shape; got {tuple(q.loc.shape)} and {tuple(p.loc.shape)}.")
    kl = kl_divergence(q, p)
    half = 1.45 * max(((one.loc - p.loc).abs() + 2 * one.stddev)[:, pair].max().item() for one in (q, p))
    down = (p.covariance_matrix[:, pair[0], pair[1]] <= 0).tolist()
    corners = [((one, True), (not one, False)) for one in down]  # what slopes downwards leaves the upper right one free
    figure, panels = squares(corners, kl=kl, labels=labels, axes=axes, x=x, shape=shape)
    for index, ax in enumerate(panels):
        for one, looks, mark, colour in ((p, _EXACT, "+", BLUE), (q, _APPROXIMATE, ".", VERMILLION)):
            loc, covariance = one.loc[index, pair], one.covariance_matrix[index][pair][:, pair]
            for deviations, look in zip((2, 1), looks, strict=True):
                ax.add_patch(_ellipse(loc, covariance, deviations, look))
            ax.plot(*loc.tolist(), marker=mark, ms=7, color=colour)
        left, low = (p.loc[index, pair] - half).tolist()
        ax.set(xlim=(left, left + 2 * half), ylim=(low, low + 2 * half), aspect="equal")
    handles = [Patch(**_EXACT[1], label="exact p(z|x)"), Patch(**_APPROXIMATE[1], label="approximate q(z|x)")]
    note = "ellipses of 1 and 2 sd (39 % and 86 %)"
    figure.legend(handles=handles, title=note, loc="upper center", ncols=2, frameon=False, borderaxespad=0.1)
    return figure


def regions(
    exact: Plane,
    approximate: Plane | tuple[Tensor, Tensor],
    *,
    name: str = "guide q(z|x)",
    kl: Tensor | None = None,
    error: Tensor | None = None,
    labels: Sequence[object] | Tensor | None = None,
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Figure:
    r"""Draw the approximate posterior over the exact one's density, a panel a datum, whatever the shape of either.

    Of each the regions of highest density that hold 50 % and 95 %; those of a Gaussian are ellipses of
    :math:`\sqrt{-2 \ln(1 - 0.5)} = 1.18` and :math:`\sqrt{-2 \ln(1 - 0.95)} = 2.45` standard deviations. All panels
    are of one width in z0, and in z1. The small picture stands in the corner that the regions leave free.

    Args:
        exact: p(z|x), by `posterior_plane`.
        approximate: q(z|x), by `guide_plane`, or mean (n, 2) and covariance (n, 2, 2) of a Gaussian.
        name: of q in the legend.
        kl: what stands in each panel as KL, in nats, (n,).
        error: its standard error, likewise.
        labels: what stands above each panel.
        x: data, shape (n, *x), for a small picture in each panel.
        shape: of such a picture, (height, width).

    Raises:
        ValueError: for no data or more than 64, sizes that do not fit, or covariances that are not positive definite.
    """
    q = approximate if isinstance(approximate, Plane) else _gaussian(*approximate, (0, 1))
    there = q.points if isinstance(q, Plane) else q.loc
    if len(there) != len(exact.points) or there.shape[-1] != 2:
        raise ValueError(
            f"Expected two latents and {len(exact.points)} data of both; got {there.shape[-1]} and {len(there)}."
        )
    enough(len(there))
    radii = [math.sqrt(-2 * math.log1p(-share)) for share in SHARES]
    inside = [torch.cat([p, q]) for p, q in zip(_inside(exact), _inside(q), strict=True)]
    low, high = (torch.stack([pick(points, 0) for points in inside]) for pick in (torch.amin, torch.amax))
    middle, half = (low + high) / 2, 0.72 * (high - low).amax(0)
    pictured = x is not None and shape is not None
    for _ in range(6):  # somewhat wider until all corners that are needed are free
        scaled = [(points - centre) / (2 * half) + 0.5 for points, centre in zip(inside, middle, strict=True)]
        found = [_corners(points, picture=pictured, words=kl is not None) for points in scaled]
        if not any(covered for *_, covered in found):
            break
        half = 1.06 * half
    corners = [(there, spot) for there, spot, _ in found]
    figure, panels = squares(corners, kl=kl, error=error, labels=labels, x=x, shape=shape)
    for index, ax in enumerate(panels):
        _region(ax, exact, index, _EXACT, filled=True)
        if isinstance(q, Plane):
            _region(ax, q, index, _APPROXIMATE, filled=False)
        else:
            for radius, look in zip(radii, _APPROXIMATE, strict=True):
                ax.add_patch(_ellipse(q.loc[index], q.covariance_matrix[index], radius, look))
        (left, bottom), (right, top) = (middle[index] - half).tolist(), (middle[index] + half).tolist()
        ax.set(xlim=(left, right), ylim=(bottom, top), box_aspect=1)
    handles = [Patch(**_EXACT[1], label="exact p(z|x), by quadrature"), Patch(**_APPROXIMATE[1], label=name)]
    note = "regions of highest density that hold 50 % and 95 %"
    figure.legend(handles=handles, title=note, loc="upper center", ncols=2, frameon=False, borderaxespad=0.1)
    return figure


def _ellipse(loc: Tensor, covariance: Tensor, deviations: float, look: dict[str, Any]) -> Ellipse:
    values, vectors = np.linalg.eigh(covariance.numpy())
    angle = math.degrees(math.atan2(vectors[1, 0], vectors[0, 0]))
    return Ellipse((float(loc[0]), float(loc[1])), *(2 * deviations * np.sqrt(values)), angle=angle, **look)


def _inside(q: Plane | MultivariateNormal) -> list[Tensor]:
    """Give points that fill the larger region of each datum, (points, 2), those of a Gaussian to its very edge."""
    if isinstance(q, Plane):
        inside = q.density >= q.level(SHARES[0])[:, None, None]
        return [points[which].double().cpu() for points, which in zip(q.points, inside, strict=True)]
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)[:-1]
    radius = math.sqrt(-2 * math.log1p(-SHARES[0])) * torch.linspace(0, 1, 21, dtype=torch.float64)
    disc = (radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)).flatten(0, 1)
    return list(q.loc.unsqueeze(1) + disc @ q.scale_tril.mT)


def _corners(points: Tensor, *, picture: bool, words: bool) -> tuple[Corner, Corner, bool]:
    """Choose two corners of the unit square with the fewest points, and say whether any lie in what stands there.

    Of equals, the picture prefers the upper corners and the words the lower ones.
    """

    def fewest(size: tuple[float, float], which: Sequence[Corner]) -> tuple[int, Corner]:
        counts = []
        for right, top in which:
            apart = (points - torch.tensor([right, top]).to(points)).abs()
            counts.append(int((apart < torch.tensor(size).to(points) + 0.04).all(-1).sum()))
        least = min(range(len(which)), key=counts.__getitem__)
        return counts[least], which[least]

    every = [(True, True), (False, True), (False, False), (True, False)]
    covered, there = fewest(INSET, every) if picture else (0, every[0])
    left = [corner for corner in every[::-1] if not picture or corner[1] != there[1]]
    hidden, spot = fewest(WORDS, left) if words else (0, left[0])
    return there, spot, covered + hidden > 0


def _region(ax: Axes, plane: Plane, index: int, looks: Sequence[dict[str, Any]], *, filled: bool) -> None:
    across, up = as_array(plane.points[index]).transpose(2, 0, 1)
    density, levels = as_array(plane.density[index]), [float(plane.level(share)[index]) for share in SHARES]
    if filled:
        colours = [look["facecolor"] for look in looks]
        ax.contourf(across, up, density, [*levels, 1.01 * density.max()], colors=colours)
    widths = [look.get("lw", 1.0) for look in looks]
    ax.contour(across, up, density, levels, colors=[look["edgecolor"] for look in looks], linewidths=widths)


def _latents(codes: Tensor, axes: tuple[int, int]) -> Array:
    """Give two latents of each datum, shape (n, 2)."""
    if codes.dim() != 2 or codes.shape[1] < 2:
        raise ValueError(f"Expected codes of shape (n, z) with two latents or more; got {tuple(codes.shape)}.")
    if len(set(axes)) != 2 or not all(0 <= axis < codes.shape[1] for axis in axes):
        raise ValueError(f"Expected `axes` to be two latents from 0 to {codes.shape[1] - 1}; got {axes}.")
    return flat_rows(codes, max(len(codes), 1))[:, list(axes)]


def _gaussian(loc: Tensor, covariance: Tensor, axes: tuple[int, int]) -> MultivariateNormal:
    """Give the distribution of batch shape (n,), in double precision on the CPU."""
    _latents(loc, axes)
    if covariance.shape != (*loc.shape, loc.shape[1]):
        raise ValueError(f"Expected a covariance of shape {(*loc.shape, loc.shape[1])}; got {tuple(covariance.shape)}.")
    factor, failed = torch.linalg.cholesky_ex(covariance.detach().double().cpu())
    if bool(failed.any()):
        raise ValueError(f"Expected positive definite covariances; that of datum {int(failed.nonzero()[0])} is not.")
    return MultivariateNormal(loc.detach().double().cpu(), scale_tril=factor)


def _latent_size(vae: VAE) -> int:
    if not isinstance(vae, VAE):
        raise TypeError(f"Expected a VAE, whose likelihood can be asked for its mean; got {type(vae).__name__}.")
    return vae.prior.family.event_shape.numel()


@torch.no_grad()
def _decode(vae: VAE, z: Tensor) -> Array:
    """Give the mean of p(x|z), shape (n, x), at z of shape (n, z)."""
    device, dtype = place(vae)
    at = z.to(device, dtype).reshape(-1, *vae.prior.family.event_shape)
    return as_array(vae.likelihood(at).mean.flatten(1))
