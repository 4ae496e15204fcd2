"""A Gaussian mixture in plain Pyro, whose components are enumerated: every weight is p(x).

program = Mixture(13, components=3)
fit(program, x, elbo="TraceEnum_ELBO", epochs=200, learning_rate=0.05)
log_evidence(program, x, 1)
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import unique_name


class Mixture(nn.Module):
    """p(y) = share_y, p(x|y) = N(loc_y, diag(scale_y^2)); shares, means and scales are learned."""

    def __init__(self, features: int, *, components: int = 3) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, features))
        self.raw_scale = nn.Parameter(torch.zeros(components, features))

    def initialise(self, x: Tensor) -> None:
        """Begin with the components at data, as wide as all of them."""
        with torch.no_grad():
            self.loc.copy_(x[torch.randperm(len(x))[: len(self.loc)]])
            self.raw_scale.copy_(x.std(0).clamp_min(1e-2).expm1().log().expand_as(self.loc))

    def model(self, x: Tensor) -> None:
        """Score x under each component; the components go left of all other dims."""
        pyro.module(unique_name(self), self)
        scale = softplus(self.raw_scale) + 1e-2
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.loc[y], scale[y]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw nothing: the model sums its only latent variable out."""
