"""Swap anything: every pair of choices stands in at least one spec that trains, or is refused by name."""

import itertools
import re
from collections import Counter
from functools import cache

import pytest
import torch
from swaps import PLAIN, attempt, choices, data_for, pairwise, refused

CHUNKS = 4


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.set_default_dtype(torch.float32)


def test_every_pair_stands_in_a_row():
    values = {"a": list("xyz"), "b": list("uvw"), "c": list("st"), "d": list("mn")}
    rows = pairwise(values)
    for a, b in itertools.combinations(values, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(values[a], values[b]))
    assert len(rows) <= 12
    forbidden = {(("a", "x"), ("b", "u")), (("a", "y"), ("c", "s"))}
    allowed = pairwise(values, forbidden)
    assert not any((row["a"], row["b"]) == ("x", "u") or (row["a"], row["c"]) == ("y", "s") for row in allowed)
    assert {(row["a"], row["b"]) for row in allowed} == set(itertools.product("xyz", "uvw")) - {("x", "u")}


@cache
def suiting():
    """Choices for rows that train, and the pairs of them that are refused by name.

    `ExactNormal` and its only partners have tests of their own. Priors and guides are refused by their support, images'
    networks by the number of parameters, tied priors by a guide without amortization.
    """
    values = choices()
    values["posterior"].remove("ExactNormal")
    names = itertools.chain(
        refused("prior", "posterior", values), refused("likelihood", "decoder", values),
        refused("likelihood", "encoder", values),
    )  # fmt: skip
    tied = [(("prior", prior), ("encoder", "Table")) for prior in ("VampPrior", "ExemplarPrior")]
    return values, {*names, *tied}


def test_what_is_refused_is_refused_for_its_support_or_its_shape():
    values = choices()
    for (_, (_, guide)), message in refused("prior", "posterior", values).items():
        assert re.search(r"on the support of the prior|for a closed form|not tied to the prior", message), message
        assert guide in message or guide == "ExactNormal"
    for pair, message in refused("likelihood", "decoder", values).items():
        assert pair[1][1] in ("Conv", "ResidualConv"), message
        assert "parameters for each of them" in message


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_pair_of_choices_trains_or_is_refused_by_name(chunk):
    values, forbidden = suiting()
    outcomes = Counter()
    for row in sorted(pairwise(values, forbidden)[chunk::CHUNKS], key=lambda row: row["likelihood"]):
        message = attempt(row, data_for(row["likelihood"]))
        outcomes["trained" if message is None else message] += 1
    assert outcomes["trained"] > 0.95 * outcomes.total(), outcomes


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
