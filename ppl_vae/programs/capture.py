"""Functions replayed by their tensor operations alone, without the Python around them: `record` and `Captured`."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.programs.products import faster

_EAGER = 3  # evaluations of a shape before they are captured
aten = torch.ops.aten
_LOG = logging.getLogger(__name__)
_JOINS = {aten.stack.default, aten.cat.default}  # of a single tensor, views
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_SHAPES = {aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.new_zeros.default}
Function = Callable[[Tensor], tuple[Tensor, ...]]


class Captured:
    """A function of one tensor, replayed without its Python, Pyro's included.

    After a few calls with one shape and type, its tensor operations are recorded. What does not depend on the argument
    is computed once; everything else is treated as constant. The function itself is called if it cannot be recorded,
    or if a second point shows that the replay differs, because the function draws or branches on values. The log
    (level INFO) then says why.

    Args:
        function: deterministic, of one tensor; its results carry no gradients.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.seen: Counter[tuple[torch.Size, torch.dtype]] = Counter()
        self.graphs: dict[tuple[torch.Size, torch.dtype], Function] = {}

    @torch.no_grad()
    def __call__(self, u: Tensor) -> tuple[Tensor, ...]:
        """Evaluate at u."""
        u = u.contiguous()  # as at the capture
        kind = u.shape, u.dtype
        self.seen[kind] += 1
        if self.seen[kind] == _EAGER:
            self.graphs[kind] = self._capture(u)
        return self.graphs.get(kind, self.function)(u)

    def _capture(self, u: Tensor) -> Function:
        try:
            with pyro.validation_enabled(False):  # it looks at values
                graph = record(self.function, [u])
                if not any(_writes(node) for node in graph.graph.nodes):
                    _reuse(graph, [u])
                    graph.graph.lint()
                graph.recompile()
                graph(u)  # fills the memory that the next replay reuses
                other = 0.9 * u + 0.05
                same = all(close(a, b) for a, b in zip(graph(other), self.function(other), strict=True))
            reason = "a second point gave something else"
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            same, reason = False, f"{type(error).__name__}: {error}"
        if same:
            return graph.forward  # type: ignore[no-any-return]
        _LOG.info("Evaluating step by step, which is slower; no graph could be captured: %s", reason)
        return self.function


def record(
    function: Callable[..., Any],
    given: Sequence[Tensor],
    *,
    exact: bool = False,
    precision: torch.dtype = torch.float32,
) -> GraphModule:
    """Record the tensor operations of a function, as a graph that takes the same tensors.

    What depends on no argument is computed once; draws are made anew each time, in the same order. The operations
    run a few times meanwhile.

    Args:
        function: of these tensors, which it may also reach by itself, as a module reaches its parameters.
        given: the tensors.
        exact: whether the graph gives the same numbers to the last bit, or may take operations that are faster.
        precision: of the factors of large matrix products, unless exact.

    Raises:
        ValueError: If a shape depends on values, or a tensor that outlives the call is changed in place.
    """
    graph = make_fx(lambda *args: function(*args))(*given)
    graph.graph.eliminate_dead_code(_acts)
    with torch.no_grad():
        _simplify(graph, given, None if exact else precision)
    graph.graph.lint()
    graph.recompile()
    return graph


def close(a: Tensor, b: Tensor, share: float = 1e-6) -> bool:
    """Whether two tensors are equal to rounding, which may be a share of the largest entry."""
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-5, atol=share * scale, equal_nan=True)


def _values(module: GraphModule, given: Sequence[Tensor]) -> dict[Node, Any]:
    """The value of each node at some arguments."""
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.run(*given)
    return interpreter.env


def _simplify(module: GraphModule, given: Sequence[Tensor], precision: torch.dtype | None) -> None:
    """Compute once what does not depend on the arguments, and drop what changes nothing, such as times one."""
    graph, value = module.graph, _values(module, given)
    changed = {_memory(value[one]) for node in graph.nodes for one in _writes(node)} - {None}
    if any(_memory(value[node]) in changed for node in graph.nodes if node.op in ("placeholder", "get_attr")):
        raise ValueError("a tensor that outlives the step is changed in place")
    known: dict[Node, bool] = {}  # whether a node is the same at any other argument
    for node in graph.nodes:
        fixed = node.target in _SHAPES or all(known[one] for one in node.all_input_nodes)
        known[node] = fixed and node.op != "placeholder" and not _acts(node) and _memory(value[node]) not in changed
        if not known[node] and _has_shape_by_value(node, value, known):
            raise ValueError("a shape depends on values")
    calls = [node for node in graph.nodes if node.op == "call_function" and isinstance(value[node], Tensor)]
    for number, node in enumerate(calls):
        if known[node] and not all(known[user] for user in node.users):
            setattr(module, f"known_{number}", value[node])
            with graph.inserting_before(node):
                stored = graph.create_node("get_attr", f"known_{number}")
            value[stored], known[stored] = value[node], True
            node.replace_all_uses_with(stored)
    _replace(graph, value, known, changed, lambda node: _simpler(node, value, known, precision is None))
    if precision is not None and all(one.device.type == "cpu" for one in value.values() if isinstance(one, Tensor)):
        _replace(graph, value, known, changed, partial(faster, value=value, precision=precision))
        _replace(graph, value, known, changed, _cheaper)
    held = {_memory(value[node]) for node in graph.nodes if node.op in ("placeholder", "get_attr")} - {None}
    end = graph.output_node()
    for node in end.all_input_nodes:
        if _memory(value[node]) in held:  # whoever is given it may change it
            with graph.inserting_before(end):
                end.replace_input_with(node, graph.call_function(aten.clone.default, (node,)))
    graph.eliminate_dead_code(_acts)


def _replace(
    graph: Graph, value: dict[Node, Any], known: dict[Node, bool], changed: set[Any], other: Callable[[Node], Node]
) -> None:
    """Put another node, of the same value, in the place of each that depends on the arguments."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(value.get(node), Tensor) or known[node]:
            continue
        if not any(_memory(value.get(one)) in changed for one in (node, *node.all_input_nodes)):
            with graph.inserting_before(node):
                new = other(node)
            if new is not node:
                value[new], known[new] = value[node], False
                node.replace_all_uses_with(new)
                graph.erase_node(node)
    graph.eliminate_dead_code(_acts)


def _acts(node: Node) -> bool:
    """Whether a node does more than give a result: it draws, writes, or checks."""
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() or (schema is not None and not schema.returns)


def _writes(node: Node) -> list[Node]:
    """The arguments of a node that it changes in place."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    given = {**node.kwargs, **dict(zip((one.name for one in arguments), node.args, strict=False))}
    changed = [given.get(one.name) for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    return [one for one in changed if isinstance(one, Node)]


def _memory(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) and value.numel() else None


def _has_shape_by_value(node: Node, value: dict[Node, Any], known: dict[Node, bool]) -> bool:
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        masks = [one for one in indices if one is not None and not known[one]]
        return any(value[one].dtype in (torch.bool, torch.uint8) for one in masks)
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


def _reuse(module: GraphModule, given: Sequence[Tensor]) -> None:
    """Keep the memory of intermediate results from one replay to the next: allocating it is slow.

    An elementwise result overwrites an argument that is no longer needed; any other goes into a piece of its own, or
    into one that is no longer needed.
    """
    tensors = {
        node: value for node, value in _values(module, given).items() if isinstance(value, Tensor) and value.numel()
    }
    place = {node: number for number, node in enumerate(module.graph.nodes)}
    pieces: dict[int, list[Node]] = {}
    for node, tensor in tensors.items():
        pieces.setdefault(tensor.untyped_storage().data_ptr(), []).append(node)
    sharing = {node: piece for piece in pieces.values() for node in piece}  # the nodes of one piece of memory
    kept: dict[str, list[Node]] = {}

    def last(piece: list[Node]) -> int:
        return max((place[user] for one in piece for user in one.users if user not in piece), default=-1)

    def returned(piece: list[Node]) -> bool:
        return any(user.op == "output" for one in piece for user in one.users)

    def free(other: Node, node: Node) -> bool:
        piece = sharing[other]
        if returned(sharing[node]) and any(piece is one for one in kept.values()):
            return False
        beside = [one for one in node.all_input_nodes if one in piece]
        return (
            _fits(tensors[other], tensors[node])
            and last(piece) == place[node]
            and all(one.op == "call_function" for one in piece)
            and all(_alias(tensors[one], tensors[other]) for one in beside)
        )

    for node, tensor in tensors.items():
        target: Any = node.target
        variant = _writing(target) if node.op == "call_function" else None
        if variant is None:
            continue
        pointwise = torch.Tag.pointwise in target.tags
        over = next((one for one in node.all_input_nodes if pointwise and one in tensors and free(one, node)), None)
        if over is not None:
            sharing[over].extend(sharing[node])
            sharing.update(dict.fromkeys(sharing[node], sharing[over]))
        elif tensor.is_contiguous() and not returned(sharing[node]):
            done = [name for name, piece in kept.items() if last(piece) < place[node]]
            name = next((name for name in done if _fits(getattr(module, name), tensor)), f"kept_{len(kept)}")
            if name not in kept:
                setattr(module, name, torch.empty_like(tensor))
            kept[name] = sharing[node]
            with module.graph.inserting_before(node):
                over = module.graph.create_node("get_attr", name)
        else:
            continue
        node.target, word = variant
        node.kwargs = {**node.kwargs, word: over}


def _writing(target: Any) -> tuple[Any, str] | None:
    """The variant of an operation that writes into a given tensor, and the keyword of that tensor."""
    if torch.Tag.pointwise not in getattr(target, "tags", ()) and target not in _PRODUCTS:
        return None
    given = [(one.name, str(one.type)) for one in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        variant = getattr(target.overloadpacket, name)
        wanted = [(one.name, str(one.type)) for one in variant._schema.arguments if not one.is_out]
        out = [one.name for one in variant._schema.arguments if one.is_out]
        if len(out) == 1 and wanted == given:
            return variant, out[0]
    return None


def _cheaper(node: Node) -> Node:
    """A node that is equal to rounding and faster on a CPU, or the node itself."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return node.graph.call_function(target, args, kwargs)

    if node.target is aten.tanh.default:
        inner = call(aten.sigmoid.default, call(aten.mul.Tensor, node.args[0], 2))
        return call(aten.sub.Tensor, call(aten.mul.Tensor, inner, 2), 1)
    if node.target is aten.binary_cross_entropy_with_logits.default and node.args[2:] == (None, None, 0):
        logits, x = node.args[:2]
        return call(aten.addcmul.default, call(aten.softplus.default, logits, 1, 40), x, logits, value=-1)
    source: Any = node.args[0]
    tags = getattr(node.target, "tags", ())
    plain = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and not node.kwargs
    if plain and node.all_input_nodes == [source] and source.target is aten.expand.default:
        return call(aten.expand.default, call(node.target, *source.args[:1], *node.args[1:]), source.args[1])
    return node


def _simpler(node: Node, value: dict[Node, Any], known: dict[Node, bool], exact: bool) -> Node:
    """A node that has the same value for less work, if exact in the same layout of memory, or the node itself."""
    target, args, result = node.target, node.args, value[node]

    def fits(other: Any) -> bool:
        if not isinstance(other, Node) or value[other].shape != result.shape or value[other].dtype != result.dtype:
            return False
        return not exact or value[other].stride() == result.stride()  # by which sums have their order

    def always(other: Any, number: float) -> bool:
        given = value[other] if isinstance(other, Node) and known[other] else other
        return not isinstance(given, Node) and bool((torch.as_tensor(given) == number).all())

    if target in (aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar) and always(args[1], 1) and fits(args[0]):
        return args[0]  # type: ignore[return-value]
    if target in (aten.add.Tensor, aten.sub.Tensor) and always(args[1], 0) and fits(args[0]):
        return args[0]  # type: ignore[return-value]
    if target is aten.add.Tensor and always(args[0], 0) and fits(args[1]) and not node.kwargs:
        return args[1]  # type: ignore[return-value]
    if target is aten.mul.Tensor and always(args[1], -1) and fits(args[0]):
        inner: Any = args[0]
        if inner.target is aten.sub.Tensor and not inner.kwargs and isinstance(inner.args[1], Node):
            return node.graph.call_function(aten.sub.Tensor, (inner.args[1], inner.args[0]))
        return node.graph.call_function(aten.neg.default, (inner,))
    source: Any = args[0]
    if target in _JOINS and len(source) == 1 and value[source[0]].is_contiguous():
        source = source[0]
    else:
        while isinstance(source, Node) and isinstance(value[source], tuple | list):
            source = source.args[0]  # a split, of which this may be the only piece
        if not isinstance(source, Node) or not _alias(value[source], result):
            return node
    while source.target is aten.view.default and value[source.args[0]].is_contiguous():
        source = source.args[0]
    if known[source]:
        return node
    return source if fits(source) else node.graph.call_function(aten.view.default, (source, list(result.shape)))


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous()


def _alias(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory and order."""
    same = a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype
    return same and a.is_contiguous() and b.is_contiguous()
