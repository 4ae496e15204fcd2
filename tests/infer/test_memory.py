"""Steps without memory: one message, and the state before the epoch; by programs that run out of it on purpose."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import MODELS

from ppl_vae import VAE, Conditional, fit
from ppl_vae.families import Normal, StandardNormal
from ppl_vae.infer import gradients
from ppl_vae.networks import Linear
from ppl_vae.programs.program import load_program

OPTIONS: dict[str, Any] = {"epochs": 4, "batch_size": 10, "learning_rate": 0.01, "device": "cpu", "progress": False}


class Full(VAE):
    """A VAE whose guide says at one call that memory has ended, as a GPU does."""

    calls: list[int] = []  # noqa: RUF012  no attribute of its own that changes
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nOf the allocated")
    at = 10

    def guide(self, x: Tensor, **batch: Any) -> None:
        if self.training:
            self.calls.append(len(x))
            if len(self.calls) == self.at:
                raise self.error
        super().guide(x, **batch)


@pytest.fixture
def full() -> Full:
    torch.manual_seed(0)
    Full.calls.clear()
    recipe = (StandardNormal(2), None), (Normal(3), Linear()), (Normal(2), Linear())
    return Full(*(Conditional(family, network) for family, network in recipe))


KINDS = [
    Full.error,
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", KINDS, ids=["cuda", "python", "cpu"])
def test_a_step_without_memory_says_what_takes_less_and_keeps_the_last_epoch(full, error, monkeypatch):
    monkeypatch.setattr(Full, "error", error)
    x, saved = torch.randn(40, 3).float(), []
    program, twin = full.float(), copy.deepcopy(full).float()
    options = {**OPTIONS, "capture": "off", "particles": 3}
    with pytest.raises(MemoryError) as caught:
        fit(program, x, **options, on_epoch=lambda epoch, state: saved.append(copy.deepcopy(state.save())))
    text = str(caught.value)
    assert "fit into memory; step 10 (epoch 3) did not" in text
    assert "keeps the state before that epoch. Try batch_size = 5 or particles = 1 or precision" in text
    assert "capture" not in text  # it is off
    assert "Of the allocated" not in text
    assert len(saved) == 2
    assert all(torch.equal(*pair) for pair in zip(program.parameters(), saved[-1]["learned"], strict=False))
    rest = fit(program, x, **{**options, "capture": "auto"}, resume=saved[-1])
    assert rest.elbo == fit(twin, x, **options).elbo  # of which no step was left out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 1}, 'Try precision = "bfloat16" or capture = "off".'),
        ({"precision": "bfloat16", "capture": "off"}, "Try batch_size = 5."),
        ({"precision": "bfloat16", "capture": "off", "batch_size": 1}, "Try smaller networks."),
        ({"batch_size": 100}, 'Try batch_size = 20 or precision = "bfloat16" or capture = "off".'),
    ],
)
def test_only_settings_that_change_something_are_named(full, options, words, monkeypatch):
    monkeypatch.setattr(Full, "at", 2)
    with pytest.raises(MemoryError) as caught:
        fit(full.float(), torch.randn(40, 3).float(), **{**OPTIONS, **options})
    assert str(caught.value).endswith(words)


def test_a_data_set_that_is_one_datum_has_no_smaller_batches(monkeypatch):
    program: Any = load_program(str(MODELS / "regression.py"))()

    def ends(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gradients.Gradients, "_by_pyro", ends)
    batch = {"x": torch.randn(30, 2), "y": torch.randn(30)}
    with pytest.raises(MemoryError, match="did not: OutOfMemoryError.*Try batch_size = 5 or capture"):
        fit(program, batch, **OPTIONS)


def test_a_capture_without_memory_goes_on_step_by_step(full, monkeypatch):
    def ends(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(gradients, "EAGER", 2)
    monkeypatch.setattr(gradients, "record", ends)
    monkeypatch.setattr(Full, "at", -1)
    history = fit(full, torch.randn(40, 3), **OPTIONS)
    assert history.capture == "off"
    assert "out of memory" in history.capture_reason


def test_other_errors_stay_as_they_are(full, monkeypatch):
    monkeypatch.setattr(Full, "error", RuntimeError("expected m1 and m2 to have the same dtype"))
    with pytest.raises(RuntimeError, match="same dtype"):
        fit(full, torch.randn(40, 3), **OPTIONS)
