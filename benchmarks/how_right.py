"""Evidence, annealing and the gap on MNIST, by a model of two layers of 200 and 50 latents, trained for a few epochs.

python benchmarks/how_right.py [--epochs 4] [--out benchmarks/results/how_right.json]

On 100 held-out images: is the lower bound by annealed importance sampling above the importance-weighted one, are both
parts of the gap at least 0, and does the sandwich close on data that the model made? Needs MNIST under PPL_VAE_DATA.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from clock import record

from ppl_vae import fit, load_spec, log_evidence
from ppl_vae.evaluation.gap import inference_gap
from ppl_vae.infer.annealing import annealed_importance, bidirectional
from ppl_vae.infer.svi import SETTINGS

MODELS = Path(__file__).parents[1] / "models"


def main() -> None:
    """Run all, print the figures, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=500)
    parser.add_argument("--leapfrog", type=int, default=10)
    parser.add_argument("--simulated", type=int, default=20)
    parser.add_argument("--simulated-temperatures", type=int, default=2000)
    parser.add_argument("--many", type=int, default=1000, help="images whose gap is split by importance sampling alone")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    layers = {"family": "MLP", "hidden": [200, 200], "activation": "tanh"}
    changes = {"likelihood.network": layers, "posterior.network": layers, "svi.batch_size": 100}
    spec = load_spec(MODELS / "mnist.toml", {**changes, "svi.epochs": given.epochs})
    data = spec.load_data()
    program: Any = spec.build(data)
    began = time.perf_counter()
    history = fit(program, data, **{key: getattr(spec.svi, key) for key in (*SETTINGS, "seed")})
    found: dict[str, Any] = {"epochs": given.epochs, "train_elbo": history.elbo[-1], "train_seconds": seconds(began)}
    x = {key: value[: given.images] for key, value in data.test.items()}

    began = time.perf_counter()
    weighted = log_evidence(program, x, 5000)
    found["importance_weighted"] = {
        "samples": 5000,
        "elbo": float(weighted.elbo.mean()),
        "log_evidence": float(weighted.log_evidence.mean()),
        "kind": weighted.kind,
        "seconds": seconds(began),
    }
    print(json.dumps(found["importance_weighted"]))

    began = time.perf_counter()
    settings = {"chains": given.chains, "temperatures": given.temperatures, "leapfrog": given.leapfrog}
    annealed = annealed_importance(program, x, **settings)
    spread = (annealed.error**2 + weighted.mc_se**2).sqrt()
    above = annealed.log_evidence >= weighted.log_evidence - 2 * spread
    found["annealing"] = {
        **settings,
        "log_evidence": float(annealed.log_evidence.mean()),
        "mean_difference": float((annealed.log_evidence - weighted.log_evidence).mean()),
        "above_within_2_errors": int(above.sum()),
        "above": int((annealed.log_evidence >= weighted.log_evidence).sum()),
        "images": given.images,
        "median_error": float(annealed.error.median()),
        "seconds": seconds(began),
    }
    print(json.dumps(found["annealing"]))

    began = time.perf_counter()
    few = {key: value[: given.simulated] for key, value in x.items()}
    longer = {**settings, "temperatures": given.simulated_temperatures}
    sandwich = bidirectional(program, few, **longer)
    found["sandwich"] = {
        **longer,
        "data": given.simulated,
        "mean_gap": float(sandwich.gap.mean()),
        "median_gap": float(sandwich.gap.median()),
        "largest_gap": float(sandwich.gap.max()),
        "seconds": seconds(began),
    }
    print(json.dumps(found["sandwich"]))

    began = time.perf_counter()
    gap = inference_gap(program, x, log_evidence=annealed)
    found["gap"] = {
        "total": float(gap.total.mean()),
        "approximation": float(gap.approximation.mean()),
        "amortization": float(gap.amortization.mean()),
        "approximation_not_below_0_within_3_errors": int((gap.approximation >= -3 * gap.approximation_error).sum()),
        "amortization_not_below_0_within_3_errors": int((gap.amortization >= -3 * gap.amortization_error).sum()),
        "images": given.images,
        "seconds": seconds(began),
    }
    print(json.dumps(found["gap"]))

    began = time.perf_counter()
    many = inference_gap(program, {key: value[: given.many] for key, value in data.test.items()})
    found["gap_of_many"] = {
        "total": float(many.total.mean()),
        "approximation": float(many.approximation.mean()),
        "amortization": float(many.amortization.mean()),
        "amortization_not_below_0_within_3_errors": int((many.amortization >= -3 * many.amortization_error).sum()),
        "images": given.many,
        "seconds": seconds(began),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(found["gap_of_many"]))
    record(found, given.out)


def seconds(began: float) -> float:
    """Give the time since then."""
    return round(time.perf_counter() - began, 1)


if __name__ == "__main__":
    main()
