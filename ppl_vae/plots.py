r"""Pictures: training, reconstructions, the latent space, the approximate posterior over the exact one.

Every function gives back a matplotlib object and keeps no global state: nothing is shown, and no figure is left open.
Where `ax=None`, an axes in a figure of its own is made. Colours can be told apart by the colour-blind.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae.families import Normal, StandardNormal
from ppl_vae.program import VAE
from ppl_vae.traces import place, seeded

__all__ = [
    "ellipses",
    "latent_grid",
    "latent_scatter",
    "reconstructions",
    "samples",
    "training_curve",
    "traversals",
]

Array = npt.NDArray[np.float64]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
TWELVE = (*OKABE_ITO, "#882255", "#33FF99", "#0000FF", "#661100")  # as far apart as those of Okabe and Ito
BLUE, VERMILLION, GREY = OKABE_ITO[0], OKABE_ITO[5], "#8A8A8A"
PANELS = 64  # of ellipses, at the most
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
    ax = Figure((7, 4), dpi=120, layout="constrained").add_subplot() if ax is None else ax
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
    ax.xaxis.set_major_locator(_ticks(8))
    ax.grid(axis="y", color="0.92")
    if len(validation):
        ax.legend(frameon=False, loc="lower right")
    return _bare(ax)


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
    data, fitted = _rows(x, count), _rows(means, count)
    n = len(data)
    if shape is not None:
        columns = min(n, 10)
        blocks = [np.pad(part, ((0, -n % columns), (0, 0)), constant_values=np.nan) for part in (data, fitted)]
        pairs = np.stack([part.reshape(-1, columns, part.shape[1]) for part in blocks], 1)
        figure, ax, at, _ = _mosaic(pairs.reshape(-1, data.shape[1]), shape, columns, left=1.15, limits=data)
        ax.set_yticks(at, ["data", "reconstruction"] * len(pairs))
        return figure
    figure, panels = _panels(n, min(n, 5), 1.7, 1.6)
    for ax, one, other in zip(panels, data, fitted, strict=True):
        _curve(ax, one, color="0.3", drawstyle="steps-mid", label="data")
        _curve(ax, other, color=VERMILLION, label="reconstruction")
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
    data = _rows(x, count)
    if shape is not None:
        return _mosaic(data, shape, math.ceil(math.sqrt(len(data))))[0]
    figure = Figure((7, 4), dpi=120, layout="constrained")
    ax = figure.add_subplot(xlabel="feature", ylabel="value")
    for row in data:
        _curve(ax, row, color=BLUE, alpha=max(0.15, min(1.0, 8 / len(data))))
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
    values = None if labels is None else _array(labels).reshape(-1)
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
    return _bare(ax)


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
    figure, ax, rows, columns = _mosaic(means, shape, size, gap=gap, cell=0.36, left=0.6, bottom=0.5)
    for axis, at, values in ((ax.xaxis, columns, points[0].numpy()), (ax.yaxis, rows[::-1], points[1].numpy())):
        ticks = [tick for tick in _ticks().tick_values(values[0], values[-1]) if values[0] <= tick <= values[-1]]
        axis.set_ticks(np.interp(ticks, values, at).tolist(), [_number(tick) for tick in ticks])
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
        figure, ax, rows, columns = _mosaic(means, shape, count, left=0.4, bottom=0.5)
        ticks = np.unique(np.linspace(0, count - 1, min(count, 5)).round()).astype(int)
        ax.set_xticks(columns[ticks], [_number(float(steps[tick])) for tick in ticks])
        ax.set_yticks(rows, names)
        ax.set_xlabel(quantity)
        return figure
    figure, panels = _panels(len(chosen), 1, 7, 0.8 if len(chosen) > 3 else 1.6)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count))
    for ax, curves, name in zip(panels, means.reshape(len(chosen), count, -1), names, strict=True):
        for row, colour in zip(curves, colours, strict=True):
            _curve(ax, row, color=colour)
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
    n, pair = len(p.loc), list(axes)
    if n > PANELS:
        raise ValueError(f"Expected at most {PANELS} data, a panel each; got {n}.")
    if q.loc.shape != p.loc.shape:
        raise ValueError(f"Expected posteriors of one shape; got {tuple(q.loc.shape)} and {tuple(p.loc.shape)}.")
    for name, given in (("labels", labels), ("x", x)):
        if given is not None and len(given) != n:
            raise ValueError(f"Expected `{name}` for each of {n} data; got {len(given)}.")
    pictures = None if x is None or shape is None else _pictures(_rows(x, n), shape)
    kl, columns = kl_divergence(q, p).tolist(), min(n, 4)
    half = 1.45 * max(((one.loc - p.loc).abs() + 2 * one.stddev)[:, pair].max().item() for one in (q, p))
    rows, side, across, down = -(-n // columns), 1.7 if n > 1 else 3.3, 0.45, 0.3 if labels is None else 0.55
    width, height = 0.65 + columns * (side + across) - across + 0.1, 0.8 + rows * (side + down)  # in inches
    figure = Figure((width, height), dpi=120)
    spacing = {"left": 0.65 / width, "right": 1 - 0.1 / width, "wspace": across / side, "hspace": down / side}
    spacing |= {"bottom": 0.5 / height, "top": 1 - (0.3 + down) / height}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=spacing).ravel().tolist()
    for spare in panels[n:]:
        spare.remove()
    for index, ax in enumerate(panels[:n]):
        for one, looks, mark, colour in ((p, _EXACT, "+", BLUE), (q, _APPROXIMATE, ".", VERMILLION)):
            loc, covariance = one.loc[index, pair].tolist(), one.covariance_matrix[index][pair][:, pair].numpy()
            values, vectors = np.linalg.eigh(covariance)
            angle = math.degrees(math.atan2(vectors[1, 0], vectors[0, 0]))
            for deviations, look in zip((2, 1), looks, strict=True):
                ax.add_patch(Ellipse((loc[0], loc[1]), *(2 * deviations * np.sqrt(values)), angle=angle, **look))
            ax.plot(*loc, marker=mark, ms=7, color=colour)
        left, low = (p.loc[index, pair] - half).tolist()
        ax.set(xlim=(left, left + 2 * half), ylim=(low, low + 2 * half), aspect="equal")
        ax.set_xlabel(f"$z_{{{axes[0]}}}$" if index >= n - columns else "")
        ax.set_ylabel(f"$z_{{{axes[1]}}}$" if index % columns == 0 else "")
        ax.locator_params(nbins=4)
        ax.tick_params(color="0.6", labelsize="small")
        ax.spines[:].set_color("0.6")
        right = bool(p.covariance_matrix[index][pair[0], pair[1]] <= 0)  # the picture's side: ellipses lean away
        divergence = "< 0.01" if kl[index] < 0.005 else f"{kl[index]:.2f}"
        start, align = (0.03, "left") if right else (0.97, "right")
        ax.text(start, 0.03, f"KL {divergence} nats", ha=align, transform=ax.transAxes, fontsize=7.5, color="0.25")
        if labels is not None:
            label = labels[index]
            ax.set_title(str(label.item() if isinstance(label, Tensor) else label), fontsize="medium")
        if pictures is not None:
            inset = ax.inset_axes((0.73 if right else 0.03, 0.73, 0.24, 0.24), anchor="NE" if right else "NW")
            inset.imshow(pictures[index], cmap="gray")
            inset.set(xticks=[], yticks=[])
            inset.spines[:].set_visible(False)
    handles = [Patch(**_EXACT[1], label="exact p(z|x)"), Patch(**_APPROXIMATE[1], label="approximate q(z|x)")]
    note = "ellipses of 1 and 2 sd (39 % and 86 %)"
    figure.legend(handles=handles, title=note, loc="upper center", ncols=2, frameon=False, borderaxespad=0.1)
    return figure


def _array(x: Tensor) -> Array:
    return x.detach().double().cpu().numpy()  # type: ignore[no-any-return]


def _rows(x: Tensor, count: int) -> Array:
    """Give the first data, flat, shape (n, x)."""
    if count < 1:
        raise ValueError(f"Expected `count` to be at least 1; got {count}.")
    if x.dim() < 2:
        raise ValueError(f"Expected data of shape (n, *x); got {tuple(x.shape)}.")
    if not len(x):
        raise ValueError("Expected at least one datum; got none.")
    return _array(x[:count].flatten(1))


def _latents(codes: Tensor, axes: tuple[int, int]) -> Array:
    """Give two latents of each datum, shape (n, 2)."""
    if codes.dim() != 2 or codes.shape[1] < 2:
        raise ValueError(f"Expected codes of shape (n, z) with two latents or more; got {tuple(codes.shape)}.")
    if len(set(axes)) != 2 or not all(0 <= axis < codes.shape[1] for axis in axes):
        raise ValueError(f"Expected `axes` to be two latents from 0 to {codes.shape[1] - 1}; got {axes}.")
    return _rows(codes, max(len(codes), 1))[:, list(axes)]


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
    return _array(vae.likelihood(at).mean.flatten(1))


def _pictures(rows: Array, shape: Sequence[int]) -> Array:
    """Give pictures of shape (n, height, width)."""
    if len(shape) != 2 or math.prod(shape) != rows.shape[1]:
        raise ValueError(f"Expected a shape (height, width) of {rows.shape[1]} pixels; got {tuple(shape)}.")
    return rows.reshape(-1, *shape)


def _mosaic(
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
    pictures, (height, width) = _pictures(rows, shape), shape
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


def _panels(n: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Give a figure with a panel each, in rows, on shared axes."""
    rows = -(-n // columns)
    figure = Figure((max(width * columns + 0.5, 4.0), height * rows + 0.8), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    for index, ax in enumerate(grid):
        ax.tick_params(labelsize="small", labelbottom=index >= n - columns)
        if index >= n:
            ax.remove()
    return figure, grid[:n]


def _curve(ax: Axes, values: Array, **style: Any) -> None:
    ax.plot(np.arange(len(values)), values, marker="o" * (len(values) == 1), **{"lw": 1.2, **style})
    ax.xaxis.set_major_locator(_ticks())
    _bare(ax)


def _bare(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _ticks(n: int = 5) -> MaxNLocator:
    return MaxNLocator(n, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
