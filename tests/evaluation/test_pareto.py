"""The tail shape of weights beside ArviZ's, over tails of every kind."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ppl_vae.evaluation import pareto_k

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

Array = np.ndarray[Any, Any]


def theirs(log_weights: Array) -> float:
    if not hasattr(arviz, "psislw"):
        pytest.skip("this ArviZ has no psislw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(arviz.psislw(log_weights.copy())[1])


def ours(log_weights: Array) -> float:
    return float(pareto_k(torch.tensor(log_weights)[:, None]))


def tails(n: int) -> Iterator[tuple[str, Array]]:
    g = np.random.default_rng(n)
    yield from ((f"normal {scale}", scale * g.normal(size=n)) for scale in (0.01, 0.1, 1, 2, 5, 30, 300))
    yield from ((f"pareto {shape}", shape * g.exponential(size=n)) for shape in (0.1, 0.5, 0.7, 1, 2, 50))
    yield from ((f"t {df}", g.standard_t(df, size=n)) for df in (3, 10))
    yield "beta", np.log(g.beta(2, 3, size=n))
    yield "bounded", -0.5 * g.chisquare(5, size=n)
    yield "shifted", g.normal(size=n) - 1e5
    yield "outlier", np.append(g.normal(size=n - 1), 50.0)
    half = g.normal(size=n)
    half[n // 2 :] = -np.inf
    yield "half of no weight", half
    few = g.normal(size=n)
    few[20:] = -np.inf
    yield "twenty that weigh", few


@pytest.mark.parametrize("n", [25, 26, 57, 225, 226, 1000, 4999])
def test_shapes_equal_those_of_arviz(n: int) -> None:
    for name, log_weights in tails(n):
        assert ours(log_weights) == pytest.approx(theirs(log_weights), abs=1e-8), name


def test_where_it_differs_from_arviz_it_says_so() -> None:
    """Less than five weights that do not underflow are infinite there; ties are no continuous tail."""
    wild = 3000 * np.random.default_rng(0).normal(size=1000)
    assert theirs(wild) == np.inf
    assert ours(wild) > 10
    ties = -np.abs(np.random.default_rng(1).poisson(20, size=1000) - 20.0)
    assert theirs(ties) < -2 < ours(ties) < 0.5
    assert np.isnan(ours(np.zeros(1000)))
    apart = np.random.default_rng(2).normal(size=1000)
    assert ours(apart) != pytest.approx(theirs(1.1 * apart), abs=1e-3)  # the comparison can fail
