"""A spec of a small run, for tests that need some run."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from ppl_vae.runs.spec_file import merge

SPEC = """
[data]
name = "table.npy"
[model]
latent = 1
[prior]
family = "StandardNormal"
[likelihood]
family = "Normal"
scale = "shared"
network = { family = "Linear" }
[posterior]
family = "Normal"
network = { family = "Linear" }
[svi]
epochs = 2
batch_size = 16
learning_rate = 0.05
[evaluation]
samples = 26
"""


def small_spec(folder: Path, changes: dict[str, Any] = {}) -> Path:  # noqa: B006  never changed
    """Write a spec of a linear VAE, with changes by dotted key, and its data of 60 rows and 3 columns."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "table.npy", np.random.default_rng(0).normal(size=(60, 3)))
    path = folder / "spec.toml"
    path.write_text(tomli_w.dumps(merge(path, tomllib.loads(SPEC), changes)))
    return path
