"""The demonstration: on real digits, how an amortized approximate posterior compares with the exact one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppl_vae.data.loading import Data
from ppl_vae.evaluation.comparison import compare_posteriors
from ppl_vae.evaluation.evidence import log_evidence
from ppl_vae.programs.closed_form import exact_log_evidence, gaussians
from ppl_vae.programs.linear_models import PPCA
from ppl_vae.programs.target import Target
from ppl_vae.reports.posterior_plots import ellipses
from ppl_vae.runs.console import table
from ppl_vae.runs.loaded import Run, load_run
from ppl_vae.runs.run import fit_spec
from ppl_vae.runs.spec import Spec
from ppl_vae.runs.workers import side_by_side

DIGITS = {"data": {"name": "digits"}, "prior": {"family": "StandardNormal"}}
MLP = {"family": "MLP", "hidden": [200, 200]}
LINEAR = {
    "likelihood": {"family": "Normal", "scale": "shared", "network": {"family": "Linear"}},
    "posterior": {"family": "Normal", "scale": "feature", "network": {"family": "Linear"}},
}
NONLINEAR = {
    "likelihood": {"family": "Normal", "scale": "shared", "network": MLP},
    "posterior": {"family": "Normal", "network": MLP},
}
ROWS = [  # directory, name, parts, latent variables, objective, epochs, learning rate
    ("linear_Trace_ELBO", "linear VAE, Trace_ELBO", LINEAR, 10, "Trace_ELBO", 300, 0.1),
    ("linear_TraceMeanField_ELBO", "linear VAE, TraceMeanField_ELBO", LINEAR, 10, "TraceMeanField_ELBO", 300, 0.1),
    ("nonlinear_10", "nonlinear VAE", NONLINEAR, 10, "TraceMeanField_ELBO", 100, 3e-3),
    ("nonlinear_2", "nonlinear VAE", NONLINEAR, 2, "TraceMeanField_ELBO", 100, 3e-3),
    ("linear_2", "linear VAE, TraceMeanField_ELBO", LINEAR, 2, "TraceMeanField_ELBO", 100, 0.1),
]


def run_demo(
    out: Path, *, epochs: float = 1.0, workers: int = 1, say: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Train the rows of the table, a run directory each, and compare them under one measure.

    Args:
        out: the directory that takes the runs and `posteriors.png`.
        epochs: scales the length of training.
        workers: rows that are trained at a time, each in a process of its own.
        say: takes messages for the user.

    Returns:
        `table` (text), `rows` (figures in nats per held-out image) and `pictures` (paths).
    """
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # a hundred rows gain nothing from a second thread, and lose much if others want it
    try:
        say(f"{len(ROWS)} rows to train, {workers} at a time")
        names = {out / folder: f"{name}, z = {latent}" for folder, name, _, latent, *_ in ROWS}
        given = {folder: (folder, number, epochs) for number, folder in enumerate(names)}
        for done, wrong in side_by_side(_train, given, workers):
            if wrong is not None:
                raise ValueError(f"{names[done]}: {wrong}")
            say(names[done])
        data, rows = _spec(0, epochs).load_data(), list[dict[str, Any]]()
        for folder, name, _, latent, *_ in ROWS:
            if all(row["latent"] != latent for row in rows):
                rows.append(_ppca(data, latent))
            run = load_run(out / folder)
            rows.append(_row(name, latent, run.program, data, run.report["test"], run.report["train"]["seconds"], run))
        picture = out / "posteriors.png"
        _draw(run.program, data).savefig(picture, dpi=120, bbox_inches="tight")
    finally:
        torch.set_num_threads(threads)
    return {"table": _text(rows, data, time.perf_counter() - began), "rows": rows, "pictures": [str(picture)]}


def _spec(number: int, epochs: float) -> Spec:
    folder, _, parts, latent, elbo, length, rate = ROWS[number]
    svi = {"elbo": elbo, "epochs": max(round(length * epochs), 1), "learning_rate": rate, "schedule": "one-cycle"}
    return Spec.from_dict({**DIGITS, **parts, "model": {"latent": latent}, "svi": svi}, f"{folder}.toml")


def _train(folder: Path, number: int, epochs: float) -> None:
    torch.set_num_threads(1)
    fit_spec(_spec(number, epochs), out=folder, force=True)


def _ppca(data: Data, latent: int) -> dict[str, Any]:
    """The row of PPCA at its maximum likelihood."""
    began = time.perf_counter()
    ppca = PPCA.fit(data.train["x"].double(), latent)
    seconds = time.perf_counter() - began
    program = ppca.to_vae()
    return _row("PPCA, closed form", latent, program, data, log_evidence(program, data.test, 100).summary(), seconds)


def _row(
    name: str, latent: int, program: Any, data: Data, test: dict[str, Any], seconds: float, run: Run | None = None
) -> dict[str, Any]:
    known, held_out = run is None or run.report["exact"] is not None, Target(program, data.test)
    return {
        "name": name,
        "latent": latent,
        "run": None if run is None else str(run.path),
        "elbo": test["elbo"],
        "log_evidence": test["log_evidence"],
        "exact": float(exact_log_evidence(held_out).mean()) if known else None,
        "exact_train": float(exact_log_evidence(program, data.train).mean()) if known else None,
        "kl": float(compare_posteriors(held_out).kl.median()) if known else None,
        "seconds": seconds,
    }


def _draw(program: Any, data: Data) -> Any:
    """Draw the guide's ellipses over the exact posterior's, for one digit of each kind."""
    labels = data.test["y"]
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()[:8]]
    target = Target(program, {key: value[first] for key, value in data.test.items()})
    q, p = (gaussians(target, role=role) for role in ("guide", "model"))
    return ellipses(
        (q.loc, q.covariance), (p.loc, p.covariance), labels=labels[first], x=data.test["x"][first], shape=data.shape
    )


def _text(rows: list[dict[str, Any]], data: Data, seconds: float) -> str:
    """Write the table with its notes."""
    cells = [("model", "z", "ELBO", "log evidence", "± data", "± mc", "exact", "gap", "KL(q||p)", "seconds")]
    for row in rows:
        value, elbo, exact, kl = row["log_evidence"], row["elbo"]["mean"], row["exact"], row["kl"]
        bound, known = value["kind"] == "lower bound", exact is not None
        cells.append(
            (
                row["name"],
                str(row["latent"]),
                f"{elbo:.3f}",
                f"{'>= ' if bound else ''}{value['mean']:.3f}",
                f"{value['se']:.2f}",
                "bound" if bound else f"{value['mc_se']:.4f}",
                f"{exact:.3f}" if known else "unknown",
                f"{exact - elbo:.3f}" if known else f">= {value['mean'] - elbo:.3f}",
                f"{abs(kl):.4f}" if known else "unknown",
                f"{row['seconds']:.1f}",
            )
        )
    best = {row["latent"]: row["exact_train"] for row in rows if row["run"] is None}
    below = [
        f"z = {row['latent']}, {row['name']}: {row['exact_train'] - best[row['latent']]:+.4f}"
        for row in rows
        if row["run"] is not None and row["exact_train"] is not None
    ]
    return "\n".join(
        [
            f"{len(data.train['x']):,} digits to learn from, {len(data.test['x'])} held out; nats per held-out image.",
            "",
            *table(cells),
            "",
            "Exact evidence on the training images, less PPCA's maximum: " + "; ".join(below),
            "gap = log evidence (exact where known) - ELBO; KL(q||p) to the exact posterior is the median over images.",
            f"{seconds:.0f} seconds in all. Each trained row left a run with report and pictures.",
        ]
    )
