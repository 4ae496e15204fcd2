"""The command line. Torch and Pyro are imported by the commands that need them, not to show help."""

import contextlib
import errno
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="ppl-vae",
    help="Variational autoencoders that one can trust: fit them, and find out how right they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the spec; VALUE is TOML. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Trust = Annotated[bool, typer.Option("--trust-code", help="Allow a run's copy of a program file to be executed.")]
Place = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")]


@app.command()
def fit(
    spec: Annotated[Path, typer.Argument(help="A spec, or the directory of an interrupted run to go on with.")],
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the run goes; by default a new directory under runs/.")
    ] = None,
    device: Place = Device.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished run.")] = False,
    as_json: Json = False,
) -> None:
    """Train what a spec says, evaluate it, and leave a run directory with a report."""
    with plainly():
        read_toml(spec / "spec.toml" if spec.is_dir() else spec)
        from ppl_vae.run import fit_spec

        run = fit_spec(spec, overrides(set_), out=out, device=device.value, force=force, say=say)
        show(run.report, as_json, lambda: f"{headline(run.report)}\n{run.path / 'report.md'}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    samples: Annotated[int | None, typer.Option(help="Importance samples a datum; as in the spec by default.")] = None,
    device: Place = Device.auto,
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate a finished run again and rewrite its report."""
    with plainly():
        from ppl_vae.run import evaluate_run

        done = evaluate_run(run, samples=samples, device=device.value, trust_code=trust_code)
        show(done.report, as_json, lambda: f"{headline(done.report)}\n{done.path / 'report.md'}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run directories.")],
    as_json: Json = False,
) -> None:
    """Put finished runs in one table, with paired differences over the same held-out data."""
    with plainly():
        from ppl_vae.run import compare_runs

        found = compare_runs(runs)
        show(found, as_json, lambda: comparison(found))


@app.command()
def check(
    spec: Annotated[Path, typer.Argument(help="A spec.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a spec would build and whether it makes sense, without training."""
    with plainly():
        read_toml(spec)
        from ppl_vae.spec import load_spec

        loaded = load_spec(spec, overrides(set_))
        found = loaded.check(loaded.load_data())
        show(found.to_dict(), as_json, lambda: str(found))


@app.command("list")
def list_(
    role: Annotated[str | None, typer.Argument(help="prior, likelihood, posterior or network; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """List the families and networks that a spec can name, with their keys."""
    with plainly():
        from ppl_vae.schema import components

        found = components(role)
        plain = {"components": [component._asdict() for component in found]}
        show(plain, as_json, lambda: "\n".join(listing(plain["components"])))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The directory that takes a run a row.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train on real digits, and show how far each approximate posterior is from the exact one."""
    with plainly():
        from ppl_vae.demo import run_demo

        found = run_demo(out)
        show(found, as_json, lambda: str(found["table"]))


def main() -> None:
    """Run the command line."""
    app()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Turn a user's mistake into one plain message and exit status 2; faults of ours keep their traceback and 1."""
    try:
        yield
    except ValueError as error:
        say(f"ppl-vae: {error}")
        raise typer.Exit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM):
            raise
        where = f" at {error.filename}" if error.filename else ""
        say(f"ppl-vae: Expected to be able to write{where}; {error.strerror}. Nothing half-written is left. Use --out.")
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        say(f"\nppl-vae: {stop or 'interrupted'}")
        raise typer.Exit(130) from None


def say(message: str) -> None:
    """Tell the user something on standard error."""
    print(message, file=sys.stderr)


def show(found: Any, as_json: bool, text: Any) -> None:
    """Print results on standard output, as JSON or as text."""
    print(json.dumps(found, allow_nan=False) if as_json else text())


def headline(report: Mapping[str, Any]) -> str:
    """Give the figures that matter most, a line each."""
    test = report["test"]
    value, bound = test["log_evidence"], test["elbo"]
    sign = ">=" if value["kind"] == "lower bound" else "  "
    lines = [
        f"ELBO             {bound['mean']:.3f} nats per datum{_plus(bound['se'])}",
        f"log evidence  {sign} {value['mean']:.3f}{_plus(value['se'])} ({value['kind']}, K = {test['samples']})",
    ]
    if report["exact"]:
        lines.append(f"exact            {report['exact']['log_evidence']:.3f} ({report['exact']['method']})")
    if report["baseline"]:
        lines.append(f"PPCA             {report['baseline']['ppca']['log_evidence']:.3f} (closed form)")
    return "\n".join(lines)


def _plus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


def comparison(found: Mapping[str, Any]) -> str:
    """Lay runs out as a table, with their paired differences below."""
    rows = [("run", "ELBO", "log evidence", "exact", "PPCA")]
    for run in found["runs"]:
        value = run["test"]["log_evidence"]
        sign = ">= " if value["kind"] == "lower bound" else ""
        exact, ppca = run["exact"], run["baseline"]
        rows.append(
            (
                run["path"],
                f"{run['test']['elbo']['mean']:.3f}",
                f"{sign}{value['mean']:.3f}{_plus(value['se'])}",
                f"{exact['log_evidence']:.3f}" if exact else "-",
                f"{ppca['ppca']['log_evidence']:.3f}" if ppca else "-",
            )
        )
    lines = [*table(rows), "", "Differences of log evidence, nats per datum, paired over the same held-out data:"]
    lines += [f"{one['a']} - {one['b']}: {one['mean']:+.3f}{_plus(one['se'])}" for one in found["differences"]]
    return "\n".join(lines)


def listing(found: list[dict[str, Any]]) -> list[str]:
    """Lay components out by role."""
    lines: list[str] = []
    for role in dict.fromkeys(component["role"] for component in found):
        lines += [role]
        for one in found:
            if one["role"] == role:
                keys = ", ".join(key if value is None else f"{key} = {value}" for key, value in one["keys"].items())
                lines += [f"  {one['name']:<15} {one['doc']}" + (f" [{keys}]" if keys else "")]
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out in columns under the first, names to the left and figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Read the `--set` options."""
    from ppl_vae.toml import parse_override

    return dict(parse_override(pair) for pair in pairs or [])


def read_toml(path: Path) -> None:
    """Refuse a file that is no TOML before anything slow is imported."""
    from ppl_vae.toml import read

    read(path)
