"""The closest normal against closed forms of quadratics, and against a fine grid for a density that is bent."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_vae.evaluation.best_member import Members
from ppl_vae.families import FullNormal, MixtureNormal, Normal
from ppl_vae.infer.closest_normal import closest_normal, design, polish

CPU = torch.device("cpu")


def quadratic(loc: Tensor, precision: Tensor) -> Any:
    def of(rows: Tensor) -> Any:
        def density(z: Tensor) -> tuple[Tensor, Tensor]:
            bent = torch.einsum("nij,knj->kni", precision[rows], z - loc[rows])
            return -0.5 * (bent * (z - loc[rows])).sum(-1), -bent

        return density

    return of


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_averages_of_cubics_over_the_design_are_exact(size: int) -> None:
    u = design(size, 64, CPU)
    assert len(u) >= 64
    torch.testing.assert_close(u.T @ u / len(u), torch.eye(size))
    assert u.sum(0).abs().max() < 1e-10
    assert torch.einsum("ki,kj,kl->ijl", u, u, u).abs().max() < 1e-10
    if size == 1:  # lengths are quantiles, so that other averages are near
        assert abs(u.pow(4).mean().item() - 3) < 0.3


@pytest.mark.parametrize(
    "family",
    [Normal(4), Normal(4, scale="shared"), Normal(4, scale="feature"), FullNormal(4), MixtureNormal(4, components=3)],
    ids=lambda family: f"{type(family).__name__}-{getattr(family, 'scale', '')}",
)
def test_of_a_quadratic_it_is_the_member_of_least_divergence(family: Any) -> None:
    """From far away, at scales that differ by 1e6, with correlations; its divergence has slope 0."""
    root = torch.randn(5, 4, 6) * torch.tensor([1e-3, 1.0, 30.0, 1e3]).reshape(1, 4, 1)
    precision, loc = root @ root.mT, 100 * torch.randn(5, 4)
    members = Members(family, torch.stack([family.start() for _ in range(5)]))
    density = quadratic(loc, precision)
    place = closest_normal(density, members, members.start, 5)
    place, left, widths = polish(density(torch.arange(5)), members, place)
    q = members.at(place)
    torch.testing.assert_close(q.mean, loc, rtol=1e-6, atol=1e-6)
    assert left.max() < 1e-8
    torch.testing.assert_close(widths, precision.diagonal(dim1=1, dim2=2).rsqrt(), rtol=1e-5, atol=0.0)
    each = precision.diagonal(dim1=1, dim2=2)
    if isinstance(family, FullNormal):
        torch.testing.assert_close(q.scale_tril @ q.scale_tril.mT, torch.linalg.inv(precision), rtol=1e-4, atol=1e-10)
    else:
        scale = each.mean(1, keepdim=True).expand_as(each) if getattr(family, "scale", "") == "shared" else each
        torch.testing.assert_close(q.stddev, scale.rsqrt(), rtol=1e-5, atol=0.0)


def test_of_a_bent_density_it_has_the_highest_bound() -> None:
    """log p = -exp(z) + 3 z, with averages in closed form; the start is far off on the steep side."""

    def density(_: Tensor) -> Any:
        return lambda z: ((3 * z - z.exp()).sum(-1), 3 - z.exp())

    members = Members(Normal(1), torch.tensor([[4.0, 2.0], [-3.0, 0.1]]))
    q = members.at(closest_normal(density, members, members.start, 100))
    scale = torch.linspace(0.3, 0.9, 6001)
    loc = math.log(3) - scale**2 / 2  # the best for each scale
    bound = 3 * loc - (loc + scale**2 / 2).exp() + scale.log()
    best = int(bound.argmax())
    mine = 3 * q.mean - (q.mean + q.variance / 2).exp() + q.stddev.log()
    assert (mine.flatten() > bound[best] - 1e-3).all()


def test_what_is_left_to_gain_is_told() -> None:
    precision, loc = torch.eye(2).expand(1, 2, 2), torch.zeros(1, 2)
    members = Members(Normal(2), torch.tensor([[3.0, 0.0, 0.5413, 0.5413]]))  # off by 3 standard deviations
    _, left, _ = polish(quadratic(loc, precision)(torch.arange(1)), members, members.start)
    assert left.item() == pytest.approx(4.5, abs=1e-3)
