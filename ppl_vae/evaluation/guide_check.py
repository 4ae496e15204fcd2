r"""Guide check: whether variational inference worked, for any program, and what of its answer to trust."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae._seeds import fork_rng
from ppl_vae.evaluation.evidence import Evidence, estimate_evidence
from ppl_vae.evaluation.pareto import shape_error
from ppl_vae.evaluation.weighted_moments import WeightedMoments
from ppl_vae.evaluation.weights import Draws, constant
from ppl_vae.infer.reference import Reference, reference_posterior
from ppl_vae.programs.param_store import own_params
from ppl_vae.programs.plates import frames
from ppl_vae.programs.target import Target
from ppl_vae.programs.traces import batch_of
from ppl_vae.programs.trial import trial

_USABLE = 0.7  # k-hat up to which reweighted means converge in practice
_NEAR = 0.1  # standard deviations within which means count as the same
_SHOWN = 8  # entries of a site that are written out


@dataclass(frozen=True)
class SiteCheck:
    """Means and standard deviations of a latent site, (n, *inner plates, *event), in double precision.

    Args:
        loc: by the guide.
        scale: by the guide.
        reweighted_loc: by the guide's draws with their importance weights.
        reweighted_scale: likewise.
        reference_loc: by the reference; None without one.
        reference_scale: likewise.
        loc_bound: most that the guide's mean can be off if the guide's draws reach all mass; NaN where not known.
        scale_bound: the same of its standard deviation.
        error: standard error of `loc`, by the draws.
        reweighted_error: standard error of `reweighted_loc`; not to be relied on where k-hat is above 1/2.
        reference_error: error of `reference_loc`: 0 in closed form, estimated by quadrature, a standard error by draws.
    """

    loc: Tensor
    scale: Tensor
    reweighted_loc: Tensor
    reweighted_scale: Tensor
    reference_loc: Tensor | None
    reference_scale: Tensor | None
    loc_bound: Tensor
    scale_bound: Tensor
    error: Tensor
    reweighted_error: Tensor
    reference_error: Tensor | None = None

    @property
    def loc_error(self) -> Tensor:
        """The guide's mean less the reference's, or without one the reweighted, in their standard deviations."""
        error = (self.loc - self._best(0)) / self._best(1)
        return torch.where(constant(self.loc, self.scale, self._best(1)), 0.0, error)

    @property
    def scale_ratio(self) -> Tensor:
        """The guide's standard deviation divided by the reference's, or without one by the reweighted."""
        ratio = self.scale / self._best(1)
        return torch.where(constant(self.loc, self.scale, self._best(1)), 1.0, ratio)

    def _best(self, which: int) -> Tensor:
        reweighted = (self.reweighted_loc, self.reweighted_scale)[which]
        known = (self.reference_loc, self.reference_scale)[which]
        return reweighted if known is None else known


@dataclass(frozen=True)
class GuideCheck:
    """How far a guide is from the posterior; `str()` says it in words.

    Args:
        evidence: ELBO, log evidence, k-hat and effective sample size of each datum.
        sites: moments of each latent site by name.
        reference: the reference, if one was asked for.
        whole: whether the whole data set counts as one datum.
        notes: what else to know.
    """

    evidence: Evidence
    sites: dict[str, SiteCheck]
    reference: Reference | None
    whole: bool
    notes: tuple[str, ...]

    @property
    def pareto_k(self) -> float:
        """The largest k-hat; NaN where all weights are equal."""
        known = self.evidence.pareto_k[~self.evidence.pareto_k.isnan()]
        return float(known.max()) if len(known) else math.nan

    @property
    def trusted(self) -> str:
        """Which moments to use: `"guide"`, `"reweighted"`, `"reference"`, or `"none"`.

        Where the evidence is a bound only, the reweighted moments of S draws are still usable while k-hat is at most
        min(0.7, 1 - 1 / log10 S) (Vehtari, Simpson, Gelman, Yao and Gabry 2024, section 3).
        """
        if self.reference is not None and self.reference.converged:
            return "guide" if self._near else "reference"
        if self.evidence.kind == "estimate":
            return "guide" if self._near else "reweighted"
        usable = min(_USABLE, 1 - 1 / math.log10(max(self.evidence.samples, 2)))
        return "reweighted" if self.pareto_k <= usable else "none"

    @property
    def _near(self) -> bool:
        """Whether the guide's means and standard deviations are those of the reference or the weights."""
        sites = self.sites.values()
        apart = max((float(site.loc_error.abs().max()) for site in sites), default=0.0)
        return apart < _NEAR and all(float(site.scale_ratio.log().abs().max()) < _NEAR for site in sites)

    def doubtful(self, most: int = 5) -> dict[str, float]:
        """The latent sites whose mean or standard deviation is off most, in standard deviations, the worst first."""
        off = {
            name: max(float(site.loc_error.abs().max()), float((site.scale_ratio - 1).abs().max()))
            for name, site in self.sites.items()
        }
        return dict(sorted(off.items(), key=lambda pair: -pair[1])[:most])

    def moments(self, name: str) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """Means of a site, their errors and the standard deviations, by the guide, by weights and by the reference."""
        site = self.sites[name]
        rows = [("guide", site.loc, site.error, site.scale)]
        rows += [("reweighted", site.reweighted_loc, site.reweighted_error, site.reweighted_scale)]
        if self.reference is not None and site.reference_loc is not None:
            known = site.reference_loc, site.reference_error, site.reference_scale
            rows.append((self.reference.method, *known))  # type: ignore[arg-type]
        return rows

    def __str__(self) -> str:
        """Figures, then what to trust: of a site with few entries each mean ± its error (standard deviation)."""
        evidence = self.evidence
        n, summary = len(evidence.elbo), evidence.summary()
        bound, value = summary["elbo"], summary["log_evidence"]
        unit = "of the data set" if self.whole else f"per datum, mean of {n}"
        how = f"± {value['mc_se']:.2g}" if value["kind"] == "estimate" else "at least, on average"
        spread = f"± {bound['mc_se']:.2g}" if math.isfinite(bound["mc_se"]) else "(its error is unknown)"
        lines = [
            f"Nats {unit}, from {evidence.samples} draws"
            + (f" with {evidence.inner} of the local latents each" if evidence.inner > 1 else ""),
            f"  ELBO          {bound['mean']:.3f} {spread}",
            f"  log evidence  {value['mean']:.3f} {how} ({value['kind']})",
            f"  Pareto k-hat  {_k(self.pareto_k)}" + (_k_error(evidence) if self.whole else " at the most"),
            f"  effective     {float(evidence.ess.min()):.0f} of {evidence.samples} draws"
            + ("" if self.whole else " at the least"),
        ]
        if not self.whole and (worst := evidence.worst())["n"]:
            lines.append(f"  doubtful data {worst['n']}, the worst in rows {', '.join(map(str, worst['rows'][:5]))}")
        lines += [line for name, site in self.sites.items() for line in self._site(name, site)]
        return "\n".join([*lines, *self.words])

    @property
    def words(self) -> list[str]:
        """Whether the reference passed its checks, what else to know, and last what to trust."""
        checked = [] if self.reference is None else [self._checked(self.reference)]
        return [*checked, *self.notes, self._verdict()]

    def _site(self, name: str, site: SiteCheck) -> list[str]:
        """Lines of a site: its moments, or if it has many, by how much they are off."""
        off = f"off by up to {float(site.loc_error.abs().max()):.2f} standard deviations"
        ratio = f"{float(site.scale_ratio.min()):.2f} to {float(site.scale_ratio.max()):.2f} times as wide"
        lines = [f"{name}: {off}, {ratio}"]
        if self.whole and site.loc.numel() <= _SHOWN:
            for label, *columns in self.moments(name):
                parts = zip(*(column.flatten().tolist() for column in columns), strict=True)
                shown = "  ".join(f"{mean:.3g} ± {error:.1g} ({spread:.2g})" for mean, error, spread in parts)
                lines.append(f"  {label:<12}{shown}")
            if not bool(site.loc_bound.isnan().any()):
                bounds = "  ".join(f"{value:.2g}" for value in site.loc_bound.flatten().tolist())
                lines.append(f"  mean off by at most {bounds}, a bound if the guide's draws reach all mass")
        return lines

    def _checked(self, reference: Reference) -> str:
        passed = "passed" if reference.converged else "did not pass"
        mixing = ""
        if self.whole and bool(reference.log_evidence.isfinite().all()):
            value, error = float(reference.log_evidence), float(reference.error)
            mixing = f": log p(x) = {value:.3f}" + (f" ± {error:.1g}" if error else "")
        if "r_hat" in reference.diagnostics:
            r_hat, ess, lost = (reference.diagnostics[name] for name in ("r_hat", "ess", "divergences"))
            mixing = f": R-hat {float(r_hat.max()):.3f}, {float(ess.min()):.0f} effective draws, {int(lost.sum())} "
            mixing += "divergences"
        return f"The reference, {reference.method}, {passed} its own checks{mixing}."

    def _verdict(self) -> str:
        k = _k(self.pareto_k)
        if self.trusted == "guide":
            return "Trust the guide: its means and standard deviations are right to a tenth of a standard deviation."
        if self.trusted == "reference":
            return "Trust the reference; the guide differs from it as shown."
        if self.trusted == "none":
            return (
                f"Trust none of these moments: k-hat is {k}, so the guide's draws miss mass of the posterior. Train "
                "longer, take a richer guide or another parameterisation"
                + (', or ask for reference="nuts".' if self.reference is None else ".")
            )
        if self.evidence.kind == "estimate":
            return "Trust the log evidence and the reweighted moments; the guide itself differs from them as shown."
        return (
            f"Trust the reweighted moments with care: k-hat is {k}, so they converge slowly and the log evidence is a "
            "lower bound. The guide itself differs from them as shown."
        )


def _k_error(evidence: Evidence) -> str:
    error = float(shape_error(evidence.pareto_k.clamp_min(-0.5), evidence.samples))
    return "" if math.isnan(error) else f" ± {error:.2f}"


def _k(value: float) -> str:
    return "none: all weights are equal" if math.isnan(value) else f"{value:.2f}"


def check_guide(
    program: Any, x: Any = None, *, reference: str | Reference | None = None, samples: int = 1000, seed: int = 0
) -> GuideCheck:
    r"""Check how far a program's guide is from the posterior, without training it.

    The guide's draws :math:`z_i` carry the weights :math:`w_i = p(x, z_i) / q(z_i \mid x)`. Their mean estimates p(x),
    the tail of the largest says whether it can be trusted, and with them the draws have the moments of the posterior.
    Of any f, :math:`|E_p f - E_q f| \le \mathrm{sd}_q(f) \sqrt{\chi^2}` by Cauchy and Schwarz, with
    :math:`\chi^2 = e^{D_2} - 1` the variance of the weights relative to their mean. For each latent variable this
    bounds the error of mean and standard deviation, where k-hat with its error is below 1/2, so that :math:`\chi^2` can
    be estimated at all, and only if the guide's draws reach all mass: a mode that none of them hits is not seen.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        reference: a method of `reference_posterior`, such as `"nuts"`, or its result, to compare with.
        samples: draws per datum.
        seed: of the draws; the global random state is left alone.

    Returns:
        The figures; `print` them to read what to trust.

    Warns:
        UserWarning: If the guide's parameters are only made now, so that nothing was trained.

    Raises:
        ValueError: If the data do not fit, the program breaks the contract, its guide is a point, or the reference is
            unknown.

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman 2018), section 3.
        Validated Variational Inference via Practical Posterior Error Bounds (Huggins, Kasprzak, Campbell, Broderick
        2020), whose bounds by the 2-divergence are those of Wasserstein distances.
    """
    target = Target.of(program, x)
    notes = []
    if _untrained(target, seed):
        notes.append("Nothing was trained: the guide's parameters are only made now. Call fit(program, x) first.")
        warnings.warn(notes[0], stacklevel=2)
    if target.structure.sequential:
        notes.append("This program runs one draw at a time, since it does not allow dims left of its plates.")
    if target.structure.enumerated:
        summed = f"{', '.join(target.structure.enumerated)} summed out"
        exact = "so that the log evidence is exact and the guide has nothing to approximate"
        notes.append(f"Discrete sites: {summed}" + ("." if target.structure.latents else f", {exact}."))
    moments: list[WeightedMoments] = []

    def look(number: int, draws: Draws) -> None:
        if number == len(moments):
            moments.append(WeightedMoments())
        moments[number].add(draws)

    evidence = estimate_evidence(target, samples, seed, None, look)
    columns = [torch.cat(each) for each in zip(*(part.figures() for part in moments), strict=True)]
    if isinstance(reference, str):
        reference = reference_posterior(target, method=reference, seed=seed)  # type: ignore[arg-type]
    divergence = torch.cat([part.divergence() for part in moments])
    bounds = _bounds(evidence, divergence, columns[0], columns[1], columns[4], _local(target))
    errors = columns[1] / evidence.samples**0.5, columns[5]
    if reference is not None and _disagrees(reference, columns[0], bounds[0], errors[0]):
        bounds = [torch.full_like(bound, math.nan) for bound in bounds]
        notes.append("No bounds: the reference lies beyond them, so the guide's draws do not reach all mass.")
    known = [None] * 3 if reference is None else [reference.loc, _scales(reference), _error(reference)]
    sites = _by_site(target, [*columns[:4], *known[:2], *bounds, *errors, known[2]])
    return GuideCheck(evidence, sites, reference, target.structure.whole, tuple(notes))


def _scales(reference: Reference) -> Tensor:
    return reference.covariance.diagonal(dim1=-2, dim2=-1).sqrt()


def _error(reference: Reference) -> Tensor:
    """Error of a reference's means, (n, z)."""
    checks, scale = reference.diagnostics, _scales(reference)
    if "mcse_mean" in checks:
        return checks["mcse_mean"]  # type: ignore[no-any-return]
    if "moment_error" in checks:
        return scale * checks["moment_error"].unsqueeze(-1)
    return scale / checks["ess"].sqrt().unsqueeze(-1) if "ess" in checks else torch.zeros_like(scale)


def _bounds(
    evidence: Evidence, divergence: Tensor, loc: Tensor, scale: Tensor, fourth: Tensor, local: Tensor
) -> list[Tensor]:
    """Most that mean and standard deviation of the guide can be off, (n, z); NaN where that is not known."""
    shape = evidence.pareto_k
    known = (shape + shape_error(shape, evidence.samples) < 0.5) | (shape.isnan() & (evidence.samples >= 25))
    known = known.unsqueeze(-1) & ~local
    chi2 = divergence.clamp_min(0).unsqueeze(-1)
    mean = scale * chi2.sqrt()
    square = ((fourth - scale**4).clamp_min(0) * chi2).sqrt()
    high = (scale.square() + square).sqrt() - scale
    low = scale - (scale.square() - square - mean.square()).clamp_min(0).sqrt()
    return [torch.where(known, bound, math.nan).expand_as(loc) for bound in (mean, torch.maximum(high, low))]


def _local(target: Target) -> Tensor:
    """Which latent variables have nested weights, whose variance says nothing of them, (z,)."""
    with torch.no_grad():
        nodes: Any = target.traces(1, 0)[0].nodes
    parts = [
        torch.full((math.prod(target.structure.shapes[name]),), target.structure.local in frames(nodes[name]))
        for name in target.structure.latents
    ]
    return torch.cat([torch.zeros(0, dtype=torch.bool), *parts]).to(target.device)


def _disagrees(reference: Reference, loc: Tensor, bound: Tensor, error: Tensor) -> bool:
    """Whether a reference's mean lies further from the guide's than the bound and five errors of both allow."""
    error = torch.hypot(error, reference.diagnostics.get("mcse_mean", torch.zeros_like(loc)))
    slack = 5 * error + (0.05 if reference.method == "ais" else 1e-3) * _scales(reference)
    return bool(((reference.loc - loc).abs() > bound + slack).any())


def _by_site(target: Target, columns: list[Tensor | None]) -> dict[str, SiteCheck]:
    shapes = {name: target.structure.shapes[name] for name in target.structure.latents}
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = [[None] * len(sizes) if column is None else column.split(sizes, -1) for column in columns]
    return {
        name: SiteCheck(*(None if part is None else part.reshape(-1, *shape) for part in own))  # type: ignore[arg-type]
        for (name, shape), own in zip(shapes.items(), zip(*parts, strict=True), strict=True)
    }


def _untrained(target: Target, seed: int) -> bool:
    """Whether the guide makes its parameters only when it is called, in a copy of the program."""
    with torch.no_grad(), trial(target.program) as twin:

        def names() -> set[str]:
            own = {name for name, _ in twin.named_parameters()} if isinstance(twin, torch.nn.Module) else set()
            stored = {*own_params(twin)["params"], *pyro.get_param_store().keys()}
            return own | {name for name in stored if "$$$" not in name}  # those of modules are there from the start

        before = names()
        with fork_rng(seed, device=target.device):
            poutine.trace(twin.guide).get_trace(**batch_of(twin.guide, target.batch))
        return bool(names() - before)
