"""The diagnostics of a run, on twins whose answers are known, and their figures."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from twins import TWINS

from ppl_vae import PPCA, VAE, Conditional, Program, Target, log_evidence
from ppl_vae.evaluation.bounds import BoundCurve, bound_curve
from ppl_vae.evaluation.calibration import calibrate
from ppl_vae.families import ExactNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.infer.density_grid import DensityGrid
from ppl_vae.infer.reference import Reference, reference_posterior
from ppl_vae.networks import MLP, Linear
from ppl_vae.reports import diagnostic_plots, diagnostics
from ppl_vae.reports.diagnostic_words import describe_diagnostics
from ppl_vae.reports.diagnostics import MAX_DATA, Diagnostics, diagnose, find_reference, rank_counts
from ppl_vae.reports.figures import draw_diagnostics


def _digits() -> torch.Tensor:
    return torch.tensor(load_digits().data)


def _nonlinear(latent: int) -> VAE:
    return VAE(
        Conditional(StandardNormal(latent)),
        Conditional(Normal(4, scale=1.0), MLP(hidden=[6])),
        Conditional(Normal(latent), MLP(hidden=[6])),
    )


def _refuse(program, batch, **asked):
    return find_reference(Target(program, batch), Diagnostics(**asked))


def _diagnose(program, batch, truth, evidence=None, **asked):
    target = Target(program, batch)
    results = diagnose(target, evidence or log_evidence(target, samples=40), Diagnostics(**asked), truth)
    return results, describe_diagnostics(results.report)


def _look(program, batch, folder, samples=50, shape=None, **asked):
    evidence = log_evidence(program, batch, samples)
    results, words = _diagnose(program, batch, _refuse(program, batch, **asked), evidence, **asked)
    return results.report, words, draw_diagnostics(results, folder, shape=shape), evidence


def test_the_exact_guide_is_found_right(tmp_path) -> None:
    x = _digits()
    ppca = PPCA.fit(x, 2)
    vae, few = ppca.to_vae(), {"x": x[:60]}  # more than the reference looks at
    asked = {"reference": "auto", "gap": True, "calibration": True}
    blocks, words, pictures, evidence = _look(vae, few, tmp_path, shape=(8, 8), **asked)
    expected = float(ppca.log_evidence(x[: blocks["reference"]["n"]]).mean())
    assert blocks["reference"]["method"] == "closed-form"
    assert blocks["reference"]["log_evidence"] == pytest.approx(expected, abs=1e-9)
    assert "gap" not in blocks["reference"]  # it was asked for, and has a block of its own
    assert blocks["calibration"]["verdict"] == "no fault found"
    assert len(words) == 4
    assert f"{expected:.3f} nats exactly on average" in words[0]
    assert "the ELBO lies" not in words[0]  # the gap was asked for, and says so
    n = blocks["reference"]["n"]
    assert blocks["bound"]["n"] == blocks["gap"]["n"] == blocks["reference"]["n_settled"] == n == MAX_DATA["auto"]
    assert blocks["bound"]["samples"] == [1, 2, 5, 10, 20, 50]
    np.testing.assert_allclose(blocks["bound"]["mean"][-1], float(evidence.log_evidence[:n].mean()))
    assert len(blocks["pareto_k"]) == 60
    assert (blocks["gap"]["kind"], blocks["gap"]["total"]) == ("estimate", pytest.approx(0, abs=1e-6))
    assert np.sum(blocks["calibration"]["ranks"]["counts"], 1).tolist() == [500, 500]
    assert {"bound.png", "reference.png", "calibration.png", "gap.png"} <= set(pictures)
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures)


def test_a_narrow_guide_is_found_wrong(tmp_path) -> None:
    x = _digits()[:, 1:12]
    exact = PPCA.fit(x, 2).to_vae()
    q = exact.posterior(x[:1].detach())
    guide = Conditional(Normal(2, scale=0.5 * float(q.stddev.detach()[0, 0])), Linear())
    vae = VAE(exact.prior, exact.likelihood, guide)
    blocks, words, _, _ = _look(vae, {"x": x[:20]}, tmp_path, calibration=True)
    assert blocks["calibration"]["verdict"] == "miscalibrated"
    assert "miscalibrated" in words[1]


def test_nonlinear_pairs_have_no_closed_form_and_say_so() -> None:
    vae, batch = _nonlinear(5), {"x": torch.randn(3, 4)}
    with pytest.raises(ValueError, match="allows 'ais', 'nuts'"):
        _refuse(vae, batch, reference="closed-form")
    with pytest.raises(ValueError, match="at most 3 latent variables"):
        _refuse(vae, batch, reference="quadrature")


def test_a_gap_without_a_family_is_not_split() -> None:
    twin = TWINS["two_level"]()
    results, told = _diagnose(twin.program, twin.batch, None, gap=True)
    assert results.report["gap"]["family"] is None
    assert results.report["gap"]["approximation"] is None
    assert "The family of this guide is not known, so it is not split." in " ".join(told)


def test_how_many_data_are_looked_at_is_a_choice(tmp_path) -> None:
    ppca = PPCA.fit(_digits()[:, 1:12], 2)
    batch = {"x": _digits()[:30, 1:12]}
    blocks, _, _, _ = _look(ppca.to_vae(), batch, tmp_path, reference="closed-form", max_data=3)
    assert blocks["reference"]["n"] == blocks["bound"]["n"] == 3
    _, words, pictures, _ = _look(ppca.to_vae(), batch, tmp_path, reference="closed-form", max_data=1)
    assert re.search(r"on average over 1 datum, .*; the ELBO lies -?[\d.]+ ± [\de.-]+ below\.", words[0])
    assert "mean over 1 datum:" in words[1]
    assert "reference.png" in pictures  # where the data are no pictures, too
    for count, asked, message in (
        (0, {"gap": True}, "Expected `data` to be a whole number, at least 1; got 0"),
        (2.5, {"gap": True}, "Expected `data` to be a whole number, at least 1; got 2.5"),
        (99_999, {"reference": "auto"}, "Expected --data to be at most 30, which are all there are; got 99,999"),
        (3, {}, "--data together with"),
        (3, {"calibration": True}, "--data together with"),
    ):
        with pytest.raises(ValueError, match=message):
            _refuse(ppca.to_vae(), batch, max_data=count, **asked)
    assert len(_refuse(ppca.to_vae(), batch, reference="auto", max_data=np.int64(30)).loc) == 30
    with pytest.raises(ValueError, match="one of 'auto', 'closed-form'.*got 'guess'"):
        _refuse(ppca.to_vae(), batch, reference="guess")


def test_means_are_over_the_data_that_settled() -> None:
    x = _digits()[:6]
    ppca = PPCA.fit(_digits(), 2)
    vae, known = ppca.to_vae(), ppca.log_evidence(x)
    settled = torch.tensor([True, False, True, True, False, True])
    q = ppca.posterior(x)
    truth = Reference(
        torch.where(settled, known, known + 5),
        torch.where(settled, 1e-6, 0.3),
        q.mean,
        q.covariance_matrix,
        "quadrature",
        None,
        {"z": (2,)},
        False,
        {"settled": settled},
    )
    evidence = log_evidence(vae, x, 40)
    results, words = _diagnose(vae, {"x": x}, truth, evidence, gap=True)
    blocks = results.report
    block = blocks["reference"]
    assert (block["n"], block["n_settled"]) == (6, 4)
    assert block["log_evidence"] == pytest.approx(float(known[settled].mean()))
    assert block["error"] == pytest.approx(1e-6)
    assert block["importance_weighted"] == pytest.approx(float(evidence.log_evidence[settled].mean()))
    assert "over the 4 data that settled" in words[0]
    assert "2 of 6 data did not settle" in words[0]
    assert torch.equal(results.known.log_evidence, known[settled])
    assert blocks["gap"]["n"] == blocks["bound"]["n"] == 4
    assert blocks["gap"]["total"] == pytest.approx(0, abs=1e-6)
    truth.diagnostics["settled"] = torch.zeros(6, dtype=torch.bool)
    results, words = _diagnose(vae, {"x": x}, truth, evidence)
    assert results.report["reference"]["log_evidence"] is None
    assert results.report["bound"]["n"] == 6
    assert results.known is None
    assert "none of 6 data" in words[0]


def test_the_same_data_have_the_same_figures_in_all_blocks() -> None:
    """The bound over its samples is drawn as the evidence was: of a part of the data, it ends where that stands."""
    vae, x = _nonlinear(2), torch.randn(130, 4)
    evidence, settled = log_evidence(vae, x, 60), torch.arange(40) % 3 > 0
    known, loc = torch.zeros(40), torch.zeros(40, 2)
    told = {"settled": settled}
    truth = Reference(known, known, loc, torch.eye(2).expand(40, 2, 2), "quadrature", None, {"z": (2,)}, False, told)
    blocks = _diagnose(vae, {"x": x}, truth, evidence)[0].report
    bound, block = blocks["bound"], blocks["reference"]
    assert (bound["n"], bound["samples"][-1]) == (int(settled.sum()), 60)
    assert bound["mean"][0] == pytest.approx(float(evidence.elbo[:40][settled].mean()), rel=1e-12)
    assert bound["mean"][0] == pytest.approx(block["log_evidence"] - block["gap"], rel=1e-12)
    assert bound["mean"][-1] == pytest.approx(block["importance_weighted"], rel=1e-12)


def test_annealing_tells_of_its_chains(tmp_path) -> None:
    vae, batch = _nonlinear(2), {"x": torch.randn(3, 4)}
    truth = reference_posterior(vae, batch, "ais", chains=8, temperatures=20)
    results, words = _diagnose(vae, batch, truth)
    blocks = results.report
    checks, which = blocks["reference"]["diagnostics"], truth.diagnostics["settled"]
    which = which if which.any() else ~which
    assert checks["ess"]["min"] == pytest.approx(float(truth.diagnostics["ess"].min()))
    assert checks["acceptance"]["median"] == pytest.approx(float(truth.diagnostics["acceptance"].median()))
    error = float(truth.error[which].square().sum().sqrt()) / int(which.sum())
    assert blocks["reference"]["error"] == pytest.approx(error)
    assert f"± {error:.3f}" in words[0]
    assert f"at least {checks['ess']['min']:.1f} are effective" in words[0]
    assert f"{checks['acceptance']['median']:.0%} of the moves" in words[0]
    assert "reference.png" in draw_diagnostics(results, tmp_path)


@pytest.mark.parametrize("settled", [(True, True, True), (True, False, True), (False, False, False), None])
def test_annealing_is_a_lower_bound_unless_it_has_settled(tmp_path, settled) -> None:
    x = _digits()[:3]
    ppca = PPCA.fit(_digits(), 5)
    vae, q = ppca.to_vae(), ppca.posterior(x)
    low = ppca.log_evidence(x) - torch.tensor([0.1, 0.2, 0.4])
    told = {"ess": torch.full((3,), 5.0), "acceptance": torch.full((3,), 0.7)}
    told |= {} if settled is None else {"settled": torch.tensor(settled)}
    truth = Reference(
        low, torch.full((3,), 0.3), q.mean, q.covariance_matrix, "ais", torch.zeros(16, 3, 5), {"z": (5,)}, False, told
    )
    results, words = _diagnose(vae, {"x": x}, truth, gap=True)
    blocks, pictures = results.report, draw_diagnostics(results, tmp_path)
    sure = bool(settled and any(settled))
    used = low[torch.tensor(settled)] if sure else low
    block, kind = blocks["reference"], "estimate" if sure else "lower bound"
    assert block["kind"] == blocks["gap"]["kind"] == kind
    assert (block["n_settled"], blocks["gap"]["n"]) == (sum(settled or ()), len(used))
    assert block["log_evidence"] == pytest.approx(float(used.mean()))
    assert block["error"] == pytest.approx(0.3 / len(used) ** 0.5)
    assert blocks["gap"]["total"] == pytest.approx(block["log_evidence"] - float(results.gap.elbo.mean()), abs=1e-6)
    sign = "=" if sure else ">="
    assert f"log p(x) {sign} {block['log_evidence']:.3f} ± {block['error']:.3f} nats" in words[0]
    assert ("a lower bound on average, not an estimate" in words[0]) is not sure
    assert (f"{3 - sum(settled or ())} of 3 data did not settle" in words[0]) is (settled != (True, True, True))
    assert ("left out" in words[0]) is (settled == (True, False, True))
    assert ("a lower bound on average" in pictures["bound.png"]) is not sure
    assert ("at least" in words[2]) is not sure


def test_nuts_says_of_how_many_data_it_is_sure() -> None:
    x = _digits()[:3]
    ppca = PPCA.fit(_digits(), 5)
    vae, q = ppca.to_vae(), ppca.posterior(x)
    none = torch.full((3,), float("nan"))
    told = {"r_hat": torch.tensor([1.0, 1.02, 1.0]), "ess": torch.full((3,), 900.0), "divergences": 0}
    told["settled"] = told["r_hat"] < 1.01
    truth = Reference(none, none, q.mean, q.covariance_matrix, "nuts", torch.zeros(800, 3, 5), {"z": (5,)}, False, told)
    results, words = _diagnose(vae, {"x": x}, truth)
    blocks = results.report
    assert blocks["reference"]["n_settled"] == 2
    assert blocks["reference"]["each"] == {"r_hat": told["r_hat"].tolist(), "ess": [900.0] * 3}
    assert "800 draws are as good as 900 independent ones or more" in words[0]
    assert "**Its own checks failed** on 1 of 3 data" in words[0]


def _auxiliary() -> Program:
    """z is N(0, I) and x is z and noise; the guide's z depends on a site that is not part of the model."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            one = pyro.sample("aid", dist.Normal(x.mean(-1), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(torch.stack([one, one**2], -1), 0.5).to_event(1))

    return Program(model, guide)


def test_a_guide_without_a_density_is_drawn_by_its_moments(tmp_path) -> None:
    batch = {"x": torch.randn(3, 2)}
    results, _ = _diagnose(_auxiliary(), batch, _refuse(_auxiliary(), batch, reference="closed-form"))
    assert "moments" in results.densities["name"]
    loc, covariance = results.densities["approximate"]
    middle = batch["x"].mean(-1)
    mean = torch.stack([middle, middle**2 + 1], -1)
    spread = torch.stack([torch.full((3,), 1.25), 4 * middle**2 + 2.25], -1).double()  # of a and a^2, a ~ N(m, 1)
    assert bool(((loc - mean).abs() < 5 * (spread / 1000).sqrt()).all())
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), spread, rtol=0.5, atol=0)
    assert "reference.png" in draw_diagnostics(results, tmp_path)


def test_a_guide_with_a_density_is_drawn_by_it() -> None:
    vae = _nonlinear(2)
    mixture = VAE(vae.prior, vae.likelihood, Conditional(MixtureNormal(2), MLP(hidden=[6])))
    batch = {"x": torch.randn(3, 4)}
    results, _ = _diagnose(mixture, batch, _refuse(mixture, batch, reference="quadrature"))
    assert isinstance(results.densities["approximate"], DensityGrid)


def test_posteriors_that_no_grid_resolves_are_not_drawn_and_a_note_says_so(tmp_path, monkeypatch) -> None:
    def rough(*given):
        raise ValueError("Expected a smooth density; got a rough one.")

    monkeypatch.setattr(diagnostics, "posterior_grid", rough)
    batch = {"x": torch.randn(3, 2)}
    results, _ = _diagnose(_auxiliary(), batch, _refuse(_auxiliary(), batch, reference="closed-form"))
    assert results.notes == ["The exact posterior is not drawn. Expected a smooth density; got a rough one."]
    assert "reference.png" not in draw_diagnostics(results, tmp_path)


def test_what_is_not_finite_is_described_all_the_same() -> None:
    spread = {"min": None, "median": None, "max": None}
    nuts = {"method": "nuts", "n": 2, "n_settled": 0, "converged": False, "draws": 9}
    nuts["diagnostics"] = {"r_hat": spread, "ess": spread, "divergences": 0}
    assert "R-hat is at most - (required" in describe_diagnostics({"reference": nuts})[0]
    exact = {"method": "closed-form", "n": 2, "n_settled": 2, "converged": True, "kind": "estimate", "error": 0.0}
    exact |= {"log_evidence": -9.0, "importance_weighted": None, "gap": None, "gap_error": None, "diagnostics": {}}
    assert describe_diagnostics({"reference": exact}) == [
        "**Reference** by closed-form: log p(x) = -9.000 nats exactly on average over 2 data, where importance "
        "sampling gives -; the ELBO lies - below."
    ]


def test_a_gap_below_an_estimate_is_at_least_what_it_says(tmp_path) -> None:
    blocks, words, _, _ = _look(_nonlinear(2), {"x": torch.randn(4, 4)}, tmp_path, gap=True)
    assert blocks["gap"]["kind"] == "lower bound"
    assert "at least" in words[1]
    parts = blocks["gap"]
    assert parts["total"] == pytest.approx(parts["approximation"] + parts["amortization"])
    assert {"error", "approximation_error", "amortization_error"} <= parts.keys()


def test_bound_is_drawn_where_it_is() -> None:
    curve = BoundCurve(torch.tensor([1, 10]), torch.tensor([[-3.0, -5.0], [-2.0, -4.0]]), torch.full((2, 2), 0.1))
    ax = diagnostic_plots.bound_over_samples(curve, truth=torch.tensor([-1.0, -3.0]))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [-4.0, -3.0])
    assert ax.get_legend() is not None
    assert "nats" in ax.get_ylabel()


def test_tail_shapes_rise_and_leave_out_what_has_none() -> None:
    ax = diagnostic_plots.tail_shapes(torch.tensor([0.7, float("nan"), 0.1, 0.4]))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.1, 0.4, 0.7])


def test_gap_bars_stack_in_order() -> None:
    ax = diagnostic_plots.gap_parts(torch.tensor([1.0, 0.2]), torch.tensor([0.5, 0.1]))
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [0.2, 1.0, 0.1, 0.5])
    np.testing.assert_allclose([bar.get_y() for bar in ax.patches][2:], [0.2, 1.0])


def test_rank_histograms_count_every_simulation() -> None:
    prior = Conditional(StandardNormal(2))
    likelihood = Conditional(Normal(3, scale="shared"), Linear(), context=2)
    calibration = calibrate(VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood))), simulations=200)
    figure = diagnostic_plots.rank_histograms(calibration)
    assert isinstance(figure, Figure)
    edges, counts = rank_counts(calibration)
    np.testing.assert_array_equal(counts.sum(1), [200, 200])
    for latent in range(2):
        drawn = [patch for patch in figure.axes[latent].patches if hasattr(patch, "get_data")]
        np.testing.assert_array_equal(drawn[0].get_data().values, counts[latent])
        np.testing.assert_array_equal(drawn[0].get_data().edges, edges)
        first = (calibration.ranks[:, latent] < edges[1]).sum()
        assert counts[latent, 0] == first
    assert len(figure.axes) == 4  # two latents, log p(x, z), the coverage


@pytest.mark.parametrize("draw", ["tail_shapes", "gap_parts"])
def test_no_data_are_refused(draw: str) -> None:
    nothing = torch.zeros(0)
    arguments = (nothing,) if draw == "tail_shapes" else (nothing, nothing)
    with pytest.raises(ValueError, match="at least one datum"):
        getattr(diagnostic_plots, draw)(*arguments)


def test_one_datum_is_enough() -> None:
    vae = PPCA.fit(_digits(), 2).to_vae()
    assert diagnostic_plots.bound_over_samples(bound_curve(vae, _digits()[:1], 5)).lines
    assert diagnostic_plots.tail_shapes(torch.tensor([0.3])).lines
    assert diagnostic_plots.gap_parts(torch.tensor([0.3]), torch.tensor([-0.1])).patches
