"""Saving a program that was built and trained in Python as a run."""

from pathlib import Path
from typing import Any

from ppl_vae._checks import check_int
from ppl_vae.data.loading import Data
from ppl_vae.data.memory import as_data
from ppl_vae.infer.step import History
from ppl_vae.programs.param_store import adopt
from ppl_vae.programs.rows import numbered
from ppl_vae.programs.target import Target
from ppl_vae.runs.built import Built, tables_of
from ppl_vae.runs.evaluated import write_run
from ppl_vae.runs.loaded import Run
from ppl_vae.runs.spec_file import Say, quiet
from ppl_vae.runs.trained import pick_place


def save_run(
    program: Any,
    data: Any,
    history: History,
    folder: str | Path,
    *,
    samples: int = 1000,
    seed: int = 0,
    force: bool = False,
    say: Say = quiet,
) -> Run:
    """Evaluate a program that was built and trained in Python, and save it as a run.

    The folder holds what `ppl-vae fit` leaves: weights, metrics, the report with its pictures; `ppl-vae compare` takes
    it. Since no spec can build the program again, `load_run(folder, program=...)` wants it, with whatever weights.

    Args:
        program: any trained program; what stock Pyro left of it in the parameter store is saved too.
        data: what it was trained on, a `Data` from `load` or `as_data`.
        history: what `fit` returned. For a loop of your own, a `History` with the ELBO of each epoch in nats per datum,
            the `seconds` since the start, and the number of `steps`.
        folder: the run directory.
        samples: importance samples per datum.
        seed: of all draws of the evaluation, if the history does not know one.
        force: whether to replace a finished run there.
        say: takes messages for the user.

    Raises:
        TypeError: If the history is something else.
        ValueError: If the history is empty, the data do not fit the program, or the folder holds something else.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ppl_vae import VAE, Conditional, fit, save_run
        >>> from ppl_vae.data import load
        >>> from ppl_vae.families import Normal, StandardNormal
        >>> from ppl_vae.networks import Linear
        >>> wine = load("wine", scaling="standardize")
        >>> def part(family):
        ...     return Conditional(family, Linear())
        >>> vae = VAE(Conditional(StandardNormal(2)), part(Normal(13, scale="shared")), part(Normal(2)))
        >>> history = fit(vae.initialise(wine.train), wine, epochs=5)
        >>> with TemporaryDirectory() as folder:
        ...     run = save_run(vae, wine, history, f"{folder}/wine")
        >>> run.report["data"]["part"], run.report["train"]["epochs"]
        ('test', 5)
    """
    if not isinstance(history, History):
        raise TypeError(
            f"Expected a History, from `fit` or by History(elbo=[...], seconds=[...]); got {type(history).__name__}."
        )
    if not history.elbo or len(history.seconds) != len(history.elbo):
        raise ValueError(
            f"Expected a history with `elbo` and `seconds` of each epoch; got {len(history.elbo)} bounds and "
            f"{len(history.seconds)} times. `fit` returns one."
        )
    data = data if isinstance(data, Data) else as_data(data)
    settings = {"elbo": "a loop of one's own", "particles": 1, "seed": seed} | history.settings
    target = Target(program, numbered(program, data.train))
    adopt(program, (target if target.structure.rows is not None else target.rows(slice(2))).traces(1, seed))
    spec = Built(Path(folder) / "spec.toml", tables_of(program, data, settings, check_int("samples", samples)))
    with pick_place(spec, folder, force=force, say=say) as place:
        return write_run(place, spec, program, data, vars(history))
