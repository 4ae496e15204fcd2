"""Turn log weights into evidence that knows its error: python inference/importance_weighted.py runs/ppca."""

import argparse
import math

import torch

from ppl_vae import load_run, log_evidence, log_weights
from ppl_vae._checks import check_int
from ppl_vae.reports.measures import evaluation_split


def main(arguments: list[str] | None = None) -> None:
    """Estimate the evidence of a run's held-out data by hand, beside the library's answer from the same weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--data", type=int, default=100, help="how many of the first data to weigh")
    parser.add_argument("--trust-code", action="store_true", help="allow the run's program file to be executed")
    given = parser.parse_args(arguments)
    try:
        run = load_run(given.run, trust_code=given.trust_code)
        part, rows = evaluation_split(run.program, run.spec.load_data())
        x, seed = {key: value[: check_int("data", given.data)] for key, value in rows.items()}, run.spec.svi.seed
        log_w = log_weights(run.program, x, given.samples, seed=seed)  # log p(x, z_i) - log q(z_i | x), (k, n)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    k, n = log_w.shape
    elbo = log_w.mean(0)  # E_q log w
    evidence = log_w.logsumexp(0) - math.log(k)  # log of the mean weight
    weights = torch.softmax(log_w, 0)
    ess = 1 / weights.square().sum(0)  # (sum w)^2 / sum w^2
    chi2 = (k / ess - 1).clamp_min(0) * k / max(k - 1, 1)  # relative variance of the weights
    error = (chi2 / k).sqrt()  # of one datum's log evidence, by the delta method
    bias = -chi2 / (2 * k)

    known = log_evidence(run.program, x, given.samples, seed=seed)
    print(f"{n} data of the {part} part, {k} weights each, nats per datum; the library's {known.kind} on the right")
    for name, mine, theirs in (
        ("ELBO", elbo, known.elbo),
        ("log evidence", evidence, known.log_evidence),
        ("bias", bias, known.bias),
        ("effective samples", ess, known.ess),
    ):
        print(f"{name:<20} {mine.mean():12.5f} {theirs.mean():12.5f}")
    total, theirs = error.square().sum().sqrt() / n, known.mc_se.square().sum().sqrt() / n
    print(f"{'Monte Carlo error':<20} {total:12.5f} {theirs:12.5f}")


if __name__ == "__main__":
    main()
