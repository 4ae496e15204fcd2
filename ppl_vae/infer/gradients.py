"""`Gradients`: the losses of a batch and their gradients, by Pyro step by step, and replayed once they are known."""

import logging
import warnings
from contextlib import nullcontext
from typing import Any, Literal

import pyro
import torch
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

from ppl_vae._checks import check_choice
from ppl_vae._seeds import random_state, set_random_state
from ppl_vae.programs.capture import close, record
from ppl_vae.programs.compiler import Replay, compiled, has_compiler, replay
from ppl_vae.programs.precision import Lowered, Precision
from ppl_vae.programs.traces import Batch

EAGER = 50  # steps of a run before any is captured, which takes about as long
LONG = 40_000  # steps of a run that repay half a minute of compilation
_ROUNDING = {"full": 1e-5, "bfloat16": 2**-6}  # of gradients, as a share of the largest entry
_LOG = logging.getLogger(__name__)
Capture = Literal["auto", "off", "graph", "compile"]
MODES = ("off", "graph", "fast", "compile")
Answer = tuple[Tensor, list[Tensor | None]]


class Gradients:
    """Minus the objective of a batch per datum, minus its ELBO, and the gradients of the first by what is learned.

    The objective runs the program's model and guide by Pyro. The tensor operations of a step, its draws among them, are
    recorded as a function of the batch, the parameters and the buffers, held against Pyro at two steps, and replayed
    from then on, with the same draws. The mode says by which operations:

    - `off`: by Pyro, step by step.
    - `graph`: the same operations, which give the same numbers to the last bit.
    - `fast`: some by others that are equal to rounding, with large matrix products by the faster library.
    - `compile`: these compiled by PyTorch's inductor, or, if the compiler fails, `fast` with a warning.

    What cannot be replayed goes on by Pyro, and the log (level INFO) says why: the program branches on values, has
    shapes that depend on them, changes its buffers or other attributes, or draws from elsewhere than from PyTorch.
    Numbers and tensors outside of the program's modules and parameters, such as those that a plain function closes
    over, are taken as they are when the step is recorded.

    Args:
        program: any program.
        objective: called with program and batch, it returns `Terms`.
        learned: the tensors that are learned.
        whole: whether the whole data set counts as one datum.
        capture: a mode, which is refused where it cannot be; or `auto`, which takes `fast` after `EAGER` steps, or
            `compile` in runs of `LONG` steps on machines with a compiler, and what it can otherwise.
        steps: of the run.
        mode: that `auto` has come to before, in a run that is resumed.
        precision: of the products of networks (see `Lowered`).
    """

    def __init__(
        self,
        program: Any,
        objective: Any,
        learned: list[Tensor],
        *,
        whole: bool = False,
        capture: Capture = "auto",
        steps: int = 0,
        mode: str | None = None,
        precision: Precision = "full",
    ) -> None:
        self.program, self.objective, self.learned, self.whole = program, objective, learned, whole
        self.precision: Precision = precision
        self.lowered: Any = nullcontext() if precision == "full" else Lowered()
        self.auto, self.reason = capture == "auto", ""
        self.start = EAGER if self.auto else 1  # by the first step a program has set itself up
        self.mode: str = capture
        if self.auto:
            self.mode = mode or ("compile" if steps >= LONG and has_compiler() else "fast")
        check_choice("capture", self.mode, MODES)
        self.graphs: dict[Any, Replay] = {}
        self.tried: set[Any] = set()  # batches whose graph has been held against Pyro once
        self.settings: dict[str, Any] = {}
        self.held: list[Tensor] = []

    def look(self) -> None:
        """Forget what was recorded if an attribute of the program has changed since."""
        if self.mode == "off" or not (names := _changed(self.settings, settings := _settings(self.program))):
            return
        if self.graphs and self.auto:
            self._stop(f"the program's '{names[0]}' changed between epochs")
        beta = [] if self.objective.beta is None else [self.objective.beta.value]
        held = [*self.learned, *beta, *(value for value in settings.values() if isinstance(value, Tensor))]
        self.settings, self.held = settings, list({id(one): one for one in held}.values())
        self.tried.clear()
        self.graphs.clear()

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Minus the objective, differentiable, and minus the ELBO, both per datum."""
        loss, surrogate, bound = self.objective(self.program, batch)
        return (loss + (surrogate - torch_item(surrogate))) / self._data(batch), bound / self._data(batch)

    def _data(self, batch: Batch) -> int:
        """How many data a batch counts for."""
        return 1 if self.whole else len(next(iter(batch.values())))

    def __call__(self, batch: Batch, step: int = 0) -> Answer:
        """Minus objective and ELBO, (2,), without gradients, and the gradients: None for what has no effect.

        Args:
            batch: the data.
            step: number of the step in its run. It alone decides what is replayed, so that a resumed run repeats.
        """
        if self.mode == "off" or step < self.start:
            return self._by_pyro(batch)
        kind = tuple((key, *_layout(value)) for key, value in batch.items())
        if kind in self.graphs and kind not in self.tried:
            return _replayed(self.graphs[kind], self._given(batch))
        return self._checked(kind, batch)

    def _by_pyro(self, batch: Batch) -> Answer:
        with self.lowered:
            loss, bound = self.loss(batch)
        losses = torch.stack([loss.detach(), torch.as_tensor(bound, dtype=loss.dtype, device=loss.device)])
        return losses, [*torch.autograd.grad(loss, self.learned, allow_unused=True)]

    def _given(self, batch: Batch) -> list[Tensor]:
        """The arguments of a graph: all that is or may be changed in place, and the batch."""
        return [*self.held, *(value for value in batch.values() if isinstance(value, Tensor))]

    def _checked(self, kind: Any, batch: Batch) -> Answer:
        """Take a step by Pyro and one by the graph, and go on with what agrees with Pyro."""
        self.look()
        given, device = self._given(batch), next(iter(batch.values())).device
        start, versions = random_state(device), [one._version for one in given]
        answer = self._by_pyro(batch)
        end = random_state(device)
        try:
            if changed := _changed(self.settings, _settings(self.program)):
                raise ValueError(f"the program changes its '{changed[0]}' at each step")
            if versions != [one._version for one in given]:
                raise ValueError("the program changes a buffer at each step")
            while self.mode != "off":
                set_random_state(start, device)
                first = kind not in self.graphs
                if first:
                    self.graphs[kind] = self._recorded(batch, given, answer[0].dtype)
                    set_random_state(start, device)
                replayed = _replayed(self.graphs[kind], given)
                wrong = _difference(answer, replayed, end, random_state(device), _ROUNDING[self.precision])
                if not wrong:
                    (self.tried.add if first else self.tried.discard)(kind)
                    return replayed
                if self.mode == "graph":
                    raise ValueError(wrong)
                self.mode = "graph"
                self.graphs.clear()
        except Exception as error:  # of the program, which may do anything
            self._stop(f"{type(error).__name__}: {error}".split("\n")[0])
        finally:
            set_random_state(end, device)
        return answer

    def _stop(self, reason: str) -> None:
        if not self.auto:
            raise ValueError(f"Expected steps that can be captured; {reason}. Use capture = 'auto' or 'off'.")
        self.graphs.clear()
        self.mode, self.reason = "off", reason
        _LOG.info("Training step by step, which is slower; no graph could be captured: %s", reason)

    def _recorded(self, batch: Batch, given: list[Tensor], dtype: torch.dtype) -> Replay:
        graph = record(lambda *_: self._by_operations(batch, dtype), given, exact=self.mode == "graph")
        if self.mode == "compile":
            try:
                return compiled(graph, given, len(self.held))
            except Exception as error:  # of the compiler
                message = str(error).strip().split("\n")[0]
                warnings.warn(f"Cannot compile; training goes on without, which is slower: {message}", stacklevel=2)
                self.mode = "fast"
        return replay(graph, given, len(self.held))

    def _by_operations(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What `_by_pyro` gives, without looking at a value: Pyro sums the loss over sites in Python's floats."""
        with torch.enable_grad(), _NothingIsRead(), pyro.validation_enabled(False):
            with self.lowered:
                loss, surrogate, bound = self.objective(self.program, batch)
            value = (loss + (surrogate - torch_item(surrogate))).to(dtype) / self._data(batch)
            gradients = torch.autograd.grad(value, self.learned, allow_unused=True)
        return torch.stack([value.detach(), (bound / self._data(batch)).to(dtype)]), *gradients


def _difference(one: Answer, other: Answer, end: list[Tensor], other_end: list[Tensor], rounding: float) -> str:
    """How the answer of a step and its random state differ from those of another, if they do."""
    if not all(map(torch.equal, end, other_end)):
        return "the draws are not those of a step by Pyro"
    pairs = zip(one[1], other[1], strict=True)
    same = all(a is b if a is None or b is None else close(b, a, rounding) for a, b in pairs)
    if not (same and close(other[0], one[0])):
        return "the loss or a gradient is not that of a step by Pyro"
    return ""


class _NothingIsRead(TorchFunctionMode):
    """Keeps `item()`, by which Pyro's objectives read the loss, a tensor of the precision of Python's floats.

    Codes are spelled out by `one_hot` without its look at their values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item:
            return args[0].detach().double()
        if func is one_hot and (classes := [*args[1:], *kwargs.values()]) and classes[0] > 0:
            return (args[0].unsqueeze(-1) == torch.arange(classes[0], device=args[0].device)).long()
        return func(*args, **kwargs)


def _layout(value: Any) -> tuple[Any, ...]:
    """What a graph is recorded for: how a tensor lies in memory, or the value of something else."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else (value,)


@torch.no_grad()
def _replayed(graph: Replay, given: list[Tensor]) -> Answer:
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
