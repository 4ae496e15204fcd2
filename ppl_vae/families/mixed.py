"""Tables of mixed columns: one family per column or block of columns."""

import importlib
import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.data.columns import Columns
from ppl_vae.families.distributions import draw_hidden
from ppl_vae.families.family import Family
from ppl_vae.networks.encoding import Word

Kinds = Literal["infer"] | dict[str, str | dict[str, Any]]
INFERRED = {
    "real": "Normal",
    "positive": "LogNormal",
    "unit": "Beta",
    "count": "NegativeBinomial",
    "binary": "Bernoulli",
    "category": "Categorical",
    "ordered": "OrderedCategorical",
}


class Mixed(Family):
    """A table of mixed columns, which are independent given the parameters; each is of a family of its own.

    Args:
        event: The number of columns.
        columns: Their names, kinds and numbers of levels.
        kinds: The family of each column, by its name, or by a pattern such as `gene_*` for a block of columns: its
            name, or a table of its name and keys, `{family = "Normal", scale = "feature"}`. The first that matches
            counts. Columns without a name are called by their number from 0. `infer` takes the family that suits the
            kind of each column: Normal for `real`, LogNormal for `positive`, Beta for `unit`, NegativeBinomial for
            `count`, Bernoulli for `binary`, Categorical for `category`, OrderedCategorical for `ordered`.

    Raises:
        ValueError: If a family or one of its keys is unknown, a column has none, or a pattern matches no column.
    """

    def __init__(self, event: int | tuple[int, ...], columns: Columns, *, kinds: Kinds = "infer") -> None:
        super().__init__(event)
        names = columns.names or tuple(map(str, range(columns.count)))
        if self._vector() != len(names):
            raise ValueError(f"Expected {len(names)} columns, as the data have; got {self._vector()}.")
        levels = columns.levels or (0,) * len(names)
        self.assigned = _infer(names, columns) if kinds == "infer" else _assign(names, kinds)
        blocks: dict[str, list[int]] = {}
        for column, name in enumerate(names):
            blocks.setdefault(repr(self.assigned[name]), []).append(column)
        parts = [_part(self.assigned[names[block[0]]], [levels[j] for j in block]) for block in blocks.values()]
        self.parts = nn.ModuleList(parts)
        self.reparameterised = False
        for number, block in enumerate(blocks.values()):
            self.register_buffer(f"columns_{number}", torch.tensor(block), persistent=False)
        self.blocks = list(blocks.values())
        self.support = self.entries = ByColumn([part.support for part in parts], self.blocks)
        order = sorted((column, word) for block, part in zip(self.blocks, parts, strict=True)
                       for column, word in zip(block, part.encodings, strict=True))  # fmt: skip
        self._words: list[Word] = [word if word != "plain" else "standardise" for _, word in order]
        self.levels = tuple(levels)

    @property
    def encodings(self) -> list[Word]:
        return list(self._words)

    @property
    def takes(self) -> tuple[str, ...]:
        return ("size_factor",) if any("size_factor" in part.takes for part in self._families()) else ()

    def start(self) -> Tensor:
        return torch.cat([part.start() for part in self._families()])

    def fit_start(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.cat([
            part.fit_start(x[..., block], None if mask is None else mask[..., block])
            for part, block in zip(self._families(), self.blocks, strict=True)
        ])  # fmt: skip

    def distribution(
        self, parameters: Tensor, mask: Tensor | None = None, *, size_factor: Tensor | None = None
    ) -> TorchDistribution:
        widths = [part.start().numel() for part in self._families()]
        each = []
        for number, (part, raw) in enumerate(zip(self._families(), parameters.split(widths, -1), strict=True)):
            seen = None if mask is None else mask[..., self.get_buffer(f"columns_{number}")]
            given = {"size_factor": size_factor} if "size_factor" in part.takes else {}
            each.append(part.distribution(raw, seen, **given))
        return ByColumns(each, [self.get_buffer(f"columns_{number}") for number in range(len(each))], self.entries)

    def _families(self) -> list[Any]:
        return list(self.parts)


class ByColumn(constraints.Constraint):
    """The support of each column; `check` tells it of every entry."""

    event_dim = 0
    words = "what each column's family takes"

    def __init__(self, supports: Sequence[Any], blocks: Sequence[Sequence[int]]) -> None:
        self.supports, self.blocks = supports, blocks
        discrete = [(column, s.is_discrete) for s, block in zip(supports, blocks, strict=True) for column in block]
        self.discrete = tuple(is_discrete for _, is_discrete in sorted(discrete))
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        """Whether every column is."""
        return all(self.discrete)

    def of(self, column: int) -> Any:
        """Support of one column."""
        return next(s for s, block in zip(self.supports, self.blocks, strict=True) if column in block)

    def check(self, value: Tensor) -> Any:
        inside = torch.ones_like(value, dtype=torch.bool)
        for support, block in zip(self.supports, self.blocks, strict=True):
            there = support.check(value[..., block])
            inside[..., block] = there if there.dim() == value.dim() else there.unsqueeze(-1)
        return inside


class ByColumns(TorchDistribution):
    """Independent distributions of blocks of columns, side by side in their own order."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, parts: Sequence[Any], blocks: Sequence[Tensor], entries: ByColumn) -> None:
        self.parts, self.blocks, self.entries = list(parts), list(blocks), entries
        batch = torch.broadcast_shapes(*(part.batch_shape for part in parts))
        super().__init__(batch, torch.Size([sum(map(len, blocks))]), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(self.entries, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ByColumns":
        return ByColumns([part.expand(torch.Size(batch_shape)) for part in self.parts], self.blocks, self.entries)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([
            part.log_prob(value[..., block]) for part, block in zip(self.parts, self.blocks, strict=True)
        ]).sum(0)  # fmt: skip

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._joined([part.sample(torch.Size(sample_shape)) for part in self.parts])

    def draw_hidden(self, value: Tensor, seen: Tensor) -> Tensor:
        """Draw hidden entries given the others, as the function of this name."""
        pairs = zip(self.parts, self.blocks, strict=True)
        return self._joined([draw_hidden(part, value[..., block], seen[..., block]) for part, block in pairs])

    @property
    def mean(self) -> Tensor:
        return self._joined([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        return self._joined([part.variance for part in self.parts])

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        """Put the columns of all parts into their own order."""
        shape = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
        wide = torch.cat([value.expand(*shape, value.shape[-1]) for value in values], -1)
        return wide[..., torch.cat(self.blocks).argsort()]


def _infer(names: Sequence[str], columns: Columns) -> dict[str, Any]:
    if columns.kinds is None:
        raise ValueError(
            'Expected columns whose kinds are known, for kinds = "infer": a table; got data of '
            f"{columns.count} features without kinds. List the family of each column."
        )
    return {name: INFERRED[kind] for name, kind in zip(names, columns.kinds, strict=True)}


def _assign(names: Sequence[str], kinds: dict[str, Any]) -> dict[str, Any]:
    """Family of each column, by the first pattern that matches its name."""
    assigned = {}
    for name in names:
        pattern = name if name in kinds else next((key for key in kinds if fnmatchcase(name, key)), None)
        if pattern is None:
            raise ValueError(f"Expected a family for each column; got none for {name!r} in `kinds`.")
        assigned[name] = kinds[pattern]
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    for key in kinds:
        if not any(name == key or fnmatchcase(name, key) for name in names):
            raise ValueError(f"Expected the name of a column in `kinds` ({known}); got {key!r}.")
    return assigned


def _part(kind: str | dict[str, Any], levels: list[int]) -> Family:
    """Family of a block of columns."""
    keys = dict(kind) if isinstance(kind, dict) else {"family": kind}
    name, package = keys.pop("family", None), importlib.import_module(__package__)
    made = getattr(package, name) if isinstance(name, str) and name in package.__all__ else None
    takes = inspect.signature(made).parameters if made else {}
    if made is None or set(takes) & {"columns", "prior", "likelihood", "posterior"} or name == "Multinomial":
        raise ValueError(f"Expected the name of a family of columns in `kinds`, such as Normal; got {name!r}.")
    if strange := keys.keys() - {key for key, p in takes.items() if p.kind is p.KEYWORD_ONLY}:
        raise ValueError(f"Expected keys of {name} in `kinds`; got the unknown {', '.join(sorted(strange))}.")
    if "levels" in takes and min(levels) < 2:
        raise ValueError(
            f"Expected a column of codes 0, 1, ... for {name} in `kinds`; got one whose values are no such codes."
        )
    return made(len(levels), tuple(levels), **keys) if "levels" in takes else made(len(levels), **keys)  # type: ignore[no-any-return]
