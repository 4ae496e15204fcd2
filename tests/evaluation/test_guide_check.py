"""What `check_guide` says, against closed forms, and that it warns where it should."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from ppl_vae import Program, check_guide, fit, log_evidence, reference_posterior
from ppl_vae.programs.program import load_program

Y = torch.tensor([0.4, 1.9, 1.1, -0.3])
SPREAD = 1 / (1 + len(Y))  # of the posterior of m, a variance
TRUTH = float(dist.MultivariateNormal(torch.zeros(4).double(), torch.ones(4, 4) + torch.eye(4)).log_prob(Y.double()))


def model(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def guided(shift: float = 0.0, factor: float = 1.0) -> Program:
    """The exact guide, with its mean shifted by so many standard deviations and its scale times a factor."""

    def guide(y: Tensor) -> None:
        pyro.sample("m", dist.Normal(SPREAD * y.sum() + shift * SPREAD**0.5, factor * SPREAD**0.5))

    return Program(model, guide)


DATA = {"y": Y.double()}


def test_the_exact_guide_is_trusted() -> None:
    check = check_guide(guided(), DATA, reference="closed-form")
    assert check.trusted == "guide"
    assert math.isnan(check.pareto_k)
    site = check.sites["m"]
    assert_allclose(site.reference_loc, [SPREAD * float(Y.sum())])
    assert_allclose(site.reference_scale, [SPREAD**0.5])
    assert abs(float(site.loc_error)) < 0.1
    assert float(site.loc_bound) < 1e-6
    assert "Trust the guide" in str(check)
    assert "closed-form, passed its own checks" in str(check)


@pytest.mark.parametrize(("shift", "factor"), [(0.3, 1.2), (0.5, 1.1), (0.0, 1.5)])
def test_moments_and_bounds_of_a_guide_that_is_off(shift: float, factor: float) -> None:
    check = check_guide(guided(shift, factor), DATA, samples=4000)
    assert check.trusted == "reweighted"
    evidence, site = check.evidence, check.sites["m"]
    assert_allclose(evidence.log_evidence, log_evidence(guided(shift, factor), DATA, 4000).log_evidence)
    assert abs(float(evidence.log_evidence) - TRUTH) < 5 * float(evidence.mc_se)
    loc, scale = SPREAD * float(Y.sum()), SPREAD**0.5
    assert abs(float(site.reweighted_loc) - loc) < 0.1 * scale
    assert float(site.reweighted_scale) == pytest.approx(scale, rel=0.1)
    assert float(site.loc_error) == pytest.approx(shift, abs=0.1)
    assert float(site.scale_ratio) == pytest.approx(factor, rel=0.1)
    assert shift * scale < float(site.loc_bound) < 3 * scale
    assert abs(factor - 1) * scale < float(site.scale_bound)
    precision = 2 - 1 / factor**2  # of p^2 / q, in units of p's scale
    chi2 = factor / precision**0.5 * math.exp(shift**2 / factor**2 * (1 / factor**2 / precision + 1) / 2) - 1
    assert float(site.loc_bound) == pytest.approx(factor * scale * chi2**0.5, rel=0.25)
    assert "Trust the log evidence and the reweighted moments" in str(check)
    assert "bound if the guide's draws reach all mass" in str(check)


def test_bounds_hold_for_nearly_every_set_of_draws() -> None:
    """A shift by half a deviation, which the bound exceeds by one hundredth alone: its own error has to be in it."""
    checks = [check_guide(guided(0.5, 1.1), DATA, samples=1000, seed=seed) for seed in range(60)]
    bounds = torch.stack([check.sites["m"].loc_bound[0] for check in checks]) / SPREAD**0.5
    assert int((bounds < 0.5).sum()) <= 3
    assert float(bounds.median()) < 0.62


def test_a_guide_that_is_far_too_narrow_is_not_trusted() -> None:
    check = check_guide(guided(0.0, 0.3), DATA)
    assert check.trusted == "none"
    assert check.pareto_k > 1 - 1 / math.log10(1000)  # by Vehtari et al. (2024), section 3
    assert check.sites["m"].loc_bound.isnan().all()
    assert "Trust none of these moments" in str(check)
    known = check_guide(guided(0.0, 0.3), DATA, reference=reference_posterior(guided(), DATA))
    assert known.trusted == "reference"
    assert float(known.sites["m"].scale_ratio) == pytest.approx(0.3, rel=0.1)


def test_bounds_are_withheld_where_a_reference_lies_beyond_them() -> None:
    """Modes at -5 and 5 and a guide at one of them, which the weights cannot see."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 6.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m.abs(), 0.5), obs=y)

    def guide(y: Tensor) -> None:
        precision = len(y) / 0.25 + 1 / 36
        pyro.sample("m", dist.Normal(y.sum() / 0.25 / precision, precision**-0.5))

    program, data = Program(model, guide), {"y": torch.full((4,), 5.0, dtype=torch.float64)}
    blind = check_guide(program, data)
    assert float(blind.sites["m"].loc_bound) < 0.01
    assert float(blind.evidence.pareto_k.nan_to_num(0.0)) < 0.5
    seeing = check_guide(program, data, reference="quadrature")
    assert abs(float(seeing.sites["m"].reference_loc)) < 1e-3  # type: ignore[arg-type]
    assert seeing.sites["m"].loc_bound.isnan().all()
    assert seeing.trusted == "reference"
    assert "the reference lies beyond them" in str(seeing)


def test_nested_moments_are_those_of_the_posterior() -> None:
    y = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0], dtype=torch.float64)

    def hierarchy(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.8), obs=y)

    def guide(y: Tensor) -> None:
        spread = 1 / (1 + len(y) / 1.64)
        mu = pyro.sample("mu", dist.Normal(spread * y.sum() / 1.64 + 0.1, 1.1 * spread**0.5))
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Normal((mu + y / 0.64) / (1 + 1 / 0.64) + 0.2, 1.3 * (1 + 1 / 0.64) ** -0.5))

    program = Program(hierarchy, guide)
    check = check_guide(program, {"y": y}, samples=2000, reference="closed-form")
    assert check.evidence.inner == 20
    for site in check.sites.values():
        assert_allclose(site.reweighted_loc, site.reference_loc, atol=0.05)
        assert_allclose(site.reweighted_scale, site.reference_scale, rtol=0.08)
    assert check.sites["z"].loc_bound.isnan().all()  # nested weights tell nothing of the joint divergence
    assert not check.sites["mu"].loc_bound.isnan().any()
    assert list(check.doubtful()) == ["z", "mu"] or list(check.doubtful()) == ["mu", "z"]


def test_data_that_are_doubtful_are_named() -> None:
    x = torch.linspace(-2, 2, 120, dtype=torch.float64).unsqueeze(-1)

    def inside(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        scale = torch.where((x[:, 0] - odd).abs() < 1e-9, 0.22, 0.2**0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x[:, 0] + 2.2 * (scale < 0.3), scale))

    odd = float(x[7, 0])
    check = check_guide(Program(inside, guide), x)
    assert not check.whole
    assert check.evidence.worst()["rows"] == [7]
    assert "doubtful data 1, the worst in rows 7" in str(check)
    assert check.sites["z"].loc.shape == (120,)


def test_an_untrained_guide_is_said_to_be_so() -> None:
    with pytest.warns(UserWarning, match=r"Nothing was trained.*Call fit"):
        check = check_guide(Program(model), DATA)
    assert "Nothing was trained" in str(check)
    program = Program(model)
    fit(program, DATA, epochs=200, learning_rate=0.05, particles=10, schedule="one-cycle", progress=False)
    assert "Nothing was trained" not in str(check_guide(program, DATA))


def test_points_have_no_check() -> None:
    program = Program(model, "AutoDelta")
    fit(program, DATA, epochs=1, progress=False)
    with pytest.raises(ValueError, match="latent sites with a density"):
        check_guide(program, DATA)


def schools(centred: bool) -> tuple[Any, dict[str, Tensor]]:
    kind = load_program(str(Path(__file__).parents[2] / "models" / "eight_schools.py"))
    data = sys.modules[kind.__module__].DATA  # type: ignore[attr-defined]
    return kind(centred=centred), {name: value.double() for name, value in data.items()}


def test_k_hat_ranks_the_parameterisations_of_eight_schools() -> None:
    """By plain weights, as in the literature; means by long runs of Stan (posteriordb, eight_schools_noncentered)."""
    shapes, options = {}, {"learning_rate": 0.05, "particles": 10, "schedule": "one-cycle", "progress": False}
    for centred in (True, False):
        program, data = schools(centred)
        fit(program, data, epochs=600, **options)
        shapes[centred] = float(log_evidence(program, data, 4000, inner=1).pareto_k)
        if not centred:
            check = check_guide(program, data)
            assert float(check.sites["mu"].reweighted_loc) == pytest.approx(4.4, abs=0.5)
            assert float(check.sites["tau"].reweighted_loc) == pytest.approx(3.6, abs=0.8)
    assert shapes[True] > 0.7
    assert 0.3 < shapes[False] < 0.7
    assert np.diff(list(shapes.values()))[0] < -0.2


def test_data_in_single_precision_go_through_every_verb() -> None:
    """A model's plain numbers have torch's default type, and a reference runs in double precision."""
    torch.set_default_dtype(torch.float32)
    y, error = torch.tensor([28.0, 8.0, -3.0, 7.0]), torch.tensor([15.0, 10.0, 16.0, 11.0])

    def model(y: Tensor, error: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("effect", dist.Normal(mu, 3.0)), error), obs=y)

    program = Program(model)
    fit(program, {"y": y, "error": error}, epochs=200, batch_size=4, learning_rate=0.05, device="cpu", progress=False)
    check = check_guide(program, {"y": y, "error": error}, reference="nuts")
    precision = (1 / (9 + error.double() ** 2)).sum() + 1 / 25
    mean = (y / (9 + error.double() ** 2)).sum() / precision
    assert check.reference is not None
    found = float(check.reference.loc[0, 0])
    assert abs(found - float(mean)) < 5 * float(check.reference.diagnostics["mcse_mean"][0, 0])


def test_the_draws_of_an_autoguide_in_single_precision_have_an_error() -> None:
    """Its draws are point masses, which lie a little beside in double precision; that is no error of the weights."""
    program, batch = Program(model), {"y": Y}
    fit(program, batch, epochs=300, batch_size=4, learning_rate=0.05)
    check = check_guide(program, batch)
    assert check.evidence.kind == "estimate"
    assert abs(float(check.evidence.log_evidence) - TRUTH) < 5 * float(check.evidence.mc_se) < 0.1
    assert "± -" not in str(check)
