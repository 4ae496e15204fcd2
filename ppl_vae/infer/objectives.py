"""Objectives by name, what they require of a program, and the settings that go with them."""

import math
from typing import Any, Literal

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae._seeds import fork_rng
from ppl_vae.infer.elbo import Beta, Elbo
from ppl_vae.infer.importance_weighted import ImportanceWeighted
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.sites import Structure
from ppl_vae.programs.target import Target

Objective = Literal["Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO", "ImportanceWeighted", "Renyi"]
OBJECTIVES: dict[str, Any] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
    "ImportanceWeighted": ImportanceWeighted,
    "Renyi": ImportanceWeighted,
}
WEIGHTED = tuple(name for name, kind in OBJECTIVES.items() if kind is ImportanceWeighted)


def make_objective(
    target: Target,
    learned: list[Tensor],
    *,
    elbo: str,
    particles: int = 1,
    alpha: float | None = None,
    gradient: Any = "plain",
    free_bits: float = 0.0,
    free_bits_per: Any = None,
    beta: Beta | None = None,
) -> Any:
    """An objective that suits a program: called with program and batch, it returns `Terms`; `beta` is its `Beta`.

    The keys are those of `fit`.

    Raises:
        ValueError: As `check_objective`, or if a trial on the first data shows that the guide cannot be scored again,
            for `stl` and `dreg`, or that a KL term has no closed form, for free bits.
    """
    structure = target.structure
    check_objective(elbo, structure, gradient=gradient, free_bits=free_bits)
    if elbo in WEIGHTED:
        made: Any = ImportanceWeighted(structure, learned, particles, alpha or 0.0, gradient)
    else:
        bound = OBJECTIVES[elbo](
            num_particles=particles,
            vectorize_particles=particles > 1 and not structure.sequential,
            max_plate_nesting=structure.nesting,
            strict_enumeration_warning=False,
        )
        made = Elbo(bound, beta, free_bits, free_bits_per or "latent")
    if gradient != "plain" or free_bits:
        _try(target, made)
    return made


@torch.no_grad()
def _try(target: Target, objective: Any) -> None:
    """Let an objective check what only a trial shows, in training mode; the program is left as it was."""
    program, batch = target.program, target.rows(slice(2)).batch if target.structure.rows is None else target.batch
    buffers = [(one, one.clone()) for one in program.buffers()] if isinstance(program, nn.Module) else []
    with scope(program, keep=False, training=True), fork_rng("trial", device=target.device):
        objective.check(program, batch)
    for buffer, value in buffers:
        buffer.copy_(value)


def check_objective(elbo: str, structure: Structure, *, gradient: str = "plain", free_bits: float = 0.0) -> None:
    """Check that an objective suits the latent sites of a program.

    Raises:
        ValueError: Under `TraceMeanField_ELBO`, if model and guide visit them in different orders. Under all objectives
            but `Trace_ELBO` and `TraceEnum_ELBO`, if a draw of the guide has no gradient. Under `TraceEnum_ELBO`, if
            there is nothing to enumerate; under any other, if the model enumerates. Under `ImportanceWeighted` and
            `Renyi`, if a site is a point, or the program takes parts of its data or cannot run several draws side by
            side.
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
    name = f'gradient = "{gradient}"' if gradient != "plain" else elbo
    if elbo not in ("Trace_ELBO", "TraceEnum_ELBO") and structure.not_reparameterised:
        raise ValueError(
            f"Expected reparameterised sites in the guide for {name}; got "
            f"'{structure.not_reparameterised[0]}', whose draws have no gradient. Use Trace_ELBO."
        )
    if elbo == "TraceMeanField_ELBO" and not structure.same_order:
        raise ValueError(
            f"Expected model and guide to visit the latent sites in one order, {', '.join(structure.latents)}, for "
            "TraceMeanField_ELBO; the guide's order differs, and the bound would be wrong. Reorder the guide or use "
            "Trace_ELBO."
        )
    if free_bits and structure.whole:
        raise ValueError(
            "Expected free_bits = 0 where the whole data set counts as one datum; there is no mean KL over data."
        )
    if elbo in WEIGHTED:
        wrong = [f"'{name}', a point (Delta) without a density" for name in structure.points]
        wrong += [f"plate '{structure.subsampled}', which takes a part of the data"] if structure.subsampled else []
        wrong += ["a program that runs one draw at a time"] if structure.sequential else []
        if wrong:
            raise ValueError(
                f"Expected a program with weights of several draws at once for {elbo}; got {wrong[0]}. Use Trace_ELBO."
            )


def check_objective_settings(given: dict[str, Any]) -> None:
    """Check the settings of an objective, those that are given, and that each has an effect.

    Raises:
        ValueError: If one is out of range, or goes with another objective; the first such setting by name.
    """
    elbo, alpha, beta = given.get("elbo"), given.get("alpha"), given.get("beta", 1.0)
    if alpha is not None and (alpha == 1 or not math.isfinite(alpha)):
        raise ValueError(f"Expected `alpha` to be a number other than 1, which is Trace_ELBO; got {alpha!r}.")
    if not 0 < beta < math.inf:
        raise ValueError(f"Expected `beta` to be a positive number; got {beta!r}.")
    if not 0 <= given.get("free_bits", 0.0) < math.inf:
        raise ValueError(f"Expected `free_bits` to be 0 (off) or nats above 0; got {given['free_bits']!r}.")
    if elbo is None or "alpha" not in given:
        return
    if (alpha is None) == (elbo == "Renyi"):
        raise ValueError(f'Expected `alpha`, such as 0.5, with elbo = "Renyi" and no other; got {alpha} with {elbo}.')
    pyros = ("Trace_ELBO", "TraceMeanField_ELBO")
    homes = {"beta": pyros, "warm_up": pyros, "free_bits": pyros[1:], "gradient": WEIGHTED}
    for key, off in {"beta": 1.0, "warm_up": 0, "free_bits": 0.0, "gradient": "plain"}.items():
        if given.get(key, off) != off and elbo not in homes[key]:
            raise ValueError(
                f"Expected `{key}` = {off} with elbo = {elbo!r}; got {given[key]}. Use {' or '.join(homes[key])}."
            )
