"""Diagnostics in words: what a run's reference, bound, gap, classes and calibration came to."""

from collections.abc import Mapping
from typing import Any

from ppl_vae.reports.findings import counted, figure, margin
from ppl_vae.reports.style import chance


def describe_diagnostics(report: Mapping[str, Any]) -> list[str]:
    """Describe what the diagnostics of a run measured, if any were asked for."""
    blocks = {
        "reference": lambda block: _reference(block, with_gap="gap" not in report),
        "bound": _bound,
        "gap": _gap,
        "classes": _classes,
        "calibration": lambda block: (
            f"**Calibration**: {block['verdict']} ({chance(block['p_value'])} over {block['simulations']} simulations)."
        ),
    }
    return [describe(report[name]) for name, describe in blocks.items() if name in report]


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
    second = (
        "because one network serves all data"
        if block.get("amortized", True)
        else ("because training did not find its best member")
    )
    parts = f"{least}{family} because of the guide's family, {network} {second}"
    return f"{gap}: {parts}. ± is the Monte Carlo error."
