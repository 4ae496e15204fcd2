"""Figures: everything that is drawn of a run, with captions by file name."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae._seeds import fork_rng
from ppl_vae.data.loading import Data
from ppl_vae.evaluation.latents import codes
from ppl_vae.evaluation.predictive import PredictiveCheck
from ppl_vae.families.supports import bounds
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.simulation import simulate
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.class_plots import calibration_curve, class_pictures, swaps
from ppl_vae.reports.data_plots import reconstructions, samples, training_curve
from ppl_vae.reports.diagnostic_plots import (
    bound_over_samples,
    gap_parts,
    moments,
    predictive_checks,
    rank_histograms,
    tail_shapes,
)
from ppl_vae.reports.diagnostics import Results
from ppl_vae.reports.findings import counted
from ppl_vae.reports.latent_plots import between, decoded, latent_grid, latent_scatter, traversals
from ppl_vae.reports.measures import MOST_DATA, evaluation_split
from ppl_vae.reports.path_plots import attribute, interpolation
from ppl_vae.reports.posterior_plots import ellipses, regions
from ppl_vae.reports.table_plots import column_errors, column_paths, marginals, scatter_pairs

_CLASSES = 12  # classes that are drawn
_SILENT = 0.02  # nats, or a variance, below which a latent says nothing
_PLANE = 4  # latents that say something, up to which two of them are shown, and principal components beyond


class _Album(dict[str, str]):
    """Captions by file name, of the figures that were saved to a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, drawn: Any, caption: str) -> None:
        """Save a figure, or the one that axes belong to."""
        figure = getattr(drawn, "figure", None) or drawn
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # names in a script that the font lacks
            figure.savefig(self.folder / name, dpi=120, bbox_inches="tight")
        self[name] = caption


@torch.no_grad()
def draw_run(
    target: Target,
    data: Data,
    history: Mapping[str, Any],
    folder: Path,
    *,
    report: Mapping[str, Any] | None = None,
    log_evidence: Tensor | None = None,
    predictive: PredictiveCheck | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Draw a run: its training, data, latent space and, if known, exact posteriors; nothing that would say nothing.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        history: bounds of each epoch by name.
        folder: where the figures go.
        report: the content of `report.json`, as far as it is known.
        log_evidence: of the evaluation split, (n,).
        predictive: the predictive check, if there is one.
        seed: of all draws.

    Returns:
        Captions by file name.
    """
    report, album = report or {}, _Album(folder)
    if len(history["elbo"]) > 1:
        kept = report.get("train", {}).get("kept_epoch")
        curve = training_curve(history["elbo"], history["validation"], kept=kept)
        album.add("training.png", curve, "The bound over the epochs of training.")
    if check := report.get("check"):
        caption = "Mean and standard deviation of each latent, by the guide and by what is nearest to the posterior."
        album.add("moments.png", moments(check["sites"]), caption)
    if (classes := report.get("classes")) is not None and len(classes["curve"]) > 1:
        caption = (
            "How often the most probable class is right, over its probability, with the number of data of each bin."
        )
        album.add("class_calibration.png", calibration_curve(classes["curve"]), caption)
    _draw_data(target, data, album, seed)
    if predictive is not None and predictive.names:
        whole = target.structure.whole
        what, by = ("as large as the data", "posterior") if whole else (f"of {counted(predictive.n)}", "prior")
        caption = (
            f"Predictive check: statistics of {len(predictive.drawn)} sets {what} drawn from the model, latents from "
            f"the {by}, and of {'the data' if whole else 'as many of the data'} (line); p with its Monte Carlo error. "
            "Furthest out first."
        )
        album.add("predictive.png", predictive_checks(predictive), caption)
    program = target.program
    if isinstance(program, VAE) and len(program.likelihood.family.event_shape) == 1:
        _draw_latents(target, data, album, report.get("test", {}).get("rates"), log_evidence, seed)
    return album


def _draw_data(target: Target, data: Data, album: _Album, seed: int) -> None:
    """Draw data beside what the model makes of them, and draws from the model."""
    part, rows = evaluation_split(target.program, data)
    whose, shape = "Held-out" if part == "test" else "Training", data.shape
    few = target.rows(slice(10))
    x = few.batch.get("x")
    by_column = data.columns.names is not None and shape is None
    if by_column and (means := _means(target.rows(slice(MOST_DATA)), seed)) is not None:
        caption = f"How far the reconstruction of each column is off, from one draw of the latents. {whose} data."
        caption += " At 1 (dotted) it is no better than the column's mean."
        caption += f" The worst 20 of {data.features} columns." if data.features > 20 else ""
        album.add("columns.png", column_errors(rows["x"][:MOST_DATA], means, data.columns), caption)
    elif (means := _means(few, seed)) is not None:
        caption = f"{whose} data, and the mean of p(x given z) for one draw of z from the guide."
        album.add("reconstructions.png", reconstructions(x, means, shape=shape), caption)  # type: ignore[arg-type]
    drawn, middle = _draws(target, seed, MOST_DATA if by_column else 64)
    if drawn is None:
        return
    caption = "Draws from the model: z from the prior, x from the likelihood."
    if by_column:
        each = data.train["x"][:MOST_DATA], drawn
        own, made = (torch.from_numpy(data.transform.inverse(part)) for part in each)  # in the data's units
        beside = own, made, data.columns
        most = f" The first 12 of {data.features} columns." if data.features > 12 else ""
        album.add("samples.png", marginals(*beside), f"{caption} Each column beside the data's.{most}")
        if (scattered := scatter_pairs(*beside)) is not None:
            caption = "Pairs of the columns that depend most on each other: data below the diagonal, draws above it."
            album.add("pairs.png", scattered, caption)
    else:
        if shape is None and len(drawn.unique()) <= 2:
            return  # lines of zeros and ones say nothing
        beside_it = "" if middle is None or shape is None else " Below each the mean of p(x given z)."
        album.add("samples.png", samples(drawn, means=middle, shape=shape), caption + beside_it)


def _draw_latents(
    target: Target, data: Data, album: _Album, rates: Any, log_evidence: Tensor | None, seed: int
) -> None:
    """Draw the latent space of a VAE: data in it, ways through it, and exact posteriors."""
    program, shape, limits = target.program, data.shape, bounds(target.program.prior.family.support)
    part, rows = evaluation_split(program, data)
    whose, latents = "Held-out" if part == "test" else "Training", program.prior.family.event_shape.numel()
    given, told, by_column = None, "", data.columns.names if shape is None else None
    if program.given is not None:
        given = {key: target.batch[key][:1] for key in program.given_keys}
        told = f" Given {', '.join(given)} = {_told(data, given)}, as the first datum."
        if program.given.classes is not None and shape is not None:
            _draw_classes(target, data, album, seed)
    many = target.rows(slice(MOST_DATA))
    points = codes(many, seed=seed)[0]
    said = points.new_tensor(rates) if rates else points.var(0, correction=0)
    order = [latent for latent in said.argsort(descending=True, stable=True).tolist() if said[latent] > _SILENT]
    real = limits == (-math.inf, math.inf)
    if real and order:
        with many.running(seed, "aggregate"):
            drawn = many.draws(1)[0]
        most, moved = (10, "The mean of x") if by_column is None else (4, "Each column of x")
        which = f"The {most} latents of highest rate." if len(order) > most else "Latents in the order of their rate."
        caption = f"{which} {moved} as one goes through its range over the data, the others at their median.{told}"
        if by_column is None:
            varied = traversals(program, shape=shape, latents=order[:10], codes=drawn, given=given)
        else:
            varied = _column_paths(program, data, drawn, order[:most], given)
            if data.features > 12:
                caption += f" The 12 of {data.features} columns that move most."
        album.add("traversals.png", varied, caption)
    if latents < 2 or not order:
        return
    many_active = len(order) > _PLANE
    axes = None if many_active else tuple(sorted(said.argsort(descending=True, stable=True)[:2].tolist()))
    with fork_rng(seed, "prior", device=target.device):
        prior = program.prior(*program.context("prior", many.batch))
        prior = prior.expand(prior.batch_shape or [MOST_DATA]).sample()
    labels, quantity = rows["y"][:MOST_DATA] if "y" in rows else None, "label"
    if labels is None and log_evidence is not None:
        labels, quantity = log_evidence[:MOST_DATA], "log p(x), nats"
    where = ", on their principal components" if many_active else ", of the two latents of highest rate" * (latents > 2)
    caption = f"{whose} data in the latent space: the guide's means{where}, over draws of the prior."
    about: Any = {"names": data.classes, "prior": prior, "axes": axes, "quantity": quantity}
    if latents == 2 or len(order) > 1:
        album.add("latents.png", latent_scatter(points, labels, **about), caption)
    if latents == 2 and shape is not None and limits is not None:
        caption = f"The mean of x over the central 98 % of the data's codes.{told}"
        album.add("manifold.png", latent_grid(program, shape=shape, codes=points, given=given), caption)
    if shape is not None and real and len(points) > 1:
        other = int((rows["y"][: len(points)] != rows["y"][0]).double().argmax()) if "y" in rows else 1
        way = interpolation(program, points[[0, other or 1]], shape=shape, given=given)
        caption = (
            f"The mean of x on the way from one datum's code to another's, along the line and the great circle.{told}"
        )
        album.add("interpolation.png", way, caption)
        value, name = (_slant(rows["x"], shape), "slanted") if "y" in rows else (rows["x"].flatten(1).mean(1), "bright")
        value = value[: len(points)]
        if float(value.std()) > 0:
            varied = attribute(program, points, value, shape=shape, name=name, given=given)
            caption = (
                f"Data made less and more {name}: moved along the direction in which the codes vary with it.{told}"
            )
            album.add("attribute.png", varied, caption)
    try:
        with torch.enable_grad():
            p, q = gaussians(target, role="model"), gaussians(target, role="guide")
    except ValueError:
        return
    first: tuple[int, int] = axes or (order[0], order[1])  # type: ignore[assignment]
    pairs = [(one.loc[:9], one.covariance[:9]) for one in (q, p)]
    caption = f"The guide's ellipses over the exact posterior's. {whose} data."
    album.add("posteriors.png", ellipses(*pairs, axes=first, x=target.batch["x"][:9], shape=shape), caption)


def _column_paths(program: VAE, data: Data, codes: Tensor, latents: list[int], given: Any) -> Any:
    """Draw what becomes of each column, in the data's units, along each of the latents."""
    steps = 25
    z = codes.detach().double().cpu().median(0).values.repeat(len(latents), steps, 1)
    z[range(len(latents)), :, latents] = between(codes[:, latents], 0.01, steps)
    words = [j for j, kind in enumerate(data.columns.kinds or ()) if kind == "category"]
    means = torch.from_numpy(decoded(program, z.flatten(0, 1), given, words))
    own, paths = (torch.from_numpy(data.transform.inverse(x)) for x in (data.train["x"][:MOST_DATA], means))
    return column_paths(own, paths.reshape(len(latents), steps, -1), latents, data.columns)


def _slant(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """By how many pixels the ink of a picture moves to the right from one row to the row above, (n,)."""
    ink = x.double().reshape(len(x), -1, *shape[-2:]).mean(1)
    ink = ink - ink.amin((1, 2), keepdim=True)
    ink = ink / ink.sum((1, 2), keepdim=True).clamp_min(1e-12)
    up, across = (torch.arange(side, dtype=torch.float64, device=x.device) for side in shape[-2:])
    mean = (ink.sum(2) @ up).unsqueeze(-1)
    return -(ink * across).sum(2).mul(up - mean).sum(1) / (ink.sum(2) * (up - mean).square()).sum(1).clamp_min(1e-12)


def _draw_classes(target: Target, data: Data, album: _Album, seed: int) -> None:
    """Draw pictures of each class, and the first data under other labels."""
    program, few, columns, shape = target.program, target.rows(slice(8)), 10, data.shape or ()
    count, own = min(program.given.classes, _CLASSES), {key: few.batch[key] for key in program.given_keys}
    made, decoded = [], []
    for label in range(count):
        batch = program.given_batch({key: value[:1] for key, value in own.items()} | {"y": label}, columns)
        with fork_rng(seed, "classes", device=target.device):
            z = program.prior(*program.context("prior", batch)).expand([columns]).sample()
        made.append(program.likelihood(z, *program.context("likelihood", batch)).mean)
        decoded.append(program.reconstruct(few.batch, given=own | {"y": label}, seed=seed))
    names = [_told(data, {"y": torch.tensor([label])}) for label in range(count)]
    caption = f"The mean of p(x given z and y) for {count} labels y, one draw of z from the prior per column."
    album.add("classes.png", class_pictures(torch.stack(made), names, shape), caption)
    caption = f"The style of a datum under {count} labels: the mean of p(x given z and y) at one draw of its z."
    album.add("swaps.png", swaps(few.batch["x"], torch.stack(decoded), names, shape), caption)


def _told(data: Data, given: Mapping[str, Tensor]) -> str:
    """What is given of one datum, in words."""
    values = [f"{value:g}" for part in given.values() for value in part.flatten().tolist()]
    return ", ".join([data.classes[int(given["y"][0])], *values[1:]] if "y" in given and data.classes else values)


def draw_diagnostics(results: Results, folder: Path, *, shape: tuple[int, ...] | None = None) -> dict[str, str]:
    """Draw the results of a run's diagnostics.

    Args:
        results: from `diagnose`.
        folder: where the figures go.
        shape: of a picture, (height, width), if the data are pictures.

    Returns:
        Captions by file name.
    """
    album = _Album(folder)
    if results.densities is not None:
        caption = "The guide over the exact posterior's density, for the first data."
        album.add("reference.png", regions(**results.densities, shape=shape), caption)
    curve, known = results.curve, results.known
    caption = f"The importance-weighted bound over the number of samples, mean over {counted(curve.bound.shape[1])}."
    if known is not None:
        least = ", a lower bound on average" if results.report["reference"]["kind"] == "lower bound" else ""
        caption = f"{caption[:-1]}; the line is log p(x) by {known.method}{least}."
    if curve.error[-1].isnan().any():
        caption += " The last has one group of draws, and so no error bar."
    album.add("bound.png", bound_over_samples(curve, truth=known.log_evidence if known else None), caption)
    if int((~results.pareto_k.isnan()).sum()) > 1:
        caption = "The tail shape k of each datum's weights, in rising order; above 0.5 they have no finite variance."
        album.add("pareto_k.png", tail_shapes(results.pareto_k), caption)
    if results.gap is not None and results.gap.family is not None:
        caption = "The gap of each datum and its two parts, in rising order of the whole."
        album.add("gap.png", gap_parts(results.gap.approximation, results.gap.amortization), caption)
    if results.calibration is not None:
        caption = (
            "Ranks of the true latents among the guide's draws, on data simulated from the model: flat if the guide is "
            "right; and the coverage of its regions."
        )
        album.add("calibration.png", rank_histograms(results.calibration), caption)
    return album


def _means(target: Target, seed: int) -> Tensor | None:
    """The mean of p(x|z) for one draw of z from the guide, if the site `x`, or the only one, observes the data."""
    program, batch = target.program, target.batch
    if isinstance(program, VAE):
        return program.reconstruct(batch, seed=seed)
    nodes: Any = target.replay(seed)[0].nodes
    site, *more = ["x"] if "x" in nodes else target.structure.observed or ["x"]
    if more or "x" not in batch or site not in nodes or nodes[site]["value"].shape != batch["x"].shape:
        return None
    if site != "x" and not bool((nodes[site]["value"] == batch["x"]).all()):
        return None
    try:
        return nodes[site]["fn"].mean.expand(batch["x"].shape)  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError):
        return None


def _draws(target: Target, seed: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Draw data from the model, as many as asked for or as there are, if it can be drawn from, with means of p(x|z).

    Size factors, totals and what the model is given are those of the data.
    """
    few, program = target.rows(slice(count)), target.program
    if isinstance(program, VAE) and not program.likelihood.family.takes:
        given = None if program.given is None else few.batch
        n = count if given is None else few.n
        with few.running(seed):
            batch = program.given_batch(given, n)
            z = program.prior(*program.context("prior", batch)).expand([n]).sample()
            x = program.likelihood(z, *program.context("likelihood", batch))
            return x.sample(), x.mean
    if "x" not in few.batch:
        return None, None
    try:
        with few.running(seed, "samples"):
            drawn = simulate(few)[0]["x"]
            return (None if torch.equal(drawn, few.batch["x"]) else drawn), None  # the same: they are given, not drawn
    except ValueError:
        return None, None
