import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ppl_vae import VAE, Conditional
from ppl_vae.families import Bernoulli, ExactNormal, FullNormal, MixtureNormal, Normal, StandardNormal
from ppl_vae.networks import MLP, Free, Linear, Table


@pytest.mark.parametrize("batch", [[], [3], [2, 3]], ids=str)
@pytest.mark.parametrize("network", [Linear, lambda: MLP(hidden=[4])], ids=["Linear", "MLP"])
@pytest.mark.parametrize("family", [Normal, FullNormal, MixtureNormal, Bernoulli])
def test_sizes_follow_from_family_and_context(family: Any, network: Any, batch: list[int]) -> None:
    conditional = Conditional(family(3), network(), context=5)
    d = conditional(torch.randn(*batch, 5))
    assert (d.batch_shape, d.event_shape) == (torch.Size(batch), (3,))
    assert conditional.unconstrained(torch.randn(*batch, 5)).shape == (*batch, family(3).start().numel())


def test_forward_composes_network_and_family() -> None:
    conditional, x = Conditional(Normal(3), Linear(), context=5), torch.randn(4, 5)
    network: Any = conditional.network
    raw = x.numpy() @ network.weight.detach().numpy().T + network.bias.detach().numpy()
    d: Any = conditional(x)
    np.testing.assert_allclose(conditional.unconstrained(x).detach(), raw, rtol=1e-12)
    np.testing.assert_allclose(d.mean.detach(), raw[:, :3], rtol=1e-12)
    np.testing.assert_allclose(d.stddev.detach(), np.logaddexp(0, raw[:, 3:]) + 1e-6, rtol=1e-12)


@pytest.mark.parametrize(
    ("context", "shapes"),
    [(5, [(5,)]), ((5,), [(5,)]), ((2, 3), [(2,), (3,)]), (((2, 3),), [(2, 3)]), (((2, 3), 4), [(2, 3), (4,)])],
    ids=str,
)
def test_contexts_are_shapes_and_an_int_is_short_for_one(context: Any, shapes: list[Any]) -> None:
    conditional = Conditional(Normal(3), Linear(), context=context)
    assert conditional.context == tuple(torch.Size(shape) for shape in shapes)
    assert conditional(*(torch.randn(7, *shape) for shape in shapes)).batch_shape == (7,)


def test_two_contexts_broadcast() -> None:
    conditional = Conditional(Normal(3), MLP(hidden=[4]), context=(2, 5))
    z, x = torch.randn(4, 1, 1, 2), torch.randn(6, 7, 5)
    d: Any = conditional(z, x)
    assert (d.batch_shape, d.event_shape) == ((4, 6, 7), (3,))
    torch.testing.assert_close(d.mean[1, 2, 3], conditional(z[1, 0, 0], x[2, 3]).mean)


def test_without_a_network_the_parameters_are_free() -> None:
    prior = Conditional(Normal(3))
    assert isinstance(prior.network, Free)
    assert prior.context == ()
    d: Any = prior()
    torch.testing.assert_close(d.mean, torch.zeros(3))
    torch.testing.assert_close(d.stddev, torch.ones(3))
    assert [name for name, _ in prior.named_parameters()] == ["network.value"]


def test_mask_and_observed_go_to_event_and_context() -> None:
    conditional, x, y = Conditional(Normal(3), Linear(), context=5), torch.randn(4, 5), torch.randn(4, 3)
    network: Any = conditional.network
    network.centre(torch.randn(5), torch.tensor(2.0))
    mask, observed = torch.rand(4, 3) < 0.5, torch.rand(4, 5) < 0.5
    d = conditional(torch.where(observed, x, math.nan), observed=observed, mask=mask)
    full: Any = conditional(torch.where(observed, x, network.shift))
    expected = torch.where(mask, torch.distributions.Normal(full.mean, full.stddev).log_prob(y), 0.0).sum(-1)
    torch.testing.assert_close(d.log_prob(torch.where(mask, y, math.nan)), expected)


def test_table_is_asked_by_index() -> None:
    conditional = Conditional(Normal(2), Table(6), context=5)
    network: Any = conditional.network
    nn.init.normal_(network.value)
    d: Any = conditional(torch.tensor([5, 0, 5]))
    torch.testing.assert_close(d.mean, network.value[[5, 0, 5], :2])


# A torch module of one's own ------------------------------------------------------------------------------------------


def test_any_module_serves_as_network() -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    conditional = Conditional(Normal(3), plain, context=((2, 3),))
    x = torch.randn(5, 2, 3)
    d: Any = conditional(x)
    assert (d.batch_shape, d.event_shape) == ((5,), (3,))
    torch.testing.assert_close(d.mean, plain(x.flatten(1))[:, :3])
    observed = torch.rand(5, 2, 3) < 0.5
    hidden: Any = conditional(torch.where(observed, x, math.nan), observed=observed)
    torch.testing.assert_close(hidden.mean, plain(torch.where(observed, x, 0.0).flatten(1))[:, :3])


@pytest.mark.parametrize(("family", "needed"), [(Normal(3), 6), (FullNormal(3), 9), (Bernoulli(3), 3)])
def test_a_module_of_another_size_is_refused(family: Any, needed: int) -> None:
    conditional = Conditional(family, nn.Linear(4, 5), context=4)
    message = rf"answer {needed} parameters for {type(family).__name__}\(3,\).*; got 5 "
    with pytest.raises(ValueError, match=message):
        conditional(torch.zeros(2, 4))


def test_asking_a_module_of_ones_own_draws_no_random_numbers() -> None:
    conditional = Conditional(MixtureNormal(2, components=3), nn.Linear(4, 15), context=4)
    before = torch.get_rng_state()
    conditional(torch.zeros(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


# Binding --------------------------------------------------------------------------------------------------------------


def test_binding_again_to_the_same_shapes_is_idle() -> None:
    conditional = Conditional(Normal(3), Linear(), context=5)
    network: Any = conditional.network
    before = network.weight
    assert conditional.bind(5) is conditional
    assert conditional.bind((5,)) is conditional
    assert network.weight is before


def test_binding_to_other_shapes_is_refused() -> None:
    conditional = Conditional(Normal(3), Linear(), context=5)
    with pytest.raises(ValueError, match=re.escape("context of shapes [(5,)], as built; got [(4,)]")):
        conditional.bind(4)


def test_free_refuses_a_context() -> None:
    for make in (lambda: Conditional(Normal(3), context=5), lambda: Conditional(Normal(3)).bind(5)):
        with pytest.raises(ValueError, match="network that takes a context of size 5, such as Linear or MLP; got Free"):
            make()


def test_a_conditional_that_is_not_built_says_so() -> None:
    with pytest.raises(ValueError, match="a conditional that is built: give it `context=`, call bind"):
        Conditional(Normal(3), Linear())(torch.zeros(2, 5))


@pytest.mark.parametrize("make", [Linear, lambda: MLP(hidden=[4]), lambda: Table(3)], ids=["Linear", "MLP", "Table"])
def test_one_network_serves_one_conditional(make: Any) -> None:
    network = make()
    first, second = Conditional(Normal(3), network, context=5), Conditional(Normal(5), network)
    with pytest.raises(ValueError, match=f"a network of its own for each conditional; got a {type(network).__name__}"):
        second.bind(3)
    assert first(torch.zeros(1, dtype=torch.long) if isinstance(network, Table) else torch.zeros(1, 5)).event_shape == (
        3,
    )


def test_one_recipe_in_two_roles_of_a_vae_is_refused() -> None:
    network = MLP(hidden=[4])
    with pytest.raises(ValueError, match=r"network of its own.*copy\.deepcopy before it is built"):
        VAE(Conditional(StandardNormal(2)), Conditional(Bernoulli(5), network), Conditional(Normal(2), network))
    network = MLP(hidden=[4])
    twin = copy.deepcopy(network)
    VAE(Conditional(StandardNormal(2)), Conditional(Bernoulli(5), network), Conditional(Normal(2), twin))


def test_one_learnable_prior_is_not_shared_unasked() -> None:
    network = Free()
    Conditional(Normal(3), network)
    with pytest.raises(ValueError, match="network of its own"):
        Conditional(Normal(3), network)


@pytest.mark.parametrize("family", [Normal, "Normal", None, nn.Linear(2, 2)], ids=["class", "name", "none", "module"])
def test_what_is_no_family_is_refused(family: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a family, such as Normal\(2\); got"):
        Conditional(family)


@pytest.mark.parametrize("network", [MLP, "MLP", 200, lambda x: x], ids=["class", "name", "number", "function"])
def test_what_is_no_network_is_refused(network: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a network, such as MLP\(hidden=\[200\]\), or any torch module; got"):
        Conditional(Normal(2), network)


# State ----------------------------------------------------------------------------------------------------------------


def test_state_dict_and_deepcopy_keep_the_answer() -> None:
    def make() -> Conditional:
        return Conditional(Normal(3, scale="feature"), MLP(hidden=[4]), context=5)

    first, second, x = make(), make(), torch.randn(6, 5)
    first.network.centre(torch.randn(5), torch.tensor(3.0))  # type: ignore[operator]
    nn.init.normal_(first.family.raw_scale)  # type: ignore[arg-type]
    y = torch.randn(6, 3)
    assert not torch.equal(first(x).log_prob(y), second(x).log_prob(y))
    second.load_state_dict(first.state_dict(), strict=True)
    third = copy.deepcopy(first)
    assert torch.equal(first(x).log_prob(y), second(x).log_prob(y))
    assert torch.equal(first(x).log_prob(y), third(x).log_prob(y))
    nn.init.zeros_(third.network.layers[-1].weight)  # type: ignore[union-attr, index, arg-type]
    assert not torch.equal(first(x).log_prob(y), third(x).log_prob(y))


def test_the_exact_posterior_asks_for_a_context_of_its_own() -> None:
    prior = Conditional(StandardNormal(2))
    likelihood = Conditional(Normal(5, scale="shared"), Linear(), context=2)
    posterior = Conditional(ExactNormal(prior, likelihood), context=5)
    assert not list(posterior.parameters())
    d: Any = posterior(torch.randn(3, 4, 5))
    assert (d.batch_shape, d.event_shape) == ((3, 4), (2,))
