"""Draws of what a mask hides, given what it shows: against Gaussian conditioning in numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.special import softmax
from scipy.stats import multivariate_normal

from ppl_vae.data import Columns
from ppl_vae.families import FullNormal, LowRankNormal, Mixed, MixtureFullNormal, MixtureNormal, Normal
from ppl_vae.families.distributions import draw_hidden

SEEN = np.array([True, False, True, False, True])
X = np.array([0.7, np.nan, -0.4, np.nan, 1.1])
DRAWS = 20_000


def conditional(loc: Any, covariance: Any) -> tuple[Any, Any, float]:
    """Mean and covariance of the hidden entries, and the log density of those seen."""
    gain = np.linalg.solve(covariance[np.ix_(SEEN, SEEN)], covariance[np.ix_(SEEN, ~SEEN)]).T
    mean = loc[~SEEN] + gain @ (X[SEEN] - loc[SEEN])
    spread = covariance[np.ix_(~SEEN, ~SEEN)] - gain @ covariance[np.ix_(SEEN, ~SEEN)]
    return mean, spread, multivariate_normal(loc[SEEN], covariance[np.ix_(SEEN, SEEN)]).logpdf(X[SEEN])


def truth(d: Any) -> tuple[Any, Any]:
    """Mean and covariance of the hidden entries given the others, of a normal or a mixture of normals."""
    if not hasattr(d, "mixture_distribution") and not hasattr(d, "categorical"):
        return conditional(d.mean.numpy(), dense(d))[:2]
    logits = (d.mixture_distribution if hasattr(d, "mixture_distribution") else d.categorical).logits.numpy()
    if hasattr(d, "locs"):
        pairs = [(loc, np.diag(scale**2)) for loc, scale in zip(d.locs.numpy(), d.coord_scale.numpy(), strict=True)]
    else:
        parts = d.component_distribution
        pairs = [*zip(parts.mean.numpy(), parts.covariance_matrix.numpy(), strict=True)]
    means, spreads, scores = zip(*(conditional(*pair) for pair in pairs), strict=True)
    weights = softmax(logits + np.array(scores))
    mean = weights @ np.array(means)
    apart = np.array(means) - mean
    return mean, np.einsum("c,cij->ij", weights, np.array(spreads) + apart[:, :, None] * apart[:, None])


def dense(d: Any) -> Any:
    return d.covariance_matrix.numpy() if hasattr(d, "covariance_matrix") else np.diag(d.variance.numpy())


def holds(draws: torch.Tensor, mean: Any, covariance: Any) -> bool:
    """Whether the moments of draws are these, within five standard errors."""
    hidden = draws.numpy()[:, ~SEEN]
    apart = hidden - mean
    products = apart[:, :, None] * apart[:, None] - covariance
    return bool(
        (np.abs(apart.mean(0)) < 5 * apart.std(0) / DRAWS**0.5).all()
        and (np.abs(products.mean(0)) < 5 * products.std(0) / DRAWS**0.5).all()
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "Normal": lambda: Normal(5),
    "FullNormal": lambda: FullNormal(5),
    "LowRankNormal": lambda: LowRankNormal(5, rank=2),
    "MixtureNormal": lambda: MixtureNormal(5, components=3),
    "MixtureFullNormal": lambda: MixtureFullNormal(5, components=3),
    "Mixed": lambda: Mixed(5, Columns(5, kinds=("real",) * 5)),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_hidden_entries_are_drawn_given_the_others(family: Callable[[], Any]) -> None:
    torch.manual_seed(3)
    made = family()
    raw = torch.randn(len(made.start()))
    mask, x = torch.from_numpy(SEEN), torch.from_numpy(X)
    d = made.distribution(raw, mask).expand([DRAWS])
    draws = draw_hidden(d, x.expand(DRAWS, 5), mask.expand(DRAWS, 5))
    mean, covariance = truth(made.distribution(raw))
    assert holds(draws, mean, covariance)
    assert not holds(draws, mean, 1.2 * covariance)
    if not isinstance(made, Normal | Mixed):
        assert not holds(made.distribution(raw).sample((DRAWS,)), mean, covariance)  # the marginal of the hidden
    with pytest.raises(NotImplementedError):  # under another mask
        draw_hidden(d, x.expand(DRAWS, 5), ~mask.expand(DRAWS, 5))


def test_what_has_no_mask_of_its_entries_is_refused() -> None:
    seen = torch.from_numpy(SEEN)
    rows = dist.Normal(torch.zeros(5), 1.0).to_event(1)
    for fn in (rows, rows.mask(torch.tensor(True)), dist.Normal(torch.zeros(5), 1.0)):
        with pytest.raises(NotImplementedError):
            draw_hidden(fn, torch.zeros(5), seen)
