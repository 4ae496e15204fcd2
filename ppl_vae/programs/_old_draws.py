"""Latent draws of traces (superseded by Target)."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.programs.latent_vector import Layout
from ppl_vae.programs.param_store import device_and_dtype
from ppl_vae.programs.traces import Structure, batch_of


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


def site_values(program: Any, layout: Layout, z: Tensor) -> dict[str, Tensor]:
    """Take latent vectors (k, n, z) apart, site by site, in the program's precision; discrete sites keep their type."""
    dtype = device_and_dtype(program)[1] or torch.get_default_dtype()
    return {name: value.to(layout.discrete.get(name, dtype)) for name, value in layout.unpack(z).items()}


def layout_of(trace: Any, found: Structure) -> Layout:
    """Say how the latent variables of a trace with particles lie side by side."""
    sites = [(name, trace.nodes[name]["value"], trace.nodes[name]["fn"].event_dim) for name in found.latents]
    return Layout(sites, found.nesting)
