"""A training step of the convolutional pair and of each family, beside hand-written PyTorch of the same mathematics.

python benchmarks/networks.py [--rounds 12] [--out benchmarks/results/networks.json]

By hand means eager PyTorch with the fused Adam: no graph, no check, one draw of z per datum. A new family is one more
row of `families`.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from speed import in_turn, record
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ppl_vae import VAE, Conditional
from ppl_vae.families import (
    Bernoulli,
    Beta,
    Family,
    FullNormal,
    Gamma,
    Laplace,
    Logistic,
    MixtureNormal,
    Normal,
    Poisson,
    StandardNormal,
)
from ppl_vae.networks import MLP, Conv

FEATURES, HIDDEN, LATENT = 784, 400, 20
BATCHES = 20  # of an epoch
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def normal(x: Tensor, loc: Tensor | float, scale: Tensor) -> Tensor:
    """Log density of independent normals, summed over the last dim."""
    return (-0.5 * ((x - loc) / scale) ** 2 - scale.log() - HALF_LOG_TWO_PI).sum(-1)


def positive(raw: Tensor) -> Tensor:
    """The scale of a raw parameter."""
    return softplus(raw) + 1e-6


def standard(z: Tensor, own: Any) -> Tensor:
    """Log density of the standard normal."""
    return (-0.5 * z**2 - HALF_LOG_TWO_PI).sum(-1)


def mixture(z: Tensor, own: Any) -> Tensor:
    """Log density of a mixture of ten normals with diagonal covariances."""
    each = normal(z.unsqueeze(-2), own["loc"], positive(own["raw"]))
    return (own["logits"].log_softmax(-1) + each).logsumexp(-1)


def bernoulli(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log probability of binary pixels."""
    return -binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1)


def both_normal(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log density of normal pixels whose scales come from the network."""
    loc, raw = out.chunk(2, -1)
    return normal(x, loc, positive(raw))


def one_normal(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log density of normal pixels with one scale."""
    return normal(x, out, positive(own["scale"]).expand_as(out))


def laplace(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log density of Laplace pixels."""
    loc, raw = out.chunk(2, -1)
    scale = positive(raw)
    return (-(x - loc).abs() / scale - (2 * scale).log()).sum(-1)


def logistic(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log density of logistic pixels."""
    loc, raw = out.chunk(2, -1)
    scale = positive(raw)
    t = (x - loc) / scale
    return (-t - 2 * softplus(-t) - scale.log()).sum(-1)


def gamma(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log density of gamma pixels."""
    a, b = positive(out).chunk(2, -1)
    return (a * b.log() + (a - 1) * x.log() - b * x - a.lgamma()).sum(-1)


def beta(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log density of beta pixels."""
    a, b = positive(out).chunk(2, -1)
    return ((a - 1) * x.log() + (b - 1) * (1 - x).log() + (a + b).lgamma() - a.lgamma() - b.lgamma()).sum(-1)


def poisson(out: Tensor, x: Tensor, own: Any) -> Tensor:
    """Log probability of counts."""
    rate = positive(out)
    return (x * rate.log() - rate - (x + 1).lgamma()).sum(-1)


def binary(uniform: Tensor) -> Tensor:
    """Make binary pixels, few of them 1."""
    return (uniform < 0.13).float()


def inner(uniform: Tensor) -> Tensor:
    """Make numbers off 0 and 1."""
    return uniform.clamp(1e-3, 1 - 1e-3)


def counts(uniform: Tensor) -> Tensor:
    """Make counts."""
    return torch.poisson(3 * uniform)


def as_is(x: Tensor) -> Tensor:
    """What the guide sees: the data as they are."""
    return x


def draw_diagonal(raw: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of a diagonal normal and its log density."""
    loc, raw = raw.chunk(2, -1)
    scale, noise = positive(raw), torch.randn_like(loc)
    return loc + scale * noise, (-0.5 * noise**2 - scale.log() - HALF_LOG_TWO_PI).sum(-1)


def draw_full(raw: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of a normal with any covariance, by its Cholesky factor, and its log density."""
    loc, entries = raw[:, :LATENT], raw[:, LATENT:]
    rows, columns = torch.tril_indices(LATENT, LATENT)
    lower = raw.new_zeros(len(raw), LATENT, LATENT)
    lower[:, rows, columns] = entries
    scale, noise = positive(lower.diagonal(dim1=1, dim2=2)), torch.randn_like(loc)
    factor = lower.tril(-1) + scale.diag_embed()
    z = loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)
    return z, (-0.5 * noise**2 - scale.log() - HALF_LOG_TWO_PI).sum(-1)


@dataclass
class Row:
    """A model by the library and by hand: families, sizes of the networks' outputs, own parameters, log densities."""

    likelihood: Family
    outputs: int = FEATURES
    log_likelihood: Callable[[Tensor, Tensor, Any], Tensor] = bernoulli
    posterior: Family = field(default_factory=lambda: Normal(LATENT))
    codes: int = 2 * LATENT
    draw: Callable[[Tensor], tuple[Tensor, Tensor]] = draw_diagonal
    prior: Family = field(default_factory=lambda: StandardNormal(LATENT))
    log_prior: Callable[[Tensor, Any], Tensor] = standard
    own: dict[str, Tensor] = field(default_factory=dict)
    data: Callable[[Tensor], Tensor] = binary
    seen: Callable[[Tensor], Tensor] = as_is


def families() -> dict[str, Row]:
    """The families, each in one role beside the plain choice in the others."""
    components = {"logits": torch.zeros(10), "loc": torch.randn(10, LATENT), "raw": torch.zeros(10, LATENT)}
    two: Any = {"outputs": 2 * FEATURES, "data": inner}
    one: Any = {"log_likelihood": one_normal, "own": {"scale": torch.zeros(())}, "data": inner}
    full: Any = {"codes": LATENT * (LATENT + 3) // 2, "draw": draw_full}
    return {
        "Bernoulli likelihood": Row(Bernoulli(FEATURES)),
        "Normal likelihood": Row(Normal(FEATURES), log_likelihood=both_normal, **two),
        "Normal likelihood, one scale": Row(Normal(FEATURES, scale="shared"), **one),
        "Laplace likelihood": Row(Laplace(FEATURES), log_likelihood=laplace, **two),
        "Logistic likelihood": Row(Logistic(FEATURES), log_likelihood=logistic, **two),
        "Gamma likelihood": Row(Gamma(FEATURES), log_likelihood=gamma, seen=torch.log, **two),
        "Beta likelihood": Row(Beta(FEATURES), log_likelihood=beta, **two),
        "Poisson likelihood": Row(Poisson(FEATURES), log_likelihood=poisson, data=counts, seen=torch.log1p),
        "FullNormal posterior": Row(Bernoulli(FEATURES), posterior=FullNormal(LATENT), **full),
        "MixtureNormal prior": Row(Bernoulli(FEATURES), prior=MixtureNormal(LATENT), log_prior=mixture, own=components),
    }


class Hand(nn.Module):
    """The mathematics of a row in hand-written PyTorch."""

    def __init__(self, row: Row, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.row, self.encoder, self.decoder, self.shift, self.scale = (
            row,
            encoder,
            decoder,
            torch.zeros(784),
            torch.ones(()),
        )
        self.own = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in row.own.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Give minus the bound per datum."""
        z, log_q = self.row.draw(self.encoder((self.row.seen(x) - self.shift) / self.scale))
        log_p = self.row.log_prior(z, self.own) + self.row.log_likelihood(self.decoder(z), x, self.own)
        return (log_q - log_p).mean()


class Biased(nn.Module):
    """A bias for each output."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add it."""
        return x + self.bias


def dense(size: int, outputs: int) -> nn.Sequential:
    """Give one hidden layer."""
    return nn.Sequential(nn.Linear(size, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))


def convolutional() -> tuple[nn.Sequential, nn.Sequential]:
    """Give an encoder and a decoder of 28 x 28 pixels, as `Conv` makes them."""
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 49, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 64 * 49), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 3, 2, 1, 1, bias=False),
        nn.Flatten(), Biased(784),
    )  # fmt: skip
    return encoder, decoder


@torch.no_grad()
def check(row: Row, hand: Hand, x: Tensor) -> None:
    """Hold the mathematics by hand against that of the families."""
    raw = hand.encoder(x)
    z, log_q = row.draw(raw)
    out = hand.decoder(z)
    torch.testing.assert_close(row.posterior.distribution(raw).log_prob(z), log_q, rtol=1e-4, atol=1e-2)
    if not row.own:
        expected = row.likelihood.distribution(out).log_prob(x)
        torch.testing.assert_close(row.log_likelihood(out, x, hand.own), expected, rtol=1e-4, atol=1e-2)


def step(row: Row, networks: Callable[[], Any], hand: Hand, batch: int, rounds: int) -> dict[str, Any]:
    """Time a step of the library's `fit` and of PyTorch by hand."""
    x = row.data(torch.rand(BATCHES * batch, FEATURES))
    vae = VAE(
        prior=Conditional(row.prior),
        likelihood=Conditional(row.likelihood, networks()),
        posterior=Conditional(row.posterior, networks()),
    ).initialise(x)
    counts = [sum(p.numel() for p in model.parameters()) for model in (vae, hand)]
    assert counts[0] == counts[1], f"{counts[0]} parameters, {counts[1]} by hand"
    check(row, hand, x[:batch])
    optimizer = torch.optim.Adam(hand.parameters(), lr=1e-3, fused=True)

    def by_hand() -> None:
        for rows in x.split(batch):
            loss = hand(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return in_turn(vae, x, {"PyTorch by hand": by_hand}, batch, rounds)


def main() -> None:
    """Run all and print a table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.manual_seed(0)
    row = Row(Bernoulli(FEATURES))
    pictures = Hand(row, *convolutional())
    results: dict[str, Any] = {}

    def add(title: str, figures: dict[str, Any]) -> None:
        results[title] = figures
        ours = figures["ppl_vae"]
        print(
            f"{title:<40} {ours['microseconds']:10.0f} us  {ours['ratio']:5.2f} x PyTorch by hand, "
            f"{ours['processor_ratio']:5.2f} x in processor time",
            flush=True,
        )

    rounds = max(given.rounds // 3, 3)
    add("Conv pair, 28 x 28, batch 128", step(row, lambda: Conv((28, 28)), pictures, 128, rounds))
    for name, row in families().items():
        hand = Hand(row, dense(FEATURES, row.codes), dense(LATENT, row.outputs))
        add(f"{name}, 784-400-20", step(row, lambda: MLP(hidden=[HIDDEN]), hand, 100, given.rounds))
    record(results, given.out)


if __name__ == "__main__":
    main()
