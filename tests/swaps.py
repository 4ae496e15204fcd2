"""Every swap of one part for another: a spec for each choice, which takes a step or is refused by name."""

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from ppl_vae import families, fit
from ppl_vae._seeds import fork_rng
from ppl_vae.data import Columns
from ppl_vae.data.loading import Data, load
from ppl_vae.runs.catalogue import components
from ppl_vae.runs.schema import described, filled
from ppl_vae.runs.spec import Spec

SIZE, ROWS, LEVELS = 4, 12, 3
KEYS: dict[str, dict[str, Any]] = {  # of families and networks whose defaults are large, or whose keys must be given
    "Binomial": {"trials": 5},
    "ExemplarPrior": {"components": 5},
    "Flow": {"transforms": 1, "hidden": [8]},
    "LowRankNormal": {"rank": 2},
    "MixtureDiscretizedLogistic": {"components": 2},
    "MixtureFullNormal": {"components": 2},
    "MixtureNormal": {"components": 2},
    "Mixed": {"kinds": {"a": "Normal", "b": "Bernoulli", "*": "Categorical"}},
    "VampPrior": {"components": 5},
    "Conv": {"channels": [3]},
    "ResidualConv": {"channels": [3]},
    "MLP": {"hidden": [6]},
    "GatedMLP": {"hidden": [6]},
}
COLUMNS = Columns(SIZE, (2, 2), tuple("abcd"), ("real", "binary", "category", "ordered"), (LEVELS,) * SIZE)
ELBOS = ("Trace_ELBO", "TraceMeanField_ELBO")


def choices() -> dict[str, list[str]]:
    """Names of what can be chosen for each part."""
    named = {role: [one.name for one in components(role)] for role in ("prior", "likelihood", "posterior", "network")}
    amortized = [name for name in named.pop("network") if name != "Free"]
    return {
        **named,
        "decoder": [name for name in amortized if name != "Table"],
        "encoder": amortized,
        "elbo": list(ELBOS),
    }


def pairwise(values: dict[str, list[str]], forbidden: Collection[Any] = (), seed: int = 0) -> list[dict[str, str]]:
    """Rows in which every pair of values of two parts that is not forbidden stands at least once, by greedy choice.

    Pairs that no row without a forbidden pair can hold are left out.
    """
    parts, rng = list(values), np.random.default_rng(seed)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(parts, 2) for x in values[a] for y in values[b]
    } - set(forbidden)  # fmt: skip
    rows = []
    while missing:
        row = dict(first := min(missing))
        for part in sorted(set(parts) - row.keys(), key=lambda part: parts.index(part)):
            order = rng.permutation(values[part]).tolist()
            fitting = [value for value in order if not _pairs({**row, part: value}, parts) & set(forbidden)]
            gains = [len(_pairs({**row, part: value}, parts) & missing) for value in fitting]
            if not fitting:
                break
            row[part] = fitting[int(np.argmax(gains))]
        missing.discard(first)
        if len(row) == len(parts):
            rows.append({part: row[part] for part in parts})
            missing -= _pairs(row, parts)
    return rows


def _pairs(row: dict[str, str], parts: list[str]) -> set[Any]:
    return set(itertools.combinations([(part, row[part]) for part in parts if part in row], 2))


PLAIN = {
    "prior": "StandardNormal",
    "likelihood": "Normal",
    "posterior": "Normal",
    "decoder": "MLP",
    "encoder": "MLP",
    "elbo": "Trace_ELBO",
}


def refused(first: str, second: str, values: dict[str, list[str]]) -> dict[Any, str]:
    """Pairs of values of two parts that are refused beside plain other parts, with the message."""
    messages = {}
    for x, y in itertools.product(values[first], values[second]):
        choice = {**PLAIN, first: x, second: y}
        try:
            spec_of(choice).assemble(columns=COLUMNS, rows=ROWS)
        except ValueError as error:
            messages[(first, x), (second, y)] = str(error)
    return messages


def spec_of(choice: dict[str, str]) -> Spec:
    """The spec of a choice; ValueError if it is refused."""

    def table(name: str, network: str | None = None) -> dict[str, Any]:
        inner = {} if network is None else {"network": {"family": network, **KEYS.get(network, {})}}
        return {"family": name, **KEYS.get(name, {}), **inner}

    tied = choice["posterior"] == "ExactNormal"
    fixed = {"scale": "shared"} if tied and choice["likelihood"] == "Normal" else {}
    return Spec.from_dict({
        "data": {"name": "digits"},
        "model": {"latent": SIZE},
        "prior": table(choice["prior"]),
        "likelihood": {**table(choice["likelihood"], choice["decoder"]), **fixed},
        "posterior": table(choice["posterior"], None if tied else choice["encoder"]),
        "svi": {"elbo": choice["elbo"], "epochs": 1, "batch_size": ROWS, "schedule": "constant"},
    })  # fmt: skip


@cache
def data_for(likelihood: str) -> Data:
    """A few data in the support of a likelihood, drawn from it where it starts."""
    with fork_rng(0, "swaps", device=torch.device("cpu")):
        kind = getattr(families, likelihood)
        family = kind(**filled(kind, event=SIZE, **described(COLUMNS)), **KEYS.get(likelihood, {}))
        x = family.distribution(family.start() + 0.1 * torch.randn(family.start().shape)).sample((ROWS,))
        x = x.to(torch.get_default_dtype()).detach()
    digits = load("digits", dtype=torch.get_default_dtype())
    part = {"x": x}
    return replace(digits, train=part, test=part, columns=COLUMNS, stored=None)


def attempt(choice: dict[str, str], data: Data) -> str | None:
    """Build a choice and take a step; None, or the message that refuses it.

    Raises:
        AssertionError: If a loss or a parameter is not finite, no parameter moves, or a refusal names nothing.
    """
    try:
        spec = spec_of(choice)
        program: Any = spec.build(data)
        before = [p.detach().clone() for p in program.parameters()]
        history = fit(program, data.train, **spec.training, device="cpu", progress=False)
    except ValueError as error:
        message = str(error)
        assert "Expected" in message, (choice, message)
        assert "got" in message, (choice, message)
        return message
    assert math.isfinite(history.elbo[0]), choice
    after = list(program.parameters())
    assert all(bool(p.isfinite().all()) for p in after), choice
    assert not before or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), choice
    return None
