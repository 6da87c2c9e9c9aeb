"""What is taken out of a graph before it is compiled: all that each call would do again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from jacfunc._torch import Graphs, memories_of, memory_of
from jacfunc._traces.detours import VIEWS, by_selections, kind_of, laid_out, without_detours
from jacfunc._types import Leaves

MOST_FOLDED_BYTES = 2**26
"""So many bytes are kept; further constants are computed at each call."""

_ATEN = torch.ops.aten


def simplified(graph: GraphModule, inputs: Leaves) -> tuple[GraphModule, Leaves]:
    """The graph, and the constants that it takes as inputs after its own.

    Seeds and the like are computed once, here; a product with the identity is the other factor.
    No output shares memory with an input. A graph with writes keeps what these may go into.
    """
    is_pure = not any(map(Graphs.writes, graph.graph.nodes))
    if is_pure:
        _without_zero_tangents(graph)
    _fill_by_sizes(graph)
    by_selections(graph)
    constants = _folded(graph)
    without_detours(graph, is_pure)
    if is_pure:
        _by_rows(graph)
        _without_identities(graph, constants)
    _without_dead_code(graph)
    graph.graph.lint()
    graph.recompile()
    _with_own_outputs(graph, (*inputs, *constants.values()))
    kept = [node for node in constants if node.users]
    for node in constants:
        if not node.users:
            graph.graph.erase_node(node)
    # without tensors that no operation takes any more: a compiler would make inputs of them, too
    return GraphModule(graph, graph.graph), tuple(constants[node] for node in kept)


_FILLED = {
    **dict.fromkeys((_ATEN.zeros_like.default, _ATEN.new_zeros.default), 0),
    **dict.fromkeys((_ATEN.ones_like.default, _ATEN.new_ones.default), 1),
    _ATEN.full_like.default: None,  # its second argument says with what
}
"""Operators that read the sizes of a tensor and no number of it, and what they fill with."""


def _fill_by_sizes(graph: GraphModule) -> None:
    """Make them depend on no input, as they depend on no number of one: they are computed once."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.target not in _FILLED or not (
            isinstance(value, Tensor) and value.is_contiguous() and not value.is_meta
        ):
            continue
        number = node.args[1] if _FILLED[node.target] is None else _FILLED[node.target]
        if not isinstance(number, Node):
            with graph.graph.inserting_before(node):
                kind: Any = {"dtype": value.dtype, "device": value.device}
                size = [*value.shape], number
                filled = graph.graph.call_function(_ATEN.full.default, size, kind)
            filled.meta = dict(node.meta)
            node.replace_all_uses_with(filled)


_PRODUCTS = frozenset({_ATEN.mm.default, _ATEN.mv.default, _ATEN.bmm.default, _ATEN.mul.Tensor})
MOVES = frozenset(
    {_ATEN.expand.default, _ATEN.view.default, _ATEN.permute.default, _ATEN.t.default}
    | {_ATEN.transpose.int, _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.alias.default}
)
"""Operators that take a view of a tensor, and compute nothing."""


def _without_zero_tangents(graph: GraphModule) -> None:
    """Leave out what is added of the zeros that forward mode takes as tangents of constants.

    Of these alone: ``0 · x`` of zeros that a user wrote is not zero where x is infinite.
    """
    zeros = set[Node]()
    for node in graph.graph.nodes:
        is_moved = node.target in MOVES and node.args[0] in zeros
        is_scaled = node.target in _PRODUCTS and not zeros.isdisjoint(node.args)
        if is_moved or is_scaled or _is_zero_tangent(node):
            zeros.add(node)
        elif node.target is _ATEN.add.Tensor and not node.kwargs and len(node.args) == 2:
            for one, other in (node.args, node.args[::-1]):
                if one in zeros and kind_of(node) == kind_of(other) is not None:
                    node.replace_all_uses_with(other)
                    break


def _is_zero_tangent(node: Node) -> bool:
    """Is it a zero that torch's own derivatives made? Python would say where memory is pinned."""
    is_zero = node.target is _ATEN.zeros.default and node.args == ([],)
    return is_zero and "pin_memory" not in node.kwargs


def _folded(graph: GraphModule) -> dict[Node, Tensor]:
    """Make constants inputs of the graph: all that is computed from no input."""
    fixed = _fixed_nodes(graph)
    frontier = [
        node
        for node in fixed
        if Graphs.is_operator(node) and any(u not in fixed for u in node.users)
    ]
    values = _values_of(graph, fixed)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    constants: dict[Node, Tensor] = {}
    bytes_left = MOST_FOLDED_BYTES
    for node in frontier:
        value = values[node]
        is_kept = isinstance(value, Tensor) and not value.is_meta
        if is_kept and value.nbytes <= bytes_left:
            bytes_left -= value.nbytes
            last = [*inputs, *constants][-1] if inputs or constants else None
            with graph.graph.inserting_after(last):
                new = graph.graph.placeholder(f"constant_{len(constants)}")
            constants[new] = new.meta["val"] = value.clone()
            node.replace_all_uses_with(new)
    _without_dead_code(graph)
    return constants


def _without_dead_code(graph: GraphModule) -> None:
    """Leave out what nobody takes, but for checks, and writes into what others share."""
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or Graphs.writes(node))


def _fixed_nodes(graph: GraphModule) -> dict[Node, None]:
    """Nodes that are computed from no input, in order."""
    fixed: dict[Node, None] = {}
    for node in graph.graph.nodes:
        is_fixed = Graphs.is_operator(node) and all(n in fixed for n in node.all_input_nodes)
        if node.meta.get("is_written"):
            continue
        if is_fixed or node.op == "get_attr":
            fixed[node] = None
    return fixed


def _values_of(graph: GraphModule, nodes: dict[Node, None]) -> dict[Node, Any]:
    interpreter = Interpreter(graph)
    with torch.no_grad():
        for node in nodes:
            interpreter.env[node] = interpreter.run_node(node)
    return interpreter.env


def _without_identities(graph: GraphModule, constants: dict[Node, Tensor]) -> None:
    """Replace products with the identity by the other factor: sweeps begin with one."""
    known = dict(constants)
    for node in graph.graph.nodes:
        if node.target in (*VIEWS, _ATEN.reshape.default) and node.args[0] in known:
            known[node] = known[node.args[0]].reshape(node.args[1])
        elif _transposed(node) in known:
            known[node] = known[_transposed(node)].t()
    identities = {node for node, value in known.items() if _is_identity(value)}
    for node in graph.graph.nodes:
        if node.target is _ATEN.mm.default:
            left, right = node.args
            if left in identities or right in identities:
                other = right if left in identities else left
                node.replace_all_uses_with(laid_out(graph, node, other))


def _is_identity(value: Tensor) -> bool:
    is_square = value.dim() == 2 and value.shape[0] == value.shape[1]
    return is_square and torch.equal(value, torch.eye(len(value)).to(value))


def _by_rows(graph: GraphModule) -> None:
    """Take products of which only the transpose is used the other way round.

    Sweeps of ``W @ x`` make such ones: tall and narrow, for which a library may take ten times as
    long as for the same numbers in few long rows. As numbers then lie in another order, views
    become reshapes.
    """
    nodes = graph.graph.nodes
    if any(node.target is _ATEN.as_strided.default for node in nodes):
        return
    for node in nodes:
        if node.target is _ATEN.mm.default and node.users and all(map(_transposed, node.users)):
            with graph.graph.inserting_before(node):
                factors = [
                    _transposed(x) or graph.graph.call_function(_ATEN.t.default, (x,))
                    for x in reversed(node.args)
                ]
                product = graph.graph.call_function(_ATEN.mm.default, tuple(factors))
            for user in [*node.users]:
                user.replace_all_uses_with(product)
        elif node.target in VIEWS:
            node.target = _ATEN.reshape.default


def _transposed(node: Node) -> Any:
    """What a node transposes; None if it does something else."""
    is_permuted = node.target is _ATEN.permute.default and node.args[1] == [1, 0]
    return node.args[0] if is_permuted or node.target is _ATEN.t.default else None


def _with_own_outputs(graph: GraphModule, inputs: Leaves) -> None:
    """Copy outputs that share memory with an input, which the caller may write into."""
    with torch.no_grad():
        outputs = graph.forward(*inputs)  # a call of the module would run hooks of all modules
    places = set(memories_of([x for x in inputs if isinstance(x, Tensor)]))
    (last,) = [node for node in graph.graph.nodes if node.op == "output"]
    nodes = list(last.args[0])
    for number, (node, value) in enumerate(zip(nodes, outputs, strict=True)):
        if memory_of(value) in places:
            with graph.graph.inserting_before(last):
                nodes[number] = graph.graph.call_function(_ATEN.clone.default, (node,))
    last.args = (tuple(nodes),)
    graph.recompile()
