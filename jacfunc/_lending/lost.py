"""Paths from an output to a parameter that the call does not see: computed before, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from jacfunc._errors import Stale
from jacfunc._torch import below_transforms
from jacfunc._trees import flatten
from jacfunc._types import Tree


def check_fresh(
    api: str,
    outputs: Sequence[Any],
    lent: Iterable[Tensor],
    arguments: Tree,
    chosen: Mapping[int, str],
) -> None:
    """Refuse an output whose graph leads to a chosen parameter itself, past what was lent for it.

    ``chosen`` are names by identity.

    Such a path is no part of the derivative, which would be too small without a word.

    Raises:
        Stale: if there is one.
    """
    outputs = [below_transforms(x) for x in outputs if isinstance(x, Tensor)]
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    if not nodes and not any(x.requires_grad for x in outputs):
        return
    lent = [below_transforms(param) for param in lent]
    ends = {param.grad_fn for param in lent}
    leaves = [x for x in outputs if x.grad_fn is None and x.requires_grad]
    if not any(id(x) in chosen for x in (*leaves, *_leaves(nodes, ends))):
        return
    # who keeps the graph of the result is led to the parameters by what was lent, too
    given = [below_transforms(x) for x in flatten(arguments)[0] if isinstance(x, Tensor)]
    ends |= {x.grad_fn for x in given} | {node for param in lent for node in _stem(param.grad_fn)}
    known = {id(x) for x in (*lent, *given)}
    for leaf in (*leaves, *_leaves(nodes, ends)):
        if id(leaf) in chosen and id(leaf) not in known:
            raise Stale(
                f"{api}: a module must compute all that it makes of its parameters in the call "
                f"itself, got an output that depends on {chosen[id(leaf)]!r} by what was computed "
                "before and kept with its graph. Clear it before the call, or compute it in "
                "forward."
            )


def _leaves(nodes: Iterable[Any], ends: set[Any]) -> list[Tensor]:
    """Leaves that paths lead to, up to the ends."""
    pending, seen, found = list(nodes), set(ends), []
    seen.add(None)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        below = node.next_functions
        if below:
            pending += [edge[0] for edge in below]
        elif hasattr(node, "variable"):
            found.append(node.variable)
    return found


def _stem(node: Any) -> Iterable[Any]:
    """Nodes that lead from a tensor back along a single path, but for the leaf at its end."""
    while node is not None and node.next_functions:
        yield node
        below = node.next_functions
        node = below[0][0] if len(below) == 1 else None
