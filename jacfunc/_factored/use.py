"""An operation that uses parameters: what to pull back onto it, and what to make of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._factored.views import Path
from jacfunc._linear_map import Anchor, Graph
from jacfunc.layers import FormOf


@dataclass(frozen=True)
class Use:
    """An operation with a rule, whose output cotangents are pulled back onto.

    Args:
        anchor: the edge of the graph at the output, of all samples.
        dim: the dimension of the samples in the output; None if there is none.
        forms: for each parameter its number, the part of it that was used, and the rule's form.
        last: the node that the output came out of.
        ends: the nodes at which the parameters enter the operation.
        nodes: the nodes from ``ends`` up to ``last``, which the rule stands for.
        nbytes: bytes of the output.
    """

    anchor: Anchor
    dim: int | None
    forms: Sequence[tuple[int, Path, FormOf]]
    last: Any
    ends: set[Any]
    nodes: set[Any]
    nbytes: int

    def is_complete(self, graph: Graph) -> bool:
        """Do all paths to the operation's parameters pass through its output?

        They do not if the function takes a derivative itself, which uses the parameters again in
        operations that no rule sees.
        """
        inside = self.nodes | {self.last}
        return all(graph.met.get(node, set()) <= inside for node in self.nodes)

    def cotangents(self, products: Tensor) -> Tensor:
        """Cotangents of the output ``[K, B, *z]``, from products for the edge, with K in front."""
        return products.unsqueeze(1) if self.dim is None else products.movedim(self.dim + 1, 1)
