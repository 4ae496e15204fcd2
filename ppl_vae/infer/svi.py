r"""Stochastic variational inference: the only training loop, and the only minus sign of an objective."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.data.loading import Data
from ppl_vae.infer.objectives import OBJECTIVES, Objective, check_objective
from ppl_vae.infer.step import History, State, held_out_bound, train_epoch
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.traces import batch_of, check_batch, structure

Schedule = Literal["constant", "one-cycle", "cosine"]
SETTINGS = ("elbo", "epochs", "batch_size", "learning_rate", "schedule", "clip", "particles", "keep")


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
    data = check_batch(program, _on(target, x.epoch(0) if isinstance(x, Data) else x))
    if keep == "best" and validation is None:
        raise ValueError(
            'Expected validation data with keep = "best"; got none. Give validation data or keep = "last".'
        )
    held_out = None if validation is None else check_batch(program, _on(target, validation))
    found = structure(program, data, seed=seed)
    check_objective(elbo, found)
    n = len(next(iter(data.values())))
    objective = OBJECTIVES[elbo](
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=found.nesting
    )
    with scope(program):
        with fork_rng(seed, "parameters", device=target):
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
            drawn = check_batch(program, _on(target, x.epoch(epoch)), check=False) if isinstance(x, Data) else data
            good = state.save()
            try:
                total = train_epoch(
                    program, drawn, objective, state, good, clip, batch_size, seed, epoch, first == epoch
                )
            except KeyboardInterrupt:
                state.load(good)
                raise
            history.elbo.append(-total / n)
            history.learning_rate.append(float(stepper.param_groups[0]["lr"]))
            history.seconds.append(time.perf_counter() - before)
            if held_out is not None:
                history.validation.append(held_out_bound(objective, program, held_out, batch_size, seed))
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
