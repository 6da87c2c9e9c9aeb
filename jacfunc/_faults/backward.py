"""Tables of autograd nodes whose backward passes are wrong, and what to do about each.

Where a graph has such a node, a sweep goes row by row instead of under vmap, or is refused. Each
entry is pinned by a test in ``tests/faults/test_faults.py``, and
``tests/faults/test_opinfo.py`` and ``tests/house/test_coverage.py`` look for more.
"""

from __future__ import annotations

from collections.abc import Set
from functools import cache
from typing import Any, NamedTuple

from jacfunc._errors import Refused
from jacfunc._torch import inside_transform, num_vmap_levels

NEVER_BATCHED = frozenset(
    {
        "CdistBackward0",  # its batching rule gives wrong rows
        "CompiledFunctionBackward",  # inductor's graphs refuse batched cotangents
    }
)
NOT_BATCHED_IF_DIFFERENTIATED = frozenset(
    # under vmap over cotangents these backward passes treat the saved statistics as constants
    {
        "NativeLayerNormBackward0",
        "NativeBatchNormBackward0",
        "NativeBatchNormLegitBackward0",
        "NativeBatchNormLegitBackward1",
        "CudnnBatchNormBackward0",
        "MiopenBatchNormBackward0",
        "FusedRmsNormBackward0",
        "LinalgDetBackward0",  # nan where singular values coincide
    }
)


WRONG_BACKWARD = {
    "CrossMapLRN2dBackward": "it leaves out the other channels",
    "AsStridedScatterBackward0": "it keeps what is overwritten",
    "CheckpointFunctionBackward": "checkpoints must not be reentrant: torch gives their gradients "
    "to backward() alone. Pass use_reentrant=False to checkpoint",
}
WRONG_INSIDE_VMAP = {
    "LinalgLuSolveBackward0": "inside an outer vmap it misreads memory",
}
WRONG_SECOND_DERIVATIVE = {
    "CondAutogradOpBackward": "control flow operators drop it",
    "ScanAutogradOpBackward": "control flow operators drop it",
    "WhileLoopAutogradOpBackward": "control flow operators drop it",
    "WeightNormInterfaceBackward0": "its formula is wrong",
    "SparseCooTensorWithDimsAndTensorsBackward0": "sparse tensors made from values drop it",
}
LOST_OUTSIDE = {
    "CppFunction": "TorchScript that it has optimized leaves no graph to levels outside",
}
"""What lies behind these nodes at one level of torch.func, no other level knows of."""


class PullbackRules(NamedTuple):
    """How a plain graph can be pulled back, given torch's faults.

    Args:
        names: the names of the graph's nodes.
        is_batchable: is a pullback right under vmap?
        keeps_graph: may products be differentiated?
        reason: why products may not be differentiated, if they should have been.
        is_forced: must every pullback use the differentiable formulas of backward passes?
    """

    names: set[str]
    is_batchable: bool
    keeps_graph: bool
    reason: str | None
    is_forced: bool


def pullback_rules(nodes: set[Any], differentiated: bool) -> PullbackRules:
    """The rules for a graph with these nodes.

    Args:
        differentiated: may the pullback be differentiated?

    Raises:
        Refused: if a node has a backward pass that is wrong even row by row.
    """
    nodes = suspects(nodes)
    if not nodes:
        return PullbackRules(set(), True, differentiated, None, False)
    check_nodes(nodes, differentiated=False)
    names = {node.__name__ for node in nodes}
    reason = wrong_second_derivative(nodes) if differentiated else None
    keeps_graph = differentiated and reason is None
    is_forced = must_be_differentiable(names, in_functorch=False)
    return PullbackRules(names, can_be_batched(names, keeps_graph), keeps_graph, reason, is_forced)


_NAMED = NEVER_BATCHED.union(
    NOT_BATCHED_IF_DIFFERENTIATED,
    WRONG_BACKWARD,
    WRONG_INSIDE_VMAP,
    WRONG_SECOND_DERIVATIVE,
    LOST_OUTSIDE,
)


def suspects(kinds: set[Any]) -> set[Any]:
    """The kinds of nodes that the tables say something about, or that are not torch's own."""
    unknown = kinds - _harmless()
    if unknown:
        _harmless().update(filter(_is_harmless, unknown))
        unknown -= _harmless()
    return unknown


@cache
def _harmless() -> set[Any]:
    """Kinds of nodes that were looked up, and are in no table."""
    return set()


def _is_harmless(kind: Any) -> bool:
    """Is it a node of torch's own that no table names?"""
    name = kind.__name__
    is_named = name in _NAMED or name.startswith("Linalg") or name.endswith("Backward")
    return not (is_named or hasattr(kind, "_forward_cls"))


def check_nodes(nodes: set[Any], differentiated: bool) -> None:
    """Refuse a graph with a node whose backward pass is wrong even row by row.

    Args:
        differentiated: is the pullback differentiated in turn?

    Raises:
        Refused: if there is such a node.
    """
    for node in nodes:
        name = node.__name__
        # nodes of autograd.Function end so, too
        if name in WRONG_INSIDE_VMAP or name.endswith("Backward"):
            _check_node(node, name)
        elif name in WRONG_BACKWARD:
            raise Refused(_wrong(name, WRONG_BACKWARD[name]))
    if differentiated and (reason := wrong_second_derivative(nodes)):
        raise Refused(reason)


def _check_node(node: Any, name: str) -> None:
    """Refuse a node that is wrong here, or whose function may be differentiated once alone."""
    if name in WRONG_INSIDE_VMAP and num_vmap_levels():
        raise Refused(_wrong(name, WRONG_INSIDE_VMAP[name]))
    if name in WRONG_BACKWARD:
        raise Refused(_wrong(name, WRONG_BACKWARD[name]))
    if once := getattr(getattr(node, "_forward_cls", None), "once_alone", None):
        raise Refused(once)


def _wrong(name: str, reason: str) -> str:
    return f"torch's backward pass of {name} is wrong here ({reason})"


def wrong_second_derivative(nodes: set[Any]) -> str | None:
    """Why no second derivative may be taken through these nodes; None if it may."""
    for node in nodes:
        name = node.__name__
        reason = WRONG_SECOND_DERIVATIVE.get(name)
        if name in LOST_OUTSIDE and inside_transform():
            reason = LOST_OUTSIDE[name]
        if _is_once_differentiable(getattr(node, "_forward_cls", None)):
            reason = "its backward is marked with @once_differentiable"
        if reason:
            return f"torch's second derivative through {name} is wrong ({reason})"
    return None


def check_statistics(names: set[str]) -> None:
    """Refuse kernels whose derivatives are wrong with a vmap between two derivatives.

    Raises:
        Refused: if there is one. A watch would have replaced it by its formula.
    """
    for name in names & NOT_BATCHED_IF_DIFFERENTIATED - {"LinalgDetBackward0"}:
        raise Refused(
            f"torch's derivatives of {name} under vmap keep saved statistics constant, so "
            "derivatives of them are wrong"
        )


def _is_once_differentiable(function: Any) -> bool:
    """Is the backward of an autograd function marked with ``@once_differentiable``?

    Torch returns zeros for its derivative where the cotangent carries no graph.
    """
    backward: Any = getattr(function, "backward", None)
    code = getattr(backward, "__code__", None)
    if code is None:
        return False
    # functorch wraps the function in a class, whose backward calls that of the function
    if "autograd_function" in code.co_freevars:
        place = code.co_freevars.index("autograd_function")
        return _is_once_differentiable(backward.__closure__[place].cell_contents)
    return bool(code.co_qualname.startswith("once_differentiable."))


def can_be_batched(nodes: set[str], differentiated: bool) -> bool:
    """Is a pullback through nodes of these names right under vmap?"""
    if nodes & NEVER_BATCHED:
        return False
    return not (differentiated and nodes & NOT_BATCHED_IF_DIFFERENTIATED)


def can_be_pushed(nodes: Set[str]) -> bool:
    """Is forward mode through a pullback of these nodes right, at any order and under any vmap?

    It is not where forward formulas take saved statistics or LU factors for constants.
    """
    if nodes & NOT_BATCHED_IF_DIFFERENTIATED:
        return False
    return not any(name.startswith("Linalg") for name in nodes)


def must_be_differentiable(nodes: set[str], in_functorch: bool) -> bool:
    """Must a backward pass use its differentiable formulas, although nobody differentiates it?

    Torch's other formulas, for when grad mode is off, solve by saved LU factors, which misreads
    memory under vmap; the one of det is zero at a singular matrix.
    """
    if in_functorch:
        return any(name.startswith("Linalg") for name in nodes)
    return "LinalgDetBackward0" in nodes
