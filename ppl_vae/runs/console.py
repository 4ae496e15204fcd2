"""Text for the terminal: headlines, comparisons, lists and tables."""

from collections.abc import Mapping, Sequence
from typing import Any


def headline(report: Mapping[str, Any]) -> str:
    """Give the figures that matter most, a line each."""
    test = report["test"]
    value, bound = test["log_evidence"], test["elbo"]
    part = "held-out" if report["data"]["part"] == "test" else "training"
    lines = [
        f"ELBO             {_figure(bound)} nats per {part} datum",
        f"log evidence  {_sign(value)} {_figure(_sure(value))} ({value['kind']}, K = {test['samples']})",
    ]
    if report["exact"]:
        lines.append(f"exact            {report['exact']['log_evidence']:.3f} ({report['exact']['method']})")
    if report["baseline"]:
        lines.append(f"PPCA             {report['baseline']['ppca']['log_evidence']:.3f} (closed form)")
    return "\n".join([*lines, *closer(report)])


def closer(report: Mapping[str, Any]) -> list[str]:
    """Give what a closer look found, a line for each thing asked for."""
    from ppl_vae.reports.findings import counted

    lines = []
    if reference := report.get("reference"):
        method, data = reference["method"], counted(reference["n"])
        failed = "" if reference["converged"] else "; its own checks failed"
        if reference.get("log_evidence") is None:
            reason = "no log p(x)" if method == "nuts" else "none settled"
            lines.append(f"reference        {reason} ({method}, {data}{failed})")
        else:
            settled = reference["n_settled"] or reference["n"]
            some = data if settled == reference["n"] else f"{settled:,} of {data}"
            error = "" if method == "closed-form" else f" ± {reference['error']:.2g}"
            kind = "" if reference["kind"] == "estimate" else "lower bound on average, "
            value = f"{reference['log_evidence']:.3f}{error}"
            lines.append(f"reference     {_sign(reference)} {value} ({kind}{method}, {some}{failed})")
    if gap := report.get("gap"):
        errors = {"total": "error", "approximation": "approximation_error", "amortization": "amortization_error"}
        whole, family, network = (_figure({"mean": gap[name], "se": gap[error]}) for name, error in errors.items())
        least = ">= " if gap["kind"] == "lower bound" else ""
        lines.append(
            f"gap           {_sign(gap)} {whole} over {counted(gap['n'])}: family {least}{family}, network {network}"
        )
    if calibration := report.get("calibration"):
        over = f"p = {calibration['p_value']:.2g}, {calibration['simulations']:,} simulations"
        lines.append(f"calibration      {calibration['verdict']} ({over})")
    return lines


def _sign(given: Mapping[str, Any]) -> str:
    """Mark a lower bound."""
    return ">=" if given["kind"] == "lower bound" else "  "


def _sure(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the error from a lower bound, about which there is no interval."""
    return {**given, "se": None} if given["kind"] == "lower bound" else given


def _figure(given: Mapping[str, Any]) -> str:
    """Write a mean and its standard error over data; either may be missing."""
    from ppl_vae.reports.findings import margin

    if given["mean"] is None:
        return "not finite"
    return f"{given['mean']:.3f}" + ("" if given["se"] is None else f" ± {margin(given['se'])}")


def comparison(found: Mapping[str, Any]) -> str:
    """Lay runs out as a table, with their paired differences below."""
    rows = [("run", "ELBO", "log evidence", "exact", "PPCA")]
    for run in found["runs"]:
        value = run["test"]["log_evidence"]
        sign = ">= " if value["kind"] == "lower bound" else ""
        exact, ppca = run["exact"], run["baseline"]
        rows.append(
            (
                run["path"],
                _figure({**run["test"]["elbo"], "se": None}),
                f"{sign}{_figure(_sure(value))}",
                f"{exact['log_evidence']:.3f}" if exact else "-",
                f"{ppca['ppca']['log_evidence']:.3f}" if ppca else "-",
            )
        )
    lines = [
        *table(rows),
        "",
        "Differences of log evidence, nats per datum, paired over the same data, ± standard error:",
    ]
    lines += [f"{one['a']} - {one['b']}: {_figure(one)}" for one in found["differences"]]
    kinds = {run["test"]["log_evidence"]["kind"] for run in found["runs"]}
    if "lower bound" in kinds:
        lines.append(">= is a lower bound, so a difference may be of the bounds and not of the models.")
    return "\n".join(lines)


def listing(found: list[dict[str, Any]]) -> list[str]:
    """Lay components out by role."""
    lines: list[str] = []
    for role in dict.fromkeys(component["role"] for component in found):
        lines += [role]
        for one in found:
            if one["role"] == role:
                keys = ", ".join(key if value is None else f"{key} = {value}" for key, value in one["keys"].items())
                lines += [f"  {one['name']:<15} {one['doc']}" + (f" [{keys}]" if keys else "")]
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out in columns under the first, names to the left and figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
