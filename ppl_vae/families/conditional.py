"""`Conditional`: a family and a network. Prior, likelihood and approximate posterior are three uses of it."""

from typing import Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae.families.family import Family
from ppl_vae.networks.network import Free, Network, join
from ppl_vae.networks.table import Table


class Conditional(nn.Module):
    r"""A conditional distribution: a network turns the context into parameters, a family these into a distribution.

    Args:
        family: what the distribution is.
        network: how its parameters depend on the context; none for `Free` parameters. Any module that maps a context
            `(*batch, c)` to parameters `(*batch, p)` will do.
        context: the shapes of what it is conditioned on, an int being short for a 1-tuple. A `VAE` fills them in.

    Raises:
        TypeError: where `family` is no family or `network` no module.
        ValueError: where the network cannot take the context, or already belongs to another conditional.

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
    ) -> None:
        super().__init__()
        if not isinstance(family, Family):
            raise TypeError(f"Expected a family, such as Normal(2); got {family!r}.")
        network = family.network() if network is None else network
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected a network, such as MLP(hidden=[200]), or any torch module; got {network!r}.")
        self.family = family
        self.network = network
        self.context: tuple[torch.Size, ...] | None = None
        if context is not None:
            self.bind(*([context] if isinstance(context, int) else context))
        elif isinstance(network, Free):
            self.bind()

    def bind(self, *context: int | tuple[int, ...]) -> Self:
        """Say what this is conditioned on, which gives the network its sizes; to bind the same again is idle."""
        shapes = tuple(torch.Size([shape] if isinstance(shape, int) else shape) for shape in context)
        if self.context == shapes:
            return self
        if self.context is not None and not (isinstance(self.network, Free) and shapes):
            raise ValueError(f"Expected a context of shapes {_plain(self.context)}, as built; got {_plain(shapes)}.")
        if isinstance(self.network, Network):
            if self.context is None and any(True for _ in self.network.parameters()):
                raise ValueError(
                    f"Expected a network of its own for each conditional; got a {type(self.network).__name__} that "
                    f"is built already. "
                    "Write it anew, or use copy.deepcopy before it is built."
                )
            self.network.build(sum(shape.numel() for shape in shapes), self.family.start())
        self.context = shapes
        self._width = self.family.start().numel()
        return self

    def unconstrained(self, *context: Tensor, observed: Tensor | None = None) -> Tensor:
        """Give the family's parameters, shape (*batch, p), from contexts of shapes `batch + shape`.

        Args:
            context: as many tensors as were bound; for a `Table` the index of each datum instead.
            observed: boolean, as the one context; where false, its entry is unknown and does not count.
        """
        if self.context is None:
            raise ValueError(
                "Expected a conditional that is built: give it `context=`, call bind(), or put it into a VAE."
            )
        if not self.context or isinstance(self.network, Table):
            return self.network(*context)  # type: ignore[no-any-return]
        joined = join(context, self.context)
        if observed is None:
            parameters = self.network(joined)
        elif isinstance(self.network, Network):
            parameters = self.network(joined, join([observed], self.context))
        else:
            parameters = self.network(torch.where(join([observed], self.context), joined, 0.0))
        return parameters  # type: ignore[no-any-return]

    def forward(
        self, *context: Tensor, observed: Tensor | None = None, mask: Tensor | None = None
    ) -> TorchDistribution:
        """Give the distribution at these contexts; `observed` masks a context's entries, `mask` the event's."""
        parameters = self.unconstrained(*context, observed=observed)
        if not isinstance(self.network, Network) and parameters.shape[-1] != self._width:
            raise ValueError(
                f"Expected the network to answer {self._width} parameters for "
                f"{type(self.family).__name__}"
                f"{tuple(self.family.event_shape)}; got {parameters.shape[-1]}."
            )
        return self.family.distribution(parameters, mask)


def _plain(shapes: tuple[torch.Size, ...]) -> list[tuple[int, ...]]:
    return [tuple(shape) for shape in shapes]
