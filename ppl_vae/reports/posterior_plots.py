"""Pictures of the approximate posterior over the exact one."""

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
from ppl_vae.reports.latent_plots import latent_pairs
from ppl_vae.reports.style import BLUE, INSET, VERMILLION, WORDS, Corner, as_array, enough, squares

SHARES = (0.95, 0.5)  # of the mass that regions hold
_EXACT: tuple[dict[str, Any], ...] = (
    {"facecolor": BLUE + "30", "edgecolor": BLUE + "60"},
    {"facecolor": BLUE + "60", "edgecolor": BLUE + "90"},
)
_APPROXIMATE: tuple[dict[str, Any], ...] = 2 * ({"fill": False, "edgecolor": VERMILLION, "lw": 1.6},)


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
    q = approximate if isinstance(approximate, DensityGrid) else _gaussian(*approximate, (0, 1))
    there = q.points if isinstance(q, DensityGrid) else q.loc
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
        if isinstance(q, DensityGrid):
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


def _inside(q: DensityGrid | MultivariateNormal) -> list[Tensor]:
    """Give points that fill the larger region of each datum, (points, 2), those of a Gaussian to its very edge."""
    if isinstance(q, DensityGrid):
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


def _region(ax: Axes, plane: DensityGrid, index: int, looks: Sequence[dict[str, Any]], *, filled: bool) -> None:
    across, up = as_array(plane.points[index]).transpose(2, 0, 1)
    density, levels = as_array(plane.density[index]), [float(plane.level(share)[index]) for share in SHARES]
    if filled:
        colours = [look["facecolor"] for look in looks]
        ax.contourf(across, up, density, [*levels, 1.01 * density.max()], colors=colours)
    widths = [look.get("lw", 1.0) for look in looks]
    ax.contour(across, up, density, levels, colors=[look["edgecolor"] for look in looks], linewidths=widths)


def _gaussian(loc: Tensor, covariance: Tensor, axes: tuple[int, int]) -> MultivariateNormal:
    """Give the distribution of batch shape (n,), in double precision on the CPU."""
    latent_pairs(loc, axes)
    if covariance.shape != (*loc.shape, loc.shape[1]):
        raise ValueError(f"Expected a covariance of shape {(*loc.shape, loc.shape[1])}; got {tuple(covariance.shape)}.")
    factor, failed = torch.linalg.cholesky_ex(covariance.detach().double().cpu())
    if bool(failed.any()):
        raise ValueError(f"Expected positive definite covariances; that of datum {int(failed.nonzero()[0])} is not.")
    return MultivariateNormal(loc.detach().double().cpu(), scale_tril=factor)
