"""Encodings: what a network sees of the columns of its context."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice

Word = Literal["plain", "standardise", "log", "log1p", "one-hot"]
WORDS: tuple[Word, ...] = get_args(Word)
_LEAST = 1e-6  # below which a logarithm is cut


class Encoding(nn.Module):
    """Columns as a network sees them: as they are, in units of their spread, on a log scale, or one column per code.

    `standardise`, `log` and `log1p` columns are centred and divided by their standard deviation, which `fit` reads off
    the data; both are buffers. A `one-hot` column of codes 0, 1, ... becomes one column per code, 1 at the datum's own
    and 0 elsewhere; between two codes it is linear, so that gradients pass.

    Args:
        words: The encoding of each column.
        levels: The number of codes of each column; read for `one-hot` alone.

    Raises:
        ValueError: If a word is unknown, or a `one-hot` column has no number of codes.

    Example:
        >>> from ppl_vae.networks import Encoding
        >>> Encoding(["plain", "one-hot"], [0, 3])(torch.tensor([[5.0, 2.0]]))[0]
        tensor([[5., 0., 0., 1.]])
    """

    shift: Tensor
    scale: Tensor
    source: Tensor
    code: Tensor

    def __init__(self, words: Sequence[Word], levels: Sequence[int] = ()) -> None:
        super().__init__()
        for word in words:
            check_choice("encoding", word, WORDS)
        self.words = tuple(words)
        counts = []
        for column, word in enumerate(words):
            count = levels[column] if word == "one-hot" and column < len(levels) else 1
            if word == "one-hot" and (column >= len(levels) or count < 1):
                raise ValueError(
                    f"Expected codes 0, 1, ... in column {column}, for a one-hot encoding; got a column without a "
                    "finite number of values. Choose standardise or plain."
                )
            counts.append(count)
        self.size = sum(counts)
        source = torch.arange(len(words)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("code", torch.cat([torch.arange(float(c)) for c in counts]), persistent=False)
        for word in ("log", "log1p", "one-hot", "plain"):
            is_word = torch.tensor([w == word for w in words], dtype=torch.bool)[source]
            self.register_buffer(f"is_{word.replace('-', '_')}", is_word, persistent=False)
        self.register_buffer("shift", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    @torch.no_grad()
    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set shift and scale to mean and standard deviation of the encoded data `x`, shape (n, c), where observed."""
        raw = self._raw(x)
        seen = torch.ones_like(raw) if mask is None else mask[..., self.source].to(raw)
        raw, count = torch.where(seen > 0, raw, 0.0), seen.sum(0).clamp_min(1)
        mean = raw.sum(0) / count
        scale = (((raw - mean) ** 2 * seen).sum(0) / count).sqrt()
        as_is = self.get_buffer("is_one_hot") | self.get_buffer("is_plain")
        self.shift.copy_(torch.where(as_is, 0.0, mean))
        self.scale.copy_(torch.where(as_is | (scale < _LEAST * mean.abs().clamp_min(1e-30)), 1.0, scale))

    def forward(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode a context (*batch, c), and the mask of its observed entries alike."""
        encoded = (self._raw(x) - self.shift) / self.scale
        return encoded, None if observed is None else observed[..., self.source]

    def _raw(self, x: Tensor) -> Tensor:
        """Encoded columns before shift and scale; an encoding that no column has is not computed."""
        wide = x[..., self.source]
        if "log" in self.words:
            wide = torch.where(self.get_buffer("is_log"), wide.clamp_min(_LEAST).log(), wide)
        if "log1p" in self.words:
            wide = torch.where(self.get_buffer("is_log1p"), wide.clamp_min(0).log1p(), wide)
        if "one-hot" in self.words:
            wide = torch.where(self.get_buffer("is_one_hot"), (1 - (wide - self.code).abs()).clamp_min(0), wide)
        return wide
