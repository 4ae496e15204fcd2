"""`Conditional`: a family and a network. Prior, likelihood and approximate posterior are three uses of it."""

from typing import Any, Literal, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.families.family import Family
from ppl_vae.networks.encoding import Encoding
from ppl_vae.networks.network import Amortized, Network, join


class Conditional(nn.Module):
    r"""A conditional distribution: a network turns the context into parameters, a family these into a distribution.

    Args:
        family: The kind of distribution.
        network: How its parameters depend on the context; `Free` parameters by default. Any torch module that maps
            contexts (n, c) to parameters (n, p), or (n, ...) with p numbers a row, will do: it gets the event flattened
            and all batch dimensions in one. Its output starts wherever its last layer does, unless the module has a
            method `restart(start)` that sets it to parameters (p,), which `VAE.initialise` calls.
        context: The shapes of what it is conditioned on; an int is short for a 1-tuple. A `VAE` fills them in.
        encoding: What the network sees of the first context's columns; by default the columns as they are. The
            posterior of a `VAE` takes the encoding that suits the likelihood.

    Raises:
        TypeError: If `family` is not a family or `network` not a module.
        ValueError: If the network cannot take the context, or already belongs to another conditional.

    Example:
        >>> from ppl_vae import Conditional, families, networks
        >>> encoder = Conditional(families.Normal(2), networks.MLP(hidden=[8]), context=5)
        >>> encoder(torch.zeros(3, 5)).batch_shape
        torch.Size([3])
    """

    def __init__(
        self,
        family: Family,
        network: nn.Module | None = None,
        *,
        context: int | tuple[int | tuple[int, ...], ...] | None = None,
        encoding: Encoding | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(family, Family):
            raise TypeError(f"Expected a family, such as Normal(2); got {family!r}.")
        network = family.network() if network is None else network
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected a network, such as MLP(hidden=[200]), or any torch module; got {network!r}.")
        self.family = family
        self.network = network
        self.encoding = encoding
        self.context: tuple[torch.Size, ...] | None = None
        if context is not None:
            self.bind(*([context] if isinstance(context, int) else context))
        elif self.wants is None:
            self.bind()

    @property
    def wants(self) -> Literal["context", "index"] | None:
        """What to call this with: the `context`, the `index` of each datum in its data set, or nothing (None)."""
        return self.network.wants if isinstance(self.network, Network) else "context"

    def bind(self, *context: int | tuple[int, ...]) -> Self:
        """Set the shapes of the context, from which the network takes its sizes. Binding again to the same is allowed.

        Raises:
            ValueError: If the conditional is bound to other shapes, or the network cannot take them.
        """
        shapes = tuple(torch.Size([shape] if isinstance(shape, int) else shape) for shape in context)
        if self.context == shapes:
            return self
        if self.context is not None and not (self.wants is None and shapes):
            bound, asked = ([tuple(shape) for shape in each] for each in (self.context, shapes))
            raise ValueError(f"Expected a context of shapes {bound}, as built; got {asked}.")
        start = self.family.start()
        if self.wants == "context" and not shapes:
            raise ValueError(
                f"Expected the network Free where nothing is given; got {type(self.network).__name__}. A prior that is "
                "given a label or covariates is named in `given_to`."
            )
        if isinstance(self.network, Network):
            if self.context is None and any(True for _ in self.network.parameters()):
                raise ValueError(
                    f"Expected a network of its own for each conditional; got a {type(self.network).__name__} that "
                    f"is built already. Write it anew, or use copy.deepcopy before it is built."
                )
            first, *others = [shape.numel() for shape in shapes] or [0]
            size = (first if self.encoding is None else self._encoded(first, self.encoding)) + sum(others)
            if isinstance(self.network, Amortized):
                self.network.others = sum(others)
            self.network.build(size, start)
            if others and isinstance(self.network, Amortized):
                self.network.scale = torch.ones(size)  # the contexts may differ in their units
        self.context = shapes
        self._width = start.numel()
        return self

    def unconstrained(self, *context: Tensor, observed: Tensor | None = None) -> Tensor:
        """Parameters of the family, shape (*batch, p), from contexts of shapes `batch + shape`.

        Args:
            context: As many tensors as were bound; if the network wants the index, the index of each datum instead.
            observed: Boolean, as the first context; where it is false, the entry is unknown and does not count.
        """
        if self.context is None:
            raise ValueError(
                "Expected a conditional that is built: give it `context=`, call bind(), or put it into a VAE."
            )
        network: Any = self.network
        if not self.context or self.wants == "index":
            return network(*context)
        joined = join(context, self.context)
        seen = None if observed is None else join([observed], self.context[:1])
        if self.encoding is not None:
            width = len(self.encoding.words)
            first, seen = self.encoding(joined[..., :width], seen)
            joined = torch.cat([first, joined[..., width:]], -1)
        if seen is not None and seen.shape[-1] < joined.shape[-1]:
            others = joined.shape[-1] - seen.shape[-1]
            seen = torch.cat([seen, seen.new_ones(*seen.shape[:-1], others)], -1)
        if isinstance(network, Network):
            return network(joined) if seen is None else network(joined, seen)
        joined = joined if seen is None else torch.where(seen, joined, 0.0)
        answer: Tensor = network(joined.reshape(-1, joined.shape[-1]))
        each = answer.shape[1:].numel()
        if each != self._width or len(answer) != joined.shape[:-1].numel():
            raise ValueError(
                f"Expected the network to answer {self._width} parameters for {type(self.family).__name__}"
                f"{tuple(self.family.event_shape)} for each of {joined.shape[:-1].numel()} contexts; got {each} for "
                f"each of {len(answer)}."
            )
        return answer.reshape(*joined.shape[:-1], each)

    def forward(
        self, *context: Tensor, observed: Tensor | None = None, mask: Tensor | None = None, **given: Tensor
    ) -> TorchDistribution:
        """Distribution at these contexts.

        Args:
            context: What to condition on, as in `unconstrained`.
            observed: Masks a context's entries.
            mask: Masks the event's entries.
            given: What the family's `distribution` takes from the batch beside its parameters.
        """
        return self.family.distribution(self.unconstrained(*context, observed=observed), mask, **given)

    def _encoded(self, size: int, encoding: Encoding) -> int:
        """Size of a context after its encoding, which must be of as many columns."""
        if len(encoding.words) != size:
            raise ValueError(f"Expected an encoding of {size} columns, as the context has; got {len(encoding.words)}.")
        if encoding.size != size and getattr(self.network, "shape", None) is not None:
            raise ValueError(
                f"Expected an encoding that keeps a picture's shape, for {type(self.network).__name__}; got one-hot "
                'columns. Set encoding = "plain", or use MLP.'
            )
        return encoding.size
