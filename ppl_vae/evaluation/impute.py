r"""Imputation: draws of missing entries from :math:`p(x_{mis} \mid x_{obs})`."""

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fold_in
from ppl_vae.data.columns import Columns
from ppl_vae.evaluation.evidence import Evidence, estimate_evidence
from ppl_vae.evaluation.weights import Draws, block_size
from ppl_vae.families.distributions import draw_hidden
from ppl_vae.programs.target import Target

_CODED = ("binary", "category", "ordered")


@dataclass(frozen=True)
class Imputation:
    """Draws of the missing entries of each datum.

    Args:
        draws: the data, missing entries drawn and the others as they are, shape (draws, n, *x).
        mask: True where observed, shape (n, *x).
        evidence: of the observed entries of each datum, with the tail shape `pareto_k` and the effective sample size
            `ess` of the weights that the draws are resampled by, (n,) each. Above a `pareto_k` of 0.7 do not rely on
            the draws of a datum.
    """

    draws: Tensor
    mask: Tensor
    evidence: Evidence

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, shape (n, *x); observed entries as they are."""
        return torch.where(self.mask, self.draws[0], self.draws.double().mean(0).to(self.draws))

    @property
    def sd(self) -> Tensor:
        """Standard deviation of the draws, shape (n, *x); 0 of observed entries."""
        return torch.where(self.mask, 0.0, self.draws.double().std(0, correction=0).to(self.draws))

    @property
    def error(self) -> Tensor:
        r"""Monte Carlo error of `mean`, (n, *x): :math:`\mathrm{sd} \sqrt{1/\mathrm{draws} + 1/\mathrm{ess}}`."""
        each = (1 / len(self.draws) + 1 / self.evidence.ess).sqrt().to(self.draws)
        return self.sd * each.reshape(-1, *(1,) * (self.mask.dim() - 1))

    def quantile(self, q: float) -> Tensor:
        """Quantile of the draws, shape (n, *x), linear between two of them.

        Raises:
            ValueError: If `q` is not from 0 to 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"Expected `q` from 0 to 1; got {q!r}.")
        place = q * (len(self.draws) - 1)
        ordered, below = self.draws.sort(0).values, int(place)
        above = min(below + 1, len(self.draws) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    def completed(self, columns: Columns | None = None) -> Tensor:
        """The data with one value in each missing place, (n, *x): the mean, or the most frequent code of words.

        Args:
            columns: of the data; without them every column counts as numbers.
        """
        filled = self.mean
        for j, kind in enumerate((columns and columns.kinds) or ()):
            if kind in _CODED:
                filled[..., j] = self.draws[..., j].mode(0).values
        return filled


@torch.no_grad()
def impute(program: Any, x: Any = None, samples: int = 1000, *, draws: int = 100, seed: int = 0) -> Imputation:
    r"""Draw missing entries from :math:`p(x_{mis} \mid x_{obs})`, by importance resampling from the guide.

    Latent variables :math:`z_i \sim q(z \mid x_{obs})` are resampled by their weights
    :math:`p(z_i)\, p(x_{obs} \mid z_i) / q(z_i \mid x_{obs})`, those of the evidence, and the missing entries drawn
    from :math:`p(x_{mis} \mid x_{obs}, z)`: from the likelihood where its entries are independent given z, from the
    conditional normal under a full or low-rank covariance, within mixtures by component. A datum without any observed
    entry is drawn from the marginal, p(x).

    The draws hold if entries are missing at random: given the observed ones, whether an entry is missing does not
    depend on its value.

    Args:
        program: any program whose likelihood is masked entry by entry, or a `Target`.
        x: a batch dict with `mask` (True is observed); none beside a `Target`.
        samples: draws of the latent variables per datum, by which the weights are judged.
        draws: of the missing entries.
        seed: of all draws; the global random state is left alone.

    Returns:
        The draws, with the evidence of the observed entries, which is what `log_evidence` returns.

    Raises:
        ValueError: If the batch has no `mask`, the whole data set counts as one datum, latent sites are enumerated, the
            likelihood is not masked entry by entry as the batch says, or the model gives the observed entries of some
            datum no density.

    References:
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets (Mattei and Frellsen 2019), section 3.

    Example:
        >>> import torch
        >>> from ppl_vae import PPCA
        >>> from ppl_vae.data import mask_missing
        >>> x = torch.tensor([[2.0, 1.9], [-2.0, -2.1], [1.0, 1.2], [-1.0, -1.0]])
        >>> impute(PPCA.fit(x, 1).to_vae(), mask_missing([[3.0, float("nan")]])).mean[0, 1] > 2
        tensor(True)
    """
    target, draws = Target.of(program, x), check_int("draws", draws)
    if "mask" not in target.batch or "x" not in target.batch:
        raise ValueError(
            "Expected a batch with `mask` (True is observed), for a model that takes it, to tell which entries of `x` "
            "to draw; got none. ppl_vae.data.mask_missing(x) reads it off NaN."
        )
    if target.structure.whole or target.structure.sequential:
        raise ValueError("Expected a program of independent data that runs with particles, for imputation.")
    if names := target.structure.enumerated:
        raise ValueError(f"Expected latent sites that the guide draws, for imputation; got '{names[0]}', summed out.")
    pools: dict[int, _Pool] = {}

    def look(number: int, some: Draws) -> None:
        if number not in pools:
            pools[number] = _Pool(draws, fold_in(seed, "impute", number), target.device)
        pools[number].add(some)

    evidence = estimate_evidence(target, samples, seed, None, look)
    if not bool(evidence.log_evidence.isfinite().all()):
        row = int((~evidence.log_evidence.isfinite()).nonzero()[0])
        raise ValueError(f"Expected observed entries that the model gives a density; got none in row {row}, from 0.")
    parts = [_fill(block, pools[number].z, (seed, number)) for number, block in enumerate(target.blocks())]
    return Imputation(torch.cat(parts, 1), target.batch["mask"], evidence)


class _Pool:
    """Draws of the latent variables of a block, resampled by their weights as they come."""

    z: Tensor  # (draws, n, z)

    def __init__(self, draws: int, seed: int, device: torch.device) -> None:
        self.draws, self.total = draws, torch.tensor(-torch.inf, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def add(self, some: Draws) -> None:
        z, total = some.moments()[0], some.weights.logsumexp(0)
        shares = (some.weights - total).exp().nan_to_num(1.0)  # where no weight is above 0, which is refused later
        chosen = torch.multinomial(shares.T, self.draws, replacement=True, generator=self.generator).T
        new = z.take_along_dim(chosen.unsqueeze(-1), 0)
        both = torch.logaddexp(self.total, total)
        uniform = torch.rand(chosen.shape, generator=self.generator, dtype=total.dtype, device=total.device)
        taken = (uniform.log() < total - both).unsqueeze(-1)
        self.z = torch.where(taken, new, self.z) if hasattr(self, "z") else new
        self.total = both


def _fill(target: Target, z: Tensor, key: tuple[int, ...]) -> Tensor:
    """Data with their missing entries drawn at latent vectors (k, n, z), shape (k, n, *x)."""
    x, mask = target.batch["x"], target.batch["mask"]
    places, parts = _locate(target), []
    for number, some in enumerate(z.split(block_size(target))):
        values = target.unflatten(some)
        filled = x.expand(len(some), *x.shape).flatten(1).clone()
        with target.running(*key, "impute", number):
            trace = target.trace("model", len(some), values=values)
            for name, place in places.items():
                node: Any = trace.nodes[name]
                shape = node["fn"].batch_shape + node["fn"].event_shape  # (k, *plates, n, *event)
                seen = mask.flatten()[place].reshape(shape[1:]).expand(shape)
                value = node["value"].reshape(shape[1:]).expand(shape)
                new = torch.where(seen, value, _draw(name, node, value, seen))
                filled[:, place.flatten()] = new.flatten(1)
        parts.append(filled.unflatten(1, x.shape))
    return torch.cat(parts)


def _draw(name: str, node: Any, value: Tensor, seen: Tensor) -> Tensor:
    try:
        if isinstance(node["mask"], Tensor) and not node["fn"].event_shape:
            if torch.equal(node["mask"].expand(seen.shape), seen):
                return node["fn"].sample().expand(value.shape)  # type: ignore[no-any-return]
        return value if bool(seen.all()) else draw_hidden(node["fn"], value, seen)
    except NotImplementedError:
        raise ValueError(
            f"Expected site '{name}' to be masked entry by entry as `mask` says, so that missing entries can be drawn "
            f"given the others; got a {type(node['fn']).__name__} that is not. Use dist.Normal(...).mask(mask)"
            ".to_event(1) or the like, or a family of ppl_vae."
        ) from None


def _locate(target: Target) -> dict[str, Tensor]:
    """Which entries of `x` each site observes, found by observing their numbers; those that observe others are left.

    Raises:
        ValueError: If an entry is observed by no site or by two.
    """
    x = target.batch["x"]
    numbers = torch.arange(x.numel(), device=x.device).to(x.dtype).reshape(x.shape) + 0.25  # as no label is
    full = {**target.batch, "x": numbers, "mask": torch.ones_like(target.batch["mask"])}
    found = {}
    with target.running(0), pyro.validation_enabled(False):
        nodes: Any = target.with_batch(full).trace("model", 1).nodes
    for name in target.structure.observed:
        place = (nodes[name]["value"].double() - 0.25).round().long()
        if torch.equal((place + 0.25).to(x.dtype), nodes[name]["value"].to(x.dtype)):
            found[name] = place
    every = torch.cat([place.flatten() for place in found.values()]) if found else numbers.new_zeros(0)
    if len(every) != x.numel() or len(every.unique()) != len(every):
        raise ValueError(
            "Expected a model that observes each entry of `x` at one site and as it is, for imputation; this one "
            "transforms them before, or observes only some."
        )
    return found
