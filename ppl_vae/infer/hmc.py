"""Hamiltonian moves along a path of densities between a base and the joint."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import pyro
import torch
from torch import Tensor

from ppl_vae._checks import check_choice
from ppl_vae.programs.capture import Captured
from ppl_vae.programs.joint import Joint


@dataclass(frozen=True)
class Chains:
    """Where k chains for each of n data are.

    Args:
        u: latent vectors of the `Joint`, (k, n, z).
        base: log density of the base, (k, n).
        tilt: log density of the joint minus that of the base, (k, n).
        base_slope: gradient of `base`, (k, n, z).
        tilt_slope: gradient of `tilt`, (k, n, z).
    """

    u: Tensor
    base: Tensor
    tilt: Tensor
    base_slope: Tensor
    tilt_slope: Tensor

    def where(self, accept: Tensor, other: "Chains") -> "Chains":
        """These chains where `accept`, (k, n), is true, and the others elsewhere."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(Chains)]
        return Chains(*(torch.where(accept if a.dim() == 2 else accept.unsqueeze(-1), a, b) for a, b in pairs))


class Path:
    r"""The densities :math:`f_\beta` between a base and the joint.

    Args:
        joint: of the program and its data.
        start: the base, `"prior"` or `"guide"`.

    Raises:
        ValueError: If the base is neither, or it is a guide with auxiliary sites.
    """

    def __init__(self, joint: Joint, start: Literal["prior", "guide"] = "prior") -> None:
        check_choice("start", start, ("prior", "guide"))
        if start == "guide" and joint.auxiliary:
            raise ValueError(f"Expected a guide without auxiliary sites for start='guide'; got {joint.auxiliary[0]!r}.")
        self.joint, self.start = joint, start
        self._both = Captured(self._ends)
        self._steep = Captured(lambda u: self._ends(u)[2:])

    def draw(self, k: int) -> Chains:
        """Draw k chains for each datum from the base."""
        return self.at(self.joint.draw(self.start, k))

    def at(self, u: Tensor) -> Chains:
        """Evaluate both ends of the path and their gradients at u, (k, n, z)."""
        u = u.detach().contiguous()
        return Chains(u, *self._both(u))

    def slopes(self, u: Tensor) -> tuple[Tensor, ...]:
        """Gradients of both ends, `base_slope` and `tilt_slope`, for less work than `at`."""
        return self._steep(u.detach())

    def _ends(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prior, likelihood = self.joint.log_probs(u)
            if self.start == "prior":
                ends = prior, likelihood, slope(prior, u), slope(likelihood, u)
            else:
                base = self.joint.log_guide(u)
                inner, whole = slope(base, u), prior + likelihood
                ends = base, whole - base, inner, slope(whole, u) - inner
        return tuple(end.detach() for end in ends)


def slope(value: Tensor, u: Tensor) -> Tensor:
    """Gradient of the sum of `value` with respect to u."""
    if not value.requires_grad:
        return torch.zeros_like(u)
    # ones_like would keep `value` in a captured graph
    ones = torch.ones(value.shape, dtype=value.dtype, device=value.device)
    gradient = torch.autograd.grad(value, u, ones, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(u) if gradient is None else gradient


RATE = 0.65  # of accepted moves, the target of the step size
Transition = Callable[[Chains, float, int], Chains]


class HMC:
    r"""Hamiltonian moves of all chains and data at once, with a step size for each temperature and datum.

    A leapfrog of :math:`H = -\log f_\beta(u) + |p|^2 / 2`, accepted by Metropolis' rule. The step size is multiplied
    by a number drawn uniformly from 0.8 to 1.2, so that no orbit closes. A move obeys detailed balance, so it is its
    own reverse.

    Args:
        path: the densities.
        scale: of each latent variable, (n, z): the unit of the step sizes.
        steps: step sizes, (temperatures + 1, n).
        leapfrog: steps in a move.

    References:
        MCMC Using Hamiltonian Dynamics (Neal 2011), sections 3.1 and 4.2.
    """

    def __init__(self, path: Path, scale: Tensor, steps: Tensor, leapfrog: int) -> None:
        self.path, self.scale, self.steps, self.leapfrog = path, scale, steps, leapfrog
        self.rate = scale.new_zeros(len(scale), dtype=torch.float64)  # of acceptance in the last move, (n,)

    def __call__(self, chains: Chains, beta: float, number: int) -> Chains:
        """Move all chains once at inverse temperature `beta`, which is number `number` of the path."""
        jitter = 0.8 + 0.4 * torch.rand_like(chains.u[..., :1])
        step = self.steps[number].to(chains.u.dtype).unsqueeze(-1) * jitter * self.scale  # (k, n, z)
        momentum = torch.randn_like(chains.u)
        energy = chains.base + beta * chains.tilt - 0.5 * momentum.double().square().sum(-1)
        base, tilt, u = chains.base_slope, chains.tilt_slope, chains.u
        momentum = momentum + 0.5 * step * (base + beta * tilt)
        for _ in range(self.leapfrog - 1):
            u = _finite(u + step * momentum, chains.u)
            base, tilt = self.path.slopes(u)
            momentum = momentum + step * (base + beta * tilt)
        new = self.path.at(_finite(u + step * momentum, chains.u))
        momentum = momentum + 0.5 * step * (new.base_slope + beta * new.tilt_slope)
        gain = new.base + beta * new.tilt - 0.5 * momentum.double().square().sum(-1) - energy
        gain = torch.where(gain.isnan(), -math.inf, gain)
        self.rate = gain.clamp_max(0.0).exp().mean(0)
        return new.where(torch.rand_like(gain).log() < gain, chains)


def _finite(u: Tensor, other: Tensor) -> Tensor:
    """Replace a proposal that is not finite, which a program may fail to score; it will be rejected anyway."""
    return torch.where(u.isfinite(), u, other)


@contextmanager
def unvalidated(joint: Joint, *key: int | str) -> Iterator[None]:
    """Check the program once, then run it without Pyro's validation: a wild proposal is rejected, not an error."""
    with joint.target.running(*key, "annealing"):
        Path(joint).draw(1)
        with pyro.validation_enabled(False):
            yield
