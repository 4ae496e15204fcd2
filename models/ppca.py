"""Probabilistic PCA in plain Pyro: the VAE whose posterior is known, with a mean-field or the exact guide."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import unique_name


class PPCA(nn.Module):
    """p(z) = N(0, I), p(x|z) = N(W z + loc, scale^2 I); q(z|x) is linear with one scale a latent, or exact."""

    def __init__(self, features: int, latent: int, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.weight = nn.Parameter(torch.randn(features, latent) / latent**0.5)
        self.loc = nn.Parameter(torch.zeros(features))
        self.raw_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        if not exact:
            self.encoder = nn.Linear(features, latent, bias=False)
            self.raw_guide_scale = nn.Parameter(torch.zeros(latent))

    def initialise(self, x: Tensor) -> None:
        """Begin at the data: output at the mean, scale at the standard deviation."""
        with torch.no_grad():
            self.loc.copy_(x.mean(0))
            self.spread.copy_((x - self.loc).square().mean().sqrt())
            self.raw_scale.copy_(torch.log(torch.expm1(self.spread)))

    def model(self, x: Tensor) -> None:
        """Draw z from the prior and score x under the likelihood."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.loc, softplus(self.raw_scale)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw z from the approximate posterior; the exact one is N(M^-1 W^T (x - loc), scale^2 M^-1)."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            if self.exact:
                variance = softplus(self.raw_scale) ** 2
                m = self.weight.T @ self.weight + variance * torch.eye(self.weight.shape[1]).to(x)
                mean = (x - self.loc) @ torch.linalg.solve(m, self.weight.T).T
                pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=m / variance))
            else:
                loc = self.encoder((x - self.loc.detach()) / self.spread)
                pyro.sample("z", dist.Normal(loc, softplus(self.raw_guide_scale)).to_event(1))
