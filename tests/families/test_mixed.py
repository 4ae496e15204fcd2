"""Mixed tables: the sum of the columns' own densities, whatever their order."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import constraints

from ppl_vae.data import Columns
from ppl_vae.families import Bernoulli, Conditional, FullNormal, Mixed, MixtureNormal, Normal
from ppl_vae.networks import Linear

COLUMNS = Columns(5, names=("a", "b", "c", "d", "e"), kinds=("real", "binary", "real", "binary", "real"))
OWN = {"family": "Normal", "scale": "feature"}
KINDS = {"a": "Normal", "b": "Bernoulli", "c": OWN, "d": "Bernoulli", "e": "Normal"}


def softplus(raw):
    return np.logaddexp(0, raw) + 1e-6


def test_the_density_is_the_sum_of_scipys():
    family = Mixed(5, COLUMNS, kinds=KINDS)
    raw, x = torch.randn(7, family.start().numel()), torch.randn(7, 5)
    x[:, [1, 3]] = (x[:, [1, 3]] > 0).double()
    p, v = raw.numpy(), x.numpy()  # blocks: a and e, b and d, c
    own = softplus(family.parts[2].raw_scale.detach().numpy())
    wanted = (
        scipy.stats.norm.logpdf(v[:, [0, 4]], p[:, :2], softplus(p[:, 2:4])).sum(1)
        + scipy.stats.bernoulli.logpmf(v[:, [1, 3]], 1 / (1 + np.exp(-p[:, 4:6]))).sum(1)
        + scipy.stats.norm.logpdf(v[:, 2], p[:, 6], own)
    )
    np.testing.assert_allclose(family.distribution(raw).log_prob(x).detach().numpy(), wanted, rtol=1e-12)


def test_the_order_of_the_columns_does_not_matter():
    order = [3, 0, 4, 1, 2]
    moved = Columns(5, names=tuple("abcde"[j] for j in order))
    one, other = Mixed(5, COLUMNS, kinds=KINDS), Mixed(5, moved, kinds=KINDS)
    x = torch.randn(200, 5)
    x[:, [1, 3]] = (x[:, [1, 3]] > 0).double()
    a, b = one.distribution(one.fit_start(x)), other.distribution(other.fit_start(x[:, order]))
    torch.testing.assert_close(a.log_prob(x), b.log_prob(x[:, order]), rtol=1e-12, atol=0)
    torch.testing.assert_close(a.mean[order], b.mean)
    torch.testing.assert_close(a.variance[order], b.variance)


def test_draws_have_each_columns_own_law():
    family = Mixed(5, COLUMNS, kinds=KINDS)
    d = family.distribution(torch.randn(family.start().numel()))
    x = d.sample((20_000,))
    assert x.shape == (20_000, 5)
    assert bool(d.support.check(x).all())
    assert bool(((x.mean(0) - d.mean).abs() < 5 * (d.variance / 20_000).sqrt()).all())
    wide = d.expand([3])
    assert wide.sample((2,)).shape == (2, 3, 5)
    assert wide.batch_shape == (3,)


def test_masked_entries_do_not_count():
    family = Mixed(5, COLUMNS, kinds=KINDS)
    raw, x, seen = torch.randn(family.start().numel()), torch.randn(4, 5), torch.rand(4, 5) < 0.5
    x[:, [1, 3]] = (x[:, [1, 3]] > 0).double()
    hidden = torch.where(seen, x, torch.nan)
    whole = [
        sum(
            family.distribution(raw, torch.arange(5) == j).log_prob(row).item() for j in range(5) if keep[j]
        )
        for row, keep in zip(x, seen, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(family.distribution(raw, seen).log_prob(hidden).detach(), torch.tensor(whole))


def test_blocks_and_patterns():
    columns = Columns(4, names=("gene_1", "gene_2", "age", "sex"))
    family = Mixed(4, columns, kinds={"gene_*": "FullNormal", "age": "Normal", "sex": "Bernoulli"})
    assert [type(part) for part in family.parts] == [FullNormal, Normal, Bernoulli]
    assert family.blocks == [[0, 1], [2], [3]]
    assert family.encodings == ["standardise"] * 4
    unnamed = Mixed(2, Columns(2), kinds={"0": "Normal", "1": {"family": "MixtureNormal", "components": 3}})
    assert isinstance(unnamed.parts[1], MixtureNormal)
    assert unnamed.parts[1].components == 3


def test_the_support_tells_of_every_entry():
    family = Mixed(5, COLUMNS, kinds=KINDS)
    x = torch.tensor([[0.3, 1.0, -2.0, 0.5, 1.0]])
    assert family.support.check(x).tolist() == [[True, True, True, False, True]]
    assert family.support.discrete == (False, True, False, True, False)
    assert not family.support.is_discrete
    assert Mixed(1, Columns(1), kinds={"0": "Bernoulli"}).support.is_discrete
    assert isinstance(family.distribution(family.start()).support, constraints.independent)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"a": "Normal"}, "a family for each column; got none for 'b'"),
        (dict.fromkeys("abcdef", "Normal"), r"the name of a column in `kinds` \(a, b, c, d, e\); got 'f'"),
        (dict.fromkeys("abcde", "Norml"), "name of a family of columns in `kinds`, such as Normal; got 'Norml'"),
        (dict.fromkeys("abcde", "ExactNormal"), "such as Normal; got 'ExactNormal'"),
        (dict.fromkeys("abcde", {"family": "Normal", "scal": 1}), "keys of Normal in `kinds`; got the unknown scal"),
        (dict.fromkeys("abcde", {"family": "Normal", "scale": -1.0}), "`scale` to be network"),
    ],
)
def test_mistakes_in_kinds_are_named(kinds, message):
    with pytest.raises(ValueError, match=message):
        Mixed(5, COLUMNS, kinds=kinds)


def test_kinds_need_a_table_to_be_inferred():
    with pytest.raises(ValueError, match='whose kinds are known, for kinds = "infer": a table; got data of 3'):
        Mixed(3, Columns(3))
    with pytest.raises(ValueError, match="Expected 3 columns, as the data have; got 2"):
        Mixed(2, Columns(3), kinds={"*": "Normal"})


def test_maximum_likelihood_recovers_the_parameters_of_every_kind_of_column():
    """A table simulated from known regressions on one covariate; the errors are those of the observed information."""
    kinds = {
        "real": "Normal", "positive": "LogNormal", "rate": "Gamma", "unit": "Beta", "count": "Poisson",
        "spread": "NegativeBinomial", "binary": "Bernoulli", "category": "Categorical", "ordered": "OrderedCategorical",
    }  # fmt: skip
    levels = (0, 0, 0, 0, 0, 0, 2, 3, 4)
    torch.manual_seed(0)
    family = Mixed(9, Columns(9, names=tuple(kinds), levels=levels), kinds=kinds)
    part = Conditional(family, Linear(), context=1)
    c, names = torch.randn(4000, 1), dict(part.named_parameters())
    with torch.no_grad():
        for value in names.values():
            value.add_(0.3 * torch.randn_like(value))
        part.network.bias[-1] = 0.0  # the ordered column's, which its cutpoints already hold
        part.network.bias[-2] = part.network.weight[-2] = 0.0  # the last logit of three
        truth = {name: value.clone() for name, value in names.items()}
        x = part(c).sample()

    free = {name: torch.ones_like(value, dtype=torch.bool) for name, value in names.items()}
    free["network.bias"][-2:] = free["network.weight"][-2] = False
    widths = [len(free[name][free[name]]) for name in names]

    def loss(flat):
        parts = dict(zip(names, flat.split(widths), strict=True))
        at = {name: truth[name].masked_scatter(free[name], parts[name]) for name in names}
        return -torch.func.functional_call(part, at, (c,)).log_prob(x).sum()

    flat = torch.cat([truth[name][free[name]] for name in names]).requires_grad_()
    start = flat.detach().clone()
    optimizer = torch.optim.LBFGS([flat], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure():
        optimizer.zero_grad()
        value = loss(flat)
        value.backward()
        return value

    optimizer.step(closure)
    information = torch.autograd.functional.hessian(loss, flat.detach())
    z = (flat.detach() - start) / torch.linalg.inv(information).diagonal().sqrt()
    assert z.abs().max() < 5
    assert 0.5 < z.square().mean() < 2
    wrong = start + 0.2
    assert ((flat.detach() - wrong) / torch.linalg.inv(information).diagonal().sqrt()).abs().max() > 5
