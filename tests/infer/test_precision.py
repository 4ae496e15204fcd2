"""Products of networks in bfloat16: against single precision, by hand, captured and resumed."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import VAE, Conditional, Program, Target, data, fit, log_evidence
from ppl_vae._seeds import fork_rng
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer import gradients
from ppl_vae.infer.gradients import Gradients
from ppl_vae.infer.objectives import OBJECTIVES, make_objective
from ppl_vae.networks import MLP, Conv
from ppl_vae.programs import precision
from ppl_vae.programs.compiler import has_compiler
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.precision import Lowered

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 10, "learning_rate": 0.01, "device": "cpu", "progress": False}
OPTIONS |= {"precision": "bfloat16"}
EPS = 2.0**-8  # bfloat16 rounds by at most half of this share
BITS = torch.linspace(-3, 3, 40).unsqueeze(1) + 2.0**-12  # which bfloat16 does not hold


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch):
    """Data in single precision, and the smallest products lowered too."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    monkeypatch.setattr(precision, "LEAST", 1)


def pair(network: Any = None, dropout: float = 0.0) -> VAE:
    return VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(36), MLP(hidden=[16], dropout=dropout)),
        Conditional(Normal(2), MLP(hidden=[16]) if network is None else network),
    )


def ones(n: int = 40, features: int = 36) -> Tensor:
    return (torch.rand(n, features) < 0.4).float()


def step(program: Any, x: Tensor, elbo: str, kind: Any, **options: Any) -> tuple[Tensor, list[Any]]:
    """Losses and gradients of one step in a precision, by the same draws."""
    learned = [*program.parameters()]
    objective = make_objective(Target(program, x), learned, elbo=elbo, **options)
    with scope(program, training=True), fork_rng(0, device=x.device):
        return Gradients(program, objective, learned, capture="off", precision=kind)({"x": x})


# One step


def test_a_layer_rounds_its_factors_and_gives_single_precision():
    layers = {"linear": nn.Linear(5, 4), "conv": nn.Conv2d(2, 3, 3, stride=2), "back": nn.ConvTranspose2d(2, 3, 3)}
    for layer in layers.values():
        x = torch.randn(7, 5) if isinstance(layer, nn.Linear) else torch.randn(7, 2, 5, 5)
        with Lowered():
            y = layer(x.requires_grad_())
        plain = copy.deepcopy(layer).bfloat16()
        assert y.dtype == torch.float32
        assert torch.equal(y, plain(x.bfloat16()).float())
        assert not torch.equal(y, layer(x))
        found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == torch.float32
            assert (one - other).norm() < 4 * EPS * other.norm()


def test_small_products_other_functions_and_double_precision_are_left_alone(monkeypatch):
    x, layer = torch.randn(6, 5), nn.Linear(5, 4)
    with Lowered():
        product, wide = x @ layer.weight.T, copy.deepcopy(layer).double()(x.double())
        monkeypatch.setattr(precision, "LEAST", 6 * 5 * 4)
        large = layer(x)
        monkeypatch.setattr(precision, "LEAST", 6 * 5 * 4 + 1)
        small = layer(x)
    assert torch.equal(product, x @ layer.weight.T)
    assert torch.equal(wide, copy.deepcopy(layer).double()(x.double()))
    assert torch.equal(small, layer(x))
    assert not torch.equal(large, small)


@pytest.mark.parametrize("network", [MLP, Conv])
@pytest.mark.parametrize("elbo", [name for name in OBJECTIVES if name != "TraceEnum_ELBO"])
def test_loss_and_gradients_of_a_step_agree_to_the_rounding_of_bfloat16(elbo, network):
    """Each factor is rounded by EPS / 2 at most; half a dozen products in a row, there and back, add up to 8 EPS."""
    options: dict[str, Any] = {"alpha": 0.5} if elbo == "Renyi" else {}
    options |= {"particles": 3} if elbo in ("Renyi", "ImportanceWeighted") else {}
    recipe = MLP(hidden=[16]) if network is MLP else Conv((6, 6), channels=[4], hidden=[8])
    program, x = pair(recipe), ones()
    loss, found = step(program, x, elbo, "bfloat16", **options)
    known, wanted = step(program, x, elbo, "full", **options)
    torch.testing.assert_close(loss, known, rtol=EPS / 4, atol=0.0)
    assert not torch.equal(loss, known)
    assert all(one.dtype == torch.float32 for one in found)
    one, other = (torch.cat([part.flatten() for part in each]) for each in (found, wanted))
    assert (one - other).norm() <= 8 * EPS * other.norm()


class Plain(nn.Module):
    """z = x to within 1e-3, and x | z ~ N(network(z), 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.shift = network, nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        pyro.module(f"plain_{id(self)}", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).expand([len(x), 1]).to_event(1))
            pyro.sample("x", dist.Normal(self.network(z) + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1e-3).to_event(1))


def test_log_densities_are_in_single_precision_to_the_last_bit():
    """Those of a program without layers are the same; a layer that copies its input changes what it hands on."""
    same = [step(Plain(nn.Identity()), BITS, "Trace_ELBO", kind) for kind in ("full", "bfloat16")]
    assert torch.equal(same[0][0], same[1][0])
    assert torch.equal(same[0][1][0], same[1][1][0])
    copies = nn.Linear(1, 1, bias=False)
    nn.init.ones_(copies.weight)
    loss = step(Plain(copies), BITS, "Trace_ELBO", "bfloat16")[0]

    class Rounded(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.bfloat16().float()

    assert torch.equal(loss, step(Plain(Rounded()), BITS, "Trace_ELBO", "full")[0])
    assert not torch.equal(loss, same[0][0])


# Training


MODES = [("off", "off"), ("graph", "graph"), ("auto", "fast")]
MODES += [("compile", "compile")] if has_compiler() else []


@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO", "ImportanceWeighted"])
def test_steps_are_captured_and_resumed_to_the_last_bit(elbo, monkeypatch):
    monkeypatch.setattr(gradients, "EAGER", 2)
    x, start, runs = ones(), pair(dropout=0.2), {}
    for capture, mode in MODES if elbo == "Trace_ELBO" else MODES[:3]:
        whole, part, saved = copy.deepcopy(start), copy.deepcopy(start), []
        options = {**OPTIONS, "elbo": elbo, "capture": capture}
        a = fit(
            whole, x, **options, on_epoch=lambda epoch, state, saved=saved: saved.append(copy.deepcopy(state.save()))
        )
        b = fit(part, x, **options, resume=saved[0])
        assert (a.capture, b.capture, a.settings["precision"]) == (mode, mode, "bfloat16")
        assert a.elbo == b.elbo
        assert all(torch.equal(*pair) for pair in zip(whole.parameters(), part.parameters(), strict=True))
        assert all(one.dtype == torch.float32 for one in whole.parameters())
        assert all(one.dtype == torch.float32 for one in saved[0]["learned"])
        runs[capture] = a.elbo
    assert runs["graph"] == runs["off"]
    full = fit(copy.deepcopy(start), x, **{**OPTIONS, "elbo": elbo, "capture": "off", "precision": "full"})
    for other in runs.values():
        assert other == pytest.approx(runs["off"], rel=EPS / 4)
        assert other == pytest.approx(full.elbo, rel=EPS)
        assert other != full.elbo


def test_a_run_whose_products_are_all_small_says_so(monkeypatch):
    monkeypatch.setattr(precision, "LEAST", 2**21)
    ours, other, x = pair(), pair(), ones()
    other.load_state_dict(ours.state_dict())
    with pytest.warns(UserWarning, match="stayed in full precision: no linear layer or convolution has the 2,097,152"):
        a = fit(ours, x, **OPTIONS)
    assert a.elbo == fit(other, x, **{**OPTIONS, "precision": "full"}).elbo


def test_validation_is_in_full_precision():
    x, program = ones(), pair()
    options = {**OPTIONS, "learning_rate": 1e-30, "validation": x}
    known = fit(program, x, **{**options, "precision": "full"})
    history = fit(program, x, **options)
    assert history.validation == known.validation
    assert history.elbo != known.elbo


def test_training_ends_at_the_evidence_of_single_precision():
    """On digits, from the same start; the seeds show by how much the ends of two such runs differ."""
    rows = data.load("digits", scaling="unit").train["x"][:600]
    ends: dict[str, list[float]] = {"full": [], "bfloat16": []}
    for kind, found in ends.items():
        for seed in range(4):
            torch.manual_seed(seed)
            vae = VAE(
                Conditional(StandardNormal(4)),
                Conditional(Normal(64, scale="shared"), MLP(hidden=[30])),
                Conditional(Normal(4), MLP(hidden=[30])),
            )
            vae.initialise(rows)
            options = {
                "epochs": 30,
                "batch_size": 60,
                "learning_rate": 3e-3,
                "schedule": "one-cycle",
                "progress": False,
            }
            fit(vae, rows, precision=kind, seed=seed, device="cpu", **options)
            found.append(float(log_evidence(vae, rows, 200).log_evidence.mean()))
    apart = torch.tensor(ends["full"]) - torch.tensor(ends["bfloat16"])
    assert abs(float(apart.mean())) < 5 * float(apart.std()) / math.sqrt(len(apart))
    assert float(apart.abs().max()) > 0


def test_double_precision_is_refused():
    x, program = ones().double(), pair().double()
    before = copy.deepcopy(program.state_dict())
    with pytest.raises(ValueError, match='single precision for precision = .bfloat16.; got double. Convert.*"full"'):
        fit(program, x, **OPTIONS)

    def model(x):
        loc = pyro.param("loc", lambda: torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], pyro.param("scale", lambda: torch.tensor(1.0))))

    with pytest.raises(ValueError, match="got double"):
        fit(Program(model, guide), x, **OPTIONS)
    with pytest.raises(ValueError, match="`precision` to be one of 'full', 'bfloat16'; got 'float16'"):
        fit(pair(), ones(), **{**OPTIONS, "precision": "float16"})
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
