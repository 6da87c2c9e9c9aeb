"""Results of operations that all samples share: what is computed from parameters alone.

Their uses are looked for as those of parameters are, and what is pulled back onto them goes on to
the parameters: by the form of a rule, or else through the graph of the operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from jacfunc._factored.tracked import TrackedParameter, TrackedParameters
from jacfunc._factored.use import UsedPart
from jacfunc._layouts import Key, NoLayout
from jacfunc._linear_map import Anchor, Graph, Linearization, differentiable_alias, map_of_graph
from jacfunc.layers import Rows


@dataclass(frozen=True)
class Derived:
    """A result that all samples share: its value, and the parts of parameters it was made of."""

    key: Key
    value: Tensor
    parts: Sequence[UsedPart]


@dataclass(eq=False)
class DerivedResults:
    """The results of one evaluation that all samples share; they are tracked as parameters are.

    Args:
        params: the tensors that are tracked.
        starts: the nodes at which the graph of the evaluation begins, with the numbers of what
            begins there; those of results are added.
        grad_mode: may the Jacobian be differentiated further?
        by_number: the results, by the numbers that they have beside those of the parameters.
    """

    params: TrackedParameters
    starts: dict[Any, int]
    grad_mode: bool
    by_number: dict[int, Derived] = field(default_factory=dict)

    def track(self, key: Key, out: Tensor, parts: Sequence[UsedPart], graph: Graph) -> Tensor:
        """Track a result that all samples share, as if it were a parameter itself.

        What its own uses pull back goes on to the parameters that it was made of.

        Raises:
            NoLayout: if it depends on something else, too, which would be cut off.
        """
        if graph.leads_out:
            raise NoLayout(self.parameters(part[0] for part in parts))
        anchor = differentiable_alias(out, self.grad_mode)
        handle, number = anchor.view_as(anchor), 1 + max(self.starts.values())
        self.by_number[number] = Derived(key, out.detach(), parts)
        self.starts[handle.grad_fn] = number
        self.params.track(number, handle, anchor.view_as(anchor))
        return handle

    def parameters(self, numbers: Iterable[int]) -> set[int]:
        """The parameters with these numbers, and those that results are made of."""
        return parameters_of(list(numbers), self.by_number)

    def put_parameters_into(self, *sets: set[int]) -> None:
        """Put into sets of numbers, in the place of results, the parameters they are made of."""
        for numbers in sets if self.by_number else ():
            params = self.parameters(numbers)
            numbers.clear()
            numbers.update(params)


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
