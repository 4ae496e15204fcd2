"""The latent explorer: what its page decodes is what torch decodes, and it follows mouse, sliders and keys."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ppl_vae import VAE, Conditional, exact_posterior
from ppl_vae.data import load
from ppl_vae.families import (
    Bernoulli,
    ContinuousBernoulli,
    Flow,
    FullNormal,
    HypersphericalUniform,
    Mixed,
    Normal,
    StandardNormal,
    VonMisesFisher,
)
from ppl_vae.networks import MLP, Conv, GatedMLP, Linear, ResidualConv
from ppl_vae.networks.mlp import ACTIVATIONS
from ppl_vae.programs.given import Given
from ppl_vae.programs.program import load_program
from ppl_vae.reports import explorer_page

MODELS = Path(__file__).parents[2] / "models"
DIGITS, WINE = load("digits", scaling="unit"), load("wine", scaling="standardize")


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


@pytest.fixture
def show(page, tmp_path):
    """Open the explorer of a program, and give the page."""

    def opened(program, data, **more):
        (tmp_path / "page.html").write_text(explorer_page(program, data, title="a run"), encoding="utf-8")
        page.errors.clear()
        page.open(tmp_path / "page.html", **more)
        page.wait("window.explorer")
        assert page.errors == []
        return page

    return opened


def normal(n):
    return Normal(n, scale="shared")


def vae(data, likelihood, network, latents=3, **more):
    event = data.features
    own = likelihood(event) if not isinstance(likelihood, nn.Module) else likelihood
    posterior = Conditional(Normal(latents), MLP(hidden=[8]))
    made = VAE(Conditional(StandardNormal(latents)), Conditional(own, network), posterior, **more)
    return made.initialise(data.train)


def decoded(program, z, batch=None):
    """The mean of p(x|z) in double precision."""
    twin = copy.deepcopy(program).double().eval()
    with torch.no_grad():
        return twin.likelihood(z, *twin.context("likelihood", batch or {})).mean.flatten(1).numpy()


def in_page(page, z, given=0):
    found = page(f"{json.dumps(z.tolist())}.map(z => [...explorer.decode(z, {given}).mean])")
    return np.array(found, dtype=float)


def own_network():
    return nn.Sequential(nn.Linear(3, 9), nn.GELU(), nn.Linear(9, 64))


PICTURES = {
    "linear": (normal, Linear),
    "own": (normal, own_network),
    "gated": (ContinuousBernoulli, lambda: GatedMLP(hidden=[7, 6])),
    "conv": (normal, lambda: Conv((8, 8), channels=[3, 5], hidden=[6])),
    "residual": (Bernoulli, lambda: ResidualConv((8, 8), channels=[2, 3], hidden=[6], activation="silu")),
    "layers": (Bernoulli, lambda: MLP(hidden=[9, 9], normalization="layer", residual=True, dropout=0.3)),
    **{name: (Bernoulli, lambda name=name: MLP(hidden=[7], activation=name)) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_page_decodes_as_torch_does(name, show):
    likelihood, network = PICTURES[name]
    data = load("digits", scaling="unit", binarization="static") if likelihood is Bernoulli else DIGITS
    program, z = vae(data, likelihood, network()), 2 * torch.randn(6, 3, dtype=torch.float64)
    page = show(program, data)
    truth = decoded(program, z)
    assert np.abs(truth - truth.mean(0)).max() > 1e-3  # else any decoder would do
    assert np.abs(in_page(page, z) - truth).max() < 1e-5 * data.train["x"].std().item()
    assert page("document.querySelector('[data-testid=how]').textContent") == "The decoder runs in this page."


@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 5)])
def test_pictures_of_odd_sides_and_colours(shape, show, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((40, *shape)).astype(np.float32))
    data = load(tmp_path / "a.npy")
    program, z = vae(data, Normal, Conv(shape, channels=[4, 3], kernel=5, hidden=[])), torch.randn(4, 3).double()
    page = show(program, data)
    assert np.abs(in_page(page, z) - decoded(program, z)).max() < 1e-5 * data.train["x"].std().item()
    size = page("(c => [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, 1, 1).data])"
                "(document.querySelector('#picture'))")  # fmt: skip
    assert size[:2] == list(shape[-2:])
    mean = in_page(page, torch.tensor([page("[...explorer.state.z]")]).double())[0].reshape(-1, *shape[-2:])
    first = mean[[0, 1, 2] if len(shape) == 3 else [0, 0, 0], 0, 0]
    assert size[2:5] == pytest.approx((255 * first).clip(0, 255), abs=1)


KINDS = {
    "a": "Normal", "b": "LogNormal", "c": "Gamma", "d": "Beta", "e": "NegativeBinomial", "f": "ZeroInflatedPoisson",
    "g": "Poisson", "h": {"family": "Binomial", "trials": 9}, "i": "Categorical", "j": "OrderedCategorical",
    "k": {"family": "StudentT", "df": 4.0}, "l": "Laplace", "m": "Logistic", "n": "Bernoulli",
    "o": "ZeroInflatedNegativeBinomial",
}  # fmt: skip


def table(tmp_path, names=tuple(KINDS)):
    """A table with a column for each family of `KINDS`, under other names."""
    draw = np.random.default_rng(0)
    real, positive, counts = draw.normal(3, 2, (60, 4)), draw.gamma(2, 3, (60, 2)), draw.poisson(3, (60, 5))
    columns = [real[:, 0], *positive.T, draw.beta(2, 3, 60), *counts[:, :3].T, counts[:, 3].clip(0, 9)]
    columns += [draw.choice(["red", "<b>green</b>", "blue"], 60), draw.integers(0, 4, 60)]
    columns += [*real[:, 1:].T, draw.integers(0, 2, 60), counts[:, 4]]
    lines = [",".join(names), *(",".join(map(str, row)) for row in zip(*columns, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return load(tmp_path / "t.csv", label=None, categories=[names[9]], scaling="none")


def test_mixed_columns_in_their_own_units_and_words(show, tmp_path):
    names = ("<img src=x onerror=alert(1)>", "</script><b>", *list(KINDS)[2:])
    data = table(tmp_path, names)
    kinds = dict(zip(names, KINDS.values(), strict=True))
    program, z = vae(data, Mixed(15, data.columns, kinds=kinds), MLP(hidden=[9])), torch.randn(5, 3).double()
    page = show(program, data)
    spread = data.train["x"].std(0).numpy()
    truth = decoded(program, z)
    assert (np.abs(in_page(page, z) - truth) < 1e-5 * spread).all()
    shown = page("[...document.querySelectorAll('#table tbody th')].map(one => one.textContent)")
    assert shown == list(names)
    assert page("document.querySelectorAll('img, b').length") == 0
    page("explorer.choose(2)")
    row = page("[...document.querySelectorAll('#table tbody tr')].map(r => r.children[2].textContent)")
    raw = data.to_table(data.test["x"], "test").iloc[2]
    assert row[8] == raw[names[8]]
    assert float(row[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(raw[names[0]], rel=1e-3)
    word = page("document.querySelectorAll('#table tbody tr')[8].children[1].textContent")
    assert word in ("red", "<b>green</b>", "blue")


def test_missing_cells_are_shown_as_such(show, tmp_path):
    lines = ["a,b", *(f"{k % 7}.5,{'' if k % 3 == 0 else ('x', 'y')[k % 2]}" for k in range(40))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    data = load(tmp_path / "t.csv", missing="model")
    page = show(vae(data, Mixed(2, data.columns), MLP(hidden=[4]), latents=2), data)
    missing = int((~data.test["mask"][:, 1]).nonzero()[0])
    page(f"explorer.choose({missing})")
    row = page("[...document.querySelectorAll('#table tbody tr')].map(r => [...r.children].map(c => c.textContent))")
    assert row[1][2] == "–"
    assert row[1][1] in ("x", "y")
    assert float(row[0][2]) == pytest.approx(data.test["x"][missing, 0].item(), rel=1e-3)


def test_standardised_columns_are_shown_in_their_own_units(show):
    program = vae(WINE, normal, Linear(), latents=2)
    page = show(program, WINE)
    page("explorer.choose(0)")
    rows = page("[...document.querySelectorAll('#table tbody tr')].map(r => [...r.children].map(c => c.textContent))")
    mean = np.array(page("[...explorer.state.mean]"))[None]
    table = WINE.to_table(torch.from_numpy(np.concatenate([mean, WINE.test["x"][:1].numpy()])))
    for name, one, two, _ in rows:
        values = [float(cell.replace("\N{MINUS SIGN}", "-")) for cell in (one, two)]
        assert values == pytest.approx(table[name].tolist(), rel=1e-3, abs=1e-3)


def test_posteriors_of_the_datum_chosen(show):
    program = vae(WINE, normal, Linear(), latents=2)
    page = show(program, WINE)
    exact = exact_posterior(program, WINE.test)
    rows, columns = torch.tril_indices(2, 2)
    found = page("['exact', 'q'].map(k => ['mean', 'covariance'].map(m => [...explorer.block(explorer.page[k][m])]))")
    assert found[0][0] == pytest.approx(exact.mean.flatten().tolist(), abs=1e-4)
    assert found[0][1] == pytest.approx(exact.covariance_matrix[:, rows, columns].flatten().tolist(), abs=1e-4)
    with torch.no_grad():
        q = program.approximate(WINE.test["x"])
    assert found[1][0] == pytest.approx(q.mean.flatten().tolist(), abs=1e-4)
    assert found[1][1][::3] == pytest.approx(q.variance[:, 0].tolist(), rel=1e-3)
    page("explorer.choose(1)")
    both = page.pixels("#plane")
    page("document.querySelector('#show-exact').click()")
    assert (page.pixels("#plane") != both).any()
    program = vae(DIGITS, normal, MLP(hidden=[4]))
    assert show(program, DIGITS)("explorer.page.exact === null")
    assert page("document.querySelector('#exact-label').hidden")


def test_it_follows_mouse_sliders_and_keys(show):
    page = show(vae(DIGITS, normal, MLP(hidden=[9], activation="relu")), DIGITS)
    before, plane = page.pixels("#picture"), page.pixels("#plane")

    def changed(what):
        nonlocal before, plane
        now, there = page.pixels("#picture"), page.pixels("#plane")
        assert (now != before).any(), what
        assert (there != plane).any() == (what != "given"), what
        before, plane = now, there

    x, y, wide = page("(b => [b.x, b.y, b.width])(document.querySelector('#plane').getBoundingClientRect())")
    page.mouse("mousePressed", x + wide / 2, y + wide / 2)
    page.mouse("mouseMoved", x + wide / 4, y + wide / 4)
    page.mouse("mouseMoved", x + 0.8 * wide, y + 0.3 * wide)
    page.mouse("mouseReleased", x + 0.8 * wide, y + 0.3 * wide)
    a, b = page("explorer.state.axes")
    z = page("[...explorer.state.z]")
    assert page(f"[explorer.px({z[a]}), explorer.py({z[b]})]") == pytest.approx([0.8 * wide, 0.3 * wide], abs=1.1)
    changed("drag")
    page.key("ArrowLeft")
    assert page("explorer.state.z[explorer.state.axes[0]]") < z[a]
    changed("key")
    page.key("ArrowUp", shift=True)
    changed("keys")
    third = ({0, 1, 2} - {a, b}).pop()
    page(f"(s => {{ s.value = 2; s.dispatchEvent(new Event('input')); }})"
         f"(document.querySelector('[data-testid=slider-{third}]'))")  # fmt: skip
    assert page(f"explorer.state.z[{third}]") == 2
    assert (page.pixels("#picture") != before).any()
    before = page.pixels("#picture")
    page.key("n")
    assert page("explorer.state.datum") == 0
    assert page("[...explorer.state.z]") == page("[...explorer.code(0)]")
    assert page("document.querySelector('#datum').value") == "0"  # data are counted from 0, as rows of a report are
    changed("choice")
    page(f"(s => {{ s.value = {third}; s.dispatchEvent(new Event('change')); }})(document.querySelector('#across'))")
    assert page("explorer.state.axes[0]") == third
    assert (page.pixels("#plane") != plane).any()
    page.key("Home")
    page.wait("document.querySelector('#play').click() || explorer.state.playing")
    page.wait("Number(document.querySelector('#way').value) > 0.05")
    page("document.querySelector('#play').click()")
    t = page("Number(document.querySelector('#way').value)")
    ends = page("['from', 'to'].map(name => +document.querySelector('#' + name).value)")
    one, two = page(f"{ends}.map(i => [...explorer.code(i)])")
    assert ends == [0, 1]
    assert page("[...explorer.state.z]") == pytest.approx([(1 - t) * u + t * v for u, v in zip(one, two, strict=True)])
    a, b = page("explorer.state.axes")
    place = page(f"[explorer.px(explorer.code(5)[{a}]), explorer.py(explorer.code(5)[{b}])]")
    x, y = page("(b => [b.x, b.y])(document.querySelector('#plane').getBoundingClientRect())")
    page.mouse("mousePressed", x + place[0], y + place[1])
    page.mouse("mouseReleased", x + place[0], y + place[1])
    assert page("explorer.state.datum") >= 0
    assert page.errors == []


def test_a_great_circle_keeps_the_length_between(show):
    page = show(vae(DIGITS, normal, Linear()), DIGITS)
    page("document.querySelector('#path').value = 'circle'")
    lengths = page("[0, 0.5, 1].map(t => Math.hypot(...explorer.between(t)))")
    assert lengths[1] == pytest.approx((lengths[0] + lengths[2]) / 2)
    page("document.querySelector('#path').value = 'line'")
    assert page("Math.hypot(...explorer.between(0.5))") < lengths[1]


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_page(width, dark, show):
    page = show(vae(WINE, normal, Linear()), WINE, width=width, dark=dark)
    assert page("document.documentElement.scrollWidth") <= width
    ground = page.pixels("header")[..., :3].mean()
    assert (ground < 0.3) == dark


def test_labels_that_the_model_is_given(show):
    program = vae(DIGITS, normal, MLP(hidden=[9]), given=Given(y=10))
    page = show(program, DIGITS)
    z = torch.randn(2, 3).double()
    for label in (0, 7):
        truth = decoded(program, z, {"y": torch.full((2,), label)})
        assert np.abs(in_page(page, z, label) - truth).max() < 1e-5 * DIGITS.train["x"].std().item()
    assert np.abs(in_page(page, z, 0) - in_page(page, z, 7)).max() > 1e-3
    page("explorer.choose(3)")
    assert page("explorer.state.given") == int(DIGITS.test["y"][3])


def grid_means(page):
    """Each point of the page's grid with its mean."""
    at, axes, rest, flat = page("[explorer.page.grid.at, explorer.page.grid.axes, explorer.page.grid.rest, "
                                "[...explorer.block(explorer.page.grid.mean)]]")  # fmt: skip
    points = torch.tensor(rest).repeat(len(at[0]) * len(at[-1]), 1).double()
    points[:, axes] = torch.cartesian_prod(*(torch.tensor(tick).double() for tick in at))
    return points, np.array(flat).reshape(len(points), -1)


def test_another_decoder_is_a_grid_and_labelled_so(show):
    program = vae(WINE, FullNormal, MLP(hidden=[5]))
    page = show(program, WINE)
    assert "nearest of 1,681 points decoded beforehand, the other" in page("document.querySelector('#how').textContent")
    assert page("document.querySelector('#sliders-box').hidden")
    points, means = grid_means(page)
    assert np.abs(means - decoded(program, points)).max() < 1e-5
    page("explorer.move([0.3, 0.1, 5])")
    z = page("[...explorer.state.z]")
    row = (points - torch.tensor(z)).norm(dim=1).argmin()
    assert page("[...explorer.state.mean]") == pytest.approx(means[row].tolist(), abs=1e-6)


def test_a_program_of_ones_own(show):
    program = load_program(str(MODELS / "vae.py"))(64, 2, hidden=8)
    page = show(program, load("digits", scaling="unit", binarization="static"))
    assert "decoded beforehand." in page("document.querySelector('#how').textContent")
    before = page.pixels("#picture")
    page("explorer.choose(4)")
    assert (page.pixels("#picture") != before).any()


@pytest.mark.parametrize(("prior", "posterior"), [(HypersphericalUniform, VonMisesFisher), (StandardNormal, None)])
def test_latents_on_a_sphere_and_guides_without_moments(prior, posterior, show):
    guide = Conditional(posterior(3) if posterior else Flow(3, kind="coupling"), MLP(hidden=[8]))
    program = VAE(Conditional(prior(3)), Conditional(normal(13), MLP(hidden=[8])), guide).initialise(WINE.train["x"])
    page = show(program, WINE)
    page("explorer.choose(2)")
    page("explorer.move([3, 1, 2])")
    length = page("Math.hypot(...explorer.state.z)")
    assert length == pytest.approx(1 if posterior else 14**0.5)
    if posterior is None:
        assert "by its covariance" in page("document.querySelector('#legend').textContent")


def test_one_latent_and_many_data(show, tmp_path):
    np.save(tmp_path / "many.npy", np.random.default_rng(0).normal(size=(12_000, 2)).astype(np.float32))
    data = load(tmp_path / "many.npy", test_fraction=0.9)
    page = show(vae(data, normal, Linear(), latents=1), data)
    assert page("[explorer.page.n, explorer.page.all, explorer.page.few]") == [10_000, 10_800, 500]
    assert "10,000 of 10,800 held-out data in 1 latent." in page("document.querySelector('#about').textContent")
    page("explorer.choose(3)")
    before = page.pixels("#plane")
    page("document.querySelector('#plane').focus()")
    page.key("ArrowRight")
    assert (page.pixels("#plane") != before).any()


def test_a_sequence_is_a_line_in_the_units_of_the_data(show, tmp_path):
    np.save(tmp_path / "waves.npy", 50 + np.sin(np.linspace(0, 6, 20)) * np.random.default_rng(0).normal(size=(40, 1)))
    data = load(tmp_path / "waves.npy", scaling="standardize")
    page = show(vae(data, normal, Linear()), data)
    assert page("[document.querySelector('#curve').hidden, document.querySelector('#table').hidden]") == [False, True]
    alone = page.pixels("#curve")
    page("explorer.choose(3)")
    assert (page.pixels("#curve") != alone).any(-1).sum() > 100  # the datum beside it


def test_the_page_is_alone(tmp_path):
    text = explorer_page(vae(DIGITS, normal, Linear()), DIGITS, title="<i>name</i>")
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"<(link|img|iframe|script src)", text)
    assert "<i>" not in text
    assert "default-src 'none'" in text


def test_what_has_no_latent_space_is_refused():
    schools = load(MODELS / "eight_schools.csv", test_fraction=0.0).with_entries(["y", "error"])
    with pytest.raises(ValueError, match="whole data set counts as one"):
        explorer_page(load_program(str(MODELS / "eight_schools.py"))(), schools, title="")
    with pytest.raises(ValueError, match="Expected continuous latent variables alone"):
        explorer_page(load_program(str(MODELS / "mixture.py"))(4), load("iris"), title="")
