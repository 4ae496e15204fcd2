"""Diagnostics of a run: how far its answer is from a reference, why, and whether its guide is calibrated."""

import contextlib
import dataclasses
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.evaluation.bounds import BoundCurve, bound_curve
from ppl_vae.evaluation.calibration import Calibration, calibrate
from ppl_vae.evaluation.evidence import Evidence
from ppl_vae.evaluation.gap import Gap, inference_gap
from ppl_vae.infer.density_grid import DensityGrid, guide_grid, posterior_grid
from ppl_vae.infer.reference import Reference, reference_posterior, strongest
from ppl_vae.programs.closed_form import exact_log_evidence, gaussians
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.target import BLOCK, Target
from ppl_vae.reports.measures import finite, mean_error

MAX_DATA = {"auto": 50, "closed-form": 100, "quadrature": 100, "ais": 50, "nuts": 5, None: 100}  # by method
_ENOUGH = {"tolerance": 1e-3, "entries": 2**21}  # of quadrature, in nats; mostly it does far better
_SIMULATIONS = 500
_PANELS = 8  # data whose posteriors are drawn


@dataclass(frozen=True)
class Diagnostics:
    """Which diagnostics a report includes; by default none.

    Args:
        reference: method of `reference_posterior` to compare the evidence with.
        gap: whether to split log p(x) - ELBO into its parts.
        calibration: whether to test the guide on data simulated from the model.
        max_data: how many data the reference and the gap are computed for, by default as many as the method can bear.
        temperatures: moves of each chain of annealing, 500 by default.
        chains: chains of annealing per datum, 16 by default.
    """

    reference: str | None = None
    gap: bool = False
    calibration: bool = False
    max_data: int | None = None
    temperatures: int | None = None
    chains: int | None = None

    @property
    def options(self) -> str:
        """The options of `ppl-vae evaluate` that ask for the same, each after a space."""
        given = {"data" if name == "max_data" else name: value for name, value in asdict(self).items()}
        chosen = {name: value for name, value in given.items() if value is not None and value is not False}
        return "".join(f" --{name}" + f" {value}" * (value is not True) for name, value in chosen.items())


@dataclass
class Results:
    """Results of the diagnostics of a run.

    Args:
        curve: the bound over the number of samples, of the data whose log p(x) the reference knows.
        pareto_k: tail shape of the weights of all data, (n,).
        report: their numbers, blocks of `report.json`.
        known: the reference of the data of `curve`, if it knows their log p(x).
        gap: the gap of these data and its parts.
        calibration: ranks and coverage on simulated data.
        densities: of guide and exact posterior of the first data, the arguments of `regions`, for two latents.
        notes: why something is missing.
    """

    curve: BoundCurve
    pareto_k: Tensor
    report: dict[str, Any]
    known: Reference | None = None
    gap: Gap | None = None
    calibration: Calibration | None = None
    densities: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def find_reference(target: Target, diagnostics: Diagnostics, *, seed: int = 0) -> Reference | None:
    """Compute the reference of the first data, if asked for; refuse what is impossible before anything slow.

    Args:
        target: the program and the data that are evaluated.
        diagnostics: what was asked for.
        seed: of all draws.

    Raises:
        ValueError: If the program does not allow a diagnostic, or a setting is out of range or has no use.
    """
    method, max_data = diagnostics.reference, diagnostics.max_data
    if max_data is not None:
        if check_int("data", max_data) > target.n:
            raise ValueError(f"Expected --data to be at most {target.n:,}, which are all there are; got {max_data:,}.")
        if method is None and not diagnostics.gap:
            raise ValueError("Expected --data together with --reference or --gap; got it alone.")
    annealing = {"temperatures": diagnostics.temperatures, "chains": diagnostics.chains}
    settings = {name: value for name, value in annealing.items() if value is not None}
    for name, value in settings.items():
        chosen = strongest(target) if method == "auto" else method
        if chosen != "ais":
            given = f"with --reference {method}" + (f", which is {chosen} here" if method == "auto" else "")
            raise ValueError(
                f"Expected --{name} together with --reference ais, whose setting it is; got it "
                f"{'alone' if method is None else given}."
            )
        check_int(name, value, 2 if name == "chains" else 1)
    if diagnostics.calibration:
        calibrate(target.rows(slice(2)), draws=1, simulations=2, seed=seed)
    if method is None:
        return None
    few = target.rows(slice(max_data or MAX_DATA.get(method, 1)))
    accuracy: dict[str, Any] = _ENOUGH if method in ("auto", "quadrature") else {}
    return reference_posterior(few, method=method, seed=seed, **(settings or accuracy))  # type: ignore[arg-type]


def diagnose(
    target: Target, evidence: Evidence, diagnostics: Diagnostics, reference: Reference | None = None, *, seed: int = 0
) -> Results:
    """Run the diagnostics that were asked for.

    Args:
        target: the program and the data that were evaluated.
        evidence: their evidence.
        diagnostics: what was asked for; `find_reference` has accepted it.
        reference: the reference of the first data, from `find_reference`.
        seed: of all draws.
    """
    report: dict[str, Any] = {}
    more: dict[str, Any] = {"notes": []}
    used = torch.ones(min(diagnostics.max_data or MAX_DATA[None], target.n), dtype=torch.bool)
    kind = None
    if reference is not None:
        settled, found = _settled_and_used(reference)
        report["reference"] = _reference_block(reference, settled, found, evidence)
        kind = report["reference"].get("kind")
        if reference.loc.shape[1] == 2:
            try:
                more["densities"] = _densities(target, reference, evidence, seed)
            except ValueError as error:
                more["notes"].append(f"The exact posterior is not drawn. {error}")
        if bool(found.any()):
            names = ("log_evidence", "error", "loc", "covariance")
            more["known"] = dataclasses.replace(reference, **{name: getattr(reference, name)[found] for name in names})
            used = found
        elif reference.method != "nuts":
            used = torch.ones_like(found)
    rows = target.rows(slice(len(used))).rows(used.to(target.device))
    curve = _curve(target, used, evidence.samples, seed)
    report["bound"] = {"n": rows.n, "samples": curve.counts, "mean": curve.bound.mean(1)}
    report["bound"]["mc_se"] = [mean_error(error) for error in curve.error]
    report["pareto_k"] = [round(k, 4) for k in evidence.pareto_k.tolist()]
    if diagnostics.gap:
        known = more.get("known")
        if target.structure.whole:
            known, kind = evidence if known is None else known, kind or evidence.kind
        if known is None:
            with contextlib.suppress(ValueError):
                known, kind = exact_log_evidence(rows), "estimate"
        more["gap"] = inference_gap(rows, log_evidence=known, seed=seed)
        report["gap"] = _gap_block(more["gap"], kind or "lower bound")
        for name in ("gap", "gap_error"):  # stated once, by draws of its own
            report.get("reference", {}).pop(name, None)
    if diagnostics.calibration:
        more["calibration"] = calibrate(target, simulations=_SIMULATIONS, seed=seed)
        report["calibration"] = _calibration_block(more["calibration"])
    return Results(curve, evidence.pareto_k, finite(report), **more)


def _curve(target: Target, used: Tensor, samples: int, seed: int) -> BoundCurve:
    """The bound of the data used, of the first ones, by the draws of the evidence: these are drawn block by block."""
    whole = target.rows(slice(-(-len(used) // BLOCK) * BLOCK))
    curve, columns = bound_curve(whole, samples=samples, seed=seed), used.nonzero().flatten()
    return BoundCurve(curve.counts, curve.bound[:, columns], curve.error[:, columns])


def rank_counts(calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Count the ranks of each latent in up to 20 bins.

    Returns:
        The edges of the bins, (bins + 1,), and the counts, (z, bins).
    """
    edges = np.linspace(0, calibration.draws + 1, min(20, calibration.draws + 1) + 1)
    return edges, np.stack([np.histogram(ranks, edges)[0] for ranks in calibration.ranks.cpu().numpy().T])


def _settled_and_used(reference: Reference) -> tuple[Tensor, Tensor]:
    """Of which data the reference knows log p(x), (n,), and of which it is used, annealing's lower bounds if of none.

    Annealing must say itself of which data it knows log p(x).
    """
    finite = reference.log_evidence.isfinite() & reference.error.isfinite()
    default = torch.zeros_like(finite) if reference.method == "ais" else finite
    settled = finite & reference.diagnostics.get("settled", default).to(finite.device)
    return settled, finite if reference.method == "ais" and not bool(settled.any()) else settled


def _densities(target: Target, reference: Reference, evidence: Evidence, seed: int) -> dict[str, Any]:
    """Compute the densities of the first data, whatever their shape."""
    joint = Joint(target.rows(slice(min(_PANELS, len(reference.loc)))).to_double())
    exact = posterior_grid(joint, reference.loc[:_PANELS], reference.covariance[:_PANELS])
    guide, name = _guide_density(joint, seed)
    kl, error = exact.log_mass - evidence.elbo[: joint.n], evidence.elbo_mc_se[: joint.n]
    x = joint.target.batch.get("x")
    return {"exact": exact, "approximate": guide, "name": name, "kl": kl, "error": error, "x": x}


def _guide_density(joint: Joint, seed: int) -> tuple[DensityGrid | tuple[Tensor, Tensor], str]:
    """The moments of a Gaussian guide, the density of another, or its moments if it has none; and its name."""
    name = "guide q(z|x)"
    try:
        q = gaussians(joint.target, role="guide")
    except ValueError:
        with joint.target.running(seed, "guide"):
            z = joint.latents(joint.draw("guide", 1000))
        apart = z - z.mean(0)
        moments = z.mean(0), torch.einsum("kny,knz->nyz", apart, apart) / (len(z) - 1)
        try:
            return guide_grid(joint, *moments), name
        except ValueError:
            return moments, f"{name}, a Gaussian of its moments"
    return (q.loc, q.covariance), name


def _reference_block(reference: Reference, settled: Tensor, used: Tensor, evidence: Evidence) -> dict[str, Any]:
    """Sum up a reference beside the evidence of the same data; means are over the data used."""
    method, n = reference.method, len(reference.loc)
    block: dict[str, Any] = {"method": method, "n": n, "converged": reference.converged}
    block["diagnostics"] = {
        name: {pick: float(getattr(value.double(), pick)()) for pick in ("min", "median", "max")}
        if isinstance(value, Tensor)
        else value
        for name, value in reference.diagnostics.items()
        if isinstance(value, Tensor | int | float | str | bool) and name != "settled"
    }
    if reference.draws is not None:
        block["draws"] = len(reference.draws)
    if method == "nuts":
        block["diagnostics"]["divergences"] = int(torch.as_tensor(reference.diagnostics["divergences"]).sum())
        block["n_settled"] = int(reference.diagnostics["settled"].sum())
        return {**block, "each": {name: reference.diagnostics[name] for name in ("r_hat", "ess")}}
    block["n_settled"] = int(settled.sum())
    block |= dict.fromkeys(("kind", "log_evidence", "error", "importance_weighted", "gap", "gap_error"))
    if bool(used.any()):
        value, error = reference.log_evidence[used], reference.error[used]
        block["kind"] = "estimate" if bool(settled.any()) else "lower bound"
        block["log_evidence"] = float(value.mean())
        block["error"] = mean_error(error) if method == "ais" else float(error.mean())
        block["importance_weighted"] = float(evidence.log_evidence[:n][used].mean())
        block["gap"] = float((value - evidence.elbo[:n][used]).mean())
        block["gap_error"] = math.hypot(mean_error(evidence.elbo_mc_se[:n][used]), block["error"])
    block["each"] = {"log_evidence": reference.log_evidence, "error": reference.error}
    return block


def _gap_block(gap: Gap, kind: str) -> dict[str, Any]:
    """Sum up the gap; if its kind is a lower bound, so are the total and the part of the family."""
    block: dict[str, Any] = {"n": len(gap.total), "kind": kind, "family": gap.family, "amortized": gap.amortized}
    for name, error in (("total", "error"), *((part, f"{part}_error") for part in ("approximation", "amortization"))):
        block |= {name: float(getattr(gap, name).mean()), error: mean_error(getattr(gap, error))}
    block["each"] = {"approximation": gap.approximation, "amortization": gap.amortization}
    return block


def _calibration_block(calibration: Calibration) -> dict[str, Any]:
    edges, counts = rank_counts(calibration)
    names = ("draws", "p_value", "p_values", "coverage_p_value", "joint_p_value", "verdict", "weakest")
    return {
        "simulations": len(calibration.ranks),
        **{name: getattr(calibration, name) for name in names},
        "ranks": {"edges": edges.tolist(), "counts": counts.tolist()},
        "coverage": {"nominal": calibration.levels, "found": calibration.coverage},
    }
