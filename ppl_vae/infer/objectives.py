"""Objectives by name, and what they require of a program."""

from typing import Literal

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from ppl_vae.programs.sites import Structure

Objective = Literal["Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO"]
OBJECTIVES: dict[str, type[ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
}


def check_objective(elbo: str, structure: Structure) -> None:
    """Check that an objective suits the latent sites of a program.

    Raises:
        ValueError: Under `TraceMeanField_ELBO`, if model and guide visit them in different orders, or a draw of the
            guide has no gradient; under `TraceEnum_ELBO`, if there is nothing to enumerate; under any other, if the
            model enumerates.
    """
    alone = [name for name in structure.enumerated if name not in structure.enumerated_by_guide]
    if alone and elbo != "TraceEnum_ELBO":
        raise ValueError(
            f"Expected elbo = 'TraceEnum_ELBO' for a model that enumerates '{alone[0]}', which the guide lacks; got "
            f"{elbo!r}, which would draw it from the prior."
        )
    if elbo == "TraceEnum_ELBO" and not structure.enumerated and not structure.not_reparameterised:
        raise ValueError(
            "Expected discrete latent sites to enumerate for TraceEnum_ELBO; got none. Use Trace_ELBO, or mark a site "
            "infer={'enumerate': 'parallel'}."
        )
    if elbo == "TraceMeanField_ELBO" and structure.not_reparameterised:
        raise ValueError(
            f"Expected reparameterised sites in the guide for TraceMeanField_ELBO; got "
            f"'{structure.not_reparameterised[0]}', whose draws have no gradient. Use Trace_ELBO."
        )
    if elbo == "TraceMeanField_ELBO" and not structure.same_order:
        raise ValueError(
            f"Expected model and guide to visit the latent sites in one order, {', '.join(structure.latents)}, for "
            "TraceMeanField_ELBO; the guide's order differs, and the bound would be wrong. Reorder the guide or use "
            "Trace_ELBO."
        )
