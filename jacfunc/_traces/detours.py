"""Detours of a graph: other names, shapes and copies of a tensor that is there already."""

from __future__ import annotations

from math import prod
from operator import getitem
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_NAMES = frozenset({_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default})
"""Operators that only give another name."""

VIEWS = frozenset({_ATEN.view.default, _ATEN._unsafe_view.default})
"""Operators that only give another shape."""

_MOVES = VIEWS | {
    *(_ATEN.permute.default, _ATEN.t.default, _ATEN.transpose.int, _ATEN.expand.default),
    *(_ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.select.int, _ATEN.slice.Tensor),
}
"""Operators that take a view of a tensor, in its dtype."""

_REDUCTIONS = {_ATEN.linalg_vector_norm.default: 2, _ATEN.sum.dim_IntList: 1}
"""Operators that reduce a tensor over dimensions, which are the argument of this number."""

_NEEDS_MEMORY = frozenset(
    getattr(_ATEN, name).default
    for name in (
        *("as_strided", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
        *("batch_norm", "_batch_norm_impl_index", "batch_norm_update_stats", "instance_norm"),
    )
)
"""Operators that read by an address, or write into an argument although they do not say so, as a
normalization of a batch may write into statistics: a graph with one keeps copies of its inputs."""

Place: TypeAlias = tuple[Any, ...]

_JOINS = frozenset({_ATEN.stack.default, _ATEN.cat.default})


def without_detours(graph: GraphModule, is_pure: bool) -> None:
    """Leave out what only gives another name, shape or order, and copies where nothing is written.

    Args:
        is_pure: does the graph write into nothing?
    """
    transposed: dict[Any, Node] = {}
    shares = is_pure and _NEEDS_MEMORY.isdisjoint(node.target for node in graph.graph.nodes)
    for node in graph.graph.nodes:
        if node.target in _NAMES:
            node.replace_all_uses_with(node.args[0])
        elif node.target is _ATEN.t.default and node.args[0].target is _ATEN.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
        elif is_pure and node.target is _ATEN.t.default and node.args[0] in transposed:
            node.replace_all_uses_with(transposed[node.args[0]])
        elif is_pure and node.target in VIEWS and _is_of_kept_dims(node):
            (tensor, dims, _), kwargs = node.args[0].args, node.args[0].kwargs
            node.target, node.args, node.kwargs = _ATEN.sum.dim_IntList, (tensor, dims), kwargs
        elif node.target in _MOVES:
            transposed |= {node.args[0]: node} if node.target is _ATEN.t.default else {}
            base, kind = _base_of(node), kind_of(node)
            if kind is not None and kind == kind_of(base):
                node.replace_all_uses_with(base)
            elif base is not node.args[0]:
                node.target, node.kwargs = _ATEN.view.default, {}
                node.args = base, [*node.meta["val"].shape]
        elif node.target in _REDUCTIONS and node.args[0].target in _MOVES:
            _reduce_base(graph, node)
        elif shares and node.target is _ATEN.clone.default and _is_alike_input(node):
            node.replace_all_uses_with(node.args[0])
        elif is_pure and _is_needless_copy(node):
            node.replace_all_uses_with(_joined(graph, node))
        elif node.target is _ATEN.copy.default and _is_only_laid_out(node):
            node.replace_all_uses_with(laid_out(graph, node, node.args[1]))


def by_selections(graph: GraphModule) -> None:
    """Take each tensor of a list of slices by itself: then it is a view, as all others are.

    A sweep of one cotangent unbinds it. What is computed from no input is so known to be constant.
    """
    for node in graph.graph.nodes:
        if node.target is getitem and node.args[0].target is _ATEN.unbind.int:
            (tensor, *dims), number = node.args[0].args, node.args[1]
            with graph.graph.inserting_before(node):
                args = tensor, *(dims or (0,)), number
                selected = graph.graph.call_function(_ATEN.select.int, args)
            selected.meta = dict(node.meta)
            node.replace_all_uses_with(selected)


def kind_of(node: Any) -> Any:
    """Shape, dtype and strides of a node's tensor; None where that is not known."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else None


def laid_out(graph: GraphModule, node: Node, other: Any) -> Node:
    """What can stand for a contiguous node: another one with its numbers, or a copy of that."""
    if is_contiguous(other):
        return cast("Node", other)
    with graph.graph.inserting_before(node):
        options: Any = {"memory_format": torch.contiguous_format}
        return graph.graph.call_function(_ATEN.clone.default, (other,), options)


def is_contiguous(node: Any) -> bool:
    """Is the tensor of a node known to be contiguous?"""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_contiguous()


def _is_only_laid_out(node: Node) -> bool:
    """Is it a contiguous copy, of a tensor of the same shape and dtype?"""
    kind, other = kind_of(node), kind_of(node.args[1])
    return is_contiguous(node) and other is not None and kind[:2] == other[:2]


def _base_of(node: Node) -> Any:
    """The first tensor of which a view has all entries, in the same order or of the same kind.

    A contiguous view of as many entries as something contiguous has them in the same order,
    whatever the steps in between are.
    """
    above: Any = node.args[0]
    base = above
    if is_contiguous(node):
        size = node.meta["val"].numel()
        while above.target in _MOVES:
            above = above.args[0]
            if is_contiguous(above) and above.meta["val"].numel() == size:
                base = above
    return base


def _is_of_kept_dims(node: Node) -> bool:
    """Does it take away the dimensions of length one that a sum has kept? That of a bias does."""
    total: Any = node.args[0]
    is_sum = total.target is _ATEN.sum.dim_IntList and total.args[2:] == (True,)
    if not (is_sum and total.args[1]):  # without dimensions it is a sum over all of them
        return False
    shape, dims = total.meta["val"].shape, {dim % total.meta["val"].dim() for dim in total.args[1]}
    return [n for dim, n in enumerate(shape) if dim not in dims] == [*node.meta["val"].shape]


def _reduce_base(graph: GraphModule, node: Node) -> None:
    """Reduce what a tensor is another shape of, and give the fewer numbers their shape."""
    func, (shaped, *others) = cast("Any", node.target), cast("Any", node.args)
    base, settings = shaped.args[0], others[: _REDUCTIONS[func]]
    if not (is_contiguous(shaped) and is_contiguous(base) and len(settings) == _REDUCTIONS[func]):
        return
    shape = base.meta["val"].shape
    if (dims := _dims_in(shaped.meta["val"].shape, shape, settings.pop())) is None:
        return
    with graph.graph.inserting_before(node):
        reduced = graph.graph.call_function(func, (base, *settings, dims), node.kwargs)
        kept = [n for dim, n in enumerate(shape) if dim not in dims]
        kind: Any = {"dtype": node.meta["val"].dtype, "device": "meta"}
        reduced.meta["val"] = torch.empty(kept, **kind)
        new = graph.graph.call_function(_ATEN.view.default, (reduced, [*node.meta["val"].shape]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new if kind_of(new) != kind_of(reduced) else reduced)


def _dims_in(shape: torch.Size, other: torch.Size, dims: Any) -> list[int] | None:
    """The dimensions of another shape of the same entries that hold what these do of the first."""
    if shape.numel() != other.numel():
        return None
    reduced, found = {dim % len(shape) for dim in dims or ()}, list[int]()
    own: list[tuple[int, int]] = [(n, dim in reduced) for dim, n in enumerate(shape) if n != 1]
    others = [(n, dim) for dim, n in enumerate(other) if n != 1]
    while own and others:  # groups of dimensions that hold the same entries
        group, theirs = [own.pop(0)], [others.pop(0)]
        while (size := prod(n for n, _ in group)) != (its := prod(n for n, _ in theirs)):
            left, into = (own, group) if size < its else (others, theirs)
            if not left:
                return None
            into.append(left.pop(0))
        if len({is_reduced for _, is_reduced in group}) > 1:
            return None
        found += [dim for _, dim in theirs] if group[0][1] else []
    return found or None


def _is_needless_copy(node: Node) -> bool:
    """Is it one contiguous tensor, joined to no other, of which nobody outside gets the copy?"""
    tensors: Any = node.args[0] if node.target in _JOINS else ()
    is_one = len(tensors) == 1 and not node.kwargs
    return is_one and is_contiguous(tensors[0]) and not _may_be_returned(node)


def _is_alike_input(node: Node) -> bool:
    """Is it a copy of an input, laid out in the same way?"""
    (tensor, *_), kind = cast("Any", node.args), kind_of(node)
    return tensor.op == "placeholder" and kind is not None and kind == kind_of(tensor)


def _may_be_returned(node: Node) -> bool:
    """Is the tensor of a node, or a view of it, an output?"""
    return any(x.op == "output" or (x.target in _MOVES and _may_be_returned(x)) for x in node.users)


def _joined(graph: GraphModule, node: Node) -> Node:
    """The only tensor that a node joins, with the dimension that a stack has."""
    args: Any = node.args
    (tensor,), dim = args[0], args[1] if len(args) > 1 else 0
    if node.target is _ATEN.cat.default:
        return cast("Node", tensor)
    with graph.graph.inserting_before(node):
        stacked = graph.graph.call_function(_ATEN.unsqueeze.default, (tensor, dim))
    stacked.meta = dict(node.meta)
    return stacked


def place_of(tensor: Tensor) -> Place:
    """What tells a tensor from all others that live: its memory, and how it is read."""
    kind = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), kind


def without_ones(tensor: Tensor) -> list[tuple[int, int]]:
    """Lengths and strides of the dimensions of more than one entry."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [pair for pair in pairs if pair[0] != 1]


def in_memory(tensor: Tensor) -> list[int] | None:
    """The dimensions in the order in which entries lie in memory; None if these have gaps."""
    dims = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    return dims if tensor.permute(dims).is_contiguous() else None
