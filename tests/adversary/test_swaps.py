"""Attack "swap anything": the whole product of priors, guides, likelihoods and objectives that suit each other.

A case counts as beyond if it is refused, or trains to something that is not finite. Networks take turns along the
product. Pairs that are refused for their support or shape are tested one by one in `tests/runs/test_swaps.py`.
"""

import itertools
from collections import Counter
from functools import cache

import torch
from swaps import ELBOS, attempt, choices, data_for, refused


@cache
def product() -> list[dict[str, str]]:
    """Every prior, guide, likelihood and objective that suit each other, in an order that mixes them."""
    values = choices()
    values["posterior"].remove("ExactNormal")
    forbidden = refused("prior", "posterior", values) | refused("likelihood", "decoder", values)
    forbidden |= refused("likelihood", "encoder", values)
    rows = []
    for prior, posterior, likelihood, elbo in itertools.product(
        values["prior"], values["posterior"], values["likelihood"], ELBOS
    ):
        if (("prior", prior), ("posterior", posterior)) in forbidden:
            continue
        row = {"prior": prior, "likelihood": likelihood, "posterior": posterior}
        for part in ("decoder", "encoder"):
            fitting = [name for name in values[part] if (("likelihood", likelihood), (part, name)) not in forbidden]
            fitting = [name for name in fitting if name != "Table" or prior not in ("VampPrior", "ExemplarPrior")]
            row[part] = fitting[len(rows) % len(fitting)]
        rows.append({**row, "elbo": elbo})
    step = 10_007  # a prime, so that neighbours in a part of the product are far apart in it
    return [rows[number * step % len(rows)] for number in range(len(rows))]


def rates(count: int, seed: int = 0) -> dict[str, float]:
    """How many of the cases, numbered from `seed` along the product, are refused or not finite."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    counts: Counter[str] = Counter(cases=0, trained=0, beyond_5=0, beyond_50=0)
    try:
        for number in range(seed, seed + count):
            row = product()[number % len(product())]
            try:
                message = attempt(row, data_for(row["likelihood"]))
            except AssertionError as error:
                message = str(error)
            counts.update(cases=1, trained=int(message is None), beyond_5=int(message is not None))
            if message is not None:
                counts["beyond_50"] += 1
                print(row, message[:300], flush=True)
    finally:
        torch.set_default_dtype(before)
    return dict(counts)


def test_a_sample_of_the_product_trains():
    assert len({tuple(row.values()) for row in product()}) == len(product())
    counts = rates(40, seed=3)
    assert counts["trained"] == counts["cases"] == 40
