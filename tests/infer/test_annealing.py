"""Annealed importance sampling: its weights, its moves, its sandwich, against closed forms."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor
from twins import TWINS, array, draws, randomise, single

from ppl_vae import PPCA, VAE, Conditional, Program, exact_log_evidence
from ppl_vae._seeds import fork_rng
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer import annealing
from ppl_vae.infer.annealing import Annealing, anneal, annealed_importance, bidirectional, inverse_temperatures
from ppl_vae.infer.hmc import HMC, Path
from ppl_vae.networks import MLP
from ppl_vae.programs.joint import Joint
from ppl_vae.programs.traces import check_batch

CPU = torch.device("cpu")
SOME = pytest.mark.parametrize("twin", ["one_by_one", "masked", "two_level", "inner_plate", "state_space"])


NOISE, X = 0.1, 2.0
EXACT = float(stats.norm(0, math.sqrt(1 + NOISE)).logpdf(X))


def known() -> Path:
    """The pair of check A24: z ~ N(0, 1), x = 2 with variance 0.1."""
    program = single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, NOISE**0.5), dist.Normal(0.0, 1.0))
    return Path(Joint(program, {"x": torch.full((1, 1), X)}))


def tempered(beta: float) -> tuple[float, float]:
    """Mean and variance of the density at `beta`."""
    precision = 1 + beta / NOISE
    return beta * X / NOISE / precision, 1 / precision


def expected(betas: list[float], ends: int) -> float:
    """Mean of the log weight under perfect moves: up with `ends` = 0, down with 1."""
    total = 0.0
    for a, b in zip(betas, betas[1:], strict=False):
        mean, variance = tempered((a, b)[ends])
        total += (b - a) * (-0.5 * math.log(2 * math.pi * NOISE) - ((X - mean) ** 2 + variance) / (2 * NOISE))
    return total


def perfect(path: Path) -> Any:
    def move(state: Any, beta: float, number: int) -> Any:
        mean, variance = tempered(beta)
        return path.at(mean + variance**0.5 * torch.randn_like(state.u))

    return move


@pytest.mark.parametrize(
    ("steps", "lower", "upper"),
    [
        (1, -24.76764599, -0.38748070),
        (10, -4.33166558, -1.89364905),
        (100, -2.91041329, -2.66661163),
        (1000, -2.79700296, -2.77262280),
        (10_000, -2.78599482, -2.78355681),
    ],
)
def test_the_ladder_gives_the_published_bounds_of_perfect_moves(steps, lower, upper):
    betas = inverse_temperatures(steps, "linear")
    assert expected(betas, 0) == pytest.approx(lower, abs=1e-7)
    assert expected(betas, 1) == pytest.approx(upper, abs=1e-7)
    assert expected(betas, 1) - expected(betas, 0) == pytest.approx(24.38016529 / steps, abs=1e-7)


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_perfect_moves_give_weights_of_known_mean_both_ways(steps, schedule):
    path, betas, k = known(), inverse_temperatures(steps, schedule), 4000
    with fork_rng(1, device=CPU):
        up, _ = anneal(path.draw(k), betas, perfect(path))
        mean, variance = tempered(1.0)
        down, _ = anneal(path.at(mean + variance**0.5 * torch.randn(k, 1, 1)), betas, perfect(path), reverse=True)
    for weights, end in ((up, 0), (down, 1)):
        assert abs(float(weights.mean()) - expected(betas, end)) < 5 * float(weights.std()) / math.sqrt(k)


def test_the_sigmoid_ladder_is_dense_at_both_ends_and_symmetric():
    betas = np.array(inverse_temperatures(100))
    assert betas[0] == 0
    assert betas[-1] == 1
    steps = np.diff(betas)
    assert (steps > 0).all()
    assert steps[0] < 0.2 * steps[50]
    np.testing.assert_allclose(steps, steps[::-1], atol=1e-12)
    np.testing.assert_allclose(betas[25], (1 / (1 + np.exp(2)) - 1 / (1 + np.exp(4))) / np.tanh(2), atol=1e-12)


@pytest.mark.parametrize("step", [0.6, 1.5])
def test_a_move_leaves_its_density_as_it_is(step):
    path, beta, k = known(), 0.37, 20_000
    mean, variance = tempered(beta)
    move = HMC(path, torch.full((1, 1), variance**0.5), torch.full((1, 1), step), 3)
    with fork_rng(2, device=CPU):
        state = path.at(mean + variance**0.5 * torch.randn(k, 1, 1))
        begin = state.u
        for _ in range(5):
            state = move(state, beta, 0)
    scores = (state.u[:, 0, 0] - mean) / variance**0.5
    assert abs(float(scores.mean())) < 5 / math.sqrt(k)
    assert abs(float(scores.square().mean()) - 1) < 5 * math.sqrt(2 / k)
    assert abs(float(scores.pow(4).mean()) - 3) < 5 * math.sqrt(96 / k)
    assert float((state.u != begin).double().mean()) > 0.9
    assert 0.3 < float(move.rate) < (0.999 if step < 1 else 0.95)
    again = path.at(state.u)
    assert torch.equal(again.base, state.base)
    assert torch.equal(again.tilt_slope, state.tilt_slope)


def test_data_that_depend_on_placeholders_or_are_whole_numbers_are_not_simulated():
    def chained(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("a", dist.Normal(z, 0.5), obs=x[:, 0])
            pyro.sample("b", dist.Normal(z + 3 * x[:, 0], 0.5), obs=x[:, 1])

    def counting(t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(t), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(t)), 1.0))
            pyro.sample("y", dist.Poisson(t * z.exp()), obs=y)

    def guide(**batch: Tensor) -> None:
        n = len(next(iter(batch.values())))
        with pyro.plate("data", n, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(n), 1.0))

    few: dict[str, Any] = {"chains": 2, "temperatures": 2}
    with pytest.raises(ValueError, match="do not depend on the values observed"):
        bidirectional(Program(chained, guide), torch.zeros(3, 2), **few)
    exposure = torch.full((3,), 100.0)
    with pytest.raises(ValueError, match=r"floating type.*site 'y' observes torch\.int64"):
        bidirectional(Program(counting, guide), {"t": exposure, "y": torch.tensor([0, 1, 2])}, **few)
    sandwich = bidirectional(Program(counting, guide), {"t": exposure, "y": torch.tensor([0.0, 1.0, 2.0])}, **few)
    assert torch.equal(sandwich.batch["t"], exposure)


def test_no_orbit_is_a_period():
    """On a standard normal eight leapfrog steps of 2 sin(pi / 8) lead back to the start, but for their jitter."""
    normal = dist.Normal(0.0, 1.0)
    path = Path(
        Joint(single(normal, lambda z: dist.Normal(torch.zeros_like(z), 1.0), normal), {"x": torch.zeros(1, 1)})
    )
    move = HMC(path, torch.ones(1, 1), torch.full((1, 1), 2 * math.sin(math.pi / 8)), 8)
    with fork_rng(0, device=CPU):
        before = path.draw(500)
        after = move(before, 1.0, 0)
    assert (after.u - before.u).std() > 0.3


def test_a_proposal_that_cannot_be_scored_is_refused():
    """Beyond 1 the density is NaN and the program itself complains of what is not finite."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            if not bool(z.isfinite().all()):
                raise AssertionError("a value that is not finite")
            pyro.sample("x", dist.Normal(torch.where(z > 1, math.nan, 1e30 * z.relu() ** 8), 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.full((len(x),), -1.0), 0.5))

    annealed = annealed_importance(Program(model, guide), torch.zeros(2, 1), temperatures=20, chains=8, start="guide")
    assert annealed.log_evidence.isfinite().all()
    assert annealed.acceptance.isfinite().all()
    assert (annealed.latents <= 1).all()


def test_with_hamiltonian_moves_the_truth_lies_between_the_bounds():
    path, betas, k = known(), inverse_temperatures(15, "linear"), 2000
    move = HMC(path, torch.ones(1, 1), torch.linspace(0.5, 0.2, 16).unsqueeze(-1), 3)
    with fork_rng(3, device=CPU):
        up, _ = anneal(path.draw(k), betas, move)
        mean, variance = tempered(1.0)
        down, _ = anneal(path.at(mean + variance**0.5 * torch.randn(k, 1, 1)), betas, move, reverse=True)
    low, high = float(up.mean()), float(down.mean())
    assert low < EXACT < high
    assert low > EXACT - 10
    for ratio in ((up - EXACT).exp(), (EXACT - down).exp()):
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(k)


@SOME
def test_evidence_and_moments_of_the_twins_are_within_their_errors(twin):
    truth = TWINS[twin]()
    annealed = annealed_importance(truth.program, truth.batch, chains=128, temperatures=40, leapfrog=5)
    exact = torch.from_numpy(truth.log_evidence)
    assert (annealed.log_evidence - exact).abs().lt(5 * annealed.error + 1e-9).all()
    assert (annealed.error < 0.5).all()
    assert (annealed.acceptance - 0.65).abs().max() < 0.12
    loc, covariance = annealed.moments()
    spread = torch.from_numpy(truth.covariance).diagonal(dim1=-2, dim2=-1).sqrt()
    tolerance = 5 * spread / annealed.ess.sqrt().unsqueeze(-1)
    assert (loc - torch.from_numpy(truth.loc)).abs().lt(tolerance).all()
    exact = torch.from_numpy(truth.covariance)
    variance = spread.square().unsqueeze(-1) * spread.square().unsqueeze(-2) + exact.square()  # of a product, Gaussian
    assert (covariance - exact).abs().lt(5 * (1.5 * variance / annealed.ess[:, None, None]).sqrt()).all()


@pytest.mark.parametrize("twin", ["two_level", "masked"])
def test_from_an_exact_guide_every_weight_is_the_evidence(twin):
    truth = TWINS[twin]()
    annealed = annealed_importance(truth.program, truth.batch, chains=3, temperatures=3, leapfrog=2, start="guide")
    np.testing.assert_allclose(array(annealed.log_weights), np.broadcast_to(truth.log_evidence, (3, 6)), atol=1e-10)


def test_from_a_wrong_guide_the_evidence_is_right():
    program = single(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, NOISE**0.5), dist.Normal(1.0, 0.7))
    annealed = annealed_importance(
        program, torch.full((1, 1), X), chains=500, temperatures=20, start="guide", leapfrog=3
    )
    assert abs(float(annealed.log_evidence) - EXACT) < 5 * float(annealed.error)
    assert 1e-4 < float(annealed.error) < 0.1


def test_positive_latents_are_annealed_through_their_logarithm():
    program = single(dist.Gamma(2.0, 1.0), dist.Poisson, dist.Gamma(2.0, 1.0))
    counts = torch.tensor([[3.0], [0.0], [10.0]])
    annealed = annealed_importance(program, counts, chains=400, temperatures=30, leapfrog=5)
    truth = torch.from_numpy(stats.nbinom(2, 0.5).logpmf(counts[:, 0].numpy()))
    assert (annealed.log_evidence - truth).abs().lt(5 * annealed.error).all()
    assert (annealed.moments()[0][:, 0] - (counts[:, 0] + 2) / 2).abs().lt(0.4).all()


@pytest.mark.parametrize("twin", ["masked", "inner_plate", "two_level"])
def test_simulated_data_are_sandwiched(twin):
    truth = TWINS[twin]()
    rows = {key: value.repeat(20, *[1] * (value.dim() - 1)) for key, value in truth.batch.items()}
    sandwich = bidirectional(truth.program, rows, chains=4, temperatures=100, leapfrog=6)
    exact = exact_log_evidence(truth.program, sandwich.batch)
    for miss in (exact - sandwich.lower, sandwich.upper - exact):
        assert float(miss.mean()) > -5 * float(miss.std()) / math.sqrt(len(miss))
        assert float(miss.mean()) < 6
    assert float(sandwich.gap.mean()) > 0
    ratio = (exact - sandwich.upper).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(len(exact))


def test_more_temperatures_close_the_sandwich():
    truth = TWINS["state_space"]()
    batch = {key: value.repeat(40, *(1,) * (value.dim() - 1)) for key, value in truth.batch.items()}
    wide, tight = (
        bidirectional(truth.program, batch, chains=4, temperatures=steps, leapfrog=4).gap for steps in (1, 60)
    )
    assert wide.mean() > 5 * wide.std() / len(wide) ** 0.5
    assert wide.mean() > 5 * tight.mean().abs()
    assert tight.mean() > -5 * tight.std() / len(tight) ** 0.5


def small() -> VAE:
    likelihood, posterior = (Conditional(family, MLP(hidden=[8])) for family in (Bernoulli(12), Normal(2)))
    vae = VAE(Conditional(StandardNormal(2)), likelihood, posterior)
    randomise(vae)
    return vae.double()


def test_the_answer_follows_from_the_seed_and_nothing_is_left_behind():
    vae = small()
    x = vae.sample(4, seed=1)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    settings: dict[str, Any] = {"chains": 3, "temperatures": 5, "leapfrog": 2}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = annealed_importance(vae, x, **settings)
    sandwich = bidirectional(vae, x, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(annealed_importance(vae, x, **settings).log_weights, first.log_weights)
    assert torch.equal(bidirectional(vae, x, **settings).upper, sandwich.upper)
    assert not torch.equal(annealed_importance(vae, x, seed=1, **settings).log_weights, first.log_weights)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())
    assert len(pyro.get_param_store()) == 0
    assert first.log_weights.dtype == torch.float64
    assert not first.log_weights.requires_grad
    assert torch.distributions.Distribution._validate_args


def test_small_blocks_give_the_same_evidence_within_errors():
    truth = TWINS["masked"]()
    annealed = annealed_importance(truth.program, truth.batch, chains=70, temperatures=60, leapfrog=4, entries=2000)
    assert annealed.log_weights.shape == (70, 6)
    assert annealed.latents.shape == (70, 6, 3)
    assert (annealed.log_evidence - torch.from_numpy(truth.log_evidence)).abs().lt(5 * annealed.error + 1e-9).all()


def test_no_evaluation_holds_more_than_the_entries(monkeypatch):
    vae = small()
    x, sizes = vae.sample(8), []
    plain = Joint.log_probs

    def noted(self, u):
        sizes.append(u.shape[0] * u.shape[1] * (x.shape[1] + u.shape[2]))
        return plain(self, u)

    monkeypatch.setattr(Joint, "log_probs", noted)
    for limit in (40, 200):
        sizes.clear()
        annealed = annealed_importance(vae, x, chains=10, temperatures=1, leapfrog=1, tuning=1, entries=limit)
        assert annealed.log_weights.shape == (10, 8)
        assert limit / 4 < max(sizes) <= limit


def test_the_verdict_on_annealing_is_kept():
    """Where it says that the error can be relied on, it can, and with few temperatures it does not say so."""
    vae = PPCA.fit(torch.from_numpy(load_digits().data[:200]), 6).to_vae()
    x = torch.from_numpy(load_digits().data[200:300])
    exact = exact_log_evidence(vae, x)
    short, long = (annealed_importance(vae, x, temperatures=steps) for steps in (25, 400))
    miss = (short.log_evidence - exact) / short.error
    assert float(miss.mean()) < -1  # far below the truth by its own error
    assert not short.settled.any()
    settled = long.settled
    assert settled.double().mean() > 0.8
    miss = ((long.log_evidence - exact) / long.error)[settled]
    assert abs(float(miss.mean())) < 5 / math.sqrt(len(miss))
    low, _ = stats.binom(len(miss), 0.93).interval(0.999)  # of 16 chains: a t interval of two errors
    assert float((miss.abs() < 2).sum()) >= low
    assert not annealed_importance(vae, x[:3], chains=1, temperatures=5).settled.any()


def chains(k: int, variances: Tensor) -> Annealing:
    """Chains whose log weights have these variances, to the digit."""
    raw = torch.randn(k, len(variances), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = (raw - raw.mean(0)) / raw.std(0)
    return Annealing(raw * variances.sqrt(), raw.unsqueeze(-1), torch.ones(len(variances), dtype=torch.float64))


def test_what_has_settled_follows_from_the_variances():
    """By the 5 % quantile of chi-squared, here exactly, where the library has Wilson and Hilferty's approximation."""
    some = torch.linspace(0.5, 0.7, 50).double()
    assert chains(16, some).settled.all()
    assert not chains(16, some + 1).settled.any()  # none is picked for a small variance of its own
    settled = chains(16, torch.cat([some[:40], torch.linspace(3.5, 4.5, 10).double()])).settled
    assert settled[:45].all()
    assert not settled[45:].any()
    for k, n in ((4, 1), (16, 1), (16, 50)):
        free = (k - 1) * n
        limit = 1.2 * stats.chi2(free).ppf(0.05) / free
        assert chains(k, torch.full((n,), 0.85 * limit).double()).settled.all()
        assert not chains(k, torch.full((n,), 1.15 * limit).double()).settled.any()
    many = chains(2000, torch.full((3,), 1.5).double())
    assert many.ess.min() > 100
    assert many.settled.all()


def test_moments_are_those_of_the_weighted_chains():
    annealed = chains(40, torch.tensor([0.3, 1.0], dtype=torch.float64))
    loc, covariance = annealed.moments()
    for i in range(2):
        weights, z = np.exp(array(annealed.log_weights[:, i])), array(annealed.latents[:, i, 0])
        assert float(loc[i]) == pytest.approx(np.average(z, weights=weights))
        assert float(covariance[i]) == pytest.approx(float(np.cov(z, aweights=weights, ddof=0)))


def test_the_schedule_is_the_one_that_was_asked_for(monkeypatch):
    seen = []
    plain = annealing.anneal
    monkeypatch.setattr(annealing, "anneal", lambda state, betas, move: seen.append(betas) or plain(state, betas, move))
    vae = small()
    for schedule in ("linear", "sigmoid"):
        annealed_importance(vae, vae.sample(2), chains=2, temperatures=9, leapfrog=1, schedule=schedule, tuning=4)
        assert seen[-2:] == [inverse_temperatures(4, schedule), inverse_temperatures(9, schedule)]


def test_bounds_and_errors_of_the_sandwich_are_those_of_its_weights(monkeypatch):
    downs = []
    plain = annealing.anneal

    def noted(state: Any, betas: Any, move: Any, reverse: bool = False) -> Any:
        result = plain(state, betas, move, reverse=reverse)
        downs.extend([result[0]] if reverse else [])
        return result

    monkeypatch.setattr(annealing, "anneal", noted)
    vae = small()
    sandwich = bidirectional(vae, vae.sample(3), chains=6, temperatures=2, leapfrog=2)
    inverse = np.exp(-array(downs[0]))
    np.testing.assert_allclose(sandwich.upper, -np.log(inverse.mean(0)), atol=1e-9)
    np.testing.assert_allclose(sandwich.upper_error, inverse.std(0, ddof=1) / inverse.mean(0) / 6**0.5, rtol=1e-6)


def test_the_errors_of_the_sandwich_are_those_of_its_sides():
    truth = TWINS["ppca_vae"]()
    rows = {key: value.repeat(30, *[1] * (value.dim() - 1)) for key, value in truth.batch.items()}
    sandwich = bidirectional(truth.program, rows, chains=24, temperatures=60, leapfrog=5)
    exact = exact_log_evidence(truth.program, sandwich.batch)
    lower = (sandwich.lower - exact) / sandwich.lower_error
    assert 0.7 < float(lower.std()) < 1.4
    assert (sandwich.upper_error > 0).all()
    assert float((sandwich.upper_error / sandwich.lower_error).log().mean().abs()) < math.log(2)


def test_single_precision_programs_stay_so_and_their_weights_do_not():
    vae = small().float()
    annealed = annealed_importance(vae, vae.sample(3), chains=4, temperatures=5, leapfrog=2)
    assert annealed.log_weights.dtype == torch.float64
    assert annealed.error.isfinite().all()
    assert annealed_importance(vae, vae.sample(3), chains=1, temperatures=2).error.isnan().all()


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_replayed_path_is_the_program(start, monkeypatch):
    vae, calls = small(), []
    joint = Joint(vae, check_batch(vae, {"x": vae.sample(4)}))
    plain = Joint.log_probs
    monkeypatch.setattr(Joint, "log_probs", lambda self, u: calls.append(u) or plain(self, u))
    path = Path(joint, start)
    for number in range(8):
        u = draws(3, 4, 2, seed=number)
        calls.clear()
        with pyro.validation_enabled(False):
            state = path.at(u)
            slopes = path.slopes(u)
        v = u.clone().requires_grad_()
        prior, likelihood = plain(joint, v)
        base = prior if start == "prior" else joint.log_guide(v)
        ends = base, prior + likelihood - base
        steep = [torch.autograd.grad(end.sum(), v, retain_graph=True)[0] for end in ends]
        evaluated = state.base, state.tilt, state.base_slope, state.tilt_slope, *slopes
        for value, wanted in zip(evaluated, (*ends, *steep, *steep), strict=True):
            torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=1e-12)
    assert not calls  # the last were replayed


def test_a_program_that_looks_at_its_values_is_not_replayed(caplog):
    caplog.set_level("INFO", "ppl_vae")

    def likelihood(z: Tensor) -> Any:
        return dist.Normal(z if bool(z.mean() > 0) else -2 * z, 1.0)

    path = Path(Joint(single(dist.Normal(0.0, 1.0), likelihood, dist.Normal(0.0, 1.0)), {"x": torch.ones(1, 1)}))
    with pyro.validation_enabled(False):
        for sign in (1, 1, 1, 1, 1, 1, -1):
            state = path.at(sign * torch.ones(1, 1, 1))
    assert "step by step" in caplog.text
    assert float(state.tilt) == pytest.approx(stats.norm(2, 1).logpdf(1))


def counted() -> Program:
    return single(dist.Poisson(1.0), lambda z: dist.Normal(z, 1.0), dist.Poisson(1.0))


def computed() -> Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0].tanh())

    return Program(model, lambda x: single(dist.Normal(0.0, 1.0), None, dist.Normal(0.0, 1.0)).guide(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "posterior"}, "one of 'prior', 'guide'; got 'posterior'"),
        ({"schedule": "cosine"}, "one of 'linear', 'sigmoid'; got 'cosine'"),
        ({"temperatures": 0}, "`temperatures` to be a whole number, at least 1; got 0"),
        ({"chains": 0}, "`chains` to be a whole number, at least 1; got 0"),
        ({"temperatures": 2.5}, "`temperatures` to be a whole number, at least 1; got 2.5"),
        ({"chains": True}, "`chains` to be a whole number, at least 1; got True"),
        ({"entries": 0}, "`entries` to be a whole number, at least 1; got 0"),
        ({"tuning": 0}, "`tuning` to be a whole number, at least 1; got 0"),
        ({"leapfrog": 0}, "`leapfrog` to be a whole number, at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        annealed_importance(small(), torch.ones(2, 12), **settings)


def test_what_cannot_be_annealed_is_refused_by_name():
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="continuous latent sites.* got 'z', which is discrete"):
        annealed_importance(counted(), x)
    with pytest.raises(ValueError, match="site 'x' observes something made of them"):
        bidirectional(computed(), x)
