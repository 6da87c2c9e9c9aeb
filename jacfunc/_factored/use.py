"""An operation that uses a parameter, as an edge of a graph to differentiate by."""

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
    """An operation that a rule covers: the edge to differentiate by, and what to make of that."""

    anchor: Anchor
    """Where it came out, of all samples."""
    dim: int | None
    """Which dimension the samples are."""
    forms: Sequence[tuple[int, Path, FormOf]]
    """By parameter: its number, the part that was used, the form of that."""
    last: Any
    """The node that it came out of."""
    ends: set[Any]
    """Nodes of the graph at which the parameters went in."""
    nodes: set[Any]
    """These, and those between there and what came out."""
    nbytes: int
    """Of what came out."""

    def is_all(self, graph: Graph) -> bool:
        """Does no other path lead to where the parameters went in?

        A derivative taken inside the function uses them again, in operations nobody sees.
        """
        inside = self.nodes | {self.last}
        return all(graph.met.get(node, set()) <= inside for node in self.nodes)

    def cotangents(self, products: Tensor) -> Tensor:
        """``[K, B, *z]`` from products for the edge, with K in front."""
        return products.unsqueeze(1) if self.dim is None else products.movedim(self.dim + 1, 1)
