"""Priors made of the approximate posterior itself."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_int
from ppl_vae.families.conditional import Conditional
from ppl_vae.families.elementwise import Normal
from ppl_vae.families.family import Family, moments, unconstrained
from ppl_vae.networks.network import in_mode

_ENTRIES = 2**22  # numbers that values beside components may hold at a time


class TiedPrior(Family):
    """A mixture with a component for each of some inputs to the guide, of the data or like them.

    Args:
        event: The shape of a latent variable.
        posterior: The guide, built: its `context` is the shape of the data.
        components: The number of components.
        learned: Whether the inputs are learned, or stay data.

    Raises:
        ValueError: If the guide is not built, not amortized, or itself tied to the prior.
    """

    reparameterised = False
    inputs: Tensor

    def __init__(self, event: int | tuple[int, ...], posterior: Conditional, components: int, learned: bool) -> None:
        super().__init__(event)
        name, other = type(self).__name__, type(posterior.family).__name__
        if posterior.family.tied:
            raise ValueError(f"Expected a posterior that is not tied to the prior, for a {name}; got {other}.")
        if posterior.wants != "context":
            other = type(posterior.network).__name__
            raise ValueError(f"Expected a posterior on an amortized network, such as MLP, for a {name}; got {other}.")
        if not posterior.context:
            raise ValueError(f"Expected a posterior that is built, for a {name}: give it `context=`.")
        if len(posterior.context) > 1:
            raise ValueError(
                f"Expected a posterior that depends on x alone, for a {name}, whose inputs have no label; got one that "
                "is given more. Give it to the likelihood alone: --set 'model.given_to=[\"likelihood\"]'."
            )
        self.tied = (posterior,)  # a tuple, so that it is not registered a second time
        self.components = check_int("components", components)
        inputs = torch.randn(self.components, *posterior.context[0])
        if learned:
            self.inputs = nn.Parameter(inputs)
        else:
            self.register_buffer("inputs", inputs)

    def start(self) -> Tensor:
        return torch.zeros(0)

    @torch.no_grad()
    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the inputs to rows of the data, drawn at random; missing entries count as the mean of their feature."""
        if self.components > len(x):
            raise ValueError(
                f"Expected no more components of the {type(self).__name__} than training data, {len(x)}; got "
                f"{self.components}. Try --set prior.components={len(x)}."
            )
        rows = torch.randperm(len(x))[: self.components].to(x.device)
        self.inputs.copy_(x[rows] if mask is None else torch.where(mask, x, moments(x, mask)[0])[rows])


class VampPrior(TiedPrior):
    r"""The guide's average over pseudo-inputs, :math:`p(z) = \sum_c \pi_c\, q(z \mid u_c)`, tied to the guide.

    The pseudo-inputs :math:`u_c` start at data drawn at random. With all data for pseudo-inputs it is the aggregate
    posterior. The guide's network is in evaluation mode here, whatever it is elsewhere.

    Args:
        event: The shape of a latent variable.
        posterior: The guide, built: its `context` is the shape of the data.
        components: The number of pseudo-inputs.
        inputs: Whether they are learned, or stay data.
        weights: Whether all components weigh the same, or weights are learned.

    Raises:
        ValueError: If the guide is not amortized or itself tied to the prior, or a setting is unknown.

    References:
        VAE with a VampPrior (Tomczak and Welling 2018), equation 9.
    """

    def __init__(
        self,
        event: int | tuple[int, ...],
        posterior: Conditional,
        *,
        components: int = 500,
        inputs: Literal["learned", "data"] = "learned",
        weights: Literal["uniform", "learned"] = "uniform",
    ) -> None:
        check_choice("inputs", inputs, ("learned", "data"))
        check_choice("weights", weights, ("uniform", "learned"))
        super().__init__(event, posterior, components, inputs == "learned")
        self.support = posterior.family.support
        self.logits = nn.Parameter(torch.zeros(components)) if weights == "learned" else None

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        (posterior,) = self.tied
        with in_mode(posterior):
            rows = posterior.unconstrained(self.inputs)
        logits = rows.new_zeros(self.components) if self.logits is None else self.logits
        return Components(posterior.family.distribution, rows, logits, parameters.shape[:-1])


class ExemplarPrior(TiedPrior):
    r"""Normals of one width around the guide's means at some of the data, tied to the guide.

    :math:`p(z) = \frac{1}{C} \sum_c N(z;\, m(x_c), s^2 I)`, where m is the mean of the guide, whose network is in
    evaluation mode here, and s is learned. The exemplars :math:`x_c` are training data drawn at random, and stay so. A
    datum is not left out of the prior of its own training step.

    Args:
        event: The size of a latent variable, a vector.
        posterior: The guide, built: its `context` is the shape of the data.
        components: The number of exemplars.

    Raises:
        ValueError: If the guide is not amortized or itself tied to the prior.

    References:
        Exemplar VAE: Linking Generative Models, Nearest Neighbor Retrieval, and Data Augmentation (Norouzi, Fleet and
        Norouzi 2020), section 3.
    """

    def __init__(self, event: int | tuple[int, ...], posterior: Conditional, *, components: int = 500) -> None:
        super().__init__(event, posterior, components, learned=False)
        self._vector()
        self.each = Normal(event)
        self.raw_scale = nn.Parameter(unconstrained(torch.tensor(1.0)))

    def distribution(self, parameters: Tensor, mask: Tensor | None = None) -> TorchDistribution:
        self._refuse(mask)
        (posterior,) = self.tied
        with in_mode(posterior):
            means = posterior(self.inputs).mean
        rows = torch.cat([means, self.raw_scale.expand(means.shape)], -1)
        return Components(self.each.distribution, rows, rows.new_zeros(self.components), parameters.shape[:-1])


class Components(TorchDistribution):
    """A mixture of members of a family, of which a draw costs one member's, and whose scores fit into memory.

    Args:
        make: From parameters (*batch, p) to the members.
        rows: The parameters of each component, (components, p).
        logits: Log weights of the components, up to a constant.
        batch_shape: Of the mixture; all of the batch are the same.
    """

    arg_constraints = {}
    has_rsample = False

    def __init__(self, make: Callable[[Tensor], Any], rows: Tensor, logits: Tensor, batch_shape: Any = ()) -> None:
        self.make, self.rows, self.logits = make, rows, logits.log_softmax(-1)
        self.each = make(rows)
        super().__init__(torch.Size(batch_shape), self.each.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.each.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Components":
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        which = torch.distributions.Categorical(logits=self.logits).sample(torch.Size(sample_shape) + self.batch_shape)
        return self.make(self.rows[which]).sample()

    def log_prob(self, value: Tensor) -> Tensor:
        shape = value.shape[: value.dim() - self.event_dim]
        size = max(1, _ENTRIES // (len(self.rows) * self.event_shape.numel()))
        parts = value.reshape(-1, 1, *self.event_shape).split(size)
        scores = [(self.each.log_prob(part) + self.logits).logsumexp(-1) for part in parts]
        return torch.cat(scores).reshape(shape).expand(torch.broadcast_shapes(shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        return self._average(self.each.mean).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        mean = self.each.mean
        spread = self.each.variance + (mean - self._average(mean)) ** 2
        return self._average(spread).expand(self.batch_shape + self.event_shape)

    def _average(self, values: Tensor) -> Tensor:
        return torch.einsum("c,c...->...", self.logits.exp(), values)
