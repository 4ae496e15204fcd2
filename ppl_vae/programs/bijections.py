"""Bijections: unconstrained coordinates of latent sites, with the volume that these bring."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.constraints import corr_matrix
from pyro.distributions.transforms import CholeskyTransform, CorrCholeskyTransform, CorrMatrixCholeskyTransform
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, biject_to, constraints

from ppl_vae.families.supports import of_entries


class LowerCholesky(Transform):
    """Vectors of length m (m + 1) / 2 to lower triangular matrices with a positive diagonal, which is an exponential.

    The volume is that of the entries on and below the diagonal.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        place, diagonal = _diagonal(x)
        row, column = place.unsqueeze(-1), place
        below = torch.where(row > column, x[..., row * (row + 1) // 2 + column.minimum(row)], 0.0)
        return below + diagonal.exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        row, column = torch.tril_indices(*y.shape[-2:], device=y.device)
        entries = y[..., row, column]
        return torch.where(row == column, entries, 1.0).log() + torch.where(row == column, 0.0, entries)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """From (..., m (m + 1) / 2) to (..., m, m)."""
        return torch.Size((*shape[:-1], *[_rows(shape[-1])] * 2))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """From (..., m, m) to (..., m (m + 1) / 2)."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the logarithms of the diagonal."""
        return _diagonal(x)[1].sum(-1)


class _Factor(CholeskyTransform):
    """Positive definite matrices to their Cholesky factors, NaN where rounding leaves none.

    The inverse replaces what is singular to rounding, where a program would fail, by one, and gives it no volume.
    """

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(_singular(x), torch.nan, torch.linalg.cholesky_ex(x)[0])

    def _inverse(self, y: Tensor) -> Tensor:
        matrix = y @ y.mT
        return torch.where(_singular(matrix), torch.eye(y.shape[-1]).to(y), matrix)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """As Pyro has it; infinite where the inverse has no volume."""
        lost = _singular(y @ y.mT)
        one = torch.eye(y.shape[-1]).to(y)
        return super().log_abs_det_jacobian(x, torch.where(lost, one, y)).masked_fill(lost[..., 0, 0], torch.inf)


class _CorrelationFactor(_Factor, CorrMatrixCholeskyTransform):
    """Likewise of correlation matrices, whose volume is that of the entries below the diagonal."""

    domain, codomain = CorrMatrixCholeskyTransform.domain, CorrMatrixCholeskyTransform.codomain


def _singular(matrix: Tensor) -> Tensor:
    """Whether a pivot of matrices (..., m, m) is lost in rounding, (..., 1, 1)."""
    pivots = torch.linalg.cholesky_ex(matrix)[0].diagonal(dim1=-2, dim2=-1)
    part = pivots / matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    return ~(part > 7 * torch.finfo(matrix.dtype).eps ** 0.5).all(-1)[..., None, None]


def _rows(entries: int) -> int:
    """Rows of a triangular matrix of so many entries."""
    return round((2 * entries + 0.25) ** 0.5 - 0.5)


def _diagonal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows of a triangular matrix, and its entries on the diagonal, of its vector of all entries."""
    place = torch.arange(_rows(x.shape[-1]), device=x.device)
    return place, x[..., place * (place + 3) // 2]


def bijection(name: str, support: Any) -> Transform:
    """From the unconstrained coordinates of a latent site to its values: those of `biject_to`, and of matrices.

    Raises:
        ValueError: If the support is discrete, or no bijection of it is known, as of a sphere.
    """
    inner = of_entries(support)
    if inner.is_discrete:
        raise ValueError(
            f"Expected continuous latent sites, for their gradients; got '{name}', which is discrete. What takes any "
            "site is log_evidence(program, x, samples)."
        )
    if isinstance(inner, type(constraints.lower_cholesky)):
        return LowerCholesky()
    if isinstance(inner, type(constraints.positive_definite)):
        return ComposeTransform([LowerCholesky(), _Factor().inv])
    if isinstance(inner, type(corr_matrix)):
        return ComposeTransform([CorrCholeskyTransform(), _CorrelationFactor().inv])
    if isinstance(inner, constraints.interval):  # of subclasses too
        inner = constraints.interval(inner.lower_bound, inner.upper_bound)
    square = torch.Size([9, 9])
    try:
        transform = biject_to(inner)
        if any(part.inverse_shape(square) != square for part in getattr(transform, "transforms", ())):
            raise NotImplementedError  # torch joins only parts that have as many coordinates as entries
        return transform
    except NotImplementedError as error:
        raise ValueError(
            f"Expected latent sites with unconstrained coordinates, such as numbers, intervals, simplices or Cholesky "
            f"factors; got '{name}' on {support}, of which no bijection is known."
        ) from error


def limits(support: Any) -> Iterator[Tensor]:
    """The tensors that a support is made of, such as the bounds of an interval."""
    for part in vars(support).values() if isinstance(support, constraints.Constraint) else ():
        if isinstance(part, Tensor):
            yield part
        for inner in part if isinstance(part, list | tuple) else [part]:
            yield from limits(inner)
