"""Encodings: what a guide sees of the columns of a table."""

import numpy as np
import pytest
import torch
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from ppl_vae import Conditional
from ppl_vae.families import Normal
from ppl_vae.networks import MLP, Conv, Encoding, Linear


def table(n=50, seed=0):
    rng = np.random.default_rng(seed)
    columns = [rng.normal(7, 3, n), rng.integers(0, 4, n), rng.poisson(5, n), rng.lognormal(size=n), rng.normal(size=n)]
    return np.stack([np.asarray(column, float) for column in columns], 1)


def encoding():
    return Encoding(["standardise", "one-hot", "log1p", "log", "plain"], [0, 4, 0, 0, 0])


def test_columns_are_encoded_as_scikit_learn_does():
    x = table()
    ours = encoding()
    ours.fit(torch.from_numpy(x))
    encoded, _ = ours(torch.from_numpy(x))
    scaled = StandardScaler().fit_transform(np.stack([x[:, 0], np.log1p(x[:, 2]), np.log(x[:, 3])], 1))
    hot = OneHotEncoder(categories=[range(4)], sparse_output=False).fit_transform(x[:, 1:2])
    wanted = np.concatenate([scaled[:, :1], hot, scaled[:, 1:], x[:, 4:]], 1)
    np.testing.assert_allclose(encoded.numpy(), wanted, rtol=1e-10, atol=1e-12)


def test_a_mask_hides_every_column_of_an_entry_and_its_moments():
    x = torch.from_numpy(table())
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    ours = encoding()
    ours.fit(torch.where(seen, x, torch.nan), seen)
    assert ours.shift[0].item() == pytest.approx(x[seen[:, 0], 0].mean().item())
    assert ours.scale[0].item() == pytest.approx(x[seen[:, 0], 0].std(correction=0).item())
    encoded, observed = ours(x.reshape(2, 25, 5), seen.reshape(2, 25, 5))
    assert encoded.shape == observed.shape == (2, 25, 8)
    assert torch.equal(observed[..., 1:5], seen.reshape(2, 25, 5)[..., 1:2].expand(2, 25, 4))


def test_a_network_on_an_encoding_is_the_network_on_the_encoded_columns():
    x, plain = torch.from_numpy(table()), Conditional(Normal(2), Linear(), context=8)
    whole = Conditional(Normal(2), Linear(), context=5, encoding=encoding())
    whole.network.load_state_dict(plain.network.state_dict())
    whole.encoding.fit(x)
    torch.testing.assert_close(whole.unconstrained(x), plain.unconstrained(whole.encoding(x)[0]), rtol=0, atol=0)
    hidden = torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(whole.unconstrained(x * torch.nan, observed=hidden)[0], whole.network.bias)


def test_gradients_pass_between_codes():
    x = torch.tensor([[1.25]], requires_grad=True)
    encoded = Encoding(["one-hot"], [3])(x)[0]
    assert encoded.tolist() == [[0.0, 0.75, 0.25]]
    (gradient,) = torch.autograd.grad(encoded[0, 2], x)
    assert gradient.item() == 1


def test_a_constant_column_stays_finite():
    ours = Encoding(["standardise", "log"])
    ours.fit(torch.full((5, 2), 3.0))
    assert ours(torch.full((1, 2), 3.0))[0].tolist() == [[0.0, 0.0]]


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match=r"`encoding` to be one of 'plain', .*; got 'hot'"):
        Encoding(["hot"])
    with pytest.raises(ValueError, match="codes 0, 1, ... in column 1, for a one-hot encoding"):
        Encoding(["plain", "one-hot"], [0, 0])
    with pytest.raises(ValueError, match="an encoding of 4 columns, as the context has; got 5"):
        Conditional(Normal(2), MLP(hidden=[3]), context=4, encoding=encoding())


def test_a_network_of_pictures_takes_no_one_hot_columns():
    with pytest.raises(ValueError, match="keeps a picture's shape, for Conv; got one-hot"):
        Conditional(Normal(2), Conv((2, 2)), context=4, encoding=Encoding(["one-hot"] * 4, [3] * 4))
    part = Conditional(Normal(2), Conv((2, 2)), context=4, encoding=Encoding(["log1p"] * 4))
    assert part(torch.ones(5, 4)).batch_shape == (5,)


def test_indicators_tell_a_missing_entry_from_an_average_one() -> None:
    encoding = Encoding(["standardise", "one-hot", "plain"], [0, 2, 0], indicators=[0, 1])
    x = torch.tensor([[1.0, 1.0, 3.0], [3.0, 0.0, 4.0], [np.nan] * 3])
    mask = torch.tensor([[True] * 3, [True] * 3, [False] * 3])
    encoding.fit(x, mask)
    encoded, observed = encoding(x, mask)
    assert observed is None
    expected = [[-1.0, 0.0, 1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    torch.testing.assert_close(encoded, torch.tensor(expected))
    assert encoding.size == 6
    average = torch.tensor([[2.0, 0.5, 0.0]])  # which is 0 too, but for the indicators
    assert not torch.equal(encoding(average)[0], encoded[2:])
    torch.testing.assert_close(encoding(x[:2])[0], encoded[:2])
