"""Densities on a grid: held against closed forms, conjugate pairs and brute force in numpy."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor

from ppl_vae import PPCA, VAE, Conditional, Program
from ppl_vae.families import MixtureNormal, Normal, StandardNormal
from ppl_vae.infer.density_grid import DensityGrid, guide_grid, posterior_grid
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.traces import check_batch

SHARES = (0.5, 0.95)


def joint_of(program, **batch) -> Joint:
    return Joint(program, check_batch(program, batch))


def above(grid: DensityGrid, level: Tensor) -> tuple[Tensor, Tensor]:
    """Area of the points above a level, and the standard error of counting it by points.

    A cell that the boundary crosses counts whole or not at all: an error between -1/2 and 1/2, of variance 1/12. The
    boundary crosses as many cells as lines of the grid.
    """
    inside, cell = grid.density >= level[:, None, None], (grid.mass / grid.density).nan_to_num(0.0)
    crossed = sum((inside.long().diff(dim=axis) != 0).sum((1, 2)) for axis in (1, 2))
    return torch.where(inside, cell, 0.0).sum((1, 2)), (crossed / 12).sqrt() * cell.amax((1, 2))


GUESSES = {"right": (1.0, 0.0), "wide": (100.0, 0.5), "narrow": (0.01, 0.3), "tiny and off": (1e-4, 0.5)}


@pytest.mark.parametrize(("factor", "shift"), GUESSES.values(), ids=GUESSES.keys())
def test_a_linear_gaussian_posterior_is_the_closed_forms_wherever_the_grid_begins(factor: float, shift: float) -> None:
    x = torch.tensor(load_digits().data)[:5]
    ppca = PPCA.fit(torch.tensor(load_digits().data), 2)
    turn = torch.tensor([[1.0, 0.8], [0.2, 0.9]])  # else its covariance is diagonal
    likelihood = Conditional(Normal(64, scale=ppca.scale.item()), Linear(), context=2)
    with torch.no_grad():
        likelihood.network.weight.copy_(ppca.weight @ turn)
        likelihood.network.bias.copy_(ppca.loc)
    vae = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(Normal(2), Linear()))
    weight = likelihood.network.weight.detach()
    precision = torch.eye(2) + weight.T @ weight / ppca.scale**2
    covariance = precision.inverse().expand(5, 2, 2)
    loc = (x - ppca.loc) @ weight @ covariance[0] / ppca.scale**2
    assert covariance[0, 0, 1].abs() > 0.3 * covariance[0].diagonal().prod().sqrt()
    grid = posterior_grid(joint_of(vae, x=x), loc + shift, covariance * factor)
    mean, spread = grid.moments()
    scale = covariance[0].diagonal().sqrt()
    assert float(((mean - loc) / scale).abs().max()) < 1e-5
    torch.testing.assert_close(spread, covariance, rtol=1e-4, atol=1e-8)
    marginal = torch.distributions.MultivariateNormal(ppca.loc, weight @ weight.T + ppca.scale**2 * torch.eye(64))
    torch.testing.assert_close(grid.log_mass, marginal.log_prob(x), rtol=0, atol=1e-5)
    peak = 1 / (2 * math.pi * covariance.det().sqrt())
    for share in SHARES:
        torch.testing.assert_close(grid.level(share), peak * (1 - share), rtol=0.03, atol=0)
        ellipse = -2 * math.log(1 - share) * math.pi * covariance.det().sqrt()
        for off, right in ((0.9, False), (1.0, True), (1.1, False)):
            area, error = above(grid, off * grid.level(share))
            assert (((area - ellipse).abs() < 3 * error) == right).all()


def curved(noise: float) -> Program:
    """x is z0^2 + z1 and noise: a banana, or two modes where z1 is held near 0."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.1])).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] ** 2 + z[..., 1], noise), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return Program(model, guide)


def brute(x: float, noise: float) -> tuple[np.ndarray, np.ndarray, float, list[float]]:
    """Mean, covariance, log p(x) and the areas of the regions of highest density, by 3,000 x 1,000 points."""
    z0, z1 = np.linspace(-4, 4, 3001)[:, None], np.linspace(-0.8, 0.8, 1001)
    density = np.exp(-0.5 * z0**2 - 0.5 * (z1 / 0.1) ** 2 - 0.5 * ((x - z0**2 - z1) / noise) ** 2)
    density /= (2 * np.pi) ** 1.5 * 0.1 * noise
    cell = (z0[1, 0] - z0[0, 0]) * (z1[1] - z1[0])
    evidence = density.sum() * cell
    mass = density * cell / evidence
    points = np.stack(np.broadcast_arrays(z0, z1), -1)
    mean = np.einsum("rc,rcz->z", mass, points)
    covariance = np.einsum("rc,rcy,rcz->yz", mass, points - mean, points - mean)
    inside = np.sort(mass.ravel())[::-1].cumsum()
    return mean, covariance, math.log(evidence), [cell * (np.searchsorted(inside, share) + 1) for share in SHARES]


@pytest.mark.parametrize("noise", [0.3, 0.02], ids=["joined", "apart"])
def test_curves_and_two_modes_are_those_of_brute_force(noise: float) -> None:
    values = [0.2, 1.5]
    joint = joint_of(curved(noise), x=torch.tensor(values)[:, None])
    known = [brute(x, noise) for x in values]
    covariance = torch.tensor(np.stack([one[1] for one in known]))
    grid = posterior_grid(joint, torch.tensor(np.stack([one[0] for one in known])) + 0.1, 0.5 * covariance)
    mean, spread = grid.moments()
    for index, (loc, cov, evidence, areas) in enumerate(known):
        np.testing.assert_allclose(mean[index], loc, atol=1e-4)
        np.testing.assert_allclose(spread[index], cov, rtol=1e-3, atol=1e-6)
        assert float(grid.log_mass[index]) == pytest.approx(evidence, abs=1e-4)
        for share, expected in zip(SHARES, areas, strict=True):
            assert float(above(grid, grid.level(share))[0][index]) == pytest.approx(expected, rel=0.05)
    within = (grid.points[1, ..., 0].abs() < 0.5).double()
    assert float((grid.mass[1] * within).sum()) < 1e-3  # two modes, where one ellipse of the moments has its middle


def counts(support: str) -> Program:
    """Two rates of Gamma(2, 1), each seen by a Poisson count, or chances of Beta(2, 3), each by a binomial one."""

    def prior() -> dist.Distribution:
        if support == "positive":
            return dist.Gamma(2.0 * torch.ones(2), 1.0).to_event(1)
        return dist.Beta(2.0 * torch.ones(2), 3.0).to_event(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            likelihood = dist.Poisson(z) if support == "positive" else dist.Binomial(5, z)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior())

    return Program(model, guide)


@pytest.mark.parametrize("support", ["positive", "interval"])
def test_latents_on_part_of_the_line_have_the_conjugate_density(support: str) -> None:
    x = torch.tensor([[0.0, 3.0], [5.0, 1.0]])
    a = x.numpy() + 2
    known = stats.gamma(a, scale=0.5) if support == "positive" else stats.beta(a, 5 - x.numpy() + 3)
    joint = joint_of(counts(support), x=x)
    grid = posterior_grid(joint, torch.tensor(known.mean()), torch.tensor(known.var()).diag_embed())
    points = grid.points.permute(1, 2, 0, 3).numpy()
    np.testing.assert_allclose(grid.density.permute(1, 2, 0), known.pdf(points).prod(-1), rtol=1e-4, atol=1e-4)
    mean, covariance = grid.moments()
    np.testing.assert_allclose(mean, known.mean(), rtol=1e-4)
    np.testing.assert_allclose(covariance.diagonal(dim1=1, dim2=2), known.var(), rtol=1e-3)
    one = stats.nbinom(2, 0.5) if support == "positive" else stats.betabinom(5, 2, 3)
    np.testing.assert_allclose(grid.log_mass, one.logpmf(x.numpy()).sum(1), atol=1e-4)


def test_a_mixture_guide_has_its_own_density() -> None:
    vae = VAE(
        Conditional(StandardNormal(2)),
        Conditional(Normal(4, scale=1.0), MLP(hidden=[6])),
        Conditional(MixtureNormal(2, components=3), MLP(hidden=[6])),
    )
    x = torch.randn(3, 4)
    q = vae.posterior(x)
    z = q.sample((2000,))
    covariance = torch.stack([torch.cov(one.T) for one in z.transpose(0, 1)])
    grid = guide_grid(joint_of(vae, x=x), z.mean(0), covariance)
    expected = q.log_prob(grid.points.permute(1, 2, 0, 3)).detach().exp().permute(2, 0, 1)
    torch.testing.assert_close(grid.density, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grid.log_mass, torch.zeros(3), rtol=0, atol=1e-5)


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch) -> None:
    x, sizes = torch.tensor([[0.2], [1.5]]), []
    guess = torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)
    whole = posterior_grid(joint_of(curved(0.3), x=x), *guess)
    joint = joint_of(curved(0.3), x=x.expand(2, 3000))  # of which the model takes the first
    score = joint.log_probs
    monkeypatch.setattr(joint, "log_probs", lambda u: sizes.append(len(u)) or score(u))
    parts = posterior_grid(joint, *guess)
    torch.testing.assert_close(parts.density, whole.density, rtol=1e-10, atol=1e-10)
    assert 100 < max(sizes) <= 2**22 / (2 * 3000)


def test_what_no_grid_resolves_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((z * 300).sin(), 0.01).to_event(1), obs=x)

    rough = joint_of(Program(model, curved(1.0).guide), x=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="321 by 321 points resolve"):
        posterior_grid(rough, torch.zeros(1, 2), torch.eye(2)[None])
    three = VAE(*(Conditional(StandardNormal(3)), Conditional(Normal(3), Linear()), Conditional(Normal(3), Linear())))
    with pytest.raises(ValueError, match="two latent variables, for a plane; got 3"):
        posterior_grid(joint_of(three, x=torch.zeros(1, 3)), torch.zeros(1, 3), torch.eye(3)[None])
