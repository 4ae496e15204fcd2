r"""The exact posterior and evidence of any linear-Gaussian program, read off its traces.

Given the data, the log density of the latent variables of such a program is a quadratic: its gradient at a point and
along each axis gives the whole of it, and with it the posterior's mean and covariance and the evidence, whatever the
wiring: several latent sites, inner plates, masks. Whether it is a quadratic is checked at further points, and refused
otherwise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from torch import Tensor

from ppl_vae.batches import as_batch
from ppl_vae.traces import batch_of, doubled, log_density, place, prepare, scope, seeded, structure, trace_pair

__all__ = ["exact_log_evidence", "exact_posterior"]

_DATA = 100  # data at a time
_PROBES = 4  # further points at which the quadratic is checked


@dataclass(frozen=True)
class Gaussian:
    """An unnormalised Gaussian of each datum, in double precision.

    Args:
        loc: shape (n, z).
        precision: shape (n, z, z).
        log_normaliser: log of the integral, in nats, shape (n,).
    """

    loc: Tensor
    precision: Tensor
    log_normaliser: Tensor

    @property
    def covariance(self) -> Tensor:
        """Shape (n, z, z)."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision))


def exact_posterior(program: Any, x: Any) -> MultivariateNormal:
    """Give p(z|x) of a linear-Gaussian program in closed form.

    Args:
        program: any program; several latent sites stand side by side in the model's order.
        x: data, a tensor (n, *x) or a batch dict.

    Returns:
        A multivariate normal of batch shape (n,). A program that is a module is computed in double precision, one that
        holds no tensors in that of the data.

    Raises:
        ValueError: where the program is not linear-Gaussian: there is no closed form.
    """
    posterior = gaussians(program, x, "model")
    return MultivariateNormal(posterior.loc, precision_matrix=posterior.precision)


def exact_log_evidence(program: Any, x: Any) -> Tensor:
    """Give log p(x) of a linear-Gaussian program in closed form, in nats, shape (n,), in double precision.

    The arguments and errors are those of `exact_posterior`.
    """
    return gaussians(program, x, "model").log_normaliser


def gaussians(program: Any, x: Any, role: str) -> Gaussian:
    """Read the Gaussian of each datum off the `model` (the posterior and the evidence) or the `guide` (normalised)."""
    twin, batch = doubled(program), prepare(program, as_batch(x))
    if place(twin)[1] is not None:
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    parts = [_read(twin, part, role) for part in _parts(batch)]
    return Gaussian(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("loc", "precision", "log_normaliser"))
    )


def _parts(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(next(iter(batch.values()))), _DATA):
        yield {key: value[start : start + _DATA] for key, value in batch.items()}


def _read(program: Any, batch: dict[str, Tensor], role: str) -> Gaussian:
    found = structure(program, batch)
    first = next(iter(batch.values()))
    with torch.no_grad(), scope(program), seeded(0, device=first.device):
        sites: Any = trace_pair(program, batch, 1, found.nesting)[1].nodes
    layout = Layout(
        [(name, sites[name]["value"], sites[name]["fn"].event_dim) for name in found.latents], found.nesting
    )
    origin = layout.pack({name: sites[name]["value"] for name in found.latents})[0].double()  # (n, z)
    n, size = origin.shape
    generator = torch.Generator().manual_seed(0)
    probes = 2 * torch.randn(_PROBES, n, size, generator=generator, dtype=torch.float64).to(origin.device)
    axes = torch.eye(size, dtype=torch.float64, device=origin.device).unsqueeze(1).expand(size, n, size)
    steps = torch.cat([torch.zeros_like(probes[:1]), axes, probes])
    points = (origin + steps).requires_grad_()
    with torch.enable_grad(), scope(program), seeded(0, device=first.device):
        given = {name: value.to(sites[name]["value"].dtype) for name, value in layout.unpack(points).items()}
        value = conditioned(getattr(program, role), given, batch, len(points), found.nesting)
        gradient = torch.autograd.grad(value.sum(), points)[0] if value.requires_grad else torch.zeros_like(points)
    value = value.detach()
    slope = gradient[0]  # (n, z)
    hessian = (gradient[1 : size + 1] - slope).transpose(0, 1)
    precision = -(hessian + hessian.mT) / 2
    expected = slope - (precision.unsqueeze(0) @ probes.unsqueeze(-1)).squeeze(-1)
    error = (gradient[size + 1 :] - expected).abs().amax((0, 2)) / gradient.abs().amax((0, 2)).clamp_min(1e-12)
    predicted = value[0].detach() + (probes * (slope - 0.5 * (precision @ probes.unsqueeze(-1)).squeeze(-1))).sum(-1)
    missed = (value[size + 1 :].detach() - predicted).abs().amax(0)  # nats
    rounding = max(torch.finfo(sites[name]["value"].dtype).eps for name in found.latents)
    bent = (error > 1e-4) | (missed > 1e-6 + 1e5 * rounding * value.detach().abs().amax(0))
    factor, failed = torch.linalg.cholesky_ex(precision)
    if bool(bent.any()):
        raise ValueError(
            f"Expected a linear-Gaussian {role}, for a closed form: Gaussian latent variables and a likelihood that is "
            f"Gaussian around an affine function of them; got one whose log density of {', '.join(found.latents)} is "
            "not quadratic."
        )
    if bool(failed.any()):
        raise ValueError(
            f"Expected a {role} whose precision of {', '.join(found.latents)} is positive definite; that of datum "
            f"{int(failed.nonzero()[0])} of its block is not, to rounding: its covariance is nearly singular."
        )
    shift = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    peak = value[0].detach() + 0.5 * (slope * shift).sum(-1)
    return Gaussian(origin + shift, precision, peak + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det)


def conditioned(
    function: Callable[..., Any], values: dict[str, Tensor], batch: dict[str, Tensor], samples: int, nesting: int
) -> Tensor:
    """Score a model or guide at given values of its latent sites, shape (samples, n)."""
    particles = pyro.plate("particles", samples, dim=-1 - nesting)
    trace = poutine.trace(particles(poutine.condition(function, data=values))).get_trace(**batch_of(function, batch))
    return log_density(trace, samples, len(next(iter(batch.values()))))


class Layout:
    """How the values of several latent sites lie in one vector a datum.

    Args:
        sites: name, a value `(k, *inner plates, n, *event)` and the number of event dimensions of each site.
        nesting: how many plates enclose a site at the most.
    """

    def __init__(self, sites: list[tuple[str, Tensor, int]], nesting: int) -> None:
        self.nesting = nesting
        self.sites = [
            (name, value.shape[1 : value.dim() - event], value.shape[value.dim() - event :])
            for name, value, event in sites
        ]

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Put the sites side by side, shape (k, n, z)."""
        flat = []
        for name, batch, event in self.sites:
            value = values[name].reshape(len(values[name]), -1, batch[-1], event.numel())
            flat.append(value.transpose(1, 2).flatten(2))
        return torch.cat(flat, -1)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Take a vector (k, n, z) apart, site by site."""
        sizes = [batch[:-1].numel() * event.numel() for _, batch, event in self.sites]
        values = {}
        for (name, batch, event), part in zip(self.sites, vector.split(sizes, -1), strict=True):
            inner = part.unflatten(-1, (batch[:-1].numel(), event.numel())).transpose(1, 2)
            values[name] = inner.reshape(len(vector), *batch, *event)
        return values
