"""Refuses TorchScript under forward mode, as no watch sees inside it."""

from __future__ import annotations

from typing import Any

import torch

from jacfunc._errors import Refused
from jacfunc._faults.forward import FAULTY
from jacfunc._faults.operations import CONSTANT_TO_TORCH


def check_scripted(module: torch.nn.Module) -> None:
    """Refuse a TorchScript module in which forward mode is wrong, or may be.

    Torch runs a traced module as it is, so its operations can be looked up. A module that is
    compiled from source, or loaded from a file, is optimized for reverse mode once it has run,
    which drops tangents.

    Raises:
        Refused: if forward mode may be wrong in the module.
    """
    traced: Any = torch.jit.TracedModule  # type: ignore[attr-defined]
    if not isinstance(module, traced):
        raise Refused("torch's forward mode is zero in TorchScript that it has optimized")
    if type(module) is traced:
        return  # a submodule: the whole module shows its operations
    faulty = FAULTY.union(CONSTANT_TO_TORCH)
    graph: Any = module.inlined_graph
    for space, _, name in (kind.partition("::") for kind in _node_kinds(graph)):
        if space not in {"aten", "prim"} or name.removeprefix("special_").lstrip("_") in faulty:
            raise Refused(f"forward mode can't be watched through {name} inside TorchScript")


def _node_kinds(block: Any) -> set[str]:
    """The kinds of all nodes of a graph, and of the blocks inside them."""
    nodes = list(block.nodes())
    inside = (_node_kinds(inner) for node in nodes for inner in node.blocks())
    return {node.kind() for node in nodes}.union(*inside)
