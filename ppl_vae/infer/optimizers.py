"""Optimisers by name, and schedules of their learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.adam import adam

Name = Literal["Adam", "AdamW", "Adamax", "SGD", "NAdam"]
Schedule = Literal["constant", "one-cycle", "cosine", "cosine-restarts"]


def make_optimizer(
    kind: Name | Callable[..., Optimizer],
    tensors: Iterable[Tensor],
    rate: float,
    *,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    betas: list[float] | None = None,
    epsilon: float | None = None,
) -> Optimizer:
    """One of PyTorch's optimisers, or what a function of the tensors and `lr` makes.

    It is fused where it can be: for tensors without gaps, since a fused optimiser takes their memory as it lies.
    """
    if callable(kind):
        return kind(tensors, lr=rate)
    tensors = list(tensors)
    dense = all(torch.empty_like(one).stride() == one.stride() for one in tensors)
    keys: dict[str, Any] = {"momentum": momentum, "betas": betas and tuple(betas), "eps": epsilon}
    keys = {key: value for key, value in keys.items() if value is not None}
    keys |= {"fused": True} if dense and kind in ("Adam", "AdamW", "SGD") else {}
    return getattr(torch.optim, kind)(tensors, lr=rate, weight_decay=weight_decay, **keys)  # type: ignore[no-any-return]


def take_step(optimizer: Optimizer, tensors: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Take a step of an optimiser by gradients that are given, and leave none behind.

    PyTorch's own fused Adam is called without the bookkeeping around it, once its state is there. On a CPU it reads
    the wrong numbers, without a word, of a gradient that lies in memory other than its tensor does, such as that of
    ``slope.sum()``, one number expanded; so each is given the tensor's layout first.
    """
    gradients = [_laid_out(one, like) for one, like in zip(gradients, tensors, strict=True)]
    group = optimizer.param_groups[0]
    states: Any = [optimizer.state.get(one) for one in tensors]
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and group["fused"] and not group["amsgrad"]
    if plain and all(states) and all(one is not None for one in gradients) and len(group["params"]) == len(tensors):
        keys: Any = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize", "decoupled_weight_decay")}
        keys |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "fused": True}
        parts = {key: [one[key] for one in states] for key in ("exp_avg", "exp_avg_sq", "step")}
        given: Any = (tensors, gradients, parts["exp_avg"], parts["exp_avg_sq"], [], parts["step"])
        with torch.no_grad():
            adam(*given, **keys)
        return
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # stock SVI would add its own to what is left


def _laid_out(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    if gradient is None or gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)


def make_schedule(
    schedule: Schedule, optimizer: Optimizer, rate: float, steps: int, restarts: int | None = None
) -> lr_scheduler.LRScheduler:
    """The schedule of a learning rate over so many steps.

    That of `one-cycle` moves Adam's first beta too; the momentum of SGD is left as it is. That of `cosine-restarts`
    falls to zero anew after each restart (SGDR, Loshchilov and Hutter 2017).
    """
    if schedule == "one-cycle":
        cycles = "betas" in optimizer.defaults
        return lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=max(steps, 2), cycle_momentum=cycles)
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if schedule == "cosine-restarts":
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=-(-steps // ((restarts or 1) + 1)))
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def check_optimizer_settings(given: dict[str, Any]) -> None:
    """Check the settings of an optimiser and its schedule, those that are given, and that each has an effect.

    Raises:
        ValueError: If one is out of range or goes with another optimiser; the first such setting by name.
    """
    kind, schedule, betas = given.get("optimizer"), given.get("schedule"), given.get("betas")
    if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"Expected `betas` to be two numbers from 0 to below 1; got {betas!r}.")
    for key, most in {"weight_decay": math.inf, "momentum": 1.0, "betas": None, "epsilon": math.inf}.items():
        value = given.get(key)
        if value is not None and most and not 0 <= value < most:
            raise ValueError(f"Expected `{key}` from 0 to below {most:g}; got {value!r}.")
        if kind is None or not value:
            continue
        if callable(kind):
            raise ValueError(f"Expected no `{key}` beside a function as `optimizer`, which may set it; got {value!r}.")
        if key != "weight_decay" and (kind == "SGD") != (key == "momentum"):
            homes = "SGD" if key == "momentum" else "Adam, AdamW, Adamax or NAdam"
            raise ValueError(f"Expected `{key}` with optimizer {homes}; got {value!r} with {kind}.")
    if schedule == "one-cycle" and betas is not None:
        raise ValueError("Expected no `betas` with schedule = 'one-cycle', which moves them. Use another schedule.")
    if schedule is not None and given.get("restarts") is not None and schedule != "cosine-restarts":
        raise ValueError(f"Expected `restarts` with schedule = 'cosine-restarts'; got it with {schedule!r}.")
