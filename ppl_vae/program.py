r"""Programs: Pyro pairs of `model` and `guide`, and what can be read off their traces.

A program is any object with `model(**batch)` and `guide(**batch)`, in plain Pyro, with an outermost plate `"data"` at
dim -1, whatever its latent sites and inner plates. `VAE` is the program that three conditionals build; `Program`
wraps two functions or a stranger's modules. Nothing below the contract knows which of them it has.
"""

import copy
import hashlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_vae.conditional import Conditional
from ppl_vae.data import as_batch, check_finite, keyed
from ppl_vae.families import moments
from ppl_vae.networks import Table, _Amortized

__all__ = ["VAE", "PyroPair", "Program", "load_program", "unique_name"]

Batch = dict[str, Tensor]


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
        ...         pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]), obs=x[:, 0])
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


def check_support(site: str, support: Any, x: Tensor, mask: Tensor | None, family: str) -> None:
    """Refuse data outside a likelihood's support, naming the first such value and what to do."""
    inside = support.check(x)
    if mask is not None and mask.shape == inside.shape:
        inside = inside | ~mask
    if bool(inside.all()):
        return
    first = (~inside).nonzero()[0].tolist()
    remedy = "Choose a likelihood whose support holds the data."
    if family == "Bernoulli":
        remedy = (
            'Binarise the data (binarization = "dynamic", "static" or "threshold"), or choose a likelihood for real '
            "numbers, such as Normal."
        )
    place_ = f"row {first[0]}" + (f", column {', '.join(map(str, first[1:]))}" if first[1:] else "")
    raise ValueError(
        f"Expected data in the support of {family}, {_name(support)}, at site '{site}'; got "
        f"{x[tuple(first)].flatten()[0].item():g} at {place_} "
        f"and {int((~inside).sum())} such values in all. {remedy}"
    )


def _name(support: Any) -> str:
    inner = getattr(support, "base_constraint", support)
    return {"Boolean": "{0, 1}", "Real": "the real numbers"}.get(type(inner).__name__.strip("_"), str(support))


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


@contextmanager
def seeded(*key: int | str, device: torch.device) -> Iterator[None]:
    """Draw from the streams of a key, then leave the global random state as it was found."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(keyed(*key))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def scope(program: Any) -> Iterator[None]:
    """Run a program with a parameter store of its own, on top of the global one, and leave that as it was."""
    store = pyro.get_param_store()
    own = vars(program).setdefault("_ppl_vae_params", {"params": {}, "constraints": {}})
    outer: Any = store.get_state()
    copies = {
        name: value if "$$$" in name else value.detach().clone().requires_grad_()
        for name, value in outer["params"].items()
    }
    merged: Any = {
        "params": {**copies, **own["params"]},
        "constraints": {**outer["constraints"], **own["constraints"]},
    }
    with store.scope(merged):
        yield
    for name, value in merged["params"].items():
        kept = copies.get(name)
        if "$$$" not in name and (value is not kept or not torch.equal(value, outer["params"][name])):
            own["params"][name], own["constraints"][name] = value, merged["constraints"][name]


def doubled(program: Any) -> Any:
    """Copy a program in double precision, with what it learned through `pyro.param`; one without tensors stays itself."""
    if not isinstance(program, nn.Module) or place(program)[1] is None:
        return program
    twin = copy.deepcopy(program).double()
    own = vars(twin).get("_ppl_vae_params", {"params": {}})
    own["params"] = {name: value.detach().double().requires_grad_() for name, value in own["params"].items()}
    return twin


def place(program: Any, x: Tensor | None = None) -> tuple[torch.device, torch.dtype | None]:
    """Give the device of a program and its floating type, `None` where it holds no tensors."""
    tensors = itertools.chain(program.parameters(), program.buffers()) if isinstance(program, nn.Module) else iter(())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is not None:
        return first.device, first.dtype
    return (torch.device("cpu") if x is None else x.device), None


def prepare(program: Any, batch: Mapping[str, Tensor]) -> Batch:
    """Check a batch and bring it to the program's device and floating type.

    Where the model asks for `index` and the batch has none, the data are numbered.

    Raises:
        ValueError: for values that are not finite, a batch that the model does not take, or data that do not fit.
    """
    check_finite(batch)
    first = next(iter(batch.values()))
    device, dtype = place(program, first)
    moved = {
        key: value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }
    if "index" not in moved and "index" in _keywords(program.model):
        moved["index"] = torch.arange(len(first), device=device)
    taken = batch_of(program.model, moved)
    if not taken.keys() & batch.keys():
        raise ValueError(f"Expected data named {', '.join(_keywords(program.model))}; got {', '.join(batch)}.")
    if hasattr(program, "check"):
        program.check(taken)
    return taken


def batch_of(function: Callable[..., Any], batch: Mapping[str, Tensor]) -> Batch:
    """Choose what a model or guide takes; labels that no model asks for stay behind."""
    keywords = _keywords(function)
    return dict(batch) if "**" in keywords else {key: value for key, value in batch.items() if key in keywords}


def _keywords(function: Callable[..., Any]) -> list[str]:
    target = function.forward if isinstance(function, nn.Module) else function
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in inspect.signature(target).parameters.values()]


@dataclass(frozen=True)
class Structure:
    """What the traces of a program show.

    Args:
        latents: names of the latent sites, in the model's order.
        observed: names of the observed sites.
        nesting: how many plates enclose a site at the most, the data plate included.
        kl: for each latent site, whether its KL term is `analytic` under `TraceMeanField_ELBO`, or `sampled`.
        same_order: whether model and guide visit the latent sites in one order.
    """

    latents: tuple[str, ...]
    observed: tuple[str, ...]
    nesting: int
    kl: dict[str, str]
    same_order: bool


def structure(program: Any, batch: Mapping[str, Tensor], *, seed: int = 0) -> Structure:
    """Read a program's structure off one pair of traces, on the first data of a batch.

    Raises:
        ValueError: where the program breaks the contract: no plate `"data"` at dim -1, a site outside it, or latent
            sites that differ between model and guide.
    """
    few = {key: value[:2] for key, value in batch.items()}
    device, _ = place(program, next(iter(few.values())))
    with torch.no_grad(), scope(program), seeded(seed, device=device):
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, few))
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**few)
    drawn = [name for name in guide.stochastic_nodes if not guide.nodes[name]["infer"].get("is_auxiliary")]
    latents = list(model.stochastic_nodes)
    drawn, latents = [_plain(guide, drawn), _plain(model, latents)]
    if set(drawn) != set(latents):
        raise ValueError(
            f"Expected model and guide to have the same latent sites; only the model has "
            f"{sorted(set(latents) - set(drawn)) or 'none'}, "
            f"only the guide has {sorted(set(drawn) - set(latents)) or 'none'}."
        )
    depth = 0
    for trace in (guide, model):
        for name in _plain(trace, [*trace.stochastic_nodes, *trace.observation_nodes]):
            frames = {frame.name: frame.dim for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized}
            if frames.get("data") != -1:
                raise ValueError(
                    f"Expected every site inside the outermost plate 'data' at dim -1; site '{name}' is in "
                    f"{frames or 'no plate'}. "
                    "Evidence is counted a datum, so nothing may be drawn outside that plate."
                )
            depth = max(depth, *(-dim for dim in frames.values()))
    kl = {name: _kl_term(guide.nodes[name], model.nodes[name]) for name in latents}
    return Structure(tuple(latents), tuple(_plain(model, model.observation_nodes)), depth, kl, drawn == latents)


def _plain(trace: Trace, names: Any) -> list[str]:
    return [name for name in names if type(trace.nodes[name]["fn"]).__name__ != "_Subsample"]


def _kl_term(q: Any, p: Any) -> str:
    try:
        kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return "sampled"
    return "analytic"


def trace_pair(program: Any, batch: Mapping[str, Tensor], samples: int, nesting: int) -> tuple[Trace, Trace]:
    """Trace the guide and, replaying it, the model, with `samples` particles at dim -1 - nesting."""
    particles = pyro.plate("particles", samples, dim=-1 - nesting)
    guide = poutine.trace(particles(program.guide)).get_trace(**batch_of(program.guide, batch))
    model = poutine.trace(poutine.replay(particles(program.model), trace=guide)).get_trace(**batch)
    return model, guide


def log_density(trace: Trace, samples: int, n: int, names: Iterable[str] | None = None) -> Tensor:
    """Sum the log probabilities of sites, unscaled and with their masks, over all dims but particles and data.

    Args:
        trace: of a model or guide.
        samples: the number of particles.
        n: the number of data.
        names: the sites that count, all by default.

    Returns:
        Nats, shape (samples, n), in double precision.
    """
    total = torch.zeros(samples, n, dtype=torch.float64)
    for name in _plain(trace, [*trace.stochastic_nodes, *trace.observation_nodes] if names is None else names):
        site: Any = trace.nodes[name]
        log_prob = pyro.distributions.util.scale_and_mask(
            site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), 1.0, site["mask"]
        )
        total = total.to(log_prob.device) + log_prob.double().reshape(samples, -1, n).sum(1)
    return total
