"""Outputs that depend on a parameter by what was computed before the call, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from jacfunc._errors import Stale
from jacfunc._torch import below_transforms, nodes_behind
from jacfunc._trees import flatten
from jacfunc._types import Tree


def check_fresh(
    api: str,
    outputs: Sequence[Any],
    params: Iterable[Tensor],
    arguments: Tree,
    names: Mapping[int, str],
) -> None:
    """Refuse an output whose graph leads to a parameter itself, and not to the tensor lent for it.

    Such a path is no part of the derivative, which would be too small without a word.

    Args:
        params: what the evaluation got in the place of the chosen parameters.
        arguments: those of the evaluation.
        names: names of the chosen parameters by their identities.

    Raises:
        Stale: if there is such an output.
    """
    outputs = [below_transforms(x) for x in outputs if isinstance(x, Tensor)]
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    if not nodes and not any(x.requires_grad for x in outputs):
        return
    params = [below_transforms(param) for param in params]
    ends = {param.grad_fn for param in params}
    leaves = [x for x in outputs if x.grad_fn is None and x.requires_grad]
    if not any(id(x) in names for x in (*leaves, *_leaves(nodes, ends))):
        return
    # who keeps the graph of the result is led to the parameters by what was lent, too
    inputs = [below_transforms(x) for x in flatten(arguments)[0] if isinstance(x, Tensor)]
    ends |= {x.grad_fn for x in inputs}
    ends |= {node for param in params for node in _stem(param.grad_fn)}
    known = {id(x) for x in (*params, *inputs)}
    for leaf in (*leaves, *_leaves(nodes, ends)):
        if id(leaf) in names and id(leaf) not in known:
            raise Stale(
                f"{api}: a module must compute all that it makes of its parameters in the call "
                f"itself, got an output that depends on {names[id(leaf)]!r} by what was computed "
                "before and kept with its graph. Clear it before the call, or compute it in "
                "forward."
            )


def _leaves(nodes: Iterable[Any], ends: set[Any]) -> list[Tensor]:
    """Leaves of the graph that paths from the nodes lead to, where no end is in between."""
    behind = nodes_behind(nodes, ends)
    return [node.variable for node in behind if hasattr(node, "variable")]


def _stem(node: Any) -> Iterable[Any]:
    """Nodes from one back to where its graph branches, or to the leaf, which is left out."""
    while node is not None and node.next_functions:
        yield node
        below = node.next_functions
        node = below[0][0] if len(below) == 1 else None
