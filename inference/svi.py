"""Train by stock Pyro, the loop in sight, and leave a run: python inference/svi.py models/ppca.toml --out runs/svi."""

import argparse
import math
import time

import pyro.infer

from ppl_vae import Spec, load_spec
from ppl_vae.data import minibatches
from ppl_vae.programs.traces import check_batch
from ppl_vae.runs.evaluated import write_run
from ppl_vae.runs.places import Place
from ppl_vae.runs.spec_file import parse_override
from ppl_vae.runs.trained import pick_place

LOOP = {"svi.optimizer": "Adam", "svi.schedule": "constant", "svi.clip": 0.0, "svi.keep": "last"}  # what it does
LOOP |= {"svi.beta": 1.0, "svi.warm_up": 0, "svi.free_bits": 0.0, "svi.weight_decay": 0.0, "svi.patience": 0}


def main(arguments: list[str] | None = None) -> None:
    """Fit a spec or a program by `SVI.step` at a constant learning rate, and leave its run directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", help="a spec, or a program file.py[:Class]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the spec")
    parser.add_argument("--out", help="the run directory; by default a new one under runs/")
    given = parser.parse_args(arguments)
    try:
        spec = load_spec(given.spec, {**LOOP, **dict(map(parse_override, given.set))})
        if spec.svi.elbo not in (known := ("Trace_ELBO", "TraceMeanField_ELBO")):
            raise ValueError(f"Expected svi.elbo to be {' or '.join(known)}, for stock Pyro; got {spec.svi.elbo}.")
        with pick_place(spec, given.out) as place:
            train(spec, place)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def train(spec: Spec, place: Place) -> None:
    """Train what a spec says, and write its run."""
    program, how = spec.build(data := spec.load_data()), spec.svi
    spec.check(data, program)
    elbo = getattr(pyro.infer, how.elbo)(num_particles=how.particles, vectorize_particles=how.particles > 1)
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": how.learning_rate}), loss=elbo)
    pyro.set_rng_seed(how.seed)
    bounds, seconds, began = [], [], time.perf_counter()
    for epoch in range(how.epochs):
        drawn = check_batch(program, data.epoch(epoch))
        loss = math.fsum(svi.step(**batch) for batch in minibatches(drawn, how.batch_size, seed=how.seed, epoch=epoch))
        if not math.isfinite(loss):
            raise SystemExit(f"Expected a finite loss; got {loss} in epoch {epoch + 1}. Lower svi.learning_rate.")
        bounds.append(-loss / len(data.train["x"]))
        seconds.append(time.perf_counter() - began)
        print(f"epoch {epoch + 1:4d}   ELBO {bounds[-1]:10.3f} nats per datum")
    history = {"elbo": bounds, "validation": [], "learning_rate": [how.learning_rate] * len(bounds), "seconds": seconds}
    steps = len(bounds) * math.ceil(len(drawn["x"]) / how.batch_size)
    print(write_run(place, spec, program, data, {**history, "steps": steps}).path / "report.md")


if __name__ == "__main__":
    main()
