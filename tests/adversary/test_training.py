"""Training of programs that others wrote: each is trained to its known optimum, or refused by name.

The model is z ~ N(m, t), x ~ N(z, s) in d dimensions, so that the best mean-field guide is exact and its bound is
log p(x) in closed form. The guides keep rows by position or by `index`, are set up when they are first called, or are
amortized; they are trained in batches and as a whole, and asked about the data they know and about others.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide
from torch import Tensor, nn

from ppl_vae import VAE, Conditional, Program, fit, log_evidence
from ppl_vae.evaluation import codes
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.networks import Linear, Table
from ppl_vae.programs import sites

BLOCK = 4  # data that share a row, of the guides in blocks
SLACK = 0.05  # nats per datum that are left to the optimiser, as one stated error of training has 0.01
REFUSALS = (
    "one row per datum|one row each|latent sites with a density|`index`|that this program was fitted to|no batches|"
    "no validation"
)


@dataclass(frozen=True)
class Case:
    """A program, its data and what training it must come to.

    Args:
        kind: which guide.
        program: to be trained.
        x: data, (n, d).
        batch_size: of training.
        bound: the optimum, (n,) in nats.
        whole: whether the program takes all data or none.
        joint: whether the guide draws all latent variables at once, so that the whole data set counts as one datum.
        parameters: the tensors to learn; all by default.
    """

    kind: str
    program: Any
    x: Tensor
    batch_size: int
    bound: Tensor
    whole: bool
    joint: bool = False
    parameters: Any = None


class Rows(nn.Module):
    """A guide whose rows are parameters of a module, taken by position."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.zeros(n, d)), nn.Parameter(torch.zeros(n, d))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1) as place:
            pyro.sample("z", dist.Normal(self.loc[place], self.raw[place].exp()).to_event(1))


def _param(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    loc = pyro.param(f"{name}.loc", lambda: torch.zeros(shape))
    return loc, pyro.param(f"{name}.scale", lambda: torch.ones(shape), constraint=constraints.positive)


def guides(n: int, d: int) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Location and scale of each datum, for guides in plain Pyro without `index`."""

    def linear(x: Tensor) -> tuple[Tensor, Tensor]:
        weight = pyro.param("weight", lambda: torch.randn(d))
        bias, scale = _param("shared", d)
        return weight * x + bias, scale.expand(x.shape)

    def part(take: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda x: tuple(take(value, len(x)) for value in _param("rows", n, d))  # type: ignore[return-value]

    def beside(x: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = part(lambda value, m: value[:m])(x)
        return pyro.param("weight", lambda: torch.zeros(d)) * x + loc, scale

    return {
        "lazy rows": lambda x: _param("rows", len(x), d),
        "all rows": lambda x: _param("rows", n, d),
        "first rows": part(lambda value, m: value[:m]),
        "last rows": part(lambda value, m: value[n - m :]),
        "rows backwards": part(lambda value, m: value.flip(0)[:m]),
        "rows beside a line": beside,
        "lazy blocks": lambda x: tuple(
            value[torch.arange(len(x)) // BLOCK] for value in _param("rows", -(-len(x) // BLOCK), d)
        ),
        "blocks": part(lambda value, m: value[torch.arange(m) // BLOCK]),
        "line": linear,
    }


AUTOMATIC = {  # whether the guide draws all latent variables at once, so that the whole data set counts as one datum
    "AutoNormal": False,
    "AutoDelta": False,
    "AutoDiagonalNormal": True,
    "AutoMultivariateNormal": True,
    "AutoLowRankMultivariateNormal": True,
    "AutoIAFNormal": True,
}
KINDS = (*guides(1, 1), *AUTOMATIC, "module", "rows of the model", "index", "Table", "amortized VAE")


def cases(seed: int, count: int) -> Iterator[Case]:
    """Cases with n from 4 to 40, d from 1 to 3, t and s from 0.3 to 2, m from -2 to 2; a third have one batch."""
    for number in range(seed, seed + count):
        generator, kind = torch.Generator().manual_seed(number), KINDS[number % len(KINDS)]

        def uniform(low: float, high: float, generator: torch.Generator = generator) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        n, d = int(uniform(4, 41)), int(uniform(1, 4))
        n = min(n, 8) if AUTOMATIC.get(kind) else n  # all latent variables together are few enough to train fast
        m, t, s = uniform(-2, 2), uniform(0.3, 2), uniform(0.3, 2)
        if kind in ("Table", "amortized VAE"):
            m, t = 0.0, 1.0
        x = m + math.hypot(t, s) * torch.randn(n, d, generator=generator)
        size = (n, 3 * n, max(1, n // 4), max(1, n // 3), max(1, n // 2), n - 1)[int(uniform(0, 6))]
        yield _case(kind, x, m, t, s, size)


def _case(kind: str, x: Tensor, m: float, t: float, s: float, size: int) -> Case:
    n, d = x.shape
    bound = dist.Normal(m, math.hypot(t, s)).log_prob(x).sum(-1)
    whole, known = True, guides(n, d)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.full((d,), m), t).to_event(1))
            pyro.sample("x", dist.Normal(z, s).to_event(1), obs=x)

    def plain(name: str) -> Callable[[Tensor], None]:
        def guide(x: Tensor) -> None:
            loc, scale = known[name](x)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        return guide

    program: Any
    if kind in known:
        program, whole = Program(model, plain(kind)), kind != "line"
        if "blocks" in kind:  # the best shared location is the mean of the posteriors' means
            variance = 1 / (1 / t**2 + 1 / s**2)
            loc = (m / t**2 + x / s**2) * variance
            shared = torch.cat([part.mean(0).expand(part.shape) for part in loc.split(BLOCK)])
            bound = bound - 0.5 * ((loc - shared).square() / variance).sum(-1)
    elif kind in AUTOMATIC:
        program = Program(model, getattr(autoguide, kind)(model))
        if kind == "AutoDelta":
            z = (x * t**2 + m * s**2) / (t**2 + s**2)
            bound = (dist.Normal(m, t).log_prob(z) + dist.Normal(z, s).log_prob(x)).sum(-1)
    elif kind == "module":
        program = Program(model, Rows(n, d))
    elif kind == "rows of the model":

        def shifted(x: Tensor) -> None:
            shift = pyro.param("shift", lambda: torch.zeros(n, d))[: len(x)]
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.full((d,), m), t).to_event(1))
                pyro.sample("x", dist.Normal(z + shift, s).to_event(1), obs=x)

        program, bound = Program(shifted, plain("line")), torch.full((n,), -d * math.log(math.hypot(t, s)))
        bound = bound - d * 0.5 * math.log(2 * math.pi)
    elif kind == "index":

        def numbered_model(x: Tensor, index: Tensor) -> None:
            model(x)

        def numbered_guide(x: Tensor, index: Tensor) -> None:
            loc, scale = _param("rows", n, d)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(loc[index], scale[index]).to_event(1))

        program, whole = Program(numbered_model, numbered_guide), False
    else:
        posterior = Conditional(Normal(d), Table(n) if kind == "Table" else Linear())
        program = VAE(Conditional(StandardNormal(d)), Conditional(Normal(d, scale=s), Linear()), posterior)
        with torch.no_grad():
            program.likelihood.network.weight.copy_(torch.eye(d))
            program.likelihood.network.bias.zero_()
        return Case(kind, program, x, size, bound, False, parameters=[*program.posterior.parameters()])
    joint = AUTOMATIC.get(kind, False)
    return Case(kind, program, x, size, bound, whole and not joint, joint)


def score(case: Case, seed: int = 0, *, share: float = 1.0) -> tuple[str, float]:
    """Train a case, at a share of the usual rate, and ask about its data, about some of them and about others.

    One that is off is trained on, four times as long: what has not converged then does, what is wrong stays so.

    Returns:
        `trained`, `refused` or `fault`, and by how much the worst answer that was given is off, in stated errors: the
        standard error of the estimate and a fifth of `SLACK`.
    """
    pyro.clear_param_store()
    epochs = 150 if case.batch_size < len(case.x) and not case.joint else 400 if case.joint else 250
    options: Any = {"batch_size": case.batch_size, "parameters": case.parameters, "progress": False, "seed": seed}
    options |= {"learning_rate": share * (0.1 if case.joint else 0.2), "schedule": "one-cycle", "particles": 5}
    worst = math.inf
    for times in (1, 4):
        try:
            history = fit(case.program, case.x, **options, epochs=times * epochs)
        except ValueError as error:
            return ("refused" if _named(error) else "fault"), 0.0
        worst = _worst(case, history.elbo[-1], seed)
        if worst < 3:
            break
    return ("trained", worst) if math.isfinite(worst) else ("fault", 0.0)


def _worst(case: Case, bound: float, seed: int) -> float:
    """By how much the worst answer is off, infinite if there is none for the data that were fitted."""
    if case.kind == "AutoDelta":
        return abs(bound - float(case.bound.mean())) / (SLACK / 5)
    worst, half = 0.0, len(case.x) // 2
    orders = (slice(None), slice(0, half), slice(half, None), torch.arange(len(case.x)).flip(0))
    for number, rows in enumerate(orders):
        try:
            evidence = log_evidence(case.program, case.x[rows], 300, seed=seed)
            assert len(codes(case.program, case.x[rows], 2)[0]) == (1 if case.joint else len(case.x[rows]))
        except ValueError as error:
            if number == 0 or not _named(error):
                return math.inf
            continue
        miss = abs(float(evidence.elbo.sum() - case.bound[rows].sum())) / len(case.bound[rows])
        spread = float(evidence.elbo_mc_se.square().sum().sqrt()) / len(case.bound[rows])
        worst = max(worst, miss / (spread + SLACK / 5))
    return worst


def _named(error: ValueError) -> bool:
    return any(part in str(error) for part in REFUSALS.split("|"))


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """How many cases were trained wrongly in silence, were refused, with or without need, or failed.

    Those that are off are trained anew at a tenth of the rate: at too high a rate flows diverge, with any optimiser.
    """
    tried = []
    for number in range(seed, seed + count):
        for share in (1.0, 0.1):
            case = next(cases(number, 1))
            outcome, miss = score(case, share=share)
            if miss <= 5:
                break
        tried.append((case, outcome, miss))
    needless = [
        case
        for case, outcome, _ in tried
        if outcome == "refused" and (not case.whole or case.batch_size >= len(case.x))
    ]
    return {
        "cases": count,
        "beyond_5": sum(miss > 5 for _, _, miss in tried),
        "beyond_50": sum(miss > 50 for _, _, miss in tried),
        "refused": sum(outcome == "refused" for _, outcome, _ in tried),
        "refused_needlessly": len(needless),
        "faults": sum(outcome == "fault" for _, outcome, _ in tried),
    }


def test_programs_of_others_are_trained_right_or_refused() -> None:
    counts = rates(24)
    assert counts["beyond_5"] == counts["beyond_50"] == counts["faults"] == counts["refused_needlessly"] == 0
    assert 3 < counts["refused"] < 18


@pytest.mark.parametrize("kind", ["first rows", "module", "rows of the model"])
def test_shuffled_training_of_rows_would_be_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the probe not there, the score would see it."""
    case = _case(kind, torch.linspace(-3, 3, 12).unsqueeze(-1), 0.0, 1.0, 0.5, 12)
    assert score(case)[1] < 5
    case = _case(kind, torch.linspace(-3, 3, 12).unsqueeze(-1), 0.0, 1.0, 0.5, 4)
    assert score(case)[0] == "refused"
    monkeypatch.setattr(sites, "by_place", lambda *given: False)
    case = _case(kind, torch.linspace(-3, 3, 12).unsqueeze(-1), 0.0, 1.0, 0.5, 4)
    assert score(case)[1] > 5
