"""Bijections: round trips, volumes against autograd, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppl_vae.families.supports import Sphere, unit
from ppl_vae.programs.bijections import LowerCholesky, bijection, limits


def below(offset: int) -> Callable[[Tensor], Tensor]:
    """The entries of a matrix below a diagonal, side by side."""
    return lambda y: y[tuple(torch.tril_indices(*y.shape[-2:], offset=offset))]


LOW, HIGH = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 5.0, 2.5])
CASES: dict[str, tuple[Any, int, Callable[[Tensor], Tensor]]] = {  # support, coordinates, free entries of a value
    "real": (constraints.real, 3, lambda y: y),
    "positive": (constraints.independent(constraints.positive, 1), 3, lambda y: y),
    "unit": (constraints.independent(unit, 1), 3, lambda y: y),
    "intervals": (constraints.independent(constraints.interval(LOW, HIGH), 1), 3, lambda y: y),
    "greater": (constraints.greater_than(LOW), 3, lambda y: y),
    "less": (constraints.less_than(1.5), 3, lambda y: y),
    "simplex": (constraints.simplex, 3, lambda y: y[:-1]),
    "ordered": (constraints.ordered_vector, 3, lambda y: y),
    "positive_ordered": (constraints.positive_ordered_vector, 3, lambda y: y),
    "lower_cholesky": (constraints.lower_cholesky, 6, below(0)),
    "positive_definite": (constraints.positive_definite, 6, below(0)),
    "corr_cholesky": (constraints.corr_cholesky, 3, below(-1)),
    "corr_matrix": (constraints.corr_matrix, 3, below(-1)),
    "stack": (
        constraints.stack([constraints.real, constraints.positive, constraints.unit_interval], -1),
        3,
        lambda y: y,
    ),
    "cat": (constraints.cat([constraints.unit_interval, constraints.positive], -1, [2, 1]), 3, lambda y: y),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_values_go_back_and_volumes_are_jacobians(name: str) -> None:
    support, size, free = CASES[name]
    transform = bijection("z", support)
    u = torch.randn(4, size, generator=torch.Generator().manual_seed(3))
    y = transform(u)
    assert support.check(y).all()
    torch.testing.assert_close(transform.inv(y), u)
    assert transform.inverse_shape(y.shape) == u.shape
    volume = transform.log_abs_det_jacobian(u, y).reshape(4, -1).sum(-1)
    jacobian: Any = torch.autograd.functional.jacobian
    truth = [torch.linalg.slogdet(jacobian(lambda one: free(transform(one)), row))[1] for row in u]
    torch.testing.assert_close(volume, torch.stack(truth))


def test_matrices_that_are_singular_to_rounding_have_no_volume() -> None:
    transform = bijection("z", constraints.positive_definite)
    u = torch.tensor([[0.0, 0.5, 0.0], [0.0, 1e12, 0.0], [0.0, 0.0, -800.0], [0.0, math.nan, 0.0]], requires_grad=True)
    y = transform(u)
    volume = transform.log_abs_det_jacobian(u, y)
    assert volume.isfinite().tolist() == [True, False, False, False]
    assert (volume[1:3] == -math.inf).all()
    torch.linalg.cholesky(y[:3])  # a model can still take them
    gradient = torch.autograd.grad(volume[0] + y[:3].sum(), u)[0]
    assert gradient[:3].isfinite().all()


def test_cholesky_factors_agree_with_numpy() -> None:
    u = torch.randn(2, 10)
    factor = LowerCholesky()(u)
    matrix = bijection("z", constraints.positive_definite)(u)
    np.testing.assert_allclose(np.linalg.cholesky(matrix.numpy()), factor.numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (Sphere(), "unconstrained coordinates.*got 'z' on the unit sphere"),
        (constraints.sphere, "got 'z' on Sphere"),
        (constraints.unit_lower_cholesky, "got 'z' on UnitLowerCholesky"),
        (constraints.nonnegative_integer, "continuous latent sites.*'z', which is discrete"),
        (constraints.cat([constraints.simplex, constraints.positive], -1, [2, 1]), "got 'z' on Cat"),
    ],
)
def test_other_supports_are_refused_by_name(support: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bijection("z", support)


def test_the_bounds_of_a_support_are_found() -> None:
    assert len(list(limits(dist.Uniform(LOW, HIGH).to_event(1).support))) == 2
    assert list(limits(dist.Normal(0.0, 1.0).support)) == []
