"""The best member of a guide's family for each datum: the one of highest bound, with the model frozen."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae.families.family import Family
from ppl_vae.infer.closest_normal import Density, closest_normal, polish
from ppl_vae.infer.hmc import slope
from ppl_vae.programs.capture import Captured
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.target import Target

_STARTS = 300  # draws of the prior; a search starts at the best
_PARTICLES = 10  # draws per datum and step of the climb
_CHECKS = 100  # fixed draws that compare the ends of searches
_EVERY = 20  # steps between changes of the rates
_RATE, _LEAST = 0.1, 1e-3  # learning rates: the first, and the one at which a datum is done
_WORTH = 0.005  # nats by which one end of a search has to exceed another that is preferred
_LOOKS = 30  # times the particles, for what a climb has left to gain


class Members:
    """One member of a family per datum: a row of parameters, with a copy of any scale that the family learns.

    Args:
        family: the family, which is copied.
        rows: unconstrained parameters, shape (n, p).
    """

    def __init__(self, family: Family, rows: Tensor) -> None:
        self.family, self.original = copy.deepcopy(family), family
        event, parts = family.event_shape, [rows.detach()]
        self.shapes = {name: p.shape for name, p in family.named_parameters(recurse=False) if p.shape in (event, ())}
        for name in self.shapes:
            parts.append(getattr(self.family, name).detach().flatten().expand(len(rows), -1))
            delattr(self.family, name)
        self.sizes = [part.shape[1] for part in parts]
        self.start = torch.cat(parts, 1)  # (n, p and the scales)

    def at(self, parameters: Tensor) -> Any:
        """The distributions with these parameters, batch shape (n,)."""
        row, *scales = parameters.split(self.sizes, 1)
        for (name, shape), scale in zip(self.shapes.items(), scales, strict=True):
            setattr(self.family, name, scale.unflatten(1, shape or (1,) * len(self.family.event_shape)))
        return self.family.distribution(row)

    def nearest(self, loc: Tensor, precision: Tensor) -> Tensor:
        """Parameters of the normal members closest to these normals."""
        parts = self.family.nearest(loc, precision)
        return torch.cat([parts["parameters"], *(parts[name].reshape(len(loc), -1) for name in self.shapes)], 1)

    def around(self, centres: Tensor, spread: Tensor) -> Tensor:
        """Parameters of members fitted to points at distances (n, k, *event) from centres (n, *event)."""
        family, rows = copy.deepcopy(self.original), []
        for points in centres.unsqueeze(1) + spread:
            start = family.fit_start(points)
            rows.append(torch.cat([start, *(getattr(family, name).detach().flatten() for name in self.shapes)]))
        return torch.stack(rows).to(centres)

    def units(self, normal: Tensor) -> Tensor:
        """By how much the parameters of normal members change when these move by their width or widen e times."""
        q = self.at(normal)
        loc, scale = q.mean.flatten(1), q.stddev.flatten(1)
        here, moved, widened = (
            self.nearest(mean, torch.diag_embed(width**-2))
            for mean, width in ((loc, scale), (loc + scale, scale), (loc, math.e * scale))
        )
        unit = (moved - here).abs().maximum((widened - here).abs())
        return torch.where(unit > 0, unit, 1.0).to(normal)


class Search:
    """The bounds of a block of data, and searches for the best members.

    Args:
        target: the program, a `VAE`, and the block.
        key: of all draws.
        entries: how many numbers the draws may hold at a time.
        real: the density of any other program, over its latent variables side by side on the real line.
    """

    def __init__(self, target: Target, key: tuple[int, int], entries: int, real: Joint | None = None) -> None:
        self.target, self.program, self.key, self.entries, self.real = target, target.program, key, entries, real
        self.event = target.program.prior.family.event_shape if real is None else torch.Size([real.size])
        score = self._score(torch.arange(target.n, device=target.device))
        self.joint = Captured(lambda z: (score(z),))
        self.both = Captured(partial(_value_and_slope, score))
        self.steep = Captured(lambda z: _value_and_slope(score, z)[1:])
        room = max(1, entries // (target.n * (target.features if real else target.batch["x"][0].numel())))
        self.chunk = max(k for k in range(1, min(_CHECKS, room) + 1) if _CHECKS % k == 0)  # so that all have one shape

    def _score(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """Log density (k, m) at z (k, m, *event) of m of the data."""
        real, n = self.real, self.target.n
        if real is None:
            target = self.target if len(rows) == n else self.target.rows(rows)
            return lambda z: target.score_sites("model", {"z": z})

        def score(u: Tensor) -> Tensor:
            if len(rows) < n:  # a guide with one row per datum takes no part of the data
                u = u.new_zeros(len(u), n, *u.shape[2:]).index_copy(1, rows, u)
            prior, likelihood = real.log_probs(u)
            return (prior + likelihood)[:, rows]

        return score

    @torch.no_grad()
    def log_weights(self, members: Members, parameters: Tensor, draws: int, word: str) -> Tensor:
        """Log weights (draws, n); the same word always gives the same draws."""
        parts = []
        for number, start in enumerate(range(0, draws, self.chunk)):
            with self.target.running(*self.key, word, number):
                q = members.at(parameters)
                z = q.rsample((min(self.chunk, draws - start),))
                parts.append(self.joint(z)[0] - q.log_prob(z).double())
        return torch.cat(parts)

    def best(self, guide: Members, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Parameters of the best members.

        Returns:
            The parameters; whether the prior was surely the better start, (n,); nats that are left to gain, (n,); and
            the posterior's widths, (n, z), if the family has normals.
        """
        start, widths = self._prior(guide), None
        if guide.family.normals == "all":
            near, far = (self._newton(guide, *each, steps) for each in ((guide.start, "guide"), (start, "prior")))
            best, from_prior = self._choose(guide, near, [near, far])
            best, left, widths = self._polish(guide, best)
            return best, from_prior, left, widths
        units, simple = torch.ones_like(guide.start), []
        if guide.family.normals == "some":
            normal, _, widths = self._polish(guide, self._newton(guide, start, "prior", steps))
            units, simple = guide.units(normal), [normal]
            with torch.no_grad(), self.target.running(*self.key, "scatter"):
                q = guide.at(normal)
                start = guide.around(q.mean, torch.stack([q.stddev, -q.stddev], 1))
        near, far = (self._climb(guide, *each, units, steps) for each in ((guide.start, "guide"), (start, "prior")))
        best, from_prior = self._choose(guide, near, [*simple, near, far])
        return best, from_prior, self._left(guide, best, units), widths

    def _choose(self, guide: Members, near: Tensor, ends: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The end of highest bound, and whether it is surely above the one near the guide's answer.

        A later end has to be worth it: what draws have not seen, such as a component of small weight, flatters it. The
        guide's own answer has to be surely above the first: small gains would else be charged to the family.
        """
        origin, low, *bounds = (
            self.log_weights(guide, place, _CHECKS, "check") for place in (guide.start, near, *ends)
        )
        stays = _higher(origin, bounds[0])
        best, bound = torch.where(stays.unsqueeze(1), guide.start, ends[0]), torch.where(stays, origin, bounds[0])
        for end, rival in zip(ends[1:], bounds[1:], strict=True):
            better = rival.mean(0) > bound.mean(0) + _WORTH
            best, bound = torch.where(better.unsqueeze(1), end, best), torch.where(better, rival, bound)
            stays &= ~better
        return best, _higher(bound, low) & ~stays

    def _prior(self, guide: Members) -> Tensor:
        """Start at the prior's draw that explains each datum best, with a tenth of the prior's spread."""
        batch = self.target.batch
        if self.real is not None:
            with torch.no_grad(), pyro.validation_enabled(False), self.target.running(*self.key, "start"):
                u = self.real.draw("prior", _STARTS)
                scores = torch.cat([self.joint(part)[0] for part in u.split(self.chunk)]).nan_to_num(-math.inf)
                centres = u[scores.argmax(0), torch.arange(self.target.n)].to(guide.start)
                return guide.around(centres, 0.1 * (u - u.mean(0)).transpose(0, 1).to(guide.start))
        with torch.no_grad(), self.target.running(*self.key, "start"):
            prior = self.program.prior(*self.program.context("prior", batch))
            prior = prior.expand([_STARTS, *(prior.batch_shape or [1])])
            draws = prior.sample().to(guide.start)
            decoded = (self.program.decode(z, **batch) for z in draws.split(self.chunk))
            likelihood = torch.cat([p.log_prob(batch["x"]) for p in decoded])  # decodes each draw once, for all data
            best = (likelihood + prior.log_prob(draws)).argmax(0)
            spread = 0.1 * (draws - draws.mean(0)).transpose(0, 1)
            own = torch.arange(len(best), device=best.device) if len(spread) > 1 else torch.zeros_like(best)
            return guide.around(draws[best, own], spread.expand(len(best), *spread.shape[1:]))

    @torch.no_grad()
    def _newton(self, guide: Members, start: Tensor, word: str, steps: int) -> Tensor:
        with pyro.validation_enabled(False), self.target.running(*self.key, word):
            return closest_normal(self._density, guide, start, steps)

    @torch.no_grad()
    def _polish(self, guide: Members, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with pyro.validation_enabled(False), self.target.running(*self.key, "polish"):
            return polish(self._density(torch.arange(self.target.n)), guide, place)

    def _density(self, rows: Tensor) -> Density:
        """Log density of some of the data and its gradient at flat z; they are captured anew."""
        n, event = len(rows), self.event
        both = self.both if n == self.target.n else Captured(partial(_value_and_slope, self._score(rows)))
        chunk, dtype = max(self.chunk * self.target.n // n, 1), self.target.dtype or torch.get_default_dtype()

        def density(z: Tensor) -> tuple[Tensor, Tensor]:
            parts = [both(part) for part in z.to(dtype).unflatten(-1, event).split(chunk)]
            values, slopes = (torch.cat(each) for each in zip(*parts, strict=True))
            return values, slopes.flatten(2).double()

        return density

    def _gradient(self, members: Members, place: Tensor) -> Tensor:
        """Gradient of each datum's bound in its parameters, through the draws alone (sticking the landing).

        It has no noise at the exact posterior: the score of the parameters, left out, is 0 on average.
        """
        q = members.at(place)
        z = q.rsample((_PARTICLES,))
        here = z.detach().requires_grad_()
        score = slope(q.log_prob(here), here)
        return torch.autograd.grad(z, place, (self.steep(here)[0] - score) / _PARTICLES)[0].nan_to_num(0.0, 0.0, 0.0)

    def _climb(self, members: Members, start: Tensor, word: str, units: Tensor, steps: int) -> Tensor:
        """Climb the bound of each datum by Adam, in units of its own; return the mean parameters of the last steps."""
        place = start.clone().requires_grad_()
        first, second, total, moved = (torch.zeros_like(start) for _ in range(4))
        rate = torch.full_like(start[:, 0], _RATE)
        rises: list[Tensor] = []
        with pyro.validation_enabled(False), self.target.running(*self.key, word):
            for step in range(1, steps + 1):
                gradient = self._gradient(members, place) * units
                rises.append((gradient * moved).sum(1))
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.01)
                moved = rate.unsqueeze(1) / (1 - 0.9**step) * first / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
                total += place.data.add_(moved * units)
                if len(rises) == _EVERY or step == steps:
                    mean, rise = total / len(rises), torch.stack(rises)
                    rate = torch.where(rise.sum(0) > rise.square().sum(0).sqrt(), rate, rate / 2)
                    if not bool((rate > _LEAST).any()):
                        break
                    rises, total = [], torch.zeros_like(total)
        return mean

    def _left(self, members: Members, place: Tensor, units: Tensor) -> Tensor:
        """Nats that the bounds could still gain, (n,), by the slope in each parameter's unit."""
        place = place.clone().requires_grad_()
        with pyro.validation_enabled(False), self.target.running(*self.key, "left"):
            slopes = torch.stack([self._gradient(members, place) for _ in range(_LOOKS)]).mean(0)
        return 0.5 * (slopes * units).double().square().sum(1)


def _value_and_slope(score: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x, z) and its gradient in z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = score(z)
        return value.detach(), slope(value, z)


def _higher(new: Tensor, old: Tensor) -> Tensor:
    """Whether the mean of paired draws (k, n) rose by more than two standard errors."""
    rise = new - old
    return rise.mean(0) > 2 * rise.std(0) / len(rise) ** 0.5
