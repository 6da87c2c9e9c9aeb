"""What a backward pass depends on beside the tensors that autograd has saved for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import repeat
from operator import attrgetter, is_, methodcaller
from typing import Any, NamedTuple

from torch import Tensor

from jacfunc._torch import Graphs

_OF_TORCH = re.compile(r"[A-Z]\w*Backward\d+")
"""Names of nodes whose backward pass depends on what they have saved alone."""

_MADE = methodcaller("_sequence_nr")

_FACTORS = "_saved_other", "_saved_self"
"""What torch saves a Python number as, if it saves one as a tensor."""


def outline(
    tensor: Tensor, starts: Mapping[Any, int], first: int, told: Sequence[Tensor]
) -> tuple[Any, ...] | None:
    """The nodes behind a tensor: kinds, which leads where, when made, and numbers they have saved.

    Equal for equal backward passes of tensors that are saved in the same order. The arguments of
    operations do not tell all this: ``leaky_relu(x, slope)`` reads a number from a tensor, and of
    two layers in a row nothing shows which one the output was made of. None if a node is not one of
    torch's own operations, as nothing tells what it depends on.

    Args:
        starts: nodes at which the walk ends, or identities of leaves, with their numbers.
        first: when the evaluation began: nodes are told apart by how many were made since.
        told: the tensors that hooks were told of, as they are of all but numbers.
    """
    numbers: dict[Any, int] = {None: -1, **starts}
    nodes: list[Any] = [tensor.grad_fn]
    kinds: list[Any] = [tensor.output_nr]
    readers, last = _readers(), -1
    for node in nodes:  # which grows
        kind = type(node)
        reader = readers[kind] if kind in readers else _learned(node)
        if reader is None:
            return None
        kinds += (kind,)
        if reader is not _NOTHING:
            kinds += (reader.sure(node),)
            if reader.has_more:
                kinds += reader.values(node, told)
        for below, output in node.next_functions:
            if below not in numbers:
                if type(below) is Graphs.LEAF:
                    leaf = id(below.variable)
                    if leaf not in starts:
                        return None
                    numbers[below] = starts[leaf]
                else:
                    last -= 1
                    numbers[below] = last
                    nodes += (below,)
            kinds += numbers[below], output
    return *kinds, *map((-first).__add__, map(_MADE, nodes))


class _Reader(NamedTuple):
    """What reads the plain values that nodes of a kind have saved.

    Args:
        sure: returns those that no node of the kind saves tensors for.
        unsure: names of others: where one node has saved nothing, another may have saved a tensor.
        factors: names of what may be a number that was saved as a tensor.
    """

    sure: Callable[[Any], Any] = type
    unsure: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    has_more: bool = False
    """Is there more than what is sure? Of most kinds there is not."""

    def values(self, node: Any, told: Sequence[Tensor]) -> list[Any]:
        """The values of a node that are not sure; see :func:`outline`."""
        values = [_without_tensors(getattr(node, name)) for name in self.unsure]
        for name in self.factors:
            factor = getattr(node, name)
            if _is_number(factor) and not any(map(is_, repeat(factor), told)):
                values += name, factor.item()
        return values


_NOTHING = _Reader()


@cache
def _readers() -> dict[type, _Reader]:
    """The readers of this process, by the kinds of torch's own nodes."""
    return {}


def _learned(node: Any) -> _Reader | None:
    """The reader of a kind of which this is the first node; None if it is not one of torch's."""
    kind = type(node)
    if not _OF_TORCH.fullmatch(kind.__name__):
        return None
    values = {name: getattr(node, name) for name in dir(kind) if name.startswith("_saved_")}
    plain = [name for name, value in values.items() if _without_tensors(value) is value]
    unsure = tuple([name for name in plain if _lacks_something(values[name])])
    sure = [name for name in plain if name not in unsure]
    factors = tuple([name for name in _FACTORS if name in values]) if _FACTORS[0] in values else ()
    has_more = bool(unsure or factors)
    reader = _Reader(attrgetter(*sure) if sure else type, unsure, factors, has_more)
    return _readers().setdefault(kind, reader if reader != _NOTHING else _NOTHING)


def _lacks_something(saved: Any) -> bool:
    """Has a node saved nothing here, or not all, where another one may have saved tensors?"""
    return saved is None or (isinstance(saved, tuple) and (not saved or None in saved))


def _without_tensors(saved: Any) -> Any:
    """What a node has saved, with the class of tensors in the place of these."""
    if isinstance(saved, Tensor):
        return Tensor
    has_tensors = isinstance(saved, tuple) and any(isinstance(x, tuple | Tensor) for x in saved)
    return tuple(map(_without_tensors, saved)) if has_tensors else saved


def _is_number(factor: Any) -> bool:
    """May it be a number that torch has saved as a tensor?"""
    return isinstance(factor, Tensor) and not factor.dim() and not factor.requires_grad
