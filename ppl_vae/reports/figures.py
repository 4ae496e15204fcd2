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
from ppl_vae.families.supports import bounds
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.simulation import simulate
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.class_plots import calibration_curve, class_pictures, swaps
from ppl_vae.reports.data_plots import reconstructions, samples, training_curve
from ppl_vae.reports.diagnostic_plots import bound_over_samples, gap_parts, rank_histograms, tail_shapes
from ppl_vae.reports.diagnostics import Results
from ppl_vae.reports.findings import counted
from ppl_vae.reports.latent_plots import latent_grid, latent_scatter, traversals
from ppl_vae.reports.measures import MOST_DATA, evaluation_split
from ppl_vae.reports.posterior_plots import ellipses, regions
from ppl_vae.reports.table_plots import column_errors, marginals, scatter_pairs

_CLASSES = 12  # classes that are drawn


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
    target: Target, data: Data, history: Mapping[str, Any], folder: Path, *, classes: Any = None, seed: int = 0
) -> dict[str, str]:
    """Draw a run: its training, data, latent space and, if known, exact posteriors.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        history: bounds of each epoch by name.
        folder: where the figures go.
        classes: the block `classes` of the report, if there is one.
        seed: of all draws.

    Returns:
        Captions by file name.
    """
    program, shape, album = target.program, data.shape, _Album(folder)
    curve = training_curve(history["elbo"], history["validation"])
    album.add("training.png", curve, "The bound over the epochs of training.")
    if classes is not None:
        caption = (
            "How often the most probable class is right, over its probability, with the number of data of each bin."
        )
        album.add("class_calibration.png", calibration_curve(classes["curve"]), caption)
    part, rows = evaluation_split(program, data)
    whose = "Held-out" if part == "test" else "Training"
    few = target.rows(slice(10))
    x = few.batch.get("x")
    by_column = data.columns.names is not None and shape is None
    if by_column and (means := _means(target.rows(slice(MOST_DATA)), seed)) is not None:
        caption = f"{whose} data: what one draw of z from the guide misses of each column."
        album.add("columns.png", column_errors(rows["x"][:MOST_DATA], means, data.columns), caption)
    elif (means := _means(few, seed)) is not None:
        caption = f"{whose} data, and the mean of p(x given z) for one draw of z from the guide."
        album.add("reconstructions.png", reconstructions(x, means, shape=shape), caption)  # type: ignore[arg-type]
    if (drawn := _draws(target, seed, MOST_DATA if by_column else 64)) is not None:
        caption = "Draws from the model: z from the prior, x from the likelihood."
        if by_column:
            each = data.train["x"][:MOST_DATA], drawn
            own, made = (torch.from_numpy(data.transform.inverse(part)) for part in each)  # in the data's units
            beside = own, made, data.columns
            album.add("samples.png", marginals(*beside), f"{caption} Each column beside the data's.")
            if (scattered := scatter_pairs(*beside)) is not None:
                album.add("pairs.png", scattered, "Pairs of columns: data below the diagonal, draws above it.")
        else:
            album.add("samples.png", samples(drawn, shape=shape), caption)
    if not isinstance(program, VAE) or len(program.likelihood.family.event_shape) > 1:
        return album
    latents, given, told = program.prior.family.event_shape.numel(), None, ""
    if program.given is not None:
        given = {key: target.batch[key][:1] for key in program.given_keys}
        told = f" Given {', '.join(given)} = {_told(data, given)}, as the first datum."
        if program.given.classes is not None and shape is not None:
            _draw_classes(target, data, album, seed)
    points = codes(target.rows(slice(MOST_DATA)), seed=seed)[0]
    order = points.var(0, correction=0).argsort(descending=True, stable=True).tolist()
    which = "" if latents <= 10 else "The ten latents that vary most over the data. "
    limits = bounds(program.prior.family.support)
    if limits == (-math.inf, math.inf):
        varied = traversals(program, shape=shape, latents=sorted(order[:10]), given=given)
        caption = f"{which}The mean of x as one latent runs from -2.5 to 2.5, the others at 0.{told}"
        album.add("traversals.png", varied, caption)
    if latents < 2:
        return album
    axes = min(order[:2]), max(order[:2])
    with fork_rng(seed, "prior", device=target.device):
        prior = program.prior(*program.context("prior", target.rows(slice(MOST_DATA)).batch))
        prior = prior.expand(prior.batch_shape or [MOST_DATA]).sample()
    labels = rows["y"][:MOST_DATA] if "y" in rows else None
    which = "" if latents == 2 else ", of the two latents that vary most"
    caption = f"{whose} data in the latent space: the guide's means{which}, over draws of the prior."
    album.add("latents.png", latent_scatter(points, labels, names=data.classes, prior=prior, axes=axes), caption)
    if latents == 2 and shape is not None and limits is not None:
        caption = f"The mean of x over the latent plane, a regular grid in the prior's quantiles.{told}"
        album.add("manifold.png", latent_grid(program, shape=shape, given=given), caption)
    try:
        with torch.enable_grad():
            p, q = gaussians(target, role="model"), gaussians(target, role="guide")
    except ValueError:
        return album
    pairs = [(one.loc[:10], one.covariance[:10]) for one in (q, p)]
    caption = f"The guide's ellipses over the exact posterior's. {whose} data."
    album.add("posteriors.png", ellipses(*pairs, axes=axes, x=x, shape=shape), caption)
    return album


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
    if bool((~results.pareto_k.isnan()).any()):
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
    """The mean of p(x|z) for one draw of z from the guide, if a site `x` observes the data as they are."""
    program, batch = target.program, target.batch
    if isinstance(program, VAE):
        return program.reconstruct(batch, seed=seed)
    nodes: Any = target.replay(seed)[0].nodes
    if "x" not in nodes or "x" not in batch or nodes["x"]["value"].shape != batch["x"].shape:
        return None
    try:
        return nodes["x"]["fn"].mean.expand(batch["x"].shape)  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError):
        return None


def _draws(target: Target, seed: int, count: int) -> Tensor | None:
    """Draw data from the model, as many as asked for or as there are, if it can be drawn from.

    Size factors, totals and what the model is given are those of the data.
    """
    few = target.rows(slice(count))
    if isinstance(target.program, VAE) and not target.program.likelihood.family.takes:
        given = None if target.program.given is None else few.batch
        return target.program.sample(count if given is None else few.n, given=given, seed=seed)
    if "x" not in few.batch:
        return None
    try:
        with few.running(seed, "samples"):
            return simulate(few)[0]["x"]
    except ValueError:
        return None
