"""Class evidence against quadratic and linear discriminant analysis, and what its errors are worth."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from torch import Tensor
from twins import array, class_oracle, given_vae, perturbed

from ppl_vae import VAE, log_evidence
from ppl_vae.evaluation import ClassEvidence, class_evidence

PRIOR = [0.2, 0.5, 0.3]


def data(vae: VAE, n: int = 60, seed: int = 1) -> dict[str, Tensor]:
    y = torch.arange(n) % 3
    return {"x": vae.sample(n, given=y, seed=seed), "y": y}


def marginals(vae: VAE) -> list[tuple[Any, Any]]:
    """Mean and covariance of x in each class."""
    oracles = [class_oracle(vae, label) for label in range(3)]
    return [(o.weight @ o.loc + o.bias, o.weight @ o.covariance @ o.weight.T + np.diag(o.noise)) for o in oracles]


def truth(vae: VAE, x: Tensor) -> tuple[Any, Any]:
    """Log p(x|y) and p(y|x), (n, 3), by scipy."""
    evidence = np.stack([multivariate_normal(*pair).logpdf(array(x)) for pair in marginals(vae)], 1)
    joint = evidence + np.log(PRIOR)
    return evidence, np.exp(joint - logsumexp(joint, 1, keepdims=True))


def test_is_quadratic_discriminant_analysis_under_the_exact_guide() -> None:
    vae = given_vae(3)
    batch = data(vae)
    found = class_evidence(vae, batch["x"], 3, class_prior=PRIOR)
    evidence, posterior = truth(vae, batch["x"])
    assert np.abs(array(found.log_evidence) - evidence).max() < 1e-10
    assert np.abs(array(found.probability) - posterior).max() < 1e-10
    assert bool(found.settled.all())
    assert not bool((found.uncertain | found.open | found.outlier).any())
    sklearn, pairs = QuadraticDiscriminantAnalysis(), marginals(vae)
    sklearn.classes_, sklearn.priors_ = np.arange(3), np.array(PRIOR)
    sklearn.means_ = np.stack([mean for mean, _ in pairs])
    values, vectors = zip(*(np.linalg.eigh(covariance) for _, covariance in pairs), strict=True)
    sklearn.scalings_, sklearn.rotations_, sklearn.n_features_in_ = list(values), list(vectors), 5
    assert np.abs(sklearn.predict_proba(array(batch["x"])) - array(found.probability)).max() < 1e-10


def test_is_linear_discriminant_analysis_where_classes_share_their_covariance() -> None:
    vae: Any = given_vae(3)
    with torch.no_grad():
        vae.prior.network.weight[2:] = 0.0  # the class moves the prior's mean alone
    pairs, x = marginals(vae), data(vae)["x"]
    means, covariance = np.stack([mean for mean, _ in pairs]), pairs[0][1]
    slopes = np.linalg.solve(covariance, means.T).T
    sklearn = LinearDiscriminantAnalysis()
    sklearn.classes_, sklearn.coef_, sklearn.n_features_in_ = np.arange(3), slopes, 5
    sklearn.intercept_ = np.log(PRIOR) - 0.5 * (slopes * means).sum(1)
    found = class_evidence(vae, x, 3, class_prior=PRIOR)
    assert np.abs(sklearn.predict_proba(array(x)) - array(found.probability)).max() < 1e-10


@pytest.mark.parametrize("broken", [False, True])
def test_errors_of_the_probability_cover(broken: bool) -> None:
    vae = given_vae(3)
    batch = data(vae, 150)
    wide = perturbed(vae, 1.25, 0.1)  # weights with a variance, of noise that is known to be there
    found = class_evidence(wide, batch, 200, classes=3, class_prior=[1, 1, 1] if broken else PRIOR)
    _, posterior = truth(vae, batch["x"])
    some = (posterior > 0.02) & (posterior < 0.98)
    score = ((array(found.probability) - posterior) / array(found.error))[some]
    assert len(score) > 30
    assert (np.abs(score).max() < 5) != broken
    assert (0.6 < np.square(score).mean() < 1.5) != broken


def test_costs_one_evidence_for_each_class() -> None:
    vae, calls = given_vae(10), []
    model = vae.model
    vae.model = lambda x, y: (calls.append(len(x)), model(x, y=y))[1]  # type: ignore[method-assign, assignment]
    batch = {"x": vae.sample(130, given=0), "y": torch.zeros(130, dtype=torch.long)}
    log_evidence(vae, batch, 120)
    calls.clear()
    log_evidence(vae, batch, 120)
    one = sum(calls)
    calls.clear()
    class_evidence(vae, batch, 120)
    assert 10 * one <= sum(calls) <= 10.5 * one


def test_says_where_classes_cannot_be_told_apart_and_where_a_rival_is_unknown() -> None:
    vae: Any = given_vae(3)
    batch, wide = data(vae, 30), perturbed(vae, 1.25, 0.1)
    equal = class_evidence(wide, {**batch, "x": batch["x"]}, 100, classes=3)
    with torch.no_grad():
        vae.prior.network.weight[:, 1] = vae.prior.network.weight[:, 0]
        vae.likelihood.network.weight[:, 3] = vae.likelihood.network.weight[:, 2]
    twins = class_evidence(wide, batch, 100, classes=3)
    pair = twins.best < 2
    assert bool(pair.any())
    assert bool(twins.uncertain[pair].double().mean() > 0.8)  # 5 % of the intervals miss 0
    assert float(equal.uncertain.double().mean()) < 0.3
    narrow = class_evidence(perturbed(vae, 0.4, 1.0), batch, 100, classes=3)
    assert not bool(narrow.settled.any())
    assert bool((narrow.uncertain | narrow.open).all())


def test_settled_evidence_covers_for_guides_of_any_width() -> None:
    """The share of data with evidence that counts as an estimate, but lies too low, stays near that of its interval."""
    generator = torch.Generator().manual_seed(0)
    vae = given_vae(3)
    for factor in (0.3, 0.5, 0.7, 0.9, 1.2):
        for shift in (0.0, 1.0, 3.0):
            batch = {"x": vae.sample(70, given=0, seed=int(torch.randint(1000, (), generator=generator)))}
            found = class_evidence(perturbed(vae, factor, shift), batch, 200, classes=3)
            evidence, _ = truth(vae, batch["x"])
            low = array(found.log_evidence - 2 * found.bias + 1.96 * found.mc_se) < evidence
            wrong = (low & found.settled.numpy()).mean()
            assert wrong < 0.025 + 0.06, (factor, shift, wrong)


def test_outliers_are_as_rare_as_was_said() -> None:
    vae = given_vae(3)
    known, new = data(vae, 297), data(vae, 900, seed=2)
    found = class_evidence(vae, new, 1, known=known, level=0.05)
    share = float((found.log_evidence.gather(1, new["y"][:, None])[:, 0] < found.floor[new["y"]]).double().mean())
    assert abs(share - 0.05) < 5 * math.sqrt(0.05 * 0.95 / 900 + 3 * 0.05 * 0.95 / 297 / 3)
    assert float(found.outlier.double().mean()) <= share
    far = class_evidence(vae, new["x"] + 50, 1, known=known)
    assert bool(far.outlier.all())
    assert bool((far.prediction == -1).all())
    assert far.summary(new["y"])["accuracy"] is None
    assert not bool(class_evidence(vae, new["x"] + 50, 1).outlier.any())


def test_frequencies_and_summary_count_what_is_there() -> None:
    vae = given_vae(3)
    known = {"x": vae.sample(10, given=0), "y": torch.tensor([0] * 5 + [1] * 4 + [2])}
    batch = data(vae)
    found = class_evidence(vae, batch, 1, class_prior="frequencies", known=known)
    assert torch.allclose(found.log_prior.exp(), torch.tensor([0.5, 0.4, 0.1]).double())
    labels = batch["y"].clone()
    labels[:6] = -1
    told, p = found.summary(labels), array(found.probability)[6:]
    kept = ~array(found.outlier).astype(bool)[6:]
    right = (p.argmax(1) == array(labels)[6:])[kept]
    assert told["n"] + told["outliers"] == 54
    assert told["accuracy"] == pytest.approx(right.mean())
    assert told["log_score"] == pytest.approx(np.log(p[np.arange(54), labels[6:].numpy()]).mean())
    bins = np.minimum((p.max(1)[kept] * 10).astype(int), 9)
    gap = sum(abs(p.max(1)[kept][bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert told["calibration_error"] == pytest.approx(gap)
    assert [each["n"] for each in told["curve"]] == [(bins == b).sum() for b in sorted(set(bins))]


def test_error_is_the_delta_method() -> None:
    """By the gradient of the softmax, with errors of the classes that are independent."""
    value = torch.tensor([[-3.0, -2.0, -2.5]], dtype=torch.float64)
    error, zero = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    prior = torch.tensor(PRIOR, dtype=torch.float64).log()
    found = ClassEvidence(value, error, zero, zero == 0, prior, zero[0] - math.inf, 10)
    slope = torch.autograd.functional.jacobian(lambda v: (prior + v).softmax(-1), value[0])
    assert torch.allclose(found.error[0], (slope * error).norm(dim=1))
    assert bool(replace(found, settled=zero > 0).uncertain[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"class_prior": "flat"}, "one of 'frequencies', 'uniform'"),
        ({"class_prior": "frequencies"}, "Expected `known`, labelled data"),
        ({"class_prior": [0.5, 0.5]}, "uniform, frequencies or 3 probabilities"),
        ({"class_prior": [0.5, 0.7, -0.2]}, "uniform, frequencies or 3 probabilities"),
        ({"level": 0.0}, "Expected `level` to be above 0"),
    ],
)
def test_refuses_a_prior_that_does_not_fit(keys: dict[str, Any], message: str) -> None:
    vae = given_vae(3)
    with pytest.raises(ValueError, match=message):
        class_evidence(vae, data(vae, 6), 2, **keys)


def test_refuses_a_model_without_labels() -> None:
    vae = given_vae(3)
    with pytest.raises(ValueError, match="the number of its `classes`"):
        class_evidence(perturbed(vae, 1.0, 0.0), data(vae, 6), 2)
