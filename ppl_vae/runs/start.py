"""The start of a run: weights of an earlier one, those that fit by name and shape, and what is learned beside them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.programs.param_store import ids, own_params, renamed
from ppl_vae.runs import storage
from ppl_vae.runs.spec_file import listed, near

TAKEN = "taken"  # as `svi.freeze`: all that the start gives


def _tensors(program: Any) -> dict[str, Tensor]:
    """All that a program learns or keeps, by name: of modules, and by `pyro.param`, which a first run registers."""
    own = program.state_dict(keep_vars=True) if isinstance(program, nn.Module) else {}
    known, places = own_params(program)["params"], ids(program)
    return {**own, **{f"{storage.PARAM}{renamed(name, places)}": value for name, value in known.items()}}


@torch.no_grad()
def take_weights(program: Any, folder: str | Path) -> dict[str, Any]:
    """Put the weights of a run that fit, by name and shape, into another program; no code of that run is executed.

    The buffers of a module, such as the mean and the scale of its input, are taken together or not at all.

    Args:
        program: the other program; what it keeps by `pyro.param` must have been registered by a run of it.
        folder: the directory of the run, finished or interrupted.

    Returns:
        `run`, the folder; `digest`, the SHA-256 of its weights; and names: `taken`, `new`, which start as the program
        has them, and `left`, for which it has no place.

    Raises:
        ValueError: If the folder is no run, is damaged, or nothing of it fits.
    """
    folder = Path(folder)
    storage.check_folder(folder, finished=not storage.is_plain(folder / storage.STATE))
    file = folder / "model.safetensors"
    given, own = storage.read_tensors(file), _tensors(program)
    fitting = {
        name
        for name, value in given.items()
        if name in own and own[name].shape == value.shape and own[name].is_floating_point() == value.is_floating_point()
    }
    for name, value in own.items():
        if not isinstance(value, nn.Parameter) and not name.startswith(storage.PARAM) and name not in fitting:
            home = name.rpartition(".")[0]
            fitting -= {n for n in fitting if n.rpartition(".")[0] == home and not isinstance(own[n], nn.Parameter)}
    learned = [name for name, value in own.items() if value.requires_grad]
    several = [name for name in learned if own[name].numel() > 1]  # that one number fits says nothing
    if not fitting & set(several or learned):
        raise ValueError(
            f"Expected weights of {folder} that fit this program by name and shape; got none: it has "
            f"{_listed(_shaped(given))}, and the program {_listed(_shaped(own))}. Choose a run with a part in common."
        )
    for name in fitting:
        own[name].copy_(given[name])
    names = {"taken": fitting, "new": own.keys() - fitting, "left": given.keys() - own.keys()}
    names["left"] |= {name for name in given.keys() & own.keys() if name not in fitting}
    return {
        "run": str(folder.resolve()),
        "digest": storage.digest(file),
        **{key: sorted(some) for key, some in names.items()},
    }


def frozen(program: Any, names: str | Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Names of the tensors that are not learned: those `taken`, or all that names or their beginnings stand for.

    Raises:
        ValueError: If a name stands for none.
    """
    own = [name for name, value in _tensors(program).items() if value.requires_grad]
    chosen: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        found = [one for one in own if one == name or one.startswith(f"{name}.")]
        found = [one for one in own if one in taken] if name == TAKEN else found
        if not found:
            parts = dict.fromkeys(one.partition(".")[0] for one in own)
            raise ValueError(
                f"Expected svi.freeze to be {TAKEN!r}, beside svi.start, or names of tensors or of what they begin "
                f"with ({_listed(parts)}); got {name!r}.{near(name, [*parts, *own])}"
            )
        chosen += [one for one in found if one not in chosen]
    return chosen


def begin(spec: Any, program: Any) -> tuple[Any, list[str], dict[str, Any] | None]:
    """Take what `svi.start` gives into a program that was run, and name all that `svi.freeze` stands for.

    Returns:
        The spec with these names; what was done, in words; and what `take_weights` returns, if there is a start.

    Raises:
        ValueError: If nothing fits, or there is nothing of a name.
    """
    record = None if spec.svi.start is None else take_weights(program, spec.svi.start)
    words = [] if record is None else [told(record)]
    if spec.svi.freeze is not None:
        names = frozen(program, spec.svi.freeze, record["taken"] if record else ())
        spec, words = (
            replace(spec, svi=spec.svi.model_copy(update={"freeze": names})),
            [*words, f"not learned: {listed(names)}"],
        )
    return spec, words, record


def learned_by(program: Any, names: Iterable[str]) -> list[Tensor]:
    """The tensors that are learned beside frozen ones."""
    return [value for name, value in _tensors(program).items() if value.requires_grad and name not in names]


def told(record: dict[str, Any]) -> str:
    """What was taken of a run, in words."""
    parts = [f"starts from {record['run']}: takes {_listed(record['taken'])}"]
    parts += [f"begins anew: {_listed(record['new'])}"] if record["new"] else []
    parts += [f"has no place for: {_listed(record['left'])}"] if record["left"] else []
    return "; ".join(parts)


def _shaped(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{name} {tuple(value.shape)}" for name, value in tensors.items()]


def _listed(names: Iterable[str]) -> str:
    known = [*names]
    return ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "") or "nothing"


def settings_of(spec: Any, program: Any, data: Any, device: torch.device) -> dict[str, Any]:
    """What `fit` is told in each process."""
    settings = {**spec.training, "device": str(device), "validation": data.validation}
    if spec.svi.freeze is not None:
        settings["parameters"] = learned_by(program, spec.svi.freeze)
    return settings
