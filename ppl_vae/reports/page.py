"""Pages: a report in Markdown."""

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.findings import describe_diagnostics, figure, list_findings
from ppl_vae.reports.measures import MOST_DATA

_ROWS = 40  # of the table of moments, at the most


def markdown(
    report: Mapping[str, Any],
    history: Sequence[float],
    target: Target,
    *,
    title: str,
    captions: Mapping[str, str],
    notes: Sequence[str] = (),
    options: str = "",
) -> str:
    """Write a report for people.

    Args:
        report: the content of `report.json`.
        history: the bound of each epoch.
        target: the program and the data that were evaluated.
        title: the heading.
        captions: of the figures, by file name.
        notes: on the diagnostics.
        options: of `ppl-vae evaluate`, that ask for the diagnostics.
    """
    source, rates = files("ppl_vae.reports").joinpath("report.md.jinja"), report["test"]["rates"] or []
    template = jinja2.Template(source.read_text("utf-8"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return template.render(
        report=report,
        title=title,
        **_moments(report.get("check")),
        model=_model(target.program, report["spec"]),
        objective=_objective(report["spec"]["svi"], report["train"]),
        sites=_sites(target),
        falling=sorted(range(len(rates)), key=lambda latent: -rates[latent]),
        findings=list_findings(report, history),
        diagnostics=[*describe_diagnostics(report), *notes],
        captions=captions,
        options=options,
        figure=figure,
        most=MOST_DATA,
    )


def _model(program: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and formulas of a VAE, or name, file and summary of another program."""
    if not isinstance(program, VAE) or "prior" not in spec:
        name, summary = type(program).__name__, (type(program).__doc__ or "").strip().split("\n")[0]
        return {
            "name": name,
            "file": Path(spec["model"]["program"].partition(":")[0]).name,
            "summary": summary,
            "given": "",
        }
    formulas = {}
    for role in ("prior", "likelihood", "posterior"):
        sentence = (inspect.getdoc(type(getattr(program, role).family)) or "").split("\n\n")[0]
        formulas[role] = re.sub(":math:`([^`]*)`", r"$\1$", " ".join(sentence.split()))
    z, x = program.prior.family.event_shape.numel(), program.likelihood.family.event_shape.numel()
    words = ", ".join(program.given_keys).replace("covariates", "c")
    after = {role: words if program.given is not None and role in program.given.roles else "" for role in formulas}
    return {"latents": z, "features": x, "formulas": formulas, "given": words, "after": after}


def _moments(check: Mapping[str, Any] | None) -> dict[str, Any]:
    """The methods that give moments, and a row for each entry of the latent sites, at most `_ROWS`."""
    if check is None:
        return {}
    rows, methods = [], []
    for name, site in check["sites"].items():
        methods = [label for label in site if isinstance(site[label], dict)]
        columns = [[np.ravel(site[label][key]) for key in ("mean", "error", "sd")] for label in methods]
        off, wide = np.ravel(site["mean_error"]), np.ravel(site["scale_ratio"])
        for entry in range(len(off)):
            cells = [f"{figure(m[entry], e[entry])} ({figure(s[entry])})" for m, e, s in columns]
            label = f"{name}[{entry}]" if len(off) > 1 else name
            rows.append([label, *cells, figure(off[entry], digits=2), figure(wide[entry], digits=2)])
    left = [[f"{len(rows) - _ROWS} more", *[""] * (len(methods) + 2)]] if len(rows) > _ROWS else []
    return {"methods": methods, "moments": rows[:_ROWS] + left}


def _objective(svi: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """What training maximised, and what it reached, where that is not the ELBO itself."""
    draws, gradient, told = svi["particles"], svi.get("gradient", "plain"), []
    beta, free = svi.get("beta", 1.0), svi.get("free_bits", 0.0)
    if "alpha" in svi:
        power = f"1/(1 - a) log (1/K) sum_k (p(x, z_k) / q(z_k | x))^(1 - a) with a = {svi['alpha']:g}, K = {draws}"
        told = [f"{power}, a lower bound of log p(x) above the ELBO for 0 <= a < 1 only."]
    elif svi["elbo"] == "ImportanceWeighted":
        told = [f"log (1/K) sum_k p(x, z_k) / q(z_k | x) with K = {draws}, on average a lower bound of log p(x)."]
    elif beta != 1 or free:
        terms = f"sum max({free:g}, KL) over each {svi.get('free_bits_per', 'latent')}" if free else "KL(q || p)"
        told = [f"E_q log p(x | z) - {f'{beta:g} ' * (beta != 1)}{terms}, not the ELBO."]
    if gradient != "plain":
        bias = "stl, biased for K > 1" if gradient == "stl" and draws > 1 else f"{gradient}, which has no bias"
        told.append(f"Its gradient was {bias}.")
    if svi.get("warm_up"):
        told.append(f"The weight of the KL terms rose over the first {svi['warm_up']} epochs.")
    if told and train.get("objective") is not None:
        told.append(f"In the last epoch it was {figure(train['objective'])}, beside the ELBO below.")
    return " ".join(told)


def _sites(target: Target) -> str:
    """The sites and shapes of model and guide as Pyro writes them, for three data."""
    parts = []
    for role, trace in zip(("model", "guide"), target.rows(slice(3)).replay(0), strict=True):
        for name in list(trace.param_nodes):
            trace.remove_node(name)
        trace.compute_log_prob()
        parts.append(f"{role}\n" + "\n".join(line.rstrip() for line in trace.format_shapes().splitlines()))
    return "\n\n".join(parts)
