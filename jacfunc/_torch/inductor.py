"""Inductor's code for a graph, called as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import GraphModule

from jacfunc._types import Leaves


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
    # what its cache returns has not been compiled, and its code is not to be had
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
