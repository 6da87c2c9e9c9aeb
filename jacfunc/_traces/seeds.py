"""Tensors that a trace fills like another one, as the seeds of a pullback are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_FILLED = {
    **dict.fromkeys((_ATEN.zeros_like.default, _ATEN.new_zeros.default), 0),
    **dict.fromkeys((_ATEN.ones_like.default, _ATEN.new_ones.default), 1),
    _ATEN.full_like.default: None,  # its second argument says with what
}
"""Operators that read the sizes of a tensor and no number of it, and what they fill with."""


def fill_by_sizes(graph: GraphModule) -> None:
    """Make them depend on no input, as they depend on no number of one: they are computed once."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.target not in _FILLED or not (
            isinstance(value, Tensor) and value.is_contiguous() and not value.is_meta
        ):
            continue
        number = node.args[1] if _FILLED[node.target] is None else _FILLED[node.target]
        if not isinstance(number, Node):
            with graph.graph.inserting_before(node):
                kind: Any = {"dtype": value.dtype, "device": value.device}
                size = [*value.shape], number
                filled = graph.graph.call_function(_ATEN.full.default, size, kind)
            filled.meta = dict(node.meta)
            node.replace_all_uses_with(filled)
