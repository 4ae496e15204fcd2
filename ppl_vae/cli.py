"""The command line. Torch and Pyro are imported by the commands that need them, not to show help."""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ppl_vae.runs.console import comparison, headline, listing

app = typer.Typer(
    name="ppl-vae",
    help="Variational autoencoders that one can trust: fit them, and find out how right they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
UNWRITABLE = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EACCES", "EPERM", "EROFS", "EBUSY", "EMFILE"),
        *("ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ENAMETOOLONG", "ELOOP"),
    )
    if hasattr(errno, name)
}


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Reference(StrEnum):
    """How to find the posterior without the guide."""

    auto = "auto"
    closed_form = "closed-form"
    quadrature = "quadrature"
    ais = "ais"
    nuts = "nuts"


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the spec; VALUE is TOML. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Trust = Annotated[bool, typer.Option("--trust-code", help="Allow a run's copy of a program file to be executed.")]
Place = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")]


@app.command()
def fit(
    spec: Annotated[
        Path,
        typer.Argument(help="A spec, a program file.py[:Class], or the directory of an interrupted run to go on with."),
    ],
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the run goes; by default a new directory under runs/.")
    ] = None,
    device: Place = Device.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished run.")] = False,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train what a spec says, evaluate it, and leave a run directory with a report."""
    with plainly() as screen:
        changes = overrides(set_)
        if not any((spec / name).exists() for name in ("spec.toml", "model.safetensors")):
            read_toml(spec)
        from ppl_vae.runs.run import fit_spec

        run = fit_spec(spec, changes, out=out, device=device.value, force=force, trust_code=trust_code, say=say)
        show(screen, run.report, as_json, lambda: f"{headline(run.report)}\n{run.path / 'report.md'}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    samples: Annotated[int | None, typer.Option(help="Importance samples a datum; as in the spec by default.")] = None,
    reference: Annotated[
        Reference | None, typer.Option(help="Hold log p(x) against a reference posterior by this method.")
    ] = None,
    gap: Annotated[
        bool, typer.Option("--gap", help="Split log p(x) - ELBO into the family's and the network's.")
    ] = False,
    calibration: Annotated[bool, typer.Option("--calibration", help="Test the guide on data of the model.")] = False,
    data: Annotated[
        int | None,
        typer.Option(help="How many data, of those there are, the reference and the gap look at; few by default."),
    ] = None,
    temperatures: Annotated[
        int | None, typer.Option(help="Moves of each chain, where the reference is by ais; more settle more data.")
    ] = None,
    chains: Annotated[int | None, typer.Option(help="Chains a datum, where the reference is by ais.")] = None,
    device: Place = Device.auto,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate a finished run again and make its report anew.

    What an earlier --reference, --gap or --calibration found is replaced: give all that the report shall hold at once.
    """
    with plainly() as screen:
        from ppl_vae.runs.run import evaluate_run

        asked: dict[str, Any] = {"reference": reference and reference.value, "gap": gap, "calibration": calibration}
        asked |= {"looked": data, "temperatures": temperatures, "chains": chains}
        done = evaluate_run(run, samples=samples, device=device.value, trust_code=trust_code, **asked)
        show(screen, done.report, as_json, lambda: f"{headline(done.report)}\n{done.path / 'report.md'}")
        if not done.report.get("reference", {}).get("converged", True):
            say(
                "ppl-vae: Expected a reference that passes its own checks; it did not. The report says what would help."
            )
            raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run directories.")],
    as_json: Json = False,
) -> None:
    """Put finished runs in one table, with paired differences over the same held-out data."""
    with plainly() as screen:
        from ppl_vae.runs.compare import compare_runs

        found = compare_runs(runs)
        show(screen, found, as_json, lambda: comparison(found))


@app.command()
def check(
    spec: Annotated[Path, typer.Argument(help="A spec, or a program file.py[:Class].")],
    set_: Set = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what a spec would build and whether it makes sense, without training."""
    with plainly() as screen:
        changes = overrides(set_)
        read_toml(spec)
        from ppl_vae.runs.spec import load_spec
        from ppl_vae.runs.storage import is_run

        loaded = load_spec(spec, changes, trust_code=trust_code or not is_run(spec.parent))
        if loaded.model.program is not None:
            say(f"runs the code of {loaded.model.program}")
        found = loaded.check(loaded.load_data())
        show(screen, found.to_dict(), as_json, lambda: str(found))


@app.command("list")
def list_(
    role: Annotated[str | None, typer.Argument(help="prior, likelihood, posterior or network; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """List the families and networks that a spec can name, with their keys."""
    with plainly() as screen:
        from ppl_vae.runs.schema import components

        found = components(role)
        plain = {"components": [component._asdict() for component in found]}
        show(screen, plain, as_json, lambda: "\n".join(listing(plain["components"])))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The directory that takes a run a row.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train on real digits, and show how far each approximate posterior is from the exact one."""
    with plainly() as screen:
        from ppl_vae.demo import run_demo

        found = run_demo(out, say=say)
        show(screen, found, as_json, lambda: str(found["table"]))


def main() -> None:
    """Run the command line."""
    app()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is to keep what was trained as Ctrl-C does."""


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


@contextlib.contextmanager
def plainly() -> Iterator[TextIO]:
    """Turn a user's mistake into one plain message and exit status 2; faults of ours keep their traceback and 1.

    Gives standard output for the results; whatever else is printed, by a program's file too, goes to standard error.
    """
    screen = sys.stdout
    mainly = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _terminate) if mainly else None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield screen
    except ValueError as error:
        say(f"ppl-vae: {error}")
        raise typer.Exit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = f" at {error.filename}" if error.filename else ""
        say(
            f"ppl-vae: Expected to be able to read and write{where}; {error.strerror}. Nothing half-written is left. "
            "Free the place, or choose another by --out."
        )
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        say(f"\nppl-vae: {stop if str(stop) else 'interrupted'}")
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        if mainly:
            signal.signal(signal.SIGTERM, former)


def say(message: str) -> None:
    """Tell the user something on standard error."""
    print(message, file=sys.stderr, flush=True)


def show(screen: TextIO, found: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Print results, as JSON or as text."""
    print(json.dumps(found, allow_nan=False) if as_json else text(), file=screen, flush=True)


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Read the `--set` options."""
    from ppl_vae.runs.spec_file import parse_override

    return dict(parse_override(pair) for pair in pairs or [])


def read_toml(path: Path) -> None:
    """Refuse a file that is missing or no TOML before anything slow is imported."""
    from ppl_vae.runs.spec_file import read

    read(path)
