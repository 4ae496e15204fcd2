"""One class of a table held out as outliers, found by a VAE's log p(x) and by scikit-learn's isolation forest.

    python benchmarks/outliers.py [--seeds 10] [--out benchmarks/results/outliers.json]

For each seed four fifths of the other classes are learned from; the outliers are then to be told from the last fifth.
AUROC is the probability that an outlier scores lower than another row; its mean over seeds, with the standard error of
that mean. Differences are paired: both see the same rows.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from clock import record
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ppl_vae.estimator import VAEEstimator

TABLES = {"wine": load_wine, "breast_cancer": load_breast_cancer}


def methods(seed: int) -> dict[str, Any]:
    """What scores rows: the higher, the more usual."""
    settings: Any = {"epochs": 200, "learning_rate": 0.01, "random_state": seed}
    vaes = {"linear VAE": (), "VAE": (32,)}
    found = {name: VAEEstimator(4, hidden=hidden, **settings) for name, hidden in vaes.items()}
    return {**found, "isolation forest": IsolationForest(random_state=seed)}


def areas(table: str, outlier: int, seed: int) -> dict[str, float]:
    """AUROC of each method, by the same rows."""
    x, y = TABLES[table](return_X_y=True)
    train, test = train_test_split(x[y != outlier], test_size=0.2, random_state=seed)
    rows = np.concatenate([test, x[y == outlier]])
    usual = np.arange(len(rows)) < len(test)
    pipes = {name: make_pipeline(StandardScaler(), method).fit(train) for name, method in methods(seed).items()}
    return {name: float(roc_auc_score(usual, pipe.score_samples(rows))) for name, pipe in pipes.items()}


def mean(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error."""
    return {"mean": statistics.mean(values), "se": statistics.stdev(values) / math.sqrt(len(values))}


def main() -> None:
    """Compare the methods on each class of each table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", help="a JSON file")
    given, results = parser.parse_args(), {}
    names = list(methods(0))
    print(f"| outliers | {' | '.join(names)} | VAE - forest |\n|---|{'---:|' * (len(names) + 1)}")
    for table, read in TABLES.items():
        for outlier, word in enumerate(read().target_names):
            found = [areas(table, outlier, seed) for seed in range(given.seeds)]
            row = {name: mean([one[name] for one in found]) for name in names}
            row["VAE - forest"] = mean([one["VAE"] - one["isolation forest"] for one in found])
            results[f"{table}: {word}"] = row
            cells = [f"{one['mean']:.3f} ± {one['se']:.3f}" for one in row.values()]
            print(f"| {table}: {word} | {' | '.join(cells)} |", flush=True)
    record({**vars(given), "areas": results}, given.out)


if __name__ == "__main__":
    main()
