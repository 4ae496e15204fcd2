"""The demonstration: on real digits, how an amortized approximate posterior compares with the exact one."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch

from ppl_vae.data.loading import Data
from ppl_vae.evaluation.comparison import compare_posteriors
from ppl_vae.evaluation.evidence import log_evidence
from ppl_vae.infer.svi import SETTINGS, fit
from ppl_vae.programs.closed_form import exact_log_evidence, gaussians
from ppl_vae.programs.linear_models import PPCA
from ppl_vae.reports.posterior_plots import ellipses
from ppl_vae.runs.run import Run, write_run
from ppl_vae.runs.spec import Spec, load_spec

DIGITS: dict[str, Any] = {"data": {"name": "digits"}, "prior": {"family": "StandardNormal"}}
LINEAR: dict[str, Any] = {
    **DIGITS,
    "likelihood": {"family": "Normal", "scale": "shared", "network": {"family": "Linear"}},
    "posterior": {"family": "Normal", "scale": "feature", "network": {"family": "Linear"}},
}
WIDE = {"family": "MLP", "hidden": [200, 200]}
NONLINEAR: dict[str, Any] = {
    **DIGITS,
    "likelihood": {"family": "Normal", "scale": "shared", "network": WIDE},
    "posterior": {"family": "Normal", "network": WIDE},
}
CYCLE = {"schedule": "one-cycle"}


def rows(epochs: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Give the directory, the name and the spec of each trained row; `epochs` scales the length of training."""

    def settings(elbo: str, length: int, rate: float) -> dict[str, Any]:
        return {"elbo": elbo, "epochs": max(round(length * epochs), 1), "learning_rate": rate, **CYCLE}

    found = {}
    for elbo in ("Trace_ELBO", "TraceMeanField_ELBO"):
        spec = {**LINEAR, "model": {"latent": 10}, "svi": settings(elbo, 300, 0.1)}
        found[f"linear_{elbo}"] = f"linear VAE, {elbo}", spec
    for latent in (10, 2):
        spec = {**NONLINEAR, "model": {"latent": latent}, "svi": settings("TraceMeanField_ELBO", 100, 3e-3)}
        found[f"nonlinear_{latent}"] = "nonlinear VAE", spec
    spec = {**LINEAR, "model": {"latent": 2}, "svi": settings("TraceMeanField_ELBO", 100, 0.1)}
    found["linear_2"] = "linear VAE, TraceMeanField_ELBO", spec
    return found


def run_demo(out: Path, *, epochs: float = 1.0, say: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Train the rows, a run directory each, and put them under one measure.

    Args:
        out: the directory that takes the runs and `posteriors.png`.
        epochs: scales the length of training.
        say: takes messages for the user.

    Returns:
        `table` (text), `rows` (figures in nats per held-out image) and `pictures` (paths).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a hundred rows gain nothing from a second thread, and lose much where others want it
    try:
        return _run_demo(out, epochs, say)
    finally:
        torch.set_num_threads(threads)


def _run_demo(out: Path, epochs: float, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.perf_counter()
    runs: dict[str, Run] = {}
    data: Data | None = None
    figures: list[dict[str, Any]] = []
    for folder, (name, tables) in rows(epochs).items():
        spec = _spec(folder, tables)
        data = spec.load_data() if data is None else data
        latent = spec.model.latent
        if not any(row["latent"] == latent and row["run"] is None for row in figures):
            figures.append(_closed(data, latent))
        say(f"{name}, z = {latent} ...")
        program: Any = spec.build(data)
        history = fit(program, data, **{key: getattr(spec.svi, key) for key in (*SETTINGS, "seed")})
        runs[folder] = write_run(out / folder, spec, program, data, vars(history))
        figures.append(_row(name, runs[folder], data))
    assert data is not None
    figures.sort(key=lambda row: -row["latent"])
    picture = out / "posteriors.png"
    _draw(runs["linear_2"].program, data).savefig(picture, dpi=120, bbox_inches="tight")
    text = table(figures, data, time.perf_counter() - began)
    return {"table": text, "rows": figures, "pictures": [str(picture)]}


def _spec(name: str, tables: dict[str, Any]) -> Spec:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.toml"
        path.write_text(tomli_w.dumps(tables))
        return load_spec(path)


def _closed(data: Data, latent: int) -> dict[str, Any]:
    """Give the row of PPCA in closed form, under the same measure as the others."""
    began = time.perf_counter()
    x, held_out = data.train["x"].double(), data.test["x"].double()
    ppca = PPCA.fit(x, latent)
    seconds = time.perf_counter() - began
    program = ppca.to_vae()
    test = log_evidence(program, held_out, 100).summary()
    return {
        "name": "PPCA, closed form",
        "latent": latent,
        "run": None,
        "elbo": test["elbo"],
        "log_evidence": test["log_evidence"],
        "exact": float(exact_log_evidence(program, held_out).mean()),
        "exact_train": float(exact_log_evidence(program, x).mean()),
        "kl": float(compare_posteriors(program, held_out).kl.median()),
        "seconds": seconds,
    }


def _row(name: str, run: Run, data: Data) -> dict[str, Any]:
    """Give the row of a trained run."""
    test, known = run.report["test"], run.report["exact"] is not None
    return {
        "name": name,
        "latent": run.spec.model.latent,
        "run": str(run.path),
        "elbo": test["elbo"],
        "log_evidence": test["log_evidence"],
        "exact": run.report["exact"]["log_evidence"] if known else None,
        "exact_train": float(exact_log_evidence(run.program, data.train).mean()) if known else None,
        "kl": float(compare_posteriors(run.program, data.test).kl.median()) if known else None,
        "seconds": run.report["train"]["seconds"],
    }


def _draw(program: Any, data: Data) -> Any:
    """Draw q's ellipses over the exact posterior's, for one digit of each kind."""
    labels = data.test["y"]
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()[:8]]
    few = {key: value[first] for key, value in data.test.items()}
    q, p = gaussians(program, few, role="guide"), gaussians(program, few, role="model")
    return ellipses((q.loc, q.covariance), (p.loc, p.covariance), labels=few["y"], x=few["x"], shape=data.shape)


def table(figures: list[dict[str, Any]], data: Data, seconds: float) -> str:
    """Lay the rows out for people."""
    from ppl_vae.runs.console import table as lay

    head = ("model", "z", "ELBO", "log evidence", "± data", "± mc", "exact", "gap", "KL(q||p)", "seconds")
    body = [head]
    for row in figures:
        value, bound = row["log_evidence"], row["elbo"]["mean"]
        sure, known = value["kind"] == "estimate", row["exact"] is not None
        above = row["exact"] if known else value["mean"]
        body.append(
            (
                row["name"],
                str(row["latent"]),
                f"{bound:.3f}",
                f"{'' if sure else '>= '}{value['mean']:.3f}",
                f"{value['se']:.2f}",
                f"{value['mc_se']:.4f}" if sure else "bound",
                f"{row['exact']:.3f}" if known else "unknown",
                f"{'' if known else '>= '}{above - bound:.3f}",
                f"{abs(row['kl']):.4f}" if known else "unknown",
                f"{row['seconds']:.1f}",
            )
        )
    best = {row["latent"]: row["exact_train"] for row in figures if row["run"] is None}
    below = [
        f"z = {row['latent']}, {row['name']}: {row['exact_train'] - best[row['latent']]:+.4f}"
        for row in figures
        if row["run"] is not None and row["exact_train"] is not None
    ]
    return "\n".join(
        [
            f"{len(data.train['x']):,} digits to learn from, {len(data.test['x'])} held out; nats per held-out image.",
            "",
            *lay(body),
            "",
            "Exact evidence on the training images, less PPCA's maximum: " + "; ".join(below),
            "gap = log evidence (exact where known) - ELBO; KL(q||p) to the exact posterior is the median over images.",
            f"{seconds:.0f} seconds in all. Each trained row left a run with report and pictures.",
        ]
    )
