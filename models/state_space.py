"""A state-space model of sequences in plain Pyro, a latent site a step; the linear-Gaussian one has an exact guide."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import unique_name


class StateSpace(nn.Module):
    """p(z_t|z_t-1) = N(a z_t-1, q^2), p(x_t|z_t) = N(c z_t + b, r^2), or N(decoder(z_t), r^2); x is (n, steps)."""

    def __init__(self, features: int, *, hidden: int = 16, linear: bool = False) -> None:
        super().__init__()
        self.steps, self.linear = features, linear
        self.dynamics = nn.Parameter(torch.tensor(0.9))
        self.raw_scales = nn.Parameter(torch.zeros(2))
        small = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.decoder = nn.Linear(1, 1) if linear else small
        if not linear:
            self.encoder = nn.Sequential(nn.Linear(features + 1, hidden), nn.Tanh(), nn.Linear(hidden, 2 * features))

    def model(self, x: Tensor) -> None:
        """Run the state forwards and score each step."""
        pyro.module(unique_name(self), self)
        q, r = softplus(self.raw_scales)
        with pyro.plate("data", len(x), dim=-1):
            z = x.new_zeros(len(x))
            for t in range(self.steps):
                z = pyro.sample(f"z_{t}", dist.Normal(self.dynamics * z, q))
                pyro.sample(f"x_{t}", dist.Normal(self.decoder(z.unsqueeze(-1)).squeeze(-1), r), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        """Run forwards as the model does; the exact guide first passes back what the rest of x says of each state."""
        pyro.module(unique_name(self), self)
        q, r = softplus(self.raw_scales)
        z, messages = x.new_zeros(len(x)), self.messages(x, q, r) if self.linear else []
        with pyro.plate("data", len(x), dim=-1):
            for t in range(self.steps):
                if messages:
                    total = 1 / q**2 + messages[t][0]
                    mean = (self.dynamics * z / q**2 + messages[t][1]) / total
                    z = pyro.sample(f"z_{t}", dist.Normal(mean, total**-0.5))
                else:
                    seen = torch.cat([x.expand(*z.shape, -1), z.unsqueeze(-1)], -1)
                    loc, raw = self.encoder(seen).unflatten(-1, (2, -1))[..., t].unbind(-1)
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, softplus(raw)))

    def messages(self, x: Tensor, q: Tensor, r: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give p(x_t, ..., x_T | z_t), proportional to exp(-precision z^2 / 2 + moment z), for each step t."""
        c, b, passed = self.decoder.weight[0, 0], self.decoder.bias[0], []
        precision, moment = x.new_zeros(()), x.new_zeros(())
        for t in reversed(range(self.steps)):
            shrink = self.dynamics / (1 + q**2 * precision)
            precision = self.dynamics * shrink * precision + c**2 / r**2
            moment = shrink * moment + c * (x[:, t] - b) / r**2
            passed.append((precision, moment))
        return passed[::-1]
