"""Sample the posterior of a few of a run's held-out data by NUTS: python inference/nuts.py runs/vae --data 2."""

import argparse

from ppl_vae import load_run
from ppl_vae._checks import check_int
from ppl_vae.evaluation.latents import codes
from ppl_vae.infer.reference import reference_posterior
from ppl_vae.reports.measures import evaluation_split


def main(arguments: list[str] | None = None) -> None:
    """Print each latent's mean and scale by NUTS beside the guide's; the exit status is 1 where NUTS did not mix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--data", type=int, default=2, help="how many of the first data to sample")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-code", action="store_true", help="allow the run's program file to be executed")
    given = parser.parse_args(arguments)
    settings = {name: getattr(given, name) for name in ("draws", "warmup", "chains", "seed")}
    try:
        run = load_run(given.run, trust_code=given.trust_code)
        part, rows = evaluation_split(run.program, run.spec.load_data())
        x = {key: value[: check_int("data", given.data)] for key, value in rows.items()}
        found = reference_posterior(run.program, x, "nuts", **settings)
        loc, variance = codes(run.program, x, 1000, seed=given.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    spread = found.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    names = [f"{name}[{i}]" for name, value in found.sites.items() for i in range(value[0].numel())]
    print(f"{part} data, {given.chains} chains of {given.draws} draws")
    print(f"{'datum':>5} {'latent':>10} {'mean':>9} {'scale':>8} {'guide mean':>11} {'guide scale':>12}")
    for row in range(len(found.loc)):
        for column, name in enumerate(names):
            exact = f"{found.loc[row, column]:9.3f} {spread[row, column]:8.3f}"
            print(f"{row:5d} {name:>10} {exact} {loc[row, column]:11.3f} {variance[row, column].sqrt():12.3f}")
    r_hat, ess, settled = (found.diagnostics[name] for name in ("r_hat", "ess", "settled"))
    print(f"R-hat {r_hat.max():.4f}, as good as {ess.min():.0f} independent draws, ", end="")
    print(f"divergences {int(found.diagnostics['divergences'].sum())}")
    if not found.converged:
        failed = f"{int((~settled).sum())} of {len(settled)} data"
        raise SystemExit(f"NUTS did not converge on {failed}: ask for more --warmup and --draws.")


if __name__ == "__main__":
    main()
