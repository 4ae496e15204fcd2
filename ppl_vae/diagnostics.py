"""Pictures of how right an answer is: bounds, tails, gaps and ranks."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.calibration import Calibration
from ppl_vae.evidence import BoundCurve
from ppl_vae.panels import BLUE, GREEN, GREY, VERMILLION, Array, axes_for, ticks_at

__all__ = ["bound_over_samples", "gap_parts", "rank_counts", "rank_histograms", "tail_shapes"]

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
    for limit, words in ((0.5, "0.5: no finite variance above"), (0.7, "0.7: unreliable above")):
        ax.axhline(limit, color=GREY, linewidth=0.8, linestyle="--")
        ax.annotate(words, (0.01, limit), xytext=(0, 2), textcoords="offset points", fontsize=8, color="#444444")
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
    ax.bar(at, family[order], 1.0, color=BLUE, label=f"approximation, mean {family.mean():.2f}")
    above = np.maximum(family[order], 0)
    ax.bar(at, network[order], 1.0, bottom=above, color=VERMILLION, label=f"amortization, mean {network.mean():.2f}")
    ax.legend(frameon=False, loc="upper left")
    ax.xaxis.set_major_locator(ticks_at())
    ax.set(xlabel="datum, in order of its gap", ylabel="log p(x) - ELBO, nats", xlim=(-0.5, len(order) - 0.5))
    return ax


def rank_counts(found: Calibration) -> tuple[Array, Array]:
    """Count the ranks of each latent in up to 20 bins.

    Returns:
        The edges of the bins, (bins + 1,), and the counts, (z, bins).
    """
    bins = min(20, found.draws + 1)
    edges = np.linspace(0, found.draws + 1, bins + 1)
    ranks = found.ranks.cpu().numpy()
    return edges, np.stack([np.histogram(column, edges)[0] for column in ranks.T])


def rank_histograms(found: Calibration, *, most: int = 6) -> Figure:
    """Draw the ranks of the first latents with the band that 99 % of flat bars keep to, and the coverage curve.

    Args:
        found: what `calibrate` gave.
        most: latents at the most.
    """
    ranks = found.ranks.cpu().numpy()
    _some(len(ranks))
    shown = min(ranks.shape[1], most)
    columns = min(shown + 1, 4)
    rows = math.ceil((shown + 1) / columns)
    figure = Figure((2.4 * columns, 2.3 * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    edges, counts = rank_counts(found)
    bins = counts.shape[1]
    expected = len(ranks) / bins
    spread = 2.58 * math.sqrt(expected * (1 - 1 / bins))
    for latent, ax in enumerate(panels[:shown]):
        ax.axhspan(expected - spread, expected + spread, color="#dddddd", linewidth=0)
        ax.stairs(counts[latent], edges, fill=True, color=BLUE)
        ax.axhline(expected, color=GREY, linewidth=0.8)
        ax.set(
            title=f"$z_{{{latent}}}$, p = {float(found.p_values[latent]):.2g}", xlabel="rank of the truth", yticks=[]
        )
    ax = panels[shown]
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    ax.plot(found.levels.cpu().numpy(), found.coverage.cpu().numpy(), color=GREEN)
    ax.set(title=f"coverage, p = {found.coverage_p_value:.2g}", xlabel="nominal", ylabel="found", aspect="equal")
    for ax in panels[shown + 1 :]:
        ax.set_axis_off()
    return figure


def _some(n: int) -> None:
    if n < 1:
        raise ValueError("Expected at least one datum; got none.")
