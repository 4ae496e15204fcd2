"""Training and evaluation mode: dropout acts in training alone, and every module is put back into its own mode."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ppl_vae import VAE, Conditional, Program, Target, fit, inference_gap, log_evidence, log_weights
from ppl_vae import compare_posteriors as compare
from ppl_vae.data import load
from ppl_vae.evaluation import aggregate, bound_curve, calibrate, codes, rate_distortion, rates, to_datatree
from ppl_vae.families import Bernoulli, Normal, StandardNormal
from ppl_vae.infer import reference_posterior
from ppl_vae.networks import MLP
from ppl_vae.programs import exact_posterior, simulate, structure
from ppl_vae.programs.param_store import mode, scope
from ppl_vae.reports import latent_grid, traversals
from ppl_vae.reports.figures import draw_run
from ppl_vae.reports.measures import evaluate, trained
from ppl_vae.runs.check import check_program

DATA = (torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < 0.5).double()


class Alert(nn.Module):
    """A module of one's own that notes, for all copies, the mode of each call."""

    modes: ClassVar[list[bool]] = []

    def __init__(self, context: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(context, outputs)

    def forward(self, context: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.layer(context)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    Alert.modes.clear()


def alert(features: int = 4, likelihood: Any = Bernoulli) -> VAE:
    parts = Conditional(likelihood(features), Alert(2, features)), Conditional(Normal(2), Alert(features, 4))
    return VAE(Conditional(StandardNormal(2)), *parts)


def dropping(share: float = 0.5) -> VAE:
    torch.manual_seed(2)
    parts = Conditional(Bernoulli(4), MLP(hidden=[8], dropout=share)), Conditional(Normal(2), MLP(hidden=[8]))
    return VAE(Conditional(StandardNormal(2)), *parts)


VERBS: dict[str, Callable[[VAE], Any]] = {
    "structure": lambda vae: structure(vae, {"x": DATA}),
    "traces": lambda vae: Target(vae, DATA).traces(3, 0),
    "replay": lambda vae: Target(vae, DATA).replay(0),
    "layout": lambda vae: Target(vae, DATA).layout,
    "log_weights": lambda vae: log_weights(vae, DATA, 5),
    "log_evidence": lambda vae: log_evidence(vae, DATA, 50),
    "quadrature": lambda vae: reference_posterior(vae, DATA, method="quadrature"),
    "ais": lambda vae: reference_posterior(vae, DATA, method="ais", chains=2, temperatures=20),
    "nuts": lambda vae: reference_posterior(vae, DATA[:2], method="nuts", draws=10, warmup=10, chains=2),
    "gap": lambda vae: inference_gap(vae, DATA, draws=10, steps=5),
    "calibrate": lambda vae: calibrate(vae, DATA, simulations=4, draws=20),
    "codes": lambda vae: codes(vae, DATA, 5),
    "rates": lambda vae: rates(vae, DATA, draws=5),
    "aggregate": lambda vae: aggregate(vae, DATA),
    "bound_curve": lambda vae: bound_curve(vae, DATA, 10),
    "rate_distortion": lambda vae: rate_distortion(lambda beta: vae, [1.0], DATA),
    "to_datatree": lambda vae: to_datatree(vae, DATA),
    "simulate": lambda vae: simulate(Target(vae, DATA)),
    "sample": lambda vae: vae.sample(3),
    "reconstruct": lambda vae: vae.reconstruct(DATA),
    "latent_grid": lambda vae: latent_grid(vae, shape=(2, 2), size=2),
    "traversals": lambda vae: traversals(vae, shape=(2, 2)),
    "exact_posterior": lambda vae: exact_posterior(vae, DATA),
    "compare": lambda vae: compare(vae, DATA),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_evaluate_in_evaluation_mode_and_put_it_back(verb: str) -> None:
    vae = alert(likelihood=(lambda x: Normal(x, scale=1.0)) if verb in ("exact_posterior", "compare") else Bernoulli)
    assert vae.training
    VERBS[verb](vae)
    assert Alert.modes
    assert not any(Alert.modes)
    assert all(module.training for module in vae.modules())


def test_a_run_is_checked_measured_and_drawn_in_evaluation_mode(tmp_path: Path) -> None:
    data = load("digits", binarization="threshold", dtype=torch.float64)
    few = {part: {key: value[:30] for key, value in getattr(data, part).items()} for part in ("train", "test")}
    data, vae = replace(data, **few), alert(64)
    check_program(vae, data, particles=2, epochs=1, batch_size=9)
    target = Target(vae, data.test)
    blocks, _ = evaluate(target, data, samples=30, latent=2)
    trained(target, data, blocks["test"])
    draw_run(target, data, {"elbo": [-50.0], "validation": []}, tmp_path)
    assert not any(Alert.modes)
    assert all(module.training for module in vae.modules())


def test_training_is_in_training_mode_and_its_validation_is_not() -> None:
    vae, held_out = alert(), DATA[:2]
    vae.eval()
    vae.posterior.network.train()
    history = fit(vae, DATA, epochs=2, batch_size=3, validation=held_out, on_epoch=lambda *given: Alert.modes.append(2))
    first, second = (list(Alert.modes[start:stop]) for start, stop in pairs(Alert.modes))
    assert first[-6:] == second == [True, True] * 2 + [False, False]  # guide and model, in two batches and the bound
    assert not any(first[:-6])
    assert [part.network.training for part in (vae.likelihood, vae.posterior)] == [False, True]
    assert len(history.validation) == 2


def pairs(modes: list[bool]) -> list[tuple[int, int]]:
    ends = [place for place, mode in enumerate(modes) if mode == 2]
    return [(0, ends[0]), (ends[0] + 1, ends[1])]


def test_a_failing_step_puts_the_mode_back() -> None:
    vae = alert()
    vae.eval()

    def stop(epoch: int, state: Any) -> None:
        assert vae.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(vae, DATA, epochs=2, on_epoch=stop)
    assert not any(module.training for module in vae.modules())


def test_evidence_of_a_program_with_dropout_is_that_without() -> None:
    vae, plain = dropping(), dropping(0.0)
    plain.load_state_dict({key.replace("layers.3", "layers.2"): value for key, value in vae.state_dict().items()})
    assert torch.equal(log_weights(vae, DATA, 20), log_weights(plain, DATA, 20))
    assert torch.equal(vae.reconstruct(DATA), plain.reconstruct(DATA))
    twin = copy.deepcopy(vae)
    before, after = (fit(each, DATA, epochs=20, learning_rate=1e-30).elbo for each in (vae, twin))
    assert before == after
    assert len(set(before)) == 20


def test_the_bound_of_validation_data_has_no_dropout() -> None:
    vae, plain = dropping(), dropping(0.0)
    plain.load_state_dict({key.replace("layers.3", "layers.2"): value for key, value in vae.state_dict().items()})
    options = {"epochs": 1, "learning_rate": 1e-30, "validation": DATA}
    with_dropout, without = (fit(each, DATA, **options) for each in (vae, plain))
    assert with_dropout.validation == without.validation
    assert with_dropout.elbo != without.elbo


def test_programs_that_are_no_modules_are_switched_too() -> None:
    class Plain:
        def __init__(self) -> None:
            vae = alert()
            self.part, self.model, self.guide = vae, vae.model, vae.guide

    program = Plain()
    log_evidence(program, DATA, 10)
    log_evidence(Program(program.model, program.guide), DATA, 10)
    assert not any(Alert.modes)
    assert program.part.training


@pytest.mark.parametrize("training", [True, False])
def test_modes_nest(training: bool) -> None:
    vae = alert()
    vae.posterior.eval()
    with mode(vae, training=training):
        assert {module.training for module in vae.modules()} == {training}
        with scope(vae):
            assert not any(module.training for module in vae.modules())
        assert {module.training for module in vae.modules()} == {training}
    assert {module.training for module in vae.posterior.modules()} == {False}
    assert {module.training for module in vae.likelihood.modules()} == {True}
