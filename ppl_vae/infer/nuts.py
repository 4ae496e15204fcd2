"""NUTS over the latent variables of each datum: all chains and data at once, each along a trajectory of its own."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.infer.hmc import Path, unvalidated
from ppl_vae.programs.joint import Joint

_DEEPEST = 10  # doublings of a trajectory
_EARLY = 5  # doublings before the scale is known
_WILD = 1000.0  # loss of energy, in nats, that counts as a divergence
_RATE = 0.8  # of acceptance, which the step size aims at
_BLOCKS, _BLOCK = 8, 512  # draws of the prior, among which chains start and which their means must not contradict
_WINDOWS = (0.1, 0.2, 0.4, 0.8)  # parts of the warm-up after which the scale is estimated anew


class _Point(NamedTuple):
    """Where the chains are: u (k, n, z), log density there (k, n), its gradient (k, n, z) and momentum (k, n, z)."""

    u: Tensor
    height: Tensor
    slope: Tensor
    momentum: Tensor

    def where(self, chosen: Tensor, other: "_Point") -> "_Point":
        """This point where `chosen`, (k, n), is true, else the other."""
        pairs = zip(self, other, strict=True)
        return _Point(*(torch.where(chosen if a.dim() == 2 else chosen.unsqueeze(-1), a, b) for a, b in pairs))

    @property
    def energy(self) -> Tensor:
        """Minus the energy, (k, n)."""
        return self.height - 0.5 * self.momentum.square().sum(-1)


class _Sampler:
    """Transitions of NUTS, with a step size and a scale per datum.

    Momenta are standard normal; positions move by `factor` times the momentum, so that the inverse mass matrix is
    factor times its transpose.

    Args:
        path: of the program and its data.
        factor: Cholesky factor of the covariance, (n, z, z).

    References:
        The No-U-Turn Sampler (Hoffman and Gelman 2014), sections 3.1 and 3.2; A Conceptual Introduction to Hamiltonian
        Monte Carlo (Betancourt 2017), appendix A, for the multinomial draws and the criterion on sums of momenta;
        Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro (Phan, Pradhan and
        Jankowiak 2019), section 3.1, for the tree without recursion.
    """

    def __init__(self, path: Path, factor: Tensor) -> None:
        self.path, self.deepest = path, _EARLY
        self.rescale(factor)

    def rescale(self, factor: Tensor) -> None:
        """Take another factor, and begin anew to adapt the step size, (n,), by dual averaging."""
        self.factor, self.step = factor, factor.new_full(factor.shape[:1], 0.5)
        self.average, self.centre = self.step.log(), (4 * self.step).log()
        self.mean, self.count = torch.zeros_like(self.step), 0

    def adapt(self, rate: Tensor) -> None:
        """Take the acceptance rates of a transition, (k, n), into the step size.

        Before the scale is known each chain has a step of its own, so that one that starts in a wild place leaves it;
        from then on all chains of a datum share one, (n,).
        """
        rate = rate if self.deepest == _EARLY else rate.mean(0)
        self.count += 1
        self.mean = self.mean + (_RATE - rate - self.mean) / (self.count + 10)
        step = self.centre - 20 * math.sqrt(self.count) * self.mean
        self.average = self.average + self.count**-0.75 * (step - self.average)
        self.step = step.exp()

    def at(self, u: Tensor, momentum: Tensor) -> _Point:
        """The point at a position and momentum, (k, n, z)."""
        state = self.path.at(u)
        return _Point(u, state.base + state.tilt, state.base_slope + state.tilt_slope, momentum)

    def leap(self, point: _Point, step: Tensor) -> _Point:
        """Take one leapfrog step of the size of each chain, (k, n)."""
        step = step.unsqueeze(-1)
        momentum = point.momentum + 0.5 * step * torch.einsum("nyz,kny->knz", self.factor, point.slope)
        u = point.u + step * torch.einsum("nyz,knz->kny", self.factor, momentum)
        new = self.at(torch.where(u.isfinite(), u, point.u), momentum)
        momentum = momentum + 0.5 * step * torch.einsum("nyz,kny->knz", self.factor, new.slope)
        return new._replace(momentum=momentum)

    def __call__(self, here: _Point) -> tuple[_Point, Tensor, Tensor]:
        """Move all chains once; also the acceptance rates and which chains diverged, (k, n) each."""
        here = here._replace(momentum=torch.randn_like(here.u))
        left = right = here
        start, total = here.energy, here.momentum
        weight, rate, leaves = (torch.zeros_like(start) for _ in range(3))
        live = torch.ones_like(start, dtype=torch.bool)
        diverged = torch.zeros_like(live)
        for depth in range(self.deepest):
            if not bool(live.any()):
                break
            ahead = torch.rand_like(start) < 0.5
            step = torch.where(ahead, self.step, -self.step)
            edge = chosen = right.where(ahead, left)
            inner, part, growing = torch.full_like(start, -math.inf), torch.zeros_like(total), live
            kept: dict[int, tuple[Tensor, Tensor]] = {}  # momenta where subtrees begin, and their sums so far
            for leaf in range(2**depth):
                if not bool(growing.any()):
                    break
                edge = self.leap(edge, step).where(growing, edge)
                gain = (edge.energy - start).nan_to_num(-math.inf, math.inf, -math.inf)
                rate = rate + gain.clamp_max(0.0).exp() * growing
                leaves = leaves + growing
                wild = growing & (gain < -_WILD)
                diverged, growing = diverged | wild, growing & ~wild
                inner = torch.where(growing, torch.logaddexp(inner, gain), inner)
                chosen = edge.where(growing & (torch.rand_like(gain).log() < gain - inner), chosen)
                part = part + edge.momentum * growing.unsqueeze(-1)
                top = (leaf >> 1).bit_count()
                if leaf % 2 == 0:
                    kept[top] = edge.momentum, part
                for place in range(top - ((leaf + 1) & -(leaf + 1)).bit_length() + 2, top + 1 if leaf % 2 else 0):
                    first, before = kept[place]
                    growing = growing & ~_turns(first, edge.momentum, part - before + first)
            here = chosen.where(growing & (torch.rand_like(inner).log() < inner - weight), here)
            left, right = edge.where(growing & ~ahead, left), edge.where(growing & ahead, right)
            weight = torch.where(growing, torch.logaddexp(weight, inner), weight)
            total = total + part * growing.unsqueeze(-1)
            live = growing & ~_turns(left.momentum, right.momentum, total)
        return here, rate / leaves, diverged


def _turns(first: Tensor, last: Tensor, total: Tensor) -> Tensor:
    """Whether a trajectory turns back, (k, n), by its first and last momentum and the sum of all."""
    total = total - 0.5 * (first + last)
    return ((first * total).sum(-1) <= 0) | ((last * total).sum(-1) <= 0)


def sample(
    joint: Joint, *, draws: int, warmup: int, chains: int, seed: int = 0
) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """Run NUTS from stratified draws of the prior.

    Returns:
        Draws (draws * chains, n, z) of the latent variables, those of all chains at one time side by side; `r_hat`,
        `ess`, `ess_tail`, `divergences` and `bfmi` of each datum, (n,), and `mcse_mean`, the Monte Carlo standard error
        of the mean of each latent variable, (n, z); and `contradicted`, (n,), where the mean by draws of the prior,
        weighed by their likelihood, lies more than five errors away, as it does if no chain is in a mode that weighs;
        then of each draw `energy`, `lp` and `diverging`, (draws * chains, n).
    """
    with unvalidated(joint, seed):
        path = Path(joint)
        prior, likelihood = _draw(joint)
        start = _start(prior, likelihood, chains)
        sampler = _Sampler(path, prior.double().std(0).clamp_min(1e-6).diag_embed())
        here = sampler.at(start, start)
        ends = {round(part * warmup) for part in _WINDOWS}
        seen: list[Tensor] = []
        stats: list[tuple[Tensor, ...]] = []
        for number in range(warmup + draws):
            if number == warmup:
                sampler.step, sampler.deepest, seen = sampler.average.exp(), _DEEPEST, []
            here, rate, diverged = sampler(here)
            seen.append(here.u)
            if number >= warmup:
                stats.append((-here.energy, here.height, diverged))
                continue
            sampler.adapt(rate)
            if number + 1 in ends and warmup - number > 10:
                sampler.rescale(_factor(torch.cat(seen)))
                sampler.deepest = _DEEPEST
                seen = []
        values, places = joint.latents(torch.cat(seen)), joint.latents(prior)
    mixing = _mixing(values.unflatten(0, (draws, chains)))
    share = likelihood.softmax(0)
    loc = torch.einsum("kn,knz->nz", share, places)
    error = torch.einsum("kn,knz->nz", share.square(), (places - loc).square()) + mixing["mcse_mean"].square()
    apart = ((values.mean(0) - loc).abs() > 5 * error.sqrt() + 1e-12 * loc.abs()).any(-1)
    contradicted = apart & (share.square().sum(0) < 1 / 25)  # by as many effective draws, or they tell nothing
    told = dict(zip(("energy", "lp", "diverging"), map(torch.cat, zip(*stats, strict=True)), strict=True))
    told_of_data = {"divergences": told["diverging"].sum(0).to(values), "contradicted": contradicted}
    return values, {**mixing, "bfmi": _bfmi(told["energy"].unflatten(0, (draws, chains))), **told_of_data}, told


def _bfmi(energy: Tensor) -> Tensor:
    """Least of the chains' energy changes from draw to draw, squared, by the variance, (n,); energy (draws, k, n).

    References:
        Diagnosing Suboptimal Cotangent Disintegrations in Hamiltonian Monte Carlo (Betancourt 2016), equation 3.
    """
    return (energy.diff(dim=0).square().mean(0) / energy.var(0)).amin(0)


def _draw(joint: Joint) -> tuple[Tensor, Tensor]:
    """Draws of the prior, (k, n, z), and their log likelihoods, (k, n)."""
    draws = [joint.draw("prior", _BLOCK) for _ in range(_BLOCKS)]
    heights = [joint.log_probs(u)[1].detach().nan_to_num(-1e300, -1e300, -1e300).clamp_min(-1e300) for u in draws]
    return torch.cat(draws), torch.cat(heights)


def _start(u: Tensor, height: Tensor, chains: int) -> Tensor:
    """One of the draws u (k, n, z) per chain: each from a cell of its own of equal prior mass, (chains, n, z).

    Cells are cut at medians of one latent variable after the other; a cell's draw is taken by its likelihood, so that
    chains begin apart, and yet where the posterior may be.
    """
    k, n, size = u.shape
    cells, axis = [(torch.arange(k, device=u.device).unsqueeze(-1).expand(-1, n), chains)], 0
    while any(shares > 1 for _, shares in cells):
        parts = []
        for cell, shares in cells:
            order = u[..., axis % size].gather(0, cell).argsort(0)
            first = len(cell) * (shares // 2) // shares
            halves = cell.gather(0, order).split([first, len(cell) - first])
            parts += [part for part in zip(halves, (shares // 2, shares - shares // 2), strict=True) if part[1]]
        cells, axis = parts, axis + 1
    chosen = []
    for cell, _ in cells:
        noise = -torch.rand(cell.shape, dtype=height.dtype, device=u.device).log().neg().log()  # Gumbel's
        best = (height.gather(0, cell) + noise).argmax(0, keepdim=True)
        chosen.append(cell.gather(0, best))
    return u.gather(0, torch.cat(chosen).unsqueeze(-1).expand(-1, -1, size))


def _factor(u: Tensor) -> Tensor:
    """Cholesky factor (n, z, z) of the covariance of draws (k, n, z), shrunk to its diagonal where these are few."""
    apart = u.double() - u.double().mean(0)
    covariance = torch.einsum("kny,knz->nyz", apart, apart) / (len(u) - 1)
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12)
    part = len(u) / (len(u) + 10 * u.shape[-1])
    mixed = part * covariance + (1 - part) * variance.diag_embed() + 1e-6 * variance.diag_embed()
    return torch.linalg.cholesky(mixed)


def _mixing(values: Tensor) -> dict[str, Tensor]:
    """The worst R-hat, rank-normalised and folded, the least effective sample size and the errors of the means."""
    flat = values.flatten(0, 1)
    moving = flat.amax(0) - flat.amin(0) > 1e-12 * flat.abs().amax(0)  # (n, z), false of constants
    moving |= ~moving.any(-1, keepdim=True)
    array, kept = values.permute(2, 3, 1, 0).cpu().numpy(), moving.cpu().numpy()  # (n, z, chains, draws), (n, z)
    with warnings.catch_warnings():  # of the import, and of chains that never move, whose R-hat is NaN
        warnings.simplefilter("ignore")
        import arviz

        folded = np.abs(array - np.median(array, (2, 3), keepdims=True))  # whose means the covariance is made of
        chosen = [(rows[some], others[some]) for rows, others, some in zip(array, folded, kept, strict=True)]
        r_hat = [np.max([arviz.rhat(one) for one in rows]) for rows, _ in chosen]
        ess = [np.min([arviz.ess(one) for one in (*rows, *others)]) for rows, others in chosen]
        tail = [np.min([arviz.ess(one, method="tail") for one in rows]) for rows, _ in chosen]
        errors = [float(arviz.mcse(one)) for rows, _ in chosen for one in rows]
    parts = {"r_hat": r_hat, "ess": ess, "ess_tail": tail}
    mcse = torch.zeros_like(flat[0]).masked_scatter(moving, torch.tensor(errors).to(values))
    return {name: torch.tensor(np.array(part)).to(values) for name, part in parts.items()} | {"mcse_mean": mcse}
