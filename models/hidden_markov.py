"""A hidden Markov model in plain Pyro, whose states are enumerated: every weight is p(x).

program = HiddenMarkov(64, steps=8, states=16)
fit(program, x, elbo="TraceEnum_ELBO", epochs=50, learning_rate=0.02)
log_evidence(program, x, 1)
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import unique_name


class HiddenMarkov(nn.Module):
    """A chain of states y_t, each with means and scales of x_t: x (n, features) is a sequence of equal steps."""

    def __init__(self, features: int, *, steps: int = 4, states: int = 8) -> None:
        super().__init__()
        self.steps, each = steps, features // steps
        self.moves = nn.Parameter(torch.zeros(states + 1, states))  # the last row is of the start
        self.loc = nn.Parameter(torch.randn(states, each))
        self.raw_scale = nn.Parameter(torch.zeros(states, each))

    def initialise(self, x: Tensor) -> None:
        """Begin with the states at steps of the data, as wide as all of them."""
        rows = x.reshape(len(x) * self.steps, -1)
        with torch.no_grad():
            self.loc.copy_(rows[torch.randperm(len(rows))[: len(self.loc)]])
            self.raw_scale.copy_(rows.std(0).clamp_min(1e-2).expm1().log().expand_as(self.loc))

    def model(self, x: Tensor) -> None:
        """Run the chain; `pyro.markov` says that a state forgets all but the last, so that the sums go step by step."""
        pyro.module(unique_name(self), self)
        scale, steps = softplus(self.raw_scale) + 1e-2, x.unflatten(-1, (self.steps, -1))
        with pyro.plate("data", len(x), dim=-1):
            state = torch.tensor(len(self.loc), device=x.device)
            for t in pyro.markov(range(self.steps)):
                law = dist.Categorical(logits=Vindex(self.moves)[state])
                state = pyro.sample(f"y_{t}", law, infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(self.loc[state], scale[state]).to_event(1), obs=steps[:, t])

    def guide(self, x: Tensor) -> None:
        """Draw nothing: the model sums all states out."""
