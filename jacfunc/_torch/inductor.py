"""Graphs as a tracer should have left them, and code for them and operators, called as it is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from jacfunc._types import Leaves


@cache
def bare_operator(func: OpOverload) -> Callable[..., Any]:
    """What an operator runs, without torch's method around it, which takes a fifth of the time.

    It has a name by which code of graphs may call it.
    """
    if type(func) is not OpOverload:  # others have methods that do more
        return func
    bare = partial(func._op)
    name = func.__name__.replace(".", "_")
    vars(bare).update(__name__=name, __qualname__=str(func), __module__="aten")
    return bare


def by_inductor(graph: GraphModule, leaves: Leaves) -> Callable[..., Any]:
    """The graph compiled by Inductor; what it returns takes leaves that are like these.

    Torch puts around Inductor's code what a graph of a user's may need: modes of autograd, and
    answers that share memory with arguments. It takes as long as a small derivative, and so do
    checks of shapes. Graphs without a gradient, whose outputs are their own and whose inputs were
    compared before, need none of it.
    """
    inductor: Any = __import__("torch._inductor.compile_fx", fromlist=["compile_fx"])
    made: list[Any] = []

    def kept(inner: GraphModule, *args: Any, **kwargs: Any) -> Any:
        made.append((_ends(inner), inductor.compile_fx_inner(inner, *args, **kwargs)))
        return made[-1][1]

    ends, options = _ends(graph), {"size_asserts": False}
    # what comes from the cache was not compiled now, so that its code can't be taken out
    with torch._functorch.config.patch(enable_autograd_cache=False):
        whole = inductor.compile_fx(graph, list(leaves), kept, options)
    if [ends for ends, _ in made] != [ends]:
        return cast("Callable[..., Any]", whole)
    code = made[0][1].current_callable
    return lambda *inputs: code([*inputs])


def _ends(graph: GraphModule) -> tuple[int, int]:
    """How many inputs and outputs it has."""
    nodes = [*graph.graph.nodes]
    return sum(node.op == "placeholder" for node in nodes), len(nodes[-1].args[0])


def package_of(graph: GraphModule, leaves: Leaves, path: str) -> Callable[..., Any]:
    """The graph compiled ahead of time into a file, unless it lies there already."""
    inductor: Any = torch._inductor
    with warnings.catch_warnings():  # torch warns of its own code
        warnings.simplefilter("ignore", FutureWarning)
        if not os.path.exists(path):
            exported = torch.export.export(graph, leaves, strict=False)
            inductor.aoti_compile_and_package(exported, package_path=path)
        return cast("Callable[..., Any]", inductor.aoti_load_package(path))


def without_refused(graph: GraphModule) -> GraphModule:
    """The graph without calls that raised: they have no value, and the function went another way.

    A write among them would stay otherwise, and raise again.
    """
    refused = [
        node
        for node in graph.graph.nodes
        if isinstance(node.target, OpOverload)
        and node.target._schema.returns
        and "val" not in node.meta
        and not node.users
    ]
    for node in refused:
        graph.graph.erase_node(node)
    if refused:
        graph.recompile()
    return graph
