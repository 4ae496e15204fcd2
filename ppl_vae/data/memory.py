"""Data in memory: tensors and arrays as a `Data`, as they are."""

from typing import Any

import numpy as np
import torch

from ppl_vae.data.batches import as_batch
from ppl_vae.data.columns import Columns
from ppl_vae.data.loading import Data
from ppl_vae.data.protocol import digest
from ppl_vae.data.transforms import Transform


def as_data(
    train: Any,
    test: Any = None,
    *,
    validation: Any = None,
    name: str = "rows in memory",
    columns: list[str] | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Data:
    """Tensors, arrays or batch dicts as a data set; nothing is scaled, split or drawn.

    Args:
        train: the training part, (n, *x) or a batch dict.
        test: held-out data, as `train`; none where the whole data set counts as one datum.
        validation: data to choose settings by, as `train`.
        name: of the data.
        columns: names of the columns of x.
        shape: of the picture that a row of x flattens; that of a row, if it is a picture itself.
        seed: stands in the protocol, by which runs compare.

    Raises:
        ValueError: If the parts differ in their entries, or there are not as many names as columns.
    """
    parts = {"train": as_batch(train, aligned=False)}
    parts |= {key: as_batch(part) for key, part in (("validation", validation), ("test", test)) if part is not None}
    parts.setdefault("test", {key: value[:0] for key, value in parts["train"].items() if value.dim()})
    for part in parts.values():
        if part.keys() != parts["train"].keys() and part:
            raise ValueError(f"Expected the entries {', '.join(parts['train'])} in each part; got {', '.join(part)}.")
    x = parts["train"].get("x")
    row = torch.Size([]) if x is None else x.shape[1:]
    count = 0 if x is None else row.numel()
    if columns is not None and len(columns) != count:
        raise ValueError(f"Expected names of {count} columns; got {len(columns)}.")
    sizes = {part: len(next(iter(batch.values()), ())) for part, batch in parts.items()}
    own = "test" if sizes["test"] else "train"
    plain = {"binarization": "none", "scaling": "none", "dequantization": "none", "maximum": None, "levels": None}
    return Data(
        name=name,
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        protocol={
            "name": name,
            "split": {"by": "as given", **{f"n_{part}": size for part, size in sizes.items()}},
            "seed": seed,
            **plain,
            **{"loc": 0.0, "scale": 1.0, "log_volume": 0.0},
            "digest": digest(parts[own]),
            "digest_train": digest(parts["train"], parts.get("validation")),
        },
        transform=Transform("none", False, 1, np.zeros(()), np.ones(()), torch.float32),
        columns=Columns(count, shape or (tuple(row) if len(row) > 1 else None), tuple(columns) if columns else None),
        row_numbers={part: np.arange(size) for part, size in sizes.items()},
        ids=dict.fromkeys(parts),
    )
