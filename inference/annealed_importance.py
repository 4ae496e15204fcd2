"""Anneal from the prior to the posterior of a run's held-out data: python inference/annealed_importance.py runs/vae."""

import argparse

from ppl_vae import load_run, log_evidence
from ppl_vae._checks import check_int
from ppl_vae.infer.annealing import annealed_importance, bidirectional
from ppl_vae.reports.measures import evaluation_split


def main(arguments: list[str] | None = None) -> None:
    """Print the annealed evidence beside the importance-weighted one, then the sandwich on data from the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--data", type=int, default=8, help="how many of the first data to anneal")
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=500)
    parser.add_argument("--leapfrog", type=int, default=10)
    parser.add_argument("--schedule", choices=("linear", "sigmoid"), default="sigmoid")
    parser.add_argument("--start", choices=("prior", "guide"), default="prior")
    parser.add_argument("--samples", type=int, default=1000, help="of the importance-weighted evidence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-code", action="store_true", help="allow the run's program file to be executed")
    given = parser.parse_args(arguments)
    settings = {name: getattr(given, name) for name in ("chains", "temperatures", "leapfrog", "schedule", "start")}
    try:
        run = load_run(given.run, trust_code=given.trust_code)
        part, rows = evaluation_split(run.program, run.spec.load_data())
        check_int("chains", given.chains, 2)  # one chain tells no error
        x = {key: value[: check_int("data", given.data)] for key, value in rows.items()}
        weighted = log_evidence(run.program, x, given.samples, seed=given.seed)
        annealed = annealed_importance(run.program, x, seed=given.seed, **settings)
        sandwich = bidirectional(run.program, x, seed=given.seed, **settings)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    print(
        f"{part} data, nats per datum: {given.samples} weights, and {given.chains} chains of {given.temperatures} moves"
    )
    print(f"{'datum':>5} {'weighted':>10} {'annealed':>10} {'error':>7} {'chains':>7} {'accepted':>9} {'settled':>8}")
    columns = (weighted.log_evidence, annealed.log_evidence, annealed.error, annealed.ess, annealed.acceptance)
    for number, (w, a, e, ess, rate) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        settled = "yes" if annealed.settled[number] else "no"
        print(f"{number:5d} {w:10.3f} {a:10.3f} {e:7.3f} {ess:7.1f} {rate:9.2f} {settled:>8}")
    error = annealed.error.square().sum().sqrt() / len(annealed.error)
    print(f"{'mean':>5} {weighted.log_evidence.mean():10.3f} {annealed.log_evidence.mean():10.3f} {error:7.3f}")
    if failed := int((~annealed.settled).sum()):
        print(f"{failed} of {len(annealed.settled)} data did not settle: theirs is a lower bound on average. ", end="")
        print("Give more --temperatures, or --chains.")

    print("\ndata drawn from the model: log p(x) lies between, on average")
    print(f"{'datum':>5} {'lower':>10} {'upper':>10} {'gap':>7}")
    columns = (sandwich.lower, sandwich.upper, sandwich.gap)
    for number, (low, high, gap) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        print(f"{number:5d} {low:10.3f} {high:10.3f} {gap:7.3f}")
    print(f"{'mean':>5} {sandwich.lower.mean():10.3f} {sandwich.upper.mean():10.3f} {sandwich.gap.mean():7.3f}")


if __name__ == "__main__":
    main()
