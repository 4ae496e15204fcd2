r"""What the latent variables are used for: the codes that the guide gives, and the units that carry something."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.batches import as_batch
from ppl_vae.exact import Layout
from ppl_vae.traces import Structure, batch_of, prepare, scope, seeded, structure

__all__ = ["active_units", "codes"]

_DATA = 100  # data at a time


@torch.no_grad()
def codes(program: Any, x: Any, draws: int = 100, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Give mean and variance of the latent variables under the guide, by sampling.

    Args:
        program: any program; several latent sites stand side by side in the model's order.
        x: data, a tensor (n, *x) or a batch dict.
        draws: samples a datum, at least 2.
        seed: of the draws; the global random state is left alone.

    Returns:
        :math:`E_{q(z \mid x)}[z]` and :math:`\mathrm{Var}_{q(z \mid x)}[z]`, each of shape (n, z), in double precision.

    Raises:
        ValueError: for fewer than two draws, or data that do not fit.
    """
    if draws < 2:
        raise ValueError(f"Expected `draws` to be at least 2; got {draws}.")
    batch = prepare(program, as_batch(x))
    found = structure(program, batch, seed=seed)
    first = next(iter(batch.values()))
    means, variances = [], []
    for number, start in enumerate(range(0, len(first), _DATA)):
        part = {key: value[start : start + _DATA] for key, value in batch.items()}
        with scope(program), seeded(seed, "codes", number, device=first.device):
            z, _ = guide_draws(program, part, draws, found)
        means.append(z.mean(0))
        variances.append(z.var(0))
    return torch.cat(means), torch.cat(variances)


def guide_draws(program: Any, batch: dict[str, Tensor], draws: int, found: Structure) -> tuple[Tensor, Layout]:
    """Draw the latent variables from the guide.

    Returns:
        Draws (k, n, z) in double precision, several sites side by side in the model's order, and how they lie.
    """
    particles = pyro.plate("particles", draws, dim=-1 - found.nesting)
    trace = poutine.trace(particles(program.guide)).get_trace(**batch_of(program.guide, batch))
    return packed(trace, found), layout_of(trace, found)


def packed(trace: Any, found: Structure) -> Tensor:
    """Give the latent variables of a trace with particles, shape (k, n, z), in double precision."""
    values = {name: trace.nodes[name]["value"] for name in found.latents}
    return layout_of(trace, found).pack(values).double()


def layout_of(trace: Any, found: Structure) -> Layout:
    """Say how the latent variables of a trace with particles lie side by side."""
    sites = [(name, trace.nodes[name]["value"], trace.nodes[name]["fn"].event_dim) for name in found.latents]
    return Layout(sites, found.nesting)


def active_units(program: Any, x: Any, *, threshold: float = 0.01, draws: int = 100, seed: int = 0) -> Tensor:
    r"""Say of each latent whether it is active: :math:`\mathrm{Var}_x\, E_{q(z \mid x)}[z_j]` above a threshold.

    The variance of the sampled means is freed of what the sampling adds to it.

    Args:
        program: any program.
        x: data, at least two.
        threshold: in units of z squared.
        draws: samples a datum.
        seed: of the draws.

    Returns:
        Boolean, shape (z,).

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016), section 5.2.
    """
    mean, variance = codes(program, x, draws, seed=seed)
    if len(mean) < 2:
        return torch.zeros(mean.shape[1], dtype=torch.bool)
    return mean.var(0) - variance.mean(0) / draws > threshold
