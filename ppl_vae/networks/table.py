"""Tables: one row of parameters per datum, without amortization."""

import torch
from torch import Tensor, nn

from ppl_vae.networks.network import Network


class Table(Network):
    """One row of parameters a datum: no amortization. Its context is the datum's index in the data set.

    Args:
        rows: the number of data.

    Raises:
        ValueError: for fewer than one row.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"Expected `rows` to be the number of data, at least 1; got {rows}.")
        self.rows = rows

    def build(self, context: int, start: Tensor) -> None:
        self.value = nn.Parameter(start.repeat(self.rows, 1))

    def restart(self, start: Tensor) -> None:
        with torch.no_grad():
            self.value.copy_(start)

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        return self.value[context]
