from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from families.cases import gaussian_moments, linear_pair, near_start
from torch.distributions import kl_divergence

from ppl_vae import VAE, Conditional
from ppl_vae.evaluation.gap import inference_gap
from ppl_vae.families import FullNormal, LowRankNormal
from ppl_vae.families.exact_normal import linear_gaussian
from ppl_vae.families.family import unconstrained
from ppl_vae.networks import Table


def _reaching(loc: Any, covariance: Any) -> Any:
    """A low-rank normal of full rank with this mean and covariance."""
    values, vectors = np.linalg.eigh(covariance)
    least = values[0] / 2
    columns = vectors * np.sqrt(values / least - 1)
    raw = unconstrained(torch.full((len(loc),), least**0.5))
    return LowRankNormal(len(loc), rank=len(loc)).distribution(
        torch.cat([torch.tensor(loc), raw, torch.tensor(columns).flatten()])
    )


def test_with_as_many_columns_as_entries_it_reaches_every_normal() -> None:
    generator = np.random.default_rng(0)
    root, loc, x = generator.normal(size=(4, 4)), generator.normal(size=4), generator.normal(size=(6, 4))
    covariance = root @ root.T + 0.01 * np.eye(4)
    d = _reaching(loc, covariance)
    np.testing.assert_allclose(d.covariance_matrix, covariance, rtol=1e-10, atol=1e-12)
    truth = scipy.stats.multivariate_normal(loc, covariance)
    np.testing.assert_allclose(d.log_prob(torch.tensor(x)), truth.logpdf(x), rtol=1e-9)
    full = FullNormal(4).nearest(torch.tensor(loc)[None], torch.tensor(np.linalg.inv(covariance))[None])
    other = FullNormal(4).distribution(full["parameters"][0])
    assert abs(kl_divergence(d, other).item()) < 1e-9
    assert abs(kl_divergence(other, d).item()) < 1e-9


def test_large_events_need_no_large_matrix() -> None:
    family = LowRankNormal(300, rank=3)
    raw, x = near_start(family), torch.randn(300)
    loc, covariance = gaussian_moments(family, raw.numpy())
    expected = scipy.stats.multivariate_normal(loc, covariance).logpdf(x.numpy())
    d: Any = family.distribution(raw)
    assert d.log_prob(x).item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(d.variance, np.diag(covariance), rtol=1e-10)


def test_it_starts_at_the_data() -> None:
    x = torch.randn(500, 3) * torch.tensor([0.1, 1.0, 10.0]) + 5
    family = LowRankNormal(3)
    d: Any = family.distribution(family.fit_start(x))
    torch.testing.assert_close(d.mean, x.mean(0))
    ratio = d.stddev / x.std(0, correction=0)
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio < 1.1).all()
    assert 0 < (d.covariance_matrix - torch.diag(d.variance)).abs().max()  # or its columns would have no gradient


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`rank` to be a whole number, at least 1; got 0"):
        LowRankNormal(3, rank=0)


def test_a_guide_of_full_rank_loses_nothing_on_a_linear_gaussian_pair() -> None:
    """An independent normal loses half of log (product of the precision's diagonal / its determinant)."""
    prior, likelihood = linear_pair(2, 4, scale=0.4)
    likelihood.network.weight.data.copy_(torch.tensor([[1.0, 0.8], [0.5, 0.6], [1.0, 1.0], [-0.3, 0.1]]))
    x = 2 * torch.randn(3, 4)
    precision = linear_gaussian(prior, likelihood, torch.zeros(0)).posterior(x).precision_matrix[0].detach()
    lost = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    assert lost > 0.1
    vae = VAE(prior, likelihood, Conditional(LowRankNormal(2, rank=2), Table(3)))
    gap = inference_gap(vae, {"x": x, "index": torch.arange(3)}, draws=500, steps=300)
    assert (gap.approximation.abs() < 4 * gap.approximation_error + 0.02).all()
    assert (gap.approximation < lost / 4).all()
