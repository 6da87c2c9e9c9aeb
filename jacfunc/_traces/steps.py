"""Code of a user's inside of jacfunc's own work: one operation, where that is written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import repeat, starmap
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from jacfunc._torch import below_vmap, is_batched, run_as_written
from jacfunc._types import Leaves

Made: TypeAlias = Sequence[Tensor | None]

Step: TypeAlias = Callable[..., Made]
"""Takes an object that it belongs to, plain settings, kinds of what it must make, and tensors."""


class Notebook(Protocol):
    """Where work is written down."""

    def with_step(self, step: Step, owner: Any, how: tuple[bool, ...], given: Leaves) -> Made:
        """What a step makes, which is written down as one operation."""


NOTEBOOK: ContextVar[Notebook | None] = ContextVar("notebook", default=None)
"""That of the work around, if it is written down."""


def as_one_step(step: Step, owner: Any, how: tuple[bool, ...], given: Leaves) -> Made:
    """``step(owner, how, None, *given)``, of which nothing is written down but that it is called.

    It must make tensors of the same kinds each time: it gets these in the place of None later.
    """
    notebook = NOTEBOOK.get()
    if notebook is None:
        return step(owner, how, None, *given)
    return notebook.with_step(step, owner, how, given)


def kinds_of(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Shapes and dtypes of tensors; None for those that are not there."""
    return tuple([None if x is None else (tuple(x.shape), x.dtype) for x in tensors])


MOST_NUMBERS = 2**16
"""Rows of more at a node of a user's own go one by one through all nodes: taken apart there alone,
they are in memory four times for a moment, and spare less and less of the time."""


def own_nodes(nodes: Iterable[Any]) -> list[Any]:
    """Those of the nodes whose backward pass is Python's, as that of a user's own is."""
    return [node for node in nodes if isinstance(node, BackwardCFunction)]


def can_take_rows(nodes: Sequence[Any], count: int) -> bool:
    """Are there nodes of users' own, and pays it that they take so many rows one by one?"""
    numbers = [sum([prod(x.shape) for x in node._input_metadata]) for node in nodes]
    return bool(numbers) and count > 1 and count * max(numbers) <= MOST_NUMBERS


@contextmanager
def taking_rows(nodes: Sequence[Any], first: Callable[[], None] | None) -> Iterator[None]:
    """A context in which these nodes of users' own take the rows of a vmap one by one.

    Autograd asks a node for its backward pass as Python does: what an object has goes before what
    its class has. Before each row ``first`` is called, if there is something to call.
    """
    try:
        for node in nodes:
            node.apply = partial(_row_by_row, node, first)
        yield
    finally:
        for node in nodes:
            vars(node).pop("apply", None)  # another thread may have swept the same graph


def _row_by_row(node: Any, first: Callable[[], None] | None, *cotangents: Tensor | None) -> Any:
    """What the backward pass of a node makes of cotangents in a vmap, one row after the other."""
    are_there, given = tuple([x is not None for x in cotangents]), _those_there(cotangents)
    if not any(map(is_batched, given)):
        return type(node).apply(node, *cotangents)
    step = partial(rows_of_node, first=first) if first else rows_of_node
    every = list[Tensor | None]()

    def of_all(rows: Leaves) -> Leaves:
        every.extend(as_one_step(step, node, are_there, rows))
        return _those_there(every)

    products = iter(below_vmap(of_all, given))
    return tuple([x if x is None else next(products) for x in every])


def rows_of_node(
    node: Any,
    are_there: Sequence[bool],
    kinds: Any,
    *given: Tensor,
    first: Callable[[], None] | None = None,
) -> Any:
    """What the backward pass of a node makes of K cotangents, called for one after the other.

    Args:
        are_there: which of its cotangents are given; the others are None.
        kinds: of what it must make, see :func:`kinds_of`; None if that may be anything.
        first: is called before each row.

    Raises:
        TypeError: if it makes something else, or leaves out for some rows what it returns for
            others.
    """
    # it may write into what it gets, and read memory as it lies
    rows = iter([x.clone(memory_format=torch.contiguous_format).unbind() for x in given])
    every_row = [next(rows) if is_there else repeat(None) for is_there in are_there]
    each: Iterable[Any] = zip(*every_row, strict=False)

    def row_of(*cotangents: Tensor | None) -> Made:
        if first is not None:
            first()
        made = type(node).apply(node, *cotangents)
        # it may return one tensor each time, and write into that
        return [x if x is None else x.clone() for x in (made if type(made) is tuple else (made,))]

    every: Any = zip(*run_as_written(list, starmap(row_of, each)), strict=True)
    made = [None if all(x is None for x in column) else torch.stack(column) for column in every]
    if kinds is not None and kinds_of(made) != kinds:
        raise TypeError(f"a backward pass has returned {kinds}, and returns {kinds_of(made)} now")
    return made


def _those_there(tensors: Iterable[Tensor | None]) -> Leaves:
    return tuple([x for x in tensors if x is not None])
