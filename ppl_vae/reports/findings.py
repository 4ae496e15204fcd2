"""Findings: what the numbers of a report say in words, and what would help."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppl_vae.evaluation.calibration import Calibration

REMEDIES = (
    "What tightens it: more samples (`ppl-vae evaluate RUN --samples K`), a richer guide (FullNormal, MixtureNormal) "
    "or a larger network; annealing does not rely on the guide (`ppl-vae evaluate RUN --reference ais`, "
    "with more `--temperatures` where it does not settle)."
)


def list_findings(report: Mapping[str, Any], history: Sequence[float]) -> list[str]:
    """Say in plain words what the figures give reason to doubt, and what would help.

    Args:
        report: what `report.json` says.
        history: the bound of each epoch.
    """
    test, train, found = report["test"], report["train"], []
    latents, shape, value, bound = test["latents"], test["pareto_k"], test["log_evidence"], test["elbo"]["mean"]
    if report["data"]["part"] == "train":
        found.append(
            "**All figures are of the training data.** The guide keeps a row for each of them and knows no others, so "
            "nothing here says how the model does on new data. `Linear` or `MLP` in its place would."
        )
    found += _closer(report)
    if None in (value["mean"], bound, train["elbo"]):
        found.append(
            "**Some figures are not finite**: the model gives a datum no density. Nothing here can be trusted."
        )
        return found
    if value["kind"] == "lower bound" and shape["above_0.5"]:
        found.append(
            f"**The log evidence is a lower bound, not an estimate.** For {shape['above_0.5']:.0%} of the data the "
            "importance weights have a tail shape k above 0.5: no finite variance, so no error bar would hold. "
            + REMEDIES
        )
    elif value["kind"] == "lower bound":
        reason = (
            "Too few samples a datum to tell how good they are: 25 at least. "
            if shape["median"] is None
            else "The tail shapes of the importance weights are too near 0.5 for so few samples to tell whether their "
            "variance is finite. "
        )
        found.append("**The log evidence is a lower bound.** " + reason + REMEDIES)
    elif abs(value["bias"]) > max(value["mc_se"], 0.01):
        found.append(
            f"**The estimate is biased downwards**, by about {-value['bias']:.2f} nats. More samples shrink it."
        )
    if test["collapsed"]:
        names = ", ".join(f"z{number}" for number in test["collapsed"])
        one = len(test["collapsed"]) == 1
        what = f"mean of {names} hardly varies" if one else f"means of {names} hardly vary"
        found.append(
            f"**{len(test['collapsed'])} of {latents} latents {'is' if one else 'are'} collapsed**: the posterior "
            f"{what} over the data (variance below 0.01), so {'it carries' if one else 'they carry'} nothing. Fewer "
            "latents would do as well."
        )
    tenth = max(len(history) // 10, 1)
    if len(history) >= 2:
        last, before = float(np.mean(history[-tenth:])), float(np.mean(history[-2 * tenth : -tenth]))
        if last - before > max(0.1, 5e-4 * abs(last)):
            spell = f"the last {tenth} epochs" if tenth > 1 else "the last epoch"
            found.append(
                f"**The bound was still rising**, by {last - before:.2f} nats over {spell}. Train longer "
                "(`svi.epochs`)."
            )
    else:
        found.append("**One epoch was trained**, too few to tell whether the bound has settled. Raise `svi.epochs`.")
    ahead = train["elbo"] - bound
    if ahead > 3 * math.hypot(test["elbo"]["se"] or 0.0, train["elbo_se"] or 0.0) and ahead > 0.01 * abs(bound):
        found.append(
            f"**The training data fit better, by {ahead:.1f} nats**: the model memorises. Fewer parameters, fewer "
            'epochs (`svi.keep = "best"` with a `data.validation_fraction`) or more data help.'
        )
    if report["exact"] and report["exact"]["gap"] > 0.1:
        found.append(
            f"**The guide misses the exact posterior** by {report['exact']['gap']:.2f} nats on average. A richer "
            "family, such as FullNormal, or longer training would come closer."
        )
    return found


def _closer(report: Mapping[str, Any]) -> list[str]:
    """Say what a closer look gives reason to doubt, where one was asked for."""
    found = []
    reference, calibration = report.get("reference"), report.get("calibration")
    if reference and not reference["converged"]:
        n, settled = reference["n"], reference["n_settled"]
        found.append(
            f"**The reference posterior by {reference['method']} failed its own checks** on {n - settled} of {n} data: "
            "do not rely on it there. The closer look below says what failed."
        )
    if calibration and calibration["verdict"] == "miscalibrated":
        found.append(
            "**The guide is miscalibrated**: on data of its own model, its draws can be told from the true latents "
            f"(p = {calibration['p_value']:.2g}), best by {calibration['weakest']}, so that its means or intervals are "
            f"off there. {_where(report)}"
        )
    return found


def _where(report: Mapping[str, Any]) -> str:
    """Say whether a guide that fails on simulated data fails on those of the report as well, and what would help."""
    exact, gap, reference = (report.get(name) for name in ("exact", "gap", "reference"))
    remedy = "a richer family, such as FullNormal, a larger network or longer training would come closer."
    if gap and gap["amortization"] > gap["approximation"]:
        remedy = "a larger network or longer training would come closer, a richer family little."
    known = [(exact["gap"], "estimate")] if exact else []
    known += [(gap["total"], gap["kind"])] if gap else []
    known += [(reference.get("gap"), reference.get("kind"))] if reference else []
    judged = "held-out" if report["data"]["part"] == "test" else "training"
    for value, kind in known:
        if value is None:
            continue
        least = "at least " if kind == "lower bound" else ""
        if value > 0.1:
            return (
                f"On the {judged} data, too, it is off: log p(x) - ELBO, which is its KL, is {least}{value:.3f} nats; "
                + remedy
            )
        if kind == "estimate":
            return (
                f"On the {judged} data it is nearly exact: log p(x) - ELBO, which is its KL, is {value:.3f} nats. The "
                "fault shows only off them, where simulated data can lie."
            )
    return (
        "Simulated data can lie off the data that it was trained on, where it may be nearly exact; `--reference auto` "
        f"tells. If it is off there, too, {remedy}"
    )


def margin(error: float, digits: int = 3) -> str:
    """Write an error, with more digits where those asked for would make it zero, which it is not."""
    return f"{error:.{digits}f}" if error == 0 or error >= 0.5 * 10**-digits else f"{error:.1g}"


def counted(n: int) -> str:
    """Write a number of data."""
    return "1 datum" if n == 1 else f"{n:,} data"


def reference_words(block: Mapping[str, Any], *, split: bool = False) -> str:
    """Put a reference into words; the gap is left to its own words where it will be split."""
    n, method, found = block["n"], block["method"], block["diagnostics"]
    failed = "" if block["converged"] else " **Its own checks failed**: do not rely on it; give it more work."
    if method == "nuts":
        checks = (
            f"R-hat is {found['r_hat']['max']:.4f} at the most (asked for: below 1.01), {block['draws']:,} draws are "
            f"as good as {found['ess']['min']:.0f} independent ones at the least (above 400), {found['divergences']} "
            "diverged (none)."
        )
        verdict = " It passed its checks."
        if not block["converged"]:
            verdict = (
                f" **Its own checks failed** on {n - block['n_settled']} of {n} data: do not rely on it there. Longer "
                "chains (`python inference/nuts.py RUN --warmup 1000 --draws 4000`) or fewer data at a time, which "
                "move together (`--data 1`), may pass."
            )
        return f"**Reference posterior** by NUTS for {counted(n)}: {checks}{verdict}"
    settled = block["n_settled"]
    missing, chains = "", ""
    if settled < n:
        why, remedy = (
            (
                "their chains differ too much",
                "Slower annealing (`ppl-vae evaluate RUN --reference ais --temperatures N`, 500 by default) or more "
                "`--chains` (16)",
            )
            if method == "ais"
            else ("their posteriors are too rough or too wide for the lattice", "Annealing (`--reference ais`)")
        )
        missing = f" **{n - settled} of {n} data did not settle**: {why}. "
        missing += "They are left out here and below. " if settled or method != "ais" else ""
        missing += f"{remedy} may reach them."
    if block["log_evidence"] is None:
        return f"**Reference** by {method}: none of {counted(n)} has a figure to rely on.{missing}"
    of = counted(n) if settled in (0, n) else f"the {counted(settled)} that settled"
    doubt = margin(block["error"]) if method == "ais" else f"{block['error']:.1g}"
    error = "nats exactly" if method == "closed-form" else f"± {doubt} nats"
    if method == "ais":
        ess = found["ess"]
        chains = (
            f" Of its {block['draws']} chains {ess['median']:.1f} are effective in the median, {ess['min']:.1f} at the "
            f"least; {found['acceptance']['median']:.0%} of the moves were accepted."
        )
    sign, least = ("=", "") if block["kind"] == "estimate" else (">=", "at least ")
    bound = "" if block["kind"] == "estimate" else " This is a lower bound on average, not an estimate."
    below = "" if split else f"; the ELBO lies {least}{block['gap']:.3f}{_plus_minus(block['gap_error'])} below"
    return (
        f"**Reference** by {method}: log p(x) {sign} {block['log_evidence']:.3f} {error} on average over {of}, "
        f"where importance sampling gives {block['importance_weighted']:.3f}{below}.{bound}{chains}{missing or failed}"
    )


def _plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {margin(error)}"


def bound_words(block: Mapping[str, Any]) -> str:
    counts = block["samples"]
    shown = sorted({0, len(counts) // 2, len(counts) - 1})
    figures = ", ".join(f"{block['mean'][at]:.3f} at K = {counts[at]:,}" for at in shown)
    return f"**The bound over the number of samples** K, mean over {counted(block['n'])}: {figures}."


def gap_words(block: Mapping[str, Any]) -> str:
    least = "" if block["kind"] == "estimate" else "at least "
    return (
        f"**The gap**, log p(x) - ELBO, is {least}{block['total']:.3f}{_plus_minus(block['error'])} nats on average "
        f"over {counted(block['n'])}: {least}{block['approximation']:.3f}{_plus_minus(block['approximation_error'])} "
        f"because of the guide's family, {block['amortization']:.3f}{_plus_minus(block['amortization_error'])} because "
        f"one network answers for all data. ± is the Monte Carlo error. {_advice(block)}"
    )


def _advice(parts: Mapping[str, Any]) -> str:
    if parts["total"] < 0.1:
        return "There is little to gain."
    if parts["approximation"] > parts["amortization"]:
        return "A richer family (FullNormal, MixtureNormal) would gain more than a larger network."
    return "A larger encoder or longer training would gain more than a richer family."


def calibration_words(found: Calibration) -> str:
    told = f"**Calibration**: {found.verdict} (p = {found.p_value:.2g} over {len(found.ranks)} simulations)."
    if found.verdict == "miscalibrated":
        told += (
            f" It shows most in {found.weakest}. A guide can be nearly exact on data and yet fail here, because "
            "simulated data can lie off the data that it was trained on."
        )
    return told
