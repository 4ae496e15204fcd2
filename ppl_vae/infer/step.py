"""Training steps: their state, one step on the loss, one epoch of steps."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import _processes as processes
from ppl_vae._checks import is_out_of_memory
from ppl_vae._seeds import fork_rng, random_state, set_random_state
from ppl_vae.data.batches import minibatches
from ppl_vae.infer.gradients import Gradients
from ppl_vae.infer.optimizers import take_step
from ppl_vae.infer.saved import check_saved
from ppl_vae.programs.param_store import mode
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import Batch, batch_of


@dataclass
class History:
    """What a training run recorded, one entry per epoch; bounds are in nats per datum.

    Args:
        elbo: mean ELBO over the epoch's steps, while the parameters moved, whatever the objective.
        validation: ELBO of the validation data after the epoch; empty without such data.
        objective: as `elbo`, of what was maximised: with beta and free bits, or by several draws.
        validation_objective: as `validation`, of the objective, at the final beta.
        learning_rate: the rate at the epoch's end.
        seconds: time since the start.
        steps: how many steps the optimiser took in all.
        best_epoch: the epoch whose state was kept, counted from 0.
        settings: those of `fit`, as a spec's `[svi]` has them, once it has ended.
        capture: how the last steps were taken: `off`, `graph`, `fast` or `compile` (see `Gradients`).
        capture_reason: why they were not captured, if that was tried.
    """

    elbo: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    validation_objective: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    best_epoch: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    capture: str | None = None
    capture_reason: str | None = None

    def best(self, start: int = 0, otherwise: int | None = None) -> Any:
        """The first epoch, from `start` on, with the highest finite objective of the validation data."""
        values = list(enumerate(self.validation_objective))[start:]
        finite = [(value, epoch) for epoch, value in values if math.isfinite(value)]
        return max(finite, key=lambda pair: pair[0])[1] if finite else otherwise


@dataclass
class State:
    """State of a training run: what it learns and counts, the optimiser, the schedule and the history.

    This is everything needed to resume the run exactly: between epochs, since the order of the data and all draws are
    keyed by seed and epoch, and within one by its `place`.

    Args:
        learned: the tensors that are learned.
        optimizer: of these tensors.
        scheduler: of the optimiser's learning rate.
        history: of the run.
        best: `values()` that were kept, if any.
        module: the program; its buffers, such as the running means of batch normalisation, belong to the state.
        losses: within an epoch, of its steps so far.
        place: where to go on within an epoch: the losses of its steps before, and the states of the generators.
        good: what `save` returned after the last epoch, or at the start.
    """

    learned: list[Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    history: History = field(default_factory=History)
    best: list[Tensor] | None = None
    module: Any = None
    losses: list[Tensor] = field(default_factory=list)
    place: dict[str, Any] | None = None
    good: dict[str, Any] | None = None

    def save(self) -> dict[str, Any]:
        """Copy the state into plain containers and tensors."""
        return {
            "learned": self.values(),
            "optimizer": _copied(self.optimizer.state_dict()),
            "schedule": _copied(self.scheduler.state_dict()),
            "history": _copied(vars(self.history)),
            "best": self.best,
            "place": self._place() if self.losses else self.place,
        }

    def _place(self) -> dict[str, Any]:
        return {"losses": torch.stack(self.losses), "generators": random_state(self.losses[0].device)}

    def load(self, saved: dict[str, Any]) -> None:
        """Go back to a saved state.

        Raises:
            ValueError: If it is not one of this program and its settings.
        """
        check_saved(saved, self.save(), self.learned, self.optimizer)
        self.set_values(saved["learned"])
        self.optimizer.load_state_dict(_copied(saved["optimizer"]))
        self.scheduler.load_state_dict(saved["schedule"])
        known = saved["history"]  # of an older run, whose objective was the ELBO
        older = {"objective": known["elbo"], "validation_objective": known["validation"]}
        vars(self.history).update(_copied({**older, **known}))
        self.best, self.place, self.losses = saved["best"], saved.get("place"), []

    def tensors(self) -> list[Tensor]:
        """The learned tensors, then the buffers."""
        return [*self.learned, *(self.module.buffers() if isinstance(self.module, nn.Module) else ())]

    def values(self) -> list[Tensor]:
        """Copies of the learned tensors and the buffers."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    @torch.no_grad()
    def set_values(self, values: list[Tensor]) -> None:
        """Copy values into the learned tensors and the buffers, which the states of older runs lack."""
        tensors = self.learned if len(values) == len(self.learned) else self.tensors()
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    def is_finite(self) -> bool:
        """Whether everything learned is finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.learned)


@dataclass
class Trainer:
    """Epochs of steps on a program, and the bound of held-out data.

    Args:
        gradients: of the objective, whose `beta` follows the steps.
        state: the state of the run; the steps change it.
        batch_size: data per step.
        clip: maximum of the global gradient norm, per datum; 0 is off.
        seed: of the order of the data and of all draws.
        shuffle: whether each epoch has an order of its own; else it is one batch of all data as they are.
        parts: where the whole data set counts as one datum, the steps of an epoch: one on all data, or several on parts
            of `batch_size` that the program's own plate takes. 0 otherwise.
        on_step: called with the state between two steps of an epoch.
        smaller: settings by which a step takes less memory, in words.
    """

    gradients: Gradients
    state: State
    batch_size: int
    clip: float
    seed: int
    shuffle: bool = True
    parts: int = 0
    on_step: Callable[[State], None] | None = None
    smaller: str = ""
    former: Any = None  # gradients of the step before

    def epoch(self, data: Target, number: int, *, check: bool) -> tuple[float, float]:
        """Pass once over the data.

        Args:
            data: the training data.
            number: of the epoch, which keys the order of the data and all draws.
            check: whether Pyro checks the first step.

        Returns:
            Objective and ELBO, sums over the data.

        Raises:
            ValueError: If a step leaves anything that is not finite. The state is then the one before that step.
            MemoryError: If a step does not fit into memory. The state is then the one before the epoch.
        """
        good = self.state.good = self.state.good or self.state.save()
        self.gradients.look()
        lacking = ""
        try:
            with self._drawing(data, number) as losses:
                first = len(losses)
                for step, (batch, n) in enumerate(self._batches(data, number)):
                    if step < first:
                        continue
                    if step > first and self.on_step is not None and processes.size() == 1:
                        self.on_step(self.state)
                    with pyro.validation_enabled(check and step == first):
                        losses.append(self._step(batch, n) * (1 / self.parts if self.parts else n))
        except KeyboardInterrupt:
            self.state.load(good)
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lacking = (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
        if lacking:  # by now what the step held has been given back
            step, self.former = self.state.history.steps + 1, None
            self.gradients.graphs.clear()
            self.state.load(good)
            raise MemoryError(
                f"Expected steps that fit into memory; step {step} (epoch {number + 1}) did not: {lacking}. The "
                f"program keeps the state before that epoch. Try {self.smaller}."
            )
        self.state.history.capture, self.state.history.capture_reason = self.gradients.mode, self.gradients.reason
        processes.same([one for one in self.state.tensors()[len(self.state.learned) :] if one.is_floating_point()])
        values = torch.stack(losses)
        if bool(values[:, 0].isfinite().all()) and self.state.is_finite():
            objective, elbo = (-values.double().sum(0)).tolist()
            return objective, elbo
        culprit = self._replay(data, number, good)
        raise ValueError(
            f"Expected a finite loss; it turned NaN or infinite at step {self.state.history.steps + 1} (epoch "
            f"{number + 1}), at {culprit}. The program keeps the state before that step. Try a lower learning_rate, "
            "clip = 1.0, or data nearer to unit scale."
        )

    @contextmanager
    def _drawing(self, data: Target, number: int) -> Iterator[list[Tensor]]:
        """Draw as an epoch does, from its start or from the place of the state, and keep the losses of its steps.

        Each of several processes has draws of its own.
        """
        state, place = self.state, self.state.place
        state.losses, state.place = [] if place is None else [*place["losses"].to(data.device)], None
        key = (number, processes.rank()) if processes.rank() else (number,)
        with fork_rng(self.seed, "svi", *key, device=data.device):
            if place is not None and not processes.rank():
                set_random_state(place["generators"], data.device)
            yield state.losses
        state.losses = []

    @torch.no_grad()
    def bound(self, held_out: Target) -> tuple[float, float]:
        """Objective and ELBO of held-out data in nats per datum, by the same draws each time, at the final beta."""
        objective = elbo = 0.0
        draws = fork_rng(self.seed, "validation", device=held_out.device)
        if self.gradients.objective.beta is not None:
            self.gradients.objective.beta.set()
        with mode(self.gradients.program), draws, pyro.validation_enabled(False):
            for block in held_out.blocks(self.batch_size):
                loss, bound = self.gradients.loss(block.batch)
                objective, elbo = objective - float(loss) * block.n, elbo - float(bound) * block.n
        return objective / held_out.n, elbo / held_out.n

    def _batches(self, data: Target, number: int) -> Iterable[tuple[Batch, int]]:
        """Batches, of several processes the part of this one, and how many data there are in all."""
        if self.parts > 1:
            part: Any = {**data.batch, "subsample_size": self.batch_size}
            return [(part, _size(data.batch))] * self.parts
        if not self.shuffle:
            return [(data.batch, _size(data.batch))]
        part, n = (processes.rank(), processes.size()), _size(data.batch)
        own = minibatches(data.batch, self.batch_size, seed=self.seed, epoch=number, part=part)
        sizes = [min(self.batch_size, n - start) for start in range(0, n, self.batch_size)]
        return zip(own, sizes, strict=True)

    def _replay(self, data: Target, number: int, good: dict[str, Any], until: int = -1) -> str:
        """Replay an epoch from its start up to the step that fails, and name the site at fault."""
        self.state.load(good)
        with self._drawing(data, number) as losses, pyro.validation_enabled(False):
            for step, (batch, n) in enumerate(self._batches(data, number)):
                if step < len(losses):
                    continue
                if step == until:
                    return _culprit(self.gradients.program, batch)
                if not (bool(self._step(batch, n)[0].isfinite()) and self.state.is_finite()):
                    break
        return self._replay(data, number, good, step)

    def _step(self, batch: Batch, n: int) -> Tensor:
        """Take one step on the loss of n data, a part of which is here; returns minus objective and ELBO per datum."""
        state, step = self.state, self.state.history.steps
        if self.gradients.objective.beta is not None:
            self.gradients.objective.beta.set(step)
        losses, gradients = self.gradients(batch, step)
        if processes.size() > 1:
            share = _size(batch) / n if _size(batch) < n else 1 / processes.size()
            losses, *gradients = processes.average([losses, *gradients], share)  # type: ignore[assignment]
        self.former = gradients  # till the next are there: memory that is all given back must be fetched anew
        if self.clip:
            norm = torch.nn.utils.get_total_norm([one for one in gradients if one is not None])
            scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            gradients = [None if one is None else one * scale for one in gradients]  # two may share their memory
        take_step(state.optimizer, state.learned, gradients)
        state.scheduler.step()
        state.history.steps += 1
        return losses


def _copied(value: Any) -> Any:
    """A copy of nested containers of tensors and plain values."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _culprit(program: Any, batch: Batch) -> str:
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
