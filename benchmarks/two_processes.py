"""Seconds of a training step of 784-400-20 with 512 data in each of the processes that torchrun has started."""

import time
from typing import Any

import torch

from ppl_vae import VAE, Conditional, fit
from ppl_vae import _processes as processes
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.networks import MLP

STEPS, EPOCHS, SKIPPED = 20, 12, 5


def main() -> None:
    """Train, and print the median of the epochs after some."""
    torch.manual_seed(0)
    vae = VAE(
        Conditional(StandardNormal(20)),
        Conditional(Bernoulli(784), MLP(hidden=[400])),
        Conditional(Normal(20), MLP(hidden=[400])),
    )
    size = 512 * processes.size()
    x = (torch.rand(STEPS * size, 784) < 0.13).float()
    marks: list[float] = []

    def on_epoch(epoch: int, state: Any) -> None:
        marks.append(time.perf_counter())

    fit(vae, x, epochs=EPOCHS, batch_size=size, device="cpu", progress=False, on_epoch=on_epoch)
    each = sorted(after - before for before, after in zip(marks[SKIPPED:-1], marks[SKIPPED + 1 :], strict=True))
    if not processes.rank():
        print(each[len(each) // 2] / STEPS)


if __name__ == "__main__":
    with processes.group("cpu"):
        main()
    processes.leave(0)
