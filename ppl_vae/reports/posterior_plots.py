"""Plots of the approximate posterior over the exact one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Patch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae.infer.density_grid import DensityGrid
from ppl_vae.reports import style
from ppl_vae.reports.latent_plots import latent_pairs

SHARES = (0.95, 0.5)  # probabilities that the regions hold
_RADII = tuple(math.sqrt(-2 * math.log1p(-share)) for share in SHARES)  # of a Gaussian's, in standard deviations
_EXACT: tuple[dict[str, Any], ...] = (
    {"facecolor": style.BLUE + "30", "edgecolor": style.BLUE + "60"},
    {"facecolor": style.BLUE + "60", "edgecolor": style.BLUE + "90"},
)
_APPROXIMATE: tuple[dict[str, Any], ...] = 2 * ({"fill": False, "edgecolor": style.VERMILLION, "lw": 1.6},)
_PICTURE = 0.24  # side of the small picture, as a fraction of a panel
_CORNERS = ((1, 1), (0, 1), (0, 0), (1, 0))  # of a panel, by their coordinates


def ellipses(
    approximate: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    *,
    labels: Sequence[object] | Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Figure:
    r"""Draw the approximate posterior over the exact one as ellipses of 1 and 2 standard deviations, a panel per datum.

    They hold :math:`1 - e^{-1/2} = 39 \%` and :math:`1 - e^{-2} = 86 \%` of a Gaussian. All panels have the same width
    in z and are centred on the exact mean; each states :math:`\mathrm{KL}(q \,\|\, p)` over all latents, in nats.

    Args:
        approximate: mean (n, z) and covariance (n, z, z) of q(z|x), with z at least 2.
        exact: likewise of p(z|x).
        labels: titles of the panels.
        axes: the two latents to show, counted from 0.
        x: data, (n, *x), shown as a small picture in each panel.
        shape: of such a picture, (height, width).

    Raises:
        ValueError: If there are no data or more than 64, sizes do not fit, or a covariance is not positive definite.
    """
    pair = list(axes)
    q, p = (_gaussian(*moments, axes) for moments in (approximate, exact))
    if q.loc.shape != p.loc.shape:
        raise ValueError(f"Expected posteriors of one shape; got {tuple(q.loc.shape)} and {tuple(p.loc.shape)}.")
    two = [MultivariateNormal(one.loc[:, pair], one.covariance_matrix[:, pair][:, :, pair]) for one in (p, q)]
    middle = two[0].loc
    half = 1.6 * torch.stack([(one.loc - middle).abs() + 2 * one.stddev for one in two]).max().expand(2)
    inside = [torch.cat(points) for points in zip(*(_disc(one, 2.0) for one in two), strict=True)]
    figure, drawn = _panels(inside, middle, half, kl=kl_divergence(q, p), labels=labels, axes=axes, x=x, shape=shape)
    for index, ax in enumerate(drawn):
        for one, looks, mark, colour in zip(
            two, (_EXACT, _APPROXIMATE), "+.", (style.BLUE, style.VERMILLION), strict=True
        ):
            _draw_ellipses(ax, one, index, (2.0, 1.0), looks)
            ax.plot(*one.loc[index].tolist(), marker=mark, ms=7, color=colour)
    return _explain(figure, "exact p(z|x)", "approximate q(z|x)", "ellipses of 1 and 2 sd (39 % and 86 %)")


def regions(
    exact: DensityGrid,
    approximate: DensityGrid | tuple[Tensor, Tensor],
    *,
    name: str = "guide q(z|x)",
    kl: Tensor | None = None,
    error: Tensor | None = None,
    labels: Sequence[object] | Tensor | None = None,
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Figure:
    r"""Draw the approximate posterior over the exact one's density, whatever their shapes, a panel per datum.

    Of each it shows the regions of highest density that hold 50 % and 95 %; those of a Gaussian are ellipses of
    :math:`\sqrt{-2 \ln(1 - 0.5)} = 1.18` and :math:`\sqrt{-2 \ln(1 - 0.95)} = 2.45` standard deviations. All panels
    have the same width in z0, and in z1.

    Args:
        exact: p(z|x), from `posterior_grid`.
        approximate: q(z|x), from `guide_grid`, or mean (n, 2) and covariance (n, 2, 2) of a Gaussian.
        name: of q in the legend.
        kl: KL of q to p that each panel states, in nats, (n,).
        error: its standard error, (n,).
        labels: titles of the panels.
        x: data, (n, *x), shown as a small picture in each panel.
        shape: of such a picture, (height, width).

    Raises:
        ValueError: If there are no data or more than 64, sizes do not fit, or a covariance is not positive definite.
    """
    q = approximate if isinstance(approximate, DensityGrid) else _gaussian(*approximate, (0, 1))
    locs = q.points if isinstance(q, DensityGrid) else q.loc
    if len(locs) != len(exact.points) or locs.shape[-1] != 2:
        raise ValueError(
            f"Expected two latents and {len(exact.points)} data of both; got {locs.shape[-1]} and {len(locs)}."
        )
    style.check_panels(len(locs))
    inside = [torch.cat(points) for points in zip(_inside(exact), _inside(q), strict=True)]
    low, high = (torch.stack([pick(points, 0) for points in inside]) for pick in (torch.amin, torch.amax))
    middle, half = (low + high) / 2, 0.72 * (high - low).amax(0)
    figure, drawn = _panels(inside, middle, half, kl=kl, error=error, labels=labels, x=x, shape=shape)
    for index, ax in enumerate(drawn):
        _draw_region(ax, exact, index, _EXACT, filled=True)
        if isinstance(q, DensityGrid):
            _draw_region(ax, q, index, _APPROXIMATE, filled=False)
        else:
            _draw_ellipses(ax, q, index, _RADII, _APPROXIMATE)
    note = "regions of highest density that hold 50 % and 95 %"
    return _explain(figure, "exact p(z|x), by quadrature", name, note)


def _panels(
    inside: Sequence[Tensor],
    middle: Tensor,
    half: Tensor,
    *,
    kl: Tensor | None,
    error: Tensor | None = None,
    labels: Sequence[object] | Tensor | None,
    axes: tuple[int, int] = (0, 1),
    x: Tensor | None,
    shape: Sequence[int] | None,
) -> tuple[Figure, list[Axes]]:
    """Square panels of two latents, a little wider than asked for if the small picture would hide something.

    Args:
        inside: points of each datum that must stay visible, (points, 2).
        middle: of each panel, (n, 2).
        half: half the panels' widths in z, (2,).
        kl: KL that each panel states, in nats, (n,).
        error: its standard error, (n,).
        labels: titles of the panels.
        axes: the numbers of the two latents.
        x: data, (n, *x), shown as a small picture in each panel.
        shape: of such a picture, (height, width).
    """
    n = len(inside)
    for name, values in (("labels", labels), ("x", x), ("kl", kl), ("error", error)):
        if values is not None and len(values) != n:
            raise ValueError(f"Expected `{name}` for each of {n} data; got {len(values)}.")
    pictures = None if x is None or shape is None else style.as_pictures(style.flat_rows(x, n), shape)
    for _ in range(6):
        scaled = [(points - centre) / (2 * half) + 0.5 for points, centre in zip(inside, middle, strict=True)]
        spots = [_emptiest(points) for points in scaled]
        if pictures is None or not any(hidden for hidden, _ in spots):
            break
        half = 1.06 * half
    side, names = 1.7 if n > 1 else 3.3, (f"$z_{{{axes[0]}}}$", f"$z_{{{axes[1]}}}$")
    figure, drawn = style.panels(n, names, size=(side, side), gap=(0.45, 0.5), top=0.75)
    if pictures is not None:  # which must not be turned round on dark ground
        style.clear(figure)
    for index, (ax, (_, (right, top))) in enumerate(zip(drawn, spots, strict=True)):
        (left, low), (far, high) = (middle[index] - half).tolist(), (middle[index] + half).tolist()
        ax.set(xlim=(left, far), ylim=(low, high), box_aspect=1)
        ax.locator_params(nbins=4)
        ax.tick_params(color="0.6")
        ax.spines[:].set_color("0.6")
        if kl is not None:
            value, doubt = float(kl[index]), 0.0 if error is None else float(error[index])
            nats = f"{value:.2f} ± {doubt:.2f}" if doubt >= 0.005 else f"{value:.2f}"
            nats = "< 0.01" if max(value, doubt) < 0.005 else nats
            ax.set_title(f"KL {nats} nats", loc="right", fontsize="small", color=style.NEUTRAL)
        if labels is not None:
            label = labels[index]
            told = str(label.item() if isinstance(label, Tensor) else label)
            ax.set_title(told, loc="left", fontsize="medium", color=style.NEUTRAL)
        if pictures is not None:
            box = 0.03 + (0.94 - _PICTURE) * right, 0.03 + (0.94 - _PICTURE) * top, _PICTURE, _PICTURE
            style.inset(ax, pictures[index], box, "SN"[top] + "WE"[right])
    return figure, drawn


def _emptiest(points: Tensor) -> tuple[int, tuple[int, int]]:
    """The corner of the unit square where a picture hides the fewest points, and how many; the first of equals."""
    apart = [(points - torch.tensor(corner).to(points)).abs() for corner in _CORNERS]
    hidden = [int((one < _PICTURE + 0.04).all(-1).sum()) for one in apart]
    return min(hidden), _CORNERS[hidden.index(min(hidden))]


def _inside(q: DensityGrid | MultivariateNormal) -> list[Tensor]:
    """Points that fill the larger region of each datum, (points, 2), to its very edge if Gaussian."""
    if isinstance(q, MultivariateNormal):
        return _disc(q, _RADII[0])
    inside = q.density >= q.level(SHARES[0])[:, None, None]
    return [points[which].double().cpu() for points, which in zip(q.points, inside, strict=True)]


def _disc(q: MultivariateNormal, deviations: float) -> list[Tensor]:
    """Points that fill the ellipse of each datum of so many standard deviations, (points, 2)."""
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)[:-1]
    radius = deviations * torch.linspace(0, 1, 21, dtype=torch.float64)
    disc = (radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)).flatten(0, 1)
    return list(q.loc.unsqueeze(1) + disc @ q.scale_tril.mT)


def _draw_ellipses(
    ax: Axes, q: MultivariateNormal, index: int, radii: Sequence[float], looks: Sequence[dict[str, Any]]
) -> None:
    """Draw a datum's ellipses of so many standard deviations."""
    values, vectors = np.linalg.eigh(q.covariance_matrix[index].numpy())
    angle = math.degrees(math.atan2(vectors[1, 0], vectors[0, 0]))
    centre = float(q.loc[index, 0]), float(q.loc[index, 1])
    for radius, look in zip(radii, looks, strict=True):
        ax.add_patch(Ellipse(centre, *(2 * radius * np.sqrt(values)), angle=angle, **look))


def _draw_region(ax: Axes, grid: DensityGrid, index: int, looks: Sequence[dict[str, Any]], *, filled: bool) -> None:
    """Draw a datum's regions of highest density."""
    across, up = style.as_array(grid.points[index]).transpose(2, 0, 1)
    density, levels = style.as_array(grid.density[index]), [float(grid.level(share)[index]) for share in SHARES]
    if filled:
        colours = [look["facecolor"] for look in looks]
        ax.contourf(across, up, density, [*levels, 1.01 * density.max()], colors=colours)
    widths = [look.get("lw", 1.0) for look in looks]
    ax.contour(across, up, density, levels, colors=[look["edgecolor"] for look in looks], linewidths=widths)


def _explain(figure: Figure, exact: str, approximate: str, note: str) -> Figure:
    """Add the legend of the two posteriors above the panels."""
    handles = [Patch(**_EXACT[1], label=exact), Patch(**_APPROXIMATE[1], label=approximate)]
    look: dict[str, Any] = {"frameon": False, "borderaxespad": 0.1, "labelcolor": style.NEUTRAL}
    legend = figure.legend(handles=handles, title=note, loc="upper center", ncols=2, **look)
    legend.get_title().set_color(style.NEUTRAL)
    return figure


def _gaussian(loc: Tensor, covariance: Tensor, axes: tuple[int, int]) -> MultivariateNormal:
    """The distribution with these moments, of batch shape (n,), in double precision on the CPU."""
    latent_pairs(loc, axes)
    if covariance.shape != (*loc.shape, loc.shape[1]):
        raise ValueError(f"Expected a covariance of shape {(*loc.shape, loc.shape[1])}; got {tuple(covariance.shape)}.")
    factor, failed = torch.linalg.cholesky_ex(covariance.detach().double().cpu())
    if bool(failed.any()):
        raise ValueError(f"Expected positive definite covariances; that of datum {int(failed.nonzero()[0])} is not.")
    return MultivariateNormal(loc.detach().double().cpu(), scale_tril=factor)
