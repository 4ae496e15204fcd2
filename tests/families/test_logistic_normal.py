import itertools
import math
from typing import Any

import pytest
import torch
from families.cases import near_start, simplex
from torch.distributions import kl_divergence

from ppl_vae.families import LogisticNormal


def test_a_standard_normal_treats_all_shares_alike() -> None:
    family = LogisticNormal(4)
    d, x = family.distribution(family.start()), torch.tensor([0.1, 0.2, 0.3, 0.4])
    scores = [d.log_prob(x[list(order)]).item() for order in itertools.permutations(range(4))]
    assert scores == pytest.approx([scores[0]] * 24, rel=1e-12)
    torch.testing.assert_close(d.mean, torch.full((4,), 0.25), rtol=0.02, atol=0)


def test_moments_are_those_of_the_density() -> None:
    family = LogisticNormal(3)
    d: Any = family.distribution(near_start(family)).expand([2])
    points, weights = simplex(family)
    mass = weights * d.log_prob(points.unsqueeze(1)).exp()[:, 0]
    mean = mass @ points
    spread = (mass @ (points - mean).square()).sqrt()
    assert ((d.mean - mean).abs() < 0.02 * spread).all()
    torch.testing.assert_close(d.stddev, spread.expand(2, 3), rtol=0.03, atol=0)
    torch.testing.assert_close(d.mean.sum(-1), torch.ones(2))


def test_divergence_is_that_of_the_integral() -> None:
    family = LogisticNormal(3)
    q, p = family.distribution(near_start(family)), family.distribution(near_start(family))
    points, weights = simplex(family)
    log_q, log_p = q.log_prob(points), p.log_prob(points)
    expected = (weights * log_q.exp() * (log_q - log_p)).sum()
    assert kl_divergence(q, p).item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_starts_at_the_data() -> None:
    family = LogisticNormal(3)
    truth: Any = family.distribution(near_start(family))
    ours: Any = family.distribution(family.fit_start(truth.sample((20_000,))))
    assert kl_divergence(truth, ours).item() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_and_far_normals_stay_on_the_simplex(dtype: torch.dtype) -> None:
    family = LogisticNormal(5).to(dtype)
    raw = torch.full((8,), 1e4, dtype=dtype, requires_grad=True)
    d = family.distribution(raw)
    x = d.rsample((50,))
    assert family.support.check(x).all()
    assert d.log_prob(x).isfinite().all()
    assert d.log_prob(torch.eye(5, dtype=dtype)).isfinite().all()
    assert torch.autograd.grad((d.log_prob(x) + x[:, 0]).sum(), raw)[0].isfinite().all()
    assert math.isfinite(d.log_prob(x.detach().clone()).sum().item())
