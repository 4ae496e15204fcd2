"""Pages: a report in Markdown."""

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import replayed
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.findings import describe_diagnostics, figure, list_findings

_ROLES = {"prior": "prior p(z)", "likelihood": "likelihood p(x | z)", "posterior": "approximate posterior q(z | x)"}


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
    source = files("ppl_vae.reports").joinpath("report.md.jinja").read_text(encoding="utf-8")
    return jinja2.Template(source, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(
        report=report,
        title=title,
        model=_describe(target.program, report["spec"]),
        program=_show_sites(target),
        findings=list_findings(report, history),
        diagnostics=[*describe_diagnostics(report), *notes],
        captions=captions,
        options=options,
        figure=figure,
        falling=_falling,
    )


def _describe(program: Any, spec: Mapping[str, Any]) -> str:
    """What was fitted: the parts of a VAE, with their settings and formulas, or the first sentence of a program."""
    if not isinstance(program, VAE):
        summary = (type(program).__doc__ or "").strip().split("\n")[0]
        file = Path(spec["model"]["program"].partition(":")[0]).name
        return f"The program `{type(program).__name__}` of `{file}`{': ' + summary if summary else '.'}"
    z, x = program.prior.family.event_shape.numel(), program.likelihood.family.event_shape.numel()
    sizes = f"{z} latent{'s' * (z > 1)} and {x} feature{'s' * (x > 1)}"
    lines = [f"A variational autoencoder of {sizes}, p(x) = ∫ p(x | z) p(z) dz:\n"]
    for role, name in _ROLES.items():
        settings = dict(spec[role])
        network = settings.pop("network", None)
        sentence = (inspect.getdoc(type(getattr(program, role).family)) or "").split("\n\n")[0]
        formula = re.sub(":math:`([^`]*)`", r"$\1$", " ".join(sentence.split()))
        lines.append(f"- {name}: {_called(settings)}{f' on {_called(network)}' if network else ''}. {formula}")
    return "\n".join(lines)


def _called(table: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in table.items() if key != "family")
    return f"`{table['family']}`" + (f" ({settings})" if settings else "")


def _show_sites(target: Target) -> str:
    """The sites and shapes of model and guide as Pyro writes them, for three data."""
    parts = []
    for role, trace in zip(("model", "guide"), replayed(target.program, target.rows(slice(3)).batch, 0), strict=True):
        for name in list(trace.param_nodes):
            trace.remove_node(name)
        trace.compute_log_prob()
        parts.append(f"{role}\n" + "\n".join(line.rstrip() for line in trace.format_shapes().splitlines()))
    return "\n\n".join(parts)


def _falling(values: Sequence[float], most: int = 10) -> str:
    """The largest figures of the latents, in falling order with their numbers, and the smallest."""
    order = sorted(range(len(values)), key=lambda latent: -values[latent])
    shown = ", ".join(f"z{latent} {values[latent]:.2f}" for latent in order[:most])
    return shown + (f", ... z{order[-1]} {values[order[-1]]:.2f}" if len(values) > most else "")
