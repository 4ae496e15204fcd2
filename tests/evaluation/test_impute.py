"""Imputation against Gaussian conditioning in numpy: moments, covariance, coverage; and what it refuses."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from twins import MODELS, TWINS, Array, Dense, array, dense, draws, linear_vae, perturbed

from ppl_vae import (
    VAE,
    Conditional,
    Program,
    Target,
    exact_log_evidence,
    exact_posterior,
    fit,
    impute,
    log_evidence,
    log_weights,
)
from ppl_vae.data import Columns, mask_missing
from ppl_vae.evaluation import Imputation
from ppl_vae.families import Flow, FullNormal, LowRankNormal, Mixed, Multinomial, Normal, StandardNormal
from ppl_vae.networks import MLP, Encoding, Linear
from ppl_vae.programs.program import load_program

NAN = float("nan")


def condition(mean: Array, covariance: Array, x: Array, seen: Any) -> tuple[Array, Array]:
    """Mean and covariance of the hidden entries of one row given the others."""
    gain = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, ~seen)]).T
    return (
        mean[~seen] + gain @ (x[seen] - mean[seen]),
        covariance[np.ix_(~seen, ~seen)] - gain @ covariance[np.ix_(seen, ~seen)],
    )


def agrees(found: Any, mean: Array, covariance: Array, x: Array, mask: Any) -> bool:
    """Whether the draws have the moments of Gaussian conditioning, within five of their standard errors.

    Draws resampled from k weighted ones are worth `ess` of these.
    """
    for row, here in enumerate(mask):
        if here.all():
            continue
        loc, spread = condition(mean, covariance, x[row], here)
        apart = array(found.draws[:, row]).reshape(len(found.draws), -1)[:, ~here] - loc
        error = (1 / len(found.draws) + 1 / found.evidence.ess[row].item()) ** 0.5
        products = apart[:, :, None] * apart[:, None] - spread
        size = np.sqrt(np.outer(spread.diagonal(), spread.diagonal()) + spread**2)  # sd of a product of two normals
        if (np.abs(apart.mean(0)) > 5 * error * spread.diagonal() ** 0.5).any():
            return False
        if (np.abs(products.mean(0)) > 5 * error * size).any():
            return False
    return True


def moments(oracle: Dense) -> tuple[Array, Array]:
    total = oracle.weight @ oracle.covariance @ oracle.weight.T + np.diag(oracle.noise)
    return oracle.weight @ oracle.loc + oracle.bias, total


def oracle_of(name: str) -> tuple[Any, dict[str, Tensor], Array, Array]:
    """A masked twin, its batch, and mean and covariance of x."""
    twin = TWINS[name]()
    if name != "masked_plate":
        return twin.program, twin.batch, *moments(dense(twin.program))
    generator = np.random.default_rng(5)
    w, b, s = generator.normal(size=(4, 2)), generator.normal(size=4), generator.uniform(0.4, 1.5, size=4)
    return twin.program, twin.batch, b, w @ w.T + np.diag(s**2)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("masked", 1.0), ("picture", 1.0), ("masked_plate", 1.0), ("masked", 1.4), ("masked_plate", 1.4)],
)
def test_moments_are_those_of_gaussian_conditioning(name: str, factor: float) -> None:
    program, batch, mean, covariance = oracle_of(name)
    x, mask = array(batch["x"]).reshape(6, -1), batch["mask"].flatten(1).numpy()
    given = program if factor == 1 else perturbed(program, factor, 0.2)
    found = impute(given, batch, 2500, draws=2500, seed=1)
    assert found.draws.shape == (2500, *batch["x"].shape)
    assert agrees(found, mean, covariance, x, mask)
    shown = torch.where(batch["mask"], found.draws, 0.0)
    assert torch.equal(shown, torch.where(batch["mask"], batch["x"], 0.0).expand_as(shown))
    if factor > 1:
        raw = array(found.evidence.ess)
        assert (raw < 2500 * 0.95).any()
        assert not agrees(found, mean, 1.5 * covariance, x, mask)
        return
    truth = TWINS[name]().log_evidence
    np.testing.assert_allclose(array(found.evidence.log_evidence), truth, rtol=0, atol=1e-10)
    np.testing.assert_allclose(array(exact_log_evidence(program, batch)), truth, rtol=0, atol=1e-10)
    weights = log_weights(program, batch, 7)
    np.testing.assert_allclose(array(weights), np.broadcast_to(truth, (7, 6)), rtol=0, atol=1e-10)
    assert not agrees(found, mean + 0.3 * covariance.diagonal() ** 0.5, covariance, x, mask)


def test_without_its_weights_the_guide_would_be_wrong() -> None:
    """Draws of a shifted guide, not resampled: an imputation by these fails the same test."""
    program, batch, mean, covariance = oracle_of("masked")
    x, mask = array(batch["x"]), batch["mask"].numpy()
    many = {key: value.repeat(300, 1) for key, value in batch.items()}
    for shift in (0.0, 0.5):  # one draw a row leaves nothing to resample
        alone = impute(perturbed(program, 1.0, shift), many, 1, draws=1).draws.reshape(300, 6, 7)
        found = Imputation(alone, batch["mask"], log_evidence(program, batch, 300))
        assert agrees(found, mean, covariance, x, mask) == (shift == 0)


@pytest.mark.parametrize("family", [lambda: FullNormal(4), lambda: LowRankNormal(4, rank=2)], ids=["full", "low rank"])
def test_full_covariances_are_conditioned_exactly(family: Any) -> None:
    """x | z ~ N(W z + b, C): the marginal of the observed entries, and the others given these and z."""
    likelihood = Conditional(family(), Linear(), context=2)
    vae = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(FullNormal(2), Linear())).double()
    network: Any = likelihood.network
    with torch.no_grad():
        network.weight.copy_(torch.randn_like(network.weight))
        network.weight[4:] = 0.0
        network.bias.add_(0.5 * torch.randn_like(network.bias))
    d: Any = likelihood.family.distribution(network.bias.detach())
    weight = array(network.weight[:4])
    mean, covariance = array(d.mean), weight @ weight.T + array(d.covariance_matrix)
    x, mask = draws(6, 4), draws(6, 4, seed=3) > -0.6
    mask[0], mask[1] = True, False
    batch = {"x": x.masked_fill(~mask, NAN), "mask": mask}
    pairs = zip(array(x), mask.numpy(), strict=True)
    truth = [
        multivariate_normal(mean[here], covariance[np.ix_(here, here)]).logpdf(row[here]) if here.any() else 0.0
        for row, here in pairs
    ]
    np.testing.assert_allclose(array(exact_log_evidence(vae, batch)), truth, rtol=0, atol=1e-10)
    posterior = exact_posterior(vae, batch)

    def guide(**batch: Tensor) -> None:
        with pyro.plate("data", 6, dim=-1):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=1.3 * posterior.scale_tril))

    found = impute(Program(vae.model, guide), batch, 3000, draws=3000)
    assert agrees(found, mean, covariance, array(x), mask.numpy())
    assert not agrees(found, mean, covariance + np.diag(0.3 * covariance.diagonal()), array(x), mask.numpy())


def test_intervals_cover_hidden_values_at_their_rate() -> None:
    vae = linear_vae(StandardNormal(3), Normal(7, scale="feature"))
    x = vae.sample(500, seed=3)
    mask = torch.rand(500, 7) > 0.3
    found = impute(vae, {"x": x.masked_fill(~mask, NAN), "mask": mask}, 100, draws=199, seed=4)
    low, high = found.quantile(0.05), found.quantile(0.95)
    assert bool((low < high)[~mask].all())

    def covered(low: Tensor, high: Tensor) -> float:
        """Standard errors by which the share of rows' mean coverage lies off 90 %."""
        inside = ((low < x) & (x < high)).double().where(~mask, NAN)
        each = inside.nanmean(1)[(~mask).any(1)]
        return float((each.mean() - 0.9) / (each.std() / len(each) ** 0.5))

    assert abs(covered(low, high)) < 5
    assert covered(found.mean + 0.8 * (low - found.mean), found.mean + 0.8 * (high - found.mean)) < -5


def test_what_a_result_says() -> None:
    program, batch, *_ = oracle_of("masked")
    found = impute(program, batch, 100, draws=50, seed=2)
    again = impute(Target(program, batch), samples=100, draws=50, seed=2)
    assert torch.equal(found.draws, again.draws)
    assert not torch.equal(found.draws, impute(program, batch, 100, draws=50, seed=3).draws)
    evidence = log_evidence(program, batch, 100, seed=2)
    assert torch.equal(found.evidence.log_evidence, evidence.log_evidence)
    hidden = ~batch["mask"]
    np.testing.assert_allclose(array(found.quantile(0.3)), np.quantile(array(found.draws), 0.3, axis=0), rtol=1e-12)
    np.testing.assert_allclose(array(found.mean), array(found.draws).mean(0), rtol=1e-12)
    assert (found.sd[hidden] > 0).all()
    assert (found.sd[~hidden] == 0).all()
    assert (found.error[~hidden] == 0).all()
    state = torch.get_rng_state()
    impute(program, batch, 10, draws=2)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="Expected `q` from 0 to 1; got 95"):
        found.quantile(95)


def test_blocks_of_data_and_of_draws_leave_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    program, batch, mean, covariance = oracle_of("masked")
    many = {key: value.repeat(20, 1) for key, value in batch.items()}
    found = impute(program, many, 250, draws=300)
    assert found.draws.shape == (300, 120, 7)
    for part in (slice(0, 6), slice(114, 120)):
        some = Imputation(found.draws[:, part], found.mask[part], impute(program, batch, 250, draws=2).evidence)
        assert agrees(some, mean, covariance, array(batch["x"]), batch["mask"].numpy())


def table() -> tuple[VAE, dict[str, Tensor], Columns]:
    columns = Columns(3, None, ("a", "b", "c"), ("real", "category", "count"), (0, 3, 0))
    family = Mixed(3, columns)
    x = torch.stack([torch.randn(60), torch.randint(3, (60,)).double(), torch.randint(9, (60,)).double()], 1)
    mask = torch.rand(60, 3) > 0.2
    mask[:, 0] |= ~mask.any(1)
    encoding = Encoding(["standardise", "one-hot", "log1p"], [0, 3, 0], indicators=[0, 1, 2])
    parts = Conditional(family, MLP(hidden=[8])), Conditional(Normal(2), MLP(hidden=[8]), encoding=encoding)
    return VAE(Conditional(StandardNormal(2)), *parts), {"x": x.masked_fill(~mask, NAN), "mask": mask}, columns


def test_mixed_columns_stay_in_their_supports() -> None:
    vae, batch, columns = table()
    vae.initialise(batch)
    history = fit(vae, batch, epochs=3, batch_size=20)
    assert np.isfinite(history.elbo).all()
    for dtype in (torch.float64, torch.float32):
        found = impute(vae.to(dtype), batch, 60, draws=40)
        assert found.draws.dtype == dtype
        assert bool(vae.likelihood.family.support.check(found.draws).all())
        assert set(found.draws[..., 1].unique().tolist()) == {0.0, 1.0, 2.0}
    best = found.completed(columns)
    counts = torch.stack([(found.draws[..., 1] == code).sum(0) for code in range(3)])
    assert torch.equal(counts.gather(0, best[None, :, 1].long())[0], counts.amax(0))
    assert torch.equal(best[:, 0], found.mean[:, 0])


class Stranger(nn.Module):
    """A masked program of one's own, by the argument how."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def model(self, x: Tensor, mask: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)).unsqueeze(-1)
            pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)
            likelihood = dist.Normal(z + torch.arange(3.0), 0.5)
            x = torch.where(mask, x, 0.0)
            if self.how == "by entry":
                pyro.sample("x", likelihood.mask(mask).to_event(1), obs=x)
            if self.how == "by site":
                for j in range(3):
                    with pyro.poutine.mask(mask=mask[:, j]):
                        pyro.sample(f"x{j}", dist.Normal(z[..., 0] + j, 0.5), obs=x[:, j])
            if self.how == "unmasked":
                pyro.sample("x", likelihood.to_event(1), obs=x)
            if self.how == "transformed":
                pyro.sample("x", likelihood.mask(mask).to_event(1), obs=2 * x)

    def guide(self, x: Tensor, mask: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


@pytest.mark.parametrize("how", ["by entry", "by site"])
def test_programs_of_ones_own(how: str) -> None:
    x = torch.tensor([[1.0, NAN, 3.0], [NAN, 0.5, NAN], [NAN, NAN, NAN]])
    batch = {**mask_missing(x), "y": torch.tensor([0, 1, 2])}
    found = impute(Stranger(how), batch, 6000, draws=3000)
    covariance = np.ones((3, 3)) + 0.25 * np.eye(3)
    assert agrees(found, np.arange(3.0), covariance, array(x), batch["mask"].numpy())
    assert not agrees(found, np.arange(3.0), 1.4 * covariance, array(x), batch["mask"].numpy())


def no_mask(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), x.new_ones(3)).to_event(1), obs=x)


def mixture(x: Tensor, mask: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
        likelihood = dist.Normal(c.to(x).unsqueeze(-1), x.new_ones(3)).mask(mask)
        pyro.sample("x", likelihood.to_event(1), obs=torch.where(mask, x, 0.0))


def test_what_cannot_be_imputed_is_refused_by_name() -> None:
    x = torch.tensor([[1.0, NAN, 3.0], [NAN, 0.5, 1.0]])
    batch = {**mask_missing(x), "y": torch.tensor([0, 1])}
    for how, match in (
        ("unmasked", "site 'x' to be masked entry by entry"),
        ("transformed", "entry of `x` at one site"),
    ):
        with pytest.raises(ValueError, match=match):
            impute(Stranger(how), batch, 10, draws=2)
    with pytest.raises(ValueError, match="Expected latent sites that the guide draws, for imputation; got 'c'"):
        impute(Program(mixture, lambda x, mask: None), mask_missing(x), 10, draws=2)
    with pytest.raises(ValueError, match="Expected a program of independent data"):
        impute(Program(Stranger("by entry").model, Stranger("by entry").guide, data_plate=None), batch, 10, draws=2)
    program = Program(no_mask, no_mask)
    with pytest.raises(ValueError, match=r"Expected a model that takes `mask` .*; got one that takes x"):
        log_evidence(program, mask_missing(x), 10)
    with pytest.raises(ValueError, match="Expected a batch with `mask`"):
        impute(linear_vae(StandardNormal(2), Normal(3, scale=1.0)), torch.zeros(2, 3))
    for family in (Multinomial(3), Flow(3)):
        likelihood = Conditional(family, MLP(hidden=[4]))
        vae = VAE(Conditional(StandardNormal(2)), likelihood, Conditional(Normal(2), Linear()))
        with pytest.raises(ValueError, match=f"without missing entries for {type(family).__name__}"):
            impute(vae, {"x": torch.ones(2, 3), "mask": torch.eye(3)[:2].bool()}, 10, draws=2)
    with pytest.raises(ValueError, match="Expected a model that takes `mask`"):
        impute(load_program(str(MODELS / "two_level.py"))(3, 2, top=1, linear=True), mask_missing(x), 10)


def test_rows_with_nothing_observed_are_refused_by_fit_and_scored() -> None:
    vae = linear_vae(StandardNormal(2), Normal(3, scale="feature"))
    x = torch.randn(6, 3).index_fill(0, torch.tensor([2, 4]), NAN)
    with pytest.raises(ValueError, match=r"got nothing in row 2 \(counted from 0\), 2 such in all"):
        fit(vae, mask_missing(x), epochs=1)
    assert log_evidence(vae, mask_missing(x), 5).log_evidence[[2, 4]].abs().max() < 1e-12
