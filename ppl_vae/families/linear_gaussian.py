r"""The linear-Gaussian model: :math:`z \sim N(m, S)`, :math:`x \mid z \sim N(W z + b, \mathrm{diag}(s^2))`.

Its posterior and evidence are known in closed form (Pattern Recognition and Machine Learning, Bishop 2006, equations
2.113-2.117), so the rest of the library is tested against them. With the prior whitened, :math:`S = L L^\top` and
:math:`B = \mathrm{diag}(1/s)\, W L`, everything needs one Cholesky factor of the z-by-z matrix :math:`I + B^\top B`
(Woodbury's identity): no x-by-x matrix is ever formed, so constant features and n < x do no harm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor


@dataclass(frozen=True)
class LinearGaussian:
    """A Gaussian prior and a linear-Gaussian likelihood.

    Args:
        loc: Mean of the prior, shape (z,), or (*batch, z) where it depends on the datum.
        scale_tril: Cholesky factor of the prior's covariance, shape (z, z) or (*batch, z, z).
        weight: W, shape (x, z).
        bias: b, shape (x,) or (*batch, x).
        scale: Standard deviation of the noise of each feature, shape (x,).
    """

    loc: Tensor
    scale_tril: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor

    def posterior(self, x: Tensor, mask: Tensor | None = None) -> MultivariateNormal:
        r"""Posterior :math:`p(z \mid x) = N(m + L C^{-1} B^\top r,\; L C^{-1} L^\top)`, with :math:`C = I + B^\top B`.

        Args:
            x: Data, shape (*batch, x).
            mask: Boolean, as `x`; entries where it is false are not conditioned on.

        Returns:
            A multivariate normal with that batch shape and event shape (z,).
        """
        _, projected, factor = self._solve(x, mask)
        code = _by_row(torch.cholesky_solve, projected, factor)
        root = torch.linalg.solve_triangular(factor, self.scale_tril.mT.expand(factor.shape), upper=False)
        return MultivariateNormal(
            self.loc + (self.scale_tril @ code.unsqueeze(-1)).squeeze(-1),
            scale_tril=torch.linalg.cholesky(root.mT @ root),
        )

    def log_evidence(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Log evidence :math:`\log N(x;\, W m + b,\; W S W^\top + \mathrm{diag}(s^2))` in nats, shape (*batch,).

        Args:
            x: Data, shape (*batch, x).
            mask: Boolean, as `x`; the evidence is that of the entries where it is true.
        """
        residual, projected, factor = self._solve(x, mask)
        half = _by_row(lambda b, lower: torch.linalg.solve_triangular(lower, b, upper=False), projected, factor)
        entry = math.log(2 * math.pi) + 2 * self.scale.log()
        count = entry.sum() if mask is None else torch.where(mask, entry, 0.0).sum(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (count + log_det + (residual**2).sum(-1) - (half**2).sum(-1))

    def _solve(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Residual :math:`r` in units of the noise, :math:`B^\top r`, and the Cholesky factor of C."""
        whitened = self.weight @ self.scale_tril / self.scale.unsqueeze(-1)
        x = x if mask is None else torch.where(mask, x, 0.0)  # a NaN would poison gradients
        residual = (x - self.bias - self.loc @ self.weight.mT) / self.scale
        if mask is not None:
            whitened, residual = torch.where(mask.unsqueeze(-1), whitened, 0.0), torch.where(mask, residual, 0.0)
        identity = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        factor = torch.linalg.cholesky(identity + whitened.mT @ whitened)
        shared = whitened.dim() == 2
        projected = residual @ whitened if shared else (whitened.mT @ residual.unsqueeze(-1)).squeeze(-1)
        return residual, projected, factor


def _by_row(solve: Callable[[Tensor, Tensor], Tensor], rows: Tensor, factor: Tensor) -> Tensor:
    """Solve a system for each row (*batch, z), all at once where they share one factor."""
    if factor.dim() > 2:
        return solve(rows.unsqueeze(-1), factor).squeeze(-1)
    return solve(torch.atleast_2d(rows).flatten(0, -2).mT, factor).mT.reshape(rows.shape)
