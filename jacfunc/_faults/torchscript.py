"""TorchScript under forward mode, which nothing watches."""

from __future__ import annotations

from typing import Any

import torch

from jacfunc._errors import Refused
from jacfunc._faults.forward import FAULTY
from jacfunc._faults.operations import CONSTANT_TO_TORCH


def check_scripted(module: torch.nn.Module) -> None:
    """Refuse TorchScript that forward mode is wrong in, or may be: nothing is watched inside.

    What torch has traced it runs as it is; what it has compiled from source, or loaded from a file,
    is optimized for reverse mode once it has run, which drops the tangents.

    Raises:
        Refused: if the module is such.
    """
    traced: Any = torch.jit.TracedModule  # type: ignore[attr-defined]
    if not isinstance(module, traced):
        raise Refused("torch's forward mode is zero in TorchScript that it has optimized")
    if type(module) is traced:
        return  # a part, whose operations the whole shows
    faulty = FAULTY.union(CONSTANT_TO_TORCH)
    graph: Any = module.inlined_graph
    for space, _, name in (kind.partition("::") for kind in _kinds(graph)):
        if space not in {"aten", "prim"} or name.removeprefix("special_").lstrip("_") in faulty:
            raise Refused(f"forward mode can't be watched through {name} inside TorchScript")


def _kinds(block: Any) -> set[str]:
    """Kinds of the nodes of a graph, at whatever depth."""
    nodes = list(block.nodes())
    inside = (_kinds(inner) for node in nodes for inner in node.blocks())
    return {node.kind() for node in nodes}.union(*inside)
