r"""Calibration: whether a guide's posteriors are right on average over data of its own model.

If z is drawn from the prior, x from the likelihood and :math:`z_1, \dots, z_L` from the exact posterior p(z|x), then z
looks like one of the draws, and the rank of any function of z and x among its values at the draws is uniform on
{0, ..., L}. Three functions are tested: each coordinate (Validating Bayesian Inference Algorithms with Simulation-Based
Calibration, Talts, Betancourt, Simpson, Vehtari and Gelman 2018); the distance to a reference point, which takes in all
coordinates at once (Sampling-Based Accuracy Testing of Posterior Estimators, Lemos, Coogan, Hezaveh and
Perreault-Levasseur 2023); and log p(x, z), which takes in x as well (Simulation-Based Calibration Checking for Bayesian
Computation: The Choice of Test Quantities Shapes Sensitivity, Modrak et al. 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.infer.svi import fit, parameters_of
from ppl_vae.networks.table import Table
from ppl_vae.programs.param_store import copied
from ppl_vae.programs.simulation import simulate_twice
from ppl_vae.programs.sites import ignores_data
from ppl_vae.programs.target import BLOCK, Target
from ppl_vae.programs.traces import batch_of, drawn_sites
from ppl_vae.programs.vae import VAE

_ENTRIES = 2**23  # numbers that one block of draws of the data may hold
_BINS = 20  # of the ranks, for the chi-square test
_LEVELS = 101  # nominal levels of the coverage curve


@dataclass(frozen=True)
class Calibration:
    r"""Ranks and coverage of a guide under its own model.

    Args:
        ranks: how many of the draws lie below the truth, integers from 0 to `draws`, shape (s, z).
        p_values: of the chi-square test that a coordinate's ranks are uniform, shape (z,).
        levels: nominal levels of the guide's regions, from 0 to 1, shape (l,).
        coverage: the fraction of simulations whose truth lies in the region of that level, shape (l,).
        coverage_p_value: of the Kolmogorov-Smirnov test that the two agree.
        joint_ranks: ranks of log p(x, z), likewise, shape (s,).
        joint_p_value: of the chi-square test that the ranks of log p(x, z) are uniform. Coordinates and coverage alone
            would pass a guide that ignores x and returns the prior.
        draws: L, the guide's draws of each simulation.
        level: false alarms that the verdict allows: an exact guide fails with at most this probability.
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
        """Smallest p-value of all tests, times their number (Bonferroni), at most 1."""
        return min(1.0, len(self._tests) * min(self._tests.values()))

    @property
    def weakest(self) -> str:
        """Name of the test with the smallest p-value, the first of equal ones."""
        return min(self._tests, key=self._tests.__getitem__)

    @property
    def _tests(self) -> dict[str, float]:
        """The p-value of each test by its name."""
        tests = {f"the rank of z{latent}": p for latent, p in enumerate(self.p_values.tolist())}
        return tests | {"the coverage": self.coverage_p_value, "the rank of log p(x, z)": self.joint_p_value}

    @property
    def verdict(self) -> Literal["no fault found", "miscalibrated"]:
        """Whether any test fails at `level`; passing them all proves nothing."""
        return "miscalibrated" if self.p_value < self.level else "no fault found"


@torch.no_grad()
def calibrate(
    program: Any,
    x: Any = None,
    *,
    draws: int = 99,
    simulations: int = 1000,
    level: float = 1e-3,
    refit: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Calibration:
    r"""Test a program's guide on data of its model, by simulation-based calibration and by coverage.

    Args:
        program: any program whose data can be drawn from its model, or a `Target`.
        x: placeholders for the data, a tensor (n, *x) or a batch dict. Their rows are used in turn for shapes, masks
            and whatever else the program takes; observed values do not count. A `VAE` needs none.
        draws: the guide's draws of each simulation, L.
        simulations: pairs (z, x) drawn from the model, s.
        level: probability with which the verdict fails an exact guide.
        refit: settings of `fit`, such as `{"epochs": 500}`, by which a copy of the guide is trained anew on each
            simulated data set, from where it is now, the model unchanged. So a guide that does not read its data, such
            as an autoguide, is tested together with its training. Each refit takes all of `x`, and gives n simulations.
        seed: of all draws; the global random state is left alone.

    Returns:
        Ranks, coverage and their p-values.

    Raises:
        ValueError: If a size is out of range, the guide keeps one row per datum, or data cannot be drawn from the
            model: it has factors, does not observe its data as they are, or its latent variables or data depend on
            observed values.

    References:
        Talts et al. (2018), algorithm 1; Lemos et al. (2023), algorithm 2. With `refit`, Yes, but Did It Work?:
        Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman 2018), section 3.2. The reference point of
        a simulation is one
        more draw of the guide.
    """
    draws, simulations = check_int("draws", draws), check_int("simulations", simulations, 2)
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be above 0 and below 1; got {level!r}.")
    if x is None and isinstance(program, VAE) and program.given is None:
        x = torch.zeros(1, *program.likelihood.family.event_shape)
    if x is None and not isinstance(program, Target):
        raise ValueError(
            f"Expected placeholder data `x` for a {type(program).__name__}; a VAE that is given nothing needs none."
        )
    target = Target.of(program, x)
    if refit is None and _keeps_rows(target, seed):
        raise ValueError(
            "Expected a guide that reads the data; this one draws the same whatever they are, or keeps one row per "
            'datum, and simulated data have none. Train it anew for each simulation, refit={"epochs": 500}, or compare '
            "it with a reference on its own data: compare_posteriors."
        )
    parts, block_size = [], 1 if target.structure.whole else BLOCK if refit is None else target.n
    simulations = simulations if refit is None else -(-simulations // block_size) * block_size
    for number, rows in enumerate((torch.arange(simulations, device=target.device) % target.n).split(block_size)):
        part = target.rows(rows) if refit is None else target
        batch, truth = simulate_twice(part, seed, "simulate", number)
        block = target.with_batch(batch) if refit is None else _refitted(target, batch, {"seed": number, **refit})
        with block.running(seed, "guide", number):
            reference, *drawn = block.draws(draws + 1)
            z = torch.stack([truth, *drawn])
            distances = ((z - reference) / z.std(0).clamp_min(torch.finfo(z.dtype).tiny)).norm(dim=-1)
            parts.append((_rank(z), _rank(distances), _rank(_joint(block, z))))
    ranks, distance, joint = (torch.cat(column) for column in zip(*parts, strict=True))
    with fork_rng(seed, "coverage", device=target.device):
        uniform = (distance + torch.rand(len(distance), dtype=torch.float64, device=target.device)) / (draws + 1)
    levels = torch.linspace(0, 1, _LEVELS, dtype=torch.float64, device=target.device)
    return Calibration(
        ranks=ranks,
        p_values=_uniformity(ranks, draws),
        levels=levels,
        coverage=(uniform.unsqueeze(-1) <= levels).double().mean(0),
        coverage_p_value=float(stats.kstest(uniform.cpu().numpy(), "uniform").pvalue),
        joint_ranks=joint,
        joint_p_value=float(_uniformity(joint.unsqueeze(-1), draws)),
        draws=draws,
        level=level,
    )


@torch.enable_grad()
def _refitted(target: Target, batch: Any, settings: Mapping[str, Any]) -> Target:
    """A copy of a program whose guide is trained anew on other data; what its model learned stays."""
    twin = Target(copied(target.program), batch)
    with twin.running("refit"):
        tensors = parameters_of(twin)
        guide = poutine.trace(twin.program.guide).get_trace(**batch_of(twin.program.guide, twin.batch))
        given = {name: node["value"].detach() for name, node in drawn_sites(guide).items()}
        model = poutine.trace(poutine.condition(twin.program.model, given)).get_trace(**twin.batch)
        score: Any = model.log_prob_sum()
        slopes = (
            torch.autograd.grad(score, tensors, allow_unused=True) if score.requires_grad else [None] * len(tensors)
        )
    own = [tensor for tensor, slope in zip(tensors, slopes, strict=True) if slope is None]
    options: dict[str, Any] = {"device": str(target.device), "progress": False, "batch_size": target.n, **settings}
    fit(twin, parameters=own, **options)
    return twin


def _keeps_rows(target: Target, seed: int) -> bool:
    """Whether the guide's answer depends on the number or the place of a datum: equal data get different answers."""
    if isinstance(target.program, VAE) and isinstance(target.program.posterior.network, Table):
        return True
    if target.structure.whole:
        return ignores_data(target.program, target.batch, seed)
    batch = {key: value if key == "index" else value[:1].expand_as(value) for key, value in target.batch.items()}
    same = target.with_batch(batch)
    with target.running(seed, "rows"):
        z = same.draws(1)[:, :1].expand(-1, target.n, -1)
        try:
            score = same.score("guide", z)[0]
        except NotImplementedError:  # the guide scores only its own draws
            return False
    return not torch.allclose(score, score[:1], rtol=1e-4, atol=1e-4)


def _joint(target: Target, z: Tensor) -> Tensor:
    """Log p(x, z) in nats at draws (k, n, z), shape (k, n), a bounded number of entries at a time."""
    size = max(1, _ENTRIES // max(value.numel() for value in target.batch.values()))
    return torch.cat([target.score("model", some) for some in z.split(size)])


def _rank(values: Tensor) -> Tensor:
    """Count the draws (k, ...) below the truth, the first entry; ties are settled by lot."""
    truth, draws = values[0], values[1:]
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).long()


def _uniformity(ranks: Tensor, draws: int) -> Tensor:
    """P-values of the chi-square test that each column of ranks, from 0 to `draws`, is uniform."""
    bins = max(2, min(_BINS, draws + 1, len(ranks) // 20))
    counts = torch.nn.functional.one_hot(ranks * bins // (draws + 1), bins).sum(0)
    width = torch.bincount(torch.arange(draws + 1) * bins // (draws + 1), minlength=bins)
    expected = len(ranks) * width / (draws + 1)
    return torch.as_tensor(stats.chisquare(counts.cpu(), expected.expand_as(counts), axis=1).pvalue)
