"""Products of captured graphs by oneDNN against `mm`: which are taken, and that they are the same to rounding."""

from typing import Any

import pytest
import torch
from pyro.distributions import Bernoulli
from torch import Tensor

from ppl_vae.programs import products
from ppl_vae.programs.capture import record

ZEN = {"Zen 4": ("AuthenticAMD", 25), "Zen 5": ("AuthenticAMD", 26)}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32)


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix by rows, by columns, or as a part of a larger one."""
    if layout == "part":
        return torch.randn(rows, columns + 3, dtype=dtype)[:, 1:-2]
    return torch.randn(columns, rows, dtype=dtype).T if layout == "columns" else torch.randn(rows, columns, dtype=dtype)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


def recorded(given: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, list[str]]:
    """What a captured product gives at other numbers, and the names of its operations."""
    graph = record(lambda *args: (product(*args),), given, **options)
    with torch.no_grad():
        answer = graph(*given)[0]
    return answer, [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("zen", ZEN)
@pytest.mark.parametrize("left", ["rows", "columns"])
@pytest.mark.parametrize("right", ["rows", "columns"])
@pytest.mark.parametrize("biased", [False, True])
def test_large_products_on_amd_are_equal_to_rounding(zen, left, right, biased, monkeypatch):
    monkeypatch.setattr(products, "processor", lambda: ZEN[zen])
    given = matrix(128, 300, left), matrix(300, 260, right), *([noise(260)] if biased else [])
    answer, names = recorded(given)
    torch.testing.assert_close(answer.double(), product(*(one.double() for one in given)), rtol=1e-5, atol=1e-4)
    assert ("product" in names) == (left == "rows" or zen == "Zen 5")


STAYING: dict[str, tuple[Tensor, ...]] = {
    "small": (matrix(100, 64, "rows"), matrix(64, 200, "rows")),
    "double": (matrix(128, 300, "rows", torch.float64), matrix(300, 260, "rows", torch.float64)),
    "part": (matrix(128, 300, "part"), matrix(300, 260, "rows")),
    "expanded": (noise(1, 300).expand(128, 300), matrix(300, 260, "rows")),
    "empty": (noise(0, 4000), noise(4000, 4000)),
}


@pytest.mark.parametrize("name", STAYING)
def test_all_others_are_left_as_they_are(name, monkeypatch):
    monkeypatch.setattr(products, "processor", lambda: ("AuthenticAMD", 26))
    answer, names = recorded(STAYING[name])
    assert "product" not in names
    assert torch.equal(answer, product(*STAYING[name]))


@pytest.mark.parametrize("processor", [("GenuineIntel", 6), ("", 0)])
def test_other_processors_and_exact_graphs_keep_mkl(processor, monkeypatch):
    given = matrix(128, 300, "rows"), matrix(300, 260, "rows")
    monkeypatch.setattr(products, "processor", lambda: ("AuthenticAMD", 26))
    assert recorded(given, exact=True)[1] == ["mm"]
    monkeypatch.setattr(products, "processor", lambda: processor)
    assert recorded(given)[1] == ["mm"]


def test_a_bias_that_skips_entries_counts_as_it_is(monkeypatch):
    """oneDNN takes the wrong numbers of such a bias without a word."""
    monkeypatch.setattr(products, "processor", lambda: ("AuthenticAMD", 26))
    given = matrix(128, 300, "rows"), matrix(300, 260, "rows"), noise(520)[::2]
    answer, names = recorded(given)
    assert "product" in names
    torch.testing.assert_close(answer, product(*given), rtol=1e-5, atol=1e-4)


def test_in_lower_precision_products_are_rounded_to_it():
    given = matrix(128, 300, "rows"), matrix(300, 260, "rows"), noise(260)
    answer, names = recorded(given, precision=torch.bfloat16)
    assert "product" in names
    error = (answer - product(*given)).std() / product(*given).std()
    assert 1e-4 < error < 2**-7
    assert answer.dtype == torch.float32


def likelihood(h: Tensor, w: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Bernoulli log probabilities of (n, x) by the logits of particles, (k, n, h)."""
    logits = torch.nn.functional.linear(h, w, bias)
    return (Bernoulli(logits=logits, validate_args=False).to_event(1).log_prob(x),)


def shown(graph: Any) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("processor", [("AuthenticAMD", 26), ("GenuineIntel", 6)])
@pytest.mark.parametrize(("k", "n", "hidden", "features"), [(60, 50, 20, 160), (7, 3, 4, 9), (1, 5, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_bernoulli_likelihoods_keep_no_logits(processor, k, n, hidden, features, dtype, size, monkeypatch):
    """Far-out logits too, of which those that are right add nothing."""
    monkeypatch.setattr(products, "processor", lambda: processor)
    monkeypatch.setattr(products, "_CHUNK", 20_000)
    h, w = torch.randn(k, n, hidden, dtype=dtype), torch.randn(features, hidden, dtype=dtype)
    bias, x = size * torch.randn(features, dtype=dtype), (torch.rand(n, features) < 0.3).to(dtype)
    x[0] = (bias > 0).to(dtype)
    graph = record(lambda *args: likelihood(*args), [h, w, bias, x])
    assert "bernoulli" in shown(graph)
    assert "binary_cross_entropy_with_logits" not in shown(graph)
    with torch.no_grad():
        answer, wanted = graph(h, w, bias, x)[0], likelihood(*(one.double() for one in (h, w, bias, x)))[0]
    torch.testing.assert_close(answer.double(), wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-6)


def test_logits_that_are_needed_are_kept():
    def gives(h: Tensor, w: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        logits = torch.nn.functional.linear(h, w, bias)
        return Bernoulli(logits=logits, validate_args=False).to_event(1).log_prob(x), logits

    given = noise(4, 3, 5), noise(6, 5), noise(6), (noise(3, 6) > 0).float()
    graph = record(lambda *args: gives(*args), given)
    assert "bernoulli" not in shown(graph)
    with torch.no_grad():
        for one, other in zip(graph(*given), gives(*given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("after", [torch.tanh, torch.relu, torch.sigmoid])
@pytest.mark.parametrize("alone", [True, False])
def test_what_follows_a_product_is_done_with_it(after, alone, monkeypatch):
    monkeypatch.setattr(products, "processor", lambda: ("AuthenticAMD", 26))

    def layer(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        made = (a @ b).view(8, 16, 260)
        return after(made), (made if alone else made + 1).sum() if not alone else a.sum()

    given = matrix(128, 300, "rows"), matrix(300, 260, "rows")
    graph = record(lambda *args: layer(*args), given)
    fused = alone and after is not torch.sigmoid
    assert (after.__name__ not in shown(graph) and "sigmoid" not in shown(graph)) == fused
    with torch.no_grad():
        for one, other in zip(graph(*given), layer(*given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_this_processor_is_known_or_nothing_is_said_of_it():
    vendor, family = products.processor()
    assert (vendor in ("AuthenticAMD", "GenuineIntel") and family > 0) or (vendor, family) == ("", 0)
