"""Measures: the numbers that every report has, ready for JSON."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vae.data.batches import rows_within
from ppl_vae.data.loading import Data
from ppl_vae.evaluation.class_evidence import class_evidence
from ppl_vae.evaluation.comparison import compare_posteriors
from ppl_vae.evaluation.evidence import Evidence, log_evidence
from ppl_vae.evaluation.guide_check import GuideCheck, check_guide
from ppl_vae.evaluation.latents import active_units, rates
from ppl_vae.evaluation.predictive import PredictiveCheck, predictive_check
from ppl_vae.infer.reference import Reference
from ppl_vae.programs.closed_form import exact_log_evidence
from ppl_vae.programs.linear_models import PPCA
from ppl_vae.programs.precision import Precision
from ppl_vae.programs.rows import indexed, numbered
from ppl_vae.programs.target import Target
from ppl_vae.programs.vae import VAE

MOST_DATA = 1000  # for figures, latents and the training part
_MOST_EM = 10**8  # products in an iteration of EM


def evaluation_split(program: Any, data: Data) -> tuple[str, dict[str, Tensor]]:
    """Choose the part of the data to evaluate: the test part, or the training part if the guide knows no other.

    A guide that asks for `index`, such as a `Table`, has a row for each datum of the training part. Where the whole
    data set counts as one datum, that is the training part.

    Returns:
        `test` or `train`, and that part.

    Raises:
        ValueError: If there are no test data, and the program should be evaluated on some.
    """
    if indexed(program):
        return "train", numbered(program, data.train)
    if not isinstance(program, VAE) and Target(program, data.train).structure.whole:
        return "train", data.train
    if not len(next(iter(data.test.values()))):
        raise ValueError(
            "Expected held-out data, on which this program is evaluated; got none. Set data.test_fraction = 0.2 in a "
            "spec, or give `as_data` a test part."
        )
    return "test", data.test


def evaluate(
    target: Target,
    data: Data,
    *,
    samples: int,
    seed: int = 0,
    latent: int | None = None,
    reference: Reference | None = None,
    precision: Precision = "full",
) -> tuple[dict[str, Any], Evidence]:
    """Measure a trained program on its evaluation split.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        samples: importance samples per datum.
        seed: of all draws.
        latent: number of latent variables of the PPCA to compare with, None for no PPCA.
        reference: of a program whose whole data set counts as one datum, to check its guide by.
        precision: as `log_evidence` takes it, of other programs.

    Returns:
        The blocks `test`, `exact` and `baseline` of a report, `missing` if entries are, and the evidence of each datum.
        Where the whole data set counts as one datum also `check`, what `check_guide` says.
    """
    whole = target.structure.whole
    checked = check_guide(target, samples=samples, seed=seed, reference=reference) if whole else None
    lower: Any = {"seed": seed, "precision": precision}
    evidence = log_evidence(target, samples=samples, **lower) if checked is None else checked.evidence
    test = evidence.summary()
    value = test["log_evidence"]
    value["jackknife"] = float(evidence.jackknife.mean()) if evidence.kind == "estimate" else None
    if checked is not None:
        test |= dict.fromkeys(("bits_per_dim", "active_units", "rates", "rate_se", "distortion_se"))
        test |= {"latents": sum(site.loc[0].numel() for site in checked.sites.values()), "collapsed": []}
        blocks = {"test": test, "exact": _compare_exact(target, test["elbo"]), "baseline": None}
        return finite({**blocks, "check": check_block(checked)}), evidence
    volume, features = float(data.protocol.get("log_volume") or 0.0), float(data.features)
    if (mask := target.batch.get("mask")) is not None:  # of the entries observed, on average
        shares = mask.flatten(1).double().mean(0)
        volume = float((shares.cpu() * torch.from_numpy(data.transform.scale).log()).sum())
        features = max(float(shares.sum()), 1e-9)
    if "probability mass" in measure(target):
        volume = 0.0
    test["bits_per_dim"] = bits_per_dim(value["mean"] - volume, features)
    test["bits_per_dim_se"] = None if value["se"] is None else -bits_per_dim(value["se"], features)
    test |= _parts(evidence)
    few = target.rows(slice(MOST_DATA))
    active = active_units(few, seed=seed)
    test["active_units"], test["latents"] = int(active.sum()), len(active)
    test["collapsed"] = (~active).nonzero().flatten().tolist()
    try:
        test["rates"] = rates(few, seed=seed).mean(0).tolist()
    except ValueError:  # a site whose marginals have no density
        test["rates"] = None
    exact = _compare_exact(target, test["elbo"])
    baseline = None if latent is None else _fit_baseline(target, data, latent, evidence.log_evidence)
    blocks = {"test": test, "exact": exact, "baseline": baseline}
    if mask is not None:
        blocks["missing"] = _missing(mask, data, evidence)
    return finite(blocks), evidence


def check_block(checked: GuideCheck) -> dict[str, Any]:
    """What `check_guide` says: in words, and the moments of each latent site."""
    sites, keys = {}, ("mean", "error", "sd")
    for name, site in checked.sites.items():
        moments: dict[str, Any] = {label: dict(zip(keys, each, strict=True)) for label, *each in checked.moments(name)}
        off = {"mean_error": site.loc_error, "scale_ratio": site.scale_ratio}
        sites[name] = {**moments, **off, "mean_bound": site.loc_bound, "sd_bound": site.scale_bound}
    return {
        "trusted": checked.trusted,
        "doubtful": checked.doubtful(),
        "inner": checked.evidence.inner,
        "sites": sites,
        "text": str(checked).splitlines(),
        "words": checked.words,
    }


def trained(target: Target, data: Data, test: Mapping[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """Measure the bound on at most 1,000 of the training data after training; all, where they are what is evaluated.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        test: the block of the evaluation split, from `evaluate`.
        seed: of all draws.

    Returns:
        `elbo` and its standard error `elbo_se` over the `n` data, `rate` and `distortion`. And by how many nats the
        training data are ahead of the evaluated ones, `lead`: `elbo` and `log_evidence`, means over at most 300 data of
        each part, of which the smaller has `n`, by 100 samples, with their standard errors; None if the training data
        are evaluated.
    """
    train, lead, learned = test, None, Target(target.program, data.train)
    if evaluation_split(target.program, data)[0] == "test":
        some = log_evidence(learned.rows(slice(MOST_DATA)), samples=10, seed=seed)
        train = {**some.summary(), **_parts(some)}
        seen = log_evidence(learned.rows(slice(300)), samples=100, seed=seed).summary()
        unseen = log_evidence(target.rows(slice(300)), samples=100, seed=seed).summary()
        lead = {"samples": 100.0, "n": min(seen["n"], unseen["n"])}
        for name in ("elbo", "log_evidence"):
            lead[name] = seen[name]["mean"] - unseen[name]["mean"]
            lead[f"{name}_se"] = math.hypot(seen[name]["se"] or 0.0, unseen[name]["se"] or 0.0)
    bound = {"elbo": train["elbo"]["mean"], "elbo_se": train["elbo"]["se"], "n": train["n"]}
    parts = {key: train.get(key) for key in ("rate", "rate_se", "distortion", "distortion_se")}
    return finite({**bound, **parts, "lead": lead})  # type: ignore[no-any-return]


def _parts(evidence: Evidence) -> dict[str, float | None]:
    """Standard errors over the data of rate and distortion, whose means a summary has."""
    return {"rate_se": _over_data(evidence.rate), "distortion_se": _over_data(evidence.distortion)}


def _over_data(values: Tensor) -> float | None:
    """Standard error of a mean over data, (n,); None of a single one."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None


def predict(target: Target, data: Data, *, seed: int = 0) -> PredictiveCheck | None:
    """Compare statistics of at most 200 data, by column in their own units, with those of draws; None if none can be.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        seed: of all draws.
    """
    names = None if data.shape is not None else data.columns.names
    few = target if target.structure.whole else target.rows(slice(200))

    def units(rows: Tensor) -> Tensor:
        return torch.from_numpy(data.transform.inverse(rows)).double()

    try:
        words = data.columns.categories if names else None
        return predictive_check(few, draws=100, names=names, units=units if names else None, words=words, seed=seed)
    except (ValueError, NotImplementedError):
        return None


def strangest(target: Target, data: Data, log_evidence: Tensor, most: int = 5) -> list[dict[str, Any]] | None:
    """The rows of a table that the model finds least probable, with their rarest values; None of other data.

    A value is as rare as the share of training data that lie as far out or further, or that have the same code.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        log_evidence: of the evaluation split, (n,).
        most: the number of rows.
    """
    columns = data.columns
    if columns.names is None or data.shape is not None or "x" not in target.batch or len(log_evidence) < 2:
        return None
    known, own = (data.transform.inverse(x.flatten(1)) for x in (data.train["x"], target.batch["x"]))
    mask, rows = target.batch.get("mask"), []
    for row in log_evidence.argsort()[:most].tolist():
        found = []
        for j, name in enumerate(columns.names):
            if mask is not None and not bool(mask[row, j]):
                continue
            value, words = own[row, j], (columns.categories or {}).get(name)
            share = min((known[:, j] <= value).mean(), (known[:, j] >= value).mean())
            if words:
                share = (known[:, j].round() == round(value)).mean()
            found.append((share, name, words[min(round(value), len(words) - 1)] if words else f"{value:.4g}"))
        rare = {name: word for _, name, word in sorted(found, key=lambda each: each[0])[:4]}
        rows.append({"row": row, "log_evidence": float(log_evidence[row]), "values": rare})
    return rows


def measure(target: Target) -> str:
    """What the likelihood assigns to data: a `probability mass`, or a `density`, whose nats depend on their units.

    Of a conditional VAE it is one `given y`. A table of mixed columns has a `mass of columns 1, 4 and a density of the
    others`, a Multinomial a `probability mass given each total`.
    """
    few = target.rows(slice(2))
    with torch.no_grad():
        sites: Any = few.traces(1, 0)[0].nodes
    supports = [getattr(s := sites[name]["fn"].support, "base_constraint", s) for name in few.structure.observed]
    columns = [flag for support in supports for flag in getattr(support, "discrete", [bool(support.is_discrete)])]
    totals = any(hasattr(sites[name]["fn"], "total") for name in few.structure.observed)
    conditions = ["each total"] * totals + getattr(target.program, "given_keys", [])
    given = " given " * bool(conditions) + " and ".join(conditions)
    if len(set(columns)) == 1:
        return ("probability mass" if columns[0] else "density") + given
    if len(supports) > 1:
        return "mixed"
    masses = ", ".join(str(j) for j, flag in enumerate(columns) if flag)
    return f"mass of columns {masses} and a density of the others{given}"


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None, and tensors by lists."""
    if isinstance(value, Tensor):
        return finite(value.tolist())
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _missing(mask: Tensor, data: Data, evidence: Evidence) -> dict[str, Any]:
    """What is missing, and the tail shapes of the weights of incomplete data, which `impute` resamples by."""
    names, shares = data.feature_names, data.columns.missing or ()
    listed = {names[j] if names else f"column {j + 1}": share for j, share in enumerate(shares) if share}
    some = (~mask).flatten(1).any(1)
    shapes = evidence.pareto_k[some]
    known = shapes[~shapes.isnan()]
    tail = {"median": float(known.median()), "max": float(known.max())} if len(known) else None
    return {
        "share": sum(shares) / max(len(shares), 1),
        "columns": dict(sorted(listed.items(), key=lambda item: -item[1])[:20]),
        "incomplete": int(some.sum()),
        "pareto_k": tail,
    }


def bits_per_dim(nats: float, features: float) -> float:
    """Bits per feature of a datum's log probability in nats; lower is better."""
    return -nats / (features * math.log(2))


def mean_error(error: Tensor) -> float:
    """Standard error of a mean over data with independent errors, (n,)."""
    return float(error.square().sum().sqrt()) / len(error)


def _compare_exact(target: Target, elbo: Mapping[str, float]) -> dict[str, Any] | None:
    """Compare with the closed form, if there is one: by a closed-form KL, else by draws or the sampled ELBO."""
    try:
        value = float(exact_log_evidence(target).mean())
    except ValueError:
        return None
    try:
        comparison = compare_posteriors(target)
    except ValueError:
        gap = kl = value - elbo["mean"]
        error, kind = elbo["mc_se"], "sampled"
    else:
        gap, kl, error = float(comparison.gap.mean()), float(comparison.kl.mean()), mean_error(comparison.error)
        kind = "sampled" if error else "closed-form"
    method = "closed-form" if target.structure.latents else "enumeration"
    exact = {"method": method, "log_evidence": value, "gap": gap, "posterior_kl": kl}
    return {**exact, "gap_method": kind, "gap_mc_se": error}


def _fit_baseline(target: Target, data: Data, latent: int, evidence: Tensor) -> dict[str, Any] | None:
    """Fit PPCA of the same latent size to the same data, by EM if entries are missing, if its density is comparable.

    The program's evidence (n,) less PPCA's is their `difference`, with the standard error `se` over the data. Beside a
    conditional VAE PPCA is fitted to what a linear regression of x on what is given leaves.
    """
    given, rows = getattr(target.program, "given", None), evaluation_split(target.program, data)[1]
    if len(data.train["x"]) > rows_within(data.features):
        return None
    x, mask, other = data.train["x"].double(), data.train.get("mask"), rows["x"].double()
    large = mask is not None and (given is not None or x.numel() * (latent + 1) ** 2 > _MOST_EM)
    if not measure(target).startswith("density") or large:
        return None
    if given is not None:
        known = [torch.nn.functional.pad(given(part).double(), (1, 0), value=1.0) for part in (data.train, rows)]
        slope = torch.linalg.pinv(known[0]) @ x
        x, other = x - known[0] @ slope, other - known[1] @ slope
    try:
        ppca = PPCA.fit(x, latent, mask, tolerance=1e-6)
    except (ValueError, RuntimeError):
        return None
    baseline = ppca.log_evidence(other, rows.get("mask"))
    apart = evidence.to(baseline) - baseline
    own = {"log_evidence": float(baseline.mean()), "log_evidence_se": _over_data(baseline)}
    return {"ppca": {**own, "difference": float(apart.mean()), "se": _over_data(apart)}}


def classify(
    target: Target, data: Data, *, samples: int, prior: str | list[float] | None = None, seed: int = 0
) -> dict[str, Any] | None:
    """Measure the classifier p(y|x) that a model given the label makes by Bayes' rule, on at most 1,000 data.

    Args:
        target: the program and its evaluation split.
        data: all of its data.
        samples: importance samples per datum and class, of which 200 at most are taken.
        prior: of the classes, `frequencies` of the training part by default.
        seed: of all draws.

    Returns:
        The block `classes` of a report (see `ClassEvidence.summary`); None for a model without labels, or with a guide
        that knows the training data alone.
    """
    classes = getattr(getattr(target.program, "given", None), "classes", None)
    if classes is None or indexed(target.program):
        return None
    part, known = ("train", data.train) if data.validation is None else ("validation", data.validation)
    known, few, words = {key: value[:MOST_DATA] for key, value in known.items()}, target.rows(slice(MOST_DATA)), prior
    if prior in (None, "frequencies"):
        prior, words = data.train["y"].bincount(minlength=classes).tolist(), "frequencies"
    options: Any = {"class_prior": prior, "known": known, "seed": seed}
    block = class_evidence(few, samples=min(samples, 200), **options).summary(few.batch["y"])
    return finite({**block, "prior": words, "known": {"part": part, "n": len(known["y"])}})  # type: ignore[no-any-return]
