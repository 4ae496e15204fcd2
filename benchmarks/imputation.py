"""Cells hidden on purpose in real tables, and how well they are imputed: by means, PPCA by EM, and VAEs.

python benchmarks/imputation.py [--share 0.2] [--out benchmarks/results/imputation.json]

A share of the cells is hidden at random, each row keeping one at least; all rows are learned from, and the hidden cells
imputed from the shown ones. RMSE is in units of each column's standard deviation, over all hidden cells, by the mean of
p(hidden | shown); the log score is log p(hidden | shown) in nats per hidden cell, for standardised columns. Errors are
standard errors over rows. Wine is embedded; the penguins' four measurements need penguins.csv under PPL_VAE_DATA.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from clock import record
from torch import Tensor

from ppl_vae import PPCA, VAE, Conditional, fit, impute, load_spec, log_evidence
from ppl_vae._seeds import fork_rng
from ppl_vae.data import load
from ppl_vae.families import FullNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Encoding, Linear

MODELS = Path(__file__).parents[1] / "models"
LATENT = {"wine": 4, "penguins": 2}
VAES: list[tuple[str, list[int], dict[str, Any]]] = [
    ("VAE, linear likelihood", [], {}),
    ("VAE, MLP likelihood", [32], {}),
    ("MIWAE, MLP likelihood", [32], {"elbo": "ImportanceWeighted", "particles": 10, "gradient": "dreg"}),
]


def main() -> None:
    """Impute each table by each method, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.2, help="of the cells that are hidden")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    results = {}
    for name, latent in LATENT.items():
        x = table(name)
        with fork_rng(given.seed, name, device=x.device):
            mask = torch.rand(x.shape) >= given.share
            mask[torch.arange(len(x)), torch.randint(x.shape[1], (len(x),))] = True
        print(f"{name}: {len(x)} rows, {x.shape[1]} columns, {int((~mask).sum())} cells hidden")
        results[name] = compare(x, mask, latent, given)
    record({**vars(given), "tables": results}, given.out)


def table(name: str) -> Tensor:
    """Columns of real numbers without missing cells, in standard units."""
    if name == "wine":
        data = load("wine", scaling="standardize", test_fraction=1e-9 + 1 / 178, dtype=torch.float64)
    else:
        source = load_spec(MODELS / "mixed_table.toml").data.name
        columns = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
        data = load(source, columns=columns, missing="drop rows", test_fraction=0.003, dtype=torch.float64)
    x = torch.cat([data.train["x"], data.test["x"]])
    return (x - x.mean(0)) / x.std(0, correction=0)


def compare(x: Tensor, mask: Tensor, latent: int, given: Any) -> dict[str, Any]:
    """Error and log score of each method."""
    batch = {"x": x.masked_fill(~mask, math.nan), "mask": mask}
    seen = mask.double()
    mean = (seen * x).sum(0) / seen.sum(0)
    scale = ((seen * (x - mean) ** 2).sum(0) / seen.sum(0)).sqrt()
    each = torch.distributions.Normal(mean, scale).log_prob(x)
    ppca = PPCA.fit(batch["x"], latent, mask)
    base = ppca.log_evidence(x) - ppca.log_evidence(x, mask)
    results = {"mean": figures(x, mask, mean.expand_as(x), torch.where(mask, 0.0, each).sum(1), base)}
    results["PPCA by EM"] = figures(x, mask, impute(ppca.to_vae(), batch, 100, draws=1000).mean, base, base)
    for name, hidden, objective in VAES:
        vae = build(x, latent, hidden, given.seed).initialise(batch)
        settings: Any = {"epochs": given.epochs, "batch_size": 32, "learning_rate": 3e-3, "schedule": "one-cycle"}
        settings |= objective
        fit(vae, batch, **settings, seed=given.seed, device="cpu", progress=False)
        found = impute(vae, batch, given.samples, draws=1000, seed=given.seed)
        whole = log_evidence(vae, {"x": x, "mask": torch.ones_like(mask)}, given.samples, seed=given.seed)
        score = whole.log_evidence - found.evidence.log_evidence
        share = float((found.evidence.pareto_k > 0.7).double().mean())
        results[name] = figures(x, mask, found.mean, score, base) | {"pareto_k_above_0.7": share}
    for name, one in results.items():
        k = f", k-hat above 0.7 in {one['pareto_k_above_0.7']:.1%}" if "pareto_k_above_0.7" in one else ""
        rmse, score, apart = (f"{one[key][0]:.3f} ± {one[key][1]:.3f}" for key in ("rmse", "log_score", "above_ppca"))
        print(f"  {name:<24} RMSE {rmse}, log score {score}, above PPCA's by {apart}{k}")
    return results


def build(x: Tensor, latent: int, hidden: list[int], seed: int) -> VAE:
    """A VAE whose guide sees an indicator for each column."""
    features = x.shape[1]
    with fork_rng(seed, "build", device=x.device):
        network = MLP(hidden=hidden, activation="tanh") if hidden else Linear()
        encoding = Encoding(["standardise"] * features, indicators=range(features))
        guide = Conditional(FullNormal(latent), MLP(hidden=[64], activation="tanh"), encoding=encoding)
        likelihood = Conditional(Normal(features, scale="feature"), network)
        return VAE(Conditional(StandardNormal(latent)), likelihood, guide).to(x)


def figures(x: Tensor, mask: Tensor, imputed: Tensor, scores: Tensor, base: Tensor) -> dict[str, Any]:
    """RMSE over hidden cells, mean log score of a cell, and its lead over another; with standard errors over rows."""
    count = (~mask).double().sum(1)

    def ratio(total: Tensor) -> tuple[float, float]:
        value = total.sum() / count.sum()
        error = (total - value * count).square().sum().sqrt() / count.sum()
        return float(value), float(error)

    square, error = ratio(torch.where(mask, 0.0, (imputed - x) ** 2).sum(1))
    rmse = square**0.5, error / (2 * square**0.5)
    return {
        "rmse": rmse,
        "log_score": ratio(scores),
        "above_ppca": ratio(scores - base),
    }


if __name__ == "__main__":
    main()
