"""The latent explorer: one HTML page on which a person moves through a model's latent space, offline."""

import base64
import contextlib
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.data.loading import Data
from ppl_vae.evaluation.latents import guide_moments
from ppl_vae.families.supports import Sphere, bounds, describe_support, of_entries
from ppl_vae.programs.closed_form import gaussians
from ppl_vae.programs.simulation import simulate
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.latent_plots import TWELVE
from ppl_vae.reports.measures import evaluation_split
from ppl_vae.reports.portable import Buffer, write_decoder

MOST_DATA = 10_000  # points on the plane
_CHOSEN = 500  # data that can be chosen, with their values and posteriors, at the most
_NUMBERS = 400_000  # float32 numbers of these data, and of a grid of decoded points, at the most


@torch.no_grad()
def explorer_page(program: Any, data: Data, *, title: str, seed: int = 0) -> str:
    """Write the latent explorer of a program as one HTML page, which needs no network and no server.

    The page shows the data of the evaluation split in the latent plane, at most 10,000 of them, and the mean of p(x|z)
    at a point that follows mouse, fingers and keys. `Linear`, `MLP`, `GatedMLP`, `Conv` and `ResidualConv` decoders
    run in the page; of others it has the means on a grid, at the other latents' averages.

    Args:
        program: a `VAE`, or a program with continuous latent sites per datum and one observed site of the data.
        data: its data.
        title: of the page.
        seed: of the choice of data and of all draws.

    Raises:
        ValueError: If there is no latent space to show: the whole data set counts as one datum, all latent sites are
            enumerated, or the latents or the observed site are of another kind.
    """
    part, rows = evaluation_split(program, data)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(next(iter(rows.values()))), generator=generator)[:MOST_DATA].sort().values
    chosen = {key: value[order.to(value.device)] for key, value in rows.items()}
    target = Target(program, chosen)
    _check(target, data)
    buffer, support = Buffer(), _support(target)
    found = _posteriors(target, seed)
    means = found["means"]
    spread = means.var(0, correction=0)
    latents = spread.argsort(descending=True, stable=True).tolist()
    each = data.features + len(latents) + len(latents) * (len(latents) + 1)
    few = min(_CHOSEN, max(_NUMBERS // each, 10), len(means))
    page: dict[str, Any] = {
        "title": title,
        "part": "held-out" if part == "test" else "training",
        "rows": [str(data.row_numbers[part][row]) for row in order[:few].tolist()],
        "n": len(means),
        "all": len(next(iter(rows.values()))),
        "few": few,
        "latents": len(latents),
        "order": latents,
        "limits": support if isinstance(support, str) else [v if math.isfinite(v) else None for v in support],
        "codes": buffer.add(means),
        "x": buffer.add(target.batch["x"][:few].flatten(1)),
        "q": _ellipses(found["q"], buffer, few),
        "exact": None if found["exact"] is None else _ellipses(found["exact"], buffer, few),
        "gaussian": found["gaussian"],
        "prior": buffer.add(_prior(target, seed)),
        **_labels(chosen, data),
        **_columns(data, target.batch["x"]),
    }
    decoder = write_decoder(program.likelihood, buffer) if isinstance(program, VAE) else None
    page["decoder"] = decoder
    page["given"] = _given(target, data) if decoder is not None else []
    page["grid"] = None if decoder is not None else _grid(target, means, sorted(latents[:2]), support, buffer)
    page["colours"] = TWELVE
    page["buffer"] = buffer.text()
    folder = files("ppl_vae.reports")
    template = jinja2.Template(folder.joinpath("explorer.html.jinja").read_text("utf-8"), autoescape=True)
    return template.render(page=page, script=folder.joinpath("explorer.js").read_text("utf-8"))


def _check(target: Target, data: Data) -> None:
    """Refuse a program without a latent space to show, by what it has instead."""
    structure = target.structure
    if structure.whole:
        raise ValueError(
            "Expected latent variables of each datum, for a latent space to explore; the whole data set counts as one "
            "datum of this program. Its report shows the posterior: report.md."
        )
    if others := [*structure.enumerated, *target.layout.discrete]:
        raise ValueError(
            f"Expected continuous latent variables alone, for a latent space to explore; got {', '.join(others)}."
        )
    few = target.rows(slice(2))
    with few.running(0):
        z = few.draws(1)
    if "x" not in target.batch or _decoded(few, z).shape[-1] != data.features:
        raise ValueError(
            "Expected one observed site whose mean has the columns of x, to show what a point decodes to; got "
            f"{', '.join(structure.observed)}."
        )


def _support(target: Target) -> tuple[float, float] | str:
    """The range of the latents, or `sphere` or `simplex`."""
    sites: Any = target.rows(slice(1)).traces(1, 0)[0].nodes
    supports = [of_entries(sites[name]["fn"].support) for name in target.structure.latents]
    if len(supports) == 1 and (isinstance(supports[0], Sphere) or supports[0] is constraints.simplex):
        return "sphere" if isinstance(supports[0], Sphere) else "simplex"
    limits = bounds(supports[0])
    if limits is None or any(bounds(support) != limits for support in supports):
        words = ", ".join(describe_support(support) for support in supports)
        raise ValueError(f"Expected latents of one range, for a plane to explore; got {words}.")
    return limits


def _posteriors(target: Target, seed: int) -> dict[str, Any]:
    """Means (n, z) of the guide, and of the first data the guide's and the exact posterior's covariance if known."""
    means, few = guide_moments(target, seed=seed)[0], target.rows(slice(_CHOSEN))
    found: dict[str, Any] = {"means": means, "gaussian": True, "exact": None}
    with torch.enable_grad():
        try:
            guide = gaussians(few, role="guide")
            found["q"] = guide.loc, guide.covariance
        except (ValueError, NotImplementedError):
            with few.running(seed, "explorer"):
                z = few.draws(1000)
            apart = z - z.mean(0)
            found |= {"gaussian": False, "q": (means, torch.einsum("kni,knj->nij", apart, apart) / (len(z) - 1))}
        with contextlib.suppress(ValueError, NotImplementedError):
            exact = gaussians(few, role="model")
            found["exact"] = exact.loc, exact.covariance
    return found


def _ellipses(moments: tuple[Tensor, Tensor], buffer: Buffer, few: int) -> dict[str, Any]:
    """Means and lower triangles of covariances of the first data."""
    loc, covariance = moments
    rows, columns = torch.tril_indices(*covariance.shape[1:])
    return {"mean": buffer.add(loc[:few]), "covariance": buffer.add(covariance[:few, rows, columns])}


def _prior(target: Target, seed: int) -> Tensor:
    """Draws of the latents from the model, (k, z), none where it cannot be drawn from."""
    few = target.rows(slice(500))
    try:
        with few.running(seed, "prior"):
            return simulate(few)[1]
    except ValueError:
        return torch.zeros(0)


def _labels(batch: Mapping[str, Tensor], data: Data) -> dict[str, Any]:
    """The label of each datum by its place among their names; -1 where it is not known."""
    if "y" not in batch:
        return {"labels": None, "names": []}
    values, place = batch["y"].cpu().unique(return_inverse=True)
    place = place - int(bool((values == -1).any()))
    words = data.classes or ()
    names = [words[value] if value < len(words) else f"{value:g}" for value in values.tolist() if value != -1]
    return {"labels": base64.b64encode(place.numpy().astype("<i2").tobytes()).decode(), "names": names}


def _columns(data: Data, x: Tensor) -> dict[str, Any]:
    """What the columns of x are: a picture and its shades, or names, units and words."""
    few = torch.where(x.isfinite(), x, x.nan_to_num().mean(0)).flatten(1).double()
    low, high = float(few.min()), float(few.max())
    n, transform = data.features, data.transform
    scale, loc = (np.broadcast_to(each, n).tolist() for each in (transform.scale, transform.loc))
    ranges = few.quantile(torch.tensor([0.01, 0.99], dtype=few.dtype, device=few.device), 0) if n <= 1000 else None
    return {
        "features": n,
        "shape": data.shape,
        "shades": [0.0, 1.0] if 0 <= low and high <= 1 else [low, high if high > low else low + 1],
        "columns": data.feature_names or [f"column {number + 1}" for number in range(n)],
        "words": {name: list(words) for name, words in (data.columns.categories or {}).items()},
        "scale": scale if data.shape is None else None,
        "loc": loc if data.shape is None else None,
        "ranges": None if ranges is None else ranges.T.tolist(),
    }


def _given(target: Target, data: Data) -> list[dict[str, Any]]:
    """What the decoder of a conditional VAE can be given: each label, or what the first datum has."""
    given = target.program.given
    if given is None or "likelihood" not in given.roles:
        return []
    own = {key: value[:1] for key, value in target.batch.items() if key in given.levels}
    if list(given.levels) != ["y"]:
        return [{"name": "as the first datum", "values": given(own)[0].tolist()}]
    names = data.classes or [str(label) for label in range(given.classes)]
    every = given({"y": torch.arange(given.classes, device=target.device)})
    return [{"name": name, "values": values} for name, values in zip(names, every.tolist(), strict=True)]


def _decoded(target: Target, z: Tensor) -> Tensor:
    """Mean of the observed site `x`, or of the only one, at latents (k, n, z): (k, n, x); of no columns if unknown."""
    sites: Any = target.trace("model", len(z), values=target.unflatten(z)).nodes
    names = target.structure.observed
    site = sites["x" if "x" in names else names[0]]["fn"]
    try:
        mean: Tensor = site.mean.expand(site.shape())
    except (NotImplementedError, AttributeError):
        return z[..., :0]
    return mean.reshape(*z.shape[:2], -1)


def _grid(target: Target, means: Tensor, axes: list[int], support: Any, buffer: Buffer) -> dict[str, Any]:
    """Means of p(x|z) over a grid of the two latents that vary most, the others at their average over the data."""
    size = math.isqrt(max(_NUMBERS // target.features, 81))
    size = min(size, 41) // 2 * 2 + 1 if len(axes) == 2 else min(size**2, 201)
    inside = means[:, axes]
    low, high = inside.amin(0), inside.amax(0)
    edge = 0.1 * (high - low).max()
    low, high = low - edge, high + edge
    least, most = (-math.inf, math.inf) if isinstance(support, str) else support
    low, high = low.clamp(least, most), high.clamp(least, most)
    ticks = [torch.linspace(a, b, size + 2, dtype=torch.float64)[1:-1] for a, b in zip(low, high, strict=True)]
    z = means.mean(0).repeat(size ** len(axes), 1)
    z[:, axes] = torch.cartesian_prod(*ticks).reshape(-1, len(axes)).to(z)
    if isinstance(support, str):
        z = z.clamp_min(0) if support == "simplex" else z
        z = z / z.norm(p=2 if support == "sphere" else 1, dim=-1, keepdim=True)
    mean = _decoded(target.rows(slice(1)), z.unsqueeze(1))
    return {"axes": axes, "at": [t.tolist() for t in ticks], "mean": buffer.add(mean), "rest": means.mean(0).tolist()}
