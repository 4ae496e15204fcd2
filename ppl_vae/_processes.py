"""Processes that `torchrun` has started: they train one program together, and share out its evaluation."""

import gc
import io
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=1)  # with what one process does alone, as NUTS; one that ends is noticed at once
_LED: list[Any] = []  # the program whose evaluation this process, the first, shares out


def started() -> int:
    """How many processes `torchrun` has started for this job; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarted() -> bool:
    """Whether `torchrun` has started this job anew, after one of its processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def size() -> int:
    """How many processes work together here."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; the first, 0, writes and prints."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def group(device: str) -> Iterator[None]:
    """Connect the processes of a job, by gloo on CPUs and by nccl on GPUs, of which each takes one of its machine's.

    What they tell each other is kept apart for each restart, since the addresses of killed processes would mislead.
    """
    if started() == 1 or size() > 1:
        yield
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, number, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))  # type: ignore[attr-defined]
    own = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    options: Any = {"store": own, "rank": number, "world_size": count, "timeout": _PATIENCE}
    dist.init_process_group("nccl" if gpu else "gloo", **options)
    yield
    try:
        dist.barrier()  # an orderly end, without which gloo's threads may abort a process
    except RuntimeError:  # another has failed, and says why
        raise SystemExit(1) from None
    gc.collect()
    dist.destroy_process_group()


def leave(status: int) -> None:
    """End a process of a job without Python's own clearing up, which may abort while gloo's threads still run."""
    if started() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def share(value: Any = None) -> Any:
    """What the first process gives, in all of them."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


_TOLD: list[bool] = []


@contextmanager
def telling() -> Iterator[None]:
    """Let the others, which wait for what the first process has to `tell`, end if it fails before."""
    _TOLD.clear()
    try:
        yield
    finally:
        if not _TOLD:
            share(None)


def tell(value: Any) -> None:
    """Send the others what they wait for."""
    _TOLD.append(True)
    share(value)


def same(tensors: list[Tensor]) -> None:
    """Copy the values that tensors have in the first process to the others."""
    if size() > 1:
        with torch.no_grad():
            for one in tensors:
                dist.broadcast(one.detach(), 0)


def average(tensors: list[Tensor | None], weight: float) -> list[Tensor | None]:
    """Weighted sums over processes, each with a weight of its own, of tensors that all of them have.

    They are the same in all processes to the last bit, and hold until the next call.
    """
    given = [one for one in tensors if one is not None]
    sums: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(one.dtype for one in given):
        own = [one for one in given if one.dtype == dtype]
        sizes = [one.numel() for one in own]
        kind = sum(sizes), dtype, own[0].device
        if kind not in _SUMS:
            _SUMS[kind] = _Sum(torch.empty(kind[0], dtype=dtype, device=kind[2]))
        flat = _SUMS[kind]([one.flatten() for one in own], weight)
        parts = flat.split(sizes)
        sums |= {id(one): part.view(one.shape) for one, part in zip(own, parts, strict=True)}
    return [None if one is None else sums[id(one)] for one in tensors]


class _Sum:
    """Sums over processes, of parts that are joined, in memory that is kept from one to the next.

    A few processes of one machine add up in memory that they share, of which they use two halves in turn, others by
    gloo or nccl.

    Args:
        out: what takes the sum, in one dimension.
    """

    def __init__(self, out: Tensor) -> None:
        self.out, self.turns = out, 0
        self.shared = _shared(out)

    def __call__(self, parts: list[Tensor], weight: float) -> Tensor:
        if self.shared is None:
            torch.cat(parts, out=self.out).mul_(weight)
            dist.all_reduce(self.out)
            return self.out
        room = self.shared.room[self.turns % 2]
        torch.cat(parts, out=room[rank()]).mul_(weight)
        self.turns += 1
        self.shared.meet(self.turns)
        torch.add(room[0], room[1], out=self.out)
        for other in room[2:]:
            self.out.add_(other)
        return self.out


class _Shared(NamedTuple):
    """What processes of one machine share.

    Args:
        room: memory for two sums in turn, (2, processes, n).
        written: how many sums each has written to it.
        ids: of the processes.
    """

    room: Tensor
    written: Any
    ids: list[int]

    def meet(self, turns: int) -> None:
        """Wait until all have written so many, and so have read the half of the sum before; gloo would wake up late.

        Raises:
            RuntimeError: If one of them has ended.
        """
        self.written[rank()] = turns
        began = time.monotonic()
        while self.written.min() < turns:
            os.sched_yield()
            if time.monotonic() > began + 1:
                time.sleep(0.001)
                if ended := [number for number, one in enumerate(self.ids) if not os.path.isdir(f"/proc/{one}")]:
                    raise RuntimeError(f"Expected all processes of the job to go on; number {ended[0]} has ended.")


_FEW, _MOST = 4, 2**25  # processes that add up faster in shared memory than by gloo, and numbers that this may take
_LINE = 64  # bytes of memory that processors exchange at once
_SUMS: dict[Any, _Sum] = {}


def _shared(like: Tensor) -> _Shared | None:
    """Memory that the processes share, or None where they cannot, as where others may not see writes in their order.

    Its file is reserved at once, and removed as soon as all have it, so that nothing of it stays.
    """
    numbers, path, place = 2 * size() * like.numel(), None, "/dev/shm"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == size() <= _FEW and os.path.isdir(place)
    if like.device.type != "cpu" or not here or numbers > _MOST or platform.machine() != "x86_64":
        return None
    length = -(-numbers * like.element_size() // _LINE) * _LINE
    if rank() == 0:
        with suppress(OSError):  # there is no room
            path = _reserved(place, length + size() * _LINE)
    ids: list[Any] = [None] * size()
    if (path := share(path)) is None:
        return None
    memory = torch.from_file(path, shared=True, size=length + size() * _LINE, dtype=torch.uint8)
    dist.all_gather_object(ids, os.getpid())
    if rank() == 0:
        os.unlink(path)
    room = memory[: numbers * like.element_size()].view(like.dtype).view(2, size(), -1)
    return _Shared(room, memory[length:].view(torch.int64).view(size(), -1)[:, 0].numpy(), ids)


def _reserved(place: str, size: int) -> str:
    """A new file of so many bytes; none is left where there is no room."""
    file, path = tempfile.mkstemp(prefix="ppl_vae_", dir=place)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)
    return path


def spread(program: Any) -> bool:
    """Whether work on this program is shared out."""
    return size() > 1 and any(one is program for one in _LED)


def parts(task: Callable[..., Any], batch: Mapping[str, Tensor], block: int, *given: Any) -> list[Any]:
    """What a task makes of the data, a part in each process, each of whole blocks, in their order.

    Args:
        task: called with program, rows of the batch and the number of their first block, and what is given.
        batch: all data.
        block: data in a block.
        given: to the task.

    Raises:
        Exception: The first that the task raises in any process.
    """
    order, program = share((task, dict(batch), block, given)), _LED.pop()
    try:
        return _work(program, *order)  # which shares out nothing more
    finally:
        _LED.append(program)


@contextmanager
def leading(program: Any) -> Iterator[None]:
    """Share out the work on a program among the others, which `follow` meanwhile."""
    _LED.append(program)
    try:
        yield
    finally:
        _LED.pop()
        share(None)


def follow(program: Any) -> None:
    """Take a share of the work that the first process shares out, until it ends."""
    while (order := share()) is not None:
        _work(program, *order)


def _work(program: Any, task: Any, batch: dict[str, Tensor], block: int, given: Any) -> list[Any]:
    n = len(next(iter(batch.values())))
    bounds = [number * -(-n // block) // size() for number in range(size() + 1)]
    first, last = bounds[rank()], bounds[rank() + 1]
    rows = {key: value[first * block : last * block] for key, value in batch.items()}
    made: Any = None
    try:
        made = task(program, rows, first, *given) if last > first else None
    except Exception as error:  # it is raised in the first process, whatever it is
        if rank():
            error.add_note(f"In process {rank()}:\n{traceback.format_exc()}")
        made = error
    box, found = io.BytesIO(), [b""] * size()
    torch.save(made, box)
    dist.gather_object(box.getvalue(), found if rank() == 0 else None, 0)
    if rank():
        return []
    device = next(iter(batch.values())).device  # of the first process; the others may have had GPUs of their own
    loaded = [torch.load(io.BytesIO(one), map_location=device, weights_only=False) for one in found]
    for one in loaded:
        if isinstance(one, Exception):
            raise one
    return [one for one in loaded if one is not None]
