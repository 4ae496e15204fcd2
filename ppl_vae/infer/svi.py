r"""Stochastic variational inference: the only training loop, and the only minus sign of an objective."""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ppl_vae import _processes as processes
from ppl_vae._checks import check_choice, check_int
from ppl_vae._progress import track
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch, check_observed
from ppl_vae.data.loading import Data
from ppl_vae.infer.elbo import Beta, Per
from ppl_vae.infer.gradients import Capture, Gradients
from ppl_vae.infer.importance_weighted import Gradient
from ppl_vae.infer.objectives import OBJECTIVES, Objective, check_objective_settings, make_objective
from ppl_vae.infer.optimizers import Name, Schedule, check_optimizer_settings, make_optimizer, make_schedule
from ppl_vae.infer.step import History, State, Trainer
from ppl_vae.programs.param_store import claim, scope
from ppl_vae.programs.precision import LEAST, Precision
from ppl_vae.programs.rows import indexed, keywords, numbered, remember
from ppl_vae.programs.sites import ignores_data
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import batch_of, check_batch
from ppl_vae.programs.vae import VAE

Keep = Literal["last", "best"]
OBJECTIVE = ("elbo", "alpha", "gradient", "particles", "free_bits", "free_bits_per")
RATE = ("weight_decay", "momentum", "betas", "epsilon")
SETTINGS: tuple[str, ...] = (*OBJECTIVE, "beta", "warm_up", "cycles", "epochs", "batch_size", "optimizer", *RATE)
SETTINGS += ("learning_rate", "schedule", "restarts", "clip", "keep", "patience", "capture", "precision")


def fit(
    program: Any,
    x: Any = None,
    *,
    elbo: Objective = "Trace_ELBO",
    alpha: float | None = None,
    gradient: Gradient = "plain",
    particles: int = 1,
    beta: float = 1.0,
    warm_up: int = 0,
    cycles: int | None = None,
    free_bits: float = 0.0,
    free_bits_per: Per | None = None,
    epochs: int = 100,
    batch_size: int = 100,
    optimizer: Name | Callable[..., Optimizer] = "Adam",
    learning_rate: float = 1e-3,
    schedule: Schedule = "constant",
    restarts: int | None = None,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    betas: list[float] | None = None,
    epsilon: float | None = None,
    clip: float = 0.0,
    keep: Keep = "last",
    patience: int = 0,
    capture: Capture = "auto",
    precision: Precision = "full",
    seed: int = 0,
    device: str = "auto",
    validation: Any = None,
    parameters: Iterable[Tensor] | None = None,
    progress: bool | None = None,
    on_epoch: Callable[[int, "State"], None] | None = None,
    on_step: Callable[["State"], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> History:
    r"""Train a program by stochastic variational inference.

    Maximises :math:`\mathrm{ELBO} = E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)]`, the mean over data in nats, by
    Pyro's own estimators (Automated Variational Inference in Probabilistic Programming, Wingate and Weber 2013).
    Other objectives are maximised instead where `elbo`, `beta` or `free_bits` say so; the history then has both, the
    objective and the ELBO.

    A guide that keeps one row per datum by its place in the batch, such as Pyro's `AutoNormal`, is trained on the whole
    data as one batch, in their order, and afterwards answers for these data alone; so does a guide that takes `index`,
    in batches too, but for data that come with their `index`.

    Where the whole data set counts as one datum, since latent variables lie outside the data plate, each step takes all
    data; one whose model takes `subsample_size` by keyword takes parts of `batch_size` by its own plate. Bounds are
    then those of the data set.

    In a job of several processes, where `torch.distributed` is set up, each takes its part of every batch with draws of
    its own, and gradients are averaged: `batch_size` counts the data of all of them.

    The program's modules are in training mode meanwhile, so that dropout acts; `validation` is judged in evaluation
    mode, as everything else that evaluates a program does.

    Args:
        program: any program, or a `Target`; what it learns is changed in place.
        x: data, a tensor (n, *x), a batch dict, or `Data`, whose training part is drawn anew each epoch if its
            protocol says so; none beside a `Target`.
        elbo: `Trace_ELBO` (by sampling), `TraceMeanField_ELBO` (KL terms in closed form where Pyro knows one),
            `TraceEnum_ELBO` (sites marked `infer={"enumerate": ...}` summed out),
            `ImportanceWeighted` (the bound of `particles` weights, per datum) or `Renyi` (likewise, with `alpha`).
        alpha: of Renyi's bound: near 1 the ELBO, at 0 `ImportanceWeighted`. A lower bound of log p(x) that is tighter
            than the ELBO for 0 <= alpha < 1 only: below 0 it may lie above log p(x), above 1 it is looser.
        gradient: of the last two objectives: `plain`, `stl` (without the score of the guide, biased for several
            particles) or `dreg` (doubly reparameterised, no bias); the last two score the guide a second time, which
            takes an inverse-autoregressive flow as many passes as there are entries.
        particles: draws of the latent variables per datum and step; the K of `ImportanceWeighted`.
        beta: weight of the KL terms of the ELBO, at the end of the warm-up.
        warm_up: epochs over which the weight rises from 0, step by step.
        cycles: how often it does, 1 by default; of several each keeps `beta` for its second half.
        free_bits: nats that each group of latents may use at no cost, on the minibatch mean.
        free_bits_per: what a group is: each `latent`, by default, or a `site` with all of its latents.
        epochs: passes over the data.
        batch_size: data per step.
        optimizer: `Adam`, `AdamW`, `Adamax`, `SGD` or `NAdam`, or a function of the parameters and `lr`.
        learning_rate: of the optimiser; for `one-cycle` its maximum.
        schedule: `constant`, `one-cycle`, `cosine` or `cosine-restarts`, over all epochs.
        restarts: how often the last one starts anew, 1 by default.
        weight_decay: of the optimiser; AdamW's own is decoupled from the gradient.
        momentum: of SGD.
        betas: of the other optimisers, (0.9, 0.999) by default.
        epsilon: likewise, 1e-8.
        clip: maximum of the global gradient norm, per datum; 0 is off.
        keep: `last`, or `best` by the objective of the validation data at its final beta, after the warm-up.
        patience: epochs without a better such value after which training stops; 0 is off.
        capture: whether steps are replayed as the tensor operations of an earlier one, without the Python around them:
            `off`; `graph`, the same numbers to the last bit; `compile`, equal to rounding, by a C++ compiler, which
            takes half a minute; `auto`, equal to rounding, compiled in long runs, and `off` where a program cannot be
            captured, which the log and the history say.
        precision: of the products in linear layers and convolutions, but for small ones: `full`, that of the data, or
            `bfloat16`, with log densities, gradients and parameters in single precision. Validation is in full.
        seed: of the order of the data and of all draws; the global random state is left alone.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`; the program is moved there.
        validation: data as `x`, whose bound is recorded after each epoch.
        parameters: the tensors to learn; all of the program's by default.
        progress: whether to show a bar; by default only if standard error is a terminal.
        on_epoch: called after each epoch with its number and the `State`, whose `save()` returns what `resume` takes.
        on_step: called likewise between two steps of an epoch, with the `State`.
        resume: a saved state to start from; the result is that of a run without interruption.

    Returns:
        The history.

    Raises:
        TypeError: If a program comes without data, or a `Target` with data.
        ValueError: If settings or data do not fit, a row has nothing observed, the program does not allow the
            objective, its guide keeps one row per datum by place and `batch_size` is below n, or a loss turns NaN. The
            message then names step and site, and the program keeps its last good state.
        MemoryError: If a step does not fit into memory; the program keeps the state of the last whole epoch.
    """
    settings = {key: value for key, value in locals().items() if key in (*SETTINGS, "validation")}
    check_settings(**settings)
    chosen = pick_device(device)
    given = x.epoch(0) if isinstance(x, Data) else x
    if given is not None and not isinstance(program, Target):
        given = numbered(program, as_batch(given, aligned=False))
    target = Target.of(program, given)
    program = target.program
    check_observed(target.batch)
    if isinstance(program, nn.Module):
        program.to(chosen)
    target.refresh(chosen)

    def other(x: Any, *, check: bool) -> Target:
        batch = {key: value.to(chosen) for key, value in as_batch(x).items()}
        return target.with_batch(check_batch(program, batch, check=check))

    sites = target.structure
    if sites.rows is not None and (batch_size < target.n or validation is not None):
        refused = "validation data" if batch_size >= target.n else f"batches of {batch_size}"
        raise ValueError(
            f"Expected no {refused}: this guide keeps one row per datum, by its place in the batch. Take `index`, or "
            f"fit with the whole data as one batch (batch_size = {target.n}) and no validation data."
        )
    if sites.whole and validation is not None:
        raise ValueError("Expected no validation data: the whole data set counts as one datum of this program.")
    if (count := processes.size()) > 1:
        if sites.rows is not None or sites.whole or indexed(program):
            table = type(program.posterior.network).__name__ if isinstance(program, VAE) else "one row per datum"
            raise ValueError(
                f"Expected a single process: this guide keeps what it learns for each datum ({table}) or the whole "
                f"data set is one datum; got {count}. Start it without torchrun."
            )
        if (least := min(target.n, batch_size)) < count:
            raise ValueError(f"Expected at most as many processes as data in a batch, {least}; got {count}.")
    parts = parts_of(target, batch_size) if sites.whole else 0
    if sites.rows is not None or indexed(program):
        remember(program, target.batch)
    held_out = None if validation is None else other(validation, check=True)
    with scope(program), fork_rng(seed, "parameters", device=chosen):
        learned = [*parameters_of(target)] if parameters is None else [*parameters]
        claim(program, learned)
    with scope(program, training=True):
        steps = parts or math.ceil(target.n / batch_size)
        weight = None if beta == 1 and not warm_up else Beta(beta, warm_up * steps, cycles or 1, chosen)
        keys: Any = {key: settings[key] for key in OBJECTIVE}
        objective = make_objective(target, learned, beta=weight, **keys)
        if not learned:
            raise ValueError("Expected a program with something to learn; it has no parameters that take gradients.")
        double = any(one.dtype == torch.float64 for one in (*learned, *target.batch.values()))
        if double and precision != "full":
            raise ValueError(
                f"Expected data and parameters in single precision for precision = {precision!r}; got double. Convert "
                'both by .float(), or use precision = "full".'
            )
        optim = make_optimizer(optimizer, learned, learning_rate, **{key: settings[key] for key in RATE})
        scheduler = make_schedule(schedule, optim, learning_rate, epochs * steps, restarts)
        state = State(learned, optim, scheduler, module=program)
        processes.same([*state.tensors(), *(program.parameters() if isinstance(program, nn.Module) else ())])
        if resume is not None:
            state.load(resume)
        shuffle = sites.rows is None and not sites.whole
        how: Any = {"whole": sites.whole, "capture": capture, "precision": precision}
        how |= {"steps": epochs * steps, "mode": state.history.capture}
        gradients = Gradients(program, objective, learned, **how)
        size = batch_size if parts > 1 else shuffle * min(batch_size, target.n)
        smaller = smaller_steps(size, particles, "double" if double else precision, capture)
        trainer = Trainer(gradients, state, batch_size, clip, seed, shuffle, parts, on_step, smaller)
        history, done = state.history, len(state.history.elbo)
        before = time.perf_counter() - (history.seconds[-1] if done else 0.0)
        hidden = None if progress is None else not progress
        bar = tqdm(range(done, epochs), initial=done, total=epochs, unit="epoch", disable=hidden, leave=False)
        reached = lambda: f", bound {history.elbo[-1]:.3f} nats per datum"  # noqa: E731
        for epoch in track(bar, "training: epoch {}", epochs, done=done, note=reached) if bar.disable else bar:
            if patience and epoch - 1 - history.best(warm_up, epoch) >= patience:
                break
            data = other(x.epoch(epoch), check=False) if isinstance(x, Data) else target
            trained, bound = trainer.epoch(data, epoch, check=epoch == done)
            history.objective.append(trained / data.n)
            history.elbo.append(bound / data.n)
            history.learning_rate.append(float(state.optimizer.param_groups[0]["lr"]))
            history.seconds.append(time.perf_counter() - before)
            if held_out is not None:
                trained, bound = trainer.bound(held_out)
                history.validation_objective.append(trained)
                history.validation.append(bound)
                if keep == "best" and history.best(warm_up) == epoch:
                    history.best_epoch, state.best = epoch, state.values()
            state.good = state.save()
            if on_epoch is not None:
                on_epoch(epoch, state)
        if state.best is not None:
            state.set_values(state.best)
    if precision != "full" and len(history.elbo) > done and not gradients.lowered.used:
        warnings.warn(
            f"Products stayed in full precision: no linear layer or convolution has the {LEAST:,} multiplications in a "
            f"step that {precision!r} takes.",
            stacklevel=2,
        )
    if sites.whole and ignores_data(program, target.batch, seed):
        remember(program, target.batch)
    target.refresh()
    known = {key: value for key, value in settings.items() if value is not None and key != "validation"}
    history.settings = {**known, "optimizer": getattr(optimizer, "__name__", optimizer), "seed": seed}
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
    choices: dict[str, Any] = {"elbo": tuple(OBJECTIVES), "schedule": get_args(Schedule), "keep": get_args(Keep)}
    choices |= {"gradient": get_args(Gradient), "free_bits_per": get_args(Per), "optimizer": get_args(Name)}
    choices |= {"capture": get_args(Capture), "precision": get_args(Precision)}
    least = {"epochs": 1, "batch_size": 1, "particles": 1, "cycles": 1, "restarts": 1, "warm_up": 0, "patience": 0}
    for key, value in given.items():
        if key in choices and value is not None and not callable(value):
            check_choice(key, value, choices[key])
        if key in least and value is not None:
            check_int(key, value, least[key])
        if key == "learning_rate" and not 0 < value < math.inf:
            raise ValueError(f"Expected `learning_rate` to be a positive number; got {value!r}.")
        if key == "clip" and not 0 <= value < math.inf:
            raise ValueError(f"Expected `clip` to be 0 (off) or a positive number; got {value!r}.")
    check_objective_settings(given)
    check_optimizer_settings(given)
    judges = given.get("keep") == "best" or given.get("patience", 0) > 0
    if {"warm_up", "epochs"} <= given.keys() and given["warm_up"] > given["epochs"] - judges:
        raise ValueError(
            f"Expected `warm_up` within the {given['epochs']} epochs of the run"
            f"{', one after it to judge by' * judges}; got {given['warm_up']}. Raise `epochs`, or warm up faster."
        )
    for key, off in (("cycles", "warm_up"), ("free_bits_per", "free_bits")):
        if given.get(key) is not None and given.get(off) == 0:
            raise ValueError(f"Expected `{key}` beside `{off}` alone; got it with {off} = 0, where it has no effect.")
    if judges and "validation" in given and given["validation"] is None:
        one, other = ('keep = "best"', 'keep = "last"') if given.get("keep") == "best" else ("patience", "patience = 0")
        raise ValueError(f"Expected validation data with {one}; got none. Pass `validation` or {other}.")


def smaller_steps(batch_size: int, particles: int, precision: str, capture: str) -> str:
    """Settings by which a step takes less memory, in words."""
    numbers = {"batch_size": batch_size // 2, "particles": particles // 2}
    settings = [f"{key} = {value}" for key, value in numbers.items() if value]
    settings += ['precision = "bfloat16"'] * (precision == "full") + ['capture = "off"'] * (capture != "off")
    return " or ".join(settings or ["smaller networks"])


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
