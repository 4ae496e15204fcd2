"""Pages: a report in Markdown."""

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from ppl_vae.programs.traces import check_batch, replayed
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.findings import margin


def markdown(
    report: Mapping[str, Any],
    *,
    title: str,
    words: str,
    program: str,
    doubts: list[str],
    pictures: Mapping[str, str],
    findings: Sequence[str] = (),
    closer: str = "",
) -> str:
    """Write a report for people.

    Args:
        report: what `report.json` says.
        title: the heading.
        words: what was fitted.
        program: Pyro's rendering of the program's sites and shapes.
        doubts: what `distrust` found.
        pictures: captions by file name.
        findings: what a closer look found.
        closer: the options of the closer look.
    """
    keys = ("binarization", "scaling", "dequantization")
    notes = [f"{key} {report['data']['protocol'][key]}" for key in keys if report["data"]["protocol"][key] != "none"]
    template = jinja2.Template(
        files("ppl_vae.reports").joinpath("report.md.jinja").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    held_out = report["data"]["part"] == "test"
    return template.render(
        report=report,
        title=title,
        words=words,
        program="\n".join(line.rstrip() for line in program.splitlines()),
        doubts=doubts,
        findings=findings,
        closer=closer,
        pictures=pictures,
        rows=_rows(report),
        judged="held-out" if held_out else "training",
        column="test" if held_out else "train, all",
        protocol=f" ({', '.join(notes)})" if notes else "",
    )


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Lay out the table of figures: quantity, train, test, Monte Carlo error, kind."""
    test, train, exact, baseline = (report[key] for key in ("test", "train", "exact", "baseline"))
    value, bound, shape = test["log_evidence"], test["elbo"], test["pareto_k"]
    sure = value["kind"] == "estimate"
    rows = [
        ("ELBO", _figure(train["elbo"], train["elbo_se"]), _figure(bound["mean"], bound["se"])),
        ("log evidence", "", _figure(value["mean"], value["se"]) if sure else f">= {_figure(value['mean'])}"),
        ("rate: KL of the guide to the prior", _figure(train["rate"]), _figure(test["rate"])),
        ("distortion: - E log p(x given z)", _figure(train["distortion"]), _figure(test["distortion"])),
    ]
    errors = [_figure(bound["mc_se"], digits=4), _figure(value["mc_se"] if sure else None, digits=4), "", ""]
    kinds = ["estimate", value["kind"], "estimate", "estimate"]
    table = [(*row, error, kind) for row, error, kind in zip(rows, errors, kinds, strict=True)]
    if sure:
        table[2:2] = [
            ("its bias to first order (delta method)", "", _figure(value["bias"], digits=4), "", "estimate"),
            ("freed of its first-order bias (jackknife; no bound)", "", _figure(value["jackknife"]), "", "estimate"),
        ]
    if exact:
        drawn = "estimate" if exact["gap_method"] == "sampled" else exact["gap_method"]
        doubt = "0" if drawn == "closed-form" else _figure(exact["gap_mc_se"], digits=4)
        table.append(("exact log evidence", "", _figure(exact["log_evidence"]), "0", exact["method"]))
        table.append(("exact log evidence - ELBO", "", _figure(exact["gap"], digits=4), doubt, drawn))
        table.append(("KL of guide to exact posterior", "", _figure(exact["posterior_kl"], digits=4), doubt, drawn))
    if baseline:
        known = _figure(baseline["ppca"]["log_evidence"])
        table.append(("log evidence of PPCA, as many latents", "", known, "0", "closed-form"))
    worst = "-" if shape["max"] is None else f"{shape['median']:.2f} / {shape['max']:.2f}"
    sign = "" if sure else "<= "
    return [
        *table,
        ("bits per dimension, lower is better", "", f"{sign}{_figure(test['bits_per_dim'], digits=4)} bits", "", ""),
        ("active latents", "", f"{test['active_units']} of {test['latents']}", "", ""),
        *([("rate of each latent, falling", "", _falling(test["rates"]), "", "")] if test["rates"] else []),
        ("effective samples, median / least", "", f"{test['ess']['median']:.0f} / {test['ess']['min']:.1f}", "", ""),
        ("tail shape k of the weights, median / largest", "", worst, "", ""),
    ]


def _falling(values: Sequence[float], most: int = 10) -> str:
    """Write figures of the latents, the largest first, with their numbers."""
    order = sorted(range(len(values)), key=lambda number: -values[number])
    shown = ", ".join(f"z{number} {values[number]:.2f}" for number in order[:most])
    return shown + (f", ... z{order[-1]} {values[order[-1]]:.2f}" if len(values) > most else "")


def _figure(value: float | None, error: float | None = None, *, digits: int = 3) -> str:
    """Write a figure and its error; a dash where there is none."""
    if value is None:
        return "-"
    value = round(value, digits) + 0.0  # no minus before zero
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {margin(error, digits)}")


def rendering(program: Any, x: Mapping[str, Tensor]) -> str:
    """Let Pyro render the sites and shapes of model and guide, for three data."""
    model, guide = replayed(program, {key: value[:3] for key, value in check_batch(program, x).items()}, 0)
    parts = []
    for role, trace in (("model", model), ("guide", guide)):
        for name in list(trace.param_nodes):
            trace.remove_node(name)
        trace.compute_log_prob()
        parts.append(f"{role}\n{trace.format_shapes()}")
    return "\n\n".join(parts)


def describe(program: Any, spec: Any) -> str:
    """Say in a few sentences and formulas what was fitted."""
    bound = (
        f"Trained by {spec.svi.elbo} to maximise ELBO = E_q[log p(x, z) - log q(z | x)] = -(rate + distortion), a "
        "lower bound of log p(x). Judged by log p(x) = log E_q[p(x, z) / q(z | x)], importance sampling from the guide."
    )
    if not isinstance(program, VAE):
        summary = (type(program).__doc__ or "").strip().split("\n")[0]
        file, _, _ = spec.model.program.partition(":")
        name = f"The program `{type(program).__name__}` of `{Path(file).name}`"
        return f"{name}{': ' + summary if summary else '.'}\n\n{bound}"
    z, x = program.prior.family.event_shape.numel(), program.likelihood.family.event_shape.numel()
    parts = (program.prior, program.likelihood, program.posterior)
    tables = (spec.prior, spec.likelihood, spec.posterior)
    names = ("prior p(z)", "likelihood p(x | z)", "approximate posterior q(z | x)")
    lines = [f"- {name}: {_part(t, p)}" for name, t, p in zip(names, tables, parts, strict=True)]
    return "\n".join(
        [
            f"A variational autoencoder of {z} latent{'s' * (z > 1)} and {x} feature{'s' * (x > 1)}, "
            "p(x) = ∫ p(x | z) p(z) dz:\n",
            *lines,
            f"\n{bound}",
        ]
    )


def _part(table: Any, part: Any) -> str:
    """Say what a part is: its family and network with their keys, and the family's own sentence."""
    keys = table.model_dump(exclude_none=True)
    network = keys.pop("network", None)
    text = _called(keys) + (f" on {_called(network)}" if network is not None else "")
    first = " ".join((inspect.getdoc(type(part.family)) or "").split("\n\n")[0].split())
    formula = re.sub(":math:`([^`]*)`", r"$\1$", first)
    return f"{text}. {formula}"


def _called(keys: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in keys.items() if key != "family")
    return f"`{keys['family']}`" + (f" ({settings})" if settings else "")
