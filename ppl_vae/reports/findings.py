"""Findings: what the numbers of a report give reason to doubt, the gravest first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ppl_vae.reports.style import chance


def list_findings(report: Mapping[str, Any], history: Sequence[float]) -> list[str]:
    """List what the numbers give reason to doubt, the gravest first; `list_remedies` says what would help.

    Args:
        report: the content of `report.json`.
        history: the bound of each epoch.
    """
    test, train = report["test"], report["train"]
    basis = [*_doubt_data(report["data"]), *_doubt_guide(report)]
    if None in (test["log_evidence"]["mean"], test["elbo"]["mean"], train["elbo"]):
        reason = "the model gives some datum no density. Nothing here can be trusted."
        return [f"**Some figures are not finite**: {reason}", *basis]
    if has_diverged(report, history):
        ended = f"the bound ended at {history[-1]:.1e} nats per datum"
        if behind_ppca(report):
            ended += f", where PPCA has {figure(report['baseline']['ppca']['log_evidence'], digits=1)}"
        return [f"**Training diverged**: {ended}. Nothing here can be trusted.", *basis]
    return [
        *_doubt_model(report, history),
        *basis,
        *_doubt_evidence(test),
        *_doubt_predictions(report.get("predictive")),
        *_doubt_diagnostics(report),
        *_doubt_distance(report),
        *_doubt_encoder(report),
        *_doubt_latents(report),
        *_doubt_convergence(report, history),
    ]


def has_diverged(report: Mapping[str, Any], history: Sequence[float]) -> bool:
    """Whether the bound fell by ten times its size, or ended where no model of the data belongs, far below PPCA."""
    ppca, features = (report.get("baseline") or {}).get("ppca", {}), max(report["data"].get("features", 1), 1)
    baseline = ppca.get("log_evidence") or 0.0
    if (ppca.get("difference") or 0.0) < -10 * (abs(baseline) + features):
        return True
    least = min(baseline, 0.0) * 100 - 1e4 * features
    return history[-1] < min(history[0] - 10 * abs(history[0]) - 1e3, least) or history[-1] < 1e6 * least


def rise(history: Sequence[float]) -> tuple[float, int] | None:
    """By how many nats the bound rose over the last epochs, and over how many; None if it has settled."""
    tenth = max(len(history) // 10, 1)
    if len(history) < 2:
        return None
    last, before = float(np.mean(history[-tenth:])), float(np.mean(history[-2 * tenth : -tenth]))
    return (last - before, tenth) if last - before > max(0.1, 5e-4 * abs(last)) else None


def still_rising(report: Mapping[str, Any], history: Sequence[float]) -> tuple[float, int] | None:
    """By how much the bound rose over the last epochs, as `rise`; None too if an earlier epoch was best and kept."""
    last = report["train"].get("kept_epoch") or len(history)
    return rise(history) if last == len(history) else None


def behind_ppca(report: Mapping[str, Any]) -> bool:
    """Whether the data are certainly less probable than under PPCA with as many latents."""
    ppca = (report.get("baseline") or {}).get("ppca", {})
    apart, error = ppca.get("difference"), ppca.get("se")
    return apart is not None and apart < -max(3 * (error or 0.0), 0.05)


def overfitted(report: Mapping[str, Any]) -> str | None:
    """What fits the training data better, the `model` by its log p(x), else the `encoder` by the bound alone."""
    lead = report["train"].get("lead") or {}
    if lead.get("elbo") is None or lead.get("log_evidence") is None:
        return None
    ahead, least = lead["log_evidence"], 0.01 * abs(report["test"]["elbo"]["mean"])
    if ahead > max(3 * lead["log_evidence_se"], least):
        return "model"
    return "encoder" if lead["elbo"] - ahead > max(3 * lead["elbo_se"], least) else None


def silent(test: Mapping[str, Any]) -> list[int]:
    """The latents that say next to nothing about a datum: their mean hardly varies, or their rate is near 0."""
    return sorted({*test["collapsed"], *(z for z, rate in enumerate(test.get("rates") or ()) if rate <= 0.02)})


def distance(report: Mapping[str, Any]) -> tuple[float, str, bool] | None:
    """KL of the guide to the posterior in nats, over which data, and if it is at least that; None if not known."""
    for name, key in (("exact", "gap"), ("gap", "total"), ("reference", "gap")):
        block = report.get(name) or {}
        if block.get(key) is not None:
            n = block.get("n_settled") or block.get("n")
            return block[key], f" over {counted(n)}" if n else "", block.get("kind") == "lower bound"
    return None


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


def _doubt_model(report: Mapping[str, Any], history: Sequence[float]) -> Iterator[str]:
    """Whether the model is worse than a linear one, or learned the training data by heart."""
    test, ppca = report["test"], (report.get("baseline") or {}).get("ppca", {})
    if behind_ppca(report):
        lost, latents = len(silent(test)), test["latents"]
        cause = (
            "training has not settled"
            if still_rising(report, history) or len(history) < 2
            else "training settled in a poor place"
        )
        if 2 * lost >= latents and len(history) > 1:
            cause = f"{lost} of {latents} latents collapsed, and what is left is no more than a linear model"
        bound = " or less: the log evidence is a bound" if test["log_evidence"]["kind"] == "lower bound" else ""
        yield (
            f"**The model is worse than PPCA**, by {figure(-ppca['difference'], ppca['se'])} nats per datum{bound}. A "
            f"linear model with as many latents fits these data better, so no figure here tells what this kind of "
            f"model can do: {cause}."
        )
    elif len(silent(test)) == test["latents"] > 0:
        yield (
            f"**All latents are collapsed**, {test['latents']} of {test['latents']}: no code says anything about its "
            "datum, so the model is one fixed distribution of x."
        )
    if overfitted(report) == "model":
        yield f"**The model memorises**: its training data fit better, by {_ahead(report)}."


def _ahead(report: Mapping[str, Any]) -> str:
    lead = report["train"]["lead"]
    told = f"{figure(lead['log_evidence'], lead['log_evidence_se'], digits=1)} nats of log p(x)"
    return f"{told} over {lead['n']} data or more of each part"


def _doubt_encoder(report: Mapping[str, Any]) -> Iterator[str]:
    if overfitted(report) == "encoder":
        yield (
            f"**The encoder overfits, the model does not**: the bound is {report['train']['lead']['elbo']:.1f} nats "
            f"higher on the training data, log p(x) only {_ahead(report)}."
        )


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
            "nothing here tells how the model does on new data."
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
        part, apart = ("held-out" if report["data"]["part"] == "test" else "training"), distance(report)
        where = f"Simulated data can lie off the {part} data, where it may be nearly exact; `--reference auto` tells."
        if apart is not None:
            kl = (
                "its KL, log p(x) - ELBO, is "
                + ("at least " if apart[2] else "")
                + f"{figure(apart[0])} nats{apart[1]}"
            )
            if apart[0] > 0.1:
                where = f"It is off on the {part} data too: {kl}."
            elif not apart[2]:
                where = f"On the {part} data it is nearly exact: {kl}. The fault shows only off them."
        yield (
            "**The guide is miscalibrated**: on data simulated from the model, its draws differ from the true latents "
            f"({chance(calibration['p_value'])}), most clearly in {calibration['weakest']}. {where}"
        )


def _doubt_guide(report: Mapping[str, Any]) -> Iterator[str]:
    """What to trust of a guide whose data are one datum, and its most doubtful sites."""
    if check := report.get("check"):
        off = ", ".join(f"{name} ({figure(apart, digits=2)})" for name, apart in check["doubtful"].items())
        yield f"**{check['words'][-1]}** Furthest off in mean or spread, in standard deviations: {off}."


def _doubt_distance(report: Mapping[str, Any]) -> Iterator[str]:
    """The distance of the guide to the exact posterior, unless the calibration has told it."""
    told = (report.get("calibration") or {}).get("verdict") == "miscalibrated"
    if report["exact"] and report["exact"]["gap"] > 0.1 and not told:
        yield f"**The guide misses the exact posterior** by {report['exact']['gap']:.2f} nats on average."


def _doubt_evidence(test: Mapping[str, Any]) -> Iterator[str]:
    value, shape, worst = test["log_evidence"], test["pareto_k"], test["worst"]
    named = ""
    if worst["n"]:
        rows = ", ".join(
            f"{row} (k {figure(k, digits=2)})" for row, k in zip(worst["rows"][:5], worst["pareto_k"][:5], strict=True)
        )
        are = "is bad, row" if worst["n"] == 1 else "are bad, the worst in rows" if worst["n"] > 5 else "are bad, rows"
        named = f"The weights of {counted(worst['n'])} {are} {rows}. "
        if worst["mean_without"] is not None:
            named += f"Without them the mean is {figure(worst['mean_without'])} nats per datum. "
    if value["kind"] == "lower bound":
        reason = named + "What they may hide could move the mean beyond any interval."
        if shape["median"] is None:
            reason = "Too few samples per datum to judge the weights: at least 25 are needed."
        elif not named and shape["median"] > 0.5:
            reason = (
                f"The tail shape k of the weights is {figure(shape['median'], digits=2)}: above 0.5 their variance "
            )
            reason += "may be infinite."
        elif not named:
            reason = (
                "The tail shapes of the weights are typically too near 0.5 for so few samples to tell if their "
                "variance is finite."
            )
        yield f"**The log evidence is a lower bound, not an estimate.** {reason}"
    elif named:
        yield f"**Some weights are bad**, though they cannot move the mean beyond its interval. {named.strip()}"
    elif abs(value["bias"]) > max(value["mc_se"], 0.01):
        yield f"**The estimate is biased downwards**, by about {-value['bias']:.2f} nats."


def _doubt_predictions(block: Mapping[str, Any] | None) -> Iterator[str]:
    """The statistics of the data that no set of draws comes near."""
    if off := [one for one in (block or {}).get("statistics", ()) if one["off"]]:
        worst = "; ".join(
            f"the {one['name']} is {one['observed']:.4g} (draws: {one['low']:.4g} to {one['high']:.4g})"
            for one in off[:3]
        )
        more = f"; and {len(off) - 3} more" if len(off) > 3 else ""
        yield f"**The model draws data unlike these**: {worst}{more}."


def _doubt_latents(report: Mapping[str, Any]) -> Iterator[str]:
    """Which latents are collapsed, unless all are and that was told."""
    test, latents = report["test"], silent(report["test"])
    if len(latents) == test["latents"] and not behind_ppca(report):
        return
    names = ", ".join(f"z{latent}" for latent in latents[:8])
    names += f" and {len(latents) - 8} more" if len(latents) > 8 else ""
    lost = f"{len(latents)} of {test['latents']} latents {'is' if len(latents) == 1 else 'are'} collapsed"
    if len(latents) > len(test["collapsed"]):
        yield f"**{lost} or nearly so**: the rate of {names} is at most 0.02 nats."
    elif latents:
        yield f"**{lost}**: the posterior mean of {names} hardly varies over the data (variance below 0.01)."


def _doubt_convergence(report: Mapping[str, Any], history: Sequence[float]) -> Iterator[str]:
    if len(history) < 2:
        yield "**Only one epoch was trained**, too few to tell whether the bound has converged."
    elif (risen := still_rising(report, history)) is not None:
        over = f"{risen[1]} epochs" if risen[1] > 1 else "epoch"
        yield f"**The bound was still rising**, by {risen[0]:.2f} nats over the last {over}."
