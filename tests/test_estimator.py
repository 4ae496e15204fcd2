"""The estimator: scikit-learn's own checks, and scores held against the closed form."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ppl_vae import exact_log_evidence, log_evidence
from ppl_vae.estimator import VAEEstimator


@parametrize_with_checks([VAEEstimator(1, hidden=(), epochs=1, samples=5, random_state=0)])
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def fitted():
    x = StandardScaler().fit_transform(load_iris().data)
    return VAEEstimator(2, hidden=(), epochs=60, learning_rate=0.05, samples=300, random_state=0).fit(x), x


def test_scores_are_log_evidence_within_the_errors(fitted):
    vae, x = fitted
    exact = exact_log_evidence(vae.program_, torch.from_numpy(x)).numpy()
    evidence = vae.evidence(x)
    assert evidence.kind == "estimate"
    assert abs(vae.score(x) - exact.mean()) < 5 * vae.score_error(x) - evidence.bias.mean().item()
    other = log_evidence(vae.program_, torch.from_numpy(x), 300)
    assert (abs(vae.score_samples(x) - exact) < 6 * evidence.mc_se.numpy() + 6 * other.mc_se.numpy() + 1e-6).all()


def test_the_error_of_a_mean_allows_for_shared_draws(fitted):
    vae, x = fitted
    exact, means, errors = exact_log_evidence(vae.program_, torch.from_numpy(x)).mean().item(), [], []
    few = clone(vae).set_params(samples=50)
    few.__dict__.update({key: value for key, value in vars(vae).items() if key.endswith("_") or key.startswith("_")})
    for seed in range(100):
        few._seed = seed
        means.append(few.score(x))
        errors.append(few.score_error(x))
    spread, stated = np.std(means), np.sqrt(np.mean(np.square(errors)))
    assert abs(spread / stated - 1) < 5 / np.sqrt(2 * 100)
    alone = few.evidence(x).mc_se.square().sum().sqrt().item() / len(x)  # as if the rows had draws of their own
    assert spread > 2 * alone
    assert abs(np.mean(means) - exact) < 5 * spread / np.sqrt(100) + spread**2 * len(x)


def test_a_linear_one_finds_the_principal_subspace(fitted):
    vae, x = fitted
    found = vae.inverse_transform(vae.transform(x))
    pca = PCA(2).fit(x)
    best = pca.inverse_transform(pca.transform(x))
    assert ((found - x) ** 2).mean() < 1.2 * ((best - x) ** 2).mean()
    assert pca.score(x) - vae.score(x) < 0.05


def test_a_row_scores_the_same_alone(fitted):
    vae, x = fitted
    np.testing.assert_allclose(vae.score_samples(x[40:43]), vae.score_samples(x)[40:43], rtol=1e-9)


def test_it_works_in_pipelines_searches_and_folds():
    x = load_wine().data[:, :5]
    pipe = make_pipeline(StandardScaler(), VAEEstimator(1, hidden=(), epochs=3, samples=10, random_state=0))
    pipe.set_output(transform="pandas")
    assert list(pipe.fit_transform(x).columns) == ["vaeestimator0"]
    assert len(cross_val_score(pipe, x, cv=2)) == 2
    grid = {"vaeestimator__latent": [1, 2], "vaeestimator__prior": ["StandardNormal", {"family": "MixtureNormal"}]}
    search = GridSearchCV(pipe, grid, cv=2).fit(x)
    assert set(search.best_params_) == set(grid)


def test_samples_have_the_data_s_mean(fitted):
    vae, x = fitted
    drawn = vae.sample(5000)
    assert (abs(drawn.mean(0) - vae.program_.likelihood.network.bias.detach().numpy()) < 5 / np.sqrt(5000) * 1.2).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prior": "StandardNormall"}, "StandardNormal"),
        ({"posterior": "Laplace"}, "Normal or FullNormal"),
        ({"epochs": 0}, "epochs"),
        ({"latent": 0}, "latent"),
    ],
)
def test_bad_parameters_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        VAEEstimator(1, hidden=(), random_state=0).set_params(**change).fit(
            np.random.default_rng(0).normal(size=(9, 3))
        )
