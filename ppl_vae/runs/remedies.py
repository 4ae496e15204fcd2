"""What mends a spec whose data or parts do not fit: the `--set`, or the families that would."""

import re
from typing import Any

from ppl_vae import families
from ppl_vae._seeds import fork_rng
from ppl_vae.data.loading import Data
from ppl_vae.runs.assembly import tied_to
from ppl_vae.runs.check import column_hints
from ppl_vae.runs.schema import CPU, ROLES, classes, described, example, filled, needs, plays


def support_of(part: Any) -> Any:
    """Support of the family that a part names."""
    kind = getattr(families, part.family)
    return (kind if tied_to(part) else example(kind)).support


def remedy(spec: Any, data: Data, error: str) -> str:
    """The `--set` that fits the data to the likelihood, or the families that take such data."""
    if "constant" in data.suspects.values() and "constant" in error:
        hint = next(hint for hint in column_hints(data) if "constant" in hint)
        return f" Try {hint[hint.index('--set') :]}."
    if "for model.given" in error:
        label = next((name for name, like in data.suspects.items() if like == "label"), "NAME")
        return f" Try --set data.label={label}." if "labels" in error else " Try --set 'data.covariates=[\"NAME\"]'."
    x = data.train["x"]
    if "got none for" in error or "the name of a column in `kinds`" in error:  # the columns are others than before
        return " Try --set likelihood.kinds=infer, or change the list."
    if "reparameterised posterior" in error:
        return guides(spec)
    if place := re.search(r"in the support of .* got (\S+) at row (\d+)(?:, column (\d+))?", error):
        names, where = data.columns.names, _source_row(data, place[1], int(place[2]), int(place[3] or 0))
        where += f" Column {place[3]} is {names[int(place[3])]!r}." if names and place[3] else ""
        if spec.likelihood.family == "Mixed":
            return f"{where} Give it another family in `kinds`."
        if spec.likelihood.family == "Bernoulli" and data.protocol["maximum"] is not None:
            unscaled = " --set data.scaling=none" if spec.data.scaling == "standardize" else ""
            return f" Try --set data.binarization=dynamic{unscaled}."
        fitting = [kind.__name__ for kind in classes(families) if plays(kind, "likelihood") and _holds(kind, data)]
        return f"{where} Families that take such data: {', '.join(fitting)}."
    if getattr(spec.likelihood, "scale", None) in ("network", "feature") and bool((x == x[0]).all(0).any()):
        return " Try --set likelihood.scale=shared."
    return ""


def _source_row(data: Data, value: str, row: int, column: int) -> str:
    """The row of the source that holds a value which a part of the data has at this place."""
    for part, rows in data.row_numbers.items():
        x = getattr(data, part)["x"]
        if row < len(x) and f"{x[row, column].item():g}" == value:
            return f" Row {row} of the {part} part is row {rows[row]} of {data.name} (counted from 0)."
    return ""


def guides(spec: Any) -> str:
    """Other posteriors on the support of the prior."""
    able = [kind for kind in classes(families) if plays(kind, "posterior") and not needs(kind) & set(ROLES)]
    same = [kind.__name__ for kind in able if families.same_support(example(kind).support, support_of(spec.prior))]
    return f" Use {', '.join(name for name in same if name != spec.posterior.family)}."


def _holds(kind: Any, data: Data) -> bool:
    """Whether the support of a family, with its default keys, holds the data."""
    try:
        with fork_rng(0, device=CPU):
            family = kind(**filled(kind, event=data.features, **described(data.columns)))
    except (TypeError, ValueError):  # a key that must be given, or what the data lack
        return False
    inside = family.support.check(data.train["x"].cpu())
    return bool((inside if inside.dim() == 1 else inside | data.train["x"].cpu().isnan()).all())
