r"""Predictive checks: whether data drawn from a fitted model look like the real ones, one statistic at a time.

Each of some sets of draws is as large as the data. Latent variables of each datum are drawn from the prior, as those of
new data are; where the whole data set counts as one datum they are drawn from the guide, and the check is that by the
posterior predictive distribution (Posterior Predictive Assessment of Model Fitness via Realized Discrepancies, Gelman,
Meng and Stern 1996). On held-out data the p-values of the former are uniform if the model is right; those of the latter
lie nearer to one half, since the data are used twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae.programs.target import Target

_ENTRIES = 2**22  # numbers that are drawn at a time
_FAR = 4.0  # standard deviations of the draws
_SITES = 8  # observed sites up to which each has statistics of its own, as the steps of a sequence have not
_CODES = 50  # whose shares are compared


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of data and of draws.

    Args:
        names: of the s statistics.
        observed: of the data, (s,).
        drawn: of each set of draws, (k, s).
        n: the number of data.
    """

    names: list[str]
    observed: Tensor
    drawn: Tensor
    n: int

    @property
    def p_values(self) -> Tensor:
        """Twice the share of sets whose statistic is as far out as the data's, on the rarer side, (s,)."""
        return (2 * self._side).clamp(max=1.0)

    @property
    def error(self) -> Tensor:
        """Monte Carlo standard error of `p_values`, (s,)."""
        return 2 * (self._side * (1 - self._side) / len(self.drawn)).sqrt()

    @property
    def _side(self) -> Tensor:
        sides = torch.stack([(self.drawn >= self.observed).sum(0), (self.drawn <= self.observed).sum(0)])
        return (1 + sides.amin(0)).double() / (1 + len(self.drawn))

    @property
    def off(self) -> Tensor:
        """Whether the data's statistic lies outside all sets, over 4 of their standard deviations away, (s,)."""
        away = (self.observed - self.drawn.mean(0)).abs() > _FAR * self.drawn.std(0)
        return away & ((self.observed < self.drawn.amin(0)) | (self.observed > self.drawn.amax(0)))

    def summary(self) -> dict[str, Any]:
        """The figures of each statistic, those furthest out first."""
        columns = {"observed": self.observed, "low": self.drawn.amin(0), "high": self.drawn.amax(0)}
        columns |= {"p_value": self.p_values, "error": self.error, "off": self.off}
        away = ((self.observed - self.drawn.mean(0)).abs() / self.drawn.std(0)).nan_to_num(0.0)
        order = away.argsort(descending=True, stable=True).tolist()
        rows = [{"name": self.names[j], **{key: each[j].item() for key, each in columns.items()}} for j in order]
        return {"n": self.n, "draws": len(self.drawn), "statistics": rows}


@torch.no_grad()
def predictive_check(
    program: Any,
    x: Any = None,
    *,
    draws: int = 200,
    names: Sequence[str] | None = None,
    units: Callable[[Tensor], Tensor] | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> PredictiveCheck:
    """Compare mean, standard deviation (sd), extremes and share of zeros of data with those of sets of draws.

    Statistics are of all entries that an observed site has, of all sites together if there are more than eight, or of
    each column where these have names; where the data have two values only, the mean is all. Entries that are missing
    or hidden by the site's own mask are left out, and statistics that are the same in all draws and the data. Of sites
    with Categorical distributions the share of each code is compared instead.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        draws: sets of draws.
        names: of the columns of the site `x`.
        words: of the columns whose codes stand for words, by name; theirs are the shares of each word.
        units: turns rows of the site `x`, (m, x), into the units that the statistics are to be in.
        seed: of the draws; the global random state is left alone.

    Raises:
        ValueError: If there are fewer than two draws, or the program observes nothing that it could draw.
    """
    words = dict(words or {})
    target, draws = Target.of(program, x), check_int("draws", draws, 2)
    entries = sum(value.numel() for value in target.batch.values())
    size, nodes = max(1, _ENTRIES // max(entries, 1)), target.replay(seed)[0].nodes
    real: Any = {name: nodes[name] for name in target.structure.observed}
    real = {name: node["value"] for name, node in real.items() if _is_drawn(node)}
    if not real:
        raise ValueError(
            "Expected a program that observes what it could draw; its observed sites are factors, or their "
            "distributions have fewer entries than the data."
        )
    many, seen = len(real) > _SITES, {name: _seen(nodes[name], target.batch.get("mask")) for name in real}
    words |= (
        {} if many else {name if len(real) > 1 else "": _codes(nodes[name]) for name in real if _codes(nodes[name])}
    )
    if many:
        seen = {"": torch.cat([each.flatten() for each in seen.values()])}

    def statistics(values: dict[str, Tensor], k: int) -> tuple[dict[str, bool], Tensor]:
        told: dict[str, bool] = {}
        if many:
            values = {"": torch.cat([value.reshape(k, -1) for value in values.values()], 1)}
        columns = []
        for name, value in values.items():
            rows = value.double().reshape(k, *seen[name].shape)
            named = names if name == "x" and rows.dim() == 3 and names is not None else None
            if named is not None and units is not None:
                rows = units(rows.flatten(0, 1)).reshape(rows.shape)
            rows = rows.masked_fill(~seen[name], math.nan)
            each = rows.flatten(1, -2) if named is not None else rows.reshape(k, -1, 1)
            titles = named or ([name] if len(values) > 1 else [""])
            found, coded = _statistics(each), [title in words for title in titles]
            plain = [k > 1 or len(column[~column.isnan()].unique()) > 2 for column in each[0].T]
            for what in found:
                names_of = [f"{what} of {title}" if title else what for title in titles]
                kept = [not c and (what == "mean" or p) for c, p in zip(coded, plain, strict=True)]
                told |= dict(zip(names_of, kept, strict=True))
            columns += [column.reshape(k, -1) for column in found.values()]
            for title, column in zip(titles, each.unbind(-1), strict=True):
                for code, word in enumerate(words.get(title, ())):
                    told[f"share of {word}" + (f" in {title}" if title else "")] = code > 0 or len(words[title]) > 2
                    columns.append(_share(column, code).unsqueeze(-1))
        return told, torch.cat(columns, 1).cpu()

    parts = []
    for number, some in enumerate(torch.arange(draws).split(size)):
        with target.running(seed, "predictive", number):
            if target.structure.whole:
                traced: Any = target.predict(target.trace("guide", len(some)), len(some)).nodes
            else:
                traced = target.trace("model", len(some), poutine.uncondition).nodes
        parts.append(statistics({name: traced[name]["value"] for name in real}, len(some))[1])
    titles, own = statistics(real, 1)
    drawn = torch.cat(parts)
    told = drawn.isfinite().all(0) & own[0].isfinite() & (drawn != own).any(0) & torch.tensor([*titles.values()])
    kept = [title for title, kept in zip(titles, told.tolist(), strict=True) if kept]
    return PredictiveCheck(kept, own[0][told], drawn[:, told], target.n)


def _codes(node: Any) -> tuple[str, ...]:
    """The codes of a site with a Categorical distribution, the first `_CODES` of them; none of another."""
    fn = node["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return tuple(map(str, range(min(fn.param_shape[-1], _CODES)))) if isinstance(fn, dist.Categorical) else ()


def _is_drawn(node: Any) -> bool:
    """Whether draws of an observed site are data: it is no factor, and no entry of its distribution stands for more."""
    fn = node["fn"]
    return not isinstance(fn, dist.Unit) and math.prod(fn.batch_shape + fn.event_shape) == node["value"].numel()


def _seen(node: Any, mask: Tensor | None) -> Tensor:
    """Which entries of an observed site count: those that neither the batch's mask nor the site's own hides."""
    shape, own = node["value"].shape, node["mask"]
    seen = torch.ones(shape, dtype=torch.bool, device=node["value"].device)
    if isinstance(own, Tensor):
        seen = seen & own.reshape(own.shape + (1,) * len(node["fn"].event_shape))
    return seen if mask is None or mask.shape != shape else seen & mask


def _statistics(rows: Tensor) -> dict[str, Tensor]:
    """Of rows (k, m, c) over m, each (k, c); NaN entries are left out."""
    there = ~rows.isnan()
    mean = rows.nanmean(1)
    spread = (rows - mean.unsqueeze(1)).square().nanmean(1).sqrt()
    low = rows.masked_fill(~there, math.inf).amin(1)
    found = {"mean": mean, "sd": spread, "smallest": low}
    return {**found, "largest": rows.masked_fill(~there, -math.inf).amax(1), "share of zeros": _share(rows, 0)}


def _share(rows: Tensor, value: int) -> Tensor:
    """The share of entries with this value, over the second dim; NaN entries are left out."""
    return (rows == value).double().sum(1) / (~rows.isnan()).sum(1).clamp_min(1)
