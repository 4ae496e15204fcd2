"""The command line. Commands import what is slow themselves, so that help comes at once."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TextIO

import typer

from ppl_vae.runs.spec_file import parse_override, read
from ppl_vae.runs.stops import Stopped, listening

app = typer.Typer(
    name="ppl-vae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
MEMORY = "Expected sizes that fit into memory, and files that are nested less deep; {}. Make them smaller."
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size",
    "overflow",
    "maximum recursion",
)
UNCHECKED = "ppl-vae: Expected a reference that passes its own checks; it did not. The report says what would help."


def _version(asked: bool) -> None:
    if asked:
        print(f"ppl-vae {version('ppl-vae')}")
        raise typer.Exit


What = Literal["encode", "reconstruct", "score", "impute", "predict", "sample", "weights"]
Method = Literal["auto", "closed-form", "quadrature", "ais", "nuts"]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the spec; VALUE is TOML. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Trust = Annotated[bool, typer.Option("--trust-code", help="Allow the program file that a run brings to run.")]
Built = Annotated[
    str | None,
    typer.Option("--program", metavar="FILE.py:NAME", help="What builds the program of a run that Python saved."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto prefers a GPU.")]


@app.callback()
def _common(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Variational autoencoders that one can trust: fit them, and find out how right they are."""


@app.command(epilog="Example: ppl-vae fit models/digits.toml --set svi.epochs=20 --out runs/digits")
def fit(
    spec: Annotated[Path, typer.Argument(help="A spec, a program file.py[:Class], or an interrupted run.")],
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; by default a new one under runs/.")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="A run whose weights it begins with.")] = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a finished run.")] = False,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train what a spec says, evaluate it, and leave a run directory with a report."""
    with plainly() as screen:
        overrides = dict(map(parse_override, set_ or []))
        overrides |= {} if start is None else {"svi.start": str(start.absolute())}
        if not any((spec / name).exists() for name in ("spec.toml", "model.safetensors")):
            read(spec)
        from ppl_vae.runs.console import headline
        from ppl_vae.runs.run import fit_spec

        run = fit_spec(spec, overrides, out=out, device=device, force=force, trust_code=trust_code, say=say)
        if run is not None:  # as in all but the first of several processes
            show(screen, run.report, as_json, lambda: f"{headline(run.report)}\n{run.path / 'report.html'}")


@app.command(epilog="Example: ppl-vae evaluate runs/digits --reference auto --gap --calibration")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    samples: Annotated[int | None, typer.Option(help="Importance samples per datum; by default the spec's.")] = None,
    reference: Annotated[Method | None, typer.Option(help="Compare with a reference posterior by this method.")] = None,
    gap: Annotated[bool, typer.Option("--gap", help="Split log p(x) - ELBO into family and network.")] = False,
    calibration: Annotated[bool, typer.Option("--calibration", help="Test the guide on simulated data.")] = False,
    data: Annotated[int | None, typer.Option(help="Data that the reference and the gap use; by default few.")] = None,
    temperatures: Annotated[int | None, typer.Option(help="Moves per chain of ais; more settle more data.")] = None,
    chains: Annotated[int | None, typer.Option(help="Chains per datum of ais.")] = None,
    device: Device = "auto",
    program: Built = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate a finished run again, and write its report anew.

    The new report holds what this call asks for: --reference, --gap and --calibration of an earlier call are dropped.
    """
    with plainly() as screen:
        from ppl_vae.reports.diagnostics import Diagnostics
        from ppl_vae.runs.console import headline
        from ppl_vae.runs.evaluated import evaluate_run

        asked = Diagnostics(reference, gap, calibration, data, temperatures, chains)
        about: Any = {"program": program, "trust_code": trust_code}
        new = evaluate_run(run, samples=samples, diagnostics=asked, device=device, say=say, **about)
        if new is None:  # as in all but the first of several processes
            return
        show(screen, new.report, as_json, lambda: f"{headline(new.report)}\n{new.path / 'report.html'}")
        if not new.report.get("reference", {}).get("converged", True):
            say(UNCHECKED)
            raise typer.Exit(1)


@app.command(epilog="Example: ppl-vae apply runs/mine score new.csv --out scores.csv")
def apply(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    what: Annotated[What, typer.Argument(help="What to make of the rows; sample makes new ones.")],
    data: Annotated[Path | None, typer.Argument(help="A table or an array; by default the held-out rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new .csv, .tsv, .parquet or .npz; else printed as CSV.")] = None,
    n: Annotated[int, typer.Option("-n", help="Rows of `sample`.")] = 1000,
    samples: Annotated[int | None, typer.Option(help="Importance samples per row.")] = None,
    outlier: Annotated[str | None, typer.Option(help="The label of outliers, for the AUROC of `score`.")] = None,
    program: Built = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Apply a fitted model to rows: their codes, reconstruction or score, in the data's own units; or sample rows."""
    with plainly() as screen:
        from ppl_vae.runs.apply import carry_out
        from ppl_vae.runs.loaded import load_run

        if as_json and out is None:
            raise ValueError("Expected --out beside --json, which prints one object; got none.")
        loaded = load_run(run, program=program, trust_code=trust_code)
        found = carry_out(loaded, what, data, out=out, screen=screen, n=n, samples=samples, outlier=outlier)
        if as_json or out is not None:
            show(screen, found, as_json, lambda: "\n".join(f"{key}: {value}" for key, value in found.items()))


@app.command(epilog="Example: ppl-vae explore runs/digits --out digits.html")
def explore(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path | None, typer.Option(help="A new HTML file; by default RUN.html beside the run.")] = None,
    program: Built = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a page to move through the latent space of a run: one HTML file that works offline."""
    with plainly() as screen:
        from ppl_vae.runs.explore import write_explorer

        file = write_explorer(run, out, program=program, trust_code=trust_code)
        show(screen, {"out": str(file)}, as_json, lambda: str(file))


@app.command(epilog="Example: ppl-vae compare runs/a runs/b")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more runs.")],
    html: Annotated[Path | None, typer.Option(help="A page to write, such as compare.html.")] = None,
    as_json: Json = False,
) -> None:
    """Put finished runs in one table, with paired differences over the same held-out data."""
    with plainly() as screen:
        from ppl_vae.runs.compare import compare_runs
        from ppl_vae.runs.console import comparison

        compared = compare_runs(runs)
        if html is not None:
            from ppl_vae.reports.more_pages import comparison_page

            html.write_text(comparison_page(compared), encoding="utf-8")
        show(screen, compared, as_json, lambda: comparison(compared))


@app.command(epilog="Example: ppl-vae sweep mine.toml --set model.latent=2,4,8 --set svi.seed=0,1,2")
def sweep(
    spec: Annotated[Path, typer.Argument(help="A spec.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE,VALUE", help="The values of a key; each VALUE is TOML. Repeatable."),
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="A TOML file with a list of values for each key.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder, new or of the same sweep; runs/sweep-NAME.")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs side by side; by default one a core.")] = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train a run for each combination of settings, side by side, and compare them over data and seeds."""
    with plainly() as screen:
        read(spec)
        from ppl_vae.runs.sweep import parse_grid, run_sweep, told

        values = parse_grid(set_ or [], grid)
        folder = out or Path("runs") / f"sweep-{spec.stem}"
        found = run_sweep(spec, values, folder, workers=workers, trust_code=trust_code, say=say)
        show(screen, found, as_json, lambda: told(found))
        if found["failed"]:
            raise typer.Exit(1)


@app.command(epilog="Example: ppl-vae check mine.toml --set data.label=species")
def check(
    spec: Annotated[Path, typer.Argument(help="A spec, a program file.py[:Class], or a run.")],
    set_: Set = None,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check whether a spec makes sense and describe what it builds, without training.

    Of a run, check that its files are as they were written, and whether this machine would give the same bits.
    """
    with plainly() as screen:
        overrides = dict(map(parse_override, set_ or []))
        if (spec / "model.safetensors").exists():
            from ppl_vae.runs.check_run import check_run

            found = check_run(spec)
            show(screen, found.to_dict(), as_json, lambda: str(found))
            if found.damaged:
                raise ValueError(f"Expected the files of {spec} as they were written; got others: {found.damaged}.")
            return
        read(spec)
        from ppl_vae.runs.spec import load_spec
        from ppl_vae.runs.storage import is_run

        loaded = load_spec(spec, overrides, trust_code=trust_code or not is_run(spec.parent), say=say)
        result = loaded.check(loaded.load_data())
        show(screen, result.to_dict(), as_json, lambda: str(result))


@app.command(epilog="Example: ppl-vae new mine.toml --data table.csv --set data.label=species")
def new(
    spec: Annotated[Path, typer.Argument(help="The file to write; there must be none of that name.")],
    data: Annotated[str, typer.Option(help="A file, a folder of pictures, or the name of a data set.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Write a commented spec that fits the data at hand, to be changed and trained."""
    with plainly() as screen:
        changes = dict(map(parse_override, set_ or []))
        if strange := [key for key in changes if not key.startswith("data.")]:
            raise ValueError(f"Expected keys of [data], such as data.label; got {strange[0]}. Change the others there.")
        from ppl_vae.runs.new import write_spec

        text, hints = write_spec(spec, data, {key.removeprefix("data."): value for key, value in changes.items()})
        show(screen, {"spec": str(spec), "text": text, "hints": hints}, as_json, lambda: text)
        for hint in hints:
            say(f"look: {hint}")


@app.command("list", epilog="Example: ppl-vae list VampPrior")
def list_(
    role: Annotated[str | None, typer.Argument(help="prior, likelihood, posterior or network; by default all.")] = None,
    name: Annotated[str | None, typer.Argument(help="A family or network, to be described whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the families and networks that a spec can name, or describe one: its support, keys and a table to copy."""
    with plainly() as screen:
        from ppl_vae.runs.catalogue import components, describe, detail, listing

        one = name or (role if role and role[0].isupper() else None)
        if one is None:
            listed = [component._asdict() for component in components(role)]
            show(screen, {"components": listed}, as_json, lambda: listing(listed))
        else:
            about = describe(one)
            show(screen, about, as_json, lambda: detail(about))


@app.command(epilog="Example: ppl-vae schema > spec.schema.json")
def schema() -> None:
    """Print the JSON schema of a spec, by which editors complete and check it."""
    with plainly() as screen:
        from ppl_vae.runs.catalogue import schema_text

        print(schema_text(), end="", file=screen)


@app.command(epilog="Example: ppl-vae demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="The directory of the runs, one per row.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train on real digits, and show how far each approximate posterior is from the exact one."""
    with plainly() as screen:
        from ppl_vae.demo import run_demo

        made = run_demo(out, workers=min(2, os.cpu_count() or 1), say=say)
        show(screen, made, as_json, lambda: str(made["table"]))


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from ppl_vae._processes import leave

            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


class _Forgiving:
    """A stream that may be closed, full or gone, whose loss does not stop the work."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        if name not in ("write", "flush", "isatty"):
            return getattr(self.stream, name)

        def forgiving(*given: str) -> Any:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                return getattr(self.stream, name)(*given)

        return forgiving


@contextlib.contextmanager
def plainly() -> Iterator[TextIO]:
    """Turn a user's mistake into one plain message and exit status 2; faults of ours keep their traceback and 1.

    Yields standard output, for the results. Whatever else is printed, even by a program file, goes to standard error.
    """
    screen, errors = sys.stdout, sys.stderr
    sys.stderr = _Forgiving(errors)  # type: ignore[assignment]
    try:
        with listening(), contextlib.redirect_stdout(sys.stderr):
            yield screen
    except ValueError as error:
        _refuse(str(error))
    except (MemoryError, OverflowError, RuntimeError) as error:
        if "Symlink loop" in str(error):  # of Path.resolve
            _refuse(f"Expected paths that lead somewhere; got a link that leads to itself ({error}). Mend the link.")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in NO_MEMORY):
            raise
        text = (str(error) or type(error).__name__).splitlines()[0]
        _refuse(text if text.startswith("Expected") else MEMORY.format(text))
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        _refuse(
            f"Expected to be able to read and write{where}; {error.strerror or error}. Nothing half-written is left. "
            "Free some space, or choose another place by --out."
        )
    except KeyboardInterrupt as stop:
        say(f"\nppl-vae: {stop if str(stop) else 'interrupted'}")
        raise typer.Exit(128 + getattr(stop, "number", Stopped().number)) from None
    finally:
        sys.stderr = errors


def _refuse(message: str) -> NoReturn:
    say(f"ppl-vae: {message}")
    raise typer.Exit(2) from None


def say(message: str) -> None:
    """Print a message on standard error, if there is any."""
    print(message, file=_Forgiving(sys.stderr), flush=True)  # type: ignore[call-overload]


def show(screen: TextIO, result: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Print a result, as JSON or as text, in what the terminal can show.

    Raises:
        Exit: With status 1 if standard output is closed or full.
    """
    shown = json.dumps(result, allow_nan=False) if as_json else text()
    encoding = getattr(screen, "encoding", None) or "utf-8"
    if shown.encode(encoding, "replace").decode(encoding) != shown:
        shown = shown.replace("±", "+-").encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, file=screen, flush=True)
    except (OSError, ValueError) as error:
        if screen is sys.__stdout__:  # else Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())
        if not isinstance(error, BrokenPipeError):
            say(f"ppl-vae: Expected to be able to print the result; {error}. All else is done.")
        raise typer.Exit(1) from None
