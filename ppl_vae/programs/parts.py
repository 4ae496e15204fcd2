"""Work on data in parts, which the processes that `torchrun` has started share out."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ppl_vae import _processes as processes
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import Batch

T = TypeVar("T")


def in_parts(target: Target, task: Callable[..., T], size: int, *given: Any) -> list[T]:
    """What a task makes of a target's data: a part in each process, in order, or the whole in one.

    A part has whole blocks, so that draws, step sizes and whatever else the data of a block share are those of one
    process. Where the whole data set is one datum, or the guide has one row for each datum, one process does all.

    Args:
        target: the program and its data.
        task: of a target, the number of its first block, and what is given; a function of a module, and so are they.
        size: data in a block.
        given: to the task.
    """
    if target.structure.whole or target.structure.rows is not None or not processes.spread(target.program):
        return [task(target, 0, *given)]
    return processes.parts(partial(_on_part, task), target.batch, size, *given)


def _on_part(task: Callable[..., T], program: Any, batch: Batch, first: int, *given: Any) -> T:
    return task(Target(program, batch), first, *given)
