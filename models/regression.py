"""Bayesian regression, linear or logistic, with a mean-field guide.

    program = Regression()
    fit(program, {"x": x, "y": y}, epochs=1000, learning_rate=0.02, particles=10)
    print(check_guide(program, {"x": x, "y": y}))

The coefficients are shared by all data, so that the whole data set counts as one datum.
"""

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor


class Regression:
    """Coefficients and intercept are N(0, 2.5); the noise of linear regression is half-normal with scale 1."""

    def __init__(self, *, logistic: bool = False) -> None:
        self.logistic = logistic

    def model(self, x: Tensor, y: Tensor, subsample_size: int | None = None) -> None:
        """Score y (n,) given x (n, x); particles go left of the data."""
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 2.5).to_event(1))
        intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), 2.5))
        scale = None if self.logistic else pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
        with pyro.plate("data", len(y), subsample_size=subsample_size) as rows:
            mean = (x[rows] * weight).sum(-1) + intercept
            fn = dist.Bernoulli(logits=mean) if scale is None else dist.Normal(mean, scale)
            pyro.sample("y", fn, obs=y[rows].to(x))

    def guide(self, x: Tensor, y: Tensor) -> None:
        """Independent normals, log-normal for the noise."""
        size = x.shape[1] + 2
        loc = pyro.param("loc", lambda: x.new_zeros(size))
        spread = pyro.param("spread", lambda: x.new_full((size,), 0.1), constraint=constraints.positive)
        pyro.sample("weight", dist.Normal(loc[2:], spread[2:]).to_event(1))
        pyro.sample("intercept", dist.Normal(loc[0], spread[0]))
        if not self.logistic:
            pyro.sample("scale", dist.LogNormal(loc[1], spread[1]))
