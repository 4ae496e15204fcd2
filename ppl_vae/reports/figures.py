"""The pictures of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.loading import Data
from ppl_vae.evaluation.bounds import bound_curve
from ppl_vae.evaluation.calibration import calibrate
from ppl_vae.evaluation.evidence import Evidence
from ppl_vae.evaluation.gap import inference_gap
from ppl_vae.evaluation.latents import codes
from ppl_vae.infer.density_grid import DensityGrid, guide_grid, posterior_grid
from ppl_vae.infer.reference import Reference
from ppl_vae.programs.closed_form import exact_log_evidence, gaussians
from ppl_vae.programs.latent_vector import Joint
from ppl_vae.programs.param_store import device_and_dtype, scope, to_double
from ppl_vae.programs.simulation import simulate
from ppl_vae.programs.traces import check_batch, replayed, structure
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.data_plots import reconstructions, samples, training_curve
from ppl_vae.reports.diagnostic_plots import bound_over_samples, gap_parts, rank_histograms, tail_shapes
from ppl_vae.reports.findings import bound_words, calibration_words, counted, gap_words, reference_words
from ppl_vae.reports.latent_plots import latent_grid, latent_scatter, traversals
from ppl_vae.reports.measures import (
    OTHERWISE,
    SHOWN,
    SIMULATED,
    bound_block,
    calibration_block,
    choose_rows,
    evaluation_split,
    first_rows,
    gap_block,
    reference_block,
    relied_data,
    settled_data,
)
from ppl_vae.reports.posterior_plots import ellipses, regions


@torch.no_grad()
def figures(program: Any, data: Data, history: Mapping[str, Any], folder: Path, *, seed: int = 0) -> dict[str, str]:
    """Draw what can be drawn of a run into a folder; give captions by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}

    def keep(name: str, picture: Any, caption: str) -> None:
        figure = getattr(picture, "figure", None) or picture
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        drawn[name] = caption

    curve = training_curve(history["elbo"], history["validation"])
    keep("training.png", curve, "The bound over the epochs of training.")
    part, rows = evaluation_split(program, data)
    whose = "Held-out" if part == "test" else "Training"
    test = {key: value[:SHOWN] for key, value in rows.items()}
    few = {key: value[:10] for key, value in test.items()}
    shape = data.shape
    if (means := _means(program, few, seed)) is not None:
        keep(
            "reconstructions.png",
            reconstructions(few["x"], means, shape=shape),
            f"{whose} data, and the mean of p(x given z) for one draw of z from the guide.",
        )
    if (draws := _draws(program, test, seed)) is not None:
        grown = samples(draws, shape=shape)
        keep("samples.png", grown, "Draws from the model: z from the prior, x from the likelihood.")
    if not isinstance(program, VAE) or len(program.likelihood.family.event_shape) > 1:
        return drawn
    latents = program.prior.family.event_shape.numel()
    found = codes(program, test, seed=seed)[0]
    order = found.var(0, correction=0).argsort(descending=True, stable=True).tolist()
    which = "" if latents <= 10 else "The ten latents that vary most over the data. "
    varied = traversals(program, shape=shape, latents=sorted(order[:10]))
    keep("traversals.png", varied, f"{which}The mean of x as one latent runs from -2.5 to 2.5, the others at 0.")
    if latents < 2:
        return drawn
    axes = min(order[:2]), max(order[:2])
    with fork_rng(seed, "prior", device=device_and_dtype(program)[0]):
        prior = program.prior().expand([SHOWN]).sample()
    spread = latent_scatter(found, test.get("y"), prior=prior, axes=axes)
    which = "" if latents == 2 else ", of the two latents that vary most"
    keep("latents.png", spread, f"{whose} data in the latent space: the guide's means{which}, over draws of the prior.")
    if latents == 2 and shape is not None:
        grid = latent_grid(program, shape=shape)
        keep("manifold.png", grid, "The mean of x over the latent plane, a regular grid in the prior's quantiles.")
    try:
        with torch.enable_grad():
            q, p = gaussians(program, few, "guide"), gaussians(program, few, "model")
    except ValueError:
        return drawn
    pairs = (q.loc, q.covariance), (p.loc, p.covariance)
    beside = ellipses(*pairs, axes=axes, x=few["x"], shape=shape)
    keep("posteriors.png", beside, f"The guide's ellipses over the exact posterior's. {whose} data.")
    return drawn


def _means(program: Any, few: dict[str, Tensor], seed: int) -> Tensor | None:
    """Give the mean of p(x|z) for one draw of z from the guide, where a site x observes the data as they are."""
    if isinstance(program, VAE):
        return program.reconstruct(few, seed=seed)
    nodes = replayed(program, check_batch(program, few), seed)[0].nodes
    if "x" not in nodes or "x" not in few or nodes["x"]["value"].shape != few["x"].shape:
        return None
    try:
        return nodes["x"]["fn"].mean.expand(few["x"].shape)  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError):
        return None


def _draws(program: Any, rows: dict[str, Tensor], seed: int) -> Tensor | None:
    """Draw up to 64 data from the model, where data can be drawn from it."""
    if isinstance(program, VAE):
        return program.sample(64, seed=seed)
    batch = check_batch(program, {key: value[:64] for key, value in rows.items()})
    if "x" not in batch:
        return None
    try:
        with scope(program), fork_rng(seed, "samples", device=device_and_dtype(program, batch["x"])[0]):
            return simulate(program, batch, structure(program, batch))[0]["x"]
    except ValueError:
        return None


PANELS = 8  # data whose posteriors are drawn


def scrutinise(
    program: Any,
    rows: Mapping[str, Tensor],
    evidence: Evidence,
    folder: Path,
    *,
    truth: Reference | None = None,
    gap: bool = False,
    calibration: bool = False,
    data: int | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Look closer at a trained program, as far as asked.

    Args:
        program: any program that `consult` did not refuse.
        rows: the data that were evaluated, as a batch dict.
        evidence: their evidence.
        folder: takes the pictures.
        truth: the reference of the first data, from `consult`.
        gap: whether to split log p(x) - ELBO.
        calibration: whether to test the guide on data of the model.
        data: how many data to look at where there is no reference.
        shape: of a picture, where the data are pictures.
        seed: of all draws.

    Returns:
        Blocks for `report.json`, findings in words, and captions by file name.
    """
    blocks: dict[str, Any] = {}
    words: list[str] = []
    drawn: dict[str, str] = {}

    def keep(name: str, picture: Any, caption: str) -> None:
        (getattr(picture, "figure", None) or picture).savefig(folder / name, dpi=120, bbox_inches="tight")
        drawn[name] = caption

    folder.mkdir(parents=True, exist_ok=True)
    asked = OTHERWISE if data is None else check_int("data", data)
    looked = first_rows(program, rows, asked if truth is None else len(truth.loc))
    known, sure = None, False
    if truth is not None:
        settled = settled_data(truth)
        relied = relied_data(truth, settled)
        blocks["reference"] = reference_block(truth, settled, relied, evidence)
        words.append(reference_words(blocks["reference"], split=gap))
        if truth.loc.shape[1] == 2:
            try:
                picture = _posteriors(program, looked, truth, evidence, shape, seed)
            except ValueError as error:
                words.append(f"The exact posterior is not drawn. {error}")
            else:
                keep("reference.png", picture, "The guide over the exact posterior's density, of the first data.")
        if bool(relied.any()):
            known, sure = choose_rows(truth, relied), bool(settled.any())
            looked = {key: value[relied.to(value.device)] for key, value in looked.items()}
        elif truth.method == "nuts":
            looked = first_rows(program, rows, OTHERWISE)
    curve = bound_curve(program, looked, evidence.samples, seed=seed)
    blocks["bound"] = bound_block(curve)
    words.append(bound_words(blocks["bound"]))
    keep(
        "bound.png",
        bound_over_samples(curve, truth=None if known is None else known.log_evidence),
        f"The importance-weighted bound over the number of samples, mean over {counted(curve.bound.shape[1])}"
        + (f"; the line is log p(x) by {known.method}{'' if sure else ', a lower bound on average'}." if known else ".")
        + (" At the last there is one group of draws, and so no error bar." if curve.error[-1].isnan().any() else ""),
    )
    blocks["pareto_k"] = [round(k, 4) for k in evidence.pareto_k.tolist()]
    if bool((~evidence.pareto_k.isnan()).any()):
        keep(
            "pareto_k.png",
            tail_shapes(evidence.pareto_k),
            "The tail shape k of each datum's weights, in rising order; above 0.5 they have no finite variance.",
        )
    if gap:
        given: Any = known
        if known is None:
            given = _exact(program, looked)
            sure = given is not None
        split = inference_gap(program, looked, log_evidence=given, seed=seed)
        blocks["gap"] = gap_block(split, sure=sure)
        words.append(gap_words(blocks["gap"]))
        keep(
            "gap.png",
            gap_parts(split.approximation, split.amortization),
            "The gap of each datum and its two parts, in rising order of the whole.",
        )
    if calibration:
        found = calibrate(program, rows, simulations=SIMULATED, seed=seed)
        blocks["calibration"] = calibration_block(found)
        words.append(calibration_words(found))
        keep(
            "calibration.png",
            rank_histograms(found),
            "Ranks of the true latents among the guide's draws, on data of the model: flat where the guide is right; "
            "and the coverage of its regions.",
        )
    return blocks, words, drawn


def _exact(program: Any, rows: dict[str, Tensor]) -> Tensor | None:
    try:
        return exact_log_evidence(program, rows)
    except ValueError:
        return None


def _posteriors(
    program: Any,
    rows: dict[str, Tensor],
    truth: Reference,
    evidence: Evidence,
    shape: tuple[int, ...] | None,
    seed: int,
) -> Figure:
    """Draw the guide over the exact posterior of the first data, whatever the shape of either."""
    twin = to_double(program)
    few = check_batch(twin, {key: value[:PANELS] for key, value in rows.items()})
    joint = Joint(twin, few)
    exact = posterior_grid(joint, truth.loc[:PANELS], truth.covariance[:PANELS])
    guide, name = _guide(joint, seed)
    kl = exact.log_mass - evidence.elbo[: len(exact.log_mass)]
    error = evidence.elbo_mc_se[: len(exact.log_mass)]
    return regions(exact, guide, name=name, kl=kl, error=error, x=few.get("x"), shape=shape)


def _guide(joint: Joint, seed: int) -> tuple[DensityGrid | tuple[Tensor, Tensor], str]:
    """Give a Gaussian guide by its moments, others by their density, or by moments where they have none; and a name."""
    name = "guide q(z|x)"
    try:
        q = gaussians(joint.program, joint.batch, "guide")
    except ValueError:
        with scope(joint.program), fork_rng(seed, "guide", device=joint.device):
            z = joint.latents(joint.draw("guide", 1000))
        apart = z - z.mean(0)
        moments = z.mean(0), torch.einsum("kny,knz->nyz", apart, apart) / (len(z) - 1)
        try:
            return guide_grid(joint, *moments), name
        except ValueError:
            return moments, f"{name}, a Gaussian of its moments"
    return (q.loc, q.covariance), name
