"""`Run`: a finished run, loaded without pickles or data, and what its program says of rows."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from ppl_vae._checks import check_int
from ppl_vae.data.columns import Columns
from ppl_vae.evaluation.arviz import to_datatree
from ppl_vae.infer.reference import Reference
from ppl_vae.programs.param_store import learned_params, scope
from ppl_vae.programs.program import build_program
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import batch_of
from ppl_vae.reports.measures import evaluation_split
from ppl_vae.runs import places, storage
from ppl_vae.runs.apply import Applied
from ppl_vae.runs.blame import blamed
from ppl_vae.runs.built import Built
from ppl_vae.runs.console import as_html
from ppl_vae.runs.spec import Spec
from ppl_vae.runs.spec_file import Say, quiet
from ppl_vae.runs.trained import read_spec

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its directory.
        spec: the complete spec.
        program: the trained program, in evaluation mode.
        report: what `report.json` says.

    `spec` is a `Built` if the program was built in Python, which no spec can do again.
    """

    path: Path
    spec: Spec | Built = field(repr=False)
    program: Any = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.program, nn.Module):
            self.program.eval()

    @property
    def params(self) -> dict[str, Tensor]:
        """What the program learned through `pyro.param`, by name, within its constraints."""
        return learned_params(self.program)

    def _repr_html_(self) -> str:
        return as_html(self.path, self.report)

    def encode(self, data: Any = None) -> "DataFrame":
        """Mean and standard deviation of the latent variables of each row, by the guide.

        Args:
            data: rows in the data's own units: the path of a table or an array, a pandas table, or an array (n, x); or
                a batch dict as the program takes it. By default the run's held-out rows.

        Raises:
            ValueError: If columns are missing or of another type, or hold words that the training data lack.
        """
        return self._table("encode", self._source(data))

    def reconstruct(self, data: Any = None) -> "DataFrame":
        """Mean of p(x'|z) over draws of z from the guide, in the data's own units; arguments as of `encode`."""
        return self._table("reconstruct", self._source(data))

    def score(self, data: Any = None, samples: int | None = None) -> "DataFrame":
        """Log p(x) of each row in nats, with error, kind and tail probability; arguments as of `encode`.

        Args:
            data: as of `encode`.
            samples: importance samples per row, by default as in the spec.
        """
        return self._table("score", self._source(data), samples)

    def impute(self, data: Any = None, samples: int | None = None) -> "DataFrame":
        """The rows with their missing cells filled, and how far to trust them; arguments as of `score`."""
        return self._table("impute", self._source(data), samples)

    def predict(self, data: Any = None, samples: int | None = None) -> "DataFrame":
        """The class of each row by p(y|x), with the error of its probability; arguments as of `score`."""
        return self._table("predict", self._source(data), samples)

    def sample(self, n: int) -> "DataFrame":
        """New rows from the model, in the data's own units."""
        return self._table("sample", n)

    def weights(self, data: Any = None, *, smoothing: float = 0.01, bins: int = 10) -> "DataFrame":
        """Weights by which rows whose codes are rare count more; see `Applied.weights`."""
        return self._table("weights", self._source(data), smoothing=smoothing, bins=bins)

    def predictive(self, draws: int = 100, *, parallel: bool = True) -> Predictive:
        """Pyro's `Predictive` over the fitted pair: draws of the latent sites by the guide, and of the data given them.

        Call it with a batch, `run.predictive()(**batch)`; each site has `draws` values side by side. The draws come
        from the global random state, as Pyro's do.

        Args:
            draws: values of each site.
            parallel: whether they are drawn at once; a program without plates for all its sites draws one by one.
        """

        def part(function: Any) -> Any:
            def run(**batch: Tensor) -> Any:
                with scope(self.program, keep=False):
                    return function(**batch_of(function, batch))

            return run

        model, guide = part(self.program.model), part(self.program.guide)
        return Predictive(poutine.uncondition(model), guide=guide, num_samples=draws, parallel=parallel)

    def to_datatree(self, data: Any = None, *, draws: int = 200, reference: Reference | None = None) -> Any:
        """Posterior draws, predictions, log likelihoods and data as ArviZ's groups; see `evaluation.to_datatree`.

        Args:
            data: as of `encode`; by default what the run was evaluated on.
            draws: samples per row.
            reference: of the same data, by NUTS; its chains then stand in place of the guide's draws.
        """
        if data is None:
            loaded = self.spec.load_data()
            part, batch = evaluation_split(self.program, loaded)
            index, y = loaded.row_numbers[part] if loaded.ids[part] is None else loaded.ids[part], batch.get("y")
            classes = loaded.classes or ()
            labels: Any = None if y is None else [classes[k] if 0 <= k < len(classes) else str(k) for k in y.tolist()]
        else:
            pieces = list(Applied.of(self).reader.pieces(data))
            batch = {key: torch.cat([piece.batch[key] for piece in pieces]) for key in pieces[0].batch}
            index = np.concatenate([piece.index for piece in pieces])
            known = [piece.labels for piece in pieces if piece.labels is not None]
            labels = np.concatenate(known).astype(str) if known else None
        target = Target(self.program, batch)
        about: Any = {} if target.structure.whole else {"labels": labels, "ids": index}
        return to_datatree(target, draws=draws, seed=self.spec.svi.seed, reference=reference, **about)

    def _source(self, data: Any) -> Any:
        return self.spec.load_data() if data is None else data

    def _table(self, what: str, *given: Any, **options: Any) -> "DataFrame":
        tables = [one.table for one in getattr(Applied.of(self), what)(*given, **options)]
        return importlib.import_module("pandas").concat(tables)  # type: ignore[no-any-return]


def load_run(path: str | Path, *, program: Any = None, trust_code: bool = False) -> Run:
    """Load a finished run; neither the original spec, nor the data, nor any pickle is read.

    Args:
        path: the run directory.
        program: where no spec can build it, since `save_run` wrote the run: the same program, built anew with whatever
            weights, which become those of the run; or what builds it, "file.py:name".
        trust_code: whether the run's copy of a program file may run.

    Raises:
        ValueError: If the folder is no run, or an unfinished, damaged or newer one, if it has a program file and
            `trust_code` is not given, or if `program` is missing, not asked for, or has other weights.
    """
    path = Path(path)
    places.mend(path)
    return storage.steadily(path, lambda: read_run(path, trust_code, program=program))


def read_run(path: Path, trust_code: bool, say: Say = quiet, program: Any = None) -> Run:
    """Read a finished run, which nobody replaces meanwhile; `program` where it was built in Python, or its name."""
    storage.check_folder(path, finished=True)
    report = storage.read_report(path)
    spec = read_spec(path, trust_code, say)
    if isinstance(spec, Built) != (program is not None):
        if program is not None:
            raise ValueError(f"Expected no `program` for {path}, which its spec builds; got one. Leave it out.")
        raise ValueError(
            f"Expected the program of {path}, which was built in Python. Name what builds it, a class or a function "
            f"without arguments: --program FILE.py:NAME, or load_run({str(path)!r}, program=...)."
        )
    if program is not None:
        program = build_program(program) if isinstance(program, str) else program
        storage.load_learned_state(program, path / "model.safetensors")
        return Run(path, spec, program, report)
    with storage.reading(path / "report.json", "a report"):
        known = report["data"]
        columns = Columns.from_dict(known.get("columns", {"count": known["features"]}))
        rows = check_int("n_train", known["n_train"])
    with blamed(spec.programs):
        program = spec.assemble(columns=columns, rows=rows)
    storage.load_learned_state(program, path / "model.safetensors")
    return Run(path, spec, program, report)
