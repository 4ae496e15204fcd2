"""Plots of diagnostics: bounds, tails, gaps and ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from ppl_vae.evaluation.bounds import BoundCurve
from ppl_vae.evaluation.calibration import Calibration
from ppl_vae.evaluation.predictive import PredictiveCheck
from ppl_vae.reports import style
from ppl_vae.reports.diagnostics import rank_counts

_SIZE = (5.4, 3.8)  # inches


def bound_over_samples(curve: BoundCurve, *, truth: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Plot the importance-weighted bound over its number of samples, mean over data, ± 2 Monte Carlo errors.

    Points whose error is not known are hollow.

    Args:
        curve: from `bound_curve`.
        truth: log p(x) of the same data in nats, (n,), drawn as a line.
        ax: where to draw, by default in a new figure.
    """
    n = curve.bound.shape[1]
    style.check_some(n)
    ax = style.axes_for(ax, _SIZE)
    error = style.as_array(curve.error.square().sum(1).sqrt() / n)
    counts, mean, known = style.as_array(curve.counts), style.as_array(curve.bound.mean(1)), np.isfinite(error)
    ax.plot(counts, mean, color=style.BLUE, lw=1)
    look: dict[str, Any] = {"color": style.BLUE, "fmt": "o", "markersize": 4, "capsize": 3}
    ax.errorbar(counts[known], mean[known], 2 * error[known], label="bound, ± 2 errors", **look)
    if not known.all():
        ax.plot(counts[~known], mean[~known], "o", ms=5, mfc="white", color=style.BLUE, label="its error is not known")
    if truth is not None:
        ax.axhline(float(truth.mean()), color=style.VERMILLION, label="log p(x)")
    ax.legend(frameon=False, loc="lower right")
    ax.set(xscale="log", xlabel="samples K", ylabel="bound of log p(x), nats per datum")
    ax.ticklabel_format(axis="y", useOffset=False)
    return ax


def sweep_results(found: Mapping[str, Any]) -> Figure:
    """Show log p(x) of each setting of a sweep, ± 2 errors over seeds where there are several, best above.

    A lower bound has no Monte Carlo error. Keys that are the same in all settings are left out of their names, and of
    the others only the last word is shown if that tells them apart.

    Args:
        found: from `runs.sweep.summarise`, or runs alike, each with a `name`.
    """
    rows = sorted(found["settings"], key=lambda row: row["log_evidence"]["mean"])
    style.check_some(len(rows))
    figure = Figure((6.4, 1.1 + 0.34 * len(rows)), dpi=120, layout="constrained")
    ax = style.bare(figure.subplots())
    drawn = []
    for place, row in enumerate(rows):
        value, bound = row["log_evidence"], row["log_evidence"]["kind"] == "lower bound"
        error = 2 * math.hypot(value["se_seeds"] or 0.0, 0.0 if bound else value["mc_se"])
        drawn.append(error)
        ax.errorbar(
            value["mean"], place, xerr=error or None, color=style.BLUE, marker=">" if bound else "o", capsize=3, ms=5
        )
        if row["ppca"] is not None:
            ax.plot(row["ppca"], place, marker="d", ms=5, ls="", mfc="none", color=style.VERMILLION)
        ax.annotate(f"{row['seconds']:.0f} s", (1.01, place), xycoords=("axes fraction", "data"), va="center", size=8)
    settings = [row.get("values", {}) for row in rows]
    words = {key: key.rpartition(".")[2] for key in varying(settings)}
    words = words if len({*words.values()}) == len(words) else {key: key for key in words}
    values = [", ".join(f"{words[key]} = {one[key]}" for key in words) for one in settings]
    names = [row.get("name") or value or "as it is" for row, value in zip(rows, values, strict=True)]
    ax.set_yticks(range(len(rows)), [style.short(name, 44) for name in names], fontsize="small")
    kinds = {row["log_evidence"]["kind"] for row in rows}
    for mark, kind in (("o", "estimate"), (">", "lower bound")):
        if kind in kinds:
            ax.plot([], [], mark, color=style.BLUE, label=kind)
    if any(row["ppca"] is not None for row in rows):
        ax.plot([], [], "d", mfc="none", color=style.VERMILLION, label="PPCA of this size")
    seeds = any(row["log_evidence"]["se_seeds"] is not None for row in rows)
    told = f"; ± 2 errors {'over seeds' if seeds else 'of Monte Carlo'}" if any(drawn) else ""
    ax.set(xlabel=f"log p(x), nats per held-out datum{told}", ylim=(-0.6, len(rows) - 0.4))
    ax.ticklabel_format(axis="x", useOffset=False)
    style.legend_above(ax)
    return figure


def varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that are not the same in all settings; all keys of a single one."""
    return [
        key
        for key, value in settings[0].items()
        if len(settings) == 1 or any(one.get(key) != value for one in settings)
    ]


def moments(sites: Mapping[str, Any], *, most: int = 24, ax: Axes | None = None) -> Axes:
    """Plot mean ± standard deviation of each latent by the guide beside that by its weights or by a reference.

    Args:
        sites: of a guide check, as `measures.check_block` gives them.
        most: entries that are shown, those whose guide is furthest off.
        ax: where to draw, by default in a new figure.
    """
    entries = []
    for name, site in sites.items():
        labels = [label for label, each in site.items() if isinstance(each, dict)]
        off = np.abs(np.ravel(np.array(site["mean_error"], dtype=float)))
        for j in range(len(off)):
            both = [[np.ravel(site[label][key])[j] for key in ("mean", "sd")] for label in (labels[0], labels[-1])]
            entries.append((off[j], f"{name}[{j}]" if len(off) > 1 else name, both, labels[-1]))
    style.check_some(len(entries))
    furthest = sorted(entries, key=lambda entry: -entry[0])[:most]
    shown = [entry for entry in entries if entry in furthest][::-1]
    ax = style.axes_for(ax, (5.4, 0.9 + 0.3 * len(shown)))
    for shift, which, colour, mark in ((0.15, 1, style.BLUE, "s"), (-0.15, 0, style.VERMILLION, "o")):
        means, sds = np.array([entry[2][which] for entry in shown], dtype=float).T
        label = ("guide", shown[0][3])[which]
        at = np.arange(len(shown)) + shift
        ax.errorbar(means, at, xerr=sds, fmt=mark, ms=4, color=colour, capsize=2, label=label)
    ax.set_yticks(range(len(shown)), [style.short(entry[1], 28) for entry in shown], fontsize="small")
    ax.set(xlabel="mean ± standard deviation of the latent, in its own units", ylim=(-0.6, len(shown) - 0.4))
    style.legend_above(ax)
    return ax


def tail_shapes(pareto_k: Tensor, *, ax: Axes | None = None) -> Axes:
    """Plot the tail shape k of each datum's weights in rising order, with the limits 0.5 and 0.7.

    Args:
        pareto_k: (n,); data without a shape (NaN) are left out.
        ax: where to draw, by default in a new figure.
    """
    values = np.sort(style.as_array(pareto_k[~pareto_k.isnan()]))
    style.check_some(len(values))
    ax = style.axes_for(ax, _SIZE)
    share = (np.arange(len(values)) + 0.5) / len(values)
    ax.plot(share, values, color=style.BLUE, marker=".", markersize=3, linewidth=1)
    for limit, dashes, meaning in ((0.5, "--", "0.5: no finite variance above"), (0.7, ":", "0.7: unreliable above")):
        ax.axhline(limit, color="#666666", linewidth=1, linestyle=dashes, label=meaning)
    style.legend_above(ax)
    ax.set(xlabel="fraction of the data", ylabel="tail shape k of the weights", xlim=(0, 1))
    return ax


def gap_parts(approximation: Tensor, amortization: Tensor, *, ax: Axes | None = None) -> Axes:
    """Plot the two parts of each datum's gap as stacked bars, in rising order of the whole.

    Args:
        approximation: the part due to the guide's family, in nats, (n,).
        amortization: the part due to the guide's network, in nats, (n,).
        ax: where to draw, by default in a new figure.
    """
    family, network = style.as_array(approximation), style.as_array(amortization)
    style.check_some(len(family))
    ax = style.axes_for(ax, _SIZE)
    order = np.argsort(family + network)
    at = np.arange(len(order))
    ax.bar(at, family[order], 1.0, color=style.BLUE, label=f"approximation, mean {_mean(family)}")
    above = np.maximum(family[order], 0)
    ax.bar(at, network[order], 1.0, bottom=above, color=style.VERMILLION, label=f"amortization, mean {_mean(network)}")
    style.legend_above(ax)
    ax.xaxis.set_major_locator(style.ticks_at())
    ax.set(xlabel="datum, in order of its gap", ylabel="log p(x) - ELBO, nats", xlim=(-0.5, len(order) - 0.5))
    return ax


def rank_histograms(calibration: Calibration, *, most: int = 6) -> Figure:
    """Plot the ranks of the latents and of log p(x, z), and the coverage of the guide's regions.

    A band shows where 99 % of the bars lie if the guide is calibrated.

    Args:
        calibration: from `calibrate`.
        most: how many latents to show at most, those with the smallest p-values.
    """
    n, latents = calibration.ranks.shape
    style.check_some(n)
    shown = sorted(calibration.p_values.argsort(stable=True)[:most].tolist())
    edges, counts = rank_counts(calibration)
    rows = [(f"$z_{{{latent}}}$", float(calibration.p_values[latent]), counts[latent]) for latent in shown]
    joint = np.histogram(style.as_array(calibration.joint_ranks), edges)[0]
    rows.append(("log p(x, z)", calibration.joint_p_value, joint))
    figure, axes = style.panels(len(rows) + 1, ("", "count"), size=(1.6, 1.6), gap=(0.55, 0.75), top=0.65)
    expected, share = n / len(joint), 1 / len(joint)
    spread = 2.58 * math.sqrt(expected * (1 - share))
    for ax, (name, p, bars) in zip(axes, rows, strict=False):
        ax.axhspan(expected - spread, expected + spread, color="#dddddd", linewidth=0)
        ax.stairs(bars, edges, fill=True, color=style.BLUE)
        ax.axhline(expected, color=style.GREY, linewidth=0.8)
        ax.yaxis.set_major_locator(style.ticks_at(4))
        ax.set_title(f"{name}, {style.chance(p)}", fontsize="medium")
        style.bare(ax).set(xlabel="rank of the truth", xlim=(0, edges[-1]), ylim=(0, None))
    ax = expected_coverage(calibration, ax=axes[-1])
    ax.set_title(f"coverage, {style.chance(calibration.coverage_p_value)}", fontsize="medium")
    ax.set(xlabel="probability of the region", ylabel="share of truths in it")
    note = "grey: where 99 % of the bars lie if the guide is calibrated"
    if len(shown) < latents:
        note = f"the {len(shown)} of {latents} latents with the smallest p\n{note}"
    width, height = figure.get_size_inches()
    figure.text(0.65 / width, 1 - 0.06 / height, note, va="top", fontsize=8, color="#444444")
    return figure


def expected_coverage(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """Plot which share of simulated truths lies in the guide's region over the region's probability.

    A band shows where 95 % of the shares lie at each probability if the guide is calibrated; below the diagonal it is
    too sure of itself.

    Args:
        calibration: from `calibrate`, whose regions are balls around a draw of the guide (TARP).
        ax: where to draw, by default in a new figure.
    """
    ax = style.axes_for(ax, (4.2, 4.2))
    levels, n = style.as_array(calibration.levels), len(calibration.ranks)
    low, high = (stats.binom.ppf(tail, n, levels) / n for tail in (0.025, 0.975))
    ax.fill_between(levels, low, high, color="#dddddd", lw=0)
    ax.plot([0, 1], [0, 1], color=style.GREY, linewidth=0.8)
    ax.plot(levels, style.as_array(calibration.coverage), color=style.GREEN)
    names = {"xlabel": "probability of the guide's region", "ylabel": "share of simulated truths in it"}
    ax.set(xlim=(0, 1), ylim=(0, 1), **names)
    return ax


def predictive_checks(check: PredictiveCheck, *, most: int = 8) -> Figure:
    """Plot statistics of sets of draws as histograms, and those of the data as lines, furthest out first.

    Args:
        check: from `predictive_check`.
        most: how many statistics to show at most.
    """
    rows = check.summary()["statistics"][:most]
    size: Any = {"size": (1.75, 1.3), "gap": (0.5, 0.85), "top": 0.75}
    figure, axes = style.panels(len(rows), ("", "sets of draws"), **size)
    for ax, row in zip(axes, rows, strict=True):
        drawn = style.as_array(check.drawn[:, check.names.index(row["name"])])
        ax.hist(drawn, 20, color=style.BLUE, label="draws")
        ax.axvline(row["observed"], color=style.VERMILLION, lw=2, label="data")
        ax.locator_params(axis="x", nbins=3)
        ax.ticklabel_format(axis="x", useOffset=False)
        ax.set_title(f"{style.short(row['name'], 30)}\np = {row['p_value']:.2f} ± {row['error']:.2f}", fontsize="small")
        style.bare(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    return figure


def _mean(values: style.Array) -> str:
    """A mean in two decimals, a small one in two digits, and zero without a minus."""
    mean = float(values.mean())
    if abs(mean) < 1e-6:
        return "0.00"
    return style.number(float(f"{mean:.2g}")) if abs(mean) < 0.005 else f"{mean:.2f}".replace("-", "\N{MINUS SIGN}")
