"""Measures: the numbers of a report, ready for JSON."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.loading import Data
from ppl_vae.evaluation.bounds import BoundCurve
from ppl_vae.evaluation.calibration import Calibration, calibrate
from ppl_vae.evaluation.comparison import compare_posteriors
from ppl_vae.evaluation.evidence import Evidence, log_evidence
from ppl_vae.evaluation.gap import Gap
from ppl_vae.evaluation.latents import active_units, rates
from ppl_vae.infer.reference import Reference, reference_posterior, strongest
from ppl_vae.networks.table import Table
from ppl_vae.programs.closed_form import exact_log_evidence
from ppl_vae.programs.linear_models import PPCA
from ppl_vae.programs.param_store import device_and_dtype, scope
from ppl_vae.programs.traces import check_batch, structure, trace_pair
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.diagnostic_plots import rank_counts

SHOWN = 1000  # data that pictures and checks on the training part look at


def evaluation_split(program: Any, data: Data) -> tuple[str, dict[str, Tensor]]:
    """Choose the data that figures are about: the test part, or the training part where the guide knows no other.

    A guide that asks for `index`, a `Table` or a program's own, has a row for each datum of the training part.

    Returns:
        `test` or `train`, and that part.
    """
    if isinstance(program, VAE):
        tabled = isinstance(program.posterior.network, Table)
    else:
        tabled = any("index" in inspect.signature(part).parameters for part in (program.model, program.guide))
    return ("train", data.train) if tabled else ("test", data.test)


def evaluate(
    program: Any, data: Data, *, samples: int, seed: int = 0, latent: int | None = None
) -> tuple[dict[str, Any], Evidence]:
    """Measure a trained program on the data that `judged` chooses.

    Args:
        program: any program.
        data: its data.
        samples: importance samples a datum.
        seed: of all draws.
        latent: how many latent variables PPCA beside it has; none for no PPCA.

    Returns:
        The blocks `test`, `exact` and `baseline` of a report, and the evidence of each datum.
    """
    _, rows = evaluation_split(program, data)
    evidence = log_evidence(program, rows, samples, seed=seed)
    test = evidence.summary()
    sure = evidence.kind == "estimate"
    test["log_evidence"]["jackknife"] = float(evidence.jackknife.mean()) if sure else None
    volume = float(data.protocol.get("log_volume") or 0.0)
    test["bits_per_dim"] = bits_per_dim(test["log_evidence"]["mean"] - volume, data.features)
    few = {key: value[:SHOWN] for key, value in rows.items()}
    active = active_units(program, few, seed=seed)
    test["active_units"], test["latents"] = int(active.sum()), len(active)
    test["collapsed"] = (~active).nonzero().flatten().tolist()
    try:
        test["rates"] = rates(program, few, seed=seed).mean(0).tolist()
    except ValueError:  # of a site whose marginals have no density
        test["rates"] = None
    exact = _exact(program, rows, test["elbo"])
    baseline = None if latent is None else _baseline(program, data, rows, latent)
    return finite({"test": test, "exact": exact, "baseline": baseline}), evidence


def finite(value: Any) -> Any:
    """Put None, which JSON has, in the place of NaN and infinities, which it has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bits_per_dim(nats: float, features: int) -> float:
    """Turn a log probability of a datum, in nats, into bits a feature; lower is better."""
    return -nats / (features * math.log(2))


def _exact(program: Any, rows: Mapping[str, Tensor], elbo: Mapping[str, float]) -> dict[str, Any] | None:
    """Compare with the closed form, where there is one; a guide that cannot be compared, by the sampled ELBO."""
    try:
        value = float(exact_log_evidence(program, rows).mean())
    except ValueError:
        return None
    try:
        compared = compare_posteriors(program, rows)
    except ValueError:
        gap = kl = value - elbo["mean"]
        error, kind = elbo["mc_se"], "sampled"
    else:
        gap, kl = float(compared.gap.mean()), float(compared.kl.mean())
        error = float(compared.error.square().sum().sqrt()) / len(compared.error)
        kind = "sampled" if bool(compared.error.any()) else "closed-form"
    known = {"method": "closed-form", "log_evidence": value, "gap": gap, "posterior_kl": kl}
    return {**known, "gap_method": kind, "gap_mc_se": error}


def _baseline(program: Any, data: Data, rows: Mapping[str, Tensor], latent: int) -> dict[str, Any] | None:
    """Fit PPCA of the same latent size to the same data, where its density is of the same measure."""
    if measure(program, rows) != "density" or "mask" in data.train:
        return None
    try:
        ppca = PPCA.fit(data.train["x"].double(), latent)
    except ValueError:
        return None
    return {"ppca": {"log_evidence": float(ppca.log_evidence(rows["x"].double()).mean())}}


def measure(program: Any, x: Mapping[str, Tensor]) -> str:
    """Say what a likelihood gives to data: a `probability mass`, or a `density`, whose nats depend on their units."""
    few = {key: value[:2] for key, value in check_batch(program, x).items()}
    found = structure(program, few)
    with torch.no_grad(), scope(program), fork_rng(0, device=device_and_dtype(program, next(iter(few.values())))[0]):
        sites: Any = trace_pair(program, few, 1, found.nesting)[0].nodes
    discrete = {bool(sites[name]["fn"].support.is_discrete) for name in found.observed}
    return {frozenset({True}): "probability mass", frozenset({False}): "density"}.get(frozenset(discrete), "mixed")


def trained(program: Any, data: Data, *, seed: int = 0) -> dict[str, Any]:
    """Measure the bound on the training data after training, at most 1,000 of them, as `evaluate` does on the test.

    Returns:
        `elbo` and its standard error `elbo_se` over the `n` data, `rate` and `distortion`.
    """
    some = {key: value[:SHOWN] for key, value in data.train.items()}
    found = log_evidence(program, some, 10, seed=seed).summary()
    bound = {"elbo": found["elbo"]["mean"], "elbo_se": found["elbo"]["se"], "n": found["n"]}
    return finite({**bound, "rate": found["rate"], "distortion": found["distortion"]})  # type: ignore[no-any-return]


LOOKED = {"auto": 50, "closed-form": 100, "quadrature": 100, "ais": 50, "nuts": 5}  # data
OTHERWISE = 100  # data, without a reference
ENOUGH = {"tolerance": 1e-3, "entries": 2**21}  # of quadrature, in nats; it mostly does far better
SIMULATED = 500


def find_reference(
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
        if check_int("data", data) > there:
            raise ValueError(f"Expected --data to be at most {there:,}, which are all there are; got {data:,}.")
        if reference is None and not gap:
            raise ValueError("Expected --data together with --reference or --gap, which look at so many; got it alone.")
    annealed = {"temperatures": temperatures, "chains": chains}
    annealed = {name: value for name, value in annealed.items() if value is not None}
    for name, value in annealed.items():
        method = strongest(program, first_rows(program, rows, 1)) if reference == "auto" else reference
        if method != "ais":
            took = f"--reference {reference}" + (f", which is {method} here" if reference == "auto" else "")
            raise ValueError(
                f"Expected --{name} together with --reference ais, whose setting it is; got it "
                + ("alone." if reference is None else f"with {took}.")
            )
        check_int(name, value, 2 if name == "chains" else 1)
    if gap and not isinstance(program, VAE):
        raise ValueError(f"Expected a VAE for --gap, whose guide's family is known; got {type(program).__name__}.")
    if calibration:
        calibrate(program, first_rows(program, rows, 2), draws=1, simulations=2, seed=seed)
    if reference is None:
        return None
    some = first_rows(program, rows, LOOKED[reference] if data is None else data)
    settings = annealed or (ENOUGH if reference in ("auto", "quadrature") else {})
    return reference_posterior(program, some, reference, seed=seed, **settings)  # type: ignore[arg-type]


def first_rows(program: Any, rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Give the first data with all that the program takes, their numbers too where it asks for them."""
    return check_batch(program, {key: value[:count] for key, value in rows.items()})


def settled_data(truth: Reference) -> Tensor:
    """Say of which data the reference knows log p(x), (n,); annealing has to say so itself."""
    known = truth.log_evidence.isfinite() & truth.error.isfinite()
    sure = torch.zeros_like(known) if truth.method == "ais" else known
    return known & truth.diagnostics.get("settled", sure).to(known.device)


def relied_data(truth: Reference, settled: Tensor) -> Tensor:
    """Say whose figures are used, (n,): of the settled data; where there are none, annealing's lower bounds."""
    if truth.method == "ais" and not bool(settled.any()):
        return truth.log_evidence.isfinite() & truth.error.isfinite()
    return settled


def choose_rows(truth: Reference, which: Tensor) -> Reference:
    parts = {name: getattr(truth, name)[which] for name in ("log_evidence", "error", "loc", "covariance")}
    return dataclasses.replace(truth, **parts)


def reference_block(truth: Reference, settled: Tensor, relied: Tensor, evidence: Evidence) -> dict[str, Any]:
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


def bound_block(curve: BoundCurve) -> dict[str, Any]:
    n = curve.bound.shape[1]
    error = curve.error.square().sum(1).sqrt() / n
    return {
        "n": n,
        "samples": curve.counts.tolist(),
        "mean": curve.bound.mean(1).tolist(),
        "mc_se": error.tolist(),
    }


def gap_block(split: Gap, *, sure: bool) -> dict[str, Any]:
    """Sum up the gap; its parts are estimates where log p(x) is known, else the total is a lower bound."""
    n = len(split.total)
    names = {"total": "error", "approximation": "approximation_error", "amortization": "amortization_error"}
    block: dict[str, Any] = {"n": n, "kind": "estimate" if sure else "lower bound"}
    for name, error in names.items():
        block[name] = float(getattr(split, name).mean())
        block[error] = float(getattr(split, error).square().sum().sqrt()) / n
    block["each"] = {name: getattr(split, name).tolist() for name in ("approximation", "amortization")}
    return block


def calibration_block(found: Calibration) -> dict[str, Any]:
    edges, counts = rank_counts(found)
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
