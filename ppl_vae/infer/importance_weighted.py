r"""`ImportanceWeighted`: the bound of several draws per datum, Renyi's too, and three estimators of its gradient.

With weights :math:`w_k = p(x, z_k) / q(z_k \mid x)` of K draws the bound of a datum is

.. math:: L = \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha},

with alpha = 0 for the importance-weighted bound. With :math:`v_k \propto w_k^{1 - \alpha}`, which sum to one, its
gradient is that of :math:`\sum_k v_k \log w_k`, where v counts as constant. It has three paths: through the model,
through the draws, and through the density of the guide at given draws. `plain` takes them all. The last has a mean of
zero only for K = 1: `stl` drops it, and is biased for K > 1. `dreg` reparameterises it once more, after which the path
through the draws has the factor :math:`v_k (\alpha + (1 - \alpha) v_k)` and the last one is gone, without bias.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae.infer.elbo import Terms
from ppl_vae.programs.plates import is_point
from ppl_vae.programs.sites import Structure
from ppl_vae.programs.traces import Batch, Given, batch_of, drawn_sites, log_density

Gradient = Literal["plain", "stl", "dreg"]


@dataclass
class ImportanceWeighted:
    """Minus the importance-weighted or Renyi bound of a batch, whose mean over data is that of each datum's bound.

    Args:
        structure: of the program.
        learned: the tensors that are learned.
        particles: draws per datum, K.
        alpha: of Renyi's bound, not 1; a lower bound for 0 <= alpha < 1 only.
        gradient: its estimator.

    References:
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov 2016), equation 8; Renyi Divergence
        Variational Inference (Li and Turner 2016), equation 11; Sticking the Landing (Roeder, Wu and Duvenaud 2017);
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al. 2019), equation 8.
    """

    structure: Structure
    learned: list[Tensor]
    particles: int
    alpha: float = 0.0
    gradient: Gradient = "plain"
    beta: ClassVar = None

    def __post_init__(self) -> None:
        self.plate = pyro.plate("particles", self.particles, dim=-1 - self.structure.nesting)

    def __call__(self, program: Any, batch: Batch) -> Terms:
        """The bound of a batch."""
        count, power = self.particles, 1 - self.alpha
        guide = self.draw(program, batch)
        by_path = self.gradient != "plain" and torch.is_grad_enabled()
        factors: list[Tensor] = []
        if by_path:
            guide, scores = self.score(program, batch, guide, factors)
        else:
            scores = self._log_density(guide, batch)
        model = poutine.trace(poutine.replay(self.plate(program.model), trace=guide)).get_trace(**batch)
        logs = self._log_density(model, batch) - scores
        surrogate = loss = -((power * logs).logsumexp(0) - math.log(count)).sum() / power
        if by_path:
            shares = (power * logs.detach()).softmax(0)
            factors.append(self.alpha + power * shares)
            surrogate = -(shares * logs).sum()
        return Terms(loss.detach(), surrogate, -logs.detach().mean(0).sum())

    def draw(self, program: Any, batch: Batch) -> Trace:
        """Trace the guide, with its draws side by side."""
        return poutine.trace(self.plate(program.guide)).get_trace(**batch_of(program.guide, batch))  # type: ignore[no-any-return]

    def score(self, program: Any, batch: Batch, drawn: Trace, factors: list[Tensor]) -> tuple[Trace, Tensor]:
        """Trace the guide again at copies of its draws, and score it, with what is learned held constant.

        So the density of the guide has a gradient with respect to the draws alone, of the sites that they condition
        too, and parameters that model and guide share keep the gradient of their use in the model. Points (`Delta`) are
        made anew of the draws that they stand for.

        Args:
            program: any program.
            batch: its data.
            drawn: trace of the guide.
            factors: by the time of the backward pass, one tensor (k, n) by which `dreg` multiplies the gradient that
                reaches each draw through its copy; the path from one draw to the next is not.
        """
        sites = _spread(drawn)
        copies = {name: site["value"].view_as(site["value"]) for name, site in sites.items()}
        for name, copy in copies.items():
            if self.gradient == "dreg" and copy.requires_grad:
                event = sites[name]["fn"].event_dim
                copy.register_hook(lambda grad, event=event: grad * _beside(factors[0], grad, event))
        with constant(self.learned):
            again = self._at(copies, program, batch)
            return again, self._log_density(again, batch)  # here, since a distribution may be lazy

    def _at(self, values: dict[str, Tensor], program: Any, batch: Batch) -> Trace:
        again = Given(values)(self.plate(program.guide))
        return poutine.trace(again).get_trace(**batch_of(program.guide, batch))  # type: ignore[no-any-return]

    def check(self, program: Any, batch: Batch) -> None:
        """Try the second pass of the guide, which runs twice.

        Raises:
            ValueError: If it cannot be scored at given draws, its density there is another one, or a point depends on
                what is learned.
        """
        drawn, wrong = self.draw(program, batch), ""
        given = {name: site["value"].clone() for name, site in _spread(drawn).items()}
        try:
            with torch.enable_grad():
                again = self._at(given, program, batch)
            one, other = (self._log_density(trace, batch) for trace in (drawn, again))
        except (KeyError, NotImplementedError):
            wrong = "a flow of it has no inverse"
        else:
            points = {name: site["value"] for name, site in drawn_sites(again).items() if name not in given}
            if learned := [name for name, value in points.items() if value.requires_grad]:
                wrong = f"the place of its point '{learned[0]}' is learned"
            elif not torch.allclose(one, other, rtol=1e-2, atol=1e-2):
                wrong = "its density is another one each time, as with dropout"
        if wrong:
            raise ValueError(
                f"Expected a guide that can be scored at given draws for gradient = {self.gradient!r}; {wrong}. Use "
                'gradient = "plain".'
            )

    def _log_density(self, trace: Trace, batch: Batch) -> Tensor:
        n = 1 if self.structure.whole else len(next(iter(batch.values())))
        return log_density(trace, self.particles, n)


def _spread(drawn: Trace) -> dict[str, Any]:
    """The latent sites of a trace that are no points."""
    return {name: site for name, site in drawn_sites(drawn).items() if not is_point(site["fn"])}


def _beside(factor: Tensor, value: Tensor, event: int) -> Tensor:
    """A factor (k, n) in the shape of values (k, *inner plates, n, *event)."""
    batch = value.dim() - event
    shape = (len(factor), *[1] * (batch - 2), factor.shape[1])[:batch]
    return factor.reshape(*shape, *[1] * event).to(value.dtype)


@contextmanager
def constant(tensors: list[Tensor]) -> Iterator[None]:
    """Treat leaf tensors as constant in what is computed within; what was computed before keeps its gradient."""
    before = [one.requires_grad for one in tensors]
    try:
        for one in tensors:
            one.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyro.module warns of frozen parameters
            yield
    finally:
        for one, flag in zip(tensors, before, strict=True):
            one.requires_grad_(flag)
