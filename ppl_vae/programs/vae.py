"""The program of three conditionals: prior, likelihood and approximate posterior."""

import itertools
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import AT_ONCE, as_batch, rows_within
from ppl_vae.families.conditional import Conditional
from ppl_vae.families.family import moments
from ppl_vae.families.supports import describe_support, same_support
from ppl_vae.networks.encoding import Encoding
from ppl_vae.networks.network import Amortized
from ppl_vae.programs.given import ROLES, Given
from ppl_vae.programs.param_store import device_and_dtype, mode
from ppl_vae.programs.program import unique_name
from ppl_vae.programs.rows import numbered
from ppl_vae.programs.traces import batch_of, check_batch


class VAE(nn.Module):
    r"""The program of three conditionals, with sites `"z"` and `"x"`.

    The model is :math:`p(z)\, p(x \mid z)`, the guide :math:`q(z \mid x)`. With `given`, a label or covariates y, they
    are :math:`p(z \mid y)\, p(x \mid z, y)` and :math:`q(z \mid x, y)`, each as far as it is given y; the batch holds
    y, and the evidence is :math:`\log p(x \mid y)`.

    Args:
        prior: p(z), without context.
        likelihood: p(x|z).
        posterior: q(z|x), the approximate posterior; its family must be reparameterised.
        given: what the parts are conditioned on beside each other, and which of them.

    Raises:
        TypeError: If a part is not a `Conditional`.
        ValueError: If sizes do not fit, or a family cannot play its role.

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

    def __init__(
        self, prior: Conditional, likelihood: Conditional, posterior: Conditional, given: Given | None = None
    ) -> None:
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
        if not (posterior.family.reparameterised and same_support(posterior.family.support, prior.family.support)):
            raise ValueError(
                f"Expected a reparameterised posterior on the support of the prior {type(prior.family).__name__}, "
                f"{describe_support(prior.family.support)}; got {type(posterior.family).__name__}{tuple(z)}."
            )
        more = {role: (given.size,) if given and role in given.roles else () for role in ROLES}
        if prior.context and not more["prior"]:
            raise ValueError(
                f"Expected a prior without context; got one of shapes {[tuple(s) for s in prior.context]}."
            )
        if any(other is not posterior for other in prior.family.tied):
            raise ValueError(
                f"Expected a {type(prior.family).__name__} that is tied to the posterior of this VAE; got one that is "
                "tied to another."
            )
        if posterior.family.tied and not more["posterior"] and any(more.values()):
            raise ValueError(
                f"Expected a {type(posterior.family).__name__} that is given what the model is, which it depends on; "
                "got one that is not. Name the posterior in `given_to`."
            )
        self.given = given
        self.prior = prior.bind(*more["prior"])
        self.likelihood = likelihood.bind(tuple(z), *more["likelihood"])
        words = likelihood.family.encodings
        if posterior.context is None and posterior.encoding is None and set(words) != {"plain"}:
            if posterior.wants == "context":
                posterior.encoding = Encoding(words, likelihood.family.levels)
        self.posterior = posterior.bind(tuple(x), *more["posterior"])

    @property
    def given_keys(self) -> list[str]:
        """Entries of the batch that the VAE is given beside x."""
        return [] if self.given is None else list(self.given.levels)

    def context(self, role: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a part is given of a batch, beside z or x: one tensor (n, size) or none."""
        return () if self.given is None or role not in self.given.roles else (self.given(batch),)

    def model(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        size_factor: Tensor | None = None,
        **given: Tensor,
    ) -> Tensor:
        """Draw z from the prior and x from the likelihood, or score x where it is observed.

        Args:
            x: data, shape (n, *x).
            mask: boolean, as `x`; entries where it is false are missing.
            index: the number of each datum in its data set, shape (n,), which a `Table` needs.
            size_factor: by what the mean of each datum's counts is multiplied, shape (n,).
            given: the label `y` of each datum, shape (n,), or its `covariates`, shape (n, c), if the VAE is given them.
        """
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(*self.context("prior", given)))
            return pyro.sample("x", self.decode(z, x, mask, size_factor, **given), obs=x)

    def decode(
        self, z: Tensor, x: Tensor, mask: Tensor | None = None, size_factor: Tensor | None = None, **others: Tensor
    ) -> Any:
        """Likelihood p(x|z) with what its family takes from the batch: size factors, or the totals of the rows of x."""
        taken: dict[str, Any] = {}
        if "size_factor" in self.likelihood.family.takes:
            taken["size_factor"] = size_factor
        if "total" in self.likelihood.family.takes:
            taken["total"] = x.sum(-1)
        return self.likelihood(z, *self.context("likelihood", others), mask=mask, **taken)

    def guide(self, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None, **given: Tensor) -> Tensor:
        """Draw z from the approximate posterior; the arguments are those of `model`."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.approximate(x, mask, index, **given))

    def approximate(self, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None, **given: Tensor) -> Any:
        """Approximate posterior q(z|x), of batch shape (n,)."""
        if self.posterior.wants != "index":
            return self.posterior(x, *self.context("posterior", given), observed=mask)
        if index is None:
            raise ValueError(
                "Expected `index`, the number of each datum in its data set, for a posterior on a Table; got none."
            )
        return self.posterior(index)

    @property
    def table_rows(self) -> int | None:
        """How many data the posterior's `Table` has a row for; None for other networks."""
        return getattr(self.posterior.network, "rows", None) if self.posterior.wants == "index" else None

    def initialise(self, x: Any, mask: Any = None) -> "VAE":
        """Fit the starting point to data, which decides whether training works at all.

        The likelihood's output begins at the data's mean (for a Bernoulli the logit of the clipped mean), a
        `Normal`'s scale at the data's standard deviation; the guide's input is centred on the mean and divided by one
        number, the data's root mean square deviation, both kept as buffers. Columns with an encoding are each centred
        and scaled by themselves. Families that want to see the data, such as a prior of pseudo-inputs, see them.

        Args:
            x: data, shape (n, *x), or a batch dict.
            mask: boolean, as `x`; entries where it is false are missing.

        Returns:
            The VAE itself.

        Raises:
            ValueError: If the data do not fit, or a constant feature has a scale of its own.
        """
        batch = check_batch(self, numbered(self, as_batch(x if mask is None else {"x": x, "mask": mask})))
        data, seen = batch["x"], batch.get("mask")
        if self.given is not None:
            self.given.fit(batch)
        counts = data / batch["size_factor"].unsqueeze(-1) if "size_factor" in batch else data
        start = self.likelihood.family.fit_start(counts, seen)
        if hasattr(self.likelihood.network, "restart"):
            self.likelihood.network.restart(start)  # type: ignore[operator]
        if self.posterior.encoding is not None:
            self.posterior.encoding.fit(data.flatten(1), None if seen is None else seen.flatten(1))
        elif isinstance(self.posterior.network, Amortized):
            loc, scale = moments(data, seen)
            spread = scale.square().mean().sqrt()
            shift, unit = loc.flatten(), torch.where(spread > 0, spread, 1.0)
            if given := self.context("posterior", batch):
                unit = nn.functional.pad(unit.expand(len(shift)), (0, given[0].shape[1]), value=1.0)
                shift = nn.functional.pad(shift, (0, given[0].shape[1]))
            self.posterior.network.centre(shift, unit)
        for part in (self.prior, self.likelihood, self.posterior):
            part.family.observe(data, seen)
        return self

    def given_batch(self, given: Any, n: int) -> dict[str, Tensor]:
        """What the caller gives for n data, as entries of a batch."""
        if self.given is not None:
            return self.given.batch(given, n)
        if given is not None:
            raise ValueError(f"Expected nothing `given` to a VAE that is not conditioned; got {given!r}.")
        return {}

    @torch.no_grad()
    def sample(self, n: int, *, given: Any = None, seed: int = 0) -> Tensor:
        """Draw n data from the model, shape (n, *x).

        Args:
            n: how many.
            given: what a conditional VAE depends on, as a dict by name or the entry alone: a label, or one per draw.
            seed: of the draws.
        """
        device, _ = device_and_dtype(self)
        with mode(self), fork_rng(seed, device=device):
            batch = self.given_batch(given, n)
            z = self.prior(*self.context("prior", batch)).expand([n]).sample()
            return self.likelihood(z, *self.context("likelihood", batch)).sample()

    @torch.no_grad()
    def reconstruct(self, x: Any, *, given: Any = None, seed: int = 0) -> Tensor:
        """Mean of p(x|z) at one draw of z from q(z|x), shape (n, *x).

        Args:
            x: data, shape (n, *x), or a batch dict.
            given: what to decode with in place of what the batch gives: this datum's z, that label.
            seed: of the draw.
        """
        batch = check_batch(self, as_batch(x))
        device, _ = device_and_dtype(self)
        with mode(self), fork_rng(seed, device=device):
            z = self.approximate(**batch_of(self.guide, batch)).sample()
            batch |= {} if given is None else self.given_batch(given, len(z))
            return self.decode(z, **{key: value for key, value in batch.items() if key != "mask"}).mean  # type: ignore[no-any-return]

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse data that do not fit: their shape, or values outside the likelihood's support."""
        x, mask = batch["x"], batch.get("mask")
        family = self.likelihood.family
        if "size_factor" in batch and "size_factor" not in family.takes:
            raise ValueError(
                f"Expected no `size_factor` beside a {type(family).__name__} likelihood, which has no use for it. "
                "Leave it out, or choose a family of counts, such as NegativeBinomial."
            )
        if x.shape[1:] != family.event_shape:
            raise ValueError(
                f"Expected data of shape (n, {', '.join(map(str, family.event_shape))}); got {tuple(x.shape)}."
            )
        check_support("x", family.support, x, mask, type(family).__name__)
        if self.given is not None:
            self.given.check(batch)
        rows = self.table_rows
        if rows is not None and not bool(((batch["index"] >= 0) & (batch["index"] < rows)).all()):
            raise ValueError(
                f"Expected data whose index is below the table's {rows} rows; got {int(batch['index'].max())}. "
                "A Table knows the data it was fitted to, no others: use a Linear or MLP network for new data."
            )


def check_support(site: str, support: Any, x: Tensor, mask: Tensor | None, family: str) -> None:
    """Refuse data outside a likelihood's support, naming the first such value and what to do."""
    step = rows_within(x[:1].numel(), AT_ONCE)
    seen = itertools.repeat(None) if mask is None else mask.split(step)
    parts = [_outside(support, *pair) for pair in zip(x.split(step), seen, strict=False)]
    if not any(count for count, _ in parts):
        return
    number = next(number for number, (count, _) in enumerate(parts) if count)
    row, *rest = parts[number][1]
    first, outside = [row + number * step, *rest], sum(count for count, _ in parts)
    remedy = "Choose a likelihood whose support holds the data."
    if family == "Bernoulli":
        remedy = (
            'Binarise the data (binarization = "dynamic", "static" or "threshold"), or choose a likelihood for real '
            "numbers, such as Normal."
        )
    words = describe_support(support.of(first[-1]) if hasattr(support, "of") else support)
    place = f"row {first[0]}" + (f", column {', '.join(map(str, first[1:]))}" if first[1:] else "")
    raise ValueError(
        f"Expected data in the support of {family}, {words}, at site '{site}'; got "
        f"{x[tuple(first)].flatten()[0].item():g} at {place} "
        f"and {outside} such values in all. {remedy}"
    )


def _outside(support: Any, x: Tensor, mask: Tensor | None) -> tuple[int, list[int]]:
    """How many entries of some rows lie outside a support, and where the first of them is."""
    inside = support.check(x)
    if mask is not None and mask.shape == inside.shape:
        inside = inside | ~mask
    if bool(inside.all()):
        return 0, []
    return int((~inside).sum()), (~inside).nonzero()[0].tolist()
