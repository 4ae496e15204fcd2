"""Rows: programs that keep one row of parameters per datum, and the data that these rows belong to."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.programs.param_store import own_params

_FITTED = "_ppl_vae_rows"


def keywords(function: Callable[..., Any]) -> list[str]:
    """What a model or guide takes by keyword; `**` if it takes anything. A `VAE` knows what it is given."""
    forward: Any = getattr(function, "forward", None) if isinstance(function, nn.Module) else None
    target = function if forward is None or forward.__name__ == "_forward_unimplemented" else forward
    anything = getattr(getattr(function, "__self__", None), "given_keys", ["**"])
    parameters = inspect.signature(target).parameters.values()
    return [name for p in parameters for name in (anything if p.kind is p.VAR_KEYWORD else [p.name])]


def indexed(program: Any) -> bool:
    """Whether a program asks for `index`, the number of each datum, to find the datum's row in a table."""
    return any("index" in keywords(part) and _tables(part) != [] for part in (program.model, program.guide))


def _tables(part: Any) -> list[int] | None:
    """Rows of the table of the `VAE` whose model or guide this is, none without a table; None for other functions."""
    owner: Any = getattr(part, "__self__", None)
    if not hasattr(owner, "table_rows"):
        return None
    return [] if owner.table_rows is None else [owner.table_rows]


def numbered(program: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its data numbered from 0, if the model asks for `index` and the batch has none."""
    if "index" in batch or "index" not in keywords(program.model):
        return dict(batch)
    first = next(iter(batch.values()))
    return {**batch, "index": torch.arange(len(first), device=first.device)}


def fitted_by_position(program: Any) -> bool:
    """Whether a program remembers the data it was fitted to, without asking for their `index`."""
    return _FITTED in vars(program) and not indexed(program)


def remember(program: Any, batch: Mapping[str, Tensor]) -> None:
    """Remember the data that a program is fitted to, one number per datum, to know them again."""
    vars(program)[_FITTED] = _marks(batch)


def check_numbered(program: Any, batch: Mapping[str, Tensor]) -> None:
    """Check that data which came without `index` are those that the rows of a program belong to.

    These are the data that it was fitted to, in their order. If the program does not remember them, since it was read
    from a file, say, there must be as many data as rows.

    Raises:
        ValueError: If they are other data, or in another order.
    """
    known = known_data(program, batch)
    n, counts = len(next(iter(batch.values()))), [] if known is not None else _row_counts(program)
    if known is False or (counts and n not in counts):
        raise ValueError(
            f"Expected `index`, the number of each datum among those that the program was fitted to, for its rows; got "
            f"{n} other data without it. Add `index` to the batch; for new data use an amortized guide."
        )


def known_data(program: Any, batch: Mapping[str, Tensor]) -> bool | None:
    """Whether data are those that a program with rows was fitted to, in their order; None if it does not remember."""
    marks = vars(program).get(_FITTED)
    if marks is None:
        return None
    pairs = [(marks[key], mark) for key, mark in _marks(batch).items() if key in marks]
    return all(a.shape == b.shape and torch.allclose(a.to(b.device), b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def _row_counts(program: Any) -> list[int]:
    """How many rows the tables of a program may have: the leading sizes of its parameters."""
    if tables := _tables(program.guide):
        return tables
    tensors: list[Tensor] = list(program.parameters()) if isinstance(program, nn.Module) else []
    tensors += [*own_params(program)["params"].values(), *pyro.get_param_store().get_state()["params"].values()]
    return sorted({len(tensor) for tensor in tensors if tensor.dim()})


def _marks(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A number for each datum and entry of a batch, (n,), by which the data are known again."""
    marks = {}
    for key, value in batch.items():
        if key not in ("index", "mask"):
            value = torch.atleast_1d(value)
            flat = value.reshape(len(value), -1).double()
            flat = torch.where(batch["mask"].reshape(flat.shape), flat, 0.0) if key == "x" and "mask" in batch else flat
            marks[key] = flat @ torch.arange(1, flat.shape[1] + 1, device=flat.device).double().sin()
    return marks
