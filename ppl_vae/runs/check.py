"""The check of a spec before training: its sites, its parameters, and the work to come."""

import inspect
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.data.batches import AT_ONCE, check_observed, rows_within
from ppl_vae.data.loading import Data
from ppl_vae.data.memory import as_data
from ppl_vae.evaluation.evidence import log_weights
from ppl_vae.infer.objectives import make_objective
from ppl_vae.infer.svi import OBJECTIVE, SETTINGS, check_settings, fit, parts_of
from ppl_vae.programs.target import BLOCK, Target
from ppl_vae.programs.vae import VAE
from ppl_vae.reports.measures import evaluation_split

_LOOKS = {
    "id": ("id", "counts the rows; if so,"),
    "label": ("label", "looks like a label; if so,"),
    "constant": ("leave_out", "constant in the training part; to leave out,"),
}
_SPARE = "{} rows are held out and not used, since the whole data set is one datum; --set data.test_fraction=0"
TRIED = 100  # data that the program is run on


@dataclass(frozen=True)
class Check:
    """What `Spec.check` reports; `str` writes it as text.

    Args:
        data: name of the data.
        n_train: number of training data.
        features: columns of `x`.
        columns: kind and role of each column of a table, such as `count feature`.
        hints: what looks wrong with a column, and the `--set` that mends it.
        missing: the columns with missing entries, and what becomes of these; empty if there are none.
        latents: event shape of each latent site, in the model's order.
        observed: event shape of each observed site.
        enumerated: shape of each latent site that is summed out.
        kl: whether the objective takes the KL term of each latent site `analytic` or `sampled`.
        parameters: number of parameters of each part.
        epochs: passes over the data.
        steps: optimiser steps in all.
        memory: rough estimate of the bytes that training takes, beyond the libraries themselves.
        whole: whether the whole data set counts as one datum.
    """

    data: str
    n_train: int
    features: int
    columns: dict[str, str]
    hints: list[str]
    missing: str
    latents: dict[str, tuple[int, ...]]
    observed: dict[str, tuple[int, ...]]
    enumerated: dict[str, tuple[int, ...]]
    kl: dict[str, str]
    parameters: dict[str, int]
    epochs: int
    steps: int
    memory: int
    whole: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lead = () if self.whole else ("n",)
        sites = [f"{name} {(*lead, *shape)} latent, KL {self.kl[name]}" for name, shape in self.latents.items()]
        sites += [f"{name} {(*lead, *shape)} enumerated" for name, shape in self.enumerated.items()]
        sites += [f"{name} {(*lead, *shape)} observed" for name, shape in self.observed.items()]
        whole = ", which count as one datum together" if self.whole else ""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        groups: dict[str, list[str]] = {}
        for name, what in self.columns.items():
            groups.setdefault(what, []).append(name)
        listed = [f"{what}: {', '.join(names[:20])}{', ...' * (len(names) > 20)}" for what, names in groups.items()]
        return "\n".join(
            [
                f"data        {self.data}: {self.n_train:,} data for training, of {self.features} features{whole}",
                *([f"columns     {'; '.join(listed)}"] if listed else []),
                *(f"look        {hint}" for hint in self.hints),
                *([f"missing     {self.missing}"] if self.missing else []),
                f"sites       {'; '.join(sites)}".replace("'n'", "n").replace(",)", ")"),
                f"parameters  {counts or 'none'}; {sum(self.parameters.values()):,} in all",
                f"to come     {self.steps:,} steps in {self.epochs:,} epochs",
                f"memory      about {max(self.memory / 2**20, 0.1):.1f} MiB",
            ]
        )


def check_program(program: Any, x: Any, **settings: Any) -> Check:
    """Try all that a first step and the evaluation need, under Pyro's validation; nothing is trained.

    Args:
        program: any program.
        x: its `Data`; or training data alone, a tensor (n, *x) or a batch dict.
        settings: those of `fit`.

    Raises:
        TypeError: If `fit` has no such setting.
        ValueError: If data, program and objective do not fit, or the program cannot score the sizes of batches that
            the evaluation takes.

    Example:
        >>> from ppl_vae import PPCA, check_program
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> check_program(PPCA.fit(x, 1).to_vae(), x, epochs=10).steps
        10
    """
    data, known = x if isinstance(x, Data) else as_data(x), inspect.signature(fit)
    known.bind(program, data, **settings)
    svi = SimpleNamespace(**{name: p.default for name, p in known.parameters.items()} | settings)
    check_settings(**{key: getattr(svi, key) for key in SETTINGS})
    name, part = ("train", None) if x is not data else evaluation_split(program, data)
    parts = [part, data.validation, data.train] if name == "test" else [data.validation, data.train]
    parts = [part for part in parts if part is not None]
    check_observed(data.train, data.row_numbers["train"])
    target = Target(program, parts[-1])
    sites, rows = target.structure, len(next(iter(data.train.values())))
    if sites.whole and data.validation is not None:
        raise ValueError(
            "Expected no validation data, since the whole data set counts as one datum of this program; got some. Try "
            "--set data.validation_fraction=0."
        )
    others = [Target(program, part) for part in parts[:-1] if part is not None]
    learned: list[Tensor] = [*program.parameters()] if isinstance(program, nn.Module) else []
    make_objective(target, learned, **{key: getattr(svi, key) for key in OBJECTIVE})
    if sites.rows is not None:
        raise ValueError(
            "Expected a guide that takes any part of the data, as a run evaluates them; this one keeps one row per "
            "datum, by its place in the batch. Take `index`, or use fit and log_evidence from Python."
        )
    parameters = dict(program.named_parameters()) if isinstance(program, nn.Module) else {}
    held = [*target.batch.values(), *parameters.values()]
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    with pyro.validation_enabled(True), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model, guide = target.rows(slice(TRIED)).traces(svi.particles, svi.seed)
        model.compute_log_prob()
        guide.compute_log_prob()
    _check_blocks(others[0] if name == "test" else target, svi.seed)
    for value in held:
        kept.pop(value.untyped_storage().data_ptr(), None)
    counts: Counter[str] = Counter()
    for name, value in parameters.items():
        counts[name.partition(".")[0]] += value.numel()
    nodes: Any = {**model.nodes, **guide.nodes}
    own = [node for name, node in nodes.items() if node["type"] == "param" and "$$$" not in name]
    counts.update({"pyro.param": sum(node["value"].numel() for node in own)} if own else {})
    gradients = 2 * sum(kept.values()) * min(svi.batch_size, target.n) // min(target.n, TRIED)
    spare = len(next(iter(data.test.values()))) if sites.whole else 0
    return Check(
        data=data.name,
        n_train=rows,
        features=data.features,
        columns=_columns(data),
        hints=[*column_hints(data), *([_SPARE.format(spare)] if spare else [])],
        missing=_missing(program, data),
        whole=sites.whole,
        latents={name: sites.shapes[name] for name in sites.latents},
        observed={name: sites.shapes[name] for name in sites.observed},
        enumerated={name: sites.shapes[name] for name in sites.enumerated},
        kl={name: kind if svi.elbo == "TraceMeanField_ELBO" else "sampled" for name, kind in sites.kl.items()},
        parameters=dict(counts),
        epochs=svi.epochs,
        steps=svi.epochs * (parts_of(target, svi.batch_size) if sites.whole else math.ceil(rows / svi.batch_size)),
        memory=sum(value.nbytes for value in held) + 3 * sum(value.nbytes for value in parameters.values()) + gradients,
    )


def _check_blocks(target: Target, seed: int) -> None:
    """Check that a program scores blocks of the sizes that evidence takes, the last of which may be a single datum."""
    sizes = {min(target.n, BLOCK), target.n % BLOCK or BLOCK} if target.structure.rows is None else {target.n}
    for size in sorted(sizes):
        try:
            with torch.no_grad():
                log_weights(target.rows(slice(size)), samples=2, seed=seed)
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"Expected a program that scores {size} data at once, as its evaluation asks; it failed: "
                f"{type(error).__name__}: {str(error).splitlines()[0]}. Take the number of data from the batch, and "
                "keep their dimension where there is one."
            ) from error


def _columns(data: Data) -> dict[str, str]:
    """Kind and role of each column of a table."""
    kinds, names = data.columns.kinds or (), data.columns.names or [f"column {j + 1}" for j in range(data.features)]
    return {name: f"{kind} feature" for name, kind in zip(names, kinds, strict=False)} | data.roles


def _missing(program: Any, data: Data) -> str:
    """The columns with missing entries in the training part, and what likelihood and guide make of these."""
    shares = data.columns.missing
    if shares is None:
        return ""
    names = data.columns.names or [f"column {j + 1}" for j in range(data.features)]
    some = [f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True) if share]
    listed = ", ".join(some[:20]) + ", ..." * (len(some) > 20)
    encoding = getattr(getattr(program, "posterior", None), "encoding", None)
    seen = "as 0, their columns' mean once standardised"
    if not isinstance(program, VAE):
        seen = "as the program says"
    elif encoding is not None and len(encoding.hidden):
        seen += ", and by an indicator of 1 for missing"
    return f"{listed or 'none in the training part'}; not in the likelihood; the guide sees them {seen}"


def column_hints(data: Data) -> list[str]:
    """What looks wrong with the columns of a table, and what mends it."""
    hints, columns = [], _columns(data)
    left = [name for name, role in data.roles.items() if role == "left out"]
    for look, (key, said) in _LOOKS.items():
        names = [name for name, like in data.suspects.items() if like == look]
        for group in [names] if key == "leave_out" and names else [[name] for name in names]:
            value = json.dumps([*left, *group] if key == "leave_out" else group[0])
            hints.append(f"{', '.join(group)}: {said} --set 'data.{key}={value}'")
    kept = [name for name, what in columns.items() if what in ("count feature", "unit feature")]
    if data.protocol["scaling"] == "standardize" and kept:
        hints.append(f"{', '.join(kept)}: as they are, since standardize scales no counts and no shares")
    if "x" not in data.train:
        return hints
    x, words = data.train["x"][: rows_within(data.features, AT_ONCE)].double(), data.columns.categories or {}
    x = torch.where(x.isnan(), x.nanmean(0), x)
    names = list(columns)[: data.features] or [f"column {j + 1}" for j in range(data.features)]
    steps, spread = torch.finfo(data.train["x"].dtype).eps * x.abs().amax(0), x.std(0, correction=0)
    for j in (steps > 1e-3 * spread).nonzero().flatten().tolist():
        if names[j] not in data.suspects and (spread[j] > 0 or columns):
            said = f"rounded to steps of {steps[j]:.2g}; subtract a constant, or --set 'data.scaling=standardize'"
            hints.append(f"{names[j]}: varies little for its size, {said}")
    codes = [names[j] for j in ((x.amin(0) == 1) & (x.amax(0) <= 5)).nonzero().flatten().tolist()]
    if codes := [name for name in codes if name in kept and name not in words]:
        value = json.dumps([*(name for name in words if words[name][0].isdecimal()), *codes])
        hints.append(f"{', '.join(codes)}: counts from 1 up; if they are codes, --set 'data.categories={value}'")
    return hints
