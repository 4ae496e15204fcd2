"""Discrete latents: enumerated in model and guide, summed out exactly, against sums by hand and recursions in NumPy."""

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from scipy import special, stats
from sklearn.mixture import GaussianMixture

from ppl_vae import Program, Target, fit, log_evidence, log_weights
from ppl_vae.evaluation.arviz import to_datatree
from ppl_vae.evaluation.calibration import calibrate
from ppl_vae.evaluation.comparison import compare_posteriors
from ppl_vae.evaluation.guide_check import check_guide
from ppl_vae.evaluation.latents import rates
from ppl_vae.infer.reference import reference_posterior
from ppl_vae.programs import enumeration

PARALLEL = {"enumerate": "parallel"}
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
LOCS = torch.tensor([[-2.0, 0.5], [0.3, -1.0], [1.5, 2.0]], dtype=torch.float64)


def data(n=6, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nothing(**batch):
    """A guide without sites."""


def mixture(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), infer=PARALLEL)
        pyro.sample("x", dist.Normal(LOCS[y], 0.7).to_event(1), obs=x)


def scores(x):
    """Log density of the mixture by scipy, (n,)."""
    terms = [
        math.log(w) + stats.norm(loc, 0.7).logpdf(x.numpy()).sum(-1)
        for w, loc in zip(WEIGHTS.tolist(), LOCS.numpy(), strict=True)
    ]
    return special.logsumexp(terms, axis=0)


# programs that are all discrete have exact evidence


def test_the_weight_of_a_mixture_is_its_density():
    x = data()
    program = Program(mixture, nothing)
    weights = log_weights(program, x, 5)
    assert weights.shape == (5, 6)
    np.testing.assert_allclose(weights, np.tile(scores(x), (5, 1)), rtol=0, atol=1e-12)
    evidence = log_evidence(program, x, 30)
    assert evidence.kind == "estimate"
    assert float(evidence.mc_se.max()) == 0.0
    assert float(evidence.rate.abs().max()) < 1e-12
    assert bool(evidence.pareto_k.isnan().all())
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, nothing, x=x)
    assert float(evidence.elbo.sum()) == pytest.approx(-loss, abs=1e-10)
    structure = Target(program, x).structure
    assert (structure.latents, structure.enumerated, structure.enumerated_by_guide) == ((), ("y",), ())
    assert "exact" in str(check_guide(program, x, samples=30))


def test_the_density_of_a_mixture_is_that_of_scikit_learn():
    x = data(60)
    known = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x.numpy())
    weights, means, scales = (torch.as_tensor(a) for a in (known.weights_, known.means_, known.covariances_**0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer=PARALLEL)
            pyro.sample("x", dist.Normal(means[y], scales[y]).to_event(1), obs=x)

    np.testing.assert_allclose(
        log_weights(Program(model, nothing), x, 1)[0], known.score_samples(x.numpy()), atol=1e-10
    )


def test_a_dropped_sum_would_show(monkeypatch):
    """The oracle above fails if only one value of a site counts, or if the sum is taken without its probabilities."""
    x = data()
    target = Target(Program(mixture, nothing), x)
    target.structure  # noqa: B018
    plain = enumeration.packed.pack
    for broken in (
        lambda value, dims: plain(value[:1] if value.dim() > 2 else value, dims),
        lambda value, dims: plain(value if value.shape[1:] != (1, 6) else 0 * value, dims),
    ):
        monkeypatch.setattr(enumeration.packed, "pack", broken)
        wrong = log_weights(target, samples=1)[0]
        assert float((wrong - torch.as_tensor(scores(x))).abs().max()) > 0.1


def chain(x):
    """Hidden Markov model as in Pyro's examples: a chain of T states for each datum."""
    with pyro.plate("data", len(x)):
        state = 0
        for t in pyro.markov(range(x.shape[1])):
            state = pyro.sample(f"y_{t}", dist.Categorical(Vindex(MOVES)[state]), infer=PARALLEL)
            pyro.sample(f"x_{t}", dist.Normal(LOCS[state, 0], 0.6), obs=x[:, t])


MOVES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)


def forward(x):
    """Log density of chains (n, T) by the forward recursion."""
    seen = np.stack([stats.norm(loc, 0.6).logpdf(x) for loc in LOCS[:, 0].numpy()], -1)
    alpha = np.log(MOVES[0].numpy()) + seen[:, 0]
    for t in range(1, x.shape[1]):
        alpha = special.logsumexp(alpha[:, :, None] + np.log(MOVES.numpy()), axis=1) + seen[:, t]
    return special.logsumexp(alpha, axis=1)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_chains_have_the_density_of_the_forward_recursion(steps):
    x = torch.randn(5, steps, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = log_weights(Program(chain, nothing), x, 3)
    np.testing.assert_allclose(weights, np.tile(forward(x.numpy()), (3, 1)), rtol=0, atol=1e-10)


def test_chains_of_several_lengths_are_masked():
    """Masked states keep their law, which sums to one."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = torch.tensor([2, 6, 4])

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            state = 0
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=lengths > t):
                    state = pyro.sample(f"y_{t}", dist.Categorical(Vindex(MOVES)[state]), infer=PARALLEL)
                    pyro.sample(f"x_{t}", dist.Normal(LOCS[state, 0], 0.6), obs=x[:, t])

    weights = log_weights(Program(model, nothing), {"x": x, "lengths": lengths}, 2)
    truth = [forward(row[None, :length].numpy())[0] for row, length in zip(x, lengths.tolist(), strict=True)]
    np.testing.assert_allclose(weights, np.tile(truth, (2, 1)), rtol=0, atol=1e-10)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, nothing, x=x, lengths=lengths)
    assert -loss == pytest.approx(sum(truth), abs=1e-10)


def test_plates_within_the_data_plate():
    """Words of a document: a topic for each, and one theme of the document, both enumerated."""
    generator = torch.Generator().manual_seed(3)
    topics = torch.rand(2, 3, generator=generator, dtype=torch.float64).softmax(-1)
    words = torch.rand(3, 4, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    x = torch.randint(4, (5, 7), generator=generator)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            theme = pyro.sample("theme", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)), infer=PARALLEL).long()
            with pyro.plate("words", x.shape[1], dim=-2):
                topic = pyro.sample("topic", dist.Categorical(topics[theme]), infer=PARALLEL)
                pyro.sample("x", dist.Categorical(words[topic]), obs=x.T)

    each = (topics @ words)[:, x].log().sum(-1)  # (theme, n)
    truth = (each + torch.tensor([[0.7], [0.3]], dtype=torch.float64).log()).logsumexp(0)
    torch.testing.assert_close(log_weights(Program(model, nothing), x, 2), truth.expand(2, -1), rtol=0, atol=1e-10)


# continuous latents beside enumerated ones


def mixed(x):
    """A class y, a latent z given y, data given both: a small mixture VAE."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(LOCS[y, 0], 0.5))
        pyro.sample("x", dist.Normal(z[..., None] * LOCS[y], 0.7).to_event(1), obs=x)


def logits(x):
    return torch.stack([x[:, 0], x[:, 1], 0.5 + 0 * x[:, 0]], -1)


def by_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x[:, 0], 1.2))


def drawn(x, how=None):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=logits(x)), infer={"enumerate": how} if how else {})
        pyro.sample("z", dist.Normal(0.3 * x[:, 0] + 0.5 * LOCS[y, 0], 0.9))


def by_guide(x):
    drawn(x, "parallel")


def in_turn(x):
    drawn(x, "sequential")


GUIDES = {"model": by_model, "guide": by_guide, "sequential": in_turn, "drawn": drawn}


def integrals(x):
    """Log evidence and posterior mean of z, by the trapezoid rule in NumPy."""
    z = np.linspace(-8, 8, 2001)[:, None, None]
    locs, data = LOCS.numpy(), x.numpy()[:, None, :]
    density = 0.0
    for w, loc in zip(WEIGHTS.tolist(), locs, strict=True):
        prior = np.exp(-0.5 * ((z[:, 0] - loc[0]) / 0.5) ** 2) / (0.5 * math.sqrt(2 * math.pi))
        density += (
            w * prior * (np.exp(-0.5 * ((data[:, 0] - z * loc) / 0.7) ** 2) / (0.7 * math.sqrt(2 * math.pi))).prod(-1)
        )
    total = density.sum(0) * 16 / 2000
    return torch.as_tensor(np.log(total)), torch.as_tensor((density * z[:, 0]).sum(0) / density.sum(0))


@pytest.mark.parametrize("how", GUIDES)
def test_model_guide_and_draws_agree_with_quadrature(how):
    x = data()
    truth, mean = integrals(x)
    target = Target(Program(mixed, GUIDES[how]), x)
    assert target.structure.enumerated == (("y",) if how in ("model", "guide") else ())
    assert target.structure.enumerated_by_guide == (("y",) if how == "guide" else ())
    checked = check_guide(target, samples=4000)
    evidence = checked.evidence
    assert bool(((evidence.log_evidence - evidence.bias - truth).abs() < 5 * evidence.mc_se).all())
    assert evidence.kind == "estimate"
    assert float((checked.sites["z"].reweighted_loc - mean).abs().max()) < 0.1
    if how != "drawn":
        objective = TraceEnum_ELBO(max_plate_nesting=1, num_particles=4000, vectorize_particles=True)
        loss = objective.loss(mixed, GUIDES[how], x=x)
        error = 5 * math.sqrt(2) * float(evidence.elbo_mc_se.norm())
        assert float(evidence.elbo.sum()) == pytest.approx(-loss, abs=error)


def test_a_guide_that_enumerates_needs_no_probabilities_of_its_own():
    """The weights do not change with q(y|x), and their draws of z are for each value; drawn classes need it."""
    x = data()

    def guide(x, shift=0.0, infer=PARALLEL):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits(x) + shift), infer=infer)
            precision = 4 + (LOCS[y] ** 2).sum(-1) / 0.49
            loc = (4 * LOCS[y, 0] + (LOCS[y] * x).sum(-1) / 0.49) / precision
            pyro.sample("z", dist.Normal(loc, precision**-0.5))  # the exact p(z|x, y)

    far = torch.tensor([30.0, 0.0, 0.0], dtype=torch.float64)
    truth = integrals(x)[0]
    for shift in (0.0, far):
        weights = log_weights(Program(mixed, lambda x, shift=shift: guide(x, shift)), x, 3)
        torch.testing.assert_close(weights, truth.expand(3, -1), rtol=0, atol=1e-10)
    missed = log_evidence(Program(mixed, lambda x: guide(x, far, {})), x, 1000)
    assert float((truth - missed.log_evidence).max()) > 1.0  # by draws, mass of two classes is missed


@pytest.mark.parametrize("how", ["model", "guide"])
def test_references_work_on_the_continuous_rest(how):
    x = data(2)
    truth, mean = integrals(x)
    target = Target(Program(mixed, GUIDES[how]), x)
    exact = reference_posterior(target)
    assert exact.method == "quadrature"  # and no closed form, though all is Gaussian given y
    torch.testing.assert_close(exact.log_evidence, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(exact.loc[:, 0], mean, rtol=0, atol=1e-7)
    if how == "guide":
        annealed = reference_posterior(target, method="ais", chains=8, temperatures=4)
        assert bool(((annealed.log_evidence - truth).abs() < 5 * annealed.error + 1e-3).all())
    else:
        compared = compare_posteriors(target, reference=exact, draws=500)
        bound = (truth - compared.gap).sum()
        assert (
            abs(float(bound - log_evidence(target, samples=2000).elbo.sum())) < 5 * float(compared.error.norm()) + 0.1
        )


def test_nothing_underflows_where_factors_disagree_by_thousands_of_nats():
    """Two observations that favour different classes by 1e4 nats each; Pyro's contraction loses the sum."""
    x = data(4)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("a", dist.Normal(1.0 * y, 0.005), obs=0 * x[:, 0])
            pyro.sample("b", dist.Normal(1.0 * y, 0.005), obs=2 + 0 * x[:, 0])

    terms = [
        math.log(w) + stats.norm(y, 0.005).logpdf(0) + stats.norm(y, 0.005).logpdf(2)
        for y, w in enumerate(WEIGHTS.tolist())
    ]
    assert float(log_weights(Program(model, nothing), x, 1)[0, 0]) == pytest.approx(special.logsumexp(terms), rel=1e-12)


def test_moves_that_cannot_be_have_no_probability_and_finite_gradients():
    x = torch.tensor([[-2.0, 0.3, 1.5], [1.5, -2.0, 0.3]])
    ring = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).log().requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            state = 0
            for t in pyro.markov(range(3)):
                state = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(ring)[state]), infer=PARALLEL)
                pyro.sample(f"x_{t}", dist.Normal(LOCS[state, 0], 0.6), obs=x[:, t])

    target = Target(Program(model, nothing), x)
    with target.running(0):
        value = target.log_density(target.trace("model", 1, values={}), 1)[0]
    never = sum(stats.norm(-2.0, 0.6).logpdf(x.numpy()).T)  # the chain stays in its first state
    np.testing.assert_allclose(value.detach(), never, atol=1e-10)
    assert bool(torch.autograd.grad(value.sum(), ring)[0].isfinite().all())


def test_datatrees_hold_classes_and_predictions_given_the_data():
    """y ~ p(y|x): the draws of the classes, and of x given them, have the moments of the posterior."""
    x = data(4)
    tree = to_datatree(Program(mixture, nothing), x, draws=400)
    groups = {name: getattr(tree, name) for name in ("posterior", "posterior_predictive", "log_likelihood")}
    y, again = (groups[name][site].values[0] for name, site in (("posterior", "y"), ("posterior_predictive", "x")))
    shares = (WEIGHTS.log() + dist.Normal(LOCS, 0.7).to_event(1).log_prob(x[:, None])).softmax(-1).numpy()
    found = np.stack([(y == k).mean(0) for k in range(3)], -1)
    assert np.abs(found - shares).max() < 5 * 0.5 / 400**0.5
    assert np.abs(again.mean(0) - shares @ LOCS.numpy()).max() < 5 * 2.2 / 400**0.5
    np.testing.assert_allclose(groups["log_likelihood"]["x"].values[0, 0], scores(x), rtol=1e-5)
    with pytest.raises(ValueError, match="sums over 'y'"):
        rates(Program(mixed, by_model), x)


# where the whole data set counts as one datum


def test_a_bayesian_mixture_has_the_evidence_of_all_assignments():
    """Beta-binomial mixture: p of the two coins and the share are latent; 2^6 assignments summed by hand."""
    x = torch.tensor([7.0, 1.0, 8.0, 2.0, 9.0, 5.0], dtype=torch.float64)
    m = 10

    def model(x):
        share = pyro.sample("share", dist.Beta(x.new_tensor(2.0), 2.0))
        p = pyro.sample("p", dist.Beta(x.new_tensor([1.0, 3.0]), x.new_tensor([2.0, 1.0])).to_event(1))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Bernoulli(share), infer=PARALLEL).long()
            pyro.sample("x", dist.Binomial(m, Vindex(p)[..., y]), obs=x)

    def guide(x):
        pyro.sample("share", dist.Beta(x.new_tensor(3.0), 3.0))
        pyro.sample("p", dist.Beta(x.new_tensor([2.0, 6.0]), x.new_tensor([6.0, 2.0])).to_event(1))

    terms = []
    for y in itertools.product([0, 1], repeat=6):
        y = np.array(y)
        term = special.betaln(2 + y.sum(), 2 + 6 - y.sum()) - special.betaln(2, 2)
        for c, (a, b) in enumerate([(1, 2), (3, 1)]):
            k, n = x.numpy()[y == c].sum(), m * (y == c).sum()
            term += special.betaln(a + k, b + n - k) - special.betaln(a, b)
        terms.append(term + np.log(special.comb(m, x.numpy())).sum())
    truth = special.logsumexp(terms)
    target = Target(Program(model, guide, data_plate=None), {"x": x})
    assert target.structure.whole
    assert target.structure.enumerated == ("y",)
    evidence = log_evidence(target, samples=4000)
    assert abs(float(evidence.log_evidence - evidence.bias) - truth) < 5 * float(evidence.mc_se) < 0.3
    share, p = torch.tensor([0.3]), torch.tensor([[0.2, 0.8]])
    terms = dist.Binomial(m, p).log_prob(x[:, None]) + torch.stack([1 - share, share], -1).log()
    prior = (
        dist.Beta(2.0, 2.0).log_prob(share)
        + dist.Beta(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])).log_prob(p).sum()
    )
    joint = target.score_sites("model", {"share": share[:, None], "p": p[:, None]})
    torch.testing.assert_close(joint[0], prior + terms.logsumexp(-1).sum(), rtol=0, atol=1e-10)


# Pyro's traps, and what is refused


def half_seen(infer=None):
    def model(x, y, seen):
        with pyro.plate("data", len(x)):
            given = pyro.sample("y", dist.Categorical(WEIGHTS), obs=y, obs_mask=seen, infer=infer or {})
            pyro.sample("x", dist.Normal(LOCS[given], 0.7).to_event(1), obs=x)

    return model


def test_missing_classes_are_summed_out_under_config_enumerate():
    x, y, seen = data(), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([True, False] * 3)
    batch = {"x": x, "y": y, "seen": seen}
    weights = log_weights(Program(config_enumerate(half_seen()), nothing), batch, 2)
    known = WEIGHTS[y].log() + dist.Normal(LOCS[y], 0.7).to_event(1).log_prob(x)
    torch.testing.assert_close(weights, torch.where(seen, known, torch.as_tensor(scores(x))).expand(2, -1))
    with pytest.raises(ValueError, match=r"'y_unobserved', the missing values of 'y'.*config_enumerate\(model\)"):
        log_weights(Program(half_seen(PARALLEL), nothing), batch, 2)


def test_what_cannot_be_enumerated_is_refused_by_name():
    x = data()

    def model(x, infer, law):
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, infer=infer)
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    for infer, law, message in [
        ({"enumerate": "sequential"}, dist.Categorical(WEIGHTS), "'y', which the guide lacks.*got 'sequential'"),
        ({"enumerate": "parallel", "num_samples": 3}, dist.Normal(0.0, 1.0), "'y'.*got 'parallel', num_samples"),
        (PARALLEL, dist.Poisson(2.0), "finitely many values to enumerate; got 'y', a Poisson"),
        ({}, dist.Categorical(WEIGHTS), r"same latent sites; only the model has \['y'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            log_weights(Program(lambda x, i=infer, law=law: model(x, i, law), nothing), x, 1)

    def branches(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), infer=PARALLEL)
            scale = 2.0 if (y.reshape(-1)[-1:] > 0.5).all() and y.dim() > 1 else 1.0
            table = LOCS[y.long()] if y.dim() < 4 else None
            pyro.sample("x", dist.Normal(table[..., :2] + y.new_zeros(len(x), 2), scale).to_event(1), obs=x[:, :2])
            if y.shape[-1:] != (len(x),):
                raise ValueError("wants a value for each datum")

    with pytest.raises(ValueError, match="values of y side by side.*wants a value for each datum"):
        log_weights(Program(branches, nothing), x, 1)
    with pytest.raises(ValueError, match="that are not enumerated; got y, so that log_evidence"):
        reference_posterior(Program(mixture, nothing), x)


def test_objectives_are_refused_where_the_bound_would_be_wrong():
    x = data()

    def learned(x):
        pyro.param("learned", lambda: torch.zeros(1))
        mixture(x)

    with pytest.raises(ValueError, match="elbo = 'TraceEnum_ELBO' for a model that enumerates 'y'"):
        fit(Program(learned, nothing), x, epochs=1)

    def plain(x):
        pyro.param("learned", lambda: torch.zeros(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand(z.shape + (2,)).to_event(1), obs=x)

    with pytest.raises(ValueError, match="discrete latent sites to enumerate for TraceEnum_ELBO; got none"):
        fit(Program(plain, by_model), x, elbo="TraceEnum_ELBO", epochs=1)


# training


def test_fit_trains_by_the_loss_of_pyro():
    x = data(40)

    class Both:
        def model(self, x):
            locs = pyro.param("locs", lambda: LOCS.clone())
            weights = pyro.param("weights", lambda: WEIGHTS.clone(), constraint=dist.constraints.simplex)
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(weights), infer=PARALLEL)
                pyro.sample("x", dist.Normal(locs[y], 0.7).to_event(1), obs=x)

        def guide(self, x):
            """All is summed out."""

    program = Both()
    before = float(log_weights(program, x, 1).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = fit(program, x, elbo="TraceEnum_ELBO", epochs=40, learning_rate=0.08, particles=2)
    assert history.elbo[0] == pytest.approx(before, abs=1e-10)  # the first step's, before it moves
    after = log_weights(program, x, 1)
    assert float(after.mean()) > before + 0.1
    optimum = GaussianMixture(3, covariance_type="spherical", random_state=0, n_init=5).fit(x.numpy())
    assert float(after.mean()) < optimum.score(x.numpy()) + 0.1
    assert len(pyro.get_param_store()) == 0


# programs as in Pyro's examples and tutorials, in small


def test_a_mixture_with_global_parameters_trains_to_a_point_and_has_evidence_under_a_spread():
    x = torch.tensor([[-2.1], [-1.9], [-2.0], [2.2], [1.8], [2.0]])

    @config_enumerate
    def model(x):
        shares = pyro.sample("shares", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(locs[pyro.sample("y", dist.Categorical(shares))], scale), obs=x[:, 0])

    options = {"elbo": "TraceEnum_ELBO", "epochs": 60, "learning_rate": 0.1, "progress": False}
    point = Program(model, "AutoDelta", data_plate=None)
    history = fit(point, x, **options)
    assert history.elbo[-1] > history.elbo[0]
    with pytest.raises(ValueError, match="a point"):
        log_evidence(point, x, 10)
    spread = Program(model, "AutoNormal", data_plate=None)
    fit(spread, x, particles=4, **options)
    target = Target(spread, x)
    assert (target.structure.latents, target.structure.enumerated) == (("shares", "scale", "locs"), ("y",))
    assert target.structure.sequential  # locs[y] takes no particles

    @config_enumerate
    def with_events(x):
        shares = pyro.sample("shares", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Categorical(shares))
            pyro.sample("x", dist.Normal(Vindex(locs)[..., y], scale), obs=x[:, 0])

    other = Target(Program(with_events, "AutoNormal", data_plate=None), x)
    assert not other.structure.sequential
    values = {"shares": torch.tensor([[0.3, 0.7]]), "scale": torch.tensor([0.5]), "locs": torch.tensor([[-2.0, 2.0]])}
    terms = dist.Normal(values["locs"][0], 0.5).log_prob(x) + values["shares"][0].log()
    truth = terms.logsumexp(-1).sum() + dist.Dirichlet(0.5 * torch.ones(2)).log_prob(values["shares"][0])
    truth += dist.Normal(0.0, 10.0).log_prob(values["locs"]).sum() + dist.LogNormal(0.0, 2.0).log_prob(
        torch.tensor(0.5)
    )
    wide = {"shares": values["shares"][:, None], "scale": values["scale"][:, None], "locs": values["locs"]}
    assert float(target.score_sites("model", values)) == pytest.approx(float(truth), abs=1e-10)
    assert float(other.score_sites("model", wide)) == pytest.approx(float(truth), abs=1e-10)
    assert bool(log_evidence(target, samples=20).log_evidence.isfinite())
    tree = to_datatree(target, draws=3)
    assert tree.posterior["y"].shape == (1, 3, 6)


def test_notes_of_tunes_with_global_chances():
    """Tunes of several lengths, tones in a plate of their own at dim -1, and chances of states and tones as globals."""
    tunes = (torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    lengths = torch.tensor([4, 2, 3])

    @config_enumerate
    def model(tunes, lengths):
        moves = pyro.sample("moves", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        tones = pyro.sample("tones", dist.Beta(torch.tensor([0.1, 2.0]), 0.9).expand([2, 2]).to_event(2))
        each = pyro.plate("each_tone", 2, dim=-1)
        with pyro.plate("tunes", len(tunes), dim=-2):
            state = 0
            for t in pyro.markov(range(tunes.shape[1])):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(moves)[..., state, :]))
                    with each:
                        chance = Vindex(tones)[..., state, torch.arange(2)]
                        pyro.sample(f"tone_{t}", dist.Bernoulli(chance), obs=tunes[:, t])

    program = Program(model, "AutoNormal", data_plate=None)
    batch = {"tunes": tunes, "lengths": lengths}
    fit(program, batch, elbo="TraceEnum_ELBO", epochs=2, progress=False)
    target = Target(program, batch)
    assert target.structure.enumerated == tuple(f"state_{t}" for t in range(4))
    moves, tones = torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([[0.2, 0.6], [0.9, 0.3]])
    truth = dist.Dirichlet(0.9 * torch.eye(2) + 0.1).log_prob(moves).sum()
    truth += dist.Beta(torch.tensor([0.1, 2.0]), 0.9).log_prob(tones).sum()
    for tune, length in zip(tunes, lengths.tolist(), strict=True):
        paths = []
        for path in itertools.product([0, 1], repeat=length):
            steps = [moves[a, b] for a, b in itertools.pairwise((0, *path))]
            seen = [dist.Bernoulli(tones[state]).log_prob(row).sum() for state, row in zip(path, tune, strict=False)]
            paths.append(torch.stack([*(step.log() for step in steps), *seen]).sum())
        truth += torch.stack(paths).logsumexp(0)
    joint = target.score_sites("model", {"moves": moves[None, None, None], "tones": tones[None, None, None]})
    assert float(joint) == pytest.approx(float(truth), abs=1e-10)
    assert log_weights(target, samples=3).isfinite().all()


def test_a_guide_in_parallel_is_calibrated_if_it_is_exact():
    """q(y|x) and q(z|x, y) exact: the draws of z are those of the posterior, and the ranks of the truth are uniform."""

    def guide(x, wide=1.0):
        covariance = 0.25 * LOCS[:, :, None] * LOCS[:, None, :] + 0.49 * torch.eye(2)
        law = dist.MultivariateNormal(LOCS[:, :1] * LOCS, covariance)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=WEIGHTS.log() + law.log_prob(x[:, None])), infer=PARALLEL)
            precision = 4 + (LOCS[y] ** 2).sum(-1) / 0.49
            loc = (4 * LOCS[y, 0] + (LOCS[y] * x).sum(-1) / 0.49) / precision
            pyro.sample("z", dist.Normal(loc, wide * precision**-0.5))

    x = data(50)
    assert calibrate(Program(mixed, guide), x, simulations=100, draws=19).verdict == "no fault found"
    wrong = Program(mixed, lambda x: guide(x, 0.3))
    assert calibrate(wrong, x, simulations=100, draws=19).verdict == "miscalibrated"


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_are_summed_to_the_last_digit(seed):
    """Two sites, plates inside, chances that differ by hundreds of nats, classes that cannot be: against all values."""
    draw = torch.Generator().manual_seed(seed)
    k, m = 2 + seed % 3, 3

    def logits(*shape):
        values = 10 ** (4 * torch.rand((), generator=draw)) * torch.randn(*shape, generator=draw)
        return torch.where(torch.rand(shape, generator=draw) < 0.1, -math.inf, values).log_softmax(-1)

    first, second, chance = logits(k), logits(k, k), logits(k, 4)
    x = torch.randint(4, (5, m), generator=draw)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(logits=first), infer=PARALLEL)
            with pyro.plate("inner", m, dim=-2):
                b = pyro.sample("b", dist.Categorical(logits=second[a]), infer=PARALLEL)
                pyro.sample("x", dist.Categorical(logits=chance[b]), obs=x.T)

    each = (second[:, None, None] + chance[:, x].permute(1, 2, 0)).logsumexp(-1)  # (a, n, m)
    truth = (first[:, None] + each.sum(-1)).logsumexp(0)
    torch.testing.assert_close(log_weights(Program(model, nothing), x, 2), truth.expand(2, -1), rtol=1e-12, atol=1e-10)
