"""Findings: what the numbers of a report mean in words, and what would help."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

REMEDIES = (
    "To tighten the bound: more samples (`ppl-vae evaluate RUN --samples K`), a richer guide (FullNormal, "
    "MixtureNormal) or a larger network. Annealing does not rely on the guide (`ppl-vae evaluate RUN --reference ais`, "
    "with more `--temperatures` if it does not settle)."
)

REMEDIES_WHOLE = (
    "More samples (`ppl-vae evaluate RUN --samples K`), longer training, a richer guide or another parameterisation "
    "of the model tighten it. A reference does not rely on the guide (`ppl-vae evaluate RUN --reference nuts`)."
)


def list_findings(report: Mapping[str, Any], history: Sequence[float]) -> list[str]:
    """List what the numbers give reason to doubt, and what would help.

    Args:
        report: the content of `report.json`.
        history: the bound of each epoch.
    """
    test, train, exact = report["test"], report["train"], report["exact"]
    findings = [*_doubt_data(report["data"]), *_doubt_diagnostics(report), *_doubt_guide(report)]
    if None in (test["log_evidence"]["mean"], test["elbo"]["mean"], train["elbo"]):
        reason = "the model gives some datum no density. Nothing here can be trusted."
        return [*findings, f"**Some figures are not finite**: {reason}"]
    if _has_diverged(report, history):
        remedy = "Nothing here can be trusted. Lower `svi.learning_rate`, or set `svi.clip = 1.0`."
        return [*findings, f"**Training diverged**: the bound ended at {history[-1]:.1e} nats per datum. {remedy}"]
    findings += [
        *_doubt_evidence(test, report["data"].get("whole", False)),
        *_doubt_latents(test),
        *_doubt_training(train, test["elbo"], history),
    ]
    if exact and exact["gap"] > 0.1:
        findings.append(
            f"**The guide misses the exact posterior** by {exact['gap']:.2f} nats on average. A richer family, such as "
            "FullNormal, or longer training would come closer."
        )
    return findings


def describe_diagnostics(report: Mapping[str, Any]) -> list[str]:
    """Describe what the diagnostics of a run measured, if any were asked for."""
    blocks = {
        "reference": lambda block: _reference(block, with_gap="gap" not in report),
        "bound": _bound,
        "gap": _gap,
        "classes": _classes,
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


def _doubt_data(data: Mapping[str, Any]) -> Iterator[str]:
    if data.get("whole"):
        yield (
            "**All figures are of the training data.** Some latent variables are shared by all data, so the whole data "
            f"set counts as one datum. Nothing here tells how the model does on new data, {data['n_test'] or 'none'} "
            "of which were held out."
        )
    elif data["part"] == "train":
        yield (
            "**All figures are of the training data.** The guide keeps a row for each of them and knows no others, so "
            "nothing here tells how the model does on new data. A network such as `Linear` or `MLP` would."
        )


def _doubt_diagnostics(report: Mapping[str, Any]) -> Iterator[str]:
    reference, calibration = report.get("reference"), report.get("calibration")
    if reference and not reference["converged"]:
        failed = f"{reference['n'] - reference['n_settled']} of {reference['n']} data"
        yield (
            f"**The reference posterior by {reference['method']} failed its own checks** on {failed}: do not rely on "
            "it there. The diagnostics below tell what failed."
        )
    if calibration and calibration["verdict"] == "miscalibrated":
        yield (
            "**The guide is miscalibrated**: on data simulated from the model, its draws differ from the true latents "
            f"(p = {calibration['p_value']:.2g}), most clearly in {calibration['weakest']}. {_off_data_too(report)}"
        )


def _doubt_guide(report: Mapping[str, Any]) -> Iterator[str]:
    """What to trust of a guide whose data are one datum, and its most doubtful sites."""
    if check := report.get("check"):
        off = ", ".join(f"{name} ({figure(apart, digits=2)})" for name, apart in check["doubtful"].items())
        yield f"**{check['words'][-1]}** Furthest off in mean or spread, in standard deviations: {off}."


def _off_data_too(report: Mapping[str, Any]) -> str:
    """Whether a guide that is off on simulated data is off on those of the report too, and what would help."""
    exact, gap, reference = (report.get(name) or {} for name in ("exact", "gap", "reference"))
    remedy = "a richer family, such as FullNormal, a larger network or longer training would come closer."
    if gap and (gap["amortization"] or 0.0) > (gap["approximation"] or 0.0):
        remedy = "a larger network or longer training would come closer, a richer family little."
    part = "held-out" if report["data"]["part"] == "test" else "training"
    for block, name in ((exact, "gap"), (gap, "total"), (reference, "gap")):
        value, bounded = block.get(name), block.get("kind") == "lower bound"
        divergence = "its KL, log p(x) - ELBO, is " + ("at least " if bounded else "") + f"{figure(value)} nats"
        if "n" in block:
            divergence += f" over {counted(block.get('n_settled') or block['n'])}"
        if value is not None and value > 0.1:
            return f"It is off on the {part} data too: {divergence}; {remedy}"
        if value is not None and not bounded:
            return f"On the {part} data it is nearly exact: {divergence}. The fault shows only off them."
    return (
        f"Simulated data can lie off the {part} data, where it may be nearly exact; `--reference auto` tells. If it is "
        f"off there too, {remedy}"
    )


def _doubt_evidence(test: Mapping[str, Any], whole: bool) -> Iterator[str]:
    value, shape, worst = test["log_evidence"], test["pareto_k"], test["worst"]
    named = ""
    if worst["n"]:
        rows = ", ".join(
            f"{row} (k {figure(k, digits=2)})" for row, k in zip(worst["rows"], worst["pareto_k"], strict=True)
        )
        named = f"The weights of {counted(worst['n'])} are bad; the worst are in rows {rows}. "
        if worst["mean_without"] is not None:
            named += f"Without the bad ones the mean is {figure(worst['mean_without'])}. "
    if value["kind"] == "lower bound":
        reason = named + "What they may hide could move the mean beyond any interval."
        if shape["median"] is None:
            reason = "Too few samples per datum to judge the weights: at least 25 are needed."
        elif not named:
            reason = (
                "The tail shapes of the weights are typically too near 0.5 for so few samples to tell if their "
                "variance is finite."
            )
        remedies = REMEDIES_WHOLE if whole else REMEDIES
        yield f"**The log evidence is a lower bound, not an estimate.** {reason} {remedies}"
    elif named:
        yield f"**Some weights are bad**, though they cannot move the mean beyond its interval. {named.strip()}"
    elif abs(value["bias"]) > max(value["mc_se"], 0.01):
        yield f"**The estimate is biased downwards**, by about {-value['bias']:.2f} nats. More samples reduce this."


def _doubt_latents(test: Mapping[str, Any]) -> Iterator[str]:
    count, names = len(test["collapsed"]), ", ".join(f"z{latent}" for latent in test["collapsed"])
    if count:
        are, means = (
            ("is", f"mean of {names} hardly varies") if count == 1 else ("are", f"means of {names} hardly vary")
        )
        yield (
            f"**{count} of {test['latents']} latents {are} collapsed**: the posterior {means} over the data (variance "
            "below 0.01). Fewer latents would do as well."
        )


def _has_diverged(report: Mapping[str, Any], history: Sequence[float]) -> bool:
    """Whether the bound fell by ten times its size, or ended where no model of the data belongs."""
    baseline = (report.get("baseline") or {}).get("ppca", {}).get("log_evidence") or 0.0
    least = min(baseline, 0.0) * 100 - 1e4 * report["data"].get("features", 1)
    return history[-1] < min(history[0] - 10 * abs(history[0]) - 1e3, least) or history[-1] < 1e6 * least


def _doubt_training(train: Mapping[str, Any], bound: Mapping[str, Any], history: Sequence[float]) -> Iterator[str]:
    if len(history) < 2:
        yield "**Only one epoch was trained**, too few to tell whether the bound has converged. Raise `svi.epochs`."
    else:
        tenth = max(len(history) // 10, 1)
        last, before = float(np.mean(history[-tenth:])), float(np.mean(history[-2 * tenth : -tenth]))
        if last - before > max(0.1, 5e-4 * abs(last)):
            rise = f"by {last - before:.2f} nats over the last {f'{tenth} epochs' if tenth > 1 else 'epoch'}"
            yield f"**The bound was still rising**, {rise}. Train longer (`svi.epochs`)."
    lead = train.get("lead") or {"elbo": None}
    if lead["elbo"] is None or lead["log_evidence"] is None:
        return
    ahead, least = lead["log_evidence"], 0.01 * abs(bound["mean"])
    told = f"{figure(ahead, lead['log_evidence_se'], digits=1)} nats of log p(x)"
    of = f"over {lead['n']} data or more of each part"
    if ahead > max(3 * lead["log_evidence_se"], least):
        yield (
            f"**The training data fit better, by {told}** {of}: the model memorises. Fewer parameters, fewer epochs "
            '(`svi.keep = "best"` with a `data.validation_fraction`) or more data help.'
        )
    elif lead["elbo"] - ahead > max(3 * lead["elbo_se"], least):
        yield (
            f"**The encoder overfits**: its bound is {lead['elbo']:.1f} nats higher on the training data, log p(x) "
            f"only {told}, {of}. The model is not to blame; a smaller encoder or more data for it would help."
        )


def _reference(block: Mapping[str, Any], *, with_gap: bool) -> str:
    n, settled, method, checks = block["n"], block["n_settled"], block["method"], block["diagnostics"]
    if method == "nuts":
        r_hat, ess = figure(checks["r_hat"]["max"], digits=4), figure(checks["ess"]["min"], digits=0)
        verdict = (
            f"**Its own checks failed** on {n - settled} of {n} data. Longer chains (`python inference/nuts.py RUN "
            "--warmup 1000 --draws 4000`) may pass, unless they are caught in separate modes."
        )
        return (
            f"**Reference posterior** by NUTS for {counted(n)}: R-hat is at most {r_hat} (required: below 1.01), "
            f"{block['draws']:,} draws are as good as {ess} independent ones or more (above 400), "
            f"{checks['divergences']} diverged (none). {'It passed its checks.' if block['converged'] else verdict}"
        )
    why, remedy = "their posteriors are too rough or too wide", "Annealing (`--reference ais`)"
    if method == "ais":
        why, remedy = (
            "their chains differ too much, or importance sampling finds more",
            "Slower annealing (`ppl-vae evaluate RUN --reference ais ",
        )
        remedy += "--temperatures N`, 500 by default) or more `--chains` (16)"
    left_out = "They are left out here and below. " if settled or method != "ais" else ""
    missing = (
        f" **{n - settled} of {n} data did not settle**: {why}. {left_out}{remedy} may help." if settled < n else ""
    )
    if block["log_evidence"] is None:
        return f"**Reference** by {method}: log p(x) is known for none of {counted(n)}.{missing}"
    error = f"± {margin(block['error']) if method == 'ais' else format(block['error'], '.1g')} nats"
    sure, of = block["kind"] == "estimate", counted(n) if settled in (0, n) else f"the {counted(settled)} that settled"
    told = (
        f"**Reference** by {method}: log p(x) {'=' if sure else '>='} {figure(block['log_evidence'])} "
        f"{'nats exactly' if method == 'closed-form' else error} on average over {of}, where importance sampling gives "
        f"{figure(block['importance_weighted'])}"
    )
    if with_gap:
        told += f"; the ELBO lies {'' if sure else 'at least '}{figure(block['gap'], block['gap_error'])} below"
    told += "." if sure else ". This is a lower bound on average, not an estimate."
    if method == "ais":
        median, least = (figure(checks["ess"][name], digits=1) for name in ("median", "min"))
        told += f" Of its {block['draws']} chains, a median of {median} and at least {least} are effective; "
        told += f"{checks['acceptance']['median']:.0%} of the moves were accepted."
    return told + missing


def _bound(block: Mapping[str, Any]) -> str:
    counts = block["samples"]
    shown = sorted({0, len(counts) // 2, len(counts) - 1})
    bounds = ", ".join(f"{figure(block['mean'][at], block['mc_se'][at])} at K = {counts[at]:,}" for at in shown)
    return f"**The bound over the number of samples** K, mean over {counted(block['n'])}: {bounds}."


def _classes(block: Mapping[str, Any]) -> str:
    apart = block["margin"]
    told = (
        f"**Classes** by p(y given x), {block['samples']} samples for each of {block['classes']}: right for "
        f"{figure(block['accuracy'], block['se'])} of {counted(block['n'])}; log p(y given x) is "
        f"{figure(block['log_score'])} nats at the label, the calibration error {figure(block['calibration_error'])}. "
        f"Uncertain, since the interval of the difference of two classes holds 0: {block['uncertain']}. Refused as "
        f"outliers under every class, since 99 % of the {block['known']['part']} data of each have a higher "
        f"log p(x given y): {block['outliers']}."
    )
    if apart is not None:
        told += (
            f" For {counted(block['open'])} the evidence of another class is only a lower bound; it would have to be "
            f"too low by {figure(apart['min'], digits=1)} nats at the least, by {figure(apart['median'], digits=1)} in "
            "the median, for that class to be the most probable."
        )
    return told


def _gap(block: Mapping[str, Any]) -> str:
    names = ("total", "error"), *((name, f"{name}_error") for name in ("approximation", "amortization"))
    total, family, network = (figure(block[name], block[error]) for name, error in names)
    least = "" if block["kind"] == "estimate" else "at least "
    gap = f"**The gap**, log p(x) - ELBO, is {least}{total} nats on average over {counted(block['n'])}"
    if block.get("family", "") is None:
        return f"{gap}. The family of this guide is not known, so it is not split."
    second, more = "because training did not find its best member", "Longer"
    if block.get("amortized", True):
        second, more = "because one network serves all data", "A larger encoder or longer"
    advice = f"{more} training would gain more than a richer family."
    if (block["approximation"] or 0.0) > (block["amortization"] or 0.0):
        advice = "A richer family (FullNormal, MixtureNormal) would gain more than a larger network."
    if (block["total"] or 0.0) < 0.1:
        advice = "There is little to gain."
    parts = f"{least}{family} because of the guide's family, {network} {second}"
    return f"{gap}: {parts}. ± is the Monte Carlo error. {advice}"
