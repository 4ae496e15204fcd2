r"""Stochastic variational inference: the only training loop, and the only minus sign of an objective."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from tqdm import tqdm

from ppl_vae._checks import check_choice, check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.data.loading import Data
from ppl_vae.infer.objectives import OBJECTIVES, Objective, check_objective
from ppl_vae.infer.step import History, State, Trainer
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.rows import indexed, keywords, numbered, remember
from ppl_vae.programs.sites import ignores_data
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import batch_of, check_batch

Schedule = Literal["constant", "one-cycle", "cosine"]
Keep = Literal["last", "best"]
SETTINGS = ("elbo", "epochs", "batch_size", "learning_rate", "schedule", "clip", "particles", "keep")


def fit(
    program: Any,
    x: Any = None,
    *,
    elbo: Objective = "Trace_ELBO",
    epochs: int = 100,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    schedule: Schedule = "constant",
    clip: float = 0.0,
    particles: int = 1,
    keep: Keep = "last",
    seed: int = 0,
    device: str = "auto",
    validation: Any = None,
    optimizer: Callable[..., Optimizer] | None = None,
    parameters: Iterable[Tensor] | None = None,
    progress: bool | None = None,
    on_epoch: Callable[[int, "State"], None] | None = None,
    resume: dict[str, Any] | None = None,
    capture: bool = True,
) -> History:
    r"""Train a program by stochastic variational inference.

    Maximises :math:`\mathrm{ELBO} = E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)]`, the mean over data in nats, by
    Pyro's own estimators (Automated Variational Inference in Probabilistic Programming, Wingate and Weber 2013).

    A guide that keeps one row per datum by its place in the batch, such as Pyro's `AutoNormal`, is trained on the whole
    data as one batch, in their order, and afterwards answers for these data alone; so does a guide that takes `index`,
    in batches too, but for data that come with their `index`.

    Where the whole data set counts as one datum, since latent variables lie outside the data plate, each step takes all
    data; one whose model takes `subsample_size` by keyword takes parts of `batch_size` by its own plate. Bounds are
    then those of the data set.

    The program's modules are in training mode meanwhile, so that dropout acts; `validation` is judged in evaluation
    mode, as everything else that evaluates a program does.

    Args:
        program: any program, or a `Target`; what it learns is changed in place.
        x: data, a tensor (n, *x), a batch dict, or `Data`, whose training part is drawn anew each epoch if its
            protocol says so; none beside a `Target`.
        elbo: `Trace_ELBO` (by sampling) or `TraceMeanField_ELBO` (KL terms in closed form where Pyro knows one).
        epochs: passes over the data.
        batch_size: data per step.
        learning_rate: of the optimiser; for `one-cycle` its maximum.
        schedule: `constant`, `one-cycle` or `cosine`, over all epochs.
        clip: maximum of the global gradient norm, per datum; 0 is off.
        particles: draws of the latent variables per datum and step.
        keep: `last`, or `best` by the bound of the validation data.
        seed: of the order of the data and of all draws; the global random state is left alone.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`; the program is moved there.
        validation: data as `x`, whose bound is recorded after each epoch.
        optimizer: called with the parameters and `lr`; Adam by default.
        parameters: the tensors to learn; all of the program's by default.
        progress: whether to show a bar; by default only if standard error is a terminal.
        on_epoch: called after each epoch with its number and the `State`, whose `save()` returns what `resume` takes.
        resume: a saved state to start from; the result is that of a run without interruption.
        capture: whether steps are replayed as the tensor operations of an earlier one, without the Python around
            them, where this gives the same numbers (see `Gradients`); the log says where it does not.

    Returns:
        The history.

    Raises:
        TypeError: If a program comes without data, or a `Target` with data.
        ValueError: If settings or data do not fit, the program does not allow the objective, its guide keeps one row
            per datum by place and `batch_size` is below n, or a loss turns NaN. The message then names step and site,
            and the program keeps its last good state.
    """
    check_settings(**{key: value for key, value in locals().items() if key in (*SETTINGS, "validation")})
    chosen = pick_device(device)
    given = x.epoch(0) if isinstance(x, Data) else x
    if given is not None and not isinstance(program, Target):
        given = numbered(program, as_batch(given, aligned=False))
    target = Target.of(program, given)
    program = target.program
    if isinstance(program, nn.Module):
        program.to(chosen)
    target.refresh(chosen)

    def other(x: Any, *, check: bool) -> Target:
        batch = {key: value.to(chosen) for key, value in as_batch(x).items()}
        return target.with_batch(check_batch(program, batch, check=check))

    sites = target.structure
    check_objective(elbo, sites)
    if sites.rows is not None and (batch_size < target.n or validation is not None):
        refused = "validation data" if batch_size >= target.n else f"batches of {batch_size}"
        raise ValueError(
            f"Expected no {refused}: this guide keeps one row per datum, by its place in the batch. Take `index`, or "
            f"fit with the whole data as one batch (batch_size = {target.n}) and no validation data."
        )
    if sites.whole and validation is not None:
        raise ValueError("Expected no validation data: the whole data set counts as one datum of this program.")
    parts = parts_of(target, batch_size) if sites.whole else 0
    if sites.rows is not None or indexed(program):
        remember(program, target.batch)
    held_out = None if validation is None else other(validation, check=True)
    objective = OBJECTIVES[elbo](
        num_particles=particles,
        vectorize_particles=particles > 1 and not sites.sequential,
        max_plate_nesting=sites.nesting,
    )
    with scope(program), fork_rng(seed, "parameters", device=chosen):
        learned = [*parameters_of(target)] if parameters is None else [*parameters]
    if not learned:
        raise ValueError("Expected a program with something to learn; it has no parameters that take gradients.")
    with scope(program, training=True):
        make = optimizer or (lambda tensors, lr: torch.optim.Adam(tensors, lr=lr, fused=True))
        steps = epochs * (parts or math.ceil(target.n / batch_size))
        optim = make(learned, lr=learning_rate)
        state = State(learned, optim, _scheduler(schedule, optim, learning_rate, steps), module=program)
        if resume is not None:
            state.load(resume)
        shuffle = sites.rows is None and not sites.whole
        trainer = Trainer(program, objective, state, batch_size, clip, seed, shuffle, parts, capture)
        history, done = state.history, len(state.history.elbo)
        before = time.perf_counter() - (history.seconds[-1] if done else 0.0)
        hidden = None if progress is None else not progress
        for epoch in tqdm(range(done, epochs), initial=done, total=epochs, unit="epoch", disable=hidden, leave=False):
            data = other(x.epoch(epoch), check=False) if isinstance(x, Data) else target
            history.elbo.append(-trainer.epoch(data, epoch, check=epoch == done) / data.n)
            history.learning_rate.append(float(state.optimizer.param_groups[0]["lr"]))
            history.seconds.append(time.perf_counter() - before)
            if held_out is not None:
                history.validation.append(trainer.bound(held_out))
                best = max(filter(math.isfinite, history.validation), default=None)
                if keep == "best" and history.validation[-1] == best:
                    history.best_epoch, state.best = epoch, state.values()
            if on_epoch is not None:
                on_epoch(epoch, state)
        if state.best is not None:
            state.set_values(state.best)
    if sites.whole and ignores_data(program, target.batch, seed):
        remember(program, target.batch)
    target.refresh()
    return history


def pick_device(device: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` is a GPU if there is one.

    Raises:
        ValueError: If the device is unknown, or this machine has no GPU for `cuda`.
    """
    if device.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"Expected `device` to be auto, cpu or cuda; got {device!r}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "Expected a machine with CUDA for device = 'cuda'; there is none. Use device = 'auto' or 'cpu'."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def check_settings(**given: Any) -> None:
    """Check settings of `fit`.

    Raises:
        ValueError: If one is out of range; the first such setting by name.
    """
    choices = {"elbo": tuple(OBJECTIVES), "schedule": get_args(Schedule), "keep": get_args(Keep)}
    for key, value in given.items():
        if key in choices:
            check_choice(key, value, choices[key])
        if key in ("epochs", "batch_size", "particles"):
            check_int(key, value)
        if key == "learning_rate" and not 0 < value < math.inf:
            raise ValueError(f"Expected `learning_rate` to be a positive number; got {value!r}.")
        if key == "clip" and not 0 <= value < math.inf:
            raise ValueError(f"Expected `clip` to be 0 (off) or a positive number; got {value!r}.")
    if given.get("keep") == "best" and "validation" in given and given["validation"] is None:
        raise ValueError('Expected validation data with keep = "best"; got none. Pass `validation` or keep = "last".')


def parameters_of(target: Target) -> list[Tensor]:
    """What takes gradients: the module's own parameters and what the traces register with Pyro, now set up."""
    program, registered = target.program, []
    all_of_it = target.structure.rows is not None or target.structure.whole
    few = target.batch if all_of_it else {key: value[:2] for key, value in target.batch.items()}
    for function in (program.guide, program.model):
        trace: Any = poutine.trace(function, param_only=True).get_trace(**batch_of(function, few))
        registered += [site["value"].unconstrained() for site in trace.nodes.values() if site["type"] == "param"]
    own = list(program.parameters()) if isinstance(program, nn.Module) else []
    return list({id(tensor): tensor for tensor in [*own, *registered] if tensor.requires_grad}.values())


def parts_of(target: Target, batch_size: int) -> int:
    """Steps of an epoch where the whole counts as one datum: as many as it takes for parts of the batch size."""
    if "subsample_size" not in keywords(target.program.model):
        return 1
    return math.ceil(max(len(value) for value in target.batch.values() if value.dim()) / batch_size)


def _scheduler(schedule: Schedule, optimizer: Optimizer, rate: float, steps: int) -> lr_scheduler.LRScheduler:
    if schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=max(steps, 2))
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
