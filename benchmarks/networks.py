"""A training step of the convolutional pair and of each family, beside hand-written PyTorch of the same mathematics.

python benchmarks/networks.py [--rounds 12] [--only Gamma ...] [--out benchmarks/results/networks.json]

By hand means eager PyTorch with the fused Adam: no graph, no check, one draw of z per datum. A new family is one more
row of `likelihoods` or `latents`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import by_hand
import torch
from by_hand import COMPONENTS, FEATURES, HIDDEN, LATENT, LEVELS, RANK, TRIALS
from clock import in_turn, record
from torch import Tensor, nn

from ppl_vae import VAE, Conditional
from ppl_vae.families import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    ExemplarPrior,
    Family,
    Flow,
    FullNormal,
    Gamma,
    HypersphericalUniform,
    Kumaraswamy,
    Laplace,
    Logistic,
    LogisticNormal,
    LogNormal,
    LowRankNormal,
    MixtureDiscretizedLogistic,
    MixtureFullNormal,
    MixtureNormal,
    Multinomial,
    NegativeBinomial,
    Normal,
    OrderedCategorical,
    Poisson,
    StandardNormal,
    StudentT,
    TruncatedNormal,
    VampPrior,
    VonMisesFisher,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from ppl_vae.networks import MLP, Conv

BATCHES = 20  # of an epoch
FLOW: Any = {"transforms": 3, "hidden": [64, 64]}


@dataclass
class Row:
    """A model by the library and by hand: families, sizes of the networks' outputs, own parameters, log densities."""

    likelihood: Family
    outputs: int = FEATURES
    log_likelihood: Callable[[Tensor, Tensor, Any], Tensor] = by_hand.bernoulli
    posterior: Family = field(default_factory=lambda: Normal(LATENT))
    codes: int = 2 * LATENT
    draw: Callable[[Tensor, Any], tuple[Tensor, Tensor]] = by_hand.draw_diagonal
    prior: Family | Callable[[Conditional], Family] = field(default_factory=lambda: StandardNormal(LATENT))
    log_prior: Callable[[Tensor, Any], Tensor] = by_hand.standard
    own: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    data: Callable[[Tensor], Tensor] = by_hand.binary
    seen: Callable[[Tensor], Tensor] = by_hand.as_is
    shift: float | Tensor = field(default_factory=lambda: torch.zeros(FEATURES))


def likelihoods() -> dict[str, Row]:
    """The families of data, beside normal latent variables."""
    two: Any = {"outputs": 2 * FEATURES, "data": by_hand.inner}
    one: Any = {"log_likelihood": by_hand.one_normal, "own": {"raw_scale": torch.zeros(())}, "data": by_hand.inner}
    counts: Any = {"data": by_hand.counts, "seen": torch.log1p}
    dispersed: Any = {**counts, "own": {"raw_dispersion": torch.zeros(FEATURES)}}
    cuts = {"raw_cutpoints": torch.zeros((LEVELS - 1) * FEATURES)}
    coded: Any = {"data": by_hand.up_to(LEVELS), "seen": by_hand.codes_apart, "shift": 0.0}
    truncated, several = TruncatedNormal(FEATURES), MixtureDiscretizedLogistic(FEATURES, 256, components=COMPONENTS)
    return {
        "Bernoulli": Row(Bernoulli(FEATURES)),
        "Categorical": Row(Categorical(FEATURES, LEVELS), LEVELS * FEATURES, by_hand.categorical, **coded),
        "OrderedCategorical": Row(
            OrderedCategorical(FEATURES, LEVELS), log_likelihood=by_hand.ordered, own=cuts, **coded
        ),
        "Normal": Row(Normal(FEATURES), log_likelihood=by_hand.both_normal, **two),
        "Normal (one scale)": Row(Normal(FEATURES, scale="shared"), **one),
        "Laplace": Row(Laplace(FEATURES), log_likelihood=by_hand.laplace, **two),
        "Logistic": Row(Logistic(FEATURES), log_likelihood=by_hand.logistic, **two),
        "StudentT": Row(StudentT(FEATURES), log_likelihood=by_hand.student_t, own={"raw_df": torch.ones(())}, **two),
        "LogNormal": Row(LogNormal(FEATURES), log_likelihood=by_hand.log_normal, seen=torch.log, **two),
        "Gamma": Row(Gamma(FEATURES), log_likelihood=by_hand.gamma, seen=torch.log, **two),
        "Beta": Row(Beta(FEATURES), log_likelihood=by_hand.beta, **two),
        "Kumaraswamy": Row(Kumaraswamy(FEATURES), log_likelihood=by_hand.kumaraswamy, **two),
        "ContinuousBernoulli": Row(
            ContinuousBernoulli(FEATURES), log_likelihood=by_hand.continuous_bernoulli, data=by_hand.inner
        ),
        "TruncatedNormal": Row(truncated, log_likelihood=by_hand.truncated_normal, **two),
        "Poisson": Row(Poisson(FEATURES), log_likelihood=by_hand.poisson, **counts),
        "NegativeBinomial": Row(NegativeBinomial(FEATURES), log_likelihood=by_hand.negative_binomial, **dispersed),
        "ZeroInflatedPoisson": Row(
            ZeroInflatedPoisson(FEATURES), 2 * FEATURES, by_hand.zero_inflated_poisson, **counts
        ),
        "ZeroInflatedNegativeBinomial": Row(
            ZeroInflatedNegativeBinomial(FEATURES), 2 * FEATURES, by_hand.zero_inflated_negative_binomial, **dispersed
        ),
        "Binomial": Row(
            Binomial(FEATURES, trials=TRIALS),
            log_likelihood=by_hand.binomial,
            data=by_hand.up_to(TRIALS + 1),
            seen=torch.log1p,
        ),
        "Multinomial": Row(Multinomial(FEATURES), log_likelihood=by_hand.multinomial, **counts),
        "DiscretizedLogistic": Row(
            DiscretizedLogistic(FEATURES, 256), 2 * FEATURES, by_hand.discretized_logistic, data=by_hand.bytes_of
        ),
        "MixtureDiscretizedLogistic": Row(
            several, 3 * COMPONENTS * FEATURES, by_hand.mixture_discretized_logistic, data=by_hand.bytes_of
        ),
    }


def latents() -> dict[str, Row]:
    """The families of latent variables, beside binary pixels."""
    ends = {"loc": torch.zeros(LATENT), "raw": torch.zeros(LATENT)}
    components = {"logits": torch.zeros(10), "loc": torch.randn(10, LATENT), "raw": torch.zeros(10, LATENT)}
    rows = {"logits": torch.zeros(10), "rows": torch.randn(10, LATENT * (LATENT + 3) // 2)}
    free = {"loc": torch.zeros(LATENT - 1), "raw": torch.zeros(LATENT - 1)}

    def row(**known: Any) -> Row:
        return Row(Bernoulli(FEATURES), **known)

    def by_flow(kind: Any) -> Row:
        own = {**ends, "flow": zuko_flow(kind)}
        return row(prior=Flow(LATENT, kind=kind, **FLOW), log_prior=by_hand.flow, own=own)

    simplex = LogisticNormal(LATENT)
    return {
        "FullNormal posterior": row(
            posterior=FullNormal(LATENT), codes=LATENT * (LATENT + 3) // 2, draw=by_hand.draw_full
        ),
        "LowRankNormal posterior": row(
            posterior=LowRankNormal(LATENT, rank=RANK), codes=LATENT * (RANK + 2), draw=by_hand.draw_low_rank
        ),
        "MixtureNormal prior": row(prior=MixtureNormal(LATENT), log_prior=by_hand.mixture, own=components),
        "MixtureFullNormal prior": row(prior=MixtureFullNormal(LATENT), log_prior=by_hand.mixture_full, own=rows),
        "VampPrior prior": row(
            prior=lambda q: VampPrior(LATENT, q), log_prior=by_hand.vamp, own={"inputs": torch.rand(500, FEATURES)}
        ),
        "ExemplarPrior prior": row(
            prior=lambda q: ExemplarPrior(LATENT, q),
            log_prior=by_hand.exemplars,
            own={"raw_scale": torch.zeros(())},
            given={"given": torch.rand(500, FEATURES)},
        ),
        "Flow prior, autoregressive": by_flow("autoregressive"),
        "Flow prior, spline": by_flow("spline"),
        "Flow prior, coupling": by_flow("coupling"),
        "Flow posterior, inverse autoregressive": row(
            posterior=Flow(LATENT, kind="inverse-autoregressive", **FLOW),
            draw=by_hand.draw_flow,
            own={"flow": zuko_flow("autoregressive")},
        ),
        "LogisticNormal both": row(
            posterior=LogisticNormal(LATENT),
            codes=2 * (LATENT - 1),
            draw=by_hand.draw_shares,
            prior=simplex,
            log_prior=by_hand.shares,
            own=free,
            given={"basis": simplex.basis},
        ),
        "VonMisesFisher posterior, uniform prior": row(
            posterior=VonMisesFisher(LATENT),
            codes=LATENT + 1,
            draw=by_hand.draw_sphere,
            prior=HypersphericalUniform(LATENT),
            log_prior=by_hand.uniform,
        ),
    }


def zuko_flow(kind: str) -> nn.Module:
    """The flow of zuko's that `Flow` is made of."""
    before = torch.distributions.Distribution._validate_args
    from zuko.flows import MAF, NSF

    torch.distributions.Distribution._validate_args = before
    settings: Any = {"transforms": 3, "hidden_features": [64, 64], "activation": nn.Tanh}
    if kind == "spline":
        return NSF(LATENT, bins=8, **settings)
    return MAF(LATENT, **settings, **({"passes": 2} if kind == "coupling" else {}))


class Hand(nn.Module):
    """The mathematics of a row in hand-written PyTorch."""

    def __init__(self, row: Row, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.row, self.encoder, self.decoder, self.shift, self.scale = row, encoder, decoder, row.shift, torch.ones(())
        for name, value in row.own.items():
            setattr(self, name, nn.Parameter(value.clone()) if isinstance(value, Tensor) else value)
        for name, value in row.given.items():
            self.register_buffer(name, value)

    def encode(self, x: Tensor) -> Tensor:
        """Give the parameters of the guide."""
        return self.encoder((self.row.seen(x) - self.shift) / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Give minus the bound per datum."""
        z, log_q = self.row.draw(self.encode(x), self)
        log_p = self.row.log_prior(z, self) + self.row.log_likelihood(self.decoder(z), x, self)
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
def check(row: Row, vae: VAE, hand: Hand, x: Tensor) -> None:
    """Hold the mathematics by hand against that of the families."""
    near: Any = {"rtol": 1e-4, "atol": 1e-2}
    for family in (row.likelihood, vae.prior.family, row.posterior):
        for name, value in family.named_parameters():
            if isinstance(row.own.get(name), Tensor):
                value.copy_(row.own[name])
        if isinstance(family, Flow):
            for ours, by_zuko in zip(family.layers, row.own["flow"].transform.transforms, strict=True):
                ours.load_state_dict(by_zuko.state_dict())
    raw = hand.encode(x)
    z, log_q = row.draw(raw, hand)
    torch.testing.assert_close(row.posterior.distribution(raw).log_prob(z), log_q, **near)
    out = hand.decoder(z)
    expected = vae.likelihood.family.distribution(out).log_prob(x)
    torch.testing.assert_close(row.log_likelihood(out, x, hand), expected, **near)
    if isinstance(row.prior, Family):
        free = [value.flatten() for value in row.own.values() if isinstance(value, Tensor)]
        own = torch.cat([*free, torch.zeros(0)]) if row.prior.start().numel() else torch.zeros(0)
        prior = row.prior.distribution(own).expand(log_q.shape)
        torch.testing.assert_close(row.log_prior(z, hand), prior.log_prob(z), **near)


def step(row: Row, networks: Callable[[], Any], hand: Hand, batch: int, rounds: int) -> dict[str, Any]:
    """Time a step of the library's `fit` and of PyTorch by hand."""
    x = row.data(torch.rand(BATCHES * batch, FEATURES))
    posterior = Conditional(row.posterior, networks(), context=None if isinstance(row.prior, Family) else FEATURES)
    prior = Conditional(row.prior if isinstance(row.prior, Family) else row.prior(posterior))
    vae = VAE(prior=prior, likelihood=Conditional(row.likelihood, networks()), posterior=posterior).initialise(x)
    counts = [sum(p.numel() for p in model.parameters()) for model in (vae, hand)]
    assert counts[0] == counts[1], f"{counts[0]} parameters, {counts[1]} by hand"
    check(row, vae, hand, x[:batch])
    optimizer = torch.optim.Adam(hand.parameters(), lr=1e-3, fused=True)

    def by_hand() -> None:
        for rows in x.split(batch):
            loss = hand(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return in_turn(vae, x, {"PyTorch by hand": by_hand}, batch, rounds, "auto")


def main() -> None:
    """Run all and print a table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--only", nargs="*", help="parts of names of rows: run these, and keep what the file has of others"
    )
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.manual_seed(0)
    row = Row(Bernoulli(FEATURES))
    pictures = Hand(row, *convolutional())
    kept = given.only and given.out and Path(given.out).exists()
    results: dict[str, Any] = json.loads(Path(given.out).read_text()) if kept else {}

    def asked(name: str) -> bool:
        return not given.only or any(part in name for part in given.only)

    def add(title: str, figures: dict[str, Any]) -> None:
        results[title] = figures
        ours = figures["ppl_vae"]
        print(
            f"{title:<40} {ours['microseconds']:10.0f} us  {ours['ratio']:5.2f} x PyTorch by hand, "
            f"{ours['processor_ratio']:5.2f} x in processor time",
            flush=True,
        )

    if asked("Conv pair"):
        few = max(given.rounds // 3, 3)
        add("Conv pair, 28 x 28, batch 128", step(row, lambda: Conv((28, 28)), pictures, 128, few))
    rows = {f"{name} likelihood": row for name, row in likelihoods().items()} | latents()
    for name, row in rows.items():
        if asked(name):
            seen = row.seen(torch.ones(1, FEATURES)).shape[1]
            hand = Hand(row, dense(seen, row.codes), dense(LATENT, row.outputs))
            add(f"{name}, 784-400-20", step(row, lambda: MLP(hidden=[HIDDEN]), hand, 100, given.rounds))
    record(results, given.out)


if __name__ == "__main__":
    main()
