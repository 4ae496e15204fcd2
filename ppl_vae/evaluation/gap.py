r"""Inference gap: how far the bound lies below the evidence, and which part is the family's, which the network's.

.. math::

    \log p(x) - \mathcal L[q] = \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{approximation}}
        + \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortization}}

where :math:`q^*` is the best member of the guide's family for one datum (Inference Suboptimality in Variational
Autoencoders, Cremer, Li and Duvenaud 2018, equation 5). To find it, each datum gets a row of parameters of its own, and
climbs its bound while the model stays frozen.
"""

import copy
import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.families.family import Family
from ppl_vae.infer.hmc import slope
from ppl_vae.programs.capture import Captured
from ppl_vae.programs.closed_form import exact_log_evidence
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE

_DATA = 1000  # largest number of data in a block
_STARTS = 300  # draws of the prior; the climb starts at the best
_PARTICLES = 10  # draws per datum and step of the climb
_CHECKS = 100  # fixed draws that compare the ends of climbs
_EVERY = 20  # steps between changes of the rates
_RATE, _LEAST = 0.1, 1e-3  # learning rates: the first, and the one at which a datum is done


@dataclass(frozen=True)
class Gap:
    r"""Inference gap of each datum, in nats: tensors of shape (n,), in double precision.

    Args:
        total: :math:`\log p(x) - \mathcal L[q]`, the sum of the two parts.
        approximation: :math:`\log p(x) - \mathcal L[q^*]`, lost by the family.
        amortization: :math:`\mathcal L[q^*] - \mathcal L[q]`, lost by the guide's network.
        error: Monte Carlo standard error of `total`.
        approximation_error: Monte Carlo standard error of `approximation`.
        amortization_error: Monte Carlo standard error of `amortization`.
        log_evidence: log p(x): exact, given, or estimated by importance sampling from :math:`q^*`. The estimate is a
            lower bound on average, which makes total and approximation lower bounds too.
        elbo: :math:`\mathcal L[q]`.
        best_elbo: :math:`\mathcal L[q^*]`.
        from_prior: whether the climb from the prior ended higher than the climb from the guide's answer.
    """

    total: Tensor
    approximation: Tensor
    amortization: Tensor
    error: Tensor
    approximation_error: Tensor
    amortization_error: Tensor
    log_evidence: Tensor
    elbo: Tensor
    best_elbo: Tensor
    from_prior: Tensor


def inference_gap(
    program: Any,
    x: Any = None,
    *,
    log_evidence: Any = None,
    draws: int = 1000,
    steps: int = 1000,
    entries: int = 2**21,
    seed: int = 0,
) -> Gap:
    r"""Split log p(x) - ELBO of each datum into approximation gap and amortization gap.

    Each datum gets a row of parameters of the guide's family. A learned scale that the family shares among data becomes
    the datum's own; networks inside a family stay as they are. Adam climbs the bound of each datum twice, from the
    guide's answer and from the prior's draw that explains the datum best; the higher end counts. The learning rate of a
    datum halves when progress is lost in the noise, which shows in the products of its steps with the gradients that
    follow, whose draws are new. The climb ends when all rates are a hundredth of the first. Then all bounds are
    estimated anew, with fresh draws that the two guides share.

    Steps are absolute, 0.1 at first and 1e-3 at last, as suits latent variables of scale 1. If a posterior is narrower
    than about 1e-2, the climb stops short and charges the rest to the family; a warning says so.

    Args:
        program: a `VAE`, or a `Target` of one. Its parameters stay untouched, bit by bit.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        log_evidence: log p(x) of each datum in nats, shape (n,), or an object that has it as `log_evidence`, with its
            standard error as `error` or `mc_se`. By default the closed form if there is one, else the
            importance-weighted estimate from the draws of :math:`q^*`.
        draws: samples per datum of the estimates, at least 2.
        steps: largest number of steps of each climb.
        entries: how many numbers the draws of a block of data may hold; this bounds the memory.
        seed: of all draws; the global random state is left alone.

    Returns:
        The gap of each datum.

    Raises:
        TypeError: If the program is not a `VAE`: its guide's family is unknown.
        ValueError: If `draws` is below 2, `steps` or `entries` below 1, or data or evidence do not fit or are NaN.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud 2018), section 3. The gradient is
        that of Sticking the Landing (Roeder, Wu, Duvenaud 2017). The products of steps and gradients tell noise from
        progress as in Non-asymptotic confidence bounds for stochastic approximation algorithms with constant step size
        (Pflug 1990).
    """
    target = Target.of(program, x)
    if not isinstance(target.program, VAE):
        raise TypeError(
            f"Expected a VAE, whose guide's family is known; got {type(target.program).__name__}. For other programs "
            "compare ELBO and log evidence: log_evidence(program, x, samples) has both."
        )
    draws, steps, entries = check_int("draws", draws, 2), check_int("steps", steps), check_int("entries", entries)
    truth, error = _known(target, log_evidence)
    versions = _versions(target.program)
    size = max(1, min(_DATA, entries // (_PARTICLES * target.batch["x"][0].numel())))
    parts = []
    for number, block in enumerate(target.blocks(size)):
        rows = slice(number * size, (number + 1) * size)
        climbs = _Climbs(block, (seed, number), entries)
        parts.append(climbs.gap(None if truth is None else truth[rows], error[rows], draws, steps))
    if _versions(target.program) != versions:
        raise RuntimeError("Expected the model to stay frozen; one of its parameters or buffers was written to.")
    return Gap(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Gap)))


def _versions(program: VAE) -> list[int]:
    return [tensor._version for tensor in (*program.parameters(), *program.buffers())]


def _known(target: Target, given: Any) -> tuple[Tensor | None, Tensor]:
    """Log p(x) of each datum if it is known, else None, and its standard error."""
    error = torch.zeros(target.n, dtype=torch.float64, device=target.device)
    if given is None:
        try:
            return exact_log_evidence(target), error
        except ValueError:
            return None, error
    pair = getattr(given, "log_evidence", given), getattr(given, "error", getattr(given, "mc_se", error))
    try:
        truth, error = (torch.as_tensor(value).to(error) for value in pair)
    except (TypeError, ValueError, RuntimeError) as mistake:
        raise ValueError(
            f"Expected `log_evidence` to be a tensor (n,) of nats, a Reference or an Evidence; got {given!r}."
        ) from mistake
    if truth.shape != (target.n,) or error.shape != (target.n,):
        raise ValueError(
            f"Expected `log_evidence` of shape ({target.n},), one number per datum; got {tuple(truth.shape)}, with "
            f"errors of shape {tuple(error.shape)}."
        )
    if bool(truth.isnan().any()):
        raise ValueError(
            f"Expected `log_evidence` to be known; got NaN for {int(truth.isnan().sum())} of {len(truth)} data. NUTS "
            "has none: use closed-form, quadrature or ais."
        )
    return truth, error


class _Members:
    """One member of a family per datum: a row of parameters, with a copy of any scale that the family learns.

    Args:
        family: the family, which is copied.
        rows: unconstrained parameters, shape (n, p).
    """

    def __init__(self, family: Family, rows: Tensor) -> None:
        self.family, event, parts = copy.deepcopy(family), family.event_shape, [rows.detach()]
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


class _Climbs:
    """Climbs of the bounds of a block of data.

    Args:
        target: the program and the block.
        key: of all draws.
        entries: how many numbers the draws may hold at a time.
    """

    def __init__(self, target: Target, key: tuple[int, int], entries: int) -> None:
        self.target, self.program, self.key = target, target.program, key
        room = max(1, entries // target.batch["x"].numel())
        self.chunk = max(k for k in range(1, min(_CHECKS, room) + 1) if _CHECKS % k == 0)  # so that all have one shape
        self.joint, self.steep = Captured(self._joint), Captured(self._slope)

    def gap(self, truth: Tensor | None, error: Tensor, draws: int, steps: int) -> Gap:
        """The gap of each datum, from log p(x), if known, and its standard error."""
        with torch.no_grad(), self.target.running(*self.key, "rows"):
            batch, posterior = self.target.batch, self.program.posterior
            context = batch["index" if posterior.wants == "index" else "x"]
            rows = posterior.unconstrained(context, observed=batch.get("mask"))
            width = posterior.family.start().numel()
        guide = _Members(posterior.family, rows)
        best, from_prior = guide.start, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if rows.shape[1] == width > 0:
            near, low = self._climb(guide, "guide", steps)
            far, high = self._climb(self._prior(rows), "prior", steps)
            from_prior = _higher(high, low)
            best = torch.where(from_prior.unsqueeze(1), far, near)
        with torch.no_grad(), self.target.running(*self.key, "spread"):
            spread = guide.at(best).rsample((_CHECKS,)).std(0).flatten(1).amin(1)
        if narrow := int((spread < 10 * _LEAST).sum()):
            warnings.warn(
                f"The posteriors of {narrow} of {len(rows)} data are narrower than {10 * _LEAST:g}, too narrow for the "
                "steps of the climb: the family's part is too large, the network's too small. Rescale the latent "
                "variables.",
                stacklevel=3,
            )
        here, there = (self._weights(guide, parameters, draws, "final") for parameters in (guide.start, best))
        estimate = there.logsumexp(0) - math.log(draws)
        relative = (there - estimate).exp() if truth is None else torch.zeros_like(there)
        total, lost, gained = (each.std(0) / draws**0.5 for each in (relative - here, relative - there, there - here))
        total, lost = ((each.square() + error.square()).sqrt() for each in (total, lost))
        truth, elbo, top = estimate if truth is None else truth, here.mean(0), there.mean(0)
        return Gap(truth - elbo, truth - top, top - elbo, total, lost, gained, truth, elbo, top, from_prior)

    def _prior(self, rows: Tensor) -> _Members:
        """Start at the prior's draw that explains each datum best, with a tenth of the prior's spread."""
        family, batch = copy.deepcopy(self.program.posterior.family), self.target.batch
        with torch.no_grad(), self.target.running(*self.key, "start"):
            prior = self.program.prior().expand([_STARTS])
            draws = prior.sample().to(rows)
            decoded = (self.program.likelihood(z, mask=batch.get("mask")) for z in draws.unsqueeze(1).split(self.chunk))
            likelihood = torch.cat([p.log_prob(batch["x"]) for p in decoded])  # decodes each draw once, for all data
            around = 0.1 * (draws - draws.mean(0))
            best = (likelihood + prior.log_prob(draws).unsqueeze(1)).argmax(0).tolist()
            start = [family.fit_start(draws[row] + around) for row in best]
        return _Members(family, torch.stack(start).to(rows))

    @torch.no_grad()
    def _weights(self, members: _Members, parameters: Tensor, draws: int, word: str) -> Tensor:
        """Log weights (draws, n); the same word always gives the same draws."""
        parts = []
        for number, start in enumerate(range(0, draws, self.chunk)):
            with self.target.running(*self.key, word, number):
                q = members.at(parameters)
                z = q.rsample((min(self.chunk, draws - start),))
                parts.append(self.joint(z)[0] - q.log_prob(z).double())
        return torch.cat(parts)

    def _joint(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.target.score_sites("model", {"z": z}),)

    def _slope(self, z: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return (slope(self._joint(z)[0], z),)

    def _gradient(self, members: _Members, place: Tensor) -> Tensor:
        """Gradient of each datum's bound in its parameters, through the draws alone (sticking the landing).

        It has no noise at the exact posterior: the score of the parameters, left out, is 0 on average.
        """
        q = members.at(place)
        z = q.rsample((_PARTICLES,))
        here = z.detach().requires_grad_()
        score = slope(q.log_prob(here), here)
        return torch.autograd.grad(z, place, (self.steep(here)[0] - score) / _PARTICLES)[0].nan_to_num(0.0, 0.0, 0.0)

    def _climb(self, members: _Members, word: str, steps: int) -> tuple[Tensor, Tensor]:
        """Climb the bound of each datum by Adam; return the mean parameters of the last steps, and their log weights.

        The start stays if the climb surely ended lower. To ask that it surely ended higher would lose small gains, and
        charge them to the family.
        """
        origin = self._weights(members, members.start, _CHECKS, "check")
        place = members.start.clone().requires_grad_()
        first, second, total, moved = (torch.zeros_like(members.start) for _ in range(4))
        rate = torch.full_like(origin[0], _RATE)
        rises: list[Tensor] = []
        with pyro.validation_enabled(False), self.target.running(*self.key, word):
            for step in range(1, steps + 1):
                gradient = self._gradient(members, place)
                rises.append((gradient * moved).sum(1))
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.01)
                size = rate.to(first).unsqueeze(1) / (1 - 0.9**step)
                moved = size * first / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
                total += place.data.add_(moved)
                if len(rises) == _EVERY or step == steps:
                    mean, rise = total / len(rises), torch.stack(rises)
                    rate = torch.where(rise.sum(0) > rise.square().sum(0).sqrt(), rate, rate / 2)
                    if not bool((rate > _LEAST).any()):
                        break
                    rises, total = [], torch.zeros_like(total)
        bound = self._weights(members, mean, _CHECKS, "check")
        lost = _higher(origin, bound)
        return torch.where(lost.unsqueeze(1), members.start, mean), torch.where(lost, origin, bound)


def _higher(new: Tensor, old: Tensor) -> Tensor:
    """Whether the mean of paired draws (k, n) rose by more than two standard errors."""
    rise = new - old
    return rise.mean(0) > 2 * rise.std(0) / len(rise) ** 0.5
