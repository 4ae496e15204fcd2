r"""Enumeration: discrete latent sites that are summed out exactly, by tensor variable elimination.

A site marked `infer={"enumerate": "parallel"}`, in the model alone or in the guide, has its values side by side in a
dim of its own, left of the particles. What is left are the densities of the other sites,

.. math::

    p(x, z) = \sum_y p(x, z, y), \qquad q(z \mid x) = \sum_y q(y \mid x)\, q(z \mid x, y),

and everything that takes a program's densities works on these. The sums go plate by plate and along chains
(`pyro.markov`) by Pyro's own contraction.

References:
    Tensor Variable Elimination for Plated Factor Graphs (Obermeyer, Bingham, Jankowiak, Pradhan, Chiu, Rush and Goodman
    2019).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae.programs import traces
from ppl_vae.programs.plates import BrokenContract, frames
from ppl_vae.programs.traces import Batch, Given, batch_of, plain_sites, unscaled

Tree = OrderedDict[frozenset[str], list[Any]]  # packed log factors by the plates around them

_NEVER = -1e250  # log probability of what has none, so that gradients stay finite


def is_enumerated(node: Any) -> bool:
    """Whether a site is marked to be enumerated in parallel, all its values and not samples of them."""
    return node["infer"].get("enumerate") == "parallel" and node["infer"].get("num_samples") is None


def enumerated_sites(guide: Trace, model: Trace) -> tuple[list[str], list[str]]:
    """Names of the sites that are enumerated, in the model's order, and of those of the guide among them.

    Raises:
        BrokenContract: If one has no finite support, or latent sites of the model alone are not enumerated.
    """
    drawn = plain_sites(guide, guide.stochastic_nodes)
    latents = plain_sites(model, model.stochastic_nodes)
    own: Any = {**model.nodes, **{name: guide.nodes[name] for name in drawn}}
    found = [name for name in latents if is_enumerated(own[name])]
    for name in found:
        if not own[name]["fn"].has_enumerate_support:
            raise BrokenContract(
                f"Expected sites with finitely many values to enumerate; got '{name}', a "
                f"{type(own[name]['fn']).__name__}. Draw it in the guide instead."
            )
    for name in sorted(set(latents) - set(drawn) - set(found)):
        base, infer = name.removesuffix("_unobserved"), own[name]["infer"]
        if base != name and f"{base}_observed" in own and own[name]["fn"].has_enumerate_support:
            raise BrokenContract(
                f"Expected '{name}', the missing values of '{base}', to be enumerated, or drawn by the guide. Pyro "
                "drops infer={'enumerate': ...} beside obs_mask: use pyro.infer.config_enumerate(model)."
            )
        if infer.get("enumerate"):
            raise BrokenContract(
                f"Expected '{name}', which the guide lacks, to be enumerated in parallel, with all its values; got "
                f"{infer['enumerate']!r}{', num_samples' * ('num_samples' in infer)}. Mark it "
                "infer={'enumerate': 'parallel'}."
            )
    return found, [name for name in found if name in drawn]


def enumerating(function: Callable[..., Any], names: Collection[str], first: int | None) -> Callable[..., Any]:
    """A model or guide that enumerates just these sites, from a dim on, or where an enumerating guide has left off."""
    return EnumMessenger(first)(_marking(function, names))  # type: ignore[no-any-return]


def _marking(function: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    def marks(site: Any) -> Any:
        return {"enumerate": "parallel" if site["name"] in names else None}

    return poutine.infer_config(function, marks)  # type: ignore[no-any-return]


def summed_trace(
    function: Callable[..., Any], batch: Batch, given: Mapping[str, Tensor], names: Collection[str], first: int
) -> Trace:
    """Trace a function at given values of its latent sites, with other sites enumerated."""
    return poutine.trace(Given(given)(enumerating(function, names, first))).get_trace(**batch)


def all_values(
    program: Any, batch: Batch, samples: int, nesting: int, names: Collection[str], guided: Collection[str]
) -> tuple[Trace, Trace]:
    """Trace model and guide with all values of the enumerated sites, each with draws of its own of what follows it."""
    particles = pyro.plate("particles", samples, dim=-1 - nesting)
    function = enumerating(particles(program.guide), guided, -2 - nesting)
    guide = poutine.trace(function).get_trace(**batch_of(program.guide, batch))
    model = enumerating(particles(program.model), {*names} - {*guided}, None)
    return poutine.trace(poutine.replay(model, trace=guide)).get_trace(**batch), guide


def drawn_values(function: Callable[..., Any], batch: Batch, names: Collection[str], first: int) -> dict[str, Tensor]:
    """Draw the enumerated sites of a model from their posterior given the data and what handlers give of the others."""
    trace: Any = poutine.trace(infer_discrete(_marking(function, names), first, 1)).get_trace(**batch)
    return {name: trace.nodes[name]["value"] for name in names}


def log_density(
    trace: Trace, samples: int, n: int, names: Iterable[str] | None = None, observed: Collection[str] = ()
) -> Tensor:
    """Log density of a trace's sites with the enumerated ones summed out, over all dims but particles and data.

    Args:
        trace: of a model or guide.
        samples: the number of particles.
        n: the number of data.
        names: the sites that count, all by default.
        observed: the observed sites. If only such count, it is their density given the latent sites.

    Returns:
        Nats, shape (samples, n), in double precision.
    """
    nodes: Any = trace.nodes
    summed = [name for name in plain_sites(trace) if "_enumerate_dim" in nodes[name]["infer"]]
    if summed and hasattr(trace, "alone"):  # stacked traces, whose enumerated dims are no longer where they were
        return torch.cat([log_density(one, 1, n, names, observed) for one in trace.alone])
    if not summed:
        return traces.log_density(trace, samples, n, names)
    trace.symbolize_dims()
    chosen = plain_sites(trace, names)
    if names is None or not chosen or not {*chosen} <= {*observed}:
        return _Sum(trace, n).rows(_factors(trace, dict.fromkeys([*chosen, *summed])), samples)
    rest = [name for name in plain_sites(trace) if name not in observed]
    both = [_Sum(trace, n).rows(_factors(trace, sites), samples) for sites in ([*chosen, *rest], rest)]
    return both[0] - both[1]


def _factors(trace: Trace, names: Iterable[str], sign: int = 1) -> Tree:
    """Packed log probabilities of sites by their plates; a mask leaves an enumerated site its law, which sums to 1."""
    tree: Tree = OrderedDict()
    for name in names:
        node: Any = trace.nodes[name]
        value = node["fn"].log_prob(node["value"]) if "_enumerate_dim" in node["infer"] else unscaled(node)
        plates = frozenset(trace.plate_to_symbol[plate] for plate in frames(node))
        value = sign * value.double().clamp_min(_NEVER)
        tree.setdefault(plates, []).append(packed.pack(value, node["infer"]["_dim_to_symbol"]))
    return tree


def _joined(*trees: Tree) -> Tree:
    both: Tree = OrderedDict()
    for tree in trees:
        for plates, terms in tree.items():
            both.setdefault(plates, []).extend(terms)
    return both


class _Ring(LogRing):
    """Sums out one dim after the other, each over the sum of all factors that have it.

    Pyro's own ring shifts each factor by its maximum, so that all products underflow where factors of more than 745
    nats disagree.
    """

    def sumproduct(self, terms: Any, dims: Any) -> Any:
        terms, left = list(terms), set(dims)
        while left:
            reach = {dim: _union(term for term in terms if dim in term._pyro_dims) for dim in left}
            dim = min(sorted(left), key=lambda one: math.prod(reach[one].values()))
            joined = _added([term for term in terms if dim in term._pyro_dims])
            reduced: Any = joined.logsumexp(joined._pyro_dims.index(dim))
            reduced._pyro_dims = joined._pyro_dims.replace(dim, "")
            terms = [*(term for term in terms if dim not in term._pyro_dims), reduced]
            left.remove(dim)
        return _added(terms)


def _union(terms: Iterable[Any]) -> dict[str, int]:
    """Sizes of the dims of packed terms by their symbols."""
    return {symbol: size for term in terms for symbol, size in zip(term._pyro_dims, term.shape, strict=True)}


def _added(terms: list[Any]) -> Any:
    parts = packed.broadcast_all(*terms)
    total: Any = sum(parts[1:], parts[0])
    total._pyro_dims = parts[0]._pyro_dims
    return total


class _Sum:
    """Sums over the enumerated dims of packed factors.

    Args:
        trace: whose dims have symbols.
        n: the number of data; 1 where the whole data set counts as one datum.
    """

    def __init__(self, trace: Trace, n: int) -> None:
        self.n, self.dims, plates = n, trace.symbol_to_dim, trace.plate_to_symbol
        self.plates = {*plates.values()}
        self.kept = {plates["particles"]} if "particles" in plates else set()
        self.kept |= {symbol for symbol in self.plates if n > 1 and self.dims.get(symbol) == -1}

    def enumerated(self, tree: Tree) -> set[str]:
        """Symbols of the enumerated dims."""
        return {symbol for terms in tree.values() for term in terms for symbol in term._pyro_dims} - self.plates

    def over(self, tree: Tree, plates: Iterable[str] = (), but: Collection[str] = ()) -> Any:
        """Sum out the enumerated dims, keeping particles, data and other dims asked for."""
        sizes = _union(term for terms in tree.values() for term in terms)
        target = frozenset((self.kept | {*plates}) & {*sizes})
        ring = _Ring(dim_to_size=sizes)
        return contract_to_tensor(tree, self.enumerated(tree), target, {*but} & {*sizes}, ring=ring)

    def rows(self, tree: Tree, samples: int) -> Tensor:
        """Sum out the enumerated dims, (samples, n)."""
        return self.unpacked(self.over(tree), samples)

    def unpacked(self, value: Any, samples: int) -> Tensor:
        """A packed tensor of particles and data as (samples, n)."""
        value = packed.unpack(value, self.dims)
        value = torch.where(value < _NEVER / 2, -math.inf, value)
        last = value.shape[-1] if self.n > 1 and value.dim() else 1
        return value.reshape(-1, last).expand(samples, self.n)  # type: ignore[no-any-return]


class Weights:
    r"""Importance weights of a pair whose enumerated sites have all their values side by side.

    A site y that the guide enumerates has other latent sites :math:`z_y \sim q(z \mid x, y)` drawn for each of its
    values. The weight :math:`\sum_y p(x, z_y, y) / q(z_y \mid x, y)` is p(x) on average, whatever q(y|x). The bound
    :math:`\sum_y q(y \mid x) \log [p(x, z_y, y) / (q(y \mid x)\, q(z_y \mid x, y))]` is `TraceEnum_ELBO`'s.

    Args:
        model: trace of the model, which replays the guide's.
        guide: trace of the guide.
        samples: the number of particles, k.
        n: the number of data.
        observed: names of the observed sites.

    Attributes:
        weights: log weights, (k, n) in nats.
        bounds: what averages to the ELBO, (k, n).
        likelihood: what averages to E_q log p(x|z), (k, n).
    """

    def __init__(self, model: Trace, guide: Trace, samples: int, n: int, observed: Collection[str]) -> None:
        self.guide, self.samples, self.n = guide, samples, n
        nodes: Any = guide.nodes
        drawn = plain_sites(guide)
        summed = [name for name in drawn if "_enumerate_dim" in nodes[name]["infer"]]
        guide.symbolize_dims()
        model.symbolize_dims(guide.plate_to_symbol)
        self.sum = _Sum(model, n)
        self.sum.dims = {**guide.symbol_to_dim, **model.symbol_to_dim}
        names = plain_sites(model)
        joint, prior = _factors(model, names), _factors(model, [name for name in names if name not in observed])
        self.choice = _factors(guide, summed)
        self.factors = _joined(joint, _factors(guide, [name for name in drawn if name not in summed], -1))
        self.weights = self.sum.rows(self.factors, samples)
        if summed:
            total, latent, answer = self._expected(joint, prior, _factors(guide, drawn))
            self.bounds, self.likelihood = total - answer, total - latent
        else:
            total = self.sum.rows(joint, samples)
            self.bounds = self.weights
            self.likelihood = total - self.sum.rows(prior, samples) if prior else total

    def _expected(self, *costs: Tree) -> list[Tensor]:
        """Expectations of sums of costs over the guide's enumerated sites, as slopes of a log partition function."""
        inside = self.sum.enumerated(self.choice) | self.sum.enumerated(_factors(self.guide, plain_sites(self.guide)))
        sizes = _union(term for terms in self.factors.values() for term in terms)
        kept = [symbol for symbol in sorted(self.sum.kept) if symbol in sizes]
        with torch.enable_grad():
            slopes, tree = [], self.choice
            for cost in costs:
                slope: Any = self.weights.new_zeros([sizes[symbol] for symbol in kept], requires_grad=True)
                slope._pyro_dims = "".join(kept)
                slopes.append(slope)
                outer = self.sum.enumerated(cost) - inside  # of sites that the model alone enumerates
                cost = contract_tensor_tree(cost, outer, ring=_Ring()) if cost else cost
                scaled = ((plates, [_times(term, slope) for term in terms]) for plates, terms in cost.items())
                tree = _joined(tree, OrderedDict(scaled))
            total = self.sum.over(tree).sum()
            gradients: Any = torch.autograd.grad(total, slopes, materialize_grads=True)
        for gradient in gradients:
            gradient._pyro_dims = "".join(kept)
        return [self.sum.unpacked(gradient, self.samples) for gradient in gradients]

    def moments(self, names: Iterable[str], dim: int) -> list[dict[str, Tensor]]:
        """Values of latent sites and their squares, averaged over the enumerated sites: by guide, by weights.

        Args:
            names: of the sites.
            dim: of the particles.
        """
        means: list[dict[str, Tensor]] = [{}, {}, {}, {}]
        for name in names:
            node: Any = self.guide.nodes[name]
            value, event = node["value"].double(), node["fn"].event_dim
            batch = value.shape[: value.dim() - event]
            enumerated = [d for d in range(-len(batch), dim) if batch[d] > 1]
            symbols = node["infer"].get("_dim_to_symbol", {})
            for part, tree in enumerate((self.choice, self.factors)):
                share: Any = 1.0
                if enumerated:
                    plates = {self.guide.plate_to_symbol[plate] for plate in frames(node)}
                    share = self.sum.over(tree, plates, {symbols[d] for d in enumerated})
                    share = packed.unpack(share, self.sum.dims)
                    share = (share - share.logsumexp(enumerated, keepdim=True)).exp()
                    share = share.reshape(*share.shape, *(1,) * event)
                for power in (1, 2):
                    mean = share * value**power
                    if enumerated:
                        mean = mean.sum([d - event for d in enumerated], keepdim=True)
                    means[2 * part + power - 1][name] = mean.reshape(mean.shape[mean.dim() + dim - event :])
        return means


def _times(term: Any, slope: Any) -> Any:
    term, slope = packed.broadcast_all(term, slope)
    product = term * slope
    product._pyro_dims = term._pyro_dims
    return product
