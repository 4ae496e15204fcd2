"""Training on data with missing entries: every objective at the exact guide is the evidence of the observed entries."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from twins import TWINS

from ppl_vae import fit

OBJECTIVES: list[dict[str, Any]] = [
    {"elbo": "Trace_ELBO"},
    {"elbo": "Trace_ELBO", "particles": 3},
    {"elbo": "ImportanceWeighted", "particles": 3},
    {"elbo": "ImportanceWeighted", "particles": 3, "gradient": "stl"},
    {"elbo": "ImportanceWeighted", "particles": 3, "gradient": "dreg"},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda keys: " ".join(map(str, keys.values())))
@pytest.mark.parametrize("name", ["masked", "picture"])
def test_the_objective_is_the_evidence_of_the_observed_entries(name: str, settings: dict[str, Any]) -> None:
    twin = TWINS[name]()
    rows = torch.tensor([0, 2, 3, 4, 5])  # all but the one with nothing observed
    batch = {key: value[rows] for key, value in twin.batch.items()}
    still = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-14}
    history = fit(twin.program, batch, **settings, **still)
    np.testing.assert_allclose(history.elbo, twin.log_evidence[rows].mean(), rtol=0, atol=1e-9)
    moved = {**batch, "mask": batch["mask"].roll(1, 0), "x": batch["x"].nan_to_num()}
    assert abs(fit(twin.program, moved, **settings, **still).elbo[0] - twin.log_evidence[rows].mean()) > 0.01


def test_gradients_are_those_of_the_evidence_whatever_stands_under_the_mask() -> None:
    found = []
    for hidden in (float("nan"), 0.0, 1e6):
        twin = TWINS["masked"]()
        rows = torch.tensor([0, 2, 3, 4, 5])
        batch = {key: value[rows] for key, value in twin.batch.items()}
        batch["x"] = torch.where(batch["mask"], batch["x"], hidden)
        fit(twin.program, batch, epochs=2, learning_rate=0.01)
        found.append(nn.utils.parameters_to_vector(twin.program.parameters()))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
