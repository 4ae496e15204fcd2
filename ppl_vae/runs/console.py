"""Text for the terminal: headlines, comparisons, lists and tables."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppl_vae.reports.findings import counted, figure


def headline(report: Mapping[str, Any]) -> str:
    """The figures of a report that matter most, one per line."""
    test, exact, baseline = report["test"], report["exact"], report["baseline"]
    evidence, part = test["log_evidence"], "held-out" if report["data"]["part"] == "test" else "training"
    if "check" in report:
        whole = [f"{counted(report['data']['n_train'])} count as one datum; all figures are of these training data."]
        return "\n".join([*whole, *report["check"]["text"], *diagnostic_lines(report)])
    lines = [
        _line("ELBO", f"{_figure(test['elbo'])} nats per {part} datum"),
        _line("log evidence", f"{_figure(evidence)} ({evidence['kind']}, K = {test['samples']})", evidence),
    ]
    if exact:
        lines.append(_line("exact", f"{figure(exact['log_evidence'])} ({exact['method']})"))
    if baseline:
        ppca = baseline["ppca"]
        lines.append(_line("PPCA", f"{figure(ppca['log_evidence'], ppca.get('log_evidence_se'))} (closed form)"))
    return "\n".join([*lines, *diagnostic_lines(report)])


def diagnostic_lines(report: Mapping[str, Any]) -> list[str]:
    """The results of the diagnostics that a report includes, one line each."""
    lines = []
    if reference := report.get("reference"):
        method, data = reference["method"], counted(reference["n"])
        failed = "" if reference["converged"] else "; its own checks failed"
        if reference.get("log_evidence") is None:
            reason = "no log p(x)" if method == "nuts" else "none settled"
            lines.append(_line("reference", f"{reason} ({method}, {data}{failed})"))
        else:
            settled = reference["n_settled"] or reference["n"]
            some = data if settled == reference["n"] else f"{settled:,} of {data}"
            error = "" if method == "closed-form" else f" ± {reference['error']:.2g}"
            kind = "" if reference["kind"] == "estimate" else "lower bound on average, "
            text = f"{reference['log_evidence']:.3f}{error} ({kind}{method}, {some}{failed})"
            lines.append(_line("reference", text, reference))
    if gap := report.get("gap"):
        errors = {"total": "error", "approximation": "approximation_error", "amortization": "amortization_error"}
        total, family, network = (_figure({"mean": gap[name], "se": gap[error]}) for name, error in errors.items())
        least = ">= " if _is_bound(gap) else ""
        over = "of the data set" if report.get("data", {}).get("whole") else f"over {counted(gap['n'])}"
        second = "network" if gap.get("amortized", True) else "optimisation"
        text = f"{total} {over}: family {least}{family}, {second} {network}"
        if gap.get("family", "") is None:
            text = f"{total} {over}, not split: the guide's family is not known"
        lines.append(_line("gap", text, gap))
    if calibration := report.get("calibration"):
        over = f"p = {calibration['p_value']:.2g}, {calibration['simulations']:,} simulations"
        lines.append(_line("calibration", f"{calibration['verdict']} ({over})"))
    return lines


def as_html(folder: Path, report: Mapping[str, Any]) -> str:
    """A run as a notebook shows it: its headline and one picture."""
    told = html.escape(f"{folder}\n{headline(report)}")
    pictures = (folder / "figures" / name for name in ("latents.png", "samples.png", "columns.png", "training.png"))
    shown = next((path for path in pictures if path.is_file()), None)
    code = "" if shown is None else base64.b64encode(shown.read_bytes()).decode()
    picture = f'<img alt="{shown.stem}" style="max-width: 480px" src="data:image/png;base64,{code}">' if shown else ""
    return f"<pre>{told}</pre>{picture}"


def comparison(compared: Mapping[str, Any]) -> str:
    """A table of runs, with their paired differences below."""
    rows = [("run", "ELBO", "log evidence", "exact", "PPCA")]
    for run in compared["runs"]:
        evidence, exact, baseline = run["test"]["log_evidence"], run["exact"], run["baseline"]
        cells = [
            _figure({**run["test"]["elbo"], "se": None}),
            (">= " if _is_bound(evidence) else "") + _figure(evidence),
            figure(exact and exact["log_evidence"]),
            figure(baseline and baseline["ppca"]["log_evidence"]),
        ]
        rows.append((run["path"], *cells))
    lines = [*table(rows), "", "Differences of log evidence, nats per datum, over the same data, ± standard error:"]
    lines += [f"{one['a']} - {one['b']}: {_figure(one)}" for one in compared["differences"]]
    if any(_is_bound(run["test"]["log_evidence"]) for run in compared["runs"]):
        lines.append(">= is a lower bound, so a difference may be one of bounds rather than of models.")
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, the first row as their heads; names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _line(label: str, text: str, block: Mapping[str, Any] | None = None) -> str:
    """A figure with its label; `>=` marks a lower bound."""
    return f"{label:<13} {'>=' if block and _is_bound(block) else '  '} {text}"


def _is_bound(block: Mapping[str, Any]) -> bool:
    return block.get("kind") == "lower bound"


def _figure(block: Mapping[str, Any]) -> str:
    """A mean and its standard error over data, if it has one; a lower bound has no interval."""
    return "not finite" if block["mean"] is None else figure(block["mean"], None if _is_bound(block) else block["se"])
