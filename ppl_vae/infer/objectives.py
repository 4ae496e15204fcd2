"""Objectives by name, and what they ask of a program."""

from typing import Literal

from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO

from ppl_vae.programs.traces import Structure

Objective = Literal["Trace_ELBO", "TraceMeanField_ELBO"]
OBJECTIVES: dict[str, type[ELBO]] = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}


def check_objective(elbo: str, found: Structure) -> None:
    """Refuse `TraceMeanField_ELBO` for latent sites that model and guide visit in different orders."""
    if elbo == "TraceMeanField_ELBO" and not found.same_order:
        raise ValueError(
            f"Expected model and guide to visit the latent sites in one order, {', '.join(found.latents)}, for "
            f"TraceMeanField_ELBO; the guide's "
            "order differs, and the bound would be wrong. Reorder the guide or use Trace_ELBO."
        )
