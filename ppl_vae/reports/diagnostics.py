"""Diagnostics of a run: how far its answer is from a reference, why, and whether its guide is calibrated."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Diagnostics:
    """Which diagnostics a report includes; by default none.

    Args:
        reference: method of `reference_posterior` to compare the evidence with.
        gap: whether to split log p(x) - ELBO into its parts.
        calibration: whether to test the guide on data simulated from the model.
        max_data: how many data the reference and the gap are computed for, by default as many as the method can bear.
        temperatures: moves of each chain of annealing, 500 by default.
        chains: chains of annealing per datum, 16 by default.
    """

    reference: str | None = None
    gap: bool = False
    calibration: bool = False
    max_data: int | None = None
    temperatures: int | None = None
    chains: int | None = None

    @property
    def options(self) -> str:
        """The options of `ppl-vae evaluate` that ask for the same, each after a space."""
        given = {"data" if name == "max_data" else name: value for name, value in asdict(self).items()}
        chosen = {name: value for name, value in given.items() if value is not None and value is not False}
        return "".join(f" --{name}" + f" {value}" * (value is not True) for name, value in chosen.items())
