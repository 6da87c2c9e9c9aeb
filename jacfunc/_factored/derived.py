"""Results of operations that all samples share: what is computed from parameters alone.

Their uses are looked for as those of parameters are, and what is pulled back onto them goes on to
the parameters: by the form of a rule, or else through the graph of the operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from jacfunc._factored.tracked import TrackedParameter
from jacfunc._factored.use import UsedPart
from jacfunc._layouts import Key
from jacfunc._linear_map import Anchor, Graph, Linearization, map_of_graph
from jacfunc.layers import Rows


@dataclass(frozen=True)
class Derived:
    """A result that all samples share: its value, and the parts of parameters it was made of."""

    key: Key
    value: Tensor
    parts: Sequence[UsedPart]


def through_graph(
    out: Tensor,
    params: Sequence[TrackedParameter],
    twins: Sequence[Tensor],
    graph: Graph,
    further: bool,
) -> list[UsedPart]:
    """The parts of parameters that an operation without a rule has made a result of.

    Args:
        twins: what the operation got in the place of the parameters.
        graph: from the result back to these.
        further: may products be differentiated further?
    """
    linear = map_of_graph((out,), (), list(map(Anchor.at, twins)), graph, further)
    return [
        (param.number, param.path, partial(_pulled, linear, number))
        for number, param in enumerate(params)
    ]


def _pulled(linear: Linearization, number: int, seeds: Tensor) -> Rows:
    """The form of a parameter, by a pullback of each of the cotangents ``[K, B, *z]``."""
    (products,) = linear.pull_batch((seeds.flatten(0, 1),), slice(number, number + 1))
    return Rows(products.unflatten(0, seeds.shape[:2]))


def replaced(value: Any, twins: Mapping[int, Tensor]) -> Any:
    """An argument with twins in the place of the tensors with these identities, in lists, too."""
    if type(value) in (tuple, list):
        return type(value)(replaced(item, twins) for item in value)
    return twins.get(id(value), value)


def parameters_of(numbers: Sequence[int], derived: Mapping[int, Derived]) -> set[int]:
    """The parameters with these numbers, and those that results with such numbers are made of."""
    pending, params = list(numbers), set[int]()
    while pending:
        number = pending.pop()
        if number in derived:
            pending += [part[0] for part in derived[number].parts]
        else:
            params.add(number)
    return params
