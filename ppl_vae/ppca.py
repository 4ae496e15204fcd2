r"""Probabilistic principal component analysis: maximum likelihood, posterior and evidence in closed form."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from ppl_vae.batches import as_batch, check_finite
from ppl_vae.conditional import Conditional
from ppl_vae.families import ExactNormal, Normal, StandardNormal, unconstrained
from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.networks import Linear
from ppl_vae.program import VAE

__all__ = ["PPCA"]


@dataclass(frozen=True)
class PPCA:
    r"""PPCA, :math:`z \sim N(0, I)`, :math:`x \mid z \sim N(W z + \mu, \sigma^2 I)`.

    Args:
        loc: :math:`\mu`, shape (x,).
        weight: W, shape (x, z).
        scale: :math:`\sigma`, the standard deviation of the noise, shape ().

    References:
        Probabilistic Principal Component Analysis (Tipping and Bishop 1999), equations 7 and 8.
    """

    loc: Tensor
    weight: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Any, latent: int) -> Self:
        r"""Fit by maximum likelihood in closed form.

        With eigenpairs :math:`\lambda_j, u_j` of the covariance (1/n), in falling order: :math:`\sigma^2` is the mean
        of the eigenvalues left out and :math:`W = U (\Lambda - \sigma^2 I)^{1/2}`. The eigenproblem solved is the
        smaller one of x by x and n by n.

        Args:
            x: data, shape (n, x); integers count as double precision.
            latent: the number of latents, at least 0 and below the rank of the centred data.

        Raises:
            ValueError: for data that are no finite matrix, or a latent size at or above their rank, where the noise
                would vanish and the likelihood grow without bound.

        Example:
            >>> import torch
            >>> from ppl_vae import PPCA
            >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> PPCA.fit(x, 1).scale
            tensor(0.7071)
        """
        batch = as_batch(x)
        check_finite(batch)
        data = batch["x"]
        if data.dim() != 2:
            raise ValueError(f"Expected data of shape (n, x); got {tuple(data.shape)}.")
        n, features = data.shape
        wide = data.double()
        loc = wide.mean(0)
        centred = wide - loc
        by_feature = n >= features
        values, vectors = torch.linalg.eigh((centred.T @ centred if by_feature else centred @ centred.T) / n)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        tolerance = values[0] * max(n, features) * torch.finfo(torch.float64).eps
        rank = int((values > tolerance).sum())
        if not isinstance(latent, Integral) or not 0 <= latent < max(rank, 1) or rank == 0:
            raise ValueError(
                f"Expected `latent` to be at least 0 and below the rank of the centred data, {rank}; got "
                f"{latent!r}. At the rank no variance "
                "is left for the noise, and the likelihood is unbounded."
            )
        total = centred.square().sum() / n
        variance = (total - values[:latent].sum()) / (features - latent)
        axes = vectors[:, :latent]
        if not by_feature:
            axes = centred.T @ axes / (n * values[:latent]).sqrt()
        weight = axes * (values[:latent] - variance).clamp_min(0).sqrt()
        return cls(loc.to(data.dtype), weight.to(data.dtype), variance.sqrt().to(data.dtype))

    def log_evidence(self, x: Tensor) -> Tensor:
        """Give log p(x) in nats, shape (n,)."""
        return self._pair().log_evidence(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        r"""Give p(z|x) of batch shape (n,).

        :math:`p(z \mid x) = N(M^{-1} W^\top (x - \mu),\; \sigma^2 M^{-1})` with :math:`M = W^\top W + \sigma^2 I`.
        """
        return self._pair().posterior(x)

    def to_vae(self) -> VAE:
        """Give the same model as a `VAE` whose guide is the exact posterior, in the same precision."""
        return exact_vae(self.loc, self.weight, self.scale)

    def _pair(self) -> LinearGaussian:
        features, latent = self.weight.shape
        return LinearGaussian(
            loc=self.weight.new_zeros(latent),
            scale_tril=torch.eye(latent, dtype=self.weight.dtype, device=self.weight.device),
            weight=self.weight,
            bias=self.loc,
            scale=self.scale.expand(features),
        )


def exact_vae(loc: Tensor, weight: Tensor, scale: Tensor) -> VAE:
    """Give a linear-Gaussian model as a `VAE` whose guide is the exact posterior, in the precision of its weight.

    Args:
        loc: the bias of x, shape (x,).
        weight: shape (x, z).
        scale: standard deviation of the noise, shape () where all features share it, else (x,).
    """
    features, latent = weight.shape
    if not latent:
        raise ValueError("Expected at least one latent, for a VAE; got none.")
    prior = Conditional(StandardNormal(latent))
    family = Normal(features, scale="feature" if scale.dim() else "shared")
    network = Linear()
    likelihood = Conditional(family, network, context=latent)
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood))).to(weight)
    with torch.no_grad():
        network.weight.copy_(weight)
        network.bias.copy_(loc)
        family.raw_scale.copy_(unconstrained(scale.double()))
    return vae
