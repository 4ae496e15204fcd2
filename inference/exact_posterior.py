"""Hold the guide of a run against the exact posterior: python inference/exact_posterior.py runs/ppca."""

import argparse

from ppl_vae import compare_posteriors, exact_log_evidence, exact_posterior, load_run, log_evidence
from ppl_vae._checks import check_int
from ppl_vae.reports.measures import evaluation_split


def main(arguments: list[str] | None = None) -> None:
    """Print, for a few data, how far the approximate posterior of a linear-Gaussian run is from the exact one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--data", type=int, default=5, help="how many of the first data to show")
    parser.add_argument("--trust-code", action="store_true", help="allow the run's program file to be executed")
    given = parser.parse_args(arguments)
    try:
        run = load_run(given.run, trust_code=given.trust_code)
        part, rows = evaluation_split(run.program, run.spec.load_data())
        x = {key: value[: check_int("data", given.data)] for key, value in rows.items()}
        evidence = exact_log_evidence(run.program, x)
        posterior = exact_posterior(run.program, x)
        compared = compare_posteriors(run.program, x)
    except ValueError as error:
        raise SystemExit(f"{given.run}: {error}") from None
    bound = log_evidence(run.program, x, 1000, seed=run.spec.svi.seed).elbo

    print(f"{len(evidence)} data of the {part} part; nats; {posterior.event_shape[0]} latent variables")
    print("log p(x)      ELBO       gap  KL(q||p)        W2  mean error  scale ratio")
    for i, value in enumerate(evidence):
        print(
            f"{value:8.2f} {bound[i]:9.2f} {compared.gap[i]:9.4f} {compared.kl[i]:9.4f} {compared.wasserstein[i]:9.4f} "
            f"{compared.mean_error[i]:11.4f} {compared.scale_ratio[i]:12.4f}"
        )
    print(
        "gap is log p(x) - ELBO in closed form; mean error is in standard deviations of p; scale ratio is sd q / sd p"
    )


if __name__ == "__main__":
    main()
