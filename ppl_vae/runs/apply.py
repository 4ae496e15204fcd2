"""What a fitted model says of new rows: their codes, reconstruction and score; new rows; weights against a skew."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fold_in, fork_rng
from ppl_vae.data.columns import Columns
from ppl_vae.data.like import PIECE, Piece, Reader
from ppl_vae.data.loading import Data
from ppl_vae.data.transforms import Transform
from ppl_vae.evaluation.class_evidence import class_evidence
from ppl_vae.evaluation.evidence import Evidence, estimate_evidence
from ppl_vae.evaluation.impute import impute
from ppl_vae.evaluation.latents import guide_moments
from ppl_vae.programs.param_store import device_and_dtype, mode
from ppl_vae.programs.rows import indexed, keywords
from ppl_vae.programs.simulation import simulate
from ppl_vae.programs.target import BLOCK, Target
from ppl_vae.runs import storage
from ppl_vae.runs.results import Result, as_result, check_new, write, write_text

if TYPE_CHECKING:
    pass

WHATS = ("encode", "reconstruct", "score", "impute", "predict", "sample", "weights")
_DRAWS = 100  # of the guide for each row, in a reconstruction


@dataclass(frozen=True, eq=False)
class Applied:
    """A fitted program with what it takes to read new data and to write in their units.

    Args:
        program: the fitted program.
        reader: of new data.
        held_out: log p(x) of held-out data, against which scores are judged, (m,); or None.
        samples: importance samples per row of a score, by default.
        seed: of all draws.
        piece: rows that are read at a time, a multiple of 100, so that scores are those of all rows at once.
        data: loads the data that the program was fitted to.
        class_prior: of the classes, for a conditional model; by default the frequencies of the training part.
    """

    program: Any
    reader: Reader
    held_out: Tensor | None = None
    samples: int = 1000
    seed: int = 0
    piece: int = PIECE
    data: Callable[[], Data] | None = None
    class_prior: Any = None

    @classmethod
    def of(cls, run: Any) -> "Applied":
        """What a finished run takes to be applied."""
        known, kept = run.report["data"], storage.read_tensors(run.path / "evidence.safetensors")
        protocol, data, taken = known["protocol"], run.spec.data, keywords(run.program.model)
        loc, scale = (kept.get(f"transform.{name}", protocol[name]) for name in ("loc", "scale"))
        if isinstance(loc, str) or isinstance(scale, str):  # an older run, which has only their digests
            transform = run.spec.load_data().transform
            loc, scale = torch.from_numpy(transform.loc), torch.from_numpy(transform.scale)
        loc, scale = (torch.as_tensor(value, dtype=torch.float64).numpy() for value in (loc, scale))
        noise, largest = protocol["dequantization"] == "uniform", protocol["maximum"] or 1
        transform = Transform(protocol["binarization"], noise, largest, loc, scale, torch.float32)
        reader = Reader(
            Columns.from_dict(known.get("columns", {"count": known["features"]})),
            transform,
            label=getattr(data, "label", None),
            id=getattr(data, "id", None),
            size_factor=getattr(data, "size_factor", None),
            mean_total=protocol.get("mean_total"),
            separator=getattr(data, "separator", None),
            array=getattr(data, "array", None),
            seed=run.spec.svi.seed,
            missing=getattr(data, "missing", "refuse") == "model",
            covariates=tuple(getattr(data, "covariates", None) or ()) if "covariates" in taken else (),
            classes=tuple(known["classes"]) if "y" in getattr(run.program, "given_keys", ()) else None,
        )
        held_out = kept["log_evidence"].double() if known["part"] == "test" else None
        prior = getattr(run.spec.evaluation, "class_prior", None)
        options = {"data": run.spec.load_data, "class_prior": prior, "piece": reader.rows}
        return cls(run.program, reader, held_out, run.spec.evaluation.samples, run.spec.svi.seed, **options)

    @property
    def columns(self) -> Columns:
        """Columns of the data."""
        return self.reader.columns

    def _targets(self, source: Any) -> Iterator[tuple[int, Piece, Target]]:
        """Pieces of new data, as targets, with the number of their first block."""
        if indexed(self.program):
            raise ValueError(
                "Expected a model that takes new rows; this guide keeps one row per datum of its training data. Fit "
                "with a network in place of a Table."
            )
        number = 0
        for piece in self.reader.pieces(source, self.piece):
            try:
                target = Target(self.program, piece.batch)
            except ValueError as error:
                first = piece.index[0]
                raise ValueError(f"{error} Rows are counted from the one called {first}." if first else error) from None
            if target.structure.whole:
                raise ValueError("Expected a program with latent variables per datum; this one has none to apply.")
            yield number, piece, target
            number += -(-len(piece.index) // BLOCK)

    @torch.no_grad()
    def encode(self, source: Any) -> Iterator[Result]:
        """Mean and standard deviation of the latent variables under the guide, row by row.

        They are exact where there is one latent site whose distribution knows its moments, else by 1,000 draws.
        """
        for number, piece, target in self._targets(source):
            blocks = enumerate(target.blocks(), number)
            moments = [guide_moments(block, seed=self.seed, block=place) for place, block in blocks]
            mean, sd = (torch.cat(part) for part in zip(*moments, strict=True))
            names = latent_names(target)
            yield as_result(piece.index, {"mean": (names, mean), "sd": ([f"{name} sd" for name in names], sd)})

    @torch.no_grad()
    def reconstruct(self, source: Any) -> Iterator[Result]:
        """Mean of p(x'|z) over draws of z from the guide, in the data's own units; of words the most frequent draw."""
        for number, piece, target in self._targets(source):
            parts = [self._reconstructed(block, number + place) for place, block in enumerate(target.blocks())]
            yield self._in_units(torch.cat(parts), piece.index)

    def _reconstructed(self, target: Target, number: int) -> Tensor:
        model, _ = target.traces(_DRAWS, self.seed, "reconstruct", number)
        names = target.structure.observed
        shape = target.batch["x"].shape
        site: Any = model.nodes[names[0]]
        if len(names) > 1 or site["value"].shape[-len(shape) :] != shape:
            raise ValueError(f"Expected one observed site with the columns of x; got {', '.join(names)}.")
        mean = site["fn"].mean.double()
        mean = mean.reshape(-1, *shape).mean(0)
        kinds = self.columns.kinds or ()
        words = [j for j, kind in enumerate(kinds) if kind == "category"]
        if words:
            with fork_rng(self.seed, "words", number, device=target.device):
                drawn = site["fn"].sample().reshape(-1, *shape)[..., words]
            mean[:, words] = drawn.mode(0).values.to(mean)
        return mean

    def _in_units(self, x: Tensor, index: npt.NDArray[Any], known: npt.NDArray[np.float64] | None = None) -> Result:
        """Rows in the data's own units; values that are known stand as they are."""
        values = self.reader.transform.inverse(x.flatten(1))
        values = values if known is None else np.where(np.isnan(known), values, known)
        return Result({"x": values}, index, self.columns.to_table(values, index))

    @torch.no_grad()
    def score(self, source: Any, samples: int | None = None) -> Iterator[Result]:
        r"""Log p(x) of each row, with its Monte Carlo error, tail shape and kind.

        `tail_probability` is the probability that a held-out row scores as low,
        :math:`(1 + \#\{\text{held-out} \le s\}) / (m + 1)`: training rows, which score higher, would flag too many.
        """
        samples = self.samples if samples is None else check_int("samples", samples)
        for number, piece, target in self._targets(source):
            found = estimate_evidence(target, samples, self.seed, None, first=number)
            yield _scores(piece, found, self.held_out)

    @torch.no_grad()
    def impute(self, source: Any, samples: int | None = None) -> Iterator[Result]:
        """The rows with their missing cells filled, in the data's own units, and how far to trust them.

        Of numbers the mean of 100 draws from p(missing | observed), of words the most frequent; the standard deviation
        of the draws; and of each row the tail shape `pareto_k` and the effective sample size `ess` of the weights.
        """
        reading = dataclasses.replace(self, reader=dataclasses.replace(self.reader, missing=True))
        samples = self.samples if samples is None else check_int("samples", samples)
        for number, piece, target in reading._targets(source):
            if "mask" not in target.batch:
                raise ValueError(
                    "Expected rows with missing cells, to be imputed; got none. Name a file that has some."
                )
            found = impute(target, samples=samples, seed=fold_in(self.seed, "impute", number))
            filled = self._in_units(found.completed(self.columns), piece.index, piece.values)
            scale = np.broadcast_to(self.reader.transform.scale, self.columns.count)
            trust = {"pareto_k": found.evidence.pareto_k.numpy(force=True), "ess": found.evidence.ess.numpy(force=True)}
            sd, table = found.sd.numpy(force=True) * scale, filled.table
            holes = ~found.mask.numpy(force=True)
            for j, name in enumerate(self.columns.names or map(str, range(self.columns.count))):
                if holes[:, j].any() and name not in (self.columns.categories or {}):
                    table[f"{name} sd"] = np.where(holes[:, j], sd[:, j], np.nan)
            arrays = filled.arrays | {"sd": sd, "mask": ~holes} | trust
            yield Result(arrays, piece.index, table.assign(**trust))

    @torch.no_grad()
    def predict(self, source: Any, samples: int | None = None) -> Iterator[Result]:
        """The class of each row by p(y|x), of a model that is given the label, with the error of its probability.

        `uncertain` rows have a rival within the errors; an `outlier` is explained by no class, and is predicted none.
        """
        if getattr(getattr(self.program, "given", None), "classes", None) is None or self.data is None:
            raise ValueError('Expected a model that is given the label, [model] given = "y", for predict; got another.')
        data, samples = self.data(), self.samples if samples is None else check_int("samples", samples)
        known, prior = data.train if data.validation is None else data.validation, self.class_prior
        if prior in (None, "frequencies"):
            prior = data.train["y"].bincount(minlength=self.program.given.classes).tolist()
        options: Any = {"class_prior": prior, "known": {key: value[:1000] for key, value in known.items()}}
        words = np.array([*(data.classes or map(str, range(self.program.given.classes))), "none"])
        for number, piece in enumerate(self.reader.pieces(source, self.piece, label=False)):
            batch = {key: value for key, value in piece.batch.items() if key != "y"}
            found = class_evidence(self.program, batch, samples, seed=fold_in(self.seed, "predict", number), **options)
            best, blocks = found.best.unsqueeze(1), {"p": ([f"p({word})" for word in words[:-1]], found.probability)}
            blocks["error"] = ["error"], found.error.gather(1, best)
            result = as_result(piece.index, blocks)
            chosen = {"prediction": words[found.prediction.numpy(force=True)]}
            flags = {name: getattr(found, name).numpy(force=True) for name in ("uncertain", "outlier")}
            yield Result(
                result.arrays | chosen | flags, piece.index, result.table.assign(**chosen, **flags), piece.labels
            )

    @torch.no_grad()
    def sample(self, n: int) -> Iterator[Result]:
        """New rows from the model, in the data's own units."""
        check_int("n", n)
        device, dtype = device_and_dtype(self.program)
        for start in range(0, n, 10_000):
            count = min(10_000, n - start)
            with mode(self.program):
                if hasattr(self.program, "sample"):
                    x = self.program.sample(count, seed=self.seed + start)
                else:
                    blank = torch.zeros(count, self.columns.count, dtype=dtype, device=device)
                    target = Target(self.program, blank)
                    with target.running(self.seed, "sample", start):
                        x = simulate(target)[0]["x"]
            yield self._in_units(x, np.arange(start, start + count))

    def weights(self, source: Any, *, smoothing: float = 0.01, bins: int = 10) -> Iterator[Result]:
        r"""Weights by which rows whose codes are rare count more, of mean 1.

        :math:`w_i \propto \prod_j 1 / (\hat q_j(z_{ij}) + \alpha)`, the histogram :math:`\hat q_j` of each latent
        variable's codes over all rows (Uncovering and Mitigating Algorithmic Bias through Learned Latent Structure,
        Amini, Soleimany, Schwarting, Bhatia and Rus 2019, equation 5).

        Args:
            source: the rows.
            smoothing: alpha; the larger, the more even the weights.
            bins: of the histograms.
        """
        results = list(self.encode(source))
        mean = np.concatenate([one.arrays["mean"] for one in results])
        logs = np.zeros(len(mean))
        for column in mean.T:
            density, edges = np.histogram(column, bins, density=True)
            place = np.clip(np.searchsorted(edges, column, "right") - 1, 0, bins - 1)
            logs -= np.log(density[place] + smoothing)
        weights = np.exp(logs - logs.max())
        index = np.concatenate([one.index for one in results])
        yield as_result(index, {"weight": (["weight"], torch.from_numpy(weights / weights.mean()).unsqueeze(1))})


def latent_names(target: Target) -> list[str]:
    """Names of the entries of a latent vector: the site's, numbered from 0 where it has several."""
    names = []
    for name, inner, event in target.layout.sites:
        size = inner.numel() // target.n * event.numel()
        names += [name] if size == 1 else [f"{name}{j}" for j in range(size)]
    return names


def auroc(scores: npt.NDArray[np.float64], outlier: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Probability that an outlier scores lower than another row, and its standard error.

    References:
        The Meaning and Use of the Area under a Receiver Operating Characteristic Curve (Hanley and McNeil 1982).

    Raises:
        ValueError: If all rows are outliers, or none.
    """
    n, m = int(outlier.sum()), int((~outlier).sum())
    if not n or not m:
        raise ValueError(f"Expected outliers and others among the rows; got {n} outliers of {n + m}.")
    ranks = importlib.import_module("scipy.stats").rankdata(-scores.ravel())
    area = (ranks[outlier].sum() - n * (n + 1) / 2) / (n * m)
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (one - area**2) + (m - 1) * (two - area**2)) / (n * m)
    return float(area), float(np.sqrt(max(variance, 0.0)))


def _scores(piece: Piece, found: Evidence, held_out: Tensor | None) -> Result:
    blocks = {name: ([name], getattr(found, name).unsqueeze(1)) for name in ("log_evidence", "mc_se", "pareto_k")}
    if held_out is not None:
        below = torch.searchsorted(held_out.sort().values, found.log_evidence, right=True)
        tail = (1 + below.double()) / (len(held_out) + 1)
        blocks["tail_probability"] = ["tail_probability"], tail.unsqueeze(1)
    result = dataclasses.replace(as_result(piece.index, blocks), labels=piece.labels)
    result.table["kind"] = np.where((found.shift == 0).numpy(), "estimate", "lower bound")
    return result


def carry_out(
    run: Any,
    what: str,
    source: Any = None,
    *,
    out: Path | None = None,
    screen: TextIO | None = None,
    n: int = 1000,
    samples: int | None = None,
    outlier: str | None = None,
) -> dict[str, Any]:
    """Apply a run, and write the result to a file, or as CSV to a stream.

    Args:
        run: a finished run.
        what: one of `WHATS`.
        source: rows, as `Reader.pieces` takes them; by default the run's held-out rows.
        out: a new file.
        screen: the stream, where there is no file.
        n: rows of `sample`.
        samples: importance samples per row of `score`, `impute` and `predict`.
        outlier: the label of outliers, for the AUROC of `score`.

    Returns:
        `rows`, how many there are; `out`, the file; and with an outlier's label `auroc` and its standard error.
    """
    if outlier is not None and what != "score":
        raise ValueError(f"Expected --outlier beside score alone; got it beside {what}.")
    if what == "sample" and source is not None:
        raise ValueError("Expected no data beside sample; give the number of rows by -n.")
    applied, kept = Applied.of(run), []
    if out is not None:
        check_new(out)
    if what == "sample":
        results = applied.sample(n)
    else:
        source = run.spec.load_data() if source is None else source
        options = (samples,) if what in ("score", "impute", "predict") else ()
        results = getattr(applied, what)(source, *options)

    def seen() -> Iterator[Result]:
        for result in results:
            if outlier is not None and result.labels is None:
                raise ValueError("Expected a column of labels for --outlier: the one that data.label names; got none.")
            if outlier is not None:
                kept.append((result.arrays["log_evidence"], result.labels))
            yield result

    rows = write(seen(), out) if out is not None else write_text(seen(), screen or sys.stdout)
    found: dict[str, Any] = {"rows": rows, **({} if out is None else {"out": str(out)})}
    if outlier is not None:
        scores, labels = (np.concatenate(part) for part in zip(*kept, strict=True))
        found["auroc"], found["auroc_se"] = auroc(scores, np.array([str(label) == outlier for label in labels]))
    return found
