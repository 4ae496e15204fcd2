"""The program files in models/: short, loaded by path, trained by fit() and by stock Pyro, exact where they say so."""

import ast
import copy
import inspect
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from ppl_vae import VAE, Conditional, Target, data, exact_log_evidence, exact_posterior, fit, log_evidence, log_weights
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.networks import MLP
from ppl_vae.programs.program import load_program
from ppl_vae.programs.sites import structure

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "models").glob("*.py"))
WHOLE = ("eight_schools", "regression", "semi_supervised")  # one datum, or with labels: tested elsewhere
OBJECTIVES = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}
ENUMERATED = ("mixture", "hidden_markov", "dirichlet_allocation")
SIZES = {"features": 4, "latent": 3, "hidden": 6, "top": 2}  # sizes that a constructor may ask for


def settings():
    """Every file with every combination of its switches; a new file is in by itself."""
    cases = []
    for path in (path for path in FILES if path.stem not in WHOLE):
        signature = inspect.signature(load_program(str(path)).__init__).parameters
        switches = [name for name, parameter in signature.items() if isinstance(parameter.default, bool)]
        assert len(switches) < 2, "more than one switch: list their combinations here"
        for chosen in [{}] if not switches else [{switches[0]: False}, {switches[0]: True}]:
            cases.append(pytest.param(path, chosen, id="-".join([path.stem, *(k for k, v in chosen.items() if v)])))
    return cases


CASES = settings()
TRAINED = [
    pytest.param(*case.values, elbo, id=f"{case.id}-{elbo.__name__}")
    for case in CASES
    for elbo in ([TraceEnum_ELBO] if case.values[0].stem in ENUMERATED else OBJECTIVES.values())
]
EXACT = [case for case in CASES if any(case.values[1].values())]


def build(path, chosen, seed=0):
    cls = load_program(str(path))
    parameters = inspect.signature(cls.__init__).parameters
    torch.manual_seed(seed)
    return cls(**{name: size for name, size in SIZES.items() if name in parameters}, **chosen)


def rows(n=12):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 1


def parameters(program):
    return {name: p.detach().clone() for name, p in program.named_parameters()}


def all_moved(program, before):
    return all(not torch.equal(p, before[name]) for name, p in program.named_parameters())


def test_there_are_models():
    assert {"vae", "ppca", "two_level", "state_space"} <= {path.stem for path in FILES}
    assert {case.values[0].stem for case in EXACT} >= {"ppca", "two_level", "state_space"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_short_and_has_one_program(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 1
    methods = {node.name for node in classes[0].body if isinstance(node, ast.FunctionDef)}
    assert {"model", "guide"} <= methods
    assert ast.get_docstring(classes[0])
    assert load_program(str(path)) is load_program(f"{path}:{classes[0].name}")  # one identity


def test_no_file_is_known_to_the_library():
    """Nothing in ppl_vae imports, or names the path of, a file in models/."""
    for source in (ROOT / "ppl_vae").rglob("*.py"):
        tree = ast.parse(source.read_text())
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert not [name for name in imported if name.split(".")[0] in ("models", "inference")], source
        for path in FILES:
            assert not [text for text in strings if isinstance(text, str) and f"models/{path.name}" in text], source


@pytest.mark.parametrize(("path", "chosen", "elbo"), TRAINED)
def test_fit_moves_every_parameter(path, chosen, elbo):
    x, program = rows(), build(path, chosen)
    before = parameters(program)
    history = fit(program, x, elbo=elbo.__name__, epochs=30, batch_size=5, learning_rate=0.02, particles=2)
    assert all_moved(program, before)
    assert sum(history.elbo[-5:]) > sum(history.elbo[:5])
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(("path", "chosen", "elbo"), TRAINED)
def test_stock_svi_moves_every_parameter_of_its_own_program_only(path, chosen, elbo):
    x, program, other = rows(), build(path, chosen), build(path, chosen, seed=1)
    before, untouched = parameters(program), parameters(other)
    nesting = structure(program, {"x": x}).nesting
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.02}), elbo(max_plate_nesting=nesting))
    losses = [svi.step(x) for _ in range(60)]
    assert all_moved(program, before)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(torch.equal(p, untouched[name]) for name, p in other.named_parameters())
    second = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.02}), elbo(max_plate_nesting=nesting))
    middle = parameters(program)
    second.step(x)
    assert all_moved(other, untouched)
    assert all(torch.equal(p, middle[name]) for name, p in program.named_parameters())


@pytest.mark.parametrize(("path", "chosen"), CASES)
def test_log_weights_are_per_sample_and_datum(path, chosen):
    x, program = rows(), build(path, chosen)
    weights = log_weights(program, x, 7)
    assert weights.shape == (7, 12)
    assert weights.isfinite().all()
    assert weights.dtype == torch.float64
    one_by_one = torch.stack([log_evidence(program, row[None], 2000).log_evidence[0] for row in x[:3]])
    together = log_evidence(program, x[:3], 2000)
    error = 5 * together.mc_se * 2**0.5 + 1e-9
    if (together.pareto_k.nan_to_num() < 0.5).all():
        assert ((one_by_one - together.log_evidence).abs() < error).all()


@pytest.mark.parametrize(("path", "chosen"), EXACT)
def test_exact_guides_make_every_weight_the_evidence(path, chosen):
    x = rows(30)
    for seed in range(3):
        program = build(path, chosen, seed)
        with torch.no_grad():  # whatever the parameters
            for p in program.parameters():
                p += 0.5 * torch.randn_like(p)
        truth = exact_log_evidence(program, x)
        weights = log_weights(program, x, 20, seed=seed)
        torch.testing.assert_close(weights, truth.expand(20, 30), rtol=1e-10, atol=1e-10)
        assert truth.std() > 0.1
        history = fit(program, x, epochs=1, batch_size=7, learning_rate=1e-30)
        assert history.elbo[0] == pytest.approx(float(truth.mean()), rel=1e-10)


@pytest.mark.parametrize(("name", "switch"), [("eight_schools", "centred"), ("regression", "logistic")])
@pytest.mark.parametrize("on", [False, True])
def test_programs_whose_latents_are_shared_by_all_data(name, switch, on):
    program = load_program(str(ROOT / "models" / f"{name}.py"))(**{switch: on})
    y = (rows()[:, 0] > 0).double()
    x = {"y": y, "error": torch.ones(12)} if name == "eight_schools" else {"x": rows(), "y": y}
    assert structure(program, x).whole
    history = fit(program, x, epochs=60, learning_rate=0.05, particles=5, progress=False)
    assert sum(history.elbo[-10:]) > sum(history.elbo[:10])
    weights = log_weights(program, x, 7)
    assert weights.shape == (7, 1)
    assert weights.isfinite().all()
    assert len(pyro.get_param_store()) == 0


def test_two_level_evidence_is_a_normal():
    """x = W (A top + s e) + b + t d: a Gaussian whose covariance is written down."""
    program, x = build(ROOT / "models" / "two_level.py", {"linear": True}), rows()
    s, t = torch.nn.functional.softplus(program.raw_scales.detach())
    a, w, b = (tensor.detach() for tensor in (program.f.weight, program.g.weight, program.g.bias))
    covariance = w @ (a @ a.T + s**2 * torch.eye(3)) @ w.T + t**2 * torch.eye(4)
    truth = torch.distributions.MultivariateNormal(b, covariance).log_prob(x)
    torch.testing.assert_close(log_weights(program, x, 3), truth.expand(3, 12))


def test_all_discrete_programs_have_the_density_of_sums_by_hand():
    x = rows()
    program = build(ROOT / "models" / "mixture.py", {})
    scale = torch.nn.functional.softplus(program.raw_scale) + 1e-2
    terms = torch.distributions.Normal(program.loc, scale).log_prob(x[:, None]).sum(-1)
    truth = (program.logits.log_softmax(-1) + terms).logsumexp(-1).detach()
    torch.testing.assert_close(log_weights(program, x, 2), truth.expand(2, 12), rtol=0, atol=1e-10)
    torch.testing.assert_close(exact_log_evidence(program, x), truth, rtol=0, atol=1e-10)
    program = build(ROOT / "models" / "hidden_markov.py", {})
    scale = torch.nn.functional.softplus(program.raw_scale) + 1e-2
    seen = torch.distributions.Normal(program.loc, scale).log_prob(x.reshape(12, 4, 1, 1)).sum(-1)  # (n, steps, states)
    with torch.no_grad():
        program.moves += torch.randn_like(program.moves)
    moves = program.moves.log_softmax(-1)
    alpha = moves[-1] + seen[:, 0]
    for t in range(1, 4):
        alpha = (alpha[:, :, None] + moves[:-1]).logsumexp(1) + seen[:, t]
    truth = alpha.logsumexp(-1).detach()
    torch.testing.assert_close(log_weights(program, x, 2), truth.expand(2, 12), rtol=0, atol=1e-10)


def test_latent_dirichlet_allocation_scores_words_by_shares_of_topics():
    counts = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 30.0, 10.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    program = build(ROOT / "models" / "dirichlet_allocation.py", {})
    words, there = program.read(counts)
    kept = torch.stack([torch.bincount(w[t], minlength=4) for w, t in zip(words.T, there.T, strict=True)])
    assert kept.tolist() == [[3, 0, 1, 2], [0, 15, 5, 0], [0, 0, 0, 0]]  # 20 words at the most, in proportion
    theta = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(3, 4)
    topics = program.logits.detach().softmax(-1)
    prior = torch.distributions.Dirichlet(torch.nn.functional.softplus(program.raw_prior.detach())).log_prob(theta)
    truth = prior + (kept * (theta @ topics).log()).sum(-1)
    torch.testing.assert_close(Target(program, counts).score_sites("model", {"theta": theta[None]})[0], truth)


def test_state_space_evidence_is_a_normal():
    program, x = build(ROOT / "models" / "state_space.py", {"linear": True}), rows()
    q, r = torch.nn.functional.softplus(program.raw_scales.detach())
    a, c, b = float(program.dynamics.detach()), program.decoder.weight.item(), program.decoder.bias.item()
    push = torch.tensor([[a ** (i - j) if i >= j else 0.0 for j in range(4)] for i in range(4)]) * q  # z = push e
    truth = torch.distributions.MultivariateNormal(torch.full((4,), b), c**2 * push @ push.T + r**2 * torch.eye(4))
    torch.testing.assert_close(log_weights(program, x, 3), truth.log_prob(x).expand(3, 12))
    posterior = exact_posterior(program, x)
    gain = c * push @ push.T @ torch.linalg.inv(truth.covariance_matrix)
    torch.testing.assert_close(posterior.mean, (x - b) @ gain.T)


# models/vae.py is the VAE of three conditionals, bit by bit


def twins(dtype, latent=10):
    """The file's program and the library's, with equal numbers, after initialise()."""
    x = data.load("digits", dtype=torch.float64).train["x"][:200].to(dtype)
    torch.manual_seed(0)
    plain = load_program(str(ROOT / "models" / "vae.py"))(64, latent).to(dtype)
    vae = VAE(
        Conditional(StandardNormal(latent)),
        Conditional(Normal(64, scale="shared"), MLP(hidden=[200, 200])),
        Conditional(Normal(latent), MLP(hidden=[200, 200])),
    ).to(dtype)
    vae.initialise(x)
    plain.initialise(x)
    for name in ("shift", "spread"):  # initialise() agrees to rounding; then the numbers are made the same
        ours = vae.posterior.network.scale if name == "spread" else vae.posterior.network.shift
        torch.testing.assert_close(getattr(plain, name), ours)
    torch.testing.assert_close(plain.decoder[-1].bias, vae.likelihood.network.layers[-1].bias)
    torch.testing.assert_close(plain.encoder[-1].bias, vae.posterior.network.layers[-1].bias, rtol=0, atol=1e-4)
    torch.testing.assert_close(plain.raw_scale, vae.likelihood.family.raw_scale, rtol=0, atol=1e-4)
    plain.encoder.load_state_dict(vae.posterior.network.layers.state_dict())
    plain.decoder.load_state_dict(vae.likelihood.network.layers.state_dict())
    with torch.no_grad():
        plain.raw_scale.copy_(vae.likelihood.family.raw_scale)
        plain.shift.copy_(vae.posterior.network.shift)
        plain.spread.copy_(vae.posterior.network.scale)
    return plain, vae, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("elbo", OBJECTIVES)
def test_the_plain_vae_has_the_bound_of_three_conditionals(elbo, dtype):
    plain, vae, x = twins(dtype)
    objective = OBJECTIVES[elbo]()
    for seed in range(4):
        losses, gradients = [], []
        for program in (plain, vae):
            pyro.set_rng_seed(seed)
            loss = objective.differentiable_loss(program.model, program.guide, x)
            losses.append(loss.detach())
            program.zero_grad()
            loss.backward()
        assert losses[0].dtype == dtype
        assert torch.equal(*losses)
        for mine, theirs in ((plain.encoder, vae.posterior.network), (plain.decoder, vae.likelihood.network)):
            gradients += zip(mine.parameters(), theirs.layers.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in gradients)
        assert torch.equal(plain.raw_scale.grad, vae.likelihood.family.raw_scale.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("elbo", OBJECTIVES)
def test_the_plain_vae_trains_and_is_judged_as_three_conditionals(elbo, dtype):
    plain, vae, x = twins(dtype, latent=3)
    assert torch.equal(log_weights(plain, x[:20], 5), log_weights(vae, x[:20], 5))
    options = {"elbo": elbo, "epochs": 2, "batch_size": 64, "learning_rate": 1e-3, "optimizer": sgd}
    a, b = fit(plain, x, **options), fit(vae, x, **options)
    assert a.elbo == pytest.approx(b.elbo, rel=1e-6 if dtype is torch.float32 else 1e-12)
    torch.testing.assert_close(plain.decoder[0].weight, vae.likelihood.network.layers[0].weight)


def sgd(tensors, lr):
    return torch.optim.SGD(tensors, lr=lr / 100)


@pytest.mark.parametrize(("path", "chosen"), CASES)
def test_a_copy_is_a_program_of_its_own(path, chosen):
    x, program = rows(), build(path, chosen)
    twin = copy.deepcopy(program)
    before = parameters(program)
    elbo = TraceEnum_ELBO(max_plate_nesting=2) if path.stem in ENUMERATED else Trace_ELBO()
    SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(x)
    middle = parameters(program)
    SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(x)
    assert all_moved(twin, before)
    assert all(torch.equal(p, middle[name]) for name, p in program.named_parameters())
