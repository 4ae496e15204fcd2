"""What each of two processes does for `test_processes.py`; the first writes what came of it."""

import sys
from pathlib import Path
from typing import Any

import torch

from ppl_vae import PPCA, VAE, Conditional, Program, data, fit, log_evidence
from ppl_vae import _processes as processes
from ppl_vae.evaluation import inference_gap
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.infer import annealed_importance, bidirectional
from ppl_vae.networks import Linear, Table
from ppl_vae.reports.diagnostics import Diagnostics
from ppl_vae.runs.evaluated import evaluate_run
from ppl_vae.runs.run import fit_spec

OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "device": "cpu", "progress": False}
ANNEALING: dict[str, Any] = {"chains": 4, "temperatures": 12, "leapfrog": 3, "entries": 20 * 4 * 67}  # 20 data a block
DIAGNOSTICS = Diagnostics(reference="ais", gap=True, max_data=20, temperatures=8, chains=4)


def rows() -> torch.Tensor:
    return data.load("digits", dtype=torch.float64).train["x"][:230] / 16


def exact() -> VAE:
    """A program whose guide is exact, so that its loss has no noise."""
    vae = PPCA.fit(rows(), 3).to_vae()
    with torch.no_grad():
        vae.likelihood.network.weight += 0.1
    return vae


def drawing(posterior: Any = None) -> VAE:
    torch.manual_seed(0)
    guide = Conditional(Normal(3), posterior or Linear())
    return VAE(Conditional(StandardNormal(3)), Conditional(Normal(64, scale="shared"), Linear()), guide)


def trained(vae: VAE, **options: Any) -> tuple[list[float], torch.Tensor]:
    """The ELBO of each epoch and all parameters."""
    history = fit(vae, rows(), **{**OPTIONS, **options})
    return history.elbo, torch.cat([one.detach().flatten() for one in vae.parameters()])


def picky() -> Program:
    """A program that does not take the number 99."""
    vae = drawing()

    def model(x: torch.Tensor) -> None:
        if bool((x == 99).any()):
            raise ArithmeticError("99 is too much")
        vae.model(x=x)

    return Program(model, vae.guide)


def estimates(vae: VAE) -> dict[str, Any]:
    """Evaluations whose blocks hold 20 of 50 data."""
    x = rows()[:50]
    return {
        "gap": inference_gap(vae, x, draws=50, steps=30, entries=20 * 10 * 64, seed=1),
        "gap to a bound": inference_gap(vae, x, log_evidence=x[:, 0], draws=9, steps=2, entries=20 * 10 * 64),
        "annealing": annealed_importance(vae, x, seed=2, **ANNEALING),
        "sandwich": bidirectional(vae, x, seed=3, **ANNEALING),
    }


def runs(folder: Path) -> dict[str, Any]:
    """What a run of a spec in the folder leaves, and what is said of a mistake in it, in each process."""
    said: list[str] = []
    run = fit_spec(folder / "spec.toml", out=folder / "run", device="cpu", say=said.append)
    found: dict[str, Any] = {"report": None if run is None else run.report, "said": said}
    try:
        fit_spec(folder / "spec.toml", {"svi.epochs": 0}, out=folder / "other", device="cpu", say=said.append)
    except (ValueError, SystemExit) as error:
        found["mistake"] = repr(error)
    again = evaluate_run(folder / "run", diagnostics=DIAGNOSTICS, device="cpu", say=said.append)
    found["again"] = None if again is None else again.report
    return found


def sums() -> list[tuple[bool, bool]]:
    """Whether sums by shared memory and by gloo are right, in turns that would show a half that is read too late."""
    right = []
    for most in (processes._MOST, 0):
        processes._MOST = most
        processes._SUMS.clear()
        for turn in range(200):
            own = [torch.full((50, 40), turn + 2.0**-number, dtype=torch.float32) for number in range(2)]
            both = processes.average([own[processes.rank()], None, torch.arange(3)[turn % 3 :].double()], 0.5)
            good = torch.equal(both[0], (own[0] + own[1]) / 2) and torch.equal(
                both[2], torch.arange(3)[turn % 3 :] + 0.0
            )
            right.append(
                (good and both[1] is None, all((one.shared is None) == (not most) for one in processes._SUMS.values()))
            )
    return right


def main(folder: Path) -> None:
    """Train, evaluate and try what is refused."""
    found: dict[str, Any] = {}
    found["exact"] = trained(exact(), epochs=8, batch_size=32, clip=1.0)  # its last batch of an epoch has six data
    found["captured"] = trained(exact(), epochs=2, batch_size=50, capture="graph")
    found["drawn"] = trained(drawing(), epochs=8, batch_size=50, validation=rows()[:20])
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, found["drawn"][1])
    found["same"] = torch.equal(*gathered)
    found["sums"] = sums()
    vae = drawing()
    if processes.rank():
        processes.follow(vae)
    else:
        with processes.leading(vae):
            found["evidence"] = log_evidence(vae, rows(), 300, seed=4).log_evidence
            found["alone"] = log_evidence(drawing(), rows(), 300, seed=4).log_evidence
            try:
                log_evidence(vae, rows()[:, :5], 30)
            except ValueError as error:
                found["fails"] = str(error)
            found["estimates"] = estimates(vae)
    odd, program = rows()[:70], picky()  # a program is tried on the first 64
    odd[-1, 0] = 99
    if processes.rank():
        processes.follow(program)
    else:
        with processes.leading(program):
            try:
                annealed_importance(program, odd, **ANNEALING)
            except ArithmeticError as error:
                found["odd"] = str(error), error.__notes__
    for name, program, options in (("table", drawing(Table(230)), {}), ("few", drawing(), {"batch_size": 1})):
        try:
            trained(program, epochs=1, **options)
        except ValueError as error:
            found[name] = str(error)
    torch.set_default_dtype(torch.float32)
    torch.distributed.all_gather_object(gathered, runs(folder))
    found["runs"] = gathered
    if not processes.rank():
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    with processes.group("cpu"):
        main(Path(sys.argv[1]))
    processes.leave(0)
