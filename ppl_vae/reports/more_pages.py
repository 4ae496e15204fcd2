"""Pages of what is no run: a comparison of runs, a sweep, the check of a guide."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppl_vae.evaluation.guide_check import GuideCheck
from ppl_vae.reports.diagnostic_plots import moments, sweep_results
from ppl_vae.reports.findings import figure
from ppl_vae.reports.html_page import Number, Picture, page, plain
from ppl_vae.reports.measures import check_block, finite
from ppl_vae.reports.page import evidence_numbers, first_numbers, moment_rows


def guide_page(check: GuideCheck, *, title: str = "Guide check") -> str:
    """Write the check of a guide, from `check_guide`, as an HTML page.

    Args:
        check: of a guide.
        title: the heading.

    Returns:
        The page, to be written to a file in UTF-8.
    """
    block, found = finite(check_block(check)), check.evidence.summary()
    head, rows = ["latent", *moment_rows(block)["methods"], "off", "times as wide"], moment_rows(block)["moments"]
    doubts = [check.words[-1], *check.notes]
    worst = ", ".join(f"{plain(name)} ({figure(off, digits=2)})" for name, off in check.doubtful().items())
    text = [
        f"# {plain(title)}",
        "## What to distrust",
        *[f"- {plain(doubt)}" for doubt in doubts],
        f"- Furthest off in mean or spread, in standard deviations: {worst}.",
        "## The guide beside the posterior\n",
        "Means ± their errors (standard deviations); then how far the guide's mean is off, in standard deviations, and "
        "how many times as wide it is.\n",
        *_table([head, *[[plain(cell) for cell in row] for row in rows]]),
        "## In words\n",
        f"```\n{check}\n```",
    ]
    about = f"Whether variational inference worked, by {check.evidence.samples:,} importance samples."
    report = {"test": found, "data": {"whole": check.whole, "part": "train"}, "exact": None, "baseline": None}
    pictures = [
        _picture(moments(block["sites"]), "Mean and standard deviation of each latent, by the guide and beside it.")
    ]
    return page("\n".join(text), about=about, numbers=first_numbers(finite(report)), pictures=pictures)


def comparison_page(compared: Mapping[str, Any], *, title: str = "Comparison of runs") -> str:
    """Write a comparison of runs, from `compare_runs`, as an HTML page.

    Args:
        compared: the runs and their differences.
        title: the heading.

    Returns:
        The page, to be written to a file in UTF-8.
    """
    runs = sorted(compared["runs"], key=lambda run: -run["test"]["log_evidence"]["mean"])
    values = [run["test"]["log_evidence"] for run in runs]
    best, second = (plain(run["path"]) for run in runs[:2])
    (apart,) = [one for one in compared["differences"] if {one["a"], one["b"]} == {runs[0]["path"], runs[1]["path"]}]
    lead, se = abs(apart["mean"]), apart["se"]
    bounds = [run["path"] for run, value in zip(runs, values, strict=True) if value["kind"] == "lower bound"]
    doubts = []
    if se is None or lead <= 2 * se:
        doubts.append(f"**{best} and {second} cannot be told apart**: {_apart(apart)} nats per datum.")
    if bounds:
        shown = ", ".join(map(plain, bounds))
        doubts.append(
            f"**Only a lower bound is known of {shown}**, so a difference may be one of bounds, not of models."
        )
    rows = [["run", "ELBO", "log evidence", "kind", "exact log evidence", "PPCA", "seconds"]]
    for run, value in zip(runs, values, strict=True):
        bound = value["kind"] == "lower bound"
        cells = [figure(run["test"]["elbo"]["mean"], run["test"]["elbo"]["se"])]
        cells += [(">= " if bound else "") + figure(value["mean"], None if bound else value["se"]), value["kind"]]
        cells += [figure(run["exact"] and run["exact"]["log_evidence"])]
        cells += [figure(run["baseline"] and run["baseline"]["ppca"]["log_evidence"]), f"{run['train']['seconds']:.1f}"]
        rows.append([plain(run["path"]), *cells])
    pairs = [["run", "less run", "difference ± standard error"]]
    pairs += [[plain(one["a"]), plain(one["b"]), _apart(one)] for one in compared["differences"]]
    text = [
        f"# {plain(title)}",
        "## What to distrust" if doubts else "",
        *[f"- {doubt}" for doubt in doubts],
        "## Runs\n",
        "Nats per datum, higher is better; ± is the standard error over the data.\n",
        *_table(rows),
        "## Differences\n",
        "Of log evidence over the same data, paired: nats per datum.\n",
        *_table(pairs),
    ]
    unit, own = "nats per datum", evidence_numbers(runs[0]["test"], runs[0]["data"])[0]
    doubt = "error not known: a single datum" if se is None else f"± {figure(se)} standard error, paired"
    numbers = [
        Number(f"log evidence of {best}", *own[1:]),
        Number(
            f"its lead over {second}", figure(lead), doubt, unit, "estimate" if not bounds else "difference of bounds"
        ),
    ]
    dots = [{"name": run["path"], "log_evidence": {**run["test"]["log_evidence"], "se_seeds": None}} for run in runs]
    for dot, run in zip(dots, runs, strict=True):
        dot |= {"ppca": run["baseline"] and run["baseline"]["ppca"]["log_evidence"], "seconds": run["train"]["seconds"]}
    drawn = sweep_results({"settings": dots})
    caption = "log evidence of each run; at the right the seconds of training. Differences, paired by datum, are known "
    caption += "better than the values themselves."
    about = (
        f"{len(runs)} runs on {plain(runs[0]['data']['name'])}, evaluated on the same {runs[0]['test']['n']:,} data."
    )
    return page("\n".join(text), about=about, numbers=numbers, pictures=[_picture(drawn, caption)])


def sweep_page(found: Mapping[str, Any], text: str) -> str:
    """Write a sweep as an HTML page.

    Args:
        found: from `runs.sweep.summarise`, with at least one setting.
        text: its table in Markdown.

    Returns:
        The page, to be written to a file in UTF-8.
    """
    rows, unit, numbers = found["settings"], "nats per held-out datum", []
    best = rows[found["compared_with"]]
    value, others = best["log_evidence"], [row for row in rows if row["difference"] is not None]
    bound = value["kind"] == "lower bound"
    seeds = "unknown over seeds: one seed" if value["se_seeds"] is None else f"± {figure(value['se_seeds'])} over seeds"
    doubt = f"± {figure(value['se'])} standard error {'of the bound ' if bound else ''}over the data; {seeds}"
    label = "log evidence of the chosen setting" if found["chosen"] is not None else "log evidence of the first setting"
    numbers.append(Number(label, (">= " if bound else "") + figure(value["mean"]), doubt, unit, value["kind"]))
    if others:
        next_ = max(others, key=lambda row: row["log_evidence"]["mean"])
        apart, more = next_["difference"], next_["difference"]["se_seeds"]
        doubt = f"± {figure(apart['se'])} standard error, paired; " + (
            "unknown over seeds" if more is None else f"± {figure(more)} over seeds"
        )
        bounds = "lower bound" in {value["kind"], next_["log_evidence"]["kind"]}
        kind = "difference of bounds" if bounds else "estimate"
        label = "its lead over the best other" if apart["mean"] <= 0 else "by which the best other is ahead"
        numbers.append(Number(label, figure(abs(apart["mean"])), doubt, unit, kind))
    doubts = []
    if found["chosen"] is None:
        doubts.append("**No setting is chosen**, for there is no validation part: `data.validation_fraction = 0.1`.")
    if best["ppca"] is not None and value["mean"] < best["ppca"]:
        which = "chosen" if found["chosen"] is not None else "first"
        doubts.append(f"**The {which} setting is worse than PPCA** of its size: it has not been trained well.")
    if any(row["seeds"] < 2 for row in rows):
        doubts.append("**The spread over seeds is unknown** of settings with one seed: `--set svi.seed=0,1,2`.")
    if bounded := [row for row in rows if row["log_evidence"]["kind"] == "lower bound"]:
        which = "all settings" if len(bounded) == len(rows) else f"{len(bounded)} of {len(rows)} settings"
        doubts.append(f"**Only a lower bound is known of {which}**: a difference may be one of bounds, not of models.")
    doubts += [f"**{plain(name)} failed**: {plain(why)}" for name, why in found.get("failed", {}).items()]
    title, _, rest = text.partition("\n")
    listed = "\n".join(f"- {doubt}" for doubt in doubts)
    whole = f"{title}\n" + (f"## What to distrust\n{listed}\n" if doubts else "") + f"## Settings\n{rest}"
    settings = f"{len(rows)} settings, each" if len(rows) > 1 else "One setting,"
    least, most = (pick(row["seeds"] for row in rows) for pick in (min, max))
    about = f"{settings} trained with {least} seed{'s' * (least > 1)}{' or more' * (most > least)}."
    caption = "log evidence of each setting, best above; at the right the seconds of training."
    return page(whole, about=about, numbers=numbers, pictures=[_picture(sweep_results(found), caption)])


def _apart(one: Mapping[str, Any]) -> str:
    return figure(one["mean"], one["se"])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    numbers = [any(re.match(r"(>= )?-?\d", cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["---:" if each else "---" for each in numbers]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _picture(drawn: Any, caption: str) -> Picture:
    file = io.BytesIO()
    (getattr(drawn, "figure", None) or drawn).savefig(file, dpi=120, bbox_inches="tight")
    return Picture(caption, file.getvalue())
