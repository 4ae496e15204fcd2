r"""Annealed importance sampling of any program with continuous latent variables, and its two-sided sandwich.

A path of densities leads from a base that can be drawn from, the prior or the guide, to the joint,
:math:`\log f_\beta(z) = (1 - \beta) \log b(z) + \beta \log p(x, z)`. A chain climbs it by Hamiltonian moves that leave
each :math:`f_\beta` as it is, and collects the weight :math:`\log w = \sum_t (\beta_t - \beta_{t-1})
(\log p(x, z_{t-1}) - \log b(z_{t-1}))`, whose exponential is p(x) on average (Annealed Importance Sampling, Neal 2001).
On data drawn from the model the exact z is at hand, and the chain back from it bounds log p(x) from above (Measuring
the Reliability of MCMC Inference with Bidirectional Monte Carlo, Grosse, Ancha and Roy 2016).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.infer.hmc import HMC, RATE, Path, State, Transition, quiet
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.simulation import simulate_twice
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import Batch

_WARM = 20  # moves at the base before the preliminary run climbs


def inverse_temperatures(temperatures: int, schedule: Literal["linear", "sigmoid"] = "sigmoid") -> list[float]:
    r"""Give the inverse temperatures :math:`0 = \beta_0 < \dots < \beta_T = 1`.

    The sigmoid one is dense at both ends: :math:`\beta_t \propto \sigma(4 (2 t / T - 1)) - \sigma(-4)`.

    Raises:
        ValueError: for fewer than one temperature or an unknown schedule.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse 2017).
    """
    even = torch.linspace(0, 1, check_int("temperatures", temperatures) + 1, dtype=torch.float64)
    if schedule == "sigmoid":
        bent = torch.sigmoid(4 * (2 * even - 1))
        even = (bent - bent[0]) / (bent[-1] - bent[0])
    elif schedule != "linear":
        raise ValueError(f"Expected `schedule` to be 'linear' or 'sigmoid'; got {schedule!r}.")
    return even.tolist()


def anneal(state: State, betas: list[float], transition: Transition, *, reverse: bool = False) -> tuple[Tensor, State]:
    r"""Take chains up the path, or down it, and collect their weights.

    Args:
        state: drawn from the base; for the way down, from the posterior.
        betas: inverse temperatures, rising.
        transition: a move that leaves :math:`f_\beta` as it is: called with a state, beta and its number. On the way
            down it must be the reverse of the one on the way up.
        reverse: go down.

    Returns:
        Log weights (k, n) in nats: of the way up, :math:`E\,w = p(x)`; of the way down, :math:`E\,1/w = 1/p(x)`. And
        where the chains ended.
    """
    weights = torch.zeros_like(state.tilt)
    for number in range(len(betas) - 1, 0, -1) if reverse else range(1, len(betas)):
        if reverse:
            state = transition(state, betas[number], number)
        weights = weights + (betas[number] - betas[number - 1]) * state.tilt
        if not reverse:
            state = transition(state, betas[number], number)
    return weights, state


@dataclass(frozen=True)
class Annealing:
    r"""What annealing found.

    Args:
        log_weights: of each chain and datum, (k, n) in nats, in double precision.
        latents: where each chain ended, (k, n, z): under the weights a sample of p(z|x).
        acceptance: mean rate of accepted moves, (n,).
    """

    log_weights: Tensor
    latents: Tensor
    acceptance: Tensor

    @property
    def log_evidence(self) -> Tensor:
        r"""Give :math:`\log \frac1k \sum_i w_i` of each datum, (n,): on average a lower bound of log p(x)."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))

    @property
    def error(self) -> Tensor:
        r"""Give its standard error by the delta method, :math:`\sqrt{\chi^2 / k}`, (n,); NaN for a single chain.

        Where few chains are effective (`ess`), it is too small: see `settled`.
        """
        return _delta(self.log_weights)

    @property
    def ess(self) -> Tensor:
        r"""Give the effective number of chains, :math:`1 / \sum_i \bar w_i^2`, (n,)."""
        return 1 / self.shares.square().sum(0)

    @property
    def settled(self) -> Tensor:
        r"""Say for which data the estimate and its error can be relied on, (n,); for others it is low on average.

        Where the variance of log weights over chains is below 1.2 for the median datum, at 95 % confidence, and below
        4 for the datum itself; or 100 chains are effective. Were log weights normal, k chains would then be some
        :math:`(e^{1.2} - 1) / 2 k` nats too low, a fraction of their error. Few chains tell little of their variance,
        and to pick the data where it came out small would pick those whose estimate is low; hence the median, as data
        of one program anneal alike. A mode that no chain has reached leaves no trace.
        """
        free = (len(self.log_weights) - 1) * self.log_weights.shape[1]
        if free < 1:
            return torch.zeros_like(self.acceptance, dtype=torch.bool)
        cube = 1 - 2 / (9 * free) - 1.645 * math.sqrt(2 / (9 * free))
        most = 1.2 * max(cube, 0.0) ** 3  # of a sample's variance: the 5 % quantile of chi-squared (Wilson, Hilferty)
        variance = self.log_weights.var(0)
        return ((variance < 4) & (variance.median() < most)) | (self.ess > 100)

    @property
    def shares(self) -> Tensor:
        """Give the chains' weights, (k, n), which add up to one for each datum."""
        return self.log_weights.softmax(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Give the posterior's mean (n, z) and covariance (n, z, z), by the weighted chains."""
        loc = torch.einsum("kn,knz->nz", self.shares, self.latents)
        apart = self.latents - loc
        return loc, torch.einsum("kn,kny,knz->nyz", self.shares, apart, apart)


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
        upper_error: likewise of `upper`, given the exact draw where all chains of a datum begin.
        batch: the simulated data.
    """

    lower: Tensor
    upper: Tensor
    lower_error: Tensor
    upper_error: Tensor
    batch: Batch

    @property
    def gap(self) -> Tensor:
        """Give upper less lower, (n,)."""
        return self.upper - self.lower


@dataclass(frozen=True)
class AnnealingSettings:
    """How chains are annealed.

    Args:
        chains: per datum.
        temperatures: moves from the base to the joint.
        leapfrog: steps, each one gradient, in a move.
        schedule: of the inverse temperatures, `"linear"` or `"sigmoid"`.
        start: the base, `"prior"` or `"guide"`; the guide must be able to score any z.
        tuning: temperatures of the preliminary run; a quarter as many by default.
        entries: numbers that the data of one block of chains may hold, which bounds the memory.

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


def annealed_importance(program: Any, x: Any = None, *, seed: int = 0, **settings: Any) -> Annealing:
    """Estimate log p(x) of each datum by annealed importance sampling.

    A preliminary run with chains of its own adapts the step size of each datum and temperature until 65 % of the moves
    are accepted. The step sizes are then frozen, so that the estimate is valid.

    Args:
        program: any program with continuous latent sites, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        seed: of the draws; the global random state is left alone.
        **settings: those of `AnnealingSettings`: `chains` (16), `temperatures` (500), `leapfrog` (10), `schedule`
            ("sigmoid"), `start` ("prior"), `tuning`, `entries`.

    Returns:
        The chains' weights and ends.

    Raises:
        ValueError: If the data do not fit, a setting is out of range, or a latent site has no gradient.
    """
    how = AnnealingSettings(**settings)
    parts = []
    for joint, blocks, key in _blocks(Target.of(program, x), how, seed):
        with quiet(joint, *key):
            path = Path(joint, how.start)
            move = _tuned(path, min(max(how.chains, 4), 16, blocks[0]), how)
            betas = inverse_temperatures(how.temperatures, how.schedule)
            pieces = [_climb(path, k, move, betas) for k in blocks]
        rate = torch.stack([piece.acceptance for piece in pieces]).mean(0)
        joined = [torch.cat([getattr(piece, name) for piece in pieces]) for name in ("log_weights", "latents")]
        parts.append((*joined, rate))
    weights, latents, rates = zip(*parts, strict=True)
    return Annealing(torch.cat(weights, 1), torch.cat(latents, 1), torch.cat(rates))


def bidirectional(program: Any, x: Any = None, *, seed: int = 0, **settings: Any) -> Sandwich:
    """Draw data from the model and bound log p(x) of each from both sides.

    The chains up begin at the base, those down at the very z that the datum was drawn with, which is an exact draw of
    its posterior. The gap bounds the error of either on average, and shows what annealing is worth on data like these.

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
    how = AnnealingSettings(**settings)
    parts, batches = [], []
    for given, blocks, key in _blocks(Target.of(program, x), how, seed):
        with quiet(given, *key, "bidirectional"):
            with torch.no_grad():
                batch, z = simulate_twice(given.target, *key, "simulate")
            joint = Joint(given.target.with_batch(batch))
            path = Path(joint, how.start)
            truth = joint.place(z.unsqueeze(0))
            move = _tuned(path, min(max(how.chains, 4), 16, blocks[0]), how)
            betas = inverse_temperatures(how.temperatures, how.schedule)
            up = torch.cat([_climb(path, k, move, betas).log_weights for k in blocks])
            ends = [path.at(truth.expand(k, -1, -1)) for k in blocks]
            down = torch.cat([anneal(end, betas, move, reverse=True)[0] for end in ends])
        count = math.log(how.chains)
        parts.append((up.logsumexp(0) - count, count - (-down).logsumexp(0), _delta(up), _delta(-down)))
        batches.append(batch)
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    lower, upper, lower_error, upper_error = (torch.cat(part) for part in zip(*parts, strict=True))
    return Sandwich(lower, upper, lower_error, upper_error, joined)


def _blocks(target: Target, how: AnnealingSettings, seed: int) -> Iterator[tuple[Joint, list[int], tuple[int, int]]]:
    """Blocks of data and of their chains that fit in memory together, with a key for the draws of each."""
    features = target.features + Joint(target.rows(slice(0, 1))).size
    side = max(1, min(how.chains, how.entries // features))
    rows = max(1, how.entries // (features * side))
    sizes = [min(side, how.chains - begun) for begun in range(0, how.chains, side)]
    for number, block in enumerate(target.blocks(rows)):
        yield Joint(block), sizes, (seed, number)


def _tuned(path: Path, k: int, how: AnnealingSettings) -> HMC:
    """Adapt the step sizes in a run with k chains of its own, and freeze them."""
    tuning = max(how.temperatures // 4, min(how.temperatures, 25)) if how.tuning is None else how.tuning
    coarse = inverse_temperatures(tuning, how.schedule)
    scale = torch.cat([path.joint.draw(path.start, k) for _ in range(math.ceil(64 / k))]).std(0).clamp_min(1e-6)
    steps = torch.full((len(coarse), path.joint.n), 0.5, dtype=torch.float64, device=scale.device)
    move, state = HMC(path, scale, steps, how.leapfrog), path.draw(k)

    def adapt(state: State, beta: float, number: int) -> State:
        state = move(state, beta, number)
        after = steps[number] * (0.5 * (move.rate - RATE)).exp()
        steps[number : number + 2] = after.clamp(1e-4, 2.0)
        return state

    for _ in range(_WARM):
        state = adapt(state, 0.0, 0)
    anneal(state, coarse, adapt)
    place = torch.tensor(inverse_temperatures(how.temperatures, "linear"), device=scale.device) * (len(coarse) - 1)
    below = place.long().clamp(max=max(len(coarse) - 2, 0))
    part = (place - below).unsqueeze(-1)
    move.steps = steps[below] * (1 - part) + steps[below + 1] * part
    return move


def _climb(path: Path, k: int, move: HMC, betas: list[float]) -> Annealing:
    rates = []

    def counted(state: State, beta: float, number: int) -> State:
        state = move(state, beta, number)
        rates.append(move.rate)
        return state

    weights, state = anneal(path.draw(k), betas, counted)
    return Annealing(weights, path.joint.latents(state.u), torch.stack(rates).mean(0))
