"""What a graph calls from Python: methods of tensors, and faster kernels where there are some."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from jacfunc._torch import Graphs, fast_linear

MANY_PRODUCTS = 2**23
"""Of so many multiplications it pays to look whether another product is faster."""

FEW_CHANNELS = 3
"""Onto images of so few channels torch's own convolution pulls back faster than oneDNN's, which
fills channels up with zeros to as many as a vector unit takes: of one channel it takes four to nine
times as long, and seventeen times the memory."""

SOME_CHANNELS = 16
"""So are convolutions with strides onto so many, unless many places of the kernel see a pixel:
oneDNN takes up to twice as long."""

_ATEN = torch.ops.aten
_METHODS = {
    getattr(getattr(_ATEN, name), overload): name
    for overload, names in {
        "default": (
            *("mm", "bmm", "t", "permute", "view", "reshape", "unsqueeze", "expand", "clone"),
            *("addcmul", "addcmul_", "copy_", "sqrt", "sqrt_", "square", "tanh", "exp", "neg"),
            *("sin", "cos", "sigmoid", "mv", "argmax", "gather", "cumsum", "triu_", "diagonal"),
            *("split_with_sizes", "detach", "addmm", "unfold", "new_empty", "neg_", "sum", "clamp"),
        ),
        "Tensor": ("mul", "mul_", "add", "add_", "sub", "sub_", "div", "div_"),
        "int": ("transpose", "select"),
        "dim": ("squeeze",),
        "dim_IntList": ("sum",),
        "Tensor_Scalar": ("pow",),
        "Scalar": ("pow_", "mul", "div", "div_", "ne"),
    }.items()
    for name in names
} | {_ATEN._unsafe_view.default: "view"}  # they differ for autograd alone
"""Operators, with the names of methods that take the same arguments in the same order.

A call of an operator from Python takes three times as long, if it is not a bare one."""

_FUNCTIONS = {
    _ATEN.cat.default: torch.cat,
    _ATEN.mul.out: torch.mul,
    _ATEN.stack.default: torch.stack,
    _ATEN.constant_pad_nd.default: torch.constant_pad_nd,
    _ATEN.linalg_vector_norm.default: torch.linalg.vector_norm,
    _ATEN.native_group_norm.default: torch.native_group_norm,
    _ATEN._softmax.default: torch._softmax,
    _ATEN._log_softmax.default: torch._log_softmax,
    _ATEN._log_softmax_backward_data.default: torch._log_softmax_backward_data,
    _ATEN._softmax_backward_data.default: torch._softmax_backward_data,
}
"""Operators that have no methods, with torch's functions of the same arguments."""


def by_methods(graph: GraphModule) -> GraphModule:
    """A graph that computes what this one does, by methods in the place of operators."""
    methods = Graph()
    methods.output(methods.graph_copy(graph.graph, {}))
    every = [*methods.nodes]
    _with_sums_of_products(methods)
    for node in methods.nodes:
        if _is_outer(node):  # torch multiplies numbers faster than matrices of one column
            node.op, node.target = "call_method", "mul"
        elif node.target is _ATEN.pow.Tensor_Scalar and node.args[1] == 2:  # takes half the time
            node.op, node.target, node.args = "call_method", "mul", (node.args[0],) * 2
        elif _is_large_product(node):
            left, right = node.args
            with methods.inserting_before(node):
                node.args = left, methods.call_method("t", (right,))
            node.target = fast_linear
        elif _is_onto_images(node):
            cotangents, images, kernel, _, stride, padding, *_, asked = node.args
            size = [*kernel.meta["val"].shape[2:]]
            node.args = cotangents, images, kernel, size, stride, padding, asked
            node.target = Graphs.bare_operator(_ATEN._slow_conv2d_backward.output_mask)
        elif name := _METHODS.get(node.target):
            node.op, node.target = "call_method", name
        elif Graphs.is_operator(node):
            node.target = _FUNCTIONS.get(node.target) or Graphs.bare_operator(node.target)
    for node in (*every, *methods.nodes):
        node.meta.clear()
    return GraphModule(graph, methods)


def _with_sums_of_products(graph: Graph) -> None:
    """Take a product and a sum that alone takes it as one operator, as torch's layers do."""
    product = None
    for node in graph.nodes:
        if Graphs.writes(node):
            product = None  # it may write into the factors
        elif node.target is _ATEN.mm.default and not _is_large_product(node):
            product = node
        elif product is not None and _is_its_sum(node, product):
            (other,) = [x for x in node.args if x is not product]
            with graph.inserting_before(node):
                args = _unexpanded(other), *product.args
                total = graph.call_function(_ATEN.addmm.default, args)
            total.meta["val"], product = node.meta["val"], None
            node.replace_all_uses_with(total)
    graph.eliminate_dead_code()


def _is_its_sum(node: Node, product: Node) -> bool:
    """Is it the sum of a product, which nobody else takes, and of a matrix or row like it?"""
    if node.target is not _ATEN.add.Tensor or node.kwargs or [*product.users] != [node]:
        return False
    values: Any = [x.meta.get("val") if isinstance(x, Node) else None for x in node.args]
    total = node.meta.get("val")
    are_matrices = all(isinstance(x, Tensor) and x.dim() == 2 for x in (total, *values))
    return are_matrices and len({*node.args}) == 2 and _kind(values[0]) == _kind(values[1])


def _kind(value: Any) -> Any:
    return value.shape, value.dtype


def _unexpanded(node: Any) -> Node:
    """The row that a matrix of equal rows was made of, as torch adds it to each row."""
    if node.target is _ATEN.expand.default:
        node = node.args[0]
    if node.target in (_ATEN.view.default, _ATEN.reshape.default):
        shapes = [x.meta["val"].shape for x in (node, node.args[0])]
        if shapes[0] == (1, *shapes[1]):
            node = node.args[0]
    result: Node = node
    return result


def _is_outer(node: Node) -> bool:
    """Is it a product of a column and a row?"""
    factors = _factors_of(node)
    return factors is not None and factors[0].shape[1] == 1


def _is_onto_images(node: Node) -> bool:
    """Is it a convolution's gradient in images alone, which torch itself computes faster?"""
    if node.target is not _ATEN.convolution_backward.default:
        return False
    args: Any = node.args
    values: Any = [x.meta.get("val") if isinstance(x, Node) else None for x in args[:3]]
    *_, stride, _, dilation, is_transposed, _, groups, asked = args
    is_plain = (
        [*asked] == [True, False, False]
        and (is_transposed, groups, {*dilation}) == (False, 1, {1})
        and all(isinstance(x, Tensor) and x.is_cpu and x.dim() == 4 for x in values)
        and all(x.dtype == torch.float32 for x in values)
    )
    if not is_plain:
        return False
    _, channels, *size = map(int, values[2].shape)
    seen_by = prod(size) / prod(map(int, stride))  # so many places of the kernel, on average
    return channels <= FEW_CHANNELS or (channels <= SOME_CHANNELS and seen_by <= 2.25)


def _is_large_product(node: Node) -> bool:
    """Is it a product of large matrices, whose sizes are known?"""
    factors = _factors_of(node)
    return factors is not None and factors[0].numel() * factors[1].shape[1] >= MANY_PRODUCTS


def _factors_of(node: Node) -> tuple[Tensor, Tensor] | None:
    """The factors of a product of matrices, if their sizes are known."""
    if node.target is not _ATEN.mm.default:
        return None
    left, right = [x.meta.get("val") for x in node.args if isinstance(x, Node)]
    return (left, right) if isinstance(left, Tensor) and isinstance(right, Tensor) else None
