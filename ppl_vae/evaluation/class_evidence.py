r"""Class evidence: log p(x|y) of every class, and with a prior of the classes the probability p(y|x) of each.

A conditional model is a classifier by Bayes' rule, :math:`p(y \mid x) \propto p(y)\, p(x \mid y)`. It also knows what a
classifier does not: how well the best class explains x at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_int
from ppl_vae._seeds import fold_in
from ppl_vae.data.batches import as_batch
from ppl_vae.evaluation.evidence import Evidence, log_evidence
from ppl_vae.evaluation.pareto import shape_error
from ppl_vae.programs.target import Target

PRIORS = ("frequencies", "uniform")
_BINS = 10


@dataclass(frozen=True)
class ClassEvidence:
    r"""Evidence of n data under c classes, in nats, in double precision, and what follows for p(y|x).

    Args:
        log_evidence: log p(x|y) of each class, shape (n, c).
        mc_se: its Monte Carlo standard error, (n, c); that of one class tells nothing of that of another.
        bias: its bias to first order, (n, c).
        settled: whether it is an estimate, (n, c), and not only a lower bound: the tail shape of its weights lies two
            errors or more below 1/2, and `mc_se` is at most 1/2. Under a class that the guide has never seen with such
            data it often is a bound.
        log_prior: log p(y), shape (c,).
        floor: what explains x worse than this is no class of x: the `level` quantile of the evidence of known data of
            the class, shape (c,); minus infinity where nothing is known.
        samples: draws per datum and class.
    """

    log_evidence: Tensor
    mc_se: Tensor
    bias: Tensor
    settled: Tensor
    log_prior: Tensor
    floor: Tensor
    samples: int

    @property
    def probability(self) -> Tensor:
        r"""Probability of each class, :math:`p(y \mid x) \propto p(y)\, p(x \mid y)`, (n, c)."""
        return (self.log_prior + self.log_evidence).softmax(-1)

    @property
    def error(self) -> Tensor:
        r"""Monte Carlo standard error of `probability`, (n, c), by the delta method.

        With :math:`s_j` the error of class j's log evidence, :math:`p_c \sqrt{(1 - p_c)^2 s_c^2 + \sum_{j \ne c} p_j^2
        s_j^2}`: each class has draws of its own.
        """
        p, square = self.probability, self.mc_se.square()
        others = (p.square() * square).sum(-1, keepdim=True) - p.square() * square
        return p * ((1 - p).square() * square + others.clamp_min(0)).sqrt()

    @property
    def best(self) -> Tensor:
        """The most probable class, (n,)."""
        return self.probability.argmax(-1)

    @property
    def margin(self) -> Tensor:
        """How far the best class is ahead of the next one, in nats of log p(x, y), (n,)."""
        return -(self.log_prior + self.log_evidence).topk(2).values.diff(dim=-1).squeeze(-1)

    @property
    def uncertain(self) -> Tensor:
        """Whether the interval of the difference between the best class and some other straddles 0, (n,).

        Its half width is 1.96 standard errors of the difference, plus both biases. An evidence that is only a lower
        bound counts with an error of log 40 nats: by Markov's inequality it is no further above the truth in 39 of 40
        cases.
        """
        score, best = self.log_prior + self.log_evidence, self.best.unsqueeze(-1)
        error = torch.where(self.settled, 1.96 * self.mc_se, math.log(40))
        bias = torch.where(self.settled, self.bias, 0.0)
        ahead = (score - bias).gather(-1, best) - (score - bias)
        half = torch.hypot(error, error.gather(-1, best)) - bias - bias.gather(-1, best)
        return ((ahead <= half) & self._rivals).any(-1)

    @property
    def open(self) -> Tensor:
        """Whether it is not `uncertain`, but the evidence of some other class is only a lower bound, (n,).

        The best class is then right unless the other is underestimated by the `margin`.
        """
        return (~self.settled & self._rivals).any(-1) & ~self.uncertain

    @property
    def _rivals(self) -> Tensor:
        """Classes that may be, but are not the best, (n, c)."""
        possible = (self.log_prior > -math.inf).expand(self.log_evidence.shape)
        return possible.scatter(-1, self.best.unsqueeze(-1), False)

    @property
    def outlier(self) -> Tensor:
        """Whether x is an outlier under every class, (n,): all explain it worse than their `floor`."""
        return (self.log_evidence < self.floor).all(-1)

    @property
    def prediction(self) -> Tensor:
        """The most probable class, (n,), -1 for an outlier under every class."""
        return torch.where(self.outlier, -1, self.best)

    def summary(self, labels: Tensor) -> dict[str, Any]:
        """Accuracy and calibration against labels (n,); data whose label is negative are left out.

        Returns:
            `classes` and `samples`; how many data are `outliers`, the number `n` of the others, and how many of these
            are `uncertain` and `open`; the `margin` of the open ones in nats, its median and the least; `accuracy`
            without outliers and its error `se` over data; `log_score`, the mean of log p(y|x) at the label in nats;
            `error`, the largest of p(y|x); `curve`, by rising confidence the mean `confidence`, `accuracy`, `se` and
            `n`, in up to ten bins; and `calibration_error`, the mean distance of confidence and accuracy in these.
        """
        labels = labels.to(self.best.device)
        known, curve = labels >= 0, []
        kept = known & ~self.outlier
        confidence, right = self.probability.amax(-1)[kept], (self.best == labels)[kept]
        for low in range(_BINS):
            here = (confidence * _BINS).long().clamp_max(_BINS - 1) == low
            if bool(here.any()):
                curve.append({"confidence": float(confidence[here].mean()), **_rate(right[here])})
        scores = (self.log_prior + self.log_evidence).log_softmax(-1)[known]
        apart = self.margin[self.open & kept]
        return {
            "classes": len(self.log_prior),
            "samples": self.samples,
            "outliers": int((known & self.outlier).sum()),
            "uncertain": int((kept & self.uncertain).sum()),
            "open": len(apart),
            "margin": {"median": float(apart.median()), "min": float(apart.min())} if len(apart) else None,
            **_rate(right),
            "log_score": float(scores.gather(-1, labels[known].unsqueeze(-1)).mean()),
            "error": float(self.error.amax()),
            "calibration_error": sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in curve) / max(len(right), 1),
            "curve": curve,
        }


@torch.no_grad()
def class_evidence(
    program: Any,
    x: Any = None,
    samples: int = 1000,
    *,
    classes: int | None = None,
    class_prior: str | Sequence[float] | Tensor = "uniform",
    known: Any = None,
    level: float = 0.01,
    seed: int = 0,
) -> ClassEvidence:
    r"""Estimate log p(x|y) of each datum for each class, and p(y|x) by Bayes' rule.

    Args:
        program: a `VAE` that is given the label, any program whose model takes `y`, or a `Target` of one. Where the
            model scores y itself, so that the evidence is that of x and y, a uniform `class_prior` is right.
        x: data, a tensor (n, *x) or a batch dict, whose `y` is not read; none beside a `Target`.
        samples: draws per datum and class.
        classes: how many classes there are; a `VAE` knows.
        class_prior: `uniform`, `frequencies` of the labels of `known`, or the probability of each class.
        known: labelled data of the classes, a batch dict with `y`, that tell what evidence is usual; best are data
            that were not trained on. Without them nothing is an outlier.
        level: probability with which a datum of a class, exchangeable with the known ones, falls below its `floor`;
            with m known data of the class it is at least 1 / (m + 1).
        seed: of the draws; the global random state is left alone.

    Returns:
        The evidence of each class.

    Raises:
        ValueError: If the program does not take `y`, the number of classes is not known, or the prior does not fit.

    References:
        Machine-Learning Applications of Algorithmic Randomness (Vovk, Gammerman and Saunders 1999), for the floor.
    """
    if not isinstance(program, Target):
        batch = as_batch(x)
        any_label = torch.zeros(len(next(iter(batch.values()))), dtype=torch.long)
        program, x = Target(program, {**batch, "y": any_label}), None
    target = Target.of(program, x)
    count = classes or getattr(getattr(target.program, "given", None), "classes", None)
    if count is None or "y" not in target.batch:
        raise ValueError(
            "Expected a model that depends on the label `y`, and the number of its `classes`; got "
            f"a {type(target.program).__name__} of {', '.join(target.batch)} and {classes}."
        )
    known = None if known is None else as_batch(known)
    log_prior = _log_prior(class_prior, count, known)
    floor = _floors(target.program, known, count, samples, level, seed)
    parts = []
    for label in range(check_int("classes", count)):
        own = target.with_batch({**target.batch, "y": torch.full_like(target.batch["y"], label)})
        part = log_evidence(own, samples=samples, seed=fold_in(seed, "class", label))
        parts.append(torch.stack([part.log_evidence, part.mc_se, part.bias, _settled(part).double()]))
    each = torch.stack(parts, -1)
    return ClassEvidence(each[0], each[1], each[2], each[3] > 0, log_prior.to(each), floor.to(each), samples)


def _settled(evidence: Evidence) -> Tensor:
    """Whether the evidence of each datum is an estimate by itself, (n,): stricter than for the mean of a set."""
    shape = evidence.pareto_k.nan_to_num(-1.0)  # of equal weights, or of too few, whose shift is infinite
    return (shape + 2 * shape_error(shape, evidence.samples) < 0.5) & ~evidence.shift.isinf()


def _log_prior(prior: str | Sequence[float] | Tensor, count: int, known: Any) -> Tensor:
    """Log probabilities of the classes, (c,)."""
    if isinstance(prior, str):
        check_choice("class_prior", prior, PRIORS)
        if prior == "frequencies" and known is None:
            raise ValueError('Expected `known`, labelled data, for class_prior = "frequencies"; got none.')
        prior = torch.ones(count) if prior == "uniform" else known["y"][known["y"] >= 0].bincount(minlength=count)
    values = torch.as_tensor(prior)
    if values.shape != (count,) or not bool((values >= 0).all() & (values.sum() > 0) & values.isfinite().all()):
        raise ValueError(f"Expected `class_prior` uniform, frequencies or {count} probabilities; got {prior!r}.")
    return (values.double() / values.sum()).log()


def _floors(program: Any, known: Any, count: int, samples: int, level: float, seed: int) -> Tensor:
    """Evidence of known data, of each class the one that a share of `level` falls below, (c,)."""
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be above 0 and below 1; got {level!r}.")
    floors = torch.full((count,), -math.inf, dtype=torch.float64)
    if known is not None:
        known = {key: value[known["y"] >= 0] for key, value in known.items()}
        values = log_evidence(program, known, samples, seed=fold_in(seed, "known")).log_evidence
        for label in known["y"].unique().tolist():
            own = values[known["y"].to(values.device) == label].sort().values
            floors[label] = own[max(math.floor(level * (len(own) + 1)), 1) - 1]
    return floors


def _rate(right: Tensor) -> dict[str, Any]:
    """Share of what is right, and its standard error over data, with two of either added so that it is never 0.

    Approximate Is Better than "Exact" for Interval Estimation of Binomial Proportions (Agresti and Coull 1998).
    """
    n, hits = len(right), int(right.sum())
    mean = (hits + 2) / (n + 4)
    return {"accuracy": hits / n if n else None, "se": math.sqrt(mean * (1 - mean) / (n + 4)), "n": n}
