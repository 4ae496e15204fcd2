"""What a program runs on: parameters by `pyro.param` in a store of its own, and its modules in the right mode."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from ppl_vae.networks.network import in_mode


def own_params(program: Any) -> dict[str, dict[str, Any]]:
    """What a program learned through `pyro.param`: its `params`, unconstrained, and their `constraints`, by name."""
    own: dict[str, dict[str, Any]] = vars(program).setdefault("_ppl_vae_params", {"params": {}, "constraints": {}})
    return own


def learned_params(program: Any) -> dict[str, Tensor]:
    """Values of what a program learned through `pyro.param`, by name, within their constraints."""
    own = own_params(program)
    return {
        name: torch.distributions.transform_to(own["constraints"][name])(value).detach()
        for name, value in own["params"].items()
    }


def claim(program: Any, learned: Iterable[Tensor]) -> None:
    """Make tensors that Pyro's store had already the program's own, before it learns them."""
    own, state, chosen = own_params(program), pyro.get_param_store().get_state(), {id(tensor) for tensor in learned}
    for name, value in state["params"].items():
        if id(value) in chosen and "$$$" not in name:
            own["params"][name], own["constraints"][name] = value, state["constraints"][name]


def adopt(program: Any, traces: Iterable[Any]) -> None:
    """Keep what traces of a program took from Pyro's parameter store, where a loop of stock Pyro left it.

    Raises:
        ValueError: If a trace has parameters of a module that the program does not hold.
    """
    own, store = own_params(program), pyro.get_param_store().get_state()
    held = {tensor.data_ptr() for tensor in program.parameters()} if isinstance(program, nn.Module) else set()
    for name, node in ((name, trace.nodes[name]) for trace in traces for name in trace.param_nodes):
        if "$$$" not in name:
            if name in store["params"] and name not in own["params"]:
                own["params"][name] = store["params"][name].detach().clone().requires_grad_()
                own["constraints"][name] = store["constraints"][name]
        elif node["value"].data_ptr() not in held:
            raise ValueError(
                f"Expected a program that holds its modules; got one that calls pyro.module({name.split('$$$')[0]!r}) "
                "on another's. Make it an nn.Module with model and guide for methods, or give Program those methods."
            )


def mode(program: Any, *, training: bool = False) -> AbstractContextManager[None]:
    """Run a program with its modules in evaluation mode, or all in training mode, and put each back into its own."""
    parts = [program] if isinstance(program, nn.Module) else vars(program).values()
    return in_mode(*(part for part in parts if isinstance(part, nn.Module)), training=training)


@contextmanager
def scope(program: Any, *, keep: bool = True, training: bool = False) -> Iterator[None]:
    """Run a program with a parameter store of its own, on top of the global one, and leave that as it was.

    Args:
        program: any program.
        keep: whether the program keeps what is registered or changed meanwhile.
        training: whether its modules are in training mode, with dropout, instead of evaluation mode.
    """
    store, own = pyro.get_param_store(), own_params(program)
    outer: Any = store.get_state()
    copies = {
        name: value if "$$$" in name else value.detach().clone().requires_grad_()
        for name, value in outer["params"].items()
    }
    merged: Any = {
        "params": {**copies, **own["params"]},
        "constraints": {**outer["constraints"], **own["constraints"]},
    }
    with store.scope(merged), mode(program, training=training):
        yield
    if not keep:
        return
    for name, value in merged["params"].items():
        new = name not in copies or value is not copies[name]
        if "$$$" not in name and (new or not torch.equal(value, outer["params"][name])):
            own["params"][name], own["constraints"][name] = value, merged["constraints"][name]


def copied(program: Any) -> Any:
    """A deep copy of a program.

    Pyro's autoguides forget their model and their list when copied, and get them back. What is named by the ``id`` of
    a module, so that no other has its name, is known by that of the copy.
    """
    guides = (
        [part for part in program.modules() if isinstance(part, AutoGuide)] if isinstance(program, nn.Module) else []
    )
    known = [(guide._model, guide.master) for guide in guides]
    try:
        twin = copy.deepcopy(program)
        others = [part for part in twin.modules() if isinstance(part, AutoGuide)] if guides else []
    finally:
        for guide, (model, master) in zip(guides, known, strict=True):
            guide._model, guide.master = model, master
    for guide, (model, _) in zip(others, known, strict=True):
        guide._model = model
    own, names = own_params(twin), dict(zip(ids(program), ids(twin), strict=True))
    own.update({kind: {renamed(name, names): one for name, one in known.items()} for kind, known in own.items()})
    return twin


def ids(program: Any) -> dict[str, str]:
    """The ``id`` of a program and each of its modules, which may stand in names, and what stands for it in a file."""
    modules = [*program.named_modules()][1:] if isinstance(program, nn.Module) else []
    return {str(id(one)): f"<id of {name}>" for name, one in [("the program", program), *modules]}


def renamed(name: str, names: dict[str, str]) -> str:
    """A name with other ids in it."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def to_double(program: Any) -> Any:
    """A copy of a program in double precision, `pyro.param`s too; the program itself if it holds no tensors."""
    if device_and_dtype(program)[1] is None and not own_params(program)["params"]:
        return program
    twin = copied(program).double() if isinstance(program, nn.Module) else copied(program)
    own = own_params(twin)
    own["params"] = {name: value.detach().double().requires_grad_() for name, value in own["params"].items()}
    return twin


def device_and_dtype(program: Any, x: Tensor | None = None) -> tuple[torch.device, torch.dtype | None]:
    """The device of a program and its floating type, None if it holds no tensors."""
    tensors = itertools.chain(program.parameters(), program.buffers()) if isinstance(program, nn.Module) else iter(())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is not None:
        return first.device, first.dtype
    return (torch.device("cpu") if x is None else x.device), None
