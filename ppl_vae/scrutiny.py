"""A closer look at a run: reference posteriors, the gap and its parts, calibration, with words and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import diagnostics, plots
from ppl_vae.calibration import calibrate
from ppl_vae.evidence import Evidence, bound_curve
from ppl_vae.gap import inference_gap
from ppl_vae.latents import codes
from ppl_vae.program import VAE
from ppl_vae.reference import Reference, reference_posterior

__all__ = ["METHODS", "scrutinise"]

METHODS = ("auto", "closed-form", "quadrature", "ais", "nuts")
LOOKED = {"auto": 20, "closed-form": 100, "quadrature": 20, "ais": 50, "nuts": 5}  # data
ENOUGH = {"tolerance": 1e-3, "entries": 2**21}  # of quadrature, in nats; it mostly does far better
SIMULATED = 500


def scrutinise(
    program: Any,
    rows: Mapping[str, Tensor],
    evidence: Evidence,
    folder: Path,
    *,
    reference: str | None = None,
    gap: bool = False,
    calibration: bool = False,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Look closer at a trained program, as far as asked.

    Args:
        program: any program that the methods asked for allow.
        rows: the data that were evaluated, as a batch dict.
        evidence: their evidence.
        folder: takes the pictures.
        reference: a method of `reference_posterior`.
        gap: whether to split log p(x) - ELBO.
        calibration: whether to test the guide on data of the model.
        shape: of a picture, where the data are pictures.
        seed: of all draws.

    Returns:
        Blocks for `report.json`, findings in words, and captions by file name.

    Raises:
        ValueError: for a method that the program does not allow, by name.
    """
    blocks: dict[str, Any] = {}
    words: list[str] = []
    drawn: dict[str, str] = {}

    def keep(name: str, picture: Any, caption: str) -> None:
        (getattr(picture, "figure", None) or picture).savefig(folder / name, dpi=120, bbox_inches="tight")
        drawn[name] = caption

    folder.mkdir(parents=True, exist_ok=True)
    some = {key: value[:100] for key, value in rows.items()}
    curve = bound_curve(program, some, evidence.samples, seed=seed)
    truth: Reference | None = None
    few = some
    if reference is not None:
        few = {key: value[: LOOKED[reference]] for key, value in rows.items()}
        settings = ENOUGH if reference in ("auto", "quadrature") else {}
        truth = reference_posterior(program, few, reference, seed=seed, **settings)  # type: ignore[arg-type]
        blocks["reference"] = _reference(truth, evidence)
        words += _words(blocks["reference"])
        if truth.loc.shape[1] == 2 and shape is not None and truth.method != "nuts":
            mean, variance = codes(program, few, 1000, seed=seed)
            pair = (mean[:8], torch.diag_embed(variance[:8])), (truth.loc[:8], truth.covariance[:8])
            caption = (
                f"The guide's ellipses (its moments) over those of the posterior by {truth.method}, of a few data."
            )
            keep("reference.png", plots.ellipses(*pair, x=few["x"][:8], shape=shape), caption)
    known = None if truth is None or truth.method == "nuts" else truth.log_evidence
    whole = known if known is not None and len(known) == len(next(iter(some.values()))) else None
    keep(
        "bound.png",
        diagnostics.bound_over_samples(curve, truth=whole),
        "The importance-weighted bound over the number of samples, mean over data"
        + (f"; the line is log p(x) by {truth.method}." if whole is not None and truth is not None else "."),
    )
    if bool((~evidence.pareto_k.isnan()).any()):
        keep(
            "pareto_k.png",
            diagnostics.tail_shapes(evidence.pareto_k),
            "The tail shape k of each datum's weights, in rising order; above 0.5 they have no finite variance.",
        )
    if gap:
        if not isinstance(program, VAE):
            raise ValueError(f"Expected a VAE for --gap, whose guide's family is known; got {type(program).__name__}.")
        given = truth if truth is not None and truth.method != "nuts" else None
        split = inference_gap(program, some if given is None else few, log_evidence=given, seed=seed)
        parts = {name: float(getattr(split, name).mean()) for name in ("total", "approximation", "amortization")}
        blocks["gap"] = {"n": len(split.total), **parts, "error": float(split.error.square().mean().sqrt())}
        words.append(
            f"**The gap**, log p(x) - ELBO, is {parts['total']:.3f} nats on average over {len(split.total)} data: "
            f"{parts['approximation']:.3f} because of the guide's family, {parts['amortization']:.3f} because one "
            f"network answers for all data. {_advice(parts)}"
        )
        keep(
            "gap.png",
            diagnostics.gap_parts(split.approximation, split.amortization),
            "The gap of each datum and its two parts, in rising order of the whole.",
        )
    if calibration:
        found = calibrate(program, rows, simulations=SIMULATED, seed=seed)
        blocks["calibration"] = {
            "simulations": len(found.ranks),
            "draws": found.draws,
            "p_value": found.p_value,
            "verdict": found.verdict,
        }
        words.append(f"**Calibration**: {found.verdict} (p = {found.p_value:.2g} over {len(found.ranks)} simulations).")
        keep(
            "calibration.png",
            diagnostics.rank_histograms(found),
            "Ranks of the true latents among the guide's draws, on data of the model: flat where the guide is right; "
            "and the coverage of its regions.",
        )
    return blocks, words, drawn


def _reference(truth: Reference, evidence: Evidence) -> dict[str, Any]:
    """Sum up a reference beside the evidence of the same data."""
    n = len(truth.loc)
    block: dict[str, Any] = {"method": truth.method, "n": n, "converged": truth.converged}
    block["diagnostics"] = {
        name: float(value.double().mean()) if isinstance(value, Tensor) else value
        for name, value in truth.diagnostics.items()
        if isinstance(value, Tensor | int | float | str | bool)
    }
    if truth.method != "nuts":
        block["log_evidence"] = float(truth.log_evidence.mean())
        block["error"] = float(truth.error.square().sum().sqrt()) / n
        block["importance_weighted"] = float(evidence.log_evidence[:n].mean())
        block["gap"] = float((truth.log_evidence - evidence.elbo[:n]).mean())
    return block


def _words(block: Mapping[str, Any]) -> list[str]:
    doubt = "" if block["converged"] else " **Its own checks failed**: do not rely on it; give it more work."
    if block["method"] == "nuts":
        return [f"**Reference posterior** by NUTS for {block['n']} data.{doubt or ' It passed its checks.'}"]
    return [
        f"**Reference** by {block['method']}: log p(x) = {block['log_evidence']:.3f} ± {block['error']:.4f} nats on "
        f"average over {block['n']} data, where importance sampling gives {block['importance_weighted']:.3f}; the ELBO "
        f"lies {block['gap']:.3f} below.{doubt}"
    ]


def _advice(parts: Mapping[str, float]) -> str:
    if parts["total"] < 0.1:
        return "There is little to gain."
    if parts["approximation"] > parts["amortization"]:
        return "A richer family (FullNormal, MixtureNormal) would gain more than a larger network."
    return "A larger encoder or longer training would gain more than a richer family."
