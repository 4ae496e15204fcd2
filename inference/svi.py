"""Train a program by stock Pyro, the loop in sight: python inference/svi.py models/vae.py --latent 10."""

import argparse
import inspect
import math

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from ppl_vae import batches as batching
from ppl_vae import data
from ppl_vae.program import load_program

ELBOS = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}


def main(arguments: list[str] | None = None) -> None:
    """Fit the program to the digits, print the bound as it goes, and leave the weights in a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="file.py or file.py:Class")
    parser.add_argument("--data", default="digits", help="a data set's name or a path to .npy, .npz or .csv")
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--elbo", choices=ELBOS, default="Trace_ELBO")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="where to leave the weights, a .pt file")
    given = parser.parse_args(arguments)

    pyro.set_rng_seed(given.seed)
    x = data.load(given.data).train["x"]
    kind = load_program(given.program)
    sizes = {"features": x.shape[1], "latent": given.latent}
    program = kind(**{name: size for name, size in sizes.items() if name in inspect.signature(kind).parameters})
    if hasattr(program, "initialise"):
        program.initialise(x)

    optimizer = pyro.optim.Adam({"lr": given.learning_rate})
    svi = SVI(program.model, program.guide, optimizer, loss=ELBOS[given.elbo]())
    for epoch in range(given.epochs):
        loss = 0.0
        for batch in batching.batches({"x": x}, given.batch_size, seed=given.seed, epoch=epoch):
            loss += svi.step(**batch)
        if not math.isfinite(loss):
            raise SystemExit(f"Expected a finite loss; got {loss} in epoch {epoch + 1}. Lower --learning-rate.")
        if epoch % 10 == 9 or epoch == given.epochs - 1:
            print(f"epoch {epoch + 1:4d}   ELBO {-loss / len(x):10.3f} nats per datum")
    if given.out:
        torch.save(program.state_dict(), given.out)


if __name__ == "__main__":
    main()
