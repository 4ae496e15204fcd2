"""Reports: what was fitted, how right it is, and what to distrust, in numbers and words."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from ppl_vae.compare import compare_posteriors
from ppl_vae.data import Data
from ppl_vae.evidence import Evidence, log_evidence
from ppl_vae.exact import exact_log_evidence
from ppl_vae.latents import active_units, rates
from ppl_vae.networks import Table
from ppl_vae.ppca import PPCA
from ppl_vae.program import VAE
from ppl_vae.traces import place, prepare, replayed, scope, seeded, structure, trace_pair

__all__ = ["describe", "distrust", "evaluate", "judged", "markdown", "measure", "rendering", "trained"]

SHOWN = 1000  # data that pictures and checks on the training part look at
REMEDIES = (
    "What tightens it: more samples (`ppl-vae evaluate RUN --samples K`), a richer guide (FullNormal, MixtureNormal) "
    "or a larger network; annealing does not rely on the guide (`ppl-vae evaluate RUN --reference ais`, "
    "with more `--temperatures` where it does not settle)."
)


def judged(program: Any, data: Data) -> tuple[str, dict[str, Tensor]]:
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
    _, rows = judged(program, data)
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
    few = {key: value[:2] for key, value in prepare(program, x).items()}
    found = structure(program, few)
    with torch.no_grad(), scope(program), seeded(0, device=place(program, next(iter(few.values())))[0]):
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


def distrust(report: Mapping[str, Any], history: Sequence[float]) -> list[str]:
    """Say in plain words what the figures give reason to doubt, and what would help.

    Args:
        report: what `report.json` says.
        history: the bound of each epoch.
    """
    test, train, found = report["test"], report["train"], []
    latents, shape, value, bound = test["latents"], test["pareto_k"], test["log_evidence"], test["elbo"]["mean"]
    if report["data"]["part"] == "train":
        found.append(
            "**All figures are of the training data.** The guide keeps a row for each of them and knows no others, so "
            "nothing here says how the model does on new data. `Linear` or `MLP` in its place would."
        )
    found += _closer(report)
    if None in (value["mean"], bound, train["elbo"]):
        found.append(
            "**Some figures are not finite**: the model gives a datum no density. Nothing here can be trusted."
        )
        return found
    if value["kind"] == "lower bound" and shape["above_0.5"]:
        found.append(
            f"**The log evidence is a lower bound, not an estimate.** For {shape['above_0.5']:.0%} of the data the "
            "importance weights have a tail shape k above 0.5: no finite variance, so no error bar would hold. "
            + REMEDIES
        )
    elif value["kind"] == "lower bound":
        reason = (
            "Too few samples a datum to tell how good they are: 25 at least. "
            if shape["median"] is None
            else "The tail shapes of the importance weights are too near 0.5 for so few samples to tell whether their "
            "variance is finite. "
        )
        found.append("**The log evidence is a lower bound.** " + reason + REMEDIES)
    elif abs(value["bias"]) > max(value["mc_se"], 0.01):
        found.append(
            f"**The estimate is biased downwards**, by about {-value['bias']:.2f} nats. More samples shrink it."
        )
    if test["collapsed"]:
        names = ", ".join(f"z{number}" for number in test["collapsed"])
        one = len(test["collapsed"]) == 1
        what = f"mean of {names} hardly varies" if one else f"means of {names} hardly vary"
        found.append(
            f"**{len(test['collapsed'])} of {latents} latents {'is' if one else 'are'} collapsed**: the posterior "
            f"{what} over the data (variance below 0.01), so {'it carries' if one else 'they carry'} nothing. Fewer "
            "latents would do as well."
        )
    tenth = max(len(history) // 10, 1)
    if len(history) >= 2:
        last, before = float(np.mean(history[-tenth:])), float(np.mean(history[-2 * tenth : -tenth]))
        if last - before > max(0.1, 5e-4 * abs(last)):
            spell = f"the last {tenth} epochs" if tenth > 1 else "the last epoch"
            found.append(
                f"**The bound was still rising**, by {last - before:.2f} nats over {spell}. Train longer "
                "(`svi.epochs`)."
            )
    else:
        found.append("**One epoch was trained**, too few to tell whether the bound has settled. Raise `svi.epochs`.")
    ahead = train["elbo"] - bound
    if ahead > 3 * math.hypot(test["elbo"]["se"] or 0.0, train["elbo_se"] or 0.0) and ahead > 0.01 * abs(bound):
        found.append(
            f"**The training data fit better, by {ahead:.1f} nats**: the model memorises. Fewer parameters, fewer "
            'epochs (`svi.keep = "best"` with a `data.validation_fraction`) or more data help.'
        )
    if report["exact"] and report["exact"]["gap"] > 0.1:
        found.append(
            f"**The guide misses the exact posterior** by {report['exact']['gap']:.2f} nats on average. A richer "
            "family, such as FullNormal, or longer training would come closer."
        )
    return found


def _closer(report: Mapping[str, Any]) -> list[str]:
    """Say what a closer look gives reason to doubt, where one was asked for."""
    found = []
    reference, calibration = report.get("reference"), report.get("calibration")
    if reference and not reference["converged"]:
        n, settled = reference["n"], reference["n_settled"]
        found.append(
            f"**The reference posterior by {reference['method']} failed its own checks** on {n - settled} of {n} data: "
            "do not rely on it there. The closer look below says what failed."
        )
    if calibration and calibration["verdict"] == "miscalibrated":
        found.append(
            "**The guide is miscalibrated**: on data of its own model, its draws can be told from the true latents "
            f"(p = {calibration['p_value']:.2g}), best by {calibration['weakest']}, so that its means or intervals are "
            f"off there. {_where(report)}"
        )
    return found


def _where(report: Mapping[str, Any]) -> str:
    """Say whether a guide that fails on simulated data fails on those of the report as well, and what would help."""
    exact, gap, reference = (report.get(name) for name in ("exact", "gap", "reference"))
    remedy = "a richer family, such as FullNormal, a larger network or longer training would come closer."
    if gap and gap["amortization"] > gap["approximation"]:
        remedy = "a larger network or longer training would come closer, a richer family little."
    known = [(exact["gap"], "estimate")] if exact else []
    known += [(gap["total"], gap["kind"])] if gap else []
    known += [(reference.get("gap"), reference.get("kind"))] if reference else []
    judged = "held-out" if report["data"]["part"] == "test" else "training"
    for value, kind in known:
        if value is None:
            continue
        least = "at least " if kind == "lower bound" else ""
        if value > 0.1:
            return (
                f"On the {judged} data, too, it is off: log p(x) - ELBO, which is its KL, is {least}{value:.3f} nats; "
                + remedy
            )
        if kind == "estimate":
            return (
                f"On the {judged} data it is nearly exact: log p(x) - ELBO, which is its KL, is {value:.3f} nats. The "
                "fault shows only off them, where simulated data can lie."
            )
    return (
        "Simulated data can lie off the data that it was trained on, where it may be nearly exact; `--reference auto` "
        f"tells. If it is off there, too, {remedy}"
    )


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
        files("ppl_vae").joinpath("report.md.jinja").read_text(encoding="utf-8"),
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


def margin(error: float, digits: int = 3) -> str:
    """Write an error, with more digits where those asked for would make it zero, which it is not."""
    return f"{error:.{digits}f}" if error == 0 or error >= 0.5 * 10**-digits else f"{error:.1g}"


def counted(n: int) -> str:
    """Write a number of data."""
    return "1 datum" if n == 1 else f"{n:,} data"


def rendering(program: Any, x: Mapping[str, Tensor]) -> str:
    """Let Pyro render the sites and shapes of model and guide, for three data."""
    model, guide = replayed(program, {key: value[:3] for key, value in prepare(program, x).items()}, 0)
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
