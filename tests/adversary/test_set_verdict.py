"""The verdict on a set: sets of importance weights of known mean that try to get an interval that misses.

Weights are drawn as such, with mean 1, so that log p(x) = 0 for each datum. A case is a set of n data with S weights
each, n from 1 to 10,000 and S from 25 to 10,000 (with at most 300,000 weights in all), of one of these kinds:

- `tails`: all data alike, of shape k from 0 to 0.9: normal posteriors met by narrower guides, exact Pareto tails, or
  gamma weights (no tail at all, but a large variance).
- `mixed tails`: each datum with a shape of its own, from 0 to 0.9.
- `contaminated`: 0.1 to 1 % of the data, at least one, missed by 5 to 20 posterior deviations, by a guide that is exact
  or nearly so for the others.
- `discrete`: two to six possible weights, the probability of the rarest down to 1e-4, up to 1,000 times the others.
- `endless`: weights 2^(jk) of probability 2^-j, a discrete heavy tail of shape k from 0.1 to 0.9.

A mode that no draw saw leaves no trace in the weights, and only a reference can contradict. Discrete cases are counted
apart, as `hidden`, if all draws of a datum have one weight, or miss a value that carries more than 1 % of the mean.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ppl_vae.evaluation.evidence import Evidence

KINDS = ("tails", "mixed tails", "contaminated", "discrete", "endless")
MOST = 300_000  # weights of a case


@dataclass(frozen=True)
class Case:
    """Log weights (S, n) whose mean is 1, and whether a value that matters was seen by no draw."""

    kind: str
    words: str
    log_weights: torch.Tensor
    hidden: bool = False


def narrow(rng: np.random.Generator, k: np.ndarray, samples: int, n: int) -> np.ndarray:
    """N(0, 1) met by N(0, 1 - k): a tail of shape k."""
    z = np.sqrt(1 - k) * rng.normal(size=(samples, n))
    return 0.5 * k / (1 - k) * z**2 + 0.5 * np.log1p(-k)


def missed(rng: np.random.Generator, deviations: np.ndarray, samples: int) -> np.ndarray:
    """N(d, 1) met by N(0, 1)."""
    return deviations * rng.normal(size=(samples, len(deviations))) - 0.5 * deviations**2


def discrete(rng: np.random.Generator, samples: int, n: int) -> tuple[str, np.ndarray, bool]:
    count = int(rng.integers(2, 7))
    probability = rng.dirichlet(np.ones(count))
    rarest = 10 ** rng.uniform(-4, -0.5)
    probability = np.append(probability[:-1] / probability[:-1].sum() * (1 - rarest), rarest)
    value = np.append(rng.gamma(2.0, size=count - 1), 10 ** rng.uniform(-1, 3))
    value /= (probability * value).sum()
    index = rng.choice(count, p=probability, size=(samples, n))
    heavy = np.flatnonzero(probability * value > 0.01)
    hidden = not all((index == which).any(0).all() for which in heavy) or bool((index == index[0]).all(0).any())
    words = f"largest {value[-1]:.3g} of probability {rarest:.2g}"
    return words, np.log(value)[index] + 1e-14 * rng.normal(size=index.shape), hidden


def make(rng: np.random.Generator, kind: str) -> Case:
    while True:
        n, samples = (round(10 ** rng.uniform(low, 4)) for low in (0, math.log10(25)))
        n = max(n, 10) if kind == "contaminated" else n
        if n * samples <= MOST:
            break
    hidden, k = False, rng.uniform(0, 0.9)
    if kind == "tails":
        shape = str(rng.choice(["normal", "Pareto", "gamma"]))
        words = f"{shape}, k = {k:.2f}"
        if shape == "normal":
            weights = narrow(rng, np.array(k), samples, n)
        elif shape == "Pareto":
            weights = k * rng.exponential(size=(samples, n)) + np.log1p(-k)
        else:
            size = 10 ** rng.uniform(-1, 1)
            words = f"gamma of size {size:.2g}"
            weights = np.log(rng.gamma(size, size=(samples, n)).clip(1e-300)) - math.log(size)
    elif kind == "mixed tails":
        words, weights = "k from 0 to 0.9", narrow(rng, rng.uniform(0, 0.9, n), samples, n)
    elif kind == "contaminated":
        bad = max(1, round(n * 10 ** rng.uniform(-3, -2)))
        deviations = rng.uniform(5, 20, bad)
        rest = narrow(rng, np.array(rng.choice([0.0, 0.01, 0.1, 0.3])), samples, n - bad)
        words = f"{bad} missed by {deviations.min():.1f} deviations or more"
        weights = np.concatenate([rest, missed(rng, deviations, samples)], 1)
    elif kind == "discrete":
        words, weights, hidden = discrete(rng, samples, n)
    else:
        words = f"k = {k:.2f}"
        step = rng.geometric(0.5, size=(samples, n))
        weights = step * k * math.log(2) - math.log(2 ** (k - 1) / (1 - 2 ** (k - 1)))
    return Case(kind, f"{kind}, n = {n}, S = {samples}, {words}", torch.from_numpy(np.asarray(weights)), hidden)


def cases(seed: int, count: int) -> Iterator[Case]:
    """Cases of all kinds in turn."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield make(rng, KINDS[number % len(KINDS)])


def score(case: Case) -> float | None:
    """The distance of the truth from the interval's centre in stated errors, half widths / 1.96; None for a bound."""
    interval = Evidence.of(case.log_weights).interval
    if interval is None:
        return None
    low, high = interval
    apart = max(abs((low + high) / 2) - 1e-9, 0.0)
    return apart / max((high - low) / 2 / 1.96, 1e-300)


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """How many cases are called estimates, are missed by the interval, by five and by fifty stated errors."""
    counts = Counter(cases=0, estimates=0, missed=0, beyond_5=0, beyond_50=0, hidden=0, hidden_beyond_5=0)
    for case in cases(seed, count):
        value = score(case)
        known = 0.0 if value is None else value
        if case.hidden:
            counts.update(hidden=1, hidden_beyond_5=int(known > 5))
        else:
            counts.update(cases=1, estimates=int(value is not None), missed=int(known > 1.96))
            counts.update(beyond_5=int(known > 5), beyond_50=int(known > 50))
    return dict(counts)


def test_stated_intervals_hold() -> None:
    counts = rates(200, seed=1)
    assert counts["beyond_5"] <= 0.01 * counts["cases"]
    assert counts["beyond_50"] == 0
    assert counts["missed"] <= 0.05 * counts["cases"]
    assert counts["estimates"] > 0.2 * counts["cases"]


@pytest.mark.parametrize("others", [0.0, 0.1, 0.3])
def test_a_contaminated_set_is_never_an_estimate_that_misses(others: float) -> None:
    """0.1 to 1 % of the data missed by 5 to 20 posterior deviations; at most 1 % of the cases may miss."""
    rng = np.random.default_rng(2)
    misses = 0
    for _ in range(100):
        n, samples = int(rng.integers(100, 1001)), int(10 ** rng.uniform(1.4, 2.7))
        bad = max(1, round(n * rng.uniform(0.001, 0.01)))
        rest = narrow(rng, np.array(others), samples, n - bad)
        weights = np.concatenate([rest, missed(rng, rng.uniform(5, 20, bad), samples)], 1)
        interval = Evidence.of(torch.from_numpy(weights)).interval
        misses += interval is not None and not interval[0] <= 0 <= interval[1]
    assert misses <= 1


def main() -> None:
    """Print the rates of 4,000 cases."""
    print("set verdict", rates(4000))  # noqa: T201


if __name__ == "__main__":
    main()
