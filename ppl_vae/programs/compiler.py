"""Faster replays of captured graphs: by a C++ compiler on the CPU, as a CUDA graph on a GPU."""

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

Replay = Callable[..., Any]


def has_compiler() -> bool:
    """Whether this machine has a C++ compiler, which PyTorch's inductor needs on the CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def replay(module: GraphModule, given: Sequence[Tensor], fixed: int) -> Replay:
    """The operations of a graph one after the other; on a GPU as one CUDA graph.

    Args:
        module: the graph.
        given: arguments that it takes.
        fixed: how many of them, the first, are the same tensors at each call, such as parameters.
    """
    module.graph.set_codegen(CodeGen())
    module.recompile()
    return _CudaGraph(module.forward, given, fixed) if given[0].is_cuda else module.forward


@torch.no_grad()
def compiled(module: GraphModule, given: Any, fixed: int) -> Replay:
    """What `replay` returns, compiled by PyTorch's inductor, which fuses elementwise operations.

    It compiles in this process, without workers that would outlive it, and draws by PyTorch's own operations, so that
    the draws stay the same.
    """
    given = [one.detach() for one in given]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PyTorch itself imports meanwhile
        made = torch._inductor.compile(module, given, options={"compile_threads": 1, "fallback_random": True})
    return _CudaGraph(made, given, fixed) if given[0].is_cuda else made


class _CudaGraph:
    """A function replayed by the GPU without the host; all of its results but the first last until the next call."""

    @torch.no_grad()
    def __init__(self, function: Replay, given: Sequence[Tensor], fixed: int) -> None:
        self.fixed = fixed
        self.given = [*given[:fixed], *(one.clone() for one in given[fixed:])]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.given)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = function(*self.given)

    def __call__(self, *given: Tensor) -> Any:
        for own, one in zip(self.given[self.fixed :], given[self.fixed :], strict=True):
            own.copy_(one)
        self.graph.replay()
        return [self.results[0].clone(), *self.results[1:]]
