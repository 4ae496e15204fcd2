"""Remedies: the one list that decides what a report advises, so that no two of them are at odds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ppl_vae.reports.findings import behind_ppca, distance, has_diverged, overfitted, silent, still_rising

_RICHER = {
    "Normal": "FullNormal or MixtureNormal",
    "LowRankNormal": "FullNormal or MixtureNormal",
    "FullNormal": "Flow",
}


def list_remedies(report: Mapping[str, Any], history: Sequence[float]) -> list[str]:
    """List what would help against the findings of a report, what to try first first.

    Training longer is not advised to what memorises or has settled, nor a larger network to what overfits or still
    learns; a program without a network is not told of one.

    Args:
        report: the content of `report.json`.
        history: the bound of each epoch.
    """
    return list(_remedies(report, history))


def trusted(spec: Mapping[str, Any]) -> str:
    """The option by which a command may run the code of a run's program."""
    if spec.get("model", {}).get("built"):
        return " --program FILE.py:NAME"
    return " --trust-code" * any("program" in table for table in spec.values() if isinstance(table, Mapping))


def _remedies(report: Mapping[str, Any], history: Sequence[float]) -> Iterator[str]:
    spec, test, data = report.get("spec", {}), report["test"], report["data"]
    svi, networks = (
        spec.get("svi", {}),
        [role for role in ("likelihood", "posterior") if "network" in spec.get(role, {})],
    )
    if None in (test["log_evidence"]["mean"], test["elbo"]["mean"], report["train"]["elbo"]) or has_diverged(
        report, history
    ):
        yield "Lower `svi.learning_rate`, or set `svi.clip = 1.0`."
        return
    whole, fits = data.get("whole", False), overfitted(report)
    learning = fits is None and (len(history) < 2 or still_rising(report, history) is not None)
    built = spec.get("model", {}).get("built", False)
    worse, collapsed = behind_ppca(report), len(silent(test))
    lost = 2 * collapsed >= test["latents"] > 0 and (worse or collapsed == test["latents"]) and len(history) > 2
    if worse and spec.get("data", {}).get("scaling") == "none" and data.get("columns", {}).get("names"):
        yield 'Standardise the columns: `data.scaling = "standardize"`.'
    if learning:
        epochs = "more epochs than the" if built else "raise `svi.epochs`, now"
        yield f"Train longer: {epochs} {svi.get('epochs', len(history))}. The rest may mend itself."
    if lost:
        free = svi.get("warm_up") and not svi.get("free_bits")
        yield (
            "Keep latents from collapsing: "
            + ("`svi.free_bits = 0.1`." if free else f"`svi.warm_up = {max(len(history) // 3, 1)}`.")
        )
    elif worse and not learning:
        yield "Try other values of `svi.learning_rate`, three times and a third of it, and of `svi.seed`."
    if fits and svi.get("keep") != "best":
        yield 'Keep the epoch that does best on other data: `svi.keep = "best"` with `data.validation_fraction = 0.1`.'
    if fits:
        role = "likelihood" if fits == "model" else "posterior"
        smaller = f"Fewer hidden units or dropout in `{role}.network`" if role in networks else "Fewer parameters"
        yield f"{smaller}, or more data."
    if data["part"] == "train" and not whole:
        yield "For figures of new data take a guide that reads them, by a network such as `Linear` or `MLP`."
    off = any(one["off"] for one in report.get("predictive", {}).get("statistics", ()))
    if off and not learning and not worse:
        listed = ": `ppl-vae list likelihood`" if "likelihood" in spec else ""
        yield f"Another likelihood may draw what this one cannot{listed}."
    yield from _of_guide(report, whole=whole, learning=learning, fits=fits, networks=networks)
    if 0 < collapsed < test["latents"] and not worse and not learning and "latent" in spec.get("model", {}):
        yield f"Fewer latents would do as well: `model.latent = {test['latents'] - collapsed}`."


def _of_guide(
    report: Mapping[str, Any], *, whole: bool, learning: bool, fits: str | None, networks: Sequence[str]
) -> Iterator[str]:
    """What brings the guide, or the evidence that is weighed by it, nearer to the truth."""
    test, spec, apart = report["test"], report.get("spec", {}), distance(report)
    bound = test["log_evidence"]["kind"] == "lower bound"
    trust = trusted(spec)
    biased = not bound and abs(test["log_evidence"]["bias"]) > max(test["log_evidence"]["mc_se"], 0.01)
    if bound or biased:
        draws = f"`ppl-vae evaluate RUN --samples {10 * test['samples']}{trust}`"
        yield f"More samples {'tighten the bound' if bound else 'make the bias smaller'}: {draws}."
    miscalibrated = (report.get("calibration") or {}).get("verdict") == "miscalibrated"
    off = (apart is not None and apart[0] > 0.1) or (miscalibrated and apart is None)
    gap = report.get("gap") or {}
    network = (gap.get("amortization") or 0.0) > (gap.get("approximation") or 0.0) and gap.get("family", "")
    if (bound or off) and not learning and not (apart is not None and apart[0] <= 0.1 and not apart[2]):
        family = spec.get("posterior", {}).get("family")
        more = f", such as {_RICHER[family]}" if family in _RICHER else ""
        if whole:
            yield f"A richer guide{more} or another parameterisation of the model comes closer to the posterior."
        elif not network:
            yield f"A richer guide{more} comes closer to the posterior."
        elif "posterior" in networks and fits is None and gap.get("amortized", True):
            yield "A larger `posterior.network` comes closer to the posterior, a richer family little."
        else:
            yield "Longer training of the guide comes closer to the posterior, a richer family little."
    if (bound or miscalibrated) and "reference" not in report:
        method = "nuts" if whole else "ais"
        yield f"A reference does not rely on the guide: `ppl-vae evaluate RUN --reference {method}{trust}`."
