r"""Programs: Pyro pairs of `model` and `guide`, and what can be read off their traces.

A program is any object with `model(**batch)` and `guide(**batch)`, in plain Pyro, with an outermost plate `"data"` at
dim -1, whatever its latent sites and inner plates. `VAE` is the program that three conditionals build; `Program`
wraps two functions or a stranger's modules. Nothing below the contract knows which of them it has.
"""

import hashlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.batches import as_batch
from ppl_vae.conditional import Conditional
from ppl_vae.families import moments
from ppl_vae.networks import Table, _Amortized
from ppl_vae.traces import batch_of, check_support, place, prepare, seeded

__all__ = ["VAE", "PyroPair", "Program", "load_program", "unique_name"]


class PyroPair(Protocol):
    """The contract of a program: a model and a guide that take the same batch by keyword."""

    def model(self, **batch: Any) -> Any:
        """Sample the latent sites and the data, these observed where the batch has them."""

    def guide(self, **batch: Any) -> Any:
        """Sample the latent sites from the approximate posterior."""


_names: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()


_count = itertools.count()


def unique_name(module: nn.Module) -> str:
    """Give a module a name that no other instance gets, deep copies and later instances included.

    `pyro.module` keeps parameters by name in one store for the whole process: of two modules of one name, the second
    would never be trained, without a word.
    """
    if module not in _names:
        _names[module] = f"{type(module).__name__.lower()}_{next(_count)}"
    return _names[module]


class Program(nn.Module):
    """Anyone's model and guide as a program.

    Args:
        model: a function or module that takes the batch by keyword.
        guide: likewise; one that also takes a model's keywords may ignore them.

    Raises:
        TypeError: where either cannot be called.

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

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        super().__init__()
        for name, part in (("model", model), ("guide", guide)):
            if not callable(part):
                raise TypeError(f"Expected `{name}` to be a function or module of the batch; got {part!r}.")
        self.model = model
        self.guide = guide
        owners = {id(part.__self__): part.__self__ for part in (model, guide) if inspect.ismethod(part)}
        self.owners = nn.ModuleList(owner for owner in owners.values() if isinstance(owner, nn.Module))


class VAE(nn.Module):
    r"""The program of three conditionals, with sites `"z"` and `"x"`.

    The model is :math:`p(z)\, p(x \mid z)`, the guide :math:`q(z \mid x)`.

    Args:
        prior: p(z), without context.
        likelihood: p(x|z).
        posterior: q(z|x), the approximate posterior; its family must be reparameterised.

    Raises:
        TypeError: where a part is no `Conditional`.
        ValueError: where sizes do not fit, or a family cannot play its role.

    Example:
        >>> from ppl_vae import VAE, Conditional
        >>> from ppl_vae.families import Bernoulli, Normal, StandardNormal
        >>> from ppl_vae.networks import MLP
        >>> vae = VAE(
        ...     prior=Conditional(StandardNormal(2)),
        ...     likelihood=Conditional(Bernoulli(64), MLP(hidden=[32])),
        ...     posterior=Conditional(Normal(2), MLP(hidden=[32])),
        ... )
        >>> vae.sample(3).shape
        torch.Size([3, 64])
    """

    def __init__(self, prior: Conditional, likelihood: Conditional, posterior: Conditional) -> None:
        super().__init__()
        for role, part in (("prior", prior), ("likelihood", likelihood), ("posterior", posterior)):
            if not isinstance(part, Conditional):
                raise TypeError(f"Expected `{role}` to be a Conditional; got {part!r}.")
        z, x = prior.family.event_shape, likelihood.family.event_shape
        if posterior.family.event_shape != z:
            raise ValueError(
                f"Expected prior and posterior of one latent shape; got {tuple(z)} and "
                f"{tuple(posterior.family.event_shape)}."
            )
        if not posterior.family.reparameterised or posterior.family.support is not prior.family.support:
            raise ValueError(
                f"Expected a reparameterised posterior on the support of the prior {type(prior.family).__name__}; "
                f"got {type(posterior.family).__name__}{tuple(z)}."
            )
        if prior.context:
            raise ValueError(
                f"Expected a prior without context; got one of shapes {[tuple(s) for s in prior.context]}."
            )
        self.prior = prior.bind()
        self.likelihood = likelihood.bind(tuple(z))
        self.posterior = posterior.bind(tuple(x))

    def model(self, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Draw z from the prior and x from the likelihood, or score x where it is observed.

        Args:
            x: data, shape (n, *x).
            mask: boolean, as `x`; entries where it is false are missing.
            index: the number of each datum in its data set, shape (n,), which a `Table` needs.
        """
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, mask=mask), obs=x)

    def guide(self, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Draw z from the approximate posterior; the arguments are those of `model`."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.approximate(x, mask, index))

    def approximate(self, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> Any:
        """Give the distribution q(z|x) with batch shape (n,)."""
        if not isinstance(self.posterior.network, Table):
            return self.posterior(x, observed=mask)
        if index is None:
            raise ValueError(
                "Expected `index`, the number of each datum in its data set, for a posterior on a Table; got none."
            )
        return self.posterior(index)

    def initialise(self, x: Any, mask: Any = None) -> "VAE":
        """Fit the starting point to data, which decides whether training works at all.

        The likelihood's output begins at the data's mean (for a Bernoulli the logit of the clipped mean), a
        `Normal`'s scale at the data's standard deviation; the guide's input is centred on the mean and divided by one
        number, the data's root mean square deviation, both kept as buffers.

        Args:
            x: data, shape (n, *x).
            mask: boolean, as `x`; entries where it is false are missing.

        Returns:
            The VAE itself.

        Raises:
            ValueError: for data that do not fit, or a constant feature under a scale of its own.
        """
        batch = prepare(self, as_batch(x) if mask is None else as_batch({"x": x, "mask": mask}))
        data, seen = batch["x"], batch.get("mask")
        start = self.likelihood.family.fit_start(data, seen)
        if hasattr(self.likelihood.network, "restart"):
            self.likelihood.network.restart(start)  # type: ignore[operator]
        if isinstance(self.posterior.network, _Amortized):
            loc, scale = moments(data, seen)
            spread = scale.square().mean().sqrt()
            self.posterior.network.centre(loc.flatten(), torch.where(spread > 0, spread, 1.0))
        return self

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """Draw n data from the model, shape (n, *x)."""
        device, _ = place(self)
        with seeded(seed, device=device):
            return self.likelihood(self.prior().expand([n]).sample()).sample()

    @torch.no_grad()
    def reconstruct(self, x: Any, *, seed: int = 0) -> Tensor:
        """Give the mean of p(x|z) at one draw of z from q(z|x), shape (n, *x)."""
        batch = prepare(self, as_batch(x))
        device, _ = place(self)
        with seeded(seed, device=device):
            return self.likelihood(self.approximate(**batch_of(self.guide, batch)).sample()).mean  # type: ignore[no-any-return]

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse data that do not fit: their shape, or values outside the likelihood's support."""
        x, mask = batch["x"], batch.get("mask")
        family = self.likelihood.family
        if x.shape[1:] != family.event_shape:
            raise ValueError(
                f"Expected data of shape (n, {', '.join(map(str, family.event_shape))}); got {tuple(x.shape)}."
            )
        check_support("x", family.support, x, mask, type(family).__name__)
        if isinstance(self.posterior.network, Table) and not bool(
            ((batch["index"] >= 0) & (batch["index"] < self.posterior.network.rows)).all()
        ):
            raise ValueError(
                f"Expected data whose index is below the table's {self.posterior.network.rows} rows; got "
                f"{int(batch['index'].max())}. "
                "A Table knows the data it was fitted to, no others: use a Linear or MLP network for new data."
            )


def load_program(reference: str) -> type:
    """Load a program's class from `"file.py:Class"`; the class may be left out where the file defines one program.

    The file runs under one private module name made of its path, so that a class has one identity however often it is
    loaded.

    Raises:
        ValueError: for a missing file, one that fails to run, or one without such a class.
    """
    path_text, _, wanted = reference.partition(":")
    path = Path(path_text).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"Expected a program as file.py:Class; got {reference!r}, and {path} is not a Python file.")
    name = f"_ppl_vae_program_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(f"Expected {path} to import; it raised {type(error).__name__}: {error}") from error
    found = {
        key: value
        for key, value in vars(sys.modules[name]).items()
        if inspect.isclass(value)
        and value.__module__ == name
        and callable(getattr(value, "model", None))
        and callable(getattr(value, "guide", None))
    }
    wanted = wanted or (next(iter(found)) if len(found) == 1 else "")
    if wanted not in found:
        raise ValueError(
            f"Expected {path} to define the class {wanted or 'after the colon'} with `model` and `guide`; it has "
            f"{', '.join(found) or 'none'}."
        )
    return found[wanted]  # type: ignore[no-any-return]
