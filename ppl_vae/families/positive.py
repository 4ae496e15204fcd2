"""Families of positive numbers."""

import pyro.distributions as dist
from torch import Tensor

from ppl_vae.families.elementwise import Elementwise, Source


class LogNormal(Elementwise):
    r"""Independent log-normals. The logarithm of an entry is :math:`N(\mathrm{loc}_j, \mathrm{scale}_j^2)`.

    Args:
        event: The shape of an event; an int is short for a 1-tuple.
        scale: Where the standard deviation of the logarithm comes from: `network` (one per feature, from the context),
            `shared` (one learned number), `feature` (one learned number per feature), or a positive number that stays
            fixed.
    """

    encoding = "log"

    def __init__(self, event: int | tuple[int, ...], *, scale: Source = "network") -> None:
        super().__init__(event, dist.LogNormal, loc="network", scale=scale)

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        variance = (scale / mean).square().log1p()
        return {"loc": mean.log() - variance / 2, "scale": variance.sqrt()}


class Gamma(Elementwise):
    r"""Independent gammas, :math:`\prod_j x_j^{\alpha_j - 1} e^{-\beta_j x_j} \beta_j^{\alpha_j} / \Gamma(\alpha_j)`.

    The concentration :math:`\alpha` and the rate :math:`\beta` come from the network. Draws are reparameterised
    (Implicit Reparameterization Gradients, Figurnov, Mohamed and Mnih 2018).
    """

    encoding = "log"

    def __init__(self, event: int | tuple[int, ...]) -> None:
        super().__init__(event, dist.Gamma, concentration="network", rate="network")

    def from_moments(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        concentration = (mean / scale).clamp_max(1e3).square()
        return {"concentration": concentration, "rate": concentration / mean}
