"""Tables: one row of parameters per datum, without amortization."""

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_int
from ppl_vae.networks.network import Network


class Table(Network):
    """One row of parameters per datum: no amortization. Its context is the datum's index in the data set.

    Args:
        rows: The number of data.

    Raises:
        ValueError: If there is not at least one row.
    """

    wants = "index"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = check_int("rows", rows)

    def build(self, context: int, start: Tensor) -> None:
        self.value = nn.Parameter(start.repeat(self.rows, 1))

    @torch.no_grad()
    def restart(self, start: Tensor) -> None:
        self.value.copy_(start)

    def forward(self, context: Tensor, observed: Tensor | None = None) -> Tensor:
        return self.value[context]
