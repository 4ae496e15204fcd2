"""Findings: what the numbers of a report mean in words, and what would help."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REMEDIES = (
    "To tighten the bound: more samples (`ppl-vae evaluate RUN --samples K`), a richer guide (FullNormal, "
    "MixtureNormal) or a larger network. Annealing does not rely on the guide (`ppl-vae evaluate RUN --reference ais`, "
    "with more `--temperatures` if it does not settle)."
)


def list_findings(report: Mapping[str, Any], history: Sequence[float]) -> list[str]:
    """List what the numbers give reason to doubt, and what would help.

    Args:
        report: the content of `report.json`.
        history: the bound of each epoch.
    """
    test, train = report["test"], report["train"]
    bound, value = test["elbo"], test["log_evidence"]
    findings = []
    if report["data"]["part"] == "train":
        findings.append(
            "**All figures are of the training data.** The guide keeps a row for each of them and knows no others, so "
            "nothing here tells how the model does on new data. A network such as `Linear` or `MLP` would."
        )
    findings += _doubt_diagnostics(report)
    if None in (value["mean"], bound["mean"], train["elbo"]):
        return [
            *findings,
            "**Some figures are not finite**: the model gives some datum no density. Nothing here can be trusted.",
        ]
    findings += _doubt_evidence(value, test["pareto_k"])
    if collapsed := test["collapsed"]:
        names, one = ", ".join(f"z{latent}" for latent in collapsed), len(collapsed) == 1
        means = f"mean of {names} hardly varies" if one else f"means of {names} hardly vary"
        findings.append(
            f"**{len(collapsed)} of {test['latents']} latents {'is' if one else 'are'} collapsed**: the posterior "
            f"{means} over the data (variance below 0.01), so {'it is' if one else 'they are'} unused. Fewer latents "
            "would do as well."
        )
    findings += _doubt_convergence(history)
    ahead, noise = train["elbo"] - bound["mean"], math.hypot(bound["se"] or 0.0, train["elbo_se"] or 0.0)
    if ahead > 3 * noise and ahead > 0.01 * abs(bound["mean"]):
        findings.append(
            f"**The training data fit better, by {ahead:.1f} nats**: the model memorises. Fewer parameters, fewer "
            'epochs (`svi.keep = "best"` with a `data.validation_fraction`) or more data help.'
        )
    if report["exact"] and report["exact"]["gap"] > 0.1:
        findings.append(
            f"**The guide misses the exact posterior** by {report['exact']['gap']:.2f} nats on average. A richer "
            "family, such as FullNormal, or longer training would come closer."
        )
    return findings


def describe_diagnostics(report: Mapping[str, Any]) -> list[str]:
    """Describe what the diagnostics of a run measured, if any were asked for."""
    blocks = {
        "reference": lambda block: _reference(block, with_gap="gap" not in report),
        "bound": _bound,
        "gap": _gap,
        "calibration": lambda block: (
            f"**Calibration**: {block['verdict']} (p = {block['p_value']:.2g} over {block['simulations']} simulations)."
        ),
    }
    return [describe(report[name]) for name, describe in blocks.items() if name in report]


def counted(n: int) -> str:
    """A number of data."""
    return "1 datum" if n == 1 else f"{n:,} data"


def margin(error: float, digits: int = 3) -> str:
    """An error, with more digits if it would else be rounded to zero."""
    return f"{error:.{digits}f}" if error == 0 or error >= 0.5 * 10**-digits else f"{error:.1g}"


def figure(value: float | None, error: float | None = None, *, digits: int = 3) -> str:
    """A figure and its error, if it has one; a dash if it is unknown."""
    if value is None:
        return "-"
    value = round(value, digits) + 0.0  # no minus before zero
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {margin(error, digits)}")


def _doubt_diagnostics(report: Mapping[str, Any]) -> list[str]:
    findings = []
    reference, calibration = report.get("reference"), report.get("calibration")
    if reference and not reference["converged"]:
        n, settled = reference["n"], reference["n_settled"]
        findings.append(
            f"**The reference posterior by {reference['method']} failed its own checks** on {n - settled} of {n} data: "
            "do not rely on it there. The diagnostics below tell what failed."
        )
    if calibration and calibration["verdict"] == "miscalibrated":
        findings.append(
            "**The guide is miscalibrated**: on data simulated from the model, its draws differ from the true latents "
            f"(p = {calibration['p_value']:.2g}), most clearly in {calibration['weakest']}, so its means or intervals "
            f"are off there. {_off_data_too(report)}"
        )
    return findings


def _off_data_too(report: Mapping[str, Any]) -> str:
    """Whether a guide that is off on simulated data is off on those of the report too, and what would help."""
    exact, gap, reference = (report.get(name) or {} for name in ("exact", "gap", "reference"))
    remedy = "a richer family, such as FullNormal, a larger network or longer training would come closer."
    if gap and (gap["amortization"] or 0.0) > (gap["approximation"] or 0.0):
        remedy = "a larger network or longer training would come closer, a richer family little."
    known = [(exact.get("gap"), "estimate"), (gap.get("total"), gap.get("kind"))]
    part = "held-out" if report["data"]["part"] == "test" else "training"
    for value, kind in [*known, (reference.get("gap"), reference.get("kind"))]:
        if value is not None and value > 0.1:
            least = "at least " if kind == "lower bound" else ""
            return f"It is off on the {part} data too: its KL, log p(x) - ELBO, is {least}{value:.3f} nats; {remedy}"
        if value is not None and kind == "estimate":
            return (
                f"On the {part} data it is nearly exact: its KL, log p(x) - ELBO, is {value:.3f} nats. The fault shows "
                "only off them, where simulated data can lie."
            )
    return (
        "Simulated data can lie off the data that it was trained on, where it may be nearly exact; `--reference auto` "
        f"tells. If it is off there too, {remedy}"
    )


def _doubt_evidence(value: Mapping[str, Any], shape: Mapping[str, Any]) -> list[str]:
    if value["kind"] == "lower bound":
        reason = "Too few samples per datum to judge them: at least 25 are needed."
        if shape["above_0.5"]:
            reason = (
                f"For {shape['above_0.5']:.0%} of the data the importance weights have a tail shape k above 0.5: their "
                "variance is infinite, so no error bar would hold."
            )
        elif shape["median"] is not None:
            reason = (
                "The tail shapes of the importance weights are too near 0.5 for so few samples to tell whether their "
                "variance is finite."
            )
        return [f"**The log evidence is a lower bound, not an estimate.** {reason} {REMEDIES}"]
    if abs(value["bias"]) > max(value["mc_se"], 0.01):
        return [f"**The estimate is biased downwards**, by about {-value['bias']:.2f} nats. More samples reduce this."]
    return []


def _doubt_convergence(history: Sequence[float]) -> list[str]:
    if len(history) < 2:
        return ["**Only one epoch was trained**, too few to tell whether the bound has converged. Raise `svi.epochs`."]
    tenth = max(len(history) // 10, 1)
    last, before = float(np.mean(history[-tenth:])), float(np.mean(history[-2 * tenth : -tenth]))
    if last - before <= max(0.1, 5e-4 * abs(last)):
        return []
    epochs = f"the last {tenth} epochs" if tenth > 1 else "the last epoch"
    return [f"**The bound was still rising**, by {last - before:.2f} nats over {epochs}. Train longer (`svi.epochs`)."]


def _reference(block: Mapping[str, Any], *, with_gap: bool) -> str:
    n, settled, method, checks = block["n"], block["n_settled"], block["method"], block["diagnostics"]
    if method == "nuts":
        r_hat, ess = figure(checks["r_hat"]["max"], digits=4), figure(checks["ess"]["min"], digits=0)
        told = (
            f"**Reference posterior** by NUTS for {counted(n)}: R-hat is at most {r_hat} (required: below 1.01), "
            f"{block['draws']:,} draws are as good as {ess} independent ones or more (above 400), "
            f"{checks['divergences']} diverged (none)."
        )
        if block["converged"]:
            return f"{told} It passed its checks."
        return (
            f"{told} **Its own checks failed** on {n - settled} of {n} data. Longer chains (`python inference/nuts.py "
            "RUN --warmup 1000 --draws 4000`) or fewer data at a time, which move together (`--data 1`), may pass."
        )
    missing = ""
    if settled < n:
        missing = f" **{n - settled} of {n} data did not settle**: "
        missing += "their chains differ too much." if method == "ais" else "their posteriors are too rough or too wide."
        missing += " They are left out here and below." if settled or method != "ais" else ""
        missing += (
            " Slower annealing (`ppl-vae evaluate RUN --reference ais --temperatures N`, 500 by default) or more "
            "`--chains` (16) may help."
            if method == "ais"
            else " Annealing (`--reference ais`) may help."
        )
    if block["log_evidence"] is None:
        return f"**Reference** by {method}: log p(x) is known for none of {counted(n)}.{missing}"
    error = f"± {margin(block['error']) if method == 'ais' else format(block['error'], '.1g')} nats"
    error = "nats exactly" if method == "closed-form" else error
    sure = block["kind"] == "estimate"
    told = (
        f"**Reference** by {method}: log p(x) {'=' if sure else '>='} {figure(block['log_evidence'])} {error} on "
        f"average over {counted(n) if settled in (0, n) else f'the {counted(settled)} that settled'}, where importance "
        f"sampling gives {figure(block['importance_weighted'])}"
    )
    if with_gap:
        told += f"; the ELBO lies {'' if sure else 'at least '}{figure(block['gap'], block['gap_error'])} below"
    told += "." if sure else ". This is a lower bound on average, not an estimate."
    if method == "ais":
        median, least = (figure(checks["ess"][name], digits=1) for name in ("median", "min"))
        told += (
            f" Of its {block['draws']} chains, a median of {median} and at least {least} are effective; "
            f"{checks['acceptance']['median']:.0%} of the moves were accepted."
        )
    return told + missing


def _bound(block: Mapping[str, Any]) -> str:
    counts = block["samples"]
    shown = sorted({0, len(counts) // 2, len(counts) - 1})
    bounds = ", ".join(f"{figure(block['mean'][at])} at K = {counts[at]:,}" for at in shown)
    return f"**The bound over the number of samples** K, mean over {counted(block['n'])}: {bounds}."


def _gap(block: Mapping[str, Any]) -> str:
    names = ("total", "error"), *((name, f"{name}_error") for name in ("approximation", "amortization"))
    total, family, network = (figure(block[name], block[error]) for name, error in names)
    least = "" if block["kind"] == "estimate" else "at least "
    advice = "A larger encoder or longer training would gain more than a richer family."
    if (block["approximation"] or 0.0) > (block["amortization"] or 0.0):
        advice = "A richer family (FullNormal, MixtureNormal) would gain more than a larger network."
    if (block["total"] or 0.0) < 0.1:
        advice = "There is little to gain."
    return (
        f"**The gap**, log p(x) - ELBO, is {least}{total} nats on average over {counted(block['n'])}: {least}{family} "
        f"because of the guide's family, {network} because one network serves all data. ± is the Monte Carlo error. "
        f"{advice}"
    )
