"""Matrix products of captured graphs: which library of PyTorch's CPU build takes each, and what is fused with them."""

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

_LEAST = 2**23  # multiplications, from which on oneDNN repays its call
_CHUNK = 2**19  # logits that are held at once
_FACTORS = 16  # whose logarithms are taken together
_LIBRARY = torch.library.Library("ppl_vae", "FRAGMENT")  # its operators last as long as this object
_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias, ScalarType? precision, str after='none') -> Tensor")
_LIBRARY.define("bernoulli(Tensor a, Tensor b, Tensor? bias, ScalarType? precision, Tensor x, int[] size) -> Tensor")
aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_AFTER = {aten.tanh.default: "tanh", aten.relu.default: "relu"}


def _product(a: Tensor, b: Tensor, bias: Tensor | None, precision: torch.dtype | None, after: str = "none") -> Tensor:
    """The product a b, plus a bias, by oneDNN in a precision, or else by `mm`."""
    if precision is None:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    bias = None if bias is None else bias.to(precision).contiguous()  # of others oneDNN takes the wrong numbers
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a.to(precision), b.t().to(precision), bias, after, [], "")
    return out.to(a.dtype)


def _bernoulli(
    a: Tensor, b: Tensor, bias: Tensor | None, precision: torch.dtype | None, x: Tensor, size: list[int]
) -> Tensor:
    r"""Log probability of x, summed over its last dim, under Bernoulli distributions whose logits are a product.

    With logits l it is :math:`\sum_j x_j l_j - \max(l_j, 0) + \log \sigma(|l_j|)`; the logarithms are taken of products
    of `_FACTORS` factors, each between 1/2 and 1. Few logits are held at once.
    """
    out = a.new_empty(size[:-1])
    rows = len(a) // size[0]
    step = max(1, _CHUNK // (rows * size[-1]))
    groups = size[-1]
    while groups % 2 == 0 and size[-1] // groups < _FACTORS:
        groups //= 2
    for start in range(0, size[0], step):
        logits = _product(a[start * rows : (start + step) * rows], b, bias, precision).view(-1, *size[1:])
        own = x[start : start + step] if x.dim() == len(size) and len(x) > 1 else x
        linear = logits.clamp_min(0).addcmul_(logits, own, value=-1).sum(-1)
        factors = logits.abs_().sigmoid_()
        while (width := factors.shape[-1] // 2) >= groups:
            factors = factors[..., :width] * factors[..., width:]
        out[start : start + step] = factors.log_().sum(-1).sub_(linear)
    return out


def _shape_of_product(a: Tensor, b: Tensor, *others: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_LIBRARY.impl("product", _product, "CPU")
_LIBRARY.impl("product", _shape_of_product, "Meta")
_LIBRARY.impl("bernoulli", _bernoulli, "CPU")


def faster(node: Node, value: dict[Node, Any], precision: torch.dtype = torch.float32) -> Node:
    """A node that takes the place of `node` with a product by the faster library, or the node itself.

    A large product takes oneDNN where that is faster, or where it rounds its factors to a lower precision, and does a
    tanh or relu that follows too. Where a sum over Bernoulli log probabilities follows, the logits are not kept.

    Args:
        node: any node of a graph on the CPU, whose earlier nodes have been seen to.
        value: of each node.
        precision: of the factors; sums are in single precision, and what they give is rounded to this one.
    """
    call = node.graph.call_function
    if node.target in _PRODUCTS:
        given = _product_of(node, value, precision)
        return node if given is None or given[-1] is None else call(torch.ops.ppl_vae.product.default, given)
    if node.target in _AFTER:
        source = _behind_views(node.args[0])
        if source is not None and source.target is torch.ops.ppl_vae.product.default and len(source.args) == 4:
            made = call(source.target, (*source.args, _AFTER[node.target]))
            return call(aten.view.default, (made, list(value[node].shape)))
    if node.target is aten.sum.dim_IntList and node.args[1:] == ([-1],) and not node.kwargs:
        given = _bernoulli_of(node, value, precision)
        return node if given is None else call(torch.ops.ppl_vae.bernoulli.default, given)
    return node


def _product_of(node: Node, value: dict[Node, Any], precision: torch.dtype) -> tuple[Any, ...] | None:
    """Factors, bias and precision of a product of matrices, None for one that stays with `mm`; or None for no such.

    On AMD's processors MKL, the library of `mm`, keeps to vectors of 256 bits. oneDNN takes all 512: about twice the
    rate from Zen 5 on (family 26), a tenth more on Zen 4, unless the first factor lies by columns. On Intel's there is
    nothing to gain in single precision.
    """
    if node.target is torch.ops.ppl_vae.product.default:
        return node.args if len(node.args) == 4 else None
    if node.target not in _PRODUCTS or node.kwargs:
        return None
    *bias, a, b = node.args
    left, right = value[a], value[b]  # type: ignore[index]
    if bias and value[bias[0]].dim() != 1:  # type: ignore[index]
        return None
    size = left.shape[0] * left.shape[1] * right.shape[1]
    dense = all(one.is_contiguous() or one.t().is_contiguous() for one in (left, right))
    vendor, family = processor()
    gains = vendor == "AuthenticAMD" and (family >= 26 or left.is_contiguous())
    taken = left.dtype == torch.float32 and dense and size >= _LEAST and (gains or precision != torch.float32)
    return a, b, bias[0] if bias else None, precision if taken else None


def _bernoulli_of(node: Node, value: dict[Node, Any], precision: torch.dtype) -> tuple[Any, ...] | None:
    """The arguments of `bernoulli` of a sum over log probabilities, or None for another sum."""
    minus: Any = node.args[0]
    loss: Any = minus.args[0] if minus.target is aten.neg.default else None
    if not isinstance(loss, Node) or loss.target is not aten.binary_cross_entropy_with_logits.default:
        return None
    if len(minus.users) > 1 or len(loss.users) > 1 or loss.args[2:] != (None, None, 0):
        return None
    logits: Any = loss.args[0]
    x: Any = loss.args[1]
    source = _behind_views(logits)
    if source is None or (given := _product_of(source, value, precision)) is None:
        return None
    size = list(value[logits].shape)
    if not value[logits].is_contiguous() or value[source].shape[1] != size[-1] or 0 in size:
        return None
    if x.target is aten.expand.default:
        x = x.args[0]
    return *given, x, size


def _behind_views(node: Any) -> Node | None:
    """What a node is a view of, if nothing else uses it."""
    while isinstance(node, Node) and len(node.users) == 1 and node.target is aten.view.default:
        node = node.args[0]
    return node if isinstance(node, Node) and len(node.users) == 1 else None


@cache
def processor() -> tuple[str, int]:
    """Vendor and family of the processor, such as ("AuthenticAMD", 26); ("", 0) if they are not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    vendor = re.search(r"AuthenticAMD|GenuineIntel", text)
    family = re.search(r"family\s*:?\s*(\d+)", text, re.IGNORECASE)
    return (vendor[0], int(family[1])) if vendor and family else ("", 0)
