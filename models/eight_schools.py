"""Eight schools: effects of coaching in eight schools, with one mean and one spread among schools.

    print(check_guide(Program(EightSchools().model), DATA, reference="nuts"))

Bayesian Data Analysis (Gelman, Carlin, Stern, Dunson, Vehtari and Rubin 2013), section 5.5.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    "error": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
}


class EightSchools:
    """Effects are drawn around their mean (`centred`), or as a standard normal that is moved and scaled."""

    def __init__(self, *, centred: bool = False) -> None:
        self.centred = centred

    def model(self, y: Tensor, error: Tensor) -> None:
        """Mean mu ~ N(0, 5), spread tau ~ half-Cauchy(5), effect ~ N(mu, tau), y ~ N(effect, error)."""
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            if self.centred:
                effect = pyro.sample("effect", dist.Normal(mu, tau))
            else:
                effect = mu + tau * pyro.sample("raw", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, error), obs=y)

    def guide(self, y: Tensor, error: Tensor) -> None:
        """Independent normals, log-normal for tau."""
        loc = pyro.param("loc", lambda: y.new_zeros(2))
        scale = pyro.param("scale", lambda: y.new_ones(2), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        pyro.sample("tau", dist.LogNormal(loc[1], scale[1]))
        locs = pyro.param("locs", lambda: torch.zeros_like(y))
        scales = pyro.param("scales", lambda: torch.ones_like(y), constraint=constraints.positive)
        with pyro.plate("schools", len(y)):
            pyro.sample("effect" if self.centred else "raw", dist.Normal(locs, scales))
