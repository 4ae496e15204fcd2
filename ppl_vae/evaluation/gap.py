r"""Inference gap: how far the bound is from the evidence, and whose fault it is, the family's or the network's.

.. math::

    \log p(x) - \mathcal L[q] = \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{approximation}}
        + \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortization}}

where :math:`q^*` is the best member of the guide's family for the datum at hand (Inference Suboptimality in
Variational Autoencoders, Cremer, Li and Duvenaud 2018, equation 5). It is found by giving each datum a row of
parameters of its own and climbing its bound with the model frozen.
"""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.families.family import Family
from ppl_vae.infer.hmc import slope
from ppl_vae.networks.table import Table
from ppl_vae.programs.capture import Captured
from ppl_vae.programs.closed_form import exact_log_evidence
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.traces import check_batch, conditioned
from ppl_vae.programs.vae import VAE

_DATA = 1000  # data in a block, at the most
_STARTS = 300  # draws of the prior, of which a climb begins at the best
_PARTICLES = 10  # draws a datum and step of the climb
_JUDGES = 100  # draws, the same ones each time, by which the ends of climbs are told apart
_EVERY = 20  # steps between looks at the rates
_RATE, _LEAST = 0.1, 1e-3  # learning rates: the first, and the one at which a datum is done


@dataclass(frozen=True)
class Gap:
    r"""The inference gap of each datum, in nats: tensors of shape (n,), in double precision.

    Args:
        total: :math:`\log p(x) - \mathcal L[q]`, the sum of the two parts.
        approximation: :math:`\log p(x) - \mathcal L[q^*]`, what the family cannot do.
        amortization: :math:`\mathcal L[q^*] - \mathcal L[q]`, what the guide's network leaves undone.
        error: Monte Carlo standard error of `total`.
        approximation_error: that of `approximation`.
        amortization_error: that of `amortization`.
        log_evidence: log p(x) as it was known: exact, given, or estimated by importance sampling from :math:`q^*`,
            a lower bound on average, which makes total and approximation lower bounds too.
        elbo: :math:`\mathcal L[q]`.
        best_elbo: :math:`\mathcal L[q^*]`.
        from_prior: whether the climb from the prior led higher than that from the guide's own answer.
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
    x: Any,
    *,
    log_evidence: Any = None,
    draws: int = 1000,
    steps: int = 1000,
    entries: int = 2**21,
    seed: int = 0,
) -> Gap:
    r"""Split log p(x) - ELBO of each datum into approximation gap and amortization gap.

    Each datum gets a row of parameters of the guide's family (a learned scale that the family shares among data
    becomes the datum's own; networks inside a family stay as they are), climbed by Adam on the bound, from the
    guide's answer and from the prior, at its draw that explains the datum best; the higher of the two counts. A
    datum's learning rate halves wherever its steps no longer lead uphill beyond their noise, by their products with the
    gradients that follow, whose draws are new; the climb ends when all rates are a hundredth of the first. All bounds
    are then estimated anew, by fresh draws that the two guides have in common.

    Steps are absolute, 0.1 at first and 1e-3 at last, as suits latent variables of scale 1. Where a posterior is
    narrower than some 1e-2 the climb stops short and charges to the family what it missed: a warning says so.

    Args:
        program: a `VAE`. Its model and its guide are left untouched, bit by bit.
        x: data, a tensor (n, *x) or a batch dict.
        log_evidence: log p(x) of each datum in nats, shape (n,), or something that has it as `log_evidence`, with its
            standard error as `error` or `mc_se`; by default exact where there is a closed form, else the
            importance-weighted estimate by the draws of :math:`q^*`.
        draws: samples a datum of the estimates, at least 2.
        steps: of each climb, at the most.
        entries: numbers that the draws of a block of data may hold, which bounds the memory.
        seed: of all draws; the global random state is left alone.

    Returns:
        The gap of each datum.

    Raises:
        TypeError: for a program that is no `VAE`: there is no family to choose from.
        ValueError: for fewer than two draws, one step or one entry, or data or evidence that do not fit or are NaN.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud 2018), section 3. The gradient is
        that of Sticking the Landing (Roeder, Wu, Duvenaud 2017); the products of steps and gradients tell noise from
        progress as in Pflug, Non-asymptotic confidence bounds for stochastic approximation algorithms with constant
        step size (1990).
    """
    if not isinstance(program, VAE):
        raise TypeError(
            f"Expected a VAE, whose guide's family is known; got {type(program).__name__}. For other programs compare "
            "ELBO and log evidence instead: log_evidence(program, x, samples) has both."
        )
    draws, steps, entries = check_int("draws", draws, 2), check_int("steps", steps), check_int("entries", entries)
    batch = check_batch(program, as_batch(x))
    n, features = len(batch["x"]), batch["x"][0].numel()
    truth, doubt = _known(program, batch, log_evidence)
    versions = _versions(program)
    size = max(1, min(_DATA, entries // (_PARTICLES * features)))
    parts = []
    for number, start in enumerate(range(0, n, size)):
        rows = slice(start, start + size)
        block = _Block(program, {key: value[rows] for key, value in batch.items()}, (seed, number), entries)
        with scope(program):
            parts.append(block.gap(None if truth is None else truth[rows], doubt[rows], draws, steps))
    if _versions(program) != versions:
        raise RuntimeError("Expected the model to stay frozen; one of its parameters or buffers was written to.")
    evidence, elbo, best, from_prior, total, first, second = (torch.cat(part) for part in zip(*parts, strict=True))
    return Gap(evidence - elbo, evidence - best, best - elbo, total, first, second, evidence, elbo, best, from_prior)


def _versions(program: VAE) -> list[int]:
    return [tensor._version for tensor in (*program.parameters(), *program.buffers())]


def _known(program: VAE, batch: dict[str, Tensor], given: Any) -> tuple[Tensor | None, Tensor]:
    """Give log p(x) where it is known, and its standard error."""
    zero = batch["x"].new_zeros(len(batch["x"]), dtype=torch.float64)
    if given is None:
        try:
            return exact_log_evidence(program, batch), zero
        except ValueError:
            return None, zero
    doubt = getattr(given, "error", getattr(given, "mc_se", zero))
    try:
        truth, doubt = (torch.as_tensor(value).to(zero) for value in (getattr(given, "log_evidence", given), doubt))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected `log_evidence` to be a tensor of a figure a datum, a Reference or an Evidence; got {given!r}."
        ) from error
    if truth.shape != zero.shape or doubt.shape != zero.shape:
        raise ValueError(
            f"Expected `log_evidence` of shape ({len(zero)},), a figure a datum; got {tuple(truth.shape)}"
            f"{f', its error of shape {tuple(doubt.shape)}' if doubt.shape != zero.shape else ''}."
        )
    if bool(truth.isnan().any()):
        raise ValueError(
            f"Expected `log_evidence` to be known; got NaN for {int(truth.isnan().sum())} of {len(truth)} data. NUTS "
            "has none: take closed-form, quadrature or ais."
        )
    return truth, doubt


class _Members:
    """A member of a family for each datum: a row of parameters, and a copy of whatever scale the family learns.

    Args:
        family: what the members are of; it is copied.
        rows: unconstrained parameters, shape (n, p).
    """

    def __init__(self, family: Family, rows: Tensor) -> None:
        event = family.event_shape
        own = {key: p.detach() for key, p in family.named_parameters(recurse=False) if p.shape in (event, ())}
        self.family: Any = copy.deepcopy(family)
        self.names = list(own)
        for key in own:
            delattr(self.family, key)
        self.start = [
            rows.detach().clone(),
            *(p.reshape(p.shape or (1,) * len(event)).repeat(len(rows), *(1,) * len(event)) for p in own.values()),
        ]

    def at(self, tensors: list[Tensor]) -> Any:
        """Give the distributions with these parameters, of batch shape (n,)."""
        for key, tensor in zip(self.names, tensors[1:], strict=True):
            setattr(self.family, key, tensor)
        return self.family.distribution(tensors[0])


class _Block:
    """A block of data, and bounds of guides for it.

    Args:
        program: whose model it is.
        batch: the data.
        key: of all draws.
        entries: numbers that draws may hold at a time.
    """

    def __init__(self, program: VAE, batch: dict[str, Tensor], key: tuple[int, int], entries: int) -> None:
        self.program, self.batch, self.key = program, batch, key
        self.device = batch["x"].device
        room = max(1, entries // batch["x"].numel())
        self.chunk = max(k for k in range(1, min(_JUDGES, room) + 1) if _JUDGES % k == 0)  # of one shape each time
        self.joint = Captured(lambda z: (self._joint(z),))
        self.steep = Captured(self._slope)

    def gap(self, truth: Tensor | None, doubt: Tensor, draws: int, steps: int) -> tuple[Tensor, ...]:
        """Give evidence, bound of the guide, best bound, whether the prior was the better start, and three errors."""
        family, network = self.program.posterior.family, self.program.posterior.network
        with torch.no_grad(), fork_rng(*self.key, "rows", device=self.device):
            width = family.start().numel()
            context = self.batch["index" if isinstance(network, Table) else "x"]
            rows = self.program.posterior.unconstrained(context, observed=self.batch.get("mask"))
        guide = _Members(family, rows)
        best, from_prior = guide.start, torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        if rows.shape[1] == width > 0:
            near, low = self._climb(guide, "guide", steps)
            far, high = self._climb(self._prior(family, rows), "prior", steps)
            from_prior = _higher(high, low)
            best = [_choose(from_prior, b, a) for a, b in zip(near, far, strict=True)]
        with torch.no_grad(), fork_rng(*self.key, "spread", device=self.device):
            spread = guide.at(best).rsample((_JUDGES,)).std(0).flatten(1).amin(1)
        if narrow := int((spread < 10 * _LEAST).sum()):
            warnings.warn(
                f"The posteriors of {narrow} of {len(rows)} data are narrower than {10 * _LEAST:g}, too narrow for the "
                "steps of the climb: the family's part is too large there, the network's too small. Rescale the "
                "latent variables.",
                stacklevel=3,
            )
        here, there = (self._weights(guide, tensors, draws, "final") for tensors in (guide.start, best))
        estimate = there.logsumexp(0) - math.log(draws)
        relative = (there - estimate).exp() if truth is None else torch.zeros_like(there)
        errors = torch.stack([one.std(0) / draws**0.5 for one in (relative - here, relative - there, there - here)])
        errors[:2] = (errors[:2].square() + doubt.square()).sqrt()
        return estimate if truth is None else truth, here.mean(0), there.mean(0), from_prior, *errors

    def _prior(self, family: Family, rows: Tensor) -> _Members:
        """Begin at the prior's draw that explains each datum best, with a tenth of the prior's spread."""
        twin = copy.deepcopy(family)
        with torch.no_grad(), fork_rng(*self.key, "start", device=self.device):
            prior, data = self.program.prior().expand([_STARTS]), self.batch
            draws = prior.sample().to(rows)
            decoded = (self.program.likelihood(z, mask=data.get("mask")) for z in draws.unsqueeze(1).split(self.chunk))
            given = torch.cat([p.log_prob(data["x"]) for p in decoded])  # each draw is decoded once, for all data
            around = 0.1 * (draws - draws.mean(0))
            best = (given + prior.log_prob(draws).unsqueeze(1)).argmax(0).tolist()
            start = [twin.fit_start(draws[row] + around) for row in best]
        return _Members(twin, torch.stack(start).to(rows))

    @torch.no_grad()
    def _weights(self, members: _Members, tensors: list[Tensor], draws: int, word: str) -> Tensor:
        """Give log weights (draws, n); a word always gives the same draws."""
        parts = []
        for number, start in enumerate(range(0, draws, self.chunk)):
            with fork_rng(*self.key, word, number, device=self.device):
                q = members.at(tensors)
                z = q.rsample((min(self.chunk, draws - start),))
                parts.append(self.joint(z)[0] - q.log_prob(z).double())
        return torch.cat(parts)

    def _joint(self, z: Tensor) -> Tensor:
        return conditioned(self.program.model, {"z": z}, self.batch, len(z), 1)

    def _slope(self, z: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return (slope(self._joint(z), z),)

    def slopes(self, members: _Members, place: list[Tensor], draws: int = _PARTICLES) -> tuple[Tensor, ...]:
        """Give the gradient of each datum's bound in its parameters, by way of the draws alone (sticking the landing).

        It is without noise where the member is the posterior: what the score of the parameters adds is 0 on average.
        """
        q = members.at(place)
        z = q.rsample((draws,))
        here = z.detach().requires_grad_()
        score = slope(q.log_prob(here), here)
        return torch.autograd.grad(z, place, (self.steep(here)[0] - score) / draws)

    def _climb(self, members: _Members, word: str, steps: int) -> tuple[list[Tensor], Tensor]:
        """Climb the bound of each datum by Adam; give the mean parameters of the last steps, and their log weights.

        They are the start's where the climb led surely lower. To ask that it led surely higher would leave out small
        gains, and charge them to the family.
        """
        origin = self._weights(members, members.start, _JUDGES, "check")
        place = [value.clone().requires_grad_() for value in members.start]
        first, second, total, moved = ([torch.zeros_like(value) for value in place] for _ in range(4))
        rate = torch.full_like(origin[0], _RATE)
        rises: list[Tensor] = []
        with pyro.validation_enabled(False), fork_rng(*self.key, word, device=self.device):
            for step in range(1, steps + 1):
                slopes = [slope.nan_to_num(0.0, 0.0, 0.0) for slope in self.slopes(members, place)]
                along = [(g * d).flatten(1).sum(1) for g, d in zip(slopes, moved, strict=True)]
                rises.append(torch.stack(along).sum(0))
                for p, g, m, v, s, d in zip(place, slopes, first, second, total, moved, strict=True):
                    d.copy_(_adam(g, m, v, rate, step))
                    s += p.data.add_(d)
                if len(rises) == _EVERY or step == steps:
                    mean = [s / len(rises) for s in total]
                    rise = torch.stack(rises)
                    rate = torch.where(rise.sum(0) > rise.square().sum(0).sqrt(), rate, rate / 2)
                    if not bool((rate > _LEAST).any()):
                        break
                    rises = []
                    for s in total:
                        s.zero_()
        bound = self._weights(members, mean, _JUDGES, "check")
        lost = _higher(origin, bound)
        best = [_choose(lost, old, new) for new, old in zip(mean, members.start, strict=True)]
        return best, torch.where(lost, origin, bound)


def _adam(slope: Tensor, m: Tensor, v: Tensor, rate: Tensor, step: int) -> Tensor:
    """Give a step of Adam uphill, each datum at its own rate."""
    m.lerp_(slope, 0.1)
    v.lerp_(slope.square(), 0.01)
    size = rate.to(m).reshape(-1, *(1,) * (m.dim() - 1)) / (1 - 0.9**step)
    return size * m / ((v / (1 - 0.99**step)).sqrt() + 1e-8)


def _higher(new: Tensor, old: Tensor) -> Tensor:
    """Say where the mean of paired draws (k, n) rose by more than two standard errors."""
    rise = new - old
    return rise.mean(0) > 2 * rise.std(0) / len(rise) ** 0.5


def _choose(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *(1,) * (yes.dim() - 1)), yes, no)
