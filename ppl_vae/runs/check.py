"""What a check of a spec finds: the sites, the parameters, and the work to come."""

from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch

from ppl_vae._seeds import fork_rng
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.traces import trace_pair


@dataclass(frozen=True)
class Check:
    """What `Spec.check` found; `str` gives it as a page for people.

    Args:
        data: the name of the data.
        n_train: data for training.
        features: columns of `x`.
        latents: the latent sites in the model's order and the shape of an event of each.
        observed: the observed sites, likewise.
        kl: for each latent site, whether the objective takes its KL term `analytic` or `sampled`.
        parameters: how many numbers each part learns.
        epochs: passes over the data.
        steps: optimiser steps in all.
        memory: a rough estimate of the bytes that training takes, beyond the libraries themselves.
    """

    data: str
    n_train: int
    features: int
    latents: dict[str, tuple[int, ...]]
    observed: dict[str, tuple[int, ...]]
    kl: dict[str, str]
    parameters: dict[str, int]
    epochs: int
    steps: int
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """Give the findings as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        sites = [f"{name} {('n', *shape)} latent, KL {self.kl[name]}" for name, shape in self.latents.items()]
        sites += [f"{name} {('n', *shape)} observed" for name, shape in self.observed.items()]
        counts = [f"{name} {count:,}" for name, count in self.parameters.items()]
        return "\n".join(
            [
                f"data        {self.data}: {self.n_train:,} data for training, of {self.features} features",
                f"sites       {'; '.join(sites)}".replace("'n'", "n").replace("(n,)", "(n)"),
                f"parameters  {', '.join(counts) or 'none'}; {sum(self.parameters.values()):,} in all",
                f"to come     {self.steps:,} steps in {self.epochs:,} epochs",
                f"memory      about {max(self.memory / 2**20, 0.1):.1f} MiB",
            ]
        )


def try_out(program: Any, batch: dict[str, torch.Tensor], particles: int, nesting: int, seed: int) -> tuple[Any, int]:
    """Score a batch under Pyro's validation: the model's trace, and the bytes kept for gradients."""
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    first = next(iter(batch.values()))
    with scope(program), fork_rng(seed, device=first.device), pyro.validation_enabled(True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            try:
                traces = trace_pair(program, batch, particles, nesting)
                for trace in traces:
                    trace.compute_log_prob()
            except RuntimeError as error:
                raise ValueError(
                    "Expected a program that also runs with dims of particles left of the data's, as evidence needs: "
                    f"shapes (..., n, event); it raised: {str(error).splitlines()[0]}"
                ) from error
    held = [*batch.values(), *(program.parameters() if isinstance(program, torch.nn.Module) else ())]
    for value in held:
        kept.pop(value.untyped_storage().data_ptr(), None)
    return traces[0], sum(kept.values())
