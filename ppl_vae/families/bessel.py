r"""Modified Bessel functions of the first kind, as the normaliser of a distribution on the sphere needs them.

For a size d and :math:`\nu = d / 2 - 1`, what is stable at any :math:`\kappa` is

.. math:: g(\kappa) = \log \int e^{\kappa t} \, d\mu(t)
    = \log \bigl(\Gamma(\nu + 1)\, (2 / \kappa)^\nu\, I_\nu(\kappa)\bigr), \qquad
    A(\kappa) = g'(\kappa) = I_{\nu + 1}(\kappa) / I_\nu(\kappa),

where t is an entry of a uniform point of the sphere. Debye's expansion is uniformly good at orders of 20 and above; the
recurrence :math:`I_{\nu - 1} = (2 \nu / \kappa) I_\nu + I_{\nu + 1}` leads down from there without cancellation.
"""

import math

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

_LEAST = 20  # order of the expansion
_TERMS = 9


def _top(size: int) -> tuple[float, int]:
    """Order of the expansion, and steps from there down."""
    order = size / 2 - 1
    steps = max(0, math.ceil(_LEAST - order))
    return order + steps, steps


def debye(size: int) -> Tensor:
    r"""Coefficients of :math:`\sum_k u_k(p) / N^k`, which is 1 at p = 1, and of its derivative, (terms, 2).

    References:
        NIST Digital Library of Mathematical Functions, 10.41.3 and 10.41.9.
    """
    order, _ = _top(size)
    p, term = Polynomial([0.0, 1.0]), Polynomial([1.0])
    total = term
    for k in range(1, _TERMS + 1):
        term = 0.5 * p**2 * (1 - p**2) * term.deriv() + ((1 - 5 * p**2) * term).integ() / 8
        total = total + term / order**k
    total = total / total(1.0)
    slope = [*total.deriv().coef.tolist(), 0.0]
    return torch.tensor([total.coef.tolist(), slope]).T.contiguous()


def log_bessel(kappa: Tensor, size: int, series: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm g of the normaliser, and the mean resultant length A, at any kappa >= 0.

    Args:
        kappa: Concentration.
        size: Size of the vectors, at least 2.
        series: What `debye` gives for this size.
    """
    order, steps = _top(size)
    z = kappa / order
    s = torch.hypot(z, torch.ones_like(z))
    more, p = z * (z / (1 + s)), 1 / s  # s - 1
    powers = p.unsqueeze(-1) ** torch.arange(len(series), dtype=p.dtype, device=p.device)
    value, slope = (powers @ series).unbind(-1)
    g = order * (more - torch.log1p(more / 2)) - 0.5 * torch.log1p(more) + value.log()
    ratio = z / (1 + s) - z * p**2 / order * (0.5 + p * slope / value)
    for step in range(1, steps + 1):
        half = kappa / (2 * (order - step + 1))
        inner = half * ratio
        g, ratio = g + torch.log1p(inner), half / (1 + inner)
    return g, ratio
