"""Matrix products of captured graphs: which of the two libraries in PyTorch's CPU build takes each one."""

import platform
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

_LEAST = 2**23  # multiplications, from which on oneDNN repays its call
_DENSE = (torch.float32, torch.bfloat16)
_LIBRARY = torch.library.Library("ppl_vae", "FRAGMENT")  # its operators last as long as this object
_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias, ScalarType dtype) -> Tensor")
aten = torch.ops.aten


def _product(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    a, bias = a.to(dtype), None if bias is None else bias.to(dtype).contiguous()
    out = torch.ops.mkldnn._linear_pointwise(a, b.t().to(dtype), bias, "none", [], "")
    return out.float()  # type: ignore[no-any-return]


def _shape(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_LIBRARY.impl("product", _product, "CPU")
_LIBRARY.impl("product", _shape, "Meta")


def faster(node: Node, value: dict[Node, Tensor], precision: torch.dtype = torch.float32) -> Node:
    """A node with the product of `node` by oneDNN where that is faster or its precision is lower, or the node itself.

    On AMD's processors MKL, the library of `mm`, keeps to vectors of 256 bits. oneDNN takes all 512: about twice the
    rate from Zen 5 on (family 26), a tenth more on Zen 4, unless the first factor lies by columns. On Intel's there is
    nothing to gain in single precision.

    Args:
        node: any node of a graph on the CPU.
        value: of each node.
        precision: of the factors; sums are in single precision, and what they give is rounded to this one.
    """
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return node
    *bias, a, b = node.args
    left, right = value[a], value[b]  # type: ignore[index]
    size = left.shape[0] * left.shape[1] * right.shape[1]
    dense = all(one.dtype == torch.float32 and _is_dense(one) for one in (left, right))
    if size < _LEAST or not dense or (bias and value[bias[0]].dim() != 1):  # type: ignore[index]
        return node
    vendor, family = processor()
    if precision == torch.float32 and (vendor != "AuthenticAMD" or (family < 26 and not left.is_contiguous())):
        return node
    args = (a, b, bias[0] if bias else None, precision)
    return node.graph.call_function(torch.ops.ppl_vae.product.default, args)


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.t().is_contiguous()


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
