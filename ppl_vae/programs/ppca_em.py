r"""EM for PPCA with missing entries.

Each row n observes the features o: :math:`x_{no} \sim N(W_o z_n + \mu_o, \sigma^2 I)`.
"""

import math

import torch
from torch import Tensor, nn


def climb(
    x: Tensor, mask: Tensor, loc: Tensor, weight: Tensor, scale: Tensor, *, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Climb the likelihood of the observed entries by EM.

    The E-step is :math:`z_n \mid x_{no} \sim N(M_n^{-1} W_o^\top (x_{no} - \mu_o),\; \sigma^2 M_n^{-1})` with
    :math:`M_n = W_o^\top W_o + \sigma^2 I`, the M-step the regression of each feature on (z, 1) over the rows that
    observe it; :math:`\sigma^2` is the mean squared residual that it leaves to expect.

    Args:
        x: data in double precision, shape (n, x), any finite number where missing.
        mask: True where observed.
        loc: to begin with, shape (x,).
        weight: shape (x, z).
        scale: of the noise, shape ().
        tolerance: rise of the mean log evidence, in nats, at which to stop.
        iterations: at most.

    Returns:
        Loc, weight, scale, and the mean log evidence at the start and after each iteration.

    Raises:
        ValueError: If a feature is never observed, or the noise vanishes.
        RuntimeError: If the likelihood still rises after the last iteration.

    References:
        Probabilistic Principal Component Analysis (Tipping and Bishop 1999), appendix B; Practical Approaches to
        Principal Component Analysis in the Presence of Missing Values (Ilin and Raiko 2010), section 4.
    """
    if not bool((seen := mask.any(0)).all()):
        raise ValueError(
            f"Expected each feature to be observed somewhere; got none of column {int((~seen).nonzero()[0])} (counted "
            "from 0). Leave it out."
        )
    here, variance, path = mask.to(x), scale.square(), list[Tensor]()
    count, latent = here.sum(-1), weight.shape[1]
    identity, least = torch.eye(latent).to(x), 1e-12 * float((here * x).square().sum() / count.sum())
    while True:
        residual = here * (x - loc)
        outer = (weight.unsqueeze(-1) * weight.unsqueeze(-2)).flatten(1)
        factor = torch.linalg.cholesky((here @ outer).unflatten(-1, identity.shape) + variance * identity)  # of M
        inverse, projected = torch.cholesky_inverse(factor), residual @ weight
        codes = (inverse @ projected.unsqueeze(-1)).squeeze(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (count - latent) * variance.log()
        square = (residual.square().sum(-1) - (projected * codes).sum(-1)) / variance
        path.append(-0.5 * (count * math.log(2 * math.pi) + log_det + square).mean())
        if len(path) > 1 and bool(path[-1] - path[-2] <= tolerance):
            return loc, weight, variance.sqrt(), torch.stack(path)
        if len(path) > iterations:
            raise RuntimeError(
                f"Expected the likelihood to settle to {tolerance:g} nats within {iterations} iterations; it still "
                "rises. Allow more iterations or fewer latents."
            )
        both = nn.functional.pad(codes, (0, 1), value=1.0)  # with a 1, whose weight is loc
        second = both.unsqueeze(-1) * both.unsqueeze(-2) + nn.functional.pad(variance * inverse, (0, 1, 0, 1))
        gram, right = (here.T @ second.flatten(1)).unflatten(-1, second.shape[1:]), (here * x).T @ both
        rows = torch.linalg.solve(gram, right)
        loc, weight = rows[:, -1], rows[:, :-1]
        variance = ((here * x.square()).sum() - (rows * right).sum()) / here.sum()
        if not float(variance) > least:
            raise ValueError(
                f"Expected fewer latents than {latent} for so few observed entries: the noise vanishes, and the "
                "likelihood is unbounded."
            )
