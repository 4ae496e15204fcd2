r"""Programs: Pyro pairs of `model` and `guide`, and what can be read off their traces.

A program is any object with `model(**batch)` and `guide(**batch)`, in plain Pyro, with an outermost plate `"data"` at
dim -1, whatever its latent sites and inner plates. Without such a plate, or with sites outside it, the whole data set
counts as one datum. `VAE` is the program that three conditionals build; `Program`
wraps two functions or a stranger's modules. Nothing below the contract knows which of them it has.
"""

import hashlib
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn

from ppl_vae.programs.autoguides import make_guide
from ppl_vae.programs.rows import keywords


class PyroPair(Protocol):
    """The contract of a program: a model and a guide that take the same batch by keyword."""

    def model(self, **batch: Any) -> Any:
        """Sample the latent sites and the data, these observed where the batch has them."""

    def guide(self, **batch: Any) -> Any:
        """Sample the latent sites from the approximate posterior."""


_names: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
_count = itertools.count()


def unique_name(module: nn.Module) -> str:
    """Name of a module that no other instance has, deep copies and later instances included.

    `pyro.module` keeps parameters by name in one store for the whole process. Of two modules with one name, the second
    would silently never be trained.
    """
    if module not in _names:
        _names[module] = f"{type(module).__name__.lower()}_{next(_count)}"
    return _names[module]


class Program(nn.Module):
    """Anyone's model and guide as a program.

    Args:
        model: a function or module that takes the batch by keyword.
        guide: likewise, or the name of one of Pyro's autoguides.
        data_plate: name of the plate at dim -1 that holds the data. If it is None, or a site lies outside that plate,
            the whole data set counts as one datum, and its tensors need not share a leading size.
        static: keywords that are not data, such as `{"K": 3}`, for model and guide as far as they take them.

    Raises:
        TypeError: If either cannot be called.
        ValueError: If there is no autoguide of that name, or it needs more than the model.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))
        >>> from ppl_vae import Program, log_weights
        >>> log_weights(Program(model, guide), torch.tensor([[0.0], [1.0]]), 3).std(0).max().item() < 1e-6
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | str = "AutoNormal",
        *,
        data_plate: str | None = "data",
        static: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.data_plate = data_plate
        parts = nn.ModuleList(part for part in (model, guide) if isinstance(part, nn.Module))
        if callable(model):
            model = _bound(model, static or {})
            guide = make_guide(guide, model)
        for name, part in (("model", model), ("guide", guide)):
            if not callable(part):
                raise TypeError(f"Expected `{name}` to be a function or module of the batch; got {part!r}.")
        self.model = model
        self.guide = _bound(guide, static or {})
        if static:
            self.parts = parts
        owners = {id(part.__self__): part.__self__ for part in (model, guide) if inspect.ismethod(part)}
        self.owners = nn.ModuleList(owner for owner in owners.values() if isinstance(owner, nn.Module))


def _bound(function: Any, static: Mapping[str, Any]) -> Any:
    """A function with the keywords that it takes of those given; autoguides have theirs by the model."""
    own = keywords(function) if static and callable(function) else []
    return partial(function, **given) if (given := {key: static[key] for key in static if key in own}) else function


def load_program(reference: str, *, fresh: bool = False) -> type:
    """Load a program's class from `"file.py:Class"`; the class may be left out where the file defines one program.

    The file runs under one private module name made of its path, so that a class has one identity however often it is
    loaded.

    Args:
        reference: where it is.
        fresh: whether a file that has changed since is read again.

    Raises:
        ValueError: If the file is missing, fails to run, or has no such class.
    """

    def fits(kind: type) -> bool:
        return callable(getattr(kind, "model", None)) and callable(getattr(kind, "guide", None))

    return _load_class(reference, fits, "program", "with `model` and `guide`", fresh)


def load_network(reference: str, *, fresh: bool = False) -> type:
    """Load a network's class, a torch module, from `"file.py:Class"`, as `load_program` does a program's."""
    return _load_class(reference, lambda kind: issubclass(kind, nn.Module), "network", "as a torch module", fresh)


def build_program(reference: str) -> Any:
    """Build a program by what `"file.py:name"` names: a class, or a function without arguments; or take it as it is.

    Raises:
        ValueError: If the file is missing, fails to run, or has no such name, or if it cannot be built.
    """
    path, name = _path_of(reference), reference.partition(":")[2]
    found = vars(_run(reference, "program", fresh=False)).get(name)
    try:
        program = found() if inspect.isclass(found) or inspect.isroutine(found) else found
    except Exception as error:
        raise ValueError(
            f"Expected {reference} to build a program; it raised {type(error).__name__}: {error}"
        ) from error
    if not (callable(getattr(program, "model", None)) and callable(getattr(program, "guide", None))):
        what = "nothing" if found is None else type(program).__name__
        raise ValueError(
            f"Expected {path} to define {name or 'a name after the colon'}, a function without arguments that returns "
            f"the program, or its class; got {what}."
        )
    return program


def source_of(reference: str) -> bytes:
    """The bytes of a program's file that were run, whatever became of the file since."""
    return vars(sys.modules[_module_name(_path_of(reference))])["__source__"]  # type: ignore[no-any-return]


def _path_of(reference: str) -> Path:
    return Path(reference.partition(":")[0]).expanduser().resolve()


def _module_name(path: Path) -> str:
    return f"_ppl_vae_program_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


def _load_class(reference: str, fits: Callable[[type], bool], what: str, how: str, fresh: bool) -> type:
    wanted, path = reference.partition(":")[2], _path_of(reference)
    module = _run(reference, what, fresh)
    kinds: dict[str, type] = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and fits(value)
    }
    wanted = wanted or (next(iter(kinds)) if len(kinds) == 1 else "")
    if wanted not in kinds:
        raise ValueError(
            f"Expected {path} to define the class {wanted or 'after the colon'} {how}; it has "
            f"{', '.join(kinds) or 'none'}."
        )
    return kinds[wanted]


def _run(reference: str, what: str, fresh: bool) -> ModuleType:
    """The module of a file, which runs if it has not, or if it has changed and is to be `fresh`."""
    path = _path_of(reference)
    name = _module_name(path)
    if name not in sys.modules or fresh:
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"Expected a {what} as file.py:Class; got {reference!r}, and {path} is not a Python file.")
        source, former = path.read_bytes(), sys.modules.get(name)
        if former is None or source != vars(former)["__source__"]:
            module = ModuleType(name)
            vars(module).update(__file__=str(path), __source__=source)
            sys.modules[name] = module
            try:
                exec(compile(source, path, "exec"), vars(module))
            except (Exception, SystemExit) as error:
                del sys.modules[name]
                raise ValueError(f"Expected {path} to import; it raised {type(error).__name__}: {error}") from error
    return sys.modules[name]
