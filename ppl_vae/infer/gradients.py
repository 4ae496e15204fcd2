"""`Gradients`: the losses of a batch and their gradients, by Pyro step by step, and replayed once they are known."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode

from ppl_vae._seeds import random_state, set_random_state
from ppl_vae.programs.capture import close, record
from ppl_vae.programs.traces import Batch

EAGER = 50  # steps with batches of one shape before they are captured, which takes about as long
_LOG = logging.getLogger(__name__)
Answer = tuple[Tensor, list[Tensor | None]]


class Gradients:
    """Minus the objective of a batch per datum, minus its ELBO, and the gradients of the first by what is learned.

    The objective runs the program's model and guide by Pyro. After `EAGER` batches of one shape the tensor operations
    of a step, its draws among them, are recorded as a function of the batch, the parameters and the buffers, held
    against Pyro at two steps, and replayed from then on, with the same draws and the same numbers. Where that cannot
    be, all goes on by Pyro, and the log (level INFO) says why: the program branches on values, has shapes that
    depend on them, changes its buffers or other attributes at each step, or draws from elsewhere than from PyTorch.

    Numbers and tensors outside of the program's modules and parameters, such as those that a plain function closes
    over, are taken as they are when the step is recorded.

    Args:
        program: any program.
        objective: called with program and batch, it returns `Terms`.
        learned: the tensors that are learned.
        whole: whether the whole data set counts as one datum.
        capture: whether steps are recorded at all.
    """

    def __init__(
        self, program: Any, objective: Any, learned: list[Tensor], *, whole: bool = False, capture: bool = True
    ) -> None:
        self.program, self.objective, self.learned = program, objective, learned
        self.whole, self.capture = whole, capture and objective.capturable
        self.seen: Counter[Any] = Counter()
        self.graphs: dict[Any, Callable[..., list[Any]]] = {}
        self.settings: dict[str, Any] = {}
        self.held: list[Tensor] = []

    def look(self) -> None:
        """Forget what was recorded if an attribute of the program has changed since."""
        if self.capture and _changed(self.settings, settings := _settings(self.program)):
            beta = [] if self.objective.beta is None else [self.objective.beta.value]
            held = [*self.learned, *beta, *(value for value in settings.values() if isinstance(value, Tensor))]
            self.settings, self.held = settings, list({id(one): one for one in held}.values())
            self.seen.clear()
            self.graphs.clear()

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Minus the objective, differentiable, and minus the ELBO, both per datum."""
        loss, surrogate, bound = self.objective(self.program, batch)
        return (loss + (surrogate - torch_item(surrogate))) / self._data(batch), bound / self._data(batch)

    def _data(self, batch: Batch) -> int:
        """How many data a batch counts for."""
        return 1 if self.whole else len(next(iter(batch.values())))

    def __call__(self, batch: Batch) -> Answer:
        """Minus objective and ELBO, (2,), without gradients, and the gradients: None for what has no effect."""
        kind = tuple((key, *_layout(value)) for key, value in batch.items())
        self.seen[kind] += self.capture
        replay, seen = self.graphs.get(kind), self.seen[kind]
        if replay is not None and seen > EAGER + 2:
            return _replayed(replay, self._given(batch))
        if not self.capture or seen <= EAGER:
            return self._by_pyro(batch)
        return self._checked(kind, batch)

    def _by_pyro(self, batch: Batch) -> Answer:
        loss, bound = self.loss(batch)
        losses = torch.stack([loss.detach(), torch.as_tensor(bound, dtype=loss.dtype, device=loss.device)])
        return losses, [*torch.autograd.grad(loss, self.learned, allow_unused=True)]

    def _given(self, batch: Batch) -> list[Tensor]:
        """The arguments of a graph: all that is or may be changed in place, and the batch."""
        return [*self.held, *(value for value in batch.values() if isinstance(value, Tensor))]

    def _checked(self, kind: Any, batch: Batch) -> Answer:
        """Take a step by Pyro, and record it or hold what was recorded against it."""
        self.look()
        given, device = self._given(batch), next(iter(batch.values())).device
        start, versions = random_state(device), [one._version for one in given]
        loss, gradients = self._by_pyro(batch)
        end = random_state(device)
        try:
            if changed := _changed(self.settings, _settings(self.program)):
                raise ValueError(f"the program changes its '{changed[0]}' at each step")
            if versions != [one._version for one in given]:
                raise ValueError("the program changes a buffer at each step")
            if kind not in self.graphs:
                set_random_state(start, device)
                self.graphs[kind] = self._recorded(batch, given, loss.dtype)
            set_random_state(start, device)
            again, others = _replayed(self.graphs[kind], given)
            if not all(torch.equal(one, two) for one, two in zip(end, random_state(device), strict=True)):
                raise ValueError("the draws are not those of a step by Pyro")
            pairs = [(loss, again), *zip(gradients, others, strict=True)]
            if not all(one is two if one is None or two is None else close(one, two) for one, two in pairs):
                raise ValueError("the loss or a gradient is not that of a step by Pyro")
        except Exception as error:  # of the program, which may do anything
            self.graphs.pop(kind, None)
            self.capture = False
            _LOG.info(
                "Training step by step, which is slower; no graph could be captured: %s: %s",
                type(error).__name__,
                error,
            )
        finally:
            set_random_state(end, device)
        return loss, gradients

    def _recorded(self, batch: Batch, given: list[Tensor], dtype: torch.dtype) -> Callable[..., list[Any]]:
        graph = record(lambda *_: self._by_operations(batch, dtype), given, exact=True)
        graph.graph.set_codegen(CodeGen())
        graph.recompile()
        return graph.forward  # type: ignore[no-any-return]

    def _by_operations(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What `_by_pyro` gives, without looking at a value: Pyro sums the loss over sites in Python's floats."""
        with torch.enable_grad(), _ItemsAreTensors(), pyro.validation_enabled(False):
            loss, surrogate, bound = self.objective(self.program, batch)
            value = (loss + (surrogate - torch_item(surrogate))).to(dtype) / self._data(batch)
            gradients = torch.autograd.grad(value, self.learned, allow_unused=True)
        return torch.stack([value.detach(), (bound / self._data(batch)).to(dtype)]), *gradients


class _ItemsAreTensors(TorchFunctionMode):
    """Keeps `item()`, by which Pyro's objectives read the loss, a tensor of the precision of Python's floats."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach().double() if func is Tensor.item else func(*args, **(kwargs or {}))


def _layout(value: Any) -> tuple[Any, ...]:
    """What a graph is recorded for: how a tensor lies in memory, or the value of something else."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else (value,)


@torch.no_grad()
def _replayed(graph: Callable[..., list[Any]], given: list[Tensor]) -> Answer:
    loss, *gradients = graph(*given)
    return loss, gradients


def _settings(program: Any) -> dict[str, Any]:
    """The tensors, numbers and words that a program's modules and its `pyro.param`s consist of, by name."""
    store = pyro.get_param_store().named_parameters()
    found: dict[str, Any] = {name: value for name, value in store if "$$$" not in name}
    for root, whole in {"": program, **vars(program)}.items():
        for name, part in whole.named_modules(prefix=root) if isinstance(whole, nn.Module) else [(root, whole)]:
            if not root or isinstance(part, nn.Module):
                own = vars(part)
                for key, value in {**own, **own.get("_parameters", {}), **own.get("_buffers", {})}.items():
                    if value is None or isinstance(value, Tensor | bool | int | float | str):
                        found[f"{name}.{key}".strip(".")] = value
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names under which something else stands: another tensor, or another value."""

    def same(one: Any, other: Any) -> bool:
        return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)

    return [key for key in {**before, **after} if not same(before.get(key), after.get(key))]
