"""Training steps: a state, one step on the loss, one epoch of steps."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import minibatches
from ppl_vae.programs.traces import batch_of


@dataclass
class History:
    """What a training run saw, an entry an epoch; bounds are nats per datum.

    Args:
        elbo: mean bound over the epoch's steps, while the parameters moved.
        validation: bound of the validation data after the epoch, empty without such data.
        learning_rate: the rate at the epoch's end.
        seconds: time since the start.
        steps: optimiser steps taken in all.
        best_epoch: the epoch whose state was kept, counted from 0.
    """

    elbo: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    best_epoch: int | None = None


class State:
    """Where a training run stands: what it learns, the optimiser, the schedule and the history.

    Between epochs this is all that a run needs to go on exactly as if it had not been interrupted, since the order of
    the data and all draws are keyed by seed and epoch.
    """

    def __init__(
        self,
        learned: list[Tensor],
        stepper: torch.optim.Optimizer,
        plan: torch.optim.lr_scheduler.LRScheduler,
        history: "History",
    ) -> None:
        self.learned, self.stepper, self.plan, self.history = learned, stepper, plan, history
        self.best: list[Tensor] | None = None

    def save(self) -> dict[str, Any]:
        """Copy the state into plain containers and tensors."""
        return {
            "learned": [tensor.detach().clone() for tensor in self.learned],
            "optimizer": copy.deepcopy(self.stepper.state_dict()),
            "schedule": copy.deepcopy(self.plan.state_dict()),
            "history": copy.deepcopy(vars(self.history)),
            "best": self.best,
        }

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> None:
        """Go back to a saved state."""
        for tensor, value in zip(self.learned, saved["learned"], strict=True):
            tensor.copy_(value)
        self.stepper.load_state_dict(copy.deepcopy(saved["optimizer"]))
        self.plan.load_state_dict(saved["schedule"])
        vars(self.history).update(copy.deepcopy(saved["history"]))
        self.best = saved["best"]


def train_epoch(
    program: Any,
    drawn: dict[str, Tensor],
    objective: ELBO,
    state: State,
    good: dict[str, Any],
    clip: float,
    batch_size: int,
    seed: int,
    epoch: int,
    first: bool,
) -> float:
    """Pass once over the data; give the sum of the loss over data.

    Where a step leaves anything that is not finite, the epoch is replayed from its `good` start up to that step.
    """
    some = next(iter(drawn.values()))
    losses: list[Tensor] = []
    with fork_rng(seed, "svi", epoch, device=some.device):
        for batch in minibatches(drawn, batch_size, seed=seed, epoch=epoch):
            with pyro.validation_enabled(first and not losses):
                losses.append(_step(objective, program, batch, state, clip) * len(next(iter(batch.values()))))
    values = torch.stack(losses)
    if bool(values.isfinite().all()) and _finite(state.learned):
        return float(values.sum())
    order = list(minibatches(drawn, batch_size, seed=seed, epoch=epoch))
    state.load(good)
    with fork_rng(seed, "svi", epoch, device=some.device), pyro.validation_enabled(False):
        bad, fine = -1, True
        while fine and bad < len(order) - 1:
            bad += 1
            fine = bool(_step(objective, program, order[bad], state, clip).isfinite()) and _finite(state.learned)
    state.load(good)
    with fork_rng(seed, "svi", epoch, device=some.device), pyro.validation_enabled(False):
        for batch in order[:bad]:
            _step(objective, program, batch, state, clip)
        culprit = _culprit(program, order[bad])
    raise ValueError(
        f"Expected a finite loss; it turned NaN or infinite at step {state.history.steps + 1} (epoch {epoch + 1}), at "
        f"{culprit}. The program keeps the state before that step. Try a lower learning_rate, clip = 1.0, or data "
        "nearer to unit scale."
    )


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _step(objective: ELBO, program: Any, batch: dict[str, Tensor], state: State, clip: float) -> Tensor:
    """Take one step on the loss, minus the bound per datum, and give that loss."""
    loss = _loss(objective, program, batch)
    for tensor, gradient in zip(
        state.learned, torch.autograd.grad(loss, state.learned, allow_unused=True), strict=True
    ):
        tensor.grad = gradient
    if clip:
        torch.nn.utils.clip_grad_norm_(state.learned, clip)
    state.stepper.step()
    state.stepper.zero_grad(set_to_none=True)  # stock SVI would add its own to what is left
    state.plan.step()
    state.history.steps += 1
    return loss.detach()


def _loss(objective: Any, program: Any, batch: dict[str, Tensor]) -> Tensor:
    n = len(next(iter(batch.values())))
    guide_keys = batch_of(program.guide, batch)
    guide = (
        program.guide
        if len(guide_keys) == len(batch)
        else (lambda **given: program.guide(**batch_of(program.guide, given)))
    )
    return objective.differentiable_loss(program.model, guide, **batch) / n  # type: ignore[no-any-return]


@torch.no_grad()
def held_out_bound(objective: Any, program: Any, data: dict[str, Tensor], size: int, seed: int) -> float:
    """Estimate the bound of held-out data, by the same draws each time."""
    n, total = len(next(iter(data.values()))), 0.0
    with fork_rng(seed, "validation", device=next(iter(data.values())).device), pyro.validation_enabled(False):
        for first in range(0, n, size):
            batch = {key: value[first : first + size] for key, value in data.items()}
            total -= float(_loss(objective, program, batch)) * len(next(iter(batch.values())))
    return total / n


def _culprit(program: Any, batch: dict[str, Tensor]) -> str:
    """Name the first site whose log probability is not finite."""
    with torch.no_grad():
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, batch))
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**batch)
    for role, trace in (("guide", guide), ("model", model)):
        trace.compute_log_prob()
        for name in [*trace.stochastic_nodes, *trace.observation_nodes]:
            if not bool(trace.nodes[name]["log_prob"].isfinite().all()):
                return f"site '{name}' of the {role}"
    return "no single site: the sum over sites overflowed"
