"""A nonlinear VAE in plain Pyro: normal latents, normal pixels around a decoder, a normal guide around an encoder."""

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


class VAE(nn.Module):
    """p(z) = N(0, I), p(x|z) = N(decoder(z), scale^2 I), q(z|x) = N(loc(x), diag(scale(x)^2))."""

    def __init__(self, features: int, latent: int, *, hidden: int = 200) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = layers(features, hidden, hidden, 2 * latent)
        self.decoder = layers(latent, hidden, hidden, features)
        self.raw_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("spread", torch.ones(()))

    def initialise(self, x: Tensor) -> None:
        """Begin at the data: output at the mean, scale at the standard deviation, guide input centred and scaled."""
        with torch.no_grad():
            self.shift.copy_(x.mean(0))
            self.spread.copy_((x - self.shift).square().mean().sqrt())
            self.decoder[-1].bias.copy_(self.shift)
            self.encoder[-1].bias.copy_(
                torch.full_like(self.encoder[-1].bias, 0.5413).index_fill(0, torch.arange(self.latent), 0.0)
            )
            self.raw_scale.copy_(torch.log(torch.expm1(self.spread)))

    def model(self, x: Tensor) -> None:
        """Draw z from the prior and score x under the likelihood."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), softplus(self.raw_scale) + 1e-6).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw z from the approximate posterior."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder((x - self.shift) / self.spread).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 1e-6).to_event(1))
