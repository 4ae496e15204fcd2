"""What a VAE is conditioned on: a label or covariates, and how its networks see them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_int
from ppl_vae.networks.encoding import Encoding

KEYS = ("y", "covariates")
ROLES = ("prior", "likelihood", "posterior")


class Given(nn.Module):
    r"""Entries of the batch that a `VAE` is conditioned on: prior p(z|y), likelihood p(x|z, y), guide q(z|x, y).

    A label enters the networks as one column per class, 1 at its own and 0 elsewhere; so does a column of codes among
    the covariates. Other covariates are centred and divided by their standard deviation, which `VAE.initialise` reads
    off the data.

    Args:
        y: the number of classes, if the label is given. Labels (n,) run from 0.
        covariates: the number of values of each column, 0 for one of numbers, if covariates (n, c) are given.
        to: the parts that are given them: `prior`, `likelihood`, `posterior`.

    Raises:
        ValueError: If nothing is given, or given to neither prior nor likelihood, so that the model does not change.

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models (Sohn, Lee and Yan 2015);
        Semi-supervised Learning with Deep Generative Models (Kingma, Rezende, Mohamed and Welling 2014), section 2.2.
    """

    def __init__(
        self, *, y: int | None = None, covariates: Sequence[int] = (), to: Iterable[str] = ("likelihood", "posterior")
    ) -> None:
        super().__init__()
        self.roles = tuple(to)
        for role in self.roles:
            check_choice("to", role, ROLES)
        levels = {"y": () if y is None else (check_int("y", y),), "covariates": tuple(covariates)}
        self.levels = {key: counts for key, counts in levels.items() if counts}
        if not self.levels or not {"prior", "likelihood"} & set(self.roles):
            raise ValueError(
                "Expected `y` or `covariates`, given to the prior or the likelihood at least, or the model stays as it "
                f"is; got {list(self.levels)} to {list(self.roles)}."
            )
        self.classes = y
        self.size = sum(max(count, 1) for counts in self.levels.values() for count in counts)
        self.encodings = nn.ModuleDict()
        for key, counts in self.levels.items():
            self.encodings[key] = Encoding(["one-hot" if count else "standardise" for count in counts], counts)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Columns that the networks see, (n, size)."""
        return torch.cat([encoding(_columns(batch[key]))[0] for key, encoding in self.encodings.items()], -1)

    def fit(self, batch: Mapping[str, Tensor]) -> None:
        """Read centre and spread of the covariates off the data."""
        for key, encoding in self.encodings.items():
            encoding.fit(_columns(batch[key]))  # type: ignore[operator]

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse a batch without what is given, of another width, or with a code beyond those known."""
        for key, counts in self.levels.items():
            shape, value = _shape(key, counts), batch.get(key)
            if value is None or value.shape[1:] != shape:
                raise ValueError(
                    f"Expected `{key}` of shape (n{f', {len(counts)}' if shape else ''}) in the batch, which this VAE "
                    f"is given; got {'none' if value is None else tuple(value.shape)}."
                )
            values, most = _columns(value), torch.tensor(counts, device=value.device)
            wrong = (most > 0) & ((values < 0) | (values >= most) | (values != values.floor()))
            if bool(wrong.any()):
                row, column = wrong.nonzero()[0].tolist()
                remedy = " -1 is a datum without a label; leave such data out." if values[row, column] == -1 else ""
                raise ValueError(
                    f"Expected whole numbers from 0 to {counts[column] - 1} in column {column} of `{key}`, as the VAE "
                    f"was built; got {values[row, column].item():g} in row {row} and {int(wrong.any(1).sum())} such "
                    f"rows in all.{remedy}"
                )

    def batch(self, value: Any, n: int) -> dict[str, Tensor]:
        """Entries of a batch of n data from a dict, or from one entry alone; a single row serves all n.

        Raises:
            ValueError: If something is missing or does not fit.
        """
        entries = {}
        for key, counts in self.levels.items():
            entry = value.get(key) if isinstance(value, Mapping) else value if len(self.levels) == 1 else None
            own: Any = self.encodings[key].shift
            try:
                one = torch.as_tensor(entry, device=own.device, dtype=torch.long if key == "y" else own.dtype)
                entries[key] = one.expand(n, *_shape(key, counts))
            except (TypeError, RuntimeError, ValueError):
                raise ValueError(
                    f"Expected `given` with `{key}` for one datum or {n}, since the VAE depends on it; got {entry!r}."
                ) from None
        self.check(entries)
        return entries


def _shape(key: str, counts: Sequence[int]) -> tuple[int, ...]:
    """Shape of one datum's entry."""
    return () if key == "y" else (len(counts),)


def _columns(value: Tensor) -> Tensor:
    """An entry of the batch as columns (n, c)."""
    return value if value.dim() > 1 else value.unsqueeze(-1)
