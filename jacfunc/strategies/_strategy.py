"""What a strategy is, and what it says about its sweeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch

from jacfunc._arguments import check_chunk_size
from jacfunc._assembly import NEW_TENSORS, Sink, Sweep, numel
from jacfunc._errors import Nameless
from jacfunc._linear_map import JacobianOperator, check_numbers
from jacfunc._memory import Chunk, FittedChunks
from jacfunc._remembered import CallKind
from jacfunc._types import Blocks

MANY = 2**14
"""So many columns take more memory, as seeds, than it takes to evaluate the function once more."""


@runtime_checkable
class Strategy(Protocol):
    """Anything that makes an operator explicit; a frozen dataclass that carries its own options.

    A strategy sees the linear map alone: no tree, no ``argnums``, no module.

    Example:
        A strategy of your own, here one that announces itself:

        >>> import torch, jacfunc
        >>> class Loud:
        ...     def materialize(self, operator):
        ...         print(sum(out.numel() for out in operator.outputs), "rows")
        ...         return jacfunc.Reverse().materialize(operator)
        >>> jacfunc.jacobian(torch.sin, strategy=Loud())(torch.zeros(2))
        2 rows
        tensor([[1., 0.],
                [0., 1.]])
    """

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` of the operator's Jacobian."""
        ...


class Streaming(ABC):
    """A strategy that hands its products to a sink as they come, instead of returning blocks."""

    @abstractmethod
    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Sweep the operator, and return blocks ``[*out_i, *in_j]`` from the sink."""

    def settled_for(self, kind: CallKind) -> Strategy | None:
        """What takes all later calls of this kind; None as long as that is not settled."""
        return self

    def all_rows_within(self, kind: CallKind) -> float | None:
        """Seconds that calls of this kind take, where all rows at once would fit into memory, too.

        None where nobody knows.
        """
        return None

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]``, each a new tensor."""
        return self.into(NEW_TENSORS, operator)


class Sweeps(NamedTuple):
    """How a strategy sweeps its seeds. Costs and forecasts ask no more of a strategy.

    Args:
        over: ``"rows"`` pulls cotangents of the outputs back, ``"columns"`` pushes tangents of the
            inputs forward.
        chunk_size: seeds at once; None for all.
        is_vmapped: do the seeds of a chunk share a sweep?
        by_layers: do sweeps end at the outputs of layers, where rules for layers take over?

    Example:
        >>> import jacfunc
        >>> jacfunc.Looped().sweeps
        Sweeps(over='rows', chunk_size=1, is_vmapped=False, by_layers=False)
    """

    over: Literal["rows", "columns"]
    chunk_size: Chunk = None
    is_vmapped: bool = True
    by_layers: bool = False

    @property
    def are_pushes(self) -> bool:
        """Does it push tangents forward, rather than pull cotangents back?"""
        return self.over == "columns"


class Sweeping(Streaming):
    """A strategy that sweeps all rows, or all columns, and describes how it does.

    Example:
        A strategy of your own, here one that pulls the unit cotangents back one by one:

        >>> import torch, jacfunc
        >>> from jacfunc.strategies import Sweeping, Sweeps
        >>> class OneByOne(Sweeping):
        ...     sweeps = Sweeps("rows", chunk_size=1, is_vmapped=False)
        ...     def products(self, operator):
        ...         units = torch.eye(operator.outputs[0].numel()).split(1)
        ...         return lambda chunk: (operator.pullback_batch((unit,)) for unit in units)
        >>> jacfunc.jacobian(torch.sin, strategy=OneByOne())(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    @property
    @abstractmethod
    def sweeps(self) -> Sweeps:
        """Which seeds are swept, how many at once, and how."""

    @abstractmethod
    def products(self, operator: JacobianOperator) -> Sweep:
        """The sweep that returns chunks of columns ``[K, *out_i]``, or of rows ``[K, *in_j]``.

        A chunk of rows holds rows of one output leaf.
        """

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        sweeps, products = self.sweeps, self.products(operator)
        if sweeps.over == "columns":
            if numel(operator.primals) >= MANY:
                sink.check_fits(operator.outputs, operator.primals)
            operator.forget()  # what was evaluated to plan is no part of the result
            return sink.columns(
                lambda chunk: map(check_numbers, products(chunk)),
                sweeps.chunk_size,
                lambda: operator.outputs,
                operator.primals,
            )
        sink.check_fits(operator.outputs, operator.primals)
        return sink.rows(products, sweeps.chunk_size, operator.outputs, operator.primals)


@dataclass(frozen=True)
class InChunks(Sweeping):
    """Sweeps rows, ``chunk_size`` at once and vmapped, unless ``sweeps`` says otherwise."""

    chunk_size: Chunk = None

    def __post_init__(self) -> None:
        if not isinstance(self.chunk_size, FittedChunks):
            check_chunk_size(type(self).__name__, self.chunk_size)

    @property
    def sweeps(self) -> Sweeps:
        """Rows, as many at once as the chunk says."""
        return Sweeps("rows", self.chunk_size)


def blocks_into(sink: Sink, strategy: Strategy, operator: JacobianOperator) -> Blocks:
    """Blocks ``[*out_i, *in_j]`` by any strategy; one that streams hands products to the sink."""
    # a user's subclass may have a materialize of its own, which is then what runs
    if isinstance(strategy, Streaming) and type(strategy).materialize is Streaming.materialize:
        return strategy.into(sink, operator)
    blocks = strategy.materialize(operator)
    _check_blocks(strategy, blocks, operator)
    return blocks


def _check_blocks(strategy: Strategy, blocks: Any, operator: JacobianOperator) -> None:
    """Refuse what a user's strategy returns, if it is not a block for each output and input."""
    expected = [[o.shape + p.shape for p in operator.primals] for o in operator.outputs]
    try:
        shapes = [[block.shape for block in row] for row in blocks]
    except (TypeError, AttributeError):
        shapes = None
    if shapes != expected:
        came = type(blocks).__name__ if shapes is None else _in_words(shapes)
        raise Nameless(
            f"materialize of {type(strategy).__name__} must return a tuple of rows of blocks "
            f"[*out, *in], here of the shapes {_in_words(expected)}, got {came}. "
            "Return a block for each output leaf by each input leaf."
        )


def _in_words(shapes: list[list[torch.Size]]) -> str:
    return str([[tuple(shape) for shape in row] for row in shapes])
