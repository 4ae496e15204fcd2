"""Reports: what was fitted, how right it is, and what to distrust, in numbers, words and pictures."""

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import plots
from ppl_vae.compare import compare_posteriors
from ppl_vae.data import Data
from ppl_vae.evidence import Evidence, log_evidence
from ppl_vae.exact import exact_log_evidence, gaussians
from ppl_vae.latents import active_units, codes
from ppl_vae.ppca import PPCA
from ppl_vae.program import VAE
from ppl_vae.traces import batch_of, place, prepare, scope, seeded, structure, trace_pair

__all__ = ["distrust", "evaluate", "figures", "markdown"]

SHOWN = 1000  # data that pictures and checks on the training part look at


def evaluate(program: Any, data: Data, *, samples: int, seed: int = 0) -> tuple[dict[str, Any], Evidence]:
    """Measure a trained program on the test data.

    Args:
        program: any program.
        data: its data.
        samples: importance samples a datum.
        seed: of all draws.

    Returns:
        The blocks `test`, `exact` and `baseline` of a report, and the evidence of each test datum.
    """
    evidence = log_evidence(program, data.test, samples, seed=seed)
    test = evidence.summary()
    volume = float(data.protocol.get("log_volume") or 0.0)
    test["bits_per_dim"] = bits_per_dim(test["log_evidence"]["mean"] - volume, data.features)
    few = {key: value[:SHOWN] for key, value in data.test.items()}
    active = active_units(program, few, seed=seed)
    test["active_units"], test["latents"] = int(active.sum()), len(active)
    return {"test": test, "exact": _exact(program, data), "baseline": _baseline(program, data)}, evidence


def bits_per_dim(nats: float, features: int) -> float:
    """Turn a log probability of a datum, in nats, into bits a feature; lower is better."""
    return -nats / (features * math.log(2))


def _exact(program: Any, data: Data) -> dict[str, Any] | None:
    """Compare with the closed form, where there is one."""
    try:
        value = float(exact_log_evidence(program, data.test).mean())
    except ValueError:
        return None
    try:
        compared = compare_posteriors(program, data.test)
    except ValueError:
        return {"method": "closed-form", "log_evidence": value, "gap": None, "posterior_kl": None}
    gap, kl = float(compared.gap.mean()), float(compared.kl.mean())
    return {"method": "closed-form", "log_evidence": value, "gap": gap, "posterior_kl": kl}


def _baseline(program: Any, data: Data) -> dict[str, Any] | None:
    """Fit PPCA of the same latent size to the same data, where its density is of the same measure."""
    if not isinstance(program, VAE) or measure(program, data.test) != "density" or "mask" in data.train:
        return None
    try:
        ppca = PPCA.fit(data.train["x"].double(), program.prior.family.event_shape.numel())
    except ValueError:
        return None
    return {"ppca": {"log_evidence": float(ppca.log_evidence(data.test["x"].double()).mean())}}


def measure(program: Any, x: Mapping[str, Tensor]) -> str:
    """Say what a likelihood gives to data: a `probability mass`, or a `density`, whose nats depend on their units."""
    few = {key: value[:2] for key, value in prepare(program, x).items()}
    found = structure(program, few)
    with torch.no_grad(), scope(program), seeded(0, device=place(program, next(iter(few.values())))[0]):
        sites: Any = trace_pair(program, few, 1, found.nesting)[0].nodes
    discrete = {bool(sites[name]["fn"].support.is_discrete) for name in found.observed}
    return {frozenset({True}): "probability mass", frozenset({False}): "density"}.get(frozenset(discrete), "mixed")


def trained(program: Any, data: Data, *, seed: int = 0) -> dict[str, Any]:
    """Measure the bound on the training data after training, at most 1,000 of them, as `evaluate` does on the test."""
    some = {key: value[:SHOWN] for key, value in data.train.items()}
    return log_evidence(program, some, 10, seed=seed).summary()["elbo"]  # type: ignore[no-any-return]


def distrust(report: Mapping[str, Any], history: list[float], *, train_se: float = 0.0) -> list[str]:
    """Say in plain words what the figures give reason to doubt, and what would help.

    Args:
        report: what `report.json` says.
        history: the bound of each epoch.
        train_se: standard error over data of the bound on the training data.
    """
    test, train, found = report["test"], report["train"], []
    latents = test["latents"]
    shape, value, bound = test["pareto_k"], test["log_evidence"], test["elbo"]["mean"]
    if value["kind"] == "lower bound" and shape["above_0.5"] is not None:
        found.append(
            f"**The log evidence is a lower bound, not an estimate.** For {shape['above_0.5']:.0%} of the held-out "
            f"data "
            "the importance weights have a tail shape k above 0.5: no finite variance, so no error bar would hold. "
            "More "
            "samples (`ppl-vae evaluate --samples`) or a guide nearer to the posterior tighten it."
        )
    elif value["kind"] == "lower bound":
        found.append("**The log evidence is a lower bound.** Too few samples a datum to tell how good they are.")
    elif abs(value["bias"]) > max(value["mc_se"], 0.01):
        found.append(
            f"**The estimate is biased downwards**, by about {-value['bias']:.2f} nats. More samples shrink it."
        )
    if test["active_units"] < latents:
        found.append(
            f"**{latents - test['active_units']} of {latents} latents are collapsed**: their posterior means hardly "
            f"vary "
            "over the held-out data (variance below 0.01), so they carry nothing. Fewer latents would do as well."
        )
    tenth = max(len(history) // 10, 1)
    if len(history) >= 2:
        last, before = float(np.mean(history[-tenth:])), float(np.mean(history[-2 * tenth : -tenth]))
        if last - before > max(0.1, 5e-4 * abs(last)):
            rise = f"by {last - before:.2f} nats over the last {tenth} epoch{'s' if tenth > 1 else ''}"
            found.append(f"**The bound was still rising**, {rise}. Train on (`svi.epochs`).")
    ahead = train["elbo"] - bound
    if ahead > 3 * math.hypot(test["elbo"]["se"] or 0.0, train_se) and ahead > 0.01 * abs(bound):
        found.append(
            f"**The training data fit better, by {ahead:.1f} nats**: the model memorises. Fewer parameters, fewer "
            f"epochs "
            '(`svi.keep = "best"` with a `data.validation_fraction`) or more data help.'
        )
    if report["exact"] and (report["exact"]["gap"] or 0.0) > 0.1:
        found.append(
            f"**The guide misses the exact posterior** by {report['exact']['gap']:.2f} nats on average. A richer "
            f"family, "
            "such as FullNormal, or longer training would come closer."
        )
    return found


def markdown(
    report: Mapping[str, Any], *, title: str, words: str, program: str, doubts: list[str], pictures: Mapping[str, str]
) -> str:
    """Write a report for people.

    Args:
        report: what `report.json` says.
        title: the heading.
        words: what was fitted.
        program: Pyro's rendering of the program's sites and shapes.
        doubts: what `distrust` found.
        pictures: captions by file name.
    """
    test, exact, value = report["test"], report["exact"], report["test"]["log_evidence"]
    sign = ">= " if value["kind"] == "lower bound" else ""
    rows = [
        ("ELBO", f"{report['train']['elbo']:.3f}", f"{test['elbo']['mean']:.3f}", _error(test["elbo"]), "estimate"),
        ("log evidence", "", f"{sign}{value['mean']:.3f}", _error(value), value["kind"]),
        ("rate", "", f"{test['rate']:.3f}", "", "estimate"),
        ("distortion", "", f"{test['distortion']:.3f}", "", "estimate"),
    ]
    if exact:
        rows.append(("exact log evidence", "", f"{exact['log_evidence']:.3f}", "0", exact["method"]))
        if exact["posterior_kl"] is not None:
            rows.append(("exact KL of the guide", "", f"{exact['posterior_kl']:.4f}", "0", exact["method"]))
    if report["baseline"]:
        known = report["baseline"]["ppca"]["log_evidence"]
        rows.append(("PPCA's log evidence", "", f"{known:.3f}", "0", "closed-form"))
    keys = ("binarization", "scaling", "dequantization")
    notes = [f"{key} {report['data']['protocol'][key]}" for key in keys if report["data"]["protocol"][key] != "none"]
    template = jinja2.Template(
        files("ppl_vae").joinpath("report.md.jinja").read_text(), undefined=jinja2.StrictUndefined
    )
    return template.render(
        report=report,
        title=title,
        words=words,
        program=program.rstrip(),
        doubts=doubts,
        pictures=pictures,
        rows=rows,
        latents=test["latents"],
        protocol=f" ({', '.join(notes)})" if notes else "",
    )


def _error(figure: Mapping[str, Any]) -> str:
    spread = [] if figure["se"] is None else [f"{figure['se']:.3f} data"]
    noise = figure["mc_se"]
    known = noise is not None and not math.isnan(noise) and figure.get("kind") != "lower bound"
    return ", ".join([*spread, f"{noise:.4f} mc"] if known else spread)


def rendering(program: Any, x: Mapping[str, Tensor]) -> str:
    """Let Pyro render the sites and shapes of model and guide, for three data."""
    few = {key: value[:3] for key, value in prepare(program, x).items()}
    with torch.no_grad(), scope(program), seeded(0, device=place(program, next(iter(few.values())))[0]):
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, few))
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**few)
    parts = []
    for role, trace in (("model", model), ("guide", guide)):
        for name in list(trace.param_nodes):
            trace.remove_node(name)
        trace.compute_log_prob()
        parts.append(f"{role}\n{trace.format_shapes()}")
    return "\n\n".join(parts)


def describe(program: Any, spec: Any) -> str:
    """Say in a few sentences what was fitted."""
    objective = f"Trained by {spec.svi.elbo}: ELBO = E_q[log p(x, z) - log q(z | x)], a lower bound of log p(x)."
    if not isinstance(program, VAE):
        summary = (type(program).__doc__ or "").strip().split("\n")[0]
        return f"The program `{type(program).__name__}`: {summary}\n{objective}"
    z, x = program.prior.family.event_shape.numel(), program.likelihood.family.event_shape.numel()
    return (
        f"A variational autoencoder of {z} latents and {x} features.\n\n"
        f"- prior p(z): {_part(spec.prior)}\n"
        f"- likelihood p(x | z): {_part(spec.likelihood)}\n"
        f"- approximate posterior q(z | x): {_part(spec.posterior)}\n\n{objective}"
    )


def _part(table: Any) -> str:
    keys = table.model_dump(exclude_none=True)
    network = keys.pop("network", None)
    settings = ", ".join(f"{key} {value}" for key, value in keys.items() if key != "family")
    text = f"`{keys['family']}`" + (f" ({settings})" if settings else "")
    if network is None:
        return text
    inner = ", ".join(f"{key} {value}" for key, value in network.items() if key != "family")
    return f"{text} on `{network['family']}`" + (f" ({inner})" if inner else "")


@torch.no_grad()
def figures(program: Any, data: Data, history: Mapping[str, Any], folder: Path, *, seed: int = 0) -> dict[str, str]:
    """Draw what can be drawn of a run into a folder; give captions by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}

    def keep(name: str, picture: Any, caption: str) -> None:
        figure = getattr(picture, "figure", None) or picture
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        drawn[name] = caption

    curve = plots.training_curve(history["elbo"], history["validation"])
    keep("training.png", curve, "The bound over the epochs of training.")
    if not isinstance(program, VAE) or len(program.likelihood.family.event_shape) > 1:
        return drawn
    test = {key: value[:SHOWN] for key, value in data.test.items()}
    few = {key: value[:10] for key, value in test.items()}
    shape, latents = data.shape, program.prior.family.event_shape.numel()
    means = program.reconstruct(few, seed=seed)
    keep(
        "reconstructions.png",
        plots.reconstructions(few["x"], means, shape=shape),
        "Held-out data, and below each the mean of p(x|z) for one draw of z from q(z|x).",
    )
    draws = plots.samples(program.sample(64, seed=seed), shape=shape)
    keep("samples.png", draws, "Draws from the model: z from the prior, x from the likelihood.")
    varied = plots.traversals(program, shape=shape)
    keep("traversals.png", varied, "The mean of x as one latent runs from -2.5 to 2.5, the others at 0.")
    if latents < 2:
        return drawn
    with seeded(seed, "prior", device=place(program)[0]):
        prior = program.prior().expand([SHOWN]).sample()
    spread = plots.latent_scatter(codes(program, test, seed=seed)[0], test.get("y"), prior=prior)
    keep(
        "latents.png",
        spread,
        "The aggregate posterior, as means of q(z|x) of held-out data, over draws of the prior; the first two latents.",
    )
    if latents == 2 and shape is not None:
        grid = plots.latent_grid(program, shape=shape)
        keep("manifold.png", grid, "The mean of x over the latent plane, a regular grid in the prior's quantiles.")
    try:
        q, p = gaussians(program, few, "guide"), gaussians(program, few, "model")
    except ValueError:
        return drawn
    pairs = (q.loc, q.covariance), (p.loc, p.covariance)
    beside = plots.ellipses(*pairs, x=few["x"], shape=shape)
    keep("posteriors.png", beside, "The guide's ellipses over the exact posterior's, of a few held-out data.")
    return drawn
