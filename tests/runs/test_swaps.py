"""Swap anything: every pair of choices stands in at least one spec that trains, or is refused by name."""

import itertools
from collections import Counter

import pytest
import torch
from swaps import attempt, choices, data_for, pairwise

CHUNKS = 8


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.set_default_dtype(torch.float32)


def test_every_pair_stands_in_a_row():
    values = {"a": list("xyz"), "b": list("uvw"), "c": list("st"), "d": list("mn")}
    rows = pairwise(values)
    for a, b in itertools.combinations(values, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(values[a], values[b]))
    assert len(rows) <= 12


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_pair_of_choices_trains_or_is_refused_by_name(chunk):
    outcomes = Counter()
    rows = pairwise(choices())[chunk::CHUNKS]
    for name, group in itertools.groupby(sorted(rows, key=lambda row: row["likelihood"]), lambda r: r["likelihood"]):
        data = data_for(name)
        for row in group:
            outcomes["refused" if attempt(row, data) else "trained"] += 1
    assert outcomes["trained"] > 0


PLAIN = {
    "prior": "StandardNormal",
    "likelihood": "Normal",
    "posterior": "Normal",
    "decoder": "MLP",
    "encoder": "MLP",
    "elbo": "Trace_ELBO",
}


@pytest.mark.parametrize("part", list(choices()))
def test_every_choice_trains_beside_parts_that_suit_it(part):
    """A refusal above is never for a part itself: beside some other parts it trains."""
    for value in choices()[part]:
        rows = [{**PLAIN, part: value} | ({"decoder": "Linear"} if value == "ExactNormal" else {})]
        if part in ("prior", "posterior"):
            other = "posterior" if part == "prior" else "prior"
            rows += [{**PLAIN, part: value, other: name} for name in choices()[other]]
        messages = []
        for row in rows:
            messages.append(attempt(row, data_for(row["likelihood"])))
            if messages[-1] is None:
                break
        assert None in messages, (value, messages)
