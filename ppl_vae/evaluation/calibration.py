r"""Calibration: whether a guide's posteriors are right on average over data of its own model.

If z is drawn from the prior, x from the likelihood and :math:`z_1, \dots, z_L` from the exact posterior p(z|x), then z
and the draws cannot be told apart, and the rank of anything made of z and x among the same made of the draws is
uniform on {0, ..., L}: of each coordinate (Validating Bayesian Inference Algorithms with Simulation-Based Calibration,
Talts, Betancourt, Simpson, Vehtari and Gelman 2018), of the distance to a reference point, which knows of all
coordinates at once (Sampling-Based Accuracy Testing of Posterior Estimators, Lemos, Coogan, Hezaveh and
Perreault-Levasseur 2023), and of log p(x, z), which knows of x as well (Simulation-Based Calibration Checking for
Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity, Modrak et al. 2023).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.programs._old_draws import guide_draws, site_values
from ppl_vae.programs.latent_vector import Layout
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.simulation import simulate_twice
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import check_batch, conditioned, structure
from ppl_vae.programs.vae import VAE

_DATA = 100  # data at a time
_ENTRIES = 2**23  # numbers that one block of draws of the data may hold
_BINS = 20  # of the ranks, for the chi-square test
_LEVELS = 101  # nominal levels of the coverage curve


@dataclass(frozen=True)
class Calibration:
    r"""Ranks and coverage of a guide under its own model.

    Args:
        ranks: how many of the draws lie below the truth, whole numbers from 0 to `draws`, shape (s, z).
        p_values: of the chi-square test that a coordinate's ranks are uniform, shape (z,).
        levels: nominal levels of the guide's regions, from 0 to 1, shape (l,).
        coverage: the fraction of simulations whose truth lies in the region of that level, shape (l,).
        coverage_p_value: of the Kolmogorov-Smirnov test that the two agree.
        joint_ranks: ranks of log p(x, z), likewise, shape (s,).
        joint_p_value: of the chi-square test that the ranks of log p(x, z) are uniform; coordinates and coverage alone
            would let pass a guide that ignores x and answers the prior.
        draws: L, the guide's draws of each simulation.
        level: the false alarms that the verdict allows: a guide that is exact fails with at most this probability.
    """

    ranks: Tensor
    p_values: Tensor
    levels: Tensor
    coverage: Tensor
    coverage_p_value: float
    joint_ranks: Tensor
    joint_p_value: float
    draws: int
    level: float

    @property
    def p_value(self) -> float:
        """Give the smallest p-value of all tests, times their number (Bonferroni), at most 1."""
        return min(1.0, len(self._tests) * min(self._tests.values()))

    @property
    def weakest(self) -> str:
        """Name the test with the smallest p-value, the first of equal ones."""
        return min(self._tests, key=self._tests.__getitem__)

    @property
    def _tests(self) -> dict[str, float]:
        """Give the p-value of each test by its name."""
        tests = {f"the rank of z_{latent}": p for latent, p in enumerate(self.p_values.tolist())}
        return tests | {"the coverage": self.coverage_p_value, "the rank of log p(x, z)": self.joint_p_value}

    @property
    def verdict(self) -> Literal["no fault found", "miscalibrated"]:
        """Say whether any test fails at `level`; a test that finds nothing proves nothing."""
        return "miscalibrated" if self.p_value < self.level else "no fault found"


@torch.no_grad()
def calibrate(
    program: Any, x: Any = None, *, draws: int = 99, simulations: int = 1000, level: float = 1e-3, seed: int = 0
) -> Calibration:
    r"""Test a program's guide on data of its model, by simulation-based calibration and by coverage.

    Args:
        program: any program whose data can be drawn from its model.
        x: placeholders for the data, a tensor (n, *x) or a batch dict, whose rows give shapes, masks and whatever
            else the program takes and are used in turn; what is observed in them does not count. Not needed for a
            `VAE`.
        draws: the guide's draws of each simulation, L.
        simulations: pairs (z, x) drawn from the model, s.
        level: probability with which the verdict fails an exact guide.
        seed: of all draws; the global random state is left alone.

    Returns:
        Ranks, coverage and their p-values.

    Raises:
        ValueError: for sizes out of range, or a model that cannot be drawn from: it has factors, does not observe its
            data as they are, or its latent variables or data depend on observed values.

    References:
        Talts et al. (2018), algorithm 1; Lemos et al. (2023), algorithm 2. The reference point of a simulation is one
        more draw of the guide.
    """
    draws, simulations = check_int("draws", draws), check_int("simulations", simulations, 2)
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be above 0 and below 1; got {level!r}.")
    if x is None and not isinstance(program, VAE):
        raise ValueError(f"Expected placeholder data `x` for a {type(program).__name__}; only a VAE needs none.")
    if x is None:
        x = torch.zeros(1, *program.likelihood.family.event_shape)
    batch = check_batch(program, as_batch(x))
    found = structure(program, batch, seed=seed)
    first = next(iter(batch.values()))
    rows = torch.arange(simulations, device=first.device) % len(first)
    batches, truths = [], []
    for number, part in enumerate(rows.split(_DATA)):
        given = {key: value[part] for key, value in batch.items()}
        drawn, truth = simulate_twice(Target(program, given), seed, "simulate", number)
        batches.append(drawn)
        truths.append(truth)
    truth = torch.cat(truths)
    ranks, distances, joints = [], [], []
    for number, (part, one) in enumerate(zip(batches, truth.split(_DATA), strict=True)):
        with scope(program), fork_rng(seed, "guide", number, device=first.device):
            z, layout = guide_draws(program, part, draws + 1, found)
            ranks.append(_rank(z[1:], one))
            distances.append(_rank(*_distances(z[1:], one, z[0])))
            scores = _joint(program, part, layout, torch.cat([one.unsqueeze(0), z[1:]]))
            joints.append(_rank(scores[1:], scores[0]))
    rank, distance, joint = torch.cat(ranks), torch.cat(distances), torch.cat(joints)
    with fork_rng(seed, "coverage", device=first.device):
        uniform = (distance + torch.rand(len(distance), dtype=torch.float64, device=first.device)) / (draws + 1)
    levels = torch.linspace(0, 1, _LEVELS, dtype=torch.float64, device=first.device)
    coverage = (uniform.unsqueeze(-1) <= levels).double().mean(0)
    return Calibration(
        ranks=rank,
        p_values=_chi_square(rank, draws),
        levels=levels,
        coverage=coverage,
        coverage_p_value=_kolmogorov(uniform.sort().values),
        joint_ranks=joint,
        joint_p_value=float(_chi_square(joint.unsqueeze(-1), draws)),
        draws=draws,
        level=level,
    )


def _joint(program: Any, batch: dict[str, Tensor], layout: Layout, z: Tensor) -> Tensor:
    """Give log p(x, z) in nats at draws (k, n, z), shape (k, n), a bounded number of entries at a time."""
    size = max(1, _ENTRIES // max(value.numel() for value in batch.values()))
    scores = []
    for some in z.split(size):
        values = site_values(program, layout, some)
        scores.append(conditioned(program.model, values, batch, len(some), layout.nesting))
    return torch.cat(scores)


def _distances(z: Tensor, truth: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Give the distances of draws (k, n, z) and truth (n, z) from a reference, in units that treat them alike."""
    both = torch.cat([z, truth.unsqueeze(0)])
    apart = ((both - reference) / both.std(0).clamp_min(torch.finfo(z.dtype).tiny)).norm(dim=-1)
    return apart[:-1], apart[-1]


def _rank(draws: Tensor, truth: Tensor) -> Tensor:
    """Count the draws (k, ...) below the truth; ties are settled by lot."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).long()


def _chi_square(ranks: Tensor, draws: int) -> Tensor:
    """Test each column of whole numbers from 0 to `draws` for uniformity; give the p-values."""
    bins = max(2, min(_BINS, draws + 1, len(ranks) // 20))
    counts = torch.nn.functional.one_hot(ranks * bins // (draws + 1), bins).sum(0).double()
    width = torch.bincount(torch.arange(draws + 1, device=ranks.device) * bins // (draws + 1), minlength=bins)
    expected = len(ranks) * width.double() / (draws + 1)
    statistic = ((counts - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.full_like(statistic, (bins - 1) / 2), statistic / 2)


def _kolmogorov(uniform: Tensor) -> float:
    """Test sorted numbers for uniformity on [0, 1]: the asymptotic p-value, with Stephens' correction (1970)."""
    n = len(uniform)
    steps = torch.arange(n + 1, dtype=uniform.dtype, device=uniform.device) / n
    apart = float(torch.maximum(steps[1:] - uniform, uniform - steps[:-1]).max())
    value = apart * (n**0.5 + 0.12 + 0.11 / n**0.5)
    if value < 0.2:
        return 1.0
    terms = [(-1) ** (j - 1) * math.exp(-2 * (j * value) ** 2) for j in range(1, 101)]
    return min(1.0, max(0.0, 2 * sum(terms)))
