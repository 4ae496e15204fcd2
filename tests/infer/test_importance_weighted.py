"""Importance-weighted and Renyi bounds: gradients by quadrature, exact guides, signal to noise, and what is refused."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, autoguide
from torch import nn
from twins import draws, linear_vae

from ppl_vae import VAE, Conditional, Program, Target, exact_log_evidence, fit
from ppl_vae._seeds import fork_rng
from ppl_vae.families import Flow, FullNormal, MixtureNormal, Normal, StandardNormal, VampPrior
from ppl_vae.infer.gradients import Gradients
from ppl_vae.infer.importance_weighted import ImportanceWeighted, constant
from ppl_vae.networks import MLP, Linear
from ppl_vae.programs.param_store import own_params, scope
from ppl_vae.programs.sites import structure
from ppl_vae.programs.traces import Given, drawn_sites, log_density, trace_pair

ROWS = 30_000  # each with parameters of its own, so that each has a gradient of its own
BATCH = {"x": torch.full((ROWS, 1), 1.2, dtype=torch.float64)}


def rows(value):
    return torch.full((ROWS,), value, dtype=torch.float64)


class OneLevel(nn.Module):
    """z ~ N(c, 1), x | z ~ N(w z, 0.8^2); the guide N(m + c, e^r): c is shared by both."""

    def __init__(self, m=0.3, r=None, c=0.0, w=1.5):
        super().__init__()
        for name, value in {"m": m, "r": math.log(0.6) if r is None else r, "c": c, "w": w}.items():
            setattr(self, name, nn.Parameter(rows(value)))

    def model(self, x):
        pyro.module(f"one_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.c, 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 0.8), obs=x[:, 0])

    def guide(self, x):
        pyro.module(f"one_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.m + self.c, self.r.exp()))

    @staticmethod
    def log_weight(noise, m, r, c, w):
        """The weight at draws of one standard normal each, in plain torch."""
        z = m + c + r.exp() * noise[0]
        log = normal(z, c, 1.0) + normal(1.2, w * z, 0.8)
        return log - normal(z, m + c, r.exp())


class TwoLevels(nn.Module):
    """t ~ N(0, 1), z | t ~ N(t, 1), x | z ~ N(z, 1); the guide goes down: t ~ N(m, e^r), z | t ~ N(a t + b, e^s)."""

    def __init__(self, m=0.2, r=-0.2, a=0.9, b=0.6, s=-0.4):
        super().__init__()
        for name, value in {"m": m, "r": r, "a": a, "b": b, "s": s}.items():
            setattr(self, name, nn.Parameter(rows(value)))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            t = pyro.sample("t", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))
            z = pyro.sample("z", dist.Normal(t, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(self, x):
        pyro.module(f"two_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            t = pyro.sample("t", dist.Normal(self.m, self.r.exp()))
            pyro.sample("z", dist.Normal(self.a * t + self.b, self.s.exp()))

    @staticmethod
    def log_weight(noise, m, r, a, b, s):
        t = m + r.exp() * noise[0]
        z = a * t + b + s.exp() * noise[1]
        log = normal(t, 0.0, 1.0) + normal(z, t, 1.0) + normal(1.2, z, 1.0)
        return log - normal(t, m, r.exp()) - normal(z, a * t + b, s.exp())


def normal(x, loc, scale):
    scale = torch.as_tensor(scale)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def bare():
    """The program of one level by `pyro.param`, as two functions."""

    def values():
        start = {"m": 0.3, "c": 0.0, "w": 1.5}
        found = [pyro.param(name, lambda value=value: rows(value)) for name, value in start.items()]
        positive = dist.constraints.positive
        return [*found, pyro.param("scale", lambda: rows(0.6), constraint=positive)]

    def model(x):
        _, c, w, _ = values()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(w * z, 0.8), obs=x[:, 0])

    def guide(x):
        m, c, _, scale = values()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(m + c, scale))

    return Program(model, guide)


def quadrature(kind, particles, alpha, sites, nodes):
    """Gradient of E[L] at the program's parameters by a product of Gauss-Hermite rules."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(points), torch.tensor(weights / weights.sum())
    grid = torch.cartesian_prod(*[points] * (particles * sites)).reshape(-1, particles, sites)
    mass = torch.cartesian_prod(*[weights] * (particles * sites)).reshape(len(grid), -1).prod(1)
    values = {name: value[0].detach().clone().requires_grad_() for name, value in kind().named_parameters()}
    logs = kind.log_weight(grid.unbind(-1), **values)  # (nodes^(K sites), K)
    power = 1 - alpha
    bound = (mass * (power * logs).logsumexp(1)).sum() / power
    return dict(zip(values, torch.autograd.grad(bound, [*values.values()]), strict=True))


def gradients(program, batch, seed=0, learned=None, objective=ImportanceWeighted, **options):
    """Gradients of the bound, each row's of its own."""
    learned = [*program.parameters()] if learned is None else learned
    made = objective(STRUCTURE, learned, **options)
    with scope(program, training=True), fork_rng(seed, device=torch.device("cpu")):
        loss, found = Gradients(program, made, learned, capture="off")(batch)
    return loss, [-one * len(batch["x"]) for one in found]


def flat():
    """The structure of programs with sites in the plate of data alone."""
    vae = VAE(Conditional(StandardNormal(1)), Conditional(Normal(1), Linear()), Conditional(Normal(1), Linear()))
    return structure(vae, {"x": torch.zeros(2, 1)})


STRUCTURE = flat()


def deviations(found, truth):
    """By how many standard errors the mean of each row's gradient is off."""
    return {
        name: float((one.mean() - truth[name]) / (one.std() / math.sqrt(len(one)) + 1e-12))
        for name, one in found.items()
    }


@pytest.mark.parametrize(("particles", "alpha"), [(2, 0.0), (3, 0.0), (2, 0.5), (2, -0.5)])
def test_gradients_are_those_of_the_expected_bound(particles, alpha):
    nodes = {2: (80, 120), 3: (40, 48)}[particles]
    truth, again = (quadrature(OneLevel, particles, alpha, 1, number) for number in nodes)
    assert all(abs(truth[name] - again[name]) < 1e-3 for name in truth)
    assert min(map(abs, truth.values())) > 0.005
    program, off = OneLevel(), {}
    for gradient in ("plain", "dreg", "stl"):
        found = gradients(program, BATCH, particles=particles, alpha=alpha, gradient=gradient)[1]
        off[gradient] = deviations(dict(zip(truth, found, strict=True)), truth)
    assert all(abs(each) < 5 for each in (*off["plain"].values(), *off["dreg"].values()))
    assert abs(off["stl"]["m"]) > 20  # biased for several particles
    assert abs(off["stl"]["w"]) < 5  # the model's gradient is not


def test_the_bias_of_stl_in_figures():
    found = gradients(OneLevel(), BATCH, particles=2, gradient="stl")[1]
    truth = quadrature(OneLevel, 2, 0.0, 1, 40)
    assert [float(truth[name]) for name in ("m", "r")] == pytest.approx([0.621, -0.096], abs=5e-4)
    known = {"m": torch.tensor(1.136), "r": torch.tensor(-0.256)}
    assert all(abs(off) < 5 for off in deviations(dict(zip("mr", found[:2], strict=True)), known).values())


def test_parameters_by_pyro_param_and_the_stl_of_one_particle():
    program = bare()
    truth = quadrature(OneLevel, 2, 0.0, 1, 40)
    single = quadrature(OneLevel, 1, 0.0, 1, 40)
    with scope(program):
        program.guide(**BATCH)
    own = own_params(program)["params"]
    names = ["m", "c", "w"]
    for known, options in (
        (truth, {"particles": 2, "gradient": "dreg"}),
        (single, {"particles": 1, "gradient": "stl"}),
    ):
        found = gradients(program, BATCH, learned=[own[name] for name in names], **options)[1]
        assert all(abs(off) < 5 for off in deviations(dict(zip(names, found, strict=True)), known).values())


class OnSites(ImportanceWeighted):
    """As one might first write it: a factor on the gradient of each draw itself, not of a copy."""

    def score(self, program, batch, drawn, factors):
        sites = drawn_sites(drawn)
        for site in sites.values():
            site["value"].register_hook(lambda grad: grad * factors[0])
        again = Given({name: site["value"] for name, site in sites.items()})(self.plate(program.guide))
        with constant(self.learned):
            again = poutine.trace(again).get_trace(**batch)
            return again, log_density(again, self.particles, ROWS)


class Detached(ImportanceWeighted):
    """As one might write it second: copies are scored under distributions that are constant altogether."""

    def score(self, program, batch, drawn, factors):
        drawn = drawn.copy()
        for name, site in drawn_sites(drawn).items():
            fn = site["fn"]
            copy = site["value"].view_as(site["value"])
            copy.register_hook(lambda grad: grad * factors[0])
            drawn.nodes[name] = {**site, "value": copy, "fn": dist.Normal(fn.loc.detach(), fn.scale.detach())}
        return drawn, log_density(drawn, self.particles, ROWS)


def test_a_guide_of_two_levels():
    truth = quadrature(TwoLevels, 2, 0.0, 2, 20)
    again = quadrature(TwoLevels, 2, 0.0, 2, 24)
    assert all(abs(truth[name] - again[name]) < 1e-3 for name in truth)
    program, off = TwoLevels(), {}
    for gradient, kind in (("plain", ImportanceWeighted), ("dreg", ImportanceWeighted), ("dreg", OnSites)):
        found = gradients(program, BATCH, particles=2, gradient=gradient, objective=kind)[1]
        off[gradient, kind] = deviations(dict(zip(truth, found, strict=True)), truth)
    found = gradients(program, BATCH, particles=2, gradient="dreg", objective=Detached)[1]
    off["detached"] = deviations(dict(zip(truth, found, strict=True)), truth)
    assert all(abs(each) < 5 for each in (*off["plain", ImportanceWeighted].values(),))
    assert all(abs(each) < 5 for each in (*off["dreg", ImportanceWeighted].values(),))
    assert max(map(abs, off["dreg", OnSites].values())) > 20
    assert max(map(abs, off["detached"].values())) > 20


def exact_pair():
    """The pairs above with the exact posterior for their guide."""
    variance = 1 / (1 + 1.5**2 / 0.8**2)
    one = OneLevel(m=variance * 1.5 * 1.2 / 0.8**2, r=0.5 * math.log(variance))
    two = TwoLevels(m=0.4, r=0.5 * math.log(2 / 3), a=0.5, b=0.6, s=0.5 * math.log(0.5))
    return (one, ["m", "r"]), (two, ["m", "r", "a", "b", "s"])


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("particles", [1, 3])
def test_at_the_exact_posterior_the_gradient_of_the_guide_is_zero_in_every_draw(gradient, particles):
    for program, names in exact_pair():
        found = gradients(program, BATCH, particles=particles, gradient=gradient)[1]
        found = dict(zip([name for name, _ in program.named_parameters()], found, strict=True))
        assert max(float(found[name].abs().max()) for name in names) < 1e-10
        if "w" in found:
            assert found["w"].abs().min() > 0
        noisy = gradients(program, BATCH, particles=particles)[1][0]
        assert abs(noisy.mean()) < 5 * noisy.std() / math.sqrt(ROWS)
        assert noisy.std() > 0.1


def test_signal_to_noise_falls_with_the_draws_for_plain_and_rises_for_dreg():
    ratio = {}
    for particles in (3, 24):
        found = {g: gradients(OneLevel(), BATCH, particles=particles, gradient=g)[1][0] for g in ("plain", "dreg")}
        signal = abs(float(found["dreg"].mean()))  # both have this mean
        ratio |= {(gradient, particles): signal / float(each.std()) for gradient, each in found.items()}
    assert 0.2 < ratio["plain", 24] / ratio["plain", 3] < 0.6  # K^-1/2 says 0.35
    assert 1.7 < ratio["dreg", 24] / ratio["dreg", 3] < 5  # K^1/2 says 2.8


# Values: per datum whatever the plates, between ELBO and evidence


def inner(x):
    """Three cells per datum, each with a latent of its own."""
    with pyro.plate("data", len(x), dim=-1), pyro.plate("cells", 3, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)


def inner_guide(x):
    slope = pyro.param("slope", lambda: torch.tensor(0.4, dtype=torch.float64))
    with pyro.plate("data", len(x), dim=-1), pyro.plate("cells", 3, dim=-2):
        pyro.sample("z", dist.Normal(slope * x.T, 0.7))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_bound_is_that_of_each_datum_and_not_of_each_cell(alpha):
    x, program = draws(7, 3) / 2, Program(inner, inner_guide)
    target = Target(program, x)
    objective = ImportanceWeighted(target.structure, [], 5, alpha)
    with scope(program), fork_rng(1, device=target.device):
        loss, _, bound = objective(program, target.batch)
    with scope(program), fork_rng(1, device=target.device):
        model, guide = trace_pair(program, target.batch, 5, 2)
        logs = (log_density(model, 5, 7) - log_density(guide, 5, 7)).detach().numpy()
        cells = sum(
            (s * t.nodes[n]["fn"].log_prob(t.nodes[n]["value"])).detach().numpy()  # (5, 3, 7)
            for s, t, n in ((1, model, "z"), (1, model, "x"), (-1, guide, "z"))
        )
    power = 1 - alpha
    by_hand = [math.log(np.mean(np.exp(power * logs[:, datum]))) / power for datum in range(7)]
    assert -float(loss) == pytest.approx(sum(by_hand), rel=1e-12)
    assert -float(bound) == pytest.approx(logs.mean(0).sum(), rel=1e-12)
    with scope(program), fork_rng(1, device=target.device):
        pyros = RenyiELBO(alpha=alpha, num_particles=5, vectorize_particles=True, max_plate_nesting=2)
        loss_of_cells = pyros.loss(program.model, program.guide, x=x)
    per_cell = np.log(np.exp(power * cells).mean(0)).sum() / power
    assert -loss_of_cells == pytest.approx(per_cell, rel=1e-6)
    assert abs(per_cell - sum(by_hand)) > 0.1


def test_renyi_leads_from_the_elbo_to_the_importance_weighted_bound():
    program, found = OneLevel(), {}
    for alpha in (0.0, 0.5, 0.9, 1 - 1e-7):
        with scope(program), fork_rng(1, device=torch.device("cpu")), torch.no_grad():
            loss, _, bound = ImportanceWeighted(STRUCTURE, [], 4, alpha)(program, BATCH)
        found[alpha] = -float(loss) / ROWS
    evidence = normal(torch.tensor(1.2), 0.0, math.sqrt(1.5**2 + 0.8**2))
    assert -float(bound) / ROWS == pytest.approx(found[1 - 1e-7], abs=1e-5)
    assert found[1 - 1e-7] < found[0.9] < found[0.5] < found[0.0] < float(evidence)
    x, start = draws(50, 3), linear_vae(FullNormal(2), Normal(3, scale="feature"))
    start.posterior = Conditional(Normal(2), Linear(), context=(3,)).double()
    options = {"particles": 4, "epochs": 1, "seed": 3}
    history = fit(copy.deepcopy(start), x, elbo="Renyi", alpha=0.0, **options)
    other = fit(copy.deepcopy(start), x, elbo="ImportanceWeighted", **options)
    assert history.objective == other.objective
    assert history.elbo == other.elbo
    assert history.elbo[0] < history.objective[0] - 0.05


def test_an_exact_guide_has_the_evidence_for_its_bound():
    vae, x = linear_vae(FullNormal(2), Normal(3, scale="feature")), draws(9, 3)
    options = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-30, "validation": x}
    history = fit(vae, x, elbo="ImportanceWeighted", particles=3, gradient="dreg", **options)
    truth = float(exact_log_evidence(vae, x).mean())
    for values in (history.elbo, history.objective, history.validation, history.validation_objective):
        assert values == pytest.approx([truth], rel=1e-12)


# Parameters that model and guide share, and guides of other kinds


def mean_gradients(program, x, learned=None, rounds=60, **options):
    """Gradients by draws that are apart, (rounds, p)."""
    target = Target(program, x)
    with scope(program), fork_rng(0, device=target.device):
        objective = ImportanceWeighted(target.structure, own(program) if learned is None else learned, **options)
    with scope(program, training=True), fork_rng(1, device=target.device):
        calls = Gradients(program, objective, objective.learned, whole=target.structure.whole, capture="off")
        found = [calls(target.batch)[1] for _ in range(rounds)]
    return torch.stack([torch.cat([one.flatten() for one in each if one is not None]) for each in found])


def own(program):
    return [*program.parameters(), *own_params(program)["params"].values()]


def vae_of(prior, posterior, network=None):
    torch.manual_seed(0)
    guide = Conditional(posterior, MLP(hidden=[4]) if network is None else network, context=(3,))
    prior = Conditional(VampPrior(2, guide, components=3)) if prior is None else prior
    return VAE(prior, Conditional(Normal(3, scale="shared"), Linear()), guide).double()


SHARED = {  # of model and guide, or by a network
    "vamp prior": lambda: vae_of(None, Normal(2)),
    "exact guide": lambda: linear_vae(FullNormal(2), Normal(3, scale="feature")),
    "mixture": lambda: vae_of(Conditional(StandardNormal(2)), MixtureNormal(2, components=2)),
    "inverse flow": lambda: vae_of(
        Conditional(StandardNormal(2)), Flow(2, kind="inverse-autoregressive", transforms=1, hidden=[4])
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_estimators_agree_where_parameters_are_shared(name):
    program, x = SHARED[name](), draws(1, 3).expand(100, 3)
    plain = mean_gradients(program, x, particles=3, rounds=20)
    found = mean_gradients(program, x, particles=3, gradient="dreg", rounds=20)
    error = ((plain.var(0) + found.var(0)) / 20).sqrt()
    assert ((plain.mean(0) - found.mean(0)).abs() <= 5 * error + 1e-9).all()
    assert (plain.mean(0).abs() > 5 * error).sum() > 3  # gradients of zero would prove little


def test_an_autoguide_of_a_data_set_that_is_one_datum():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    x = draws(8, 1)
    guide = autoguide.AutoNormal(model)
    program = Program(model, guide)
    fit(program, x, epochs=1, batch_size=8)
    with torch.no_grad():
        guide.locs.mean.fill_(float(x.sum() / 9))
        guide.scales.mean_unconstrained.data = (
            dist.constraints.positive and torch.tensor(1 / 3.0).expm1().log().double()
        )
    plain = mean_gradients(program, x, particles=3, rounds=20)
    assert plain.std(0).min() > 0.1
    for gradient in ("stl", "dreg"):
        assert mean_gradients(program, x, particles=3, gradient=gradient, rounds=5).abs().max() < 1e-6


# What is refused


def coin(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", lambda: torch.tensor(0.2)) * x[:, 0]))


def tossed(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def hidden(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def moved(x):
    """A point that is a learned function of an auxiliary draw."""
    scale = pyro.param("scale", lambda: torch.tensor(1.0))
    with pyro.plate("data", len(x), dim=-1):
        u = pyro.sample("u", dist.Normal(x[:, 0], 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(scale * u, log_density=-scale.abs().log()))


def dropout():
    return vae_of(Conditional(StandardNormal(2)), Normal(2), MLP(hidden=[8], dropout=0.5)).float()


def one_way():
    """A guide of a flow whose inverse is not known."""
    flow = dist.transforms.planar(1)

    def guide(x):
        pyro.module(f"planar_{id(flow)}", flow)
        with pyro.plate("data", len(x), dim=-1):
            z = dist.TransformedDistribution(dist.Normal(x[:, :1], 1.0).to_event(1), [flow])
            pyro.sample("z", z)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])

    return Program(model, guide)


REFUSED = {
    "discrete": (lambda: Program(tossed, coin), "reparameterised sites in the guide for gradient = \"dreg\"; got 'z'"),
    "dropout": (dropout, 'its density is another one each time, as with dropout.*gradient = "plain"'),
    "point": (lambda: Program(hidden, moved), "the place of its point 'z' is learned"),
    "no inverse": (one_way, "scored at given draws.*has no inverse"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_guides_that_cannot_be_scored_again_are_refused(name):
    make, message = REFUSED[name]
    program = make()
    x = torch.randn(6, 3 if name == "dropout" else 1)
    with pytest.raises(ValueError, match=message):
        fit(program, x, elbo="ImportanceWeighted", particles=2, gradient="dreg", epochs=1)
    if name != "discrete":
        assert math.isfinite(fit(program, x, elbo="ImportanceWeighted", particles=2, epochs=1).objective[0])


def test_points_and_parts_are_refused():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="weights of several draws.*'mean', a point"):
        fit(Program(model, autoguide.AutoDelta(model)), torch.randn(6, 1), elbo="ImportanceWeighted", batch_size=6)
