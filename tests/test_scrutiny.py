"""The closer look at a run, on twins whose answers are known, and its pictures."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from twins import TWINS

from ppl_vae import PPCA, VAE, Conditional, diagnostics, log_evidence
from ppl_vae.calibration import calibrate
from ppl_vae.evidence import BoundCurve, bound_curve
from ppl_vae.families import ExactNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Linear
from ppl_vae.scrutiny import scrutinise


def _digits() -> torch.Tensor:
    return torch.tensor(load_digits().data)


def test_the_exact_guide_is_found_right(tmp_path) -> None:
    x = _digits()
    ppca = PPCA.fit(x, 2)
    vae, few = ppca.to_vae(), {"x": x[:60]}  # more than the reference looks at
    evidence = log_evidence(vae, few, 50)
    blocks, words, pictures = scrutinise(
        vae, few, evidence, tmp_path, reference="auto", gap=True, calibration=True, shape=(8, 8)
    )
    expected = float(ppca.log_evidence(x[: blocks["reference"]["n"]]).mean())
    assert blocks["reference"]["method"] == "closed-form"
    assert blocks["reference"]["log_evidence"] == pytest.approx(expected, abs=1e-9)
    assert blocks["reference"]["gap"] == pytest.approx(0, abs=1e-9)
    assert blocks["calibration"]["verdict"] == "no fault found"
    assert len(words) == 3
    assert {"bound.png", "reference.png", "calibration.png", "gap.png"} <= set(pictures)
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures)


def test_a_narrow_guide_is_found_wrong(tmp_path) -> None:
    x = _digits()[:, 1:12]
    exact = PPCA.fit(x, 2).to_vae()
    q = exact.posterior(x[:1].detach())
    guide = Conditional(Normal(2, scale=0.5 * float(q.stddev.detach()[0, 0])), Linear())
    vae = VAE(exact.prior, exact.likelihood, guide)
    blocks, words, _ = scrutinise(vae, {"x": x[:20]}, log_evidence(vae, x[:20], 50), tmp_path, calibration=True)
    assert blocks["calibration"]["verdict"] == "miscalibrated"
    assert "miscalibrated" in words[0]


def test_nonlinear_pairs_have_no_closed_form_and_say_so(tmp_path) -> None:
    vae = VAE(
        Conditional(StandardNormal(5)),
        Conditional(Normal(4, scale=1.0), MLP(hidden=[6])),
        Conditional(Normal(5), MLP(hidden=[6])),
    )
    x = torch.randn(3, 4)
    evidence = log_evidence(vae, x, 30)
    with pytest.raises(ValueError, match="allows 'ais', 'nuts'"):
        scrutinise(vae, {"x": x}, evidence, tmp_path, reference="closed-form")
    with pytest.raises(ValueError, match="at most 3 latent variables"):
        scrutinise(vae, {"x": x}, evidence, tmp_path, reference="quadrature")


def test_the_gap_needs_a_family(tmp_path) -> None:
    twin = (
        TWINS["two_level"]() if "two_level" in TWINS else next(make() for name, make in TWINS.items() if "two" in name)
    )
    evidence = log_evidence(twin.program, twin.batch, 30)
    with pytest.raises(ValueError, match="Expected a VAE for --gap"):
        scrutinise(twin.program, twin.batch, evidence, tmp_path, gap=True)


def test_bound_is_drawn_where_it_is() -> None:
    curve = BoundCurve(torch.tensor([1, 10]), torch.tensor([[-3.0, -5.0], [-2.0, -4.0]]), torch.full((2, 2), 0.1))
    ax = diagnostics.bound_over_samples(curve, truth=torch.tensor([-1.0, -3.0]))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [-4.0, -3.0])
    assert ax.get_legend() is not None
    assert "nats" in ax.get_ylabel()


def test_tail_shapes_rise_and_leave_out_what_has_none() -> None:
    ax = diagnostics.tail_shapes(torch.tensor([0.7, float("nan"), 0.1, 0.4]))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.1, 0.4, 0.7])


def test_gap_bars_stack_in_order() -> None:
    ax = diagnostics.gap_parts(torch.tensor([1.0, 0.2]), torch.tensor([0.5, 0.1]))
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [0.2, 1.0, 0.1, 0.5])
    np.testing.assert_allclose([bar.get_y() for bar in ax.patches][2:], [0.2, 1.0])


def test_rank_histograms_count_every_simulation() -> None:
    prior = Conditional(StandardNormal(2))
    likelihood = Conditional(Normal(3, scale="shared"), Linear(), context=2)
    found = calibrate(VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood))), simulations=200)
    figure = diagnostics.rank_histograms(found)
    assert isinstance(figure, Figure)
    assert (
        sum(bar.get_height() for bar in figure.axes[0].patches if bar.get_height() > 0 and bar.get_width() < 50) >= 200
    )
    assert len(figure.axes) == 3


@pytest.mark.parametrize("draw", ["tail_shapes", "gap_parts"])
def test_no_data_are_refused(draw: str) -> None:
    nothing = torch.zeros(0)
    arguments = (nothing,) if draw == "tail_shapes" else (nothing, nothing)
    with pytest.raises(ValueError, match="at least one datum"):
        getattr(diagnostics, draw)(*arguments)


def test_one_datum_is_enough() -> None:
    vae = PPCA.fit(_digits(), 2).to_vae()
    assert diagnostics.bound_over_samples(bound_curve(vae, _digits()[:1], 5)).lines
    assert diagnostics.tail_shapes(torch.tensor([0.3])).lines
    assert diagnostics.gap_parts(torch.tensor([0.3]), torch.tensor([-0.1])).patches
