r"""Nested weights of programs with global and local latent variables.

Where the local latents of data j = 1, ..., m are independent given the globals, in model and guide,

.. math::

    w = \frac{p(\theta)}{q(\theta)} \prod_j \frac1K \sum_{i=1}^K
        \frac{p(z_{ji}, x_j \mid \theta)}{q(z_{ji} \mid \theta)}, \qquad \theta \sim q,\ z_{ji} \sim q(z_j \mid \theta)

is on average p(x), as the joint weight is, with the variance of m local weights averaged out instead of multiplied.
It is the estimate of the likelihood in Importance sampling squared for Bayesian inference in latent variable models
(Tran, Scharth, Pitt and Kohn 2013), within importance sampling of the globals.
"""

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.programs.plates import frames, is_point
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import Given, batch_of, drawn_sites, plain_sites, unscaled

INNER = 20  # local draws for each draw of the globals, where nobody says how many


def inner_draws(target: Target, inner: int | None) -> int:
    """How many local draws each draw of the globals gets: as asked, else `INNER` where the program allows it, else 1.

    Raises:
        ValueError: If more than one is asked of a program whose local latents are not independent given the globals.
    """
    plate = target.structure.local
    if inner is None:
        return 1 if plate is None else INNER
    if check_int("inner", inner) > 1 and plate is None:
        raise ValueError(
            f"Expected a program with a plate of latent sites that are independent given those outside it, in model "
            f"and guide, for inner = {inner}; got none. Use inner = 1."
        )
    return inner


class Nested:
    """Draws of the globals, each with draws of the locals, and their weights.

    Args:
        target: a program whose structure has a `local` plate.
        samples: draws of the globals, k.
        inner: draws of the locals for each, K.
        key: of the draws.

    Attributes:
        model: trace of the model, with k K particles.
        weights: nested log weights, (k, 1) in nats.
        plain: what averages to the guide's ELBO, (k, 1).
        likelihood: what averages to E_q log p(x|z), (k, 1).
    """

    def __init__(self, target: Target, samples: int, inner: int, *key: int | str) -> None:
        self.target, self.samples, self.inner = target, samples, inner
        plate = str(target.structure.local)
        _, first = target.traces(samples, *key)
        given = {
            name: node["value"].repeat_interleave(inner, 0)
            for name, node in drawn_sites(first).items()
            if plate not in frames(node) and not is_point(node["fn"])  # a point is made anew of what is given
        }
        around = [frames(first.nodes[name]) for name in plain_sites(first)]
        self.dim = next(plates[plate] for plates in around if plate in plates)
        particles = pyro.plate("particles", samples * inner, dim=-1 - target.structure.nesting)
        with target.running(*key, "inner"):
            guide = particles(Given(given)(target.program.guide))
            self.guide = poutine.trace(guide).get_trace(**batch_of(target.program.guide, target.batch))
            replay = particles(poutine.replay(target.program.model, trace=self.guide))
            self.model = poutine.trace(replay).get_trace(**target.batch)
        count = samples, inner
        seen = self._split(self.model, self.model.observation_nodes)
        globals_, local = self._split(self.model, self.model.stochastic_nodes)
        q_globals, q_local = self._split(self.guide)
        outer = (globals_ + seen[0] - q_globals).reshape(count)[:, :1]
        self.local = (local + seen[1] - q_local).reshape(*count, -1)  # (k, K, m)
        self.weights = outer + (self.local.logsumexp(1) - math.log(inner)).sum(-1, keepdim=True)
        self.plain = outer + self.local.mean(1).sum(-1, keepdim=True)
        self.likelihood = seen[0].reshape(count)[:, :1] + seen[1].reshape(*count, -1).mean(1).sum(-1, keepdim=True)

    def _split(self, trace: Trace, names: Any = None) -> tuple[Tensor, Tensor]:
        """Log densities of sites outside the plate, (k K,), and inside it, (k K, m)."""
        particles = self.samples * self.inner
        outside = torch.zeros(particles, dtype=torch.float64, device=self.target.device)
        inside = outside.unsqueeze(-1)
        for name in plain_sites(trace, names):
            node: Any = trace.nodes[name]
            value = unscaled(node).double()
            if self.target.structure.local in frames(node):
                inside = inside + value.movedim(self.dim, -1).reshape(particles, -1, value.shape[self.dim]).sum(1)
            else:
                outside = outside + value.reshape(particles, -1).sum(1)
        return outside, inside

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and second moments (k, 1, z) of the latents given each draw of the globals: by guide, by weights."""
        z = self.target.flatten(self.model).unflatten(0, (self.samples, self.inner))  # (k, K, 1, z)
        shares = self._shares().unflatten(0, (self.samples, self.inner))
        return z.mean(1), z.square().mean(1), (shares * z).sum(1), (shares * z.square()).sum(1)

    def _shares(self) -> Tensor:
        """Share of each local draw among the K beside it, for each latent variable, (k K, 1, z); 1 / K of globals."""
        local = self.local.softmax(1).flatten(0, 1)  # (k K, m)
        parts = {}
        for name in self.target.structure.latents:
            node: Any = self.model.nodes[name]
            event = node["fn"].event_dim
            share = torch.full_like(local[:, :1], 1 / self.inner)
            plates = node["value"].dim() - event - 1
            if self.target.structure.local in frames(node):
                share = local.reshape(len(local), *(1,) * (plates + self.dim), -1, *(1,) * (-1 - self.dim))
            else:
                share = share.reshape(len(local), *(1,) * plates)
            parts[name] = share.reshape(*share.shape, *(1,) * event).expand(node["value"].shape)
        return self.target.layout.pack(parts)
