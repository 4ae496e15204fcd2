"""Saved states of training, checked before anything of them is copied."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ppl_vae._seeds import random_state

_PLACE = ("losses", "generators")


def check_saved(saved: Any, current: Mapping[str, Any], learned: Sequence[Tensor], optimizer: Optimizer) -> None:
    """Check that a saved state has the layout of a run's: names, kinds of values, and shapes and types of tensors.

    Args:
        saved: the state to be checked, as a file may have it.
        current: the state of the run as it stands.
        learned: the tensors that are learned, which come first in both.
        optimizer: of these.

    Raises:
        ValueError: Naming the entry that differs.
    """
    if not isinstance(saved, Mapping) or not {"learned", "best", "schedule", "history", "optimizer"} <= saved.keys():
        raise _differs("a state", saved)
    _check_tensors("learned", saved["learned"], current["learned"], len(learned))
    if saved["best"] is not None:
        _check_tensors("best", saved["best"], current["learned"], len(learned))
    if (place := saved.get("place")) is not None:
        losses, generators = (place.get(key) if isinstance(place, Mapping) else None for key in _PLACE)
        if not isinstance(losses, Tensor) or losses.shape[1:] != (2,) or not losses.is_floating_point():
            raise _differs("place.losses", losses)
        own = random_state(learned[0].device)
        _check_tensors("place.generators", generators, own, len(own))
    groups, known = saved["optimizer"]["param_groups"], current["optimizer"]["param_groups"]
    tables = [(name, saved[name], current[name]) for name in ("schedule", "history")]
    tables += [("optimizer", one, other) for one, other in zip(groups, known, strict=False)]
    for name, one, other in tables:
        for key, value in one.items():
            if key not in ("best_epoch", "capture", "capture_reason", "settings") and _kind(value) != _kind(
                other.get(key, ...)
            ):
                raise _differs(f"{name}.{key}", value)
    if [group["params"] for group in groups] != [group["params"] for group in known]:
        raise _differs("optimizer.param_groups", groups)
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for number, values in saved["optimizer"]["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(tensors):
            raise _differs("optimizer.state", number)
        for key, value in values.items():
            shapes = (tensors[number].shape, ()) if key != "step" else ((),)
            if isinstance(value, Tensor) and (value.shape not in shapes or not value.is_floating_point()):
                raise _differs(f"optimizer.state.{number}.{key}", value)


def _check_tensors(name: str, saved: Any, current: Sequence[Tensor], least: int) -> None:
    """Check a list of tensors; states of older runs lack the buffers."""
    if not isinstance(saved, list) or len(saved) not in (least, len(current)):
        raise _differs(name, saved)
    for number, (one, other) in enumerate(zip(saved, current, strict=False)):
        if not isinstance(one, Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
            raise _differs(f"{name}.{number}", one)


def _kind(value: Any) -> Any:
    """Whether a value is a number or a row of them; words, switches and None are what they are."""
    if isinstance(value, list | tuple):
        return [kind for kind in map(_kind, value) if kind != "number"]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else value


def _differs(name: str, value: Any) -> ValueError:
    shown = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
    return ValueError(f"Expected a saved state that fits this program and its settings; got {name} = {shown}.")
