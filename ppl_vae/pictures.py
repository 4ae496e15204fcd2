"""The pictures of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import plots
from ppl_vae.data import Data
from ppl_vae.exact import gaussians
from ppl_vae.latents import codes
from ppl_vae.program import VAE
from ppl_vae.report import SHOWN, judged
from ppl_vae.simulation import simulate
from ppl_vae.traces import place, prepare, replayed, scope, seeded, structure

__all__ = ["figures"]


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
    part, rows = judged(program, data)
    whose = "Held-out" if part == "test" else "Training"
    test = {key: value[:SHOWN] for key, value in rows.items()}
    few = {key: value[:10] for key, value in test.items()}
    shape = data.shape
    if (means := _means(program, few, seed)) is not None:
        keep(
            "reconstructions.png",
            plots.reconstructions(few["x"], means, shape=shape),
            f"{whose} data, and the mean of p(x given z) for one draw of z from the guide.",
        )
    if (draws := _draws(program, test, seed)) is not None:
        grown = plots.samples(draws, shape=shape)
        keep("samples.png", grown, "Draws from the model: z from the prior, x from the likelihood.")
    if not isinstance(program, VAE) or len(program.likelihood.family.event_shape) > 1:
        return drawn
    latents = program.prior.family.event_shape.numel()
    found = codes(program, test, seed=seed)[0]
    order = found.var(0, correction=0).argsort(descending=True, stable=True).tolist()
    which = "" if latents <= 10 else "The ten latents that vary most over the data. "
    varied = plots.traversals(program, shape=shape, latents=sorted(order[:10]))
    keep("traversals.png", varied, f"{which}The mean of x as one latent runs from -2.5 to 2.5, the others at 0.")
    if latents < 2:
        return drawn
    axes = min(order[:2]), max(order[:2])
    with seeded(seed, "prior", device=place(program)[0]):
        prior = program.prior().expand([SHOWN]).sample()
    spread = plots.latent_scatter(found, test.get("y"), prior=prior, axes=axes)
    which = "" if latents == 2 else ", of the two latents that vary most"
    keep("latents.png", spread, f"{whose} data in the latent space: the guide's means{which}, over draws of the prior.")
    if latents == 2 and shape is not None:
        grid = plots.latent_grid(program, shape=shape)
        keep("manifold.png", grid, "The mean of x over the latent plane, a regular grid in the prior's quantiles.")
    try:
        with torch.enable_grad():
            q, p = gaussians(program, few, "guide"), gaussians(program, few, "model")
    except ValueError:
        return drawn
    pairs = (q.loc, q.covariance), (p.loc, p.covariance)
    beside = plots.ellipses(*pairs, axes=axes, x=few["x"], shape=shape)
    keep("posteriors.png", beside, f"The guide's ellipses over the exact posterior's. {whose} data.")
    return drawn


def _means(program: Any, few: dict[str, Tensor], seed: int) -> Tensor | None:
    """Give the mean of p(x|z) for one draw of z from the guide, where a site x observes the data as they are."""
    if isinstance(program, VAE):
        return program.reconstruct(few, seed=seed)
    nodes = replayed(program, prepare(program, few), seed)[0].nodes
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
    batch = prepare(program, {key: value[:64] for key, value in rows.items()})
    if "x" not in batch:
        return None
    try:
        with scope(program), seeded(seed, "samples", device=place(program, batch["x"])[0]):
            return simulate(program, batch, structure(program, batch))[0]["x"]
    except ValueError:
        return None
