r"""Annealed importance sampling of any program with continuous latent variables, and its two-sided sandwich.

A path of densities leads from a base that can be sampled, the prior or the guide, to the joint,
:math:`\log f_\beta(z) = (1 - \beta) \log b(z) + \beta \log p(x, z)`. A chain climbs it by Hamiltonian moves that leave
each :math:`f_\beta` invariant, and collects the weight :math:`\log w = \sum_t (\beta_t - \beta_{t-1})
(\log p(x, z_{t-1}) - \log b(z_{t-1}))`, whose exponential is p(x) on average (Annealed Importance Sampling, Neal 2001).
For data drawn from the model the exact z is known, and the chain back from it bounds log p(x) from above (Measuring
the Reliability of MCMC Inference with Bidirectional Monte Carlo, Grosse, Ancha and Roy 2016).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_int
from ppl_vae._progress import track
from ppl_vae.infer.hmc import HMC, RATE, Chains, Path, Transition, unvalidated
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.parts import in_parts
from ppl_vae.programs.simulation import simulate_twice
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import Batch

_DRAWS = 4096  # of prior and guide each, which importance sampling holds against the chains
_WARM = 20  # moves at the base before the preliminary run climbs


def inverse_temperatures(temperatures: int, schedule: Literal["linear", "sigmoid"] = "sigmoid") -> list[float]:
    r"""Inverse temperatures :math:`0 = \beta_0 < \dots < \beta_T = 1`.

    Those of the sigmoid schedule are dense at both ends: :math:`\beta_t \propto \sigma(4 (2 t / T - 1)) - \sigma(-4)`.

    Raises:
        ValueError: If there is less than one temperature, or the schedule is unknown.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse 2017).
    """
    check_choice("schedule", schedule, ("linear", "sigmoid"))
    even = torch.linspace(0, 1, check_int("temperatures", temperatures) + 1, dtype=torch.float64)
    if schedule == "sigmoid":
        bent = torch.sigmoid(4 * (2 * even - 1))
        even = (bent - bent[0]) / (bent[-1] - bent[0])
    return even.tolist()


def anneal(chains: Chains, betas: list[float], move: Transition, *, reverse: bool = False) -> tuple[Tensor, Chains]:
    r"""Take chains up the path, or down it, and collect their weights.

    Args:
        chains: drawn from the base; for the way down, from the posterior.
        betas: inverse temperatures, rising.
        move: a transition that leaves :math:`f_\beta` invariant, called with the chains, beta and its number. On the
            way down it must be the reverse of the one on the way up.
        reverse: go down.

    Returns:
        Log weights (k, n) in nats: of the way up, :math:`E\,w = p(x)`; of the way down, :math:`E\,1/w = 1/p(x)`. Then
        the chains where they ended.
    """
    weights = torch.zeros_like(chains.tilt)
    numbers = range(len(betas) - 1, 0, -1) if reverse else range(1, len(betas))
    for number in track(numbers, f"annealing of {chains.tilt.shape[-1]:,} data: {{}} temperatures", len(betas) - 1):
        if reverse:
            chains = move(chains, betas[number], number)
        weights = weights + (betas[number] - betas[number - 1]) * chains.tilt
        if not reverse:
            chains = move(chains, betas[number], number)
    return weights, chains


@dataclass(frozen=True)
class Annealing:
    r"""Chains annealed from a base to the posterior of each datum, and their weights.

    Args:
        log_weights: of each chain and datum, (k, n) in nats, in double precision.
        latents: where each chain ended, (k, n, z): weighted draws from p(z|x).
        acceptance: mean rate of accepted moves, (n,).
        floor: what importance sampling from prior or guide finds log p(x) to be at least, four errors below its
            estimate, (n,) in nats; None of a single chain.
    """

    log_weights: Tensor
    latents: Tensor
    acceptance: Tensor
    floor: Tensor | None = None

    @property
    def log_evidence(self) -> Tensor:
        r""":math:`\log \frac1k \sum_i w_i` of each datum, (n,): on average a lower bound of log p(x)."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))

    @property
    def error(self) -> Tensor:
        r"""Standard error of `log_evidence` by the delta method, :math:`\sqrt{\chi^2 / k}`, (n,); NaN for one chain.

        It is too small where few chains are effective (`ess`): see `settled`.
        """
        return _delta(self.log_weights)

    @property
    def ess(self) -> Tensor:
        r"""Effective number of chains, :math:`1 / \sum_i \bar w_i^2`, (n,)."""
        return 1 / self.shares.square().sum(0)

    @property
    def settled(self) -> Tensor:
        r"""Data whose estimate and error can be relied on, (n,); the estimate of the others is too low on average.

        A datum has settled if the variance of log weights over chains is below 1.2 for the median datum, at 95 %
        confidence, and below 4 for the datum itself; or if 100 chains are effective. With normal log weights, k chains
        would then be about :math:`(e^{1.2} - 1) / 2 k` nats too low, a fraction of their error. The median counts
        because few chains tell little of a datum's own variance, and data of one program anneal alike. Nor has a datum
        settled for which importance sampling finds surely more (`floor`). A mode that neither chains nor these draws
        reach leaves no trace: in many dimensions chains can all settle in one of several modes.
        """
        free = (len(self.log_weights) - 1) * self.log_weights.shape[1]
        if free < 1:
            return torch.zeros_like(self.acceptance, dtype=torch.bool)
        cube = 1 - 2 / (9 * free) - 1.645 * math.sqrt(2 / (9 * free))
        most = 1.2 * max(cube, 0.0) ** 3  # of a sample's variance: the 5 % quantile of chi-squared (Wilson, Hilferty)
        variance = self.log_weights.var(0)
        steady = ((variance < 4) & (variance.median() < most)) | (self.ess > 100)
        if self.floor is None:
            return steady
        return steady & (self.log_evidence + 4 * self.error.nan_to_num(0.0) >= self.floor)

    @property
    def shares(self) -> Tensor:
        """Weights of the chains, (k, n), which sum to one for each datum."""
        return self.log_weights.softmax(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (n, z) and covariance (n, z, z) of the posterior, by the weighted chains."""
        loc = torch.einsum("kn,knz->nz", self.shares, self.latents)
        centred = self.latents - loc
        return loc, torch.einsum("kn,kny,knz->nyz", self.shares, centred, centred)


def _delta(log_weights: Tensor) -> Tensor:
    k = len(log_weights)
    ratio = (log_weights - log_weights.logsumexp(0) + math.log(k)).exp()
    return ratio.std(0) / math.sqrt(k) if k > 1 else torch.full_like(ratio[0], math.nan)


@dataclass(frozen=True)
class Sandwich:
    r"""Log p(x) of simulated data from below and above: tensors of shape (n,), in nats, in double precision.

    Args:
        lower: :math:`\log \frac1k \sum_i w_i` of the chains up, at most log p(x) on average.
        upper: :math:`-\log \frac1k \sum_i 1 / w_i` of the chains down, at least log p(x) on average.
        lower_error: standard error of `lower`, by the delta method.
        upper_error: likewise of `upper`, given the exact draw from which all chains of a datum start.
        batch: the simulated data.
    """

    lower: Tensor
    upper: Tensor
    lower_error: Tensor
    upper_error: Tensor
    batch: Batch

    @property
    def gap(self) -> Tensor:
        """Upper minus lower, (n,)."""
        return self.upper - self.lower


@dataclass(frozen=True)
class AnnealingSettings:
    """How chains are annealed.

    Args:
        chains: how many per datum.
        temperatures: moves from the base to the joint.
        leapfrog: steps per move, each one gradient.
        schedule: of the inverse temperatures, `"linear"` or `"sigmoid"`.
        start: the base, `"prior"` or `"guide"`; the guide must be able to score any z.
        tuning: temperatures of the preliminary run; a quarter as many by default.
        entries: how many numbers a block of data and chains may hold, which bounds the memory.

    Raises:
        ValueError: If a setting is out of range.
    """

    chains: int = 16
    temperatures: int = 500
    leapfrog: int = 10
    schedule: Literal["linear", "sigmoid"] = "sigmoid"
    start: Literal["prior", "guide"] = "prior"
    tuning: int | None = None
    entries: int = 2**21

    def __post_init__(self) -> None:
        for name in ("chains", "temperatures", "leapfrog", "entries"):
            check_int(name, getattr(self, name))
        if self.tuning is not None:
            check_int("tuning", self.tuning)
        inverse_temperatures(1, self.schedule)

    @property
    def betas(self) -> list[float]:
        """The inverse temperatures."""
        return inverse_temperatures(self.temperatures, self.schedule)


def annealed_importance(program: Any, x: Any = None, *, seed: int = 0, **settings: Any) -> Annealing:
    """Estimate log p(x) of each datum by annealed importance sampling.

    A preliminary run with its own chains adapts the step size of each datum and temperature until 65 % of the moves
    are accepted. The step sizes are then frozen, so that the estimate is valid.

    Args:
        program: any program with continuous latent sites, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        seed: of the draws; the global random state is left alone.
        **settings: those of `AnnealingSettings`: `chains` (16), `temperatures` (500), `leapfrog` (10), `schedule`
            ("sigmoid"), `start` ("prior"), `tuning`, `entries`.

    Returns:
        The chains where they ended, and their weights.

    Raises:
        ValueError: If the data do not fit, a setting is out of range, or a latent site has no gradient.
    """
    target, how = Target.of(program, x), AnnealingSettings(**settings)
    parts = in_parts(target, _annealed, _sizes(target, how)[0], how, seed)
    weights, latents, rates, floors = zip(*(block for blocks in parts for block in blocks), strict=True)
    floor = None if how.chains == 1 else torch.cat(floors)
    return Annealing(torch.cat(weights, 1), torch.cat(latents, 1), torch.cat(rates), floor)


def bidirectional(program: Any, x: Any = None, *, seed: int = 0, **settings: Any) -> Sandwich:
    """Draw data from the model and bound log p(x) of each from both sides.

    The chains up start at the base, those down at the z that the datum was drawn with, which is an exact draw from its
    posterior. The gap bounds the error of either on average, and together with two errors that of one datum. It shows
    how well annealing does on data like these.

    Args:
        program: any program with continuous latent sites whose observed sites are entries of the batch, or a `Target`.
        x: data (n, *x) or a batch dict, whose shapes, masks and labels the simulated data take; none beside a `Target`.
        seed: of the data and the draws; the global random state is left alone.
        **settings: those of `annealed_importance`; `chains` counts each way.

    Returns:
        Both bounds and the simulated data.

    Raises:
        ValueError: As `annealed_importance`, or if the observed sites are not entries of the batch.
    """
    target, how = Target.of(program, x), AnnealingSettings(**settings)
    parts = in_parts(target, _both_ways, _sizes(target, how)[0], how, seed)
    bounds, batches = zip(*(block for blocks in parts for block in blocks), strict=True)
    whole = len(batches) == 1  # whose entries need no leading size
    joined = batches[0] if whole else {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    lower, upper, lower_error, upper_error = (torch.cat(part) for part in zip(*bounds, strict=True))
    return Sandwich(lower, upper, lower_error, upper_error, joined)


def _sizes(target: Target, how: AnnealingSettings) -> tuple[int, list[int]]:
    """Data in a block, and the sizes of the blocks of their chains."""
    features = target.features + Joint(target.rows(slice(0, 1))).size
    side = max(1, min(how.chains, how.entries // features))
    sizes = [min(side, how.chains - start) for start in range(0, how.chains, side)]
    return max(1, how.entries // (features * side)), sizes


def _blocks(
    target: Target, first: int, how: AnnealingSettings, seed: int
) -> Iterator[tuple[Joint, list[int], tuple[int, int]]]:
    """Blocks of data, numbered from `first`, the sizes of the blocks of their chains, and a key for the draws."""
    rows, sizes = _sizes(target, how)
    for number, block in enumerate(target.blocks(rows), first):
        yield Joint(block), sizes, (seed, number)


def _annealed(target: Target, first: int, how: AnnealingSettings, seed: int) -> list[tuple[Any, ...]]:
    """The fields of an `Annealing`, block by block."""
    blocks: list[tuple[Any, ...]] = []
    for joint, sizes, key in _blocks(target, first, how, seed):
        with unvalidated(joint, *key):
            climbed = _climb(_tuned(Path(joint, how.start), how, sizes[0]), how, sizes)
            size = how.entries // ((joint.target.features + joint.size) * joint.n)
            floor = None if how.chains == 1 else _floor(joint, max(1, size))  # a single chain never settles
            blocks.append((*climbed, floor))
    return blocks


def _both_ways(target: Target, first: int, how: AnnealingSettings, seed: int) -> list[tuple[tuple[Tensor, ...], Batch]]:
    """The bounds of a `Sandwich` with their errors, and the simulated data, block by block."""
    blocks = []
    for given, sizes, key in _blocks(target, first, how, seed):
        with unvalidated(given, *key, "bidirectional"):
            with torch.no_grad():
                batch, z = simulate_twice(given.target, *key, "simulate")
            path = Path(Joint(given.target.with_batch(batch)), how.start)
            move = _tuned(path, how, sizes[0])
            up, *_ = _climb(move, how, sizes)
            truth = path.joint.place(z.unsqueeze(0))
            ends = [path.at(truth.expand(k, -1, -1)) for k in sizes]
            down = torch.cat([anneal(end, how.betas, move, reverse=True)[0] for end in ends])
        count = math.log(how.chains)
        bounds: tuple[Tensor, ...] = (up.logsumexp(0) - count, count - (-down).logsumexp(0), _delta(up), _delta(-down))
        blocks.append((bounds, batch))
    return blocks


def _tuned(path: Path, how: AnnealingSettings, most: int) -> HMC:
    """Moves whose step sizes a run of at most `most` chains has adapted."""
    k = min(max(how.chains, 4), 16, most)
    tuning = max(how.temperatures // 4, min(how.temperatures, 25)) if how.tuning is None else how.tuning
    coarse = inverse_temperatures(tuning, how.schedule)
    scale = torch.cat([path.joint.draw(path.start, k) for _ in range(math.ceil(64 / k))]).std(0).clamp_min(1e-6)
    steps = torch.full((len(coarse), path.joint.n), 0.5, dtype=torch.float64, device=scale.device)
    move, chains = HMC(path, scale, steps, how.leapfrog), path.draw(k)

    def adapt(chains: Chains, beta: float, number: int) -> Chains:
        chains = move(chains, beta, number)
        after = steps[number] * (0.5 * (move.rate - RATE)).exp()
        steps[number : number + 2] = after.clamp(1e-4, 2.0)
        return chains

    for _ in range(_WARM):
        chains = adapt(chains, 0.0, 0)
    anneal(chains, coarse, adapt)
    position = torch.tensor(inverse_temperatures(how.temperatures, "linear"), device=scale.device) * (len(coarse) - 1)
    below = position.long().clamp(max=max(len(coarse) - 2, 0))
    part = (position - below).unsqueeze(-1)
    move.steps = steps[below] * (1 - part) + steps[below + 1] * part
    return move


def _climb(move: HMC, how: AnnealingSettings, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Anneal blocks of chains from the base, one after the other; returns the parts of an `Annealing`."""
    rates: list[Tensor] = []

    def counted(chains: Chains, beta: float, number: int) -> Chains:
        chains = move(chains, beta, number)
        rates.append(move.rate)
        return chains

    climbs = [anneal(move.path.draw(k), how.betas, counted) for k in sizes]
    latents = [move.path.joint.latents(chains.u) for _, chains in climbs]
    rate = torch.stack(rates).unflatten(0, (len(sizes), -1)).mean(1).mean(0)
    return torch.cat([weights for weights, _ in climbs]), torch.cat(latents), rate


@torch.no_grad()
def _floor(joint: Joint, size: int) -> Tensor:
    """Four errors below the importance-sampling estimate of log p(x), (n,), from the prior or the guide, the higher."""
    floor = torch.full((joint.n,), -math.inf, dtype=torch.float64, device=joint.device)
    draws = min(_DRAWS, 64 * size)
    starts: tuple[Literal["prior", "guide"], ...] = ("prior",) if joint.auxiliary else ("prior", "guide")
    for start in starts:
        parts = []
        for begun in range(0, draws, size):
            u = joint.draw(start, min(size, draws - begun))
            prior, likelihood = joint.log_probs(u)
            try:
                parts.append(likelihood if start == "prior" else prior + likelihood - joint.log_guide(u))
            except ValueError:  # of a guide that cannot score its draws
                return floor
        weights = torch.cat(parts).nan_to_num(-math.inf, neginf=-math.inf)
        estimate = weights.logsumexp(0) - math.log(draws)
        floor = torch.maximum(floor, (estimate - 4 * _delta(weights)).nan_to_num(-math.inf))
    return floor
