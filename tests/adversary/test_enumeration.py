"""Sums over discrete latents under attack: evidence and posterior moments of random discrete programs.

Each case is a random program of one to four sites of two to four values, each of which depends on one or two of those
before it, or none; some lie in an inner plate of two to three places, and some are summed out by the guide, which draws
the remaining ones. Probabilities are down to 1e-6. Up to five observations (normal, Poisson or Bernoulli) depend on one
or two sites each; entries of some are masked. In a third of the cases a normal latent, exactly conjugate given the
sites, is drawn by a guide whose law depends on them, so that weights have a variance. The truth: every combination of
values, one by one, with scipy's densities.

Counted are all; beyond is an evidence off by more than five times its error and its bias, plus 1e-9.
"""

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from scipy import special, stats
from torch import Tensor

from ppl_vae import Program, log_evidence

N = 3


class _Law:
    """What a case draws: sizes, parents and tables of its sites, and what is observed of which."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = rng.integers(2, 5, rng.integers(1, 5)).tolist()
        self.parents, self.tables = [], []
        for i, size in enumerate(self.sizes):
            some = sorted(rng.choice(i, min(i, int(rng.integers(0, 3))), replace=False).tolist()) if i else []
            shape = (*(self.sizes[j] for j in some), size)
            table = rng.dirichlet(np.full(size, 10 ** rng.uniform(-1, 1)), shape[:-1]).reshape(shape) + 1e-6
            self.parents.append(some)
            self.tables.append(table / table.sum(-1, keepdims=True))
        self.kinds, self.seen, self.values, self.x = [], [], [], []
        for _ in range(rng.integers(1, 6)):
            some = sorted(
                rng.choice(len(self.sizes), min(len(self.sizes), int(rng.integers(1, 3))), replace=False).tolist()
            )
            kind = str(rng.choice(["normal", "poisson", "bernoulli"]))
            value = rng.normal(size=tuple(self.sizes[j] for j in some)) * 10 ** rng.uniform(-1, 1)
            self.kinds.append(kind)
            self.seen.append(some)
            self.values.append(value)
            self.x.append(
                {"normal": rng.normal(size=N) * 3, "poisson": rng.poisson(2.0, N), "bernoulli": rng.integers(0, 2, N)}[
                    kind
                ]
            )
        self.mask = rng.random((N, len(self.kinds))) > 0.2
        self.drawn = int(rng.integers(0, len(self.sizes))) if seed % 3 == 1 else None  # by the guide, not summed
        self.summed = int(rng.integers(0, len(self.sizes))) if seed % 3 == 2 else None  # by the guide
        self.guess = rng.dirichlet(np.full(self.sizes[self.drawn or 0], 2.0))
        self.latent = seed % 4 == 3  # z | site 0 ~ N(m, 1), observed once with noise 1
        self.means, self.y = 3 * rng.normal(size=self.sizes[0]), 2 * rng.normal(size=N)

    def log_density(self) -> Any:
        """Log p(x) of each datum by the sum over all combinations, (n,)."""
        terms = []
        for values in itertools.product(*map(range, self.sizes)):
            term = np.full(
                N,
                sum(
                    math.log(t[(*(values[j] for j in p), v)])
                    for t, p, v in zip(self.tables, self.parents, values, strict=True)
                ),
            )
            for k, (kind, some, table, x) in enumerate(zip(self.kinds, self.seen, self.values, self.x, strict=True)):
                value = table[tuple(values[j] for j in some)]
                log = {
                    "normal": lambda x, v: stats.norm(v, 0.5).logpdf(x),
                    "poisson": lambda x, v: stats.poisson(math.exp(v / 4)).logpmf(x),
                    "bernoulli": lambda x, v: stats.bernoulli(special.expit(v)).logpmf(x),
                }[kind](x, value)
                term += np.where(self.mask[:, k], log, 0.0)
            if self.latent:
                term += stats.norm(self.means[values[0]], math.sqrt(2)).logpdf(self.y)
            terms.append(term)
        return special.logsumexp(terms, axis=0)


def case(seed: int) -> tuple[Program, dict[str, Tensor], Tensor]:
    """A program, its batch and log p(x), (n,)."""
    law = _Law(seed)
    tables = [torch.as_tensor(table) for table in law.tables]
    values = [torch.as_tensor(value) for value in law.values]
    means, guess = torch.as_tensor(law.means), torch.as_tensor(law.guess)
    columns = {f"x{k}": torch.as_tensor(x, dtype=torch.float64) for k, x in enumerate(law.x)}
    batch = {**columns, "mask": torch.as_tensor(law.mask), "y": torch.as_tensor(law.y)}

    def at(table: Tensor, some: list[int], found: list[Tensor]) -> Tensor:
        return Vindex(table)[tuple(found[j] for j in some)] if some else table  # type: ignore[no-any-return]

    def model(**batch: Tensor) -> None:
        found: list[Tensor] = []
        with pyro.plate("data", len(batch["y"]), dim=-1):
            for i, (table, parents) in enumerate(zip(tables, law.parents, strict=True)):
                infer = {} if i in (law.drawn, law.summed) else {"enumerate": "parallel"}
                probs = at(torch.cat([table]), parents, found) if parents else table
                found.append(pyro.sample(f"s{i}", dist.Categorical(probs), infer=infer))
            if law.latent:
                z = pyro.sample("z", dist.Normal(means[found[0]], 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=batch["y"])
            for k, (kind, some, value) in enumerate(zip(law.kinds, law.seen, values, strict=True)):
                level = at(value, some, found)
                if kind == "normal":
                    likelihood: Any = dist.Normal(level, 0.5)
                else:
                    likelihood = dist.Poisson((level / 4).exp()) if kind == "poisson" else dist.Bernoulli(logits=level)
                with pyro.poutine.mask(mask=batch["mask"][:, k]):
                    pyro.sample(f"x{k}", likelihood, obs=batch[f"x{k}"])

    def guide(**batch: Tensor) -> None:
        with pyro.plate("data", len(batch["y"]), dim=-1):
            if law.drawn is not None:
                pyro.sample(f"s{law.drawn}", dist.Categorical(guess))
            if law.summed is not None:
                size = law.sizes[law.summed]
                pyro.sample(
                    f"s{law.summed}", dist.Categorical(torch.full((size,), 1 / size)), infer={"enumerate": "parallel"}
                )
            if law.latent:
                pyro.sample("z", dist.Normal((means.mean() + batch["y"]) / 2, 2.0 + means.std(correction=0)))

    return Program(model, guide), batch, torch.as_tensor(law.log_density())


def rates(count: int, seed: int = 0, samples: int = 1000) -> dict[str, float]:
    """Cases whose evidence is an estimate, and those beyond five and fifty errors."""
    counted, beyond = 0, {5: 0, 50: 0}
    for number in range(seed, seed + count):
        program, batch, truth = case(number)
        found = log_evidence(program, batch, samples, seed=number)
        counted += found.kind == "estimate"
        miss = ((found.log_evidence - truth).abs() - found.bias.abs() - 1e-9).clamp_min(0)
        for limit in beyond:
            beyond[limit] += int(found.kind == "estimate" and bool((miss > limit * found.mc_se).any()))
    return {"cases": count, "estimates": counted, "beyond_5": beyond[5], "beyond_50": beyond[50]}


def test_the_evidence_of_discrete_programs_is_the_sum_over_their_values() -> None:
    assert rates(12)["beyond_5"] == 0


def test_a_combination_that_is_left_out_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = itertools.product
    monkeypatch.setattr(itertools, "product", lambda *ranges: list(plain(*ranges))[:-1])
    assert rates(6)["beyond_5"] >= 3
