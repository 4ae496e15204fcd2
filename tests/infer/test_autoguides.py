"""Pyro's own guides: each trains to its known optimum on a conjugate model and gives evidence, or is refused."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import autoguide
from scipy import stats
from torch import Tensor, nn

from ppl_vae import Program, fit, log_evidence
from ppl_vae.programs.autoguides import guide_names

N = 12
GENERATOR = np.random.default_rng(3)
X = GENERATOR.normal(size=(N, 2)) @ np.array([[1.0, 0.8], [0.0, 1.0]])
Y = X @ [1.0, -1.0] + 0.7 * GENERATOR.normal(size=N)
DATA = {"x": X, "y": Y}
TRUTH = float(stats.multivariate_normal(np.zeros(N), X @ X.T + 0.49 * np.eye(N)).logpdf(Y))
PRECISION = X.T @ X / 0.49 + np.eye(2)
MEAN_FIELD = TRUTH - 0.5 * (np.log(PRECISION.diagonal()).sum() - np.linalg.slogdet(PRECISION).logabsdet)
OPTIONS: Any = {"epochs": 250, "learning_rate": 0.1, "particles": 8, "schedule": "one-cycle", "progress": False}


def model(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x[:, 0] * a + x[:, 1] * b, 0.7), obs=y)


def part(name: str) -> Any:
    return pyro.poutine.block(model, expose=[name])


def listed(*kinds: Any) -> Any:
    guide = autoguide.AutoGuideList(model)
    for kind, name in zip(kinds, ("a", "b"), strict=True):
        guide.append(kind(part(name)))
    return guide


class Easy(EasyGuide):
    def guide(self, x: Tensor, y: Tensor) -> None:
        group = self.group(match="a|b")
        loc = pyro.param("easy_loc", lambda: torch.zeros(2))
        tril = pyro.param("easy_tril", lambda: 0.3 * torch.eye(2), constraint=dist.constraints.lower_cholesky)
        group.sample("both", dist.MultivariateNormal(loc, scale_tril=tril))


def flow() -> Any:
    return autoguide.AutoNormalizingFlow(model, lambda size: affine_autoregressive(size, hidden_dims=[8]))


OPTIMA: dict[str, tuple[Any, float, float]] = {  # guide, optimum and how far from it training may end
    **{name: (name, MEAN_FIELD, 0.1) for name in ("AutoNormal", "AutoDiagonalNormal", "AutoNormalMessenger")},
    **{name: (name, TRUTH, 0.1) for name in ("AutoMultivariateNormal", "AutoLowRankMultivariateNormal")},
    **{name: (name, TRUTH, 0.2) for name in ("AutoStructured", "AutoHierarchicalNormalMessenger")},
    **{name: (name, TRUTH, 0.5) for name in ("AutoGaussian", "AutoIAFNormal", "AutoRegressiveMessenger")},
    "AutoNormalizingFlow": (flow, TRUTH, 0.5),
    "AutoGuideList": (lambda: listed(autoguide.AutoNormal, autoguide.AutoNormal), MEAN_FIELD, 0.1),
    "EasyGuide": (lambda: Easy(model), TRUTH, 0.1),
}
POINTS: dict[str, Any] = {
    "AutoDelta": "AutoDelta",
    "AutoLaplaceApproximation": "AutoLaplaceApproximation",
    "a list": lambda: listed(autoguide.AutoMultivariateNormal, autoguide.AutoDelta),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMA)
def test_a_guide_trains_to_its_optimum_and_gives_evidence(name: str) -> None:
    guide, optimum, slack = OPTIMA[name]
    program = Program(model, guide if isinstance(guide, str) else guide())
    fit(program, DATA, **OPTIONS)
    evidence = log_evidence(program, DATA, 1000)
    assert float(evidence.elbo) == pytest.approx(optimum, abs=slack + 4 * float(evidence.elbo_mc_se))
    assert abs(float(evidence.log_evidence) - TRUTH) < 5 * float(evidence.mc_se) + 0.01


@pytest.mark.parametrize("name", POINTS)
def test_points_train_and_have_no_evidence(name: str) -> None:
    guide = POINTS[name]
    program = Program(model, guide if isinstance(guide, str) else guide())
    fit(program, DATA, **OPTIONS)
    with pytest.raises(ValueError, match="latent sites with a density; got '.*', a point"):
        log_evidence(program, DATA, 10)


def test_laplaces_approximation_is_exact_once_it_is_made() -> None:
    program = Program(model, "AutoLaplaceApproximation")
    fit(program, DATA, **{**OPTIONS, "particles": 1})
    batch = {key: torch.from_numpy(value) for key, value in DATA.items()}
    evidence = log_evidence(Program(model, program.guide.laplace_approximation(**batch)), DATA, 50)
    assert float(evidence.log_evidence) == pytest.approx(TRUTH, abs=1e-3)


def test_a_discrete_guide_of_continuous_sites_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guide that run on data named x, y; one raised: .*\"a\" to be discrete"):
        fit(Program(model, "AutoDiscreteParallel"), DATA, epochs=1)


def test_names_of_guides() -> None:
    assert set(guide_names()) <= {*OPTIMA, *POINTS, "AutoDiscreteParallel"}
    with pytest.raises(ValueError, match=r"`guide` to be one of AutoDelta, .*, or callable; got 'Mystery'"):
        Program(model, "Mystery")
    with pytest.raises(ValueError, match=r"needs only the model; AutoNormalizingFlow needs more. Pass AutoNormaliz"):
        Program(model, "AutoNormalizingFlow")
    assert isinstance(Program(model).guide, autoguide.AutoNormal)


def test_a_guide_of_the_data_is_a_row_per_datum() -> None:
    """The model's latent variables all lie in the data plate, so that its evidence is per datum."""

    def inside(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    x = torch.from_numpy(X[:, :1])
    exact = dist.Normal(0.0, math.hypot(1, 0.5)).log_prob(x[:, 0])
    for name, shape in (("AutoNormal", N), ("AutoNormalMessenger", N), ("AutoDiagonalNormal", 1)):
        program = Program(inside, name)
        fit(program, x, **OPTIONS)
        evidence = log_evidence(program, x, 200)
        assert evidence.elbo.shape == (shape,)
        assert float(evidence.elbo.sum()) == pytest.approx(float(exact.sum()), abs=0.5)


def test_parameters_of_a_model_that_is_a_module_train_beside_a_named_guide() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, y: Tensor, scale: float) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 0.1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(m + self.shift, scale), obs=y)

    module = Shifted()
    fit(Program(module, static={"scale": 1.0}), {"y": np.full(20, 3.0)}, **OPTIONS)
    assert float(module.shift.detach()) == pytest.approx(3.0, abs=0.15)
