"""VAEs that are given a label or covariates: samples, reconstructions, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from twins import array, class_oracle, draws, given_vae

from ppl_vae import VAE, Conditional, Given, Target, fit, inference_gap, log_evidence
from ppl_vae.evaluation import calibrate
from ppl_vae.families import ExactNormal, Normal, StandardNormal, VampPrior
from ppl_vae.networks import MLP, Linear

DATA = {"x": draws(30, 5).float(), "y": torch.arange(30) % 3}


def vae(given: Given | None, prior: Any = None, scale: Any = "shared") -> VAE:
    parts = Conditional(Normal(5, scale=scale), MLP(hidden=[8])), Conditional(Normal(2), MLP(hidden=[8]))
    return VAE(prior or Conditional(StandardNormal(2)), *parts, given)


@pytest.mark.parametrize("wrong", [False, True])
def test_samples_have_the_moments_of_their_class(wrong: bool) -> None:
    twin, n = given_vae(3), 20_000
    drawn = array(twin.sample(n, given=1, seed=3))
    oracle = class_oracle(twin, 2 if wrong else 1)
    mean = oracle.weight @ oracle.loc + oracle.bias
    covariance = oracle.weight @ oracle.covariance @ oracle.weight.T + np.diag(oracle.noise)
    centred = drawn - mean
    error = np.sqrt(covariance.diagonal() / n)
    products = centred[:, :, None] * centred[:, None]
    close = np.abs(centred.mean(0)) < 5 * error
    near = np.abs(products.mean(0) - covariance) < 5 * products.std(0) / n**0.5
    assert (close.all() and near.all()) != wrong


def test_a_label_per_draw_is_the_label_of_all_and_a_swap_changes_the_label_alone() -> None:
    twin = given_vae(3)
    one = twin.sample(6, given=2, seed=1)
    assert torch.equal(one, twin.sample(6, given={"y": torch.full((6,), 2)}, seed=1))
    batch = {"x": draws(6, 5), "y": torch.zeros(6, dtype=torch.long)}
    moved = twin.reconstruct(batch, given=1, seed=2) - twin.reconstruct(batch, seed=2)
    weight: Any = twin.likelihood.network.weight
    assert torch.allclose(moved, (weight[:, 3] - weight[:, 2]).expand(6, 5))  # the same z, another offset


def test_every_part_is_given_the_label_or_not() -> None:
    sizes = {}
    for to in (["likelihood"], ["likelihood", "posterior"], ["prior", "likelihood", "posterior"]):
        prior = Conditional(Normal(2), MLP(hidden=[8])) if "prior" in to else None
        program = vae(Given(y=3, to=to), prior).initialise(DATA)
        sizes[len(to)] = sum(p.numel() for p in program.parameters())
        history = fit(program, DATA, epochs=1, batch_size=15, progress=False, capture="off")
        other = log_evidence(program, {**DATA, "y": (DATA["y"] + 1) % 3}, 5).log_evidence
        assert np.isfinite(history.elbo).all()
        assert not torch.allclose(log_evidence(program, DATA, 5).log_evidence, other)
    assert sizes[2] - sizes[1] == 3 * 8  # the label's columns in the guide's first layer
    plain = vae(None)
    labelled, alone = (log_evidence(plain, batch, 5).log_evidence for batch in (DATA, {"x": DATA["x"]}))
    assert torch.equal(labelled, alone)


def test_covariates_enter_in_units_of_their_spread() -> None:
    known = torch.stack([1e4 + 100 * torch.randn(30, generator=torch.Generator().manual_seed(0)), DATA["y"]], 1)
    program = vae(Given(covariates=[0, 3])).initialise({"x": DATA["x"], "covariates": known})
    seen = program.given({"covariates": known})  # type: ignore[misc]
    assert torch.allclose(seen[:, 0].mean(), torch.tensor(0.0), atol=1e-3)
    assert torch.allclose(seen[:, 0].std(correction=0), torch.tensor(1.0), atol=1e-3)
    assert torch.equal(seen[:, 1:], torch.eye(3)[DATA["y"]])
    one, row = program.sample(2, given=known[0]), {"covariates": known[:1]}
    assert torch.equal(one, program.sample(2, given=row))
    assert not torch.equal(one, program.sample(2, given=known[0].floor()))


def test_the_gap_and_calibration_take_the_label() -> None:
    twin = given_vae(3)
    batch = {"x": twin.sample(8, given=torch.arange(8) % 3), "y": torch.arange(8) % 3}
    assert float(inference_gap(twin, batch, draws=20).total.abs().max()) < 1e-10
    assert calibrate(twin, batch, draws=30, simulations=100).verdict != "miscalibrated"
    with pytest.raises(ValueError, match="given nothing needs none"):
        calibrate(twin)


def test_the_search_for_the_best_guide_starts_at_the_prior_of_the_label() -> None:
    program = vae(Given(y=3, to=["prior", "likelihood", "posterior"]), Conditional(Normal(2), MLP(hidden=[8])))
    batch = {"x": DATA["x"][:5].double(), "y": DATA["y"][:5]}
    gap = inference_gap(program.double(), batch, draws=200, steps=20)
    assert bool((gap.amortization > -5 * gap.amortization_error).all())


def linear(prior: Any, to: list[str]) -> VAE:
    likelihood = Conditional(Normal(5, scale="shared"), Linear(), context=(2, 3))
    return VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)), Given(y=3, to=to))


def vamp() -> VAE:
    posterior = Conditional(Normal(2), MLP(hidden=[8]), context=(5, 3))
    prior = Conditional(VampPrior(2, posterior, components=3))
    return VAE(prior, Conditional(Normal(5), MLP(hidden=[8])), posterior, Given(y=3))


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (lambda: Given(), "Expected `y` or `covariates`"),
    "guide alone": (lambda: Given(y=3, to=["posterior"]), "given to the prior or the likelihood"),
    "unknown part": (lambda: Given(y=3, to=["decoder"]), "Expected `to` to be one of 'prior'"),
    "prior without network": (lambda: vae(Given(y=3, to=["prior"])), "takes a context of size 3"),
    "network without label": (lambda: vae(None, Conditional(Normal(2), MLP(hidden=[8]))), "is named in `given_to`"),
    "exact guide without label": (
        lambda: linear(Conditional(StandardNormal(2)), ["likelihood"]),
        "Name the posterior in `given_to`",
    ),
    "pseudo-inputs": (vamp, "given_to=..likelihood"),
    "no label": (lambda: Target(vae(Given(y=3)), DATA["x"]), "Expected `y` of shape .n. in the batch"),
    "a class more": (lambda: Target(vae(Given(y=2)), DATA), "numbers from 0 to 1 .* got 2 in row 2 and 10 such rows"),
    "unlabelled": (lambda: Target(vae(Given(y=3)), {**DATA, "y": DATA["y"] - 1}), "-1 is a datum without a label"),
    "another width": (
        lambda: Target(vae(Given(covariates=[0, 0])), {"x": DATA["x"], "covariates": DATA["x"][:, :3]}),
        r"Expected `covariates` of shape \(n, 2\) .* got \(30, 3\)",
    ),
    "samples of nothing": (lambda: vae(Given(y=3)).sample(2), "Expected `given` with `y` for one datum or 2"),
    "samples of too few": (lambda: vae(Given(y=3)).sample(3, given=[0, 1]), "for one datum or 3"),
    "samples beyond": (lambda: vae(Given(y=3)).sample(3, given=3), "numbers from 0 to 2"),
    "given to none": (lambda: vae(None).sample(2, given=1), "Expected nothing `given`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()
