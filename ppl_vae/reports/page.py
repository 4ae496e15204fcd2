"""Pages: the report of a run in Markdown, and as a page."""

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from ppl_vae.evaluation.pareto import shape_error
from ppl_vae.programs.program import Program
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.diagnostic_words import describe_diagnostics
from ppl_vae.reports.findings import counted, figure, list_findings, margin
from ppl_vae.reports.html_page import Number, Picture, page, plain
from ppl_vae.reports.measures import MOST_DATA
from ppl_vae.reports.remedies import list_remedies, trusted

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
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"plain": plain, "settings": _settings}
    return environment.from_string(source.read_text("utf-8")).render(
        report=report,
        title=title,
        **moment_rows(report.get("check")),
        model=_model(target.program, report["spec"]),
        objective=_objective(report["spec"]["svi"], report["train"]),
        sites=_sites(target),
        falling=sorted(range(len(rates)), key=lambda latent: -rates[latent]),
        findings=list_findings(report, history),
        remedies=list_remedies(report, history),
        diagnostics=[*describe_diagnostics(report), *notes],
        captions=captions,
        options=options,
        trust=trusted(report["spec"]),
        figure=figure,
        most=MOST_DATA,
    )


def run_page(text: str, report: Mapping[str, Any], captions: Mapping[str, str], folder: Path) -> str:
    """Write a report as an HTML page.

    Args:
        text: the report in Markdown.
        report: the content of `report.json`.
        captions: of the figures, by file name.
        folder: where the figures lie.
    """
    names = [name for name in _FIRST if name in captions] or [*captions]
    pictures = [Picture(caption, (folder / name).read_bytes()) for name, caption in captions.items()]
    first = [*captions].index(names[0]) if names else 0
    return page(text, about=_about(report), numbers=first_numbers(report), pictures=pictures, first=first)


_FIRST = (
    "reconstructions.png",
    "samples.png",
    "moments.png",
    "predictive.png",
)  # what stands on the first screen, if it is there


def _about(report: Mapping[str, Any]) -> str:
    """What was fitted, to what, in a sentence."""
    data, spec = report["data"], report["spec"]
    what = f"The program {plain(Path(spec['model'].get('program') or '').name)}"
    what = "A program built in Python," if spec["model"].get("built") else what
    if "prior" in spec:
        families = [plain(Path(spec[r].get("family") or spec[r]["program"]).name) for r in ("likelihood", "posterior")]
        what = f"A variational autoencoder with {report['test']['latents']} latents, a likelihood {families[0]} and "
        what += f"an approximate posterior {families[1]},"
    kept = report["train"].get("kept_epoch")
    epochs = report["train"]["epochs"]
    best = f", of which the best, epoch {kept}, was kept" if kept and epochs > 1 else ""
    ended = f"{epochs:,} epoch{'s' * (epochs != 1)}{best}"
    of = f", {data['features']} features" + " each" * (not data.get("whole")) if data["features"] else ""
    held = f", {data['n_test']:,} held out" if data["n_test"] else ""
    return f"{what} fitted to {plain(data['name'])}: {counted(data['n_train'])} for training{held}{of}; {ended}."


def first_numbers(report: Mapping[str, Any]) -> list[Number]:
    """The three numbers of a report that matter most, each with its error, unit and kind."""
    test, exact, baseline = report["test"], report["exact"], report["baseline"]
    numbers = evidence_numbers(test, report["data"])
    (_, _, unknown, unit, kind), whole = numbers[0], report["data"].get("whole")
    bound = kind == "lower bound"
    if exact:
        how = "estimate" if exact["gap_method"] == "sampled" else "closed form"
        name, doubt = "KL divergence of guide to exact posterior", _errors(None, exact["gap_mc_se"])
        numbers.append(Number(name, figure(exact["posterior_kl"]), doubt, unit, how))
    elif baseline and "difference" in baseline["ppca"]:
        ahead, se = (baseline["ppca"][key] for key in ("difference", "se"))
        value = ">= " * bound + "+" * (ahead > 0) + figure(ahead)
        of = " of the bound, paired" if bound else ", paired"
        numbers.append(Number("log evidence minus that of PPCA", value, _errors(se, None, of), unit, kind))
    elif classes := report.get("classes"):
        share = f"share of {counted(classes['n'])}"
        numbers.append(Number("right classes", figure(classes["accuracy"]), _errors(classes["se"]), share, "estimate"))
    elif not whole and "bits_per_dim" in test:
        doubt, how = (unknown, "upper bound") if bound else (_errors(test["bits_per_dim_se"]), kind)
        value = "<= " * bound + figure(test["bits_per_dim"])
        numbers.append(Number("bits per dimension", value, doubt, "bits per feature", how))
    elif (shape := test["pareto_k"]["max"]) is not None:
        doubt, unit = (
            _errors(float(shape_error(torch.tensor(max(shape, -0.5)), test["samples"])), None, ""),
            "no unit; unreliable above 0.7",
        )
        numbers.append(
            Number("tail shape k of the weights" + ", largest" * (not whole), figure(shape), doubt, unit, "estimate")
        )
    return numbers


def evidence_numbers(test: Mapping[str, Any], data: Mapping[str, Any]) -> list[Number]:
    """Log evidence and ELBO, with their errors over the data, unless these count as one, and by Monte Carlo."""
    value, elbo, whole = test["log_evidence"], test["elbo"], data.get("whole")
    bound = value["kind"] == "lower bound"
    own, other = (_errors(None if whole else one["se"], one["mc_se"]) for one in (value, elbo))
    part = "held-out" if data["part"] == "test" else "training"
    unit = "nats of the whole data set" if whole else f"nats per {part} datum"
    doubt = "error not known: a lower bound" if bound else own
    return [
        Number("log evidence, log p(x)", ">= " * bound + figure(value["mean"]), doubt, unit, value["kind"]),
        Number("ELBO", figure(elbo["mean"]), other, unit, "estimate"),
    ]


def _errors(over: float | None, own: float | None = None, of: str = " over the data") -> str:
    """A standard error and a Monte Carlo error in words, as far as they are known."""
    parts = [] if over is None else [f"± {margin(over)} standard error{of}"]
    parts += [] if own is None else [f"± {margin(own)} Monte Carlo error" if own else "no Monte Carlo error"]
    return "; ".join(parts) or "error not known: a single datum or draw"


def _model(program: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and formulas of a VAE, or name, file and summary of another program."""
    if not isinstance(program, VAE) or "prior" not in spec:
        own = program.model if type(program) is Program else program
        own = getattr(own, "__self__", getattr(own, "func", own))  # the object or function that was wrapped
        own = own if hasattr(own, "__name__") else type(own)
        name, summary = own.__name__, (own.__doc__ or "").strip().split("\n")[0]
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


def moment_rows(check: Mapping[str, Any] | None) -> dict[str, Any]:
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


def _settings(table: Mapping[str, Any]) -> str:
    """The keys of a family or network and their values in brackets; those that are off are left out."""
    parts = []
    for key, value in table.items():
        if key in ("family", "network", "program") or value in ("none", False, None):
            continue
        if isinstance(value, Mapping):  # a family for each column
            families = Counter(str(one.get("family") if isinstance(one, Mapping) else one) for one in value.values())
            parts += [f"{family} for {n} column{'s' * (n > 1)}" for family, n in families.most_common()]
        else:
            parts.append(f"{key} {value}")
    return f" ({', '.join(map(plain, parts))})" if parts else ""


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
