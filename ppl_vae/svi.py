r"""Stochastic variational inference: the only training loop, and the only minus sign of an objective."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vae.batches import as_batch, batches
from ppl_vae.data import Data
from ppl_vae.traces import Structure, batch_of, prepare, scope, seeded, structure

__all__ = ["History", "fit"]

Objective = Literal["Trace_ELBO", "TraceMeanField_ELBO"]
Schedule = Literal["constant", "one-cycle", "cosine"]

SETTINGS = ("elbo", "epochs", "batch_size", "learning_rate", "schedule", "clip", "particles", "keep")

OBJECTIVES: dict[str, type[ELBO]] = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}


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


def fit(
    program: Any,
    x: Any,
    *,
    elbo: Objective = "Trace_ELBO",
    epochs: int = 100,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    schedule: Schedule = "constant",
    clip: float = 0.0,
    particles: int = 1,
    keep: Literal["last", "best"] = "last",
    seed: int = 0,
    device: str = "auto",
    validation: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    parameters: Iterable[Tensor] | None = None,
    progress: bool | None = None,
    on_epoch: Callable[[int, "State"], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> History:
    r"""Train a program by stochastic variational inference.

    Maximises :math:`\mathrm{ELBO} = E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)]`, the mean over data in nats, by
    Pyro's own estimators (Automated Variational Inference in Probabilistic Programming, Wingate and Weber 2013).

    Args:
        program: any program; what it learns is changed in place.
        x: data, a tensor (n, *x), a batch dict, or `Data`, whose training part is drawn anew each epoch where its
            protocol says so.
        elbo: `Trace_ELBO` (by sampling) or `TraceMeanField_ELBO` (KL terms analytic where they can be).
        epochs: passes over the data.
        batch_size: data a step.
        learning_rate: of the optimiser; for `one-cycle` its maximum.
        schedule: `constant`, `one-cycle` or `cosine`, over the epochs asked for.
        clip: maximum of the global gradient norm, per datum; 0 is off.
        particles: draws of the latent variables a datum and step.
        keep: `last` or `best`, the latter by the bound of the validation data.
        seed: of the order of the data and of all draws; the global random state is left alone.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`; the program is moved there.
        validation: data as `x`, whose bound is recorded after each epoch.
        optimizer: called with the parameters and `lr`; Adam by default.
        parameters: the tensors to learn, all of the program's by default.
        progress: whether to show a bar; by default where standard error is a terminal.
        on_epoch: called after each epoch with its number and the `State`, whose `save()` gives what `resume` takes.
        resume: a saved state to go on from; the result is that of a run without interruption.

    Returns:
        The history.

    Raises:
        ValueError: for settings or data that do not fit, an objective that the pair does not allow, or a loss that
            turns NaN: the message names step and site, and the program keeps its last good state.
    """
    check_settings(**{key: value for key, value in locals().items() if key in SETTINGS})
    target = pick_device(device)
    if isinstance(program, nn.Module):
        program.to(target)
    data = prepare(program, _on(target, x.epoch(0) if isinstance(x, Data) else x))
    if keep == "best" and validation is None:
        raise ValueError(
            'Expected validation data with keep = "best"; got none. Give validation data or keep = "last".'
        )
    held_out = None if validation is None else prepare(program, _on(target, validation))
    found = structure(program, data, seed=seed)
    check_objective(elbo, found)
    n = len(next(iter(data.values())))
    objective = OBJECTIVES[elbo](
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=found.nesting
    )
    with scope(program):
        with seeded(seed, "parameters", device=target):
            learned = _parameters(program, data) if parameters is None else list(parameters)
        if not learned:
            raise ValueError("Expected a program with something to learn; it has no parameters that take gradients.")
        make = optimizer or (lambda tensors, lr: torch.optim.Adam(tensors, lr=lr, fused=True))
        stepper = make(learned, lr=learning_rate)
        plan = _plan(schedule, stepper, learning_rate, epochs * math.ceil(n / batch_size))
        state = State(learned, stepper, plan, History())
        if resume is not None:
            state.load(resume)
        history = state.history
        before = time.perf_counter() - (history.seconds[-1] if history.seconds else 0.0)
        first = len(history.elbo)
        quiet = None if progress is None else not progress
        for epoch in tqdm(range(first, epochs), initial=first, total=epochs, unit="epoch", disable=quiet, leave=False):
            drawn = prepare(program, _on(target, x.epoch(epoch)), check=False) if isinstance(x, Data) else data
            good = state.save()
            try:
                total = _epoch(program, drawn, objective, state, good, clip, batch_size, seed, epoch, first == epoch)
            except KeyboardInterrupt:
                state.load(good)
                raise
            history.elbo.append(-total / n)
            history.learning_rate.append(float(stepper.param_groups[0]["lr"]))
            history.seconds.append(time.perf_counter() - before)
            if held_out is not None:
                history.validation.append(_bound(objective, program, held_out, batch_size, seed))
                if keep == "best" and history.validation[-1] == max(
                    filter(math.isfinite, history.validation), default=None
                ):
                    history.best_epoch, state.best = epoch, [tensor.detach().clone() for tensor in learned]
            if on_epoch is not None:
                on_epoch(epoch, state)
        if state.best is not None:
            with torch.no_grad():
                for tensor, value in zip(learned, state.best, strict=True):
                    tensor.copy_(value)
    return history


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


def _epoch(
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
    with seeded(seed, "svi", epoch, device=some.device):
        for batch in batches(drawn, batch_size, seed=seed, epoch=epoch):
            with pyro.validation_enabled(first and not losses):
                losses.append(_step(objective, program, batch, state, clip) * len(next(iter(batch.values()))))
    values = torch.stack(losses)
    if bool(values.isfinite().all()) and _finite(state.learned):
        return float(values.sum())
    order = list(batches(drawn, batch_size, seed=seed, epoch=epoch))
    state.load(good)
    with seeded(seed, "svi", epoch, device=some.device), pyro.validation_enabled(False):
        bad, fine = -1, True
        while fine and bad < len(order) - 1:
            bad += 1
            fine = bool(_step(objective, program, order[bad], state, clip).isfinite()) and _finite(state.learned)
    state.load(good)
    with seeded(seed, "svi", epoch, device=some.device), pyro.validation_enabled(False):
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


def _on(device: torch.device, x: Any) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in as_batch(x).items()}


def pick_device(device: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` is a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"Expected `device` to be auto, cpu or cuda; got {device!r}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "Expected a machine with CUDA for device = 'cuda'; there is none. Use device = 'auto' or 'cpu'."
        )
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def check_objective(elbo: str, found: Structure) -> None:
    """Refuse `TraceMeanField_ELBO` for latent sites that model and guide visit in different orders."""
    if elbo == "TraceMeanField_ELBO" and not found.same_order:
        raise ValueError(
            f"Expected model and guide to visit the latent sites in one order, {', '.join(found.latents)}, for "
            f"TraceMeanField_ELBO; the guide's "
            "order differs, and the bound would be wrong. Reorder the guide or use Trace_ELBO."
        )


def check_settings(**given: Any) -> None:
    """Refuse settings of `fit` that are out of range, the first of them by name."""
    allowed = {"elbo": tuple(OBJECTIVES), "schedule": ("constant", "one-cycle", "cosine"), "keep": ("last", "best")}
    for key, value in given.items():
        if key in allowed and value not in allowed[key]:
            raise ValueError(f"Expected `{key}` to be one of {', '.join(allowed[key])}; got {value!r}.")
        if key in ("epochs", "batch_size", "particles") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"Expected `{key}` to be a whole number, at least 1; got {value!r}.")
        if key == "learning_rate" and not 0 < value < math.inf:
            raise ValueError(f"Expected `learning_rate` to be a positive number; got {value!r}.")
        if key == "clip" and not 0 <= value < math.inf:
            raise ValueError(f"Expected `clip` to be 0 (off) or a positive number; got {value!r}.")


def _parameters(program: Any, data: dict[str, Tensor]) -> list[Tensor]:
    """Collect what takes gradients: the module's own parameters and what the traces register with Pyro."""
    found = {id(p): p for p in program.parameters()} if isinstance(program, nn.Module) else {}
    few = {key: value[:2] for key, value in data.items()}
    for function in (program.guide, program.model):
        trace = poutine.trace(function, param_only=True).get_trace(**batch_of(function, few))
        for site in trace.nodes.values():
            if site["type"] == "param":
                tensor = site["value"].unconstrained()
                found[id(tensor)] = tensor
    return [tensor for tensor in found.values() if tensor.requires_grad]


def _plan(
    schedule: str, stepper: torch.optim.Optimizer, rate: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(stepper, max_lr=rate, total_steps=max(steps, 2))
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(stepper, T_max=steps)
    return torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1.0)


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
def _bound(objective: Any, program: Any, data: dict[str, Tensor], size: int, seed: int) -> float:
    """Estimate the bound of held-out data, by the same draws each time."""
    n, total = len(next(iter(data.values()))), 0.0
    with seeded(seed, "validation", device=next(iter(data.values())).device), pyro.validation_enabled(False):
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
