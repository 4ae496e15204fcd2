"""A closer look at a run: reference posteriors, the gap and its parts, calibration, with words and pictures."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae import diagnostics, plots
from ppl_vae.batches import whole
from ppl_vae.calibration import Calibration, calibrate
from ppl_vae.evidence import BoundCurve, Evidence, bound_curve
from ppl_vae.exact import exact_log_evidence, gaussians
from ppl_vae.gap import Gap, inference_gap
from ppl_vae.joint import Joint
from ppl_vae.plane import Plane, guide_plane, posterior_plane
from ppl_vae.program import VAE
from ppl_vae.reference import Reference, reference_posterior, strongest
from ppl_vae.report import counted, margin
from ppl_vae.traces import doubled, prepare, scope, seeded

__all__ = ["consult", "scrutinise"]

LOOKED = {"auto": 50, "closed-form": 100, "quadrature": 100, "ais": 50, "nuts": 5}  # data
OTHERWISE = 100  # data, without a reference
ENOUGH = {"tolerance": 1e-3, "entries": 2**21}  # of quadrature, in nats; it mostly does far better
SIMULATED = 500
PANELS = 8  # data whose posteriors are drawn


def consult(
    program: Any,
    rows: Mapping[str, Tensor],
    *,
    reference: str | None = None,
    gap: bool = False,
    calibration: bool = False,
    data: int | None = None,
    temperatures: int | None = None,
    chains: int | None = None,
    seed: int = 0,
) -> Reference | None:
    """Find the reference of the first data, and refuse what the program does not allow, before anything slow.

    Args:
        program: any program that the methods asked for allow.
        rows: the data that are evaluated, as a batch dict.
        reference: a method of `reference_posterior`, or none.
        gap: whether log p(x) - ELBO will be split.
        calibration: whether the guide will be tested on data of the model.
        data: how many of the rows to look at; by default as many as the method can bear.
        temperatures: moves of each chain of annealing, 500 by default; no other method has any.
        chains: of annealing, a datum, 16 by default.
        seed: of all draws.

    Returns:
        The reference, where one was asked for.

    Raises:
        ValueError: for what the program does not allow, with what it does; or a number of data without use, or of more
            than there are.
    """
    if data is not None:
        there = len(next(iter(rows.values())))
        if whole("data", data) > there:
            raise ValueError(f"Expected --data to be at most {there:,}, which are all there are; got {data:,}.")
        if reference is None and not gap:
            raise ValueError("Expected --data together with --reference or --gap, which look at so many; got it alone.")
    annealed = {"temperatures": temperatures, "chains": chains}
    annealed = {name: value for name, value in annealed.items() if value is not None}
    for name, value in annealed.items():
        method = strongest(program, _first(program, rows, 1)) if reference == "auto" else reference
        if method != "ais":
            took = f"--reference {reference}" + (f", which is {method} here" if reference == "auto" else "")
            raise ValueError(
                f"Expected --{name} together with --reference ais, whose setting it is; got it "
                + ("alone." if reference is None else f"with {took}.")
            )
        whole(name, value, 2 if name == "chains" else 1)
    if gap and not isinstance(program, VAE):
        raise ValueError(f"Expected a VAE for --gap, whose guide's family is known; got {type(program).__name__}.")
    if calibration:
        calibrate(program, _first(program, rows, 2), draws=1, simulations=2, seed=seed)
    if reference is None:
        return None
    some = _first(program, rows, LOOKED[reference] if data is None else data)
    settings = annealed or (ENOUGH if reference in ("auto", "quadrature") else {})
    return reference_posterior(program, some, reference, seed=seed, **settings)  # type: ignore[arg-type]


def scrutinise(
    program: Any,
    rows: Mapping[str, Tensor],
    evidence: Evidence,
    folder: Path,
    *,
    truth: Reference | None = None,
    gap: bool = False,
    calibration: bool = False,
    data: int | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Look closer at a trained program, as far as asked.

    Args:
        program: any program that `consult` did not refuse.
        rows: the data that were evaluated, as a batch dict.
        evidence: their evidence.
        folder: takes the pictures.
        truth: the reference of the first data, from `consult`.
        gap: whether to split log p(x) - ELBO.
        calibration: whether to test the guide on data of the model.
        data: how many data to look at where there is no reference.
        shape: of a picture, where the data are pictures.
        seed: of all draws.

    Returns:
        Blocks for `report.json`, findings in words, and captions by file name.
    """
    blocks: dict[str, Any] = {}
    words: list[str] = []
    drawn: dict[str, str] = {}

    def keep(name: str, picture: Any, caption: str) -> None:
        (getattr(picture, "figure", None) or picture).savefig(folder / name, dpi=120, bbox_inches="tight")
        drawn[name] = caption

    folder.mkdir(parents=True, exist_ok=True)
    asked = OTHERWISE if data is None else whole("data", data)
    looked = _first(program, rows, asked if truth is None else len(truth.loc))
    known, sure = None, False
    if truth is not None:
        settled = _settled(truth)
        relied = _relied(truth, settled)
        blocks["reference"] = _reference(truth, settled, relied, evidence)
        words.append(_reference_words(blocks["reference"], split=gap))
        if truth.loc.shape[1] == 2:
            try:
                picture = _posteriors(program, looked, truth, evidence, shape, seed)
            except ValueError as error:
                words.append(f"The exact posterior is not drawn. {error}")
            else:
                keep("reference.png", picture, "The guide over the exact posterior's density, of the first data.")
        if bool(relied.any()):
            known, sure = _choose(truth, relied), bool(settled.any())
            looked = {key: value[relied.to(value.device)] for key, value in looked.items()}
        elif truth.method == "nuts":
            looked = _first(program, rows, OTHERWISE)
    curve = bound_curve(program, looked, evidence.samples, seed=seed)
    blocks["bound"] = _bound(curve)
    words.append(_bound_words(blocks["bound"]))
    keep(
        "bound.png",
        diagnostics.bound_over_samples(curve, truth=None if known is None else known.log_evidence),
        f"The importance-weighted bound over the number of samples, mean over {counted(curve.bound.shape[1])}"
        + (f"; the line is log p(x) by {known.method}{'' if sure else ', a lower bound on average'}." if known else ".")
        + (" At the last there is one group of draws, and so no error bar." if curve.error[-1].isnan().any() else ""),
    )
    blocks["pareto_k"] = [round(k, 4) for k in evidence.pareto_k.tolist()]
    if bool((~evidence.pareto_k.isnan()).any()):
        keep(
            "pareto_k.png",
            diagnostics.tail_shapes(evidence.pareto_k),
            "The tail shape k of each datum's weights, in rising order; above 0.5 they have no finite variance.",
        )
    if gap:
        given: Any = known
        if known is None:
            given = _exact(program, looked)
            sure = given is not None
        split = inference_gap(program, looked, log_evidence=given, seed=seed)
        blocks["gap"] = _gap(split, sure=sure)
        words.append(_gap_words(blocks["gap"]))
        keep(
            "gap.png",
            diagnostics.gap_parts(split.approximation, split.amortization),
            "The gap of each datum and its two parts, in rising order of the whole.",
        )
    if calibration:
        found = calibrate(program, rows, simulations=SIMULATED, seed=seed)
        blocks["calibration"] = _calibration(found)
        words.append(_calibration_words(found))
        keep(
            "calibration.png",
            diagnostics.rank_histograms(found),
            "Ranks of the true latents among the guide's draws, on data of the model: flat where the guide is right; "
            "and the coverage of its regions.",
        )
    return blocks, words, drawn


def _first(program: Any, rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Give the first data with all that the program takes, their numbers too where it asks for them."""
    return prepare(program, {key: value[:count] for key, value in rows.items()})


def _settled(truth: Reference) -> Tensor:
    """Say of which data the reference knows log p(x), (n,); annealing has to say so itself."""
    known = truth.log_evidence.isfinite() & truth.error.isfinite()
    sure = torch.zeros_like(known) if truth.method == "ais" else known
    return known & truth.diagnostics.get("settled", sure).to(known.device)


def _relied(truth: Reference, settled: Tensor) -> Tensor:
    """Say whose figures are used, (n,): of the settled data; where there are none, annealing's lower bounds."""
    if truth.method == "ais" and not bool(settled.any()):
        return truth.log_evidence.isfinite() & truth.error.isfinite()
    return settled


def _choose(truth: Reference, which: Tensor) -> Reference:
    parts = {name: getattr(truth, name)[which] for name in ("log_evidence", "error", "loc", "covariance")}
    return dataclasses.replace(truth, **parts)


def _exact(program: Any, rows: dict[str, Tensor]) -> Tensor | None:
    try:
        return exact_log_evidence(program, rows)
    except ValueError:
        return None


def _posteriors(
    program: Any,
    rows: dict[str, Tensor],
    truth: Reference,
    evidence: Evidence,
    shape: tuple[int, ...] | None,
    seed: int,
) -> Figure:
    """Draw the guide over the exact posterior of the first data, whatever the shape of either."""
    twin = doubled(program)
    few = prepare(twin, {key: value[:PANELS] for key, value in rows.items()})
    joint = Joint(twin, few)
    exact = posterior_plane(joint, truth.loc[:PANELS], truth.covariance[:PANELS])
    guide, name = _guide(joint, seed)
    kl = exact.log_mass - evidence.elbo[: len(exact.log_mass)]
    error = evidence.elbo_mc_se[: len(exact.log_mass)]
    return plots.regions(exact, guide, name=name, kl=kl, error=error, x=few.get("x"), shape=shape)


def _guide(joint: Joint, seed: int) -> tuple[Plane | tuple[Tensor, Tensor], str]:
    """Give a Gaussian guide by its moments, others by their density, or by moments where they have none; and a name."""
    name = "guide q(z|x)"
    try:
        q = gaussians(joint.program, joint.batch, "guide")
    except ValueError:
        with scope(joint.program), seeded(seed, "guide", device=joint.device):
            z = joint.latents(joint.draw("guide", 1000))
        apart = z - z.mean(0)
        moments = z.mean(0), torch.einsum("kny,knz->nyz", apart, apart) / (len(z) - 1)
        try:
            return guide_plane(joint, *moments), name
        except ValueError:
            return moments, f"{name}, a Gaussian of its moments"
    return (q.loc, q.covariance), name


def _reference(truth: Reference, settled: Tensor, relied: Tensor, evidence: Evidence) -> dict[str, Any]:
    """Sum up a reference beside the evidence of the same data; means are over those whose figures are relied on."""
    n = len(truth.loc)
    block: dict[str, Any] = {"method": truth.method, "n": n, "converged": truth.converged}
    block["diagnostics"] = {
        name: _spread(value) if isinstance(value, Tensor) else value
        for name, value in truth.diagnostics.items()
        if isinstance(value, Tensor | int | float | str | bool) and name != "settled"
    }
    if truth.draws is not None:
        block["draws"] = len(truth.draws)
    if truth.method == "nuts":
        each = {name: truth.diagnostics[name].tolist() for name in ("r_hat", "ess")}
        return {**block, "n_settled": int(truth.diagnostics["settled"].sum()), "each": each}
    block["n_settled"] = int(settled.sum())
    block |= dict.fromkeys(("kind", "log_evidence", "error", "importance_weighted", "gap", "gap_error"))
    if bool(relied.any()):
        known, error = truth.log_evidence[relied], truth.error[relied]
        block["kind"] = "estimate" if bool(settled.any()) else "lower bound"
        sampled = float(error.square().sum().sqrt()) / len(error)
        block["log_evidence"] = float(known.mean())
        block["error"] = sampled if truth.method == "ais" else float(error.mean())
        block["importance_weighted"] = float(evidence.log_evidence[:n][relied].mean())
        block["gap"] = float((known - evidence.elbo[:n][relied]).mean())
        bound = float(evidence.elbo_mc_se[:n][relied].square().sum().sqrt()) / len(error)
        block["gap_error"] = math.hypot(bound, block["error"])
    block["each"] = {"log_evidence": truth.log_evidence.tolist(), "error": truth.error.tolist()}
    return block


def _spread(values: Tensor) -> dict[str, float]:
    values = values.double()
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _reference_words(block: Mapping[str, Any], *, split: bool = False) -> str:
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


def _bound(curve: BoundCurve) -> dict[str, Any]:
    n = curve.bound.shape[1]
    error = curve.error.square().sum(1).sqrt() / n
    return {
        "n": n,
        "samples": curve.counts.tolist(),
        "mean": curve.bound.mean(1).tolist(),
        "mc_se": error.tolist(),
    }


def _bound_words(block: Mapping[str, Any]) -> str:
    counts = block["samples"]
    shown = sorted({0, len(counts) // 2, len(counts) - 1})
    figures = ", ".join(f"{block['mean'][at]:.3f} at K = {counts[at]:,}" for at in shown)
    return f"**The bound over the number of samples** K, mean over {counted(block['n'])}: {figures}."


def _gap(split: Gap, *, sure: bool) -> dict[str, Any]:
    """Sum up the gap; its parts are estimates where log p(x) is known, else the total is a lower bound."""
    n = len(split.total)
    names = {"total": "error", "approximation": "approximation_error", "amortization": "amortization_error"}
    block: dict[str, Any] = {"n": n, "kind": "estimate" if sure else "lower bound"}
    for name, error in names.items():
        block[name] = float(getattr(split, name).mean())
        block[error] = float(getattr(split, error).square().sum().sqrt()) / n
    block["each"] = {name: getattr(split, name).tolist() for name in ("approximation", "amortization")}
    return block


def _gap_words(block: Mapping[str, Any]) -> str:
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


def _calibration_words(found: Calibration) -> str:
    told = f"**Calibration**: {found.verdict} (p = {found.p_value:.2g} over {len(found.ranks)} simulations)."
    if found.verdict == "miscalibrated":
        told += (
            f" It shows most in {found.weakest}. A guide can be nearly exact on data and yet fail here, because "
            "simulated data can lie off the data that it was trained on."
        )
    return told


def _calibration(found: Calibration) -> dict[str, Any]:
    edges, counts = diagnostics.rank_counts(found)
    return {
        "simulations": len(found.ranks),
        "draws": found.draws,
        "p_value": found.p_value,
        "p_values": found.p_values.tolist(),
        "coverage_p_value": found.coverage_p_value,
        "joint_p_value": found.joint_p_value,
        "verdict": found.verdict,
        "weakest": found.weakest,
        "ranks": {"edges": edges.tolist(), "counts": counts.tolist()},
        "coverage": {"nominal": found.levels.tolist(), "found": found.coverage.tolist()},
    }
