"""The semi-supervised program: the conditional model where all labels are known, the mixture where none is."""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from twins import array, draws

from ppl_vae import fit, log_weights
from ppl_vae.programs.program import load_program

MODELS = Path(__file__).parents[2] / "models"
SIZE, LATENT, CLASSES = 5, 2, 3
SCALE = 0.8


class Exact(nn.Module):
    """What the networks of the guide would answer if they knew the truth, as a function of their input."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, context: Tensor) -> Tensor:
        return self.answer(context)


@pytest.fixture(scope="module")
def exact() -> tuple[Any, Tensor, Any]:
    """A linear decoder with orthogonal weights, whose posterior is diagonal, with the exact guide; x; log p(x, y)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(SIZE, LATENT, generator=generator, dtype=torch.float64)).Q * 1.3
    offsets, logits = draws(SIZE, CLASSES, seed=4), draws(CLASSES, seed=5) / 2
    program: Any = load_program(str(MODELS / "semi_supervised.py"))(SIZE, LATENT, classes=CLASSES).double()
    program.decoder = nn.Linear(LATENT + CLASSES, SIZE, bias=False).double()
    with torch.no_grad():
        program.decoder.weight.copy_(torch.cat([weight, offsets], 1))
        program.raw_scale.copy_(torch.tensor(np.log(np.expm1(SCALE))))
        program.logits.copy_(logits)
    variance = 1 / (1 + 1.3**2 / SCALE**2)
    raw = float(np.log(np.expm1(variance**0.5 - 1e-6)))

    def encode(context: Tensor) -> Tensor:
        x, label = context.split([SIZE, CLASSES], -1)
        loc = variance * (x - label @ offsets.T) @ weight / SCALE**2
        return torch.cat([loc, torch.full_like(loc, raw)], -1)

    covariance = array(weight @ weight.T) + SCALE**2 * np.eye(SIZE)
    log_prior = array(logits.log_softmax(-1))

    def joint(x: Tensor) -> Any:
        parts = [multivariate_normal(array(offsets[:, c]), covariance).logpdf(array(x)) for c in range(CLASSES)]
        return np.stack([np.atleast_1d(part) for part in parts], 1) + log_prior

    program.encoder, program.classifier = Exact(encode), Exact(lambda x: torch.from_numpy(joint(x)))
    x = draws(6, SIZE)
    return program, x, joint(x)


def test_with_all_labels_it_is_the_conditional_model_and_the_label_s_probability(exact: Any) -> None:
    program, x, joint = exact
    y = torch.arange(6) % CLASSES
    weights = log_weights(program, {"x": x, "y": y}, 4)
    assert np.abs(array(weights) - joint[np.arange(6), y]).max() < 1e-10


def test_without_labels_it_is_the_mixture(exact: Any) -> None:
    program, x, joint = exact
    weights = log_weights(program, {"x": x, "y": torch.full((6,), -1)}, 4)
    assert np.abs(array(weights) - logsumexp(joint, 1)).max() < 1e-10


@pytest.mark.parametrize("wrong", [False, True])
def test_enumeration_sums_the_missing_labels_out(exact: Any, wrong: bool) -> None:
    program, x, joint = exact
    y = torch.tensor([0, -1, 2, -1, -1, 1])
    truth = np.where(y < 0, logsumexp(joint, 1), joint[np.arange(6), y])
    program.eval()
    with pyro.get_param_store().scope():
        loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program.model, program.guide, x=x, y=y)
    assert (abs(-loss.item() - truth.sum() - wrong) < 1e-10) != wrong


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_labelled_data_train_the_classifier_by_its_term_alone(weight: float) -> None:
    make: Any = load_program(str(MODELS / "semi_supervised.py"))
    program = make(SIZE, LATENT, classes=CLASSES, hidden=4, weight=weight)
    batch = {"x": draws(6, SIZE), "y": torch.arange(6) % CLASSES}
    before = log_weights(program, batch, 2)
    program.train()
    with pyro.get_param_store().scope():
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program.model, program.guide, **batch).backward()
    slopes = [parameter.grad for parameter in program.classifier.parameters()]
    by_hand = weight * nn.functional.cross_entropy(program.classifier(batch["x"]), batch["y"], reduction="sum")
    wanted = torch.autograd.grad(by_hand, list(program.classifier.parameters()))
    for slope, other in zip(slopes, wanted, strict=True):
        assert torch.allclose(torch.zeros(()) if slope is None else slope, other, atol=1e-5)
    program.weight = 7.0
    assert torch.equal(log_weights(program, batch, 2), before)  # the evidence is free of the term


def test_takes_a_step_on_data_of_which_some_have_labels() -> None:
    program = load_program(str(MODELS / "semi_supervised.py"))(SIZE, LATENT, classes=CLASSES, hidden=4)
    batch = {"x": draws(8, SIZE), "y": torch.tensor([0, 1, 2, -1, -1, -1, -1, -1])}
    history = fit(program, batch, elbo="TraceEnum_ELBO", epochs=2, batch_size=4, progress=False)
    assert np.isfinite(history.elbo).all()
