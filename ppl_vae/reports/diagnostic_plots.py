"""Pictures of how right an answer is: bounds, tails, gaps and ranks."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.evaluation.bounds import BoundCurve
from ppl_vae.evaluation.calibration import Calibration
from ppl_vae.reports.style import BLUE, GREEN, GREY, VERMILLION, Array, axes_for, bare, number, ticks_at

_SIZE = (6.4, 4.2)  # inches


def bound_over_samples(curve: BoundCurve, *, truth: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Draw the importance-weighted bound over its number of samples, mean over data, with 2 Monte Carlo errors.

    Args:
        curve: what `bound_curve` gave.
        truth: log p(x) of the same data in nats, (n,), drawn as a line.
        ax: where to draw; a new figure by default.
    """
    ax = axes_for(ax, _SIZE)
    n = curve.bound.shape[1]
    _some(n)
    counts, mean = curve.counts.cpu().numpy(), curve.bound.mean(1).cpu().numpy()
    error = (curve.error.square().sum(1).sqrt() / n).nan_to_num(0.0).cpu().numpy()
    ax.errorbar(counts, mean, 2 * error, color=BLUE, marker="o", markersize=4, capsize=3, label="bound, ± 2 errors")
    if truth is not None:
        ax.axhline(float(truth.mean()), color=VERMILLION, label="log p(x)")
        ax.legend(frameon=False, loc="lower right")
    ax.set(xscale="log", xlabel="samples K", ylabel="bound of log p(x), nats per datum")
    ax.ticklabel_format(axis="y", useOffset=False)
    return ax


def tail_shapes(pareto_k: Tensor, *, ax: Axes | None = None) -> Axes:
    """Draw the tail shape of each datum's weights in rising order, with the limits 0.5 and 0.7.

    Args:
        pareto_k: (n,); data without a shape (NaN) are left out.
        ax: where to draw; a new figure by default.
    """
    ax = axes_for(ax, _SIZE)
    values = np.sort(pareto_k[~pareto_k.isnan()].cpu().numpy())
    _some(len(values))
    share = (np.arange(len(values)) + 0.5) / len(values)
    ax.plot(share, values, color=BLUE, marker=".", markersize=3, linewidth=1)
    for limit, style, words in ((0.5, "--", "0.5: no finite variance above"), (0.7, ":", "0.7: unreliable above")):
        ax.axhline(limit, color="#666666", linewidth=1, linestyle=style, label=words)
    _legend_above(ax)
    ax.set(xlabel="fraction of the data", ylabel="tail shape k of the weights", xlim=(0, 1))
    return ax


def gap_parts(approximation: Tensor, amortization: Tensor, *, ax: Axes | None = None) -> Axes:
    """Draw the gap of each datum as stacked bars, in rising order of the whole.

    Args:
        approximation: the part of the guide's family, in nats, (n,).
        amortization: the part of the guide's network, in nats, (n,).
        ax: where to draw; a new figure by default.
    """
    ax = axes_for(ax, _SIZE)
    family, network = (part.detach().cpu().numpy() for part in (approximation, amortization))
    _some(len(family))
    order = np.argsort(family + network)
    at = np.arange(len(order))
    ax.bar(at, family[order], 1.0, color=BLUE, label=f"approximation, mean {_mean(family)}")
    above = np.maximum(family[order], 0)
    ax.bar(at, network[order], 1.0, bottom=above, color=VERMILLION, label=f"amortization, mean {_mean(network)}")
    _legend_above(ax)
    ax.xaxis.set_major_locator(ticks_at())
    ax.set(xlabel="datum, in order of its gap", ylabel="log p(x) - ELBO, nats", xlim=(-0.5, len(order) - 0.5))
    return ax


def rank_counts(found: Calibration) -> tuple[Array, Array]:
    """Count the ranks of each latent in up to 20 bins.

    Returns:
        The edges of the bins, (bins + 1,), and the counts, (z, bins).
    """
    edges = _edges(found)
    return edges, np.stack([np.histogram(column, edges)[0] for column in found.ranks.cpu().numpy().T])


def rank_histograms(found: Calibration, *, most: int = 6) -> Figure:
    """Draw the ranks of the latents and of log p(x, z) with the band of 99 % of flat bars, and the coverage curve.

    Args:
        found: what `calibrate` gave.
        most: latents at the most; of more those with the smallest p-values are drawn.
    """
    n, latents = found.ranks.shape
    _some(n)
    shown = sorted(found.p_values.argsort(stable=True)[:most].tolist())
    edges, counts = rank_counts(found)
    drawn = [(f"$z_{{{latent}}}$", float(found.p_values[latent]), counts[latent]) for latent in shown]
    joint = np.histogram(found.joint_ranks.cpu().numpy(), edges)[0]
    drawn.append(("log p(x, z)", found.joint_p_value, joint))
    words = ["grey: where 99 % of the bars of a calibrated guide lie"]
    if len(shown) < latents:
        words.insert(0, f"the {len(shown)} of {latents} latents with the smallest p")
    figure, panels, columns = _panels(len(drawn) + 1, "\n".join(words))
    expected, share = n / len(joint), 1 / len(joint)
    spread = 2.58 * math.sqrt(expected * (1 - share))
    for index, (ax, (name, p, bars)) in enumerate(zip(panels, drawn, strict=False)):
        ax.axhspan(expected - spread, expected + spread, color="#dddddd", linewidth=0)
        ax.stairs(bars, edges, fill=True, color=BLUE)
        ax.axhline(expected, color=GREY, linewidth=0.8)
        ax.yaxis.set_major_locator(ticks_at(4))
        ax.set_title(f"{name}, p = {p:.2g}", fontsize="medium")
        ax.set(xlabel="rank of the truth", xlim=(0, edges[-1]), ylim=(0, None))
        ax.set_ylabel("count" if index % columns == 0 else "")
    ax = panels[-1]
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    ax.plot(found.levels.cpu().numpy(), found.coverage.cpu().numpy(), color=GREEN)
    ax.set_title(f"coverage, p = {found.coverage_p_value:.2g}", fontsize="medium")
    ax.set(xlabel="nominal", ylabel="found", xlim=(0, 1), ylim=(0, 1))
    return figure


def _panels(n: int, words: str) -> tuple[Figure, list[Axes], int]:
    """Give a figure with n square panels, evenly spaced below a line or two of words, and its number of columns."""
    rows = math.ceil(n / 4)
    columns = math.ceil(n / rows)
    side, across, below, left, top, bottom = 1.6, 0.55, 0.75, 0.6, 0.65, 0.5  # in inches
    width, height = left + columns * (side + across) - across + 0.15, top + rows * (side + below) - below + bottom
    figure = Figure((width, height), dpi=120)
    spacing = {"left": left / width, "right": 1 - 0.15 / width, "wspace": across / side, "hspace": below / side}
    spacing |= {"bottom": bottom / height, "top": 1 - top / height}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=spacing).ravel().tolist()
    for spare in panels[n:]:
        spare.remove()
    for ax in panels[:n]:
        bare(ax).tick_params(labelsize="small")
    figure.text(left / width, 1 - 0.06 / height, words, va="top", fontsize=8, color="#444444")
    return figure, panels[:n], columns


def _edges(found: Calibration) -> Array:
    return np.linspace(0, found.draws + 1, min(20, found.draws + 1) + 1)


def _legend_above(ax: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _mean(values: Array) -> str:
    """Write a mean in two decimals, a small one in two digits, and no minus before a zero."""
    mean = float(values.mean())
    if abs(mean) < 1e-6:
        return "0.00"
    return number(float(f"{mean:.2g}")) if abs(mean) < 0.005 else f"{mean:.2f}".replace("-", "\N{MINUS SIGN}")


def _some(n: int) -> None:
    if n < 1:
        raise ValueError("Expected at least one datum; got none.")
