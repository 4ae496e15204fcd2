"""Two levels of latent variables in plain Pyro, nonlinear, or linear-Gaussian with the exact guide."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import unique_name


def layers(*sizes: int) -> nn.Sequential:
    """Stack linear layers with tanh between them."""
    parts = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


class TwoLevel(nn.Module):
    """p(top) = N(0, I), p(z|top) = N(f(top), s^2 I), p(x|z) = N(g(z), t^2 I); the guide goes from the top down."""

    def __init__(self, features: int, latent: int, *, top: int = 2, hidden: int = 100, linear: bool = False) -> None:
        super().__init__()
        self.top, self.linear = top, linear
        self.f = nn.Linear(top, latent, bias=False) if linear else layers(top, hidden, latent)
        self.g = nn.Linear(latent, features) if linear else layers(latent, hidden, features)
        self.raw_scales = nn.Parameter(torch.zeros(2))
        if not linear:
            self.guide_top = layers(features, hidden, 2 * top)
            self.guide_z = layers(features + top, hidden, 2 * latent)

    def model(self, x: Tensor) -> None:
        """Draw both levels from the prior and score x."""
        pyro.module(unique_name(self), self)
        s, t = softplus(self.raw_scales)
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(x.new_zeros(self.top), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(self.f(top), s).to_event(1))
            pyro.sample("x", dist.Normal(self.g(z), t).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw the top level given x, then z given both."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            if self.linear:
                s, t = softplus(self.raw_scales)
                a, w = self.f.weight, self.g.weight
                given = w.T @ w / t**2 + torch.eye(w.shape[1]).to(x) / s**2  # precision of z given top and x
                seen = (x - self.g.bias) @ w / t**2
                gain = torch.linalg.solve(given, a / s**2)
                top = torch.eye(self.top).to(x) + a.T @ (a / s**2 - gain / s**2)
                top = pyro.sample(
                    "top", dist.MultivariateNormal(seen @ gain @ torch.linalg.inv(top), precision_matrix=top)
                )
                z = torch.linalg.solve(given, (seen + top @ a.T / s**2).unsqueeze(-1)).squeeze(-1)
                pyro.sample("z", dist.MultivariateNormal(z, precision_matrix=given))
            else:
                loc, raw = self.guide_top(x).chunk(2, -1)
                top = pyro.sample("top", dist.Normal(loc, softplus(raw)).to_event(1))
                loc, raw = self.guide_z(torch.cat([x.expand(*top.shape[:-1], -1), top], -1)).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))
