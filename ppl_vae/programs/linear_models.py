r"""Linear models, from principal components to the VAE: PCA, a linear autoencoder, PPCA and factor analysis.

`PCA` and `LinearAutoencoder` fit a subspace, without a distribution. `PPCA` and `FactorAnalysis` are models,
:math:`z \sim N(0, I)`, :math:`x \mid z \sim N(W z + \mu, \mathrm{diag}(s^2))`, with evidence and posterior in closed
form; each is also a `VAE` with an exact guide. A VAE with a network in place of W is the next step.
"""

import math
from abc import ABC
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import torch
from pyro.distributions import MultivariateNormal
from scipy import optimize
from torch import Tensor

from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch, check_finite
from ppl_vae.families.conditional import Conditional
from ppl_vae.families.elementwise import Normal, StandardNormal
from ppl_vae.families.exact_normal import ExactNormal
from ppl_vae.families.family import moments, refuse_constant, unconstrained
from ppl_vae.families.linear_gaussian import LinearGaussian
from ppl_vae.networks.linear import Linear
from ppl_vae.programs.ppca_em import climb
from ppl_vae.programs.vae import VAE

_BOUNDARY = 1e-6  # of a feature's variance: the least noise that factor analysis leaves it


@dataclass(frozen=True)
class _Model(ABC):
    """A linear-Gaussian model with a standard normal prior."""

    loc: Tensor
    weight: Tensor
    scale: Tensor

    def log_evidence(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log p(x) in nats, shape (n,), or that of the entries where `mask` is true."""
        return self._pair().log_evidence(x, mask)

    def posterior(self, x: Tensor, mask: Tensor | None = None) -> MultivariateNormal:
        r"""Posterior p(z|x), of batch shape (n,).

        With noise :math:`\sigma^2 I`, :math:`p(z \mid x) = N(M^{-1} W^\top (x - \mu),\; \sigma^2 M^{-1})` and
        :math:`M = W^\top W + \sigma^2 I`. Under a `mask`, as `x`, it is that given the entries where it is true.
        """
        return self._pair().posterior(x, mask)

    def to_vae(self) -> VAE:
        """The same model as a `VAE` with the exact posterior for its guide, in the precision of `weight`."""
        features, latent = self.weight.shape
        if not latent:
            raise ValueError("Expected at least one latent, for a VAE; got none.")
        prior = Conditional(StandardNormal(latent))
        family = Normal(features, scale="feature" if self.scale.dim() else "shared")
        network = Linear()
        likelihood = Conditional(family, network, context=latent)
        vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood))).to(self.weight)
        with torch.no_grad():
            network.weight.copy_(self.weight)
            network.bias.copy_(self.loc)
            family.raw_scale.copy_(unconstrained(self.scale.double()))
        return vae

    def _pair(self) -> LinearGaussian:
        features, latent = self.weight.shape
        identity = torch.eye(latent, dtype=self.weight.dtype, device=self.weight.device)
        return LinearGaussian(identity.new_zeros(latent), identity, self.weight, self.loc, self.scale.expand(features))


@dataclass(frozen=True)
class PPCA(_Model):
    r"""PPCA, :math:`z \sim N(0, I)`, :math:`x \mid z \sim N(W z + \mu, \sigma^2 I)`.

    Args:
        loc: :math:`\mu`, shape (x,).
        weight: W, shape (x, z).
        scale: :math:`\sigma`, the standard deviation of the noise, shape ().
        path: mean log evidence at the start and after each iteration of EM, in nats; None of a fit in closed form.

    References:
        Probabilistic Principal Component Analysis (Tipping and Bishop 1999), equations 7 and 8.
    """

    path: Tensor | None = None

    @classmethod
    def fit(cls, x: Any, latent: int, mask: Any = None, *, tolerance: float = 1e-9, iterations: int = 10_000) -> Self:
        r"""Fit by maximum likelihood, in closed form, or by EM if entries are missing.

        With eigenpairs :math:`\lambda_j, u_j` of the covariance (1/n), in falling order: :math:`\sigma^2` is the mean
        of the eigenvalues left out and :math:`W = U (\Lambda - \sigma^2 I)^{1/2}`. The eigenproblem solved is the
        smaller one of x by x and n by n.

        With a `mask` the likelihood is that of the observed entries, which EM never lowers (Practical Approaches to
        Principal Component Analysis in the Presence of Missing Values, Ilin and Raiko 2010, section 4): the posterior
        of z given the observed entries of each row, then the regression of each feature on z over the rows that
        observe it. EM starts from the closed form with each missing entry at its feature's mean.

        Args:
            x: data, shape (n, x); integers count as double precision.
            latent: the number of latents, at least 0 and below the rank of the centred data.
            mask: boolean, as `x`, True where observed.
            tolerance: rise of the mean log evidence in an iteration of EM, in nats, at which to stop.
            iterations: of EM, at most.

        Raises:
            ValueError: If the data are not a finite matrix, `latent` is at or above their rank (the noise would
                vanish and the likelihood grow without bound), or a feature is never observed.
            RuntimeError: If the likelihood still rises after the last iteration of EM.

        Example:
            >>> import torch
            >>> from ppl_vae import PPCA
            >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> PPCA.fit(x, 1).scale
            tensor(0.7071)
        """
        batch = as_batch(x if mask is None else {"x": x, "mask": mask})
        check_finite(batch)
        data = batch["x"]
        if data.dim() != 2:
            raise ValueError(f"Expected data of shape (n, x); got {tuple(data.shape)}.")
        if mask is not None:
            mean, _ = moments(data.double(), batch["mask"])
            rows = torch.where(batch["mask"], data.double() - mean, 0.0)
            begun = cls.fit(rows, latent)
            loc, weight, scale, path = climb(
                rows, batch["mask"], begun.loc, begun.weight, begun.scale, tolerance=tolerance, iterations=iterations
            )
            return cls(*(part.to(data.dtype) for part in (mean + loc, weight, scale, path)))
        n, features = data.shape
        wide = data.double()
        loc = wide.mean(0)
        centred = wide - loc
        by_feature = n >= features
        values, vectors = torch.linalg.eigh((centred.T @ centred if by_feature else centred @ centred.T) / n)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        rank = int((values > values[0] * max(n, features) * torch.finfo(torch.float64).eps).sum())
        if not isinstance(latent, Integral) or not 0 <= latent < max(rank, 1) or rank == 0:
            raise ValueError(
                f"Expected `latent` to be at least 0 and below the rank of the centred data, {rank}; got {latent!r}. "
                "At the rank no variance is left for the noise, and the likelihood is unbounded."
            )
        total = centred.square().sum() / n
        variance = (total - values[:latent].sum()) / (features - latent)
        axes = vectors[:, :latent]
        if not by_feature:
            axes = centred.T @ axes / (n * values[:latent]).sqrt()
        weight = axes * (values[:latent] - variance).clamp_min(0).sqrt()
        return cls(loc.to(data.dtype), weight.to(data.dtype), variance.sqrt().to(data.dtype))


def _data(x: Any, latent: int, most: str) -> Tensor:
    """Check data of shape (n, x) and the number of latents; `most` is what it may not exceed."""
    batch = as_batch(x)
    check_finite(batch)
    data = batch["x"]
    if data.dim() != 2 or len(data) < 2:
        raise ValueError(f"Expected data of shape (n, x), n at least 2; got {tuple(data.shape)}.")
    limit = min(len(data) - 1, data.shape[1]) if most == "rank" else data.shape[1] - 1
    if not isinstance(latent, Integral) or not 1 <= latent <= limit:
        words = "the smaller of n - 1 and the number of features" if most == "rank" else "the number of features less 1"
        raise ValueError(f"Expected `latent` to be from 1 to {words}, {limit}; got {latent!r}.")
    return data


@dataclass(frozen=True)
class PCA:
    r"""Principal components: the affine subspace that the data are nearest to.

    Args:
        loc: mean of the data, shape (x,).
        components: orthonormal directions, shape (x, z), by falling variance; the sign of each is such that its
            largest entry is positive.
        variances: of the data (1/n) along each, shape (z,).
        total: variance of the data in all directions, shape ().

    References:
        Pattern Recognition and Machine Learning (Bishop 2006), section 12.1.
    """

    loc: Tensor
    components: Tensor
    variances: Tensor
    total: Tensor

    @classmethod
    def fit(cls, x: Any, latent: int) -> Self:
        """Find the components by a singular value decomposition of the centred data.

        Args:
            x: data, shape (n, x).
            latent: the number of components.

        Raises:
            ValueError: If the data do not fit, or `latent` is out of range.

        Example:
            >>> import torch
            >>> x = torch.tensor([[-0.5, -0.4], [-0.4, -0.1], [0.1, 0.0], [0.3, 0.3], [0.5, 0.2]])
            >>> PCA.fit(x, 1).encode(x).flatten()
            tensor([-0.6345, -0.3945,  0.0858,  0.4115,  0.5317])
        """
        data = _data(x, latent, "rank")
        wide = data.double()
        loc = wide.mean(0)
        _, values, rows = torch.linalg.svd(wide - loc, full_matrices=False)
        components = rows[:latent].T
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        variances = values.square() / len(wide)
        parts = loc, components * largest.sign(), variances[:latent], variances.sum()
        return cls(*(part.to(data.dtype) for part in parts))

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (*batch, z) of data (*batch, x) along the components."""
        return (x - self.loc) @ self.components

    def decode(self, z: Tensor) -> Tensor:
        """Points (*batch, x) of the subspace at coordinates (*batch, z)."""
        return z @ self.components.T + self.loc

    @property
    def explained(self) -> Tensor:
        """Share of the variance that lies in the subspace, shape ()."""
        return self.variances.sum() / self.total


@dataclass(frozen=True)
class LinearAutoencoder:
    r"""An affine encoder and decoder, fitted by their squared reconstruction error alone.

    The decoder spans the principal components' subspace, in no particular basis (Neural Networks and Principal
    Component Analysis, Baldi and Hornik 1989). Codes have neither an order nor a scale, and nothing tells where new
    data would lie among them.

    Args:
        loc: of the data, shape (x,).
        encoder: shape (x, z).
        decoder: shape (x, z).
        errors: mean squared error over data, after each iteration.
    """

    loc: Tensor
    encoder: Tensor
    decoder: Tensor
    errors: Tensor

    @classmethod
    def fit(cls, x: Any, latent: int, *, iterations: int = 1000, tolerance: float = 1e-12, seed: int = 0) -> Self:
        r"""Fit in turns: the best decoder for the encoder's codes, then the best encoder for that decoder.

        Each half is a least-squares problem with a closed form; the error never rises.

        Args:
            x: data, shape (n, x).
            latent: the size of a code.
            iterations: at most.
            tolerance: relative fall of the error at which to stop.
            seed: of the start; the global random state is left alone.

        Raises:
            ValueError: If the data do not fit, or `latent` is out of range.
        """
        data = _data(x, latent, "rank")
        wide = data.double()
        loc = wide.mean(0)
        centred = wide - loc
        with fork_rng(seed, "autoencoder", device=data.device):
            decoder = torch.randn(wide.shape[1], int(latent), dtype=torch.float64, device=data.device)
        errors: list[Tensor] = []
        for _ in range(iterations):
            encoder = torch.linalg.pinv(decoder).T
            codes = centred @ encoder
            decoder = (torch.linalg.pinv(codes) @ centred).T
            errors.append((centred - codes @ decoder.T).square().sum(-1).mean())
            if len(errors) > 1 and bool(errors[-2] - errors[-1] <= tolerance * errors[-1]):
                break
        return cls(*(part.to(data.dtype) for part in (loc, encoder, decoder, torch.stack(errors))))

    def encode(self, x: Tensor) -> Tensor:
        """Codes (*batch, z) of data (*batch, x)."""
        return (x - self.loc) @ self.encoder

    def decode(self, z: Tensor) -> Tensor:
        """Reconstructions (*batch, x) of codes (*batch, z)."""
        return z @ self.decoder.T + self.loc


def _best_weight(covariance: Tensor, noise: Tensor, latent: int) -> tuple[Tensor, Tensor, float]:
    """The best W for given noise variances, these, and the mean log evidence in nats."""
    scale = noise.sqrt()
    values, vectors = torch.linalg.eigh(covariance / scale / scale.unsqueeze(-1))
    values, vectors = values.flip(0), vectors.flip(1)[:, :latent]
    weight = scale.unsqueeze(-1) * vectors * (values[:latent] - 1).clamp_min(0).sqrt()
    inside = values[:latent].clamp_min(1).log().sum() + values[:latent].clamp_max(1).sum() + values[latent:].sum()
    return weight, noise, float(-0.5 * (len(noise) * math.log(2 * math.pi) + noise.log().sum() + inside))


@dataclass(frozen=True)
class FactorAnalysis(_Model):
    r"""Factor analysis, :math:`z \sim N(0, I)`, :math:`x \mid z \sim N(W z + \mu, \mathrm{diag}(s^2))`.

    PPCA with a noise scale for each feature, so that the units of the features do not matter.

    Args:
        loc: :math:`\mu`, shape (x,).
        weight: W, shape (x, z), determined up to a rotation of z.
        scale: s, standard deviations of the noise, shape (x,).
        iterations: of the fit.

    References:
        EM Algorithms for ML Factor Analysis (Rubin and Thayer 1982); Pattern Recognition and Machine Learning
        (Bishop 2006), section 12.2.4.
    """

    iterations: int = 0

    @classmethod
    def fit(cls, x: Any, latent: int, *, tolerance: float = 1e-10, iterations: int = 20_000) -> Self:
        r"""Fit by maximum likelihood: a quasi-Newton climb over s, each with its best W.

        Given s, the best W has a closed form: with eigenpairs :math:`\lambda_j, u_j` of the covariance of x / s,
        :math:`W = \mathrm{diag}(s)\, U (\Lambda - I)_+^{1/2}` (Bayesian Reasoning and Machine Learning, Barber 2012,
        section 21.2). L-BFGS-B climbs what is left, a function of log s. The maximum can lie at the boundary, where a
        factor is one of the features (a Heywood case): a feature keeps a noise variance of a millionth of its own.

        Args:
            x: data, shape (n, x); integers count as double precision.
            latent: the number of latents, at least 1 and below the number of features.
            tolerance: rise of the mean log evidence in an iteration, in nats, at which to stop.
            iterations: at most.

        Raises:
            ValueError: If the data do not fit, a feature is constant, or `latent` is out of range.
            RuntimeError: If the likelihood still rises after the last iteration.
        """
        data = _data(x, latent, "features")
        wide = data.double()
        loc, spread = moments(wide)
        refuse_constant(spread, "noise scale", settable=False)
        covariance = (wide - loc).T @ (wide - loc) / len(wide)
        variances = covariance.diagonal()

        def climb(raw: Any) -> tuple[float, Any]:
            """Minus the mean log evidence at noise variances, by their logarithms, and its gradient."""
            weight, noise, evidence = _best_weight(covariance, torch.from_numpy(raw).to(covariance).exp(), latent)
            precision = torch.linalg.inv(weight @ weight.T + noise.diag())
            slope = -0.5 * (precision - precision @ covariance @ precision).diagonal() * noise
            return -evidence, -slope.cpu().numpy()

        start = variances.log().cpu().numpy()
        bounds = [(low, high + 1) for low, high in zip(start + math.log(_BOUNDARY), start, strict=True)]
        options = {"maxiter": iterations, "maxfun": 10 * iterations, "ftol": tolerance / 100, "gtol": 1e-12}
        best = optimize.minimize(climb, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        if best.nit < iterations:
            weight, noise, _ = _best_weight(covariance, torch.from_numpy(best.x).to(covariance).exp(), latent)
            loc, weight, scale = (part.to(data.dtype) for part in (loc, weight, noise.sqrt()))
            return cls(loc, weight, scale, best.nit)
        raise RuntimeError(
            f"Expected the likelihood to settle to {tolerance:g} nats within {iterations} iterations; it still rises. "
            "Allow more iterations or fewer latents."
        )
