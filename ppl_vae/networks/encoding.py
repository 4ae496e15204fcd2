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

    Where a mask hides an entry, its encoded columns are 0, which is the mean of a standardised one. Each column in
    `indicators` has one more behind all others, 1 where it is hidden and 0 where it is observed, so that a network can
    tell a missing entry from an average one.

    Args:
        words: The encoding of each column.
        levels: The number of codes of each column; read for `one-hot` alone.
        indicators: The numbers of the columns, from 0, that have an indicator.

    Raises:
        ValueError: If a word is unknown, or a `one-hot` column has no number of codes.

    Example:
        >>> from ppl_vae.networks import Encoding
        >>> Encoding(["plain", "one-hot"], [0, 3])(torch.tensor([[5.0, 2.0]]))[0]
        tensor([[5., 0., 0., 1.]])
        >>> x, observed = torch.tensor([[5.0, 2.0]]), torch.tensor([[False, True]])
        >>> Encoding(["plain", "plain"], indicators=[0])(x, observed)[0]
        tensor([[0., 2., 1.]])
    """

    shift: Tensor
    scale: Tensor
    source: Tensor
    code: Tensor
    hidden: Tensor

    def __init__(self, words: Sequence[Word], levels: Sequence[int] = (), indicators: Sequence[int] = ()) -> None:
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
        self.size = sum(counts) + len(indicators)
        self.register_buffer("hidden", torch.tensor(indicators, dtype=torch.long), persistent=False)
        source = torch.arange(len(words)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("code", torch.cat([torch.arange(float(c)) for c in counts]), persistent=False)
        for word in ("log", "log1p", "one-hot", "plain"):
            is_word = torch.tensor([w == word for w in words], dtype=torch.bool)[source]
            self.register_buffer(f"is_{word.replace('-', '_')}", is_word, persistent=False)
        self.register_buffer("shift", torch.zeros(sum(counts)))
        self.register_buffer("scale", torch.ones(sum(counts)))

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
        if not len(self.hidden):
            return encoded, None if observed is None else observed[..., self.source]
        seen = torch.ones_like(x, dtype=torch.bool) if observed is None else observed.expand(x.shape)
        indicators = (~seen[..., self.hidden]).to(encoded.dtype)
        return torch.cat([torch.where(seen[..., self.source], encoded, 0.0), indicators], -1), None

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
