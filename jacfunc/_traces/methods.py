"""Methods of tensors for operators: a call of an operator from Python takes thrice as long."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule

_ATEN = torch.ops.aten
_METHODS = {
    getattr(getattr(_ATEN, name), overload): name
    for overload, names in {
        "default": (
            *("mm", "bmm", "t", "permute", "view", "reshape", "unsqueeze", "expand", "clone"),
            *("addcmul", "addcmul_", "copy_", "sqrt", "sqrt_", "square", "tanh", "exp", "neg"),
            *("split_with_sizes", "alias", "detach"),
        ),
        "Tensor": ("mul", "mul_", "add", "add_", "sub", "sub_", "div", "div_"),
        "int": ("transpose", "select"),
        "dim": ("squeeze",),
        "dim_IntList": ("sum",),
        "Tensor_Scalar": ("pow",),
    }.items()
    for name in names
    if hasattr(torch.Tensor, name)
}
"""Operators, with the names of methods that take the same arguments in the same order."""


def by_methods(graph: GraphModule) -> GraphModule:
    """The same graph, with calls of methods for those of operators."""
    methods = Graph()
    methods.output(methods.graph_copy(graph.graph, {}))
    for node in methods.nodes:
        if name := _METHODS.get(node.target):
            node.op, node.target = "call_method", name
    return GraphModule(graph, methods)
