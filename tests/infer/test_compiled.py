"""Training steps compiled by PyTorch's inductor, against those by Pyro; skipped where there is no C++ compiler."""

import copy
import logging
from typing import Any

import psutil
import pytest
import torch

from ppl_vae import VAE, Conditional, fit
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer import gradients
from ppl_vae.networks import MLP
from ppl_vae.programs.compiler import has_compiler

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 10, "learning_rate": 0.01, "device": "cpu", "progress": False}


def pair() -> VAE:
    torch.manual_seed(0)
    return VAE(
        Conditional(StandardNormal(2)),
        Conditional(Bernoulli(7), MLP(hidden=[6], dropout=0.3)),
        Conditional(Normal(2), MLP(hidden=[6])),
    )


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
def test_a_compiled_run_has_the_draws_and_numbers_of_one_by_pyro_and_resumes(monkeypatch):
    monkeypatch.setattr(gradients, "EAGER", 2)
    monkeypatch.setattr(gradients, "LONG", 12)
    x, saved, ours = (torch.rand(40, 7) < 0.4).double(), [], pair()
    other, part = copy.deepcopy(ours), copy.deepcopy(ours)
    a = fit(ours, x, **OPTIONS, on_epoch=lambda epoch, state: saved.append(copy.deepcopy(state.save())))
    b = fit(other, x, **OPTIONS, capture="off")
    assert (a.capture, a.capture_reason, b.capture) == ("compile", "", "off")
    assert a.elbo == pytest.approx(b.elbo, rel=1e-12)
    for one, wanted in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)
    c = fit(part, x, **OPTIONS, resume=saved[0])
    assert (c.elbo, c.capture) == (a.elbo, "compile")
    assert all(torch.equal(one, wanted) for one, wanted in zip(ours.parameters(), part.parameters(), strict=True))
    assert not psutil.Process().children()


def test_a_compiler_that_fails_leaves_one_warning_and_a_replay(monkeypatch):
    def fails(*args: Any) -> Any:
        raise RuntimeError("no space left\non the disk")

    monkeypatch.setattr(gradients, "compiled", fails)
    ours, other, x = pair(), pair(), (torch.rand(35, 7) < 0.4).double()  # two shapes of batches
    with pytest.warns(UserWarning, match="Cannot compile.*no space left$") as caught:
        a = fit(ours, x, **OPTIONS, capture="compile")
    assert len(caught) == 1
    b = fit(other, x, **OPTIONS, capture="off")
    assert a.capture == "fast"
    assert a.elbo == pytest.approx(b.elbo, rel=1e-6)


def test_what_cannot_be_captured_is_refused_where_it_was_asked_for(caplog):
    class Counting(VAE):
        count = 0

        def guide(self, x, **batch):
            self.count += 1
            return super().guide(x, **batch)

    caplog.set_level(logging.INFO, "ppl_vae")
    x = (torch.rand(20, 7) < 0.4).double()
    for capture in ("graph", "compile"):
        program = Counting(*(getattr(pair(), role) for role in ("prior", "likelihood", "posterior")))
        with pytest.raises(ValueError, match="the program changes its 'count' at each step. Use capture = 'auto'"):
            fit(program, x, **OPTIONS, capture=capture)
    assert not caplog.records
    with pytest.raises(ValueError, match="`capture` to be one of 'auto', 'off', 'graph', 'compile'; got 'jit'"):
        fit(pair(), x, **OPTIONS, capture="jit")  # type: ignore[arg-type]
    history = fit(program, x, **{**OPTIONS, "epochs": 30})
    assert history.capture == "off"
    assert "changes its 'count'" in history.capture_reason
