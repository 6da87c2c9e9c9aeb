"""What a strategy is, and what it says about its sweeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jacfunc._assembly import NEW_TENSORS, Sink, Sweep
from jacfunc._linear_map import JacobianOperator, check_numbers
from jacfunc._memory import Chunk
from jacfunc._types import Blocks


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
    """A strategy that can write its products into a sink while it goes on."""

    @abstractmethod
    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]``, where the sink puts them."""

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]``, each a new tensor."""
        return self.into(NEW_TENSORS, operator)


class Sweeps(NamedTuple):
    """How a strategy goes through its seeds: all that costs and forecasts ask of it.

    Args:
        over: ``"rows"`` pulls cotangents of the outputs back, ``"columns"`` pushes tangents of the
            inputs forward.
        chunk_size: seeds at once; None for all.
        is_vmapped: do the seeds of a chunk share a sweep?
        by_layers: does a sweep end at the outputs of layers, whose rules give the products?

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
        """Do tangents go forward?"""
        return self.over == "columns"


class Sweeping(Streaming):
    """A strategy that sweeps the seeds of one side; costs and forecasts know it by its sweeps.

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
        """Which seeds it sweeps, and how many at once."""

    @abstractmethod
    def products(self, operator: JacobianOperator) -> Sweep:
        """A sweep that gives rows ``[K, *in_j]``, of which it knows the graph, or columns."""

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        sweeps, products = self.sweeps, self.products(operator)
        if sweeps.over == "columns":
            operator.forget()  # what was evaluated to plan is no part of the result
            return sink.columns(
                lambda chunk: map(check_numbers, products(chunk)),
                sweeps.chunk_size,
                lambda: operator.outputs,
                operator.primals,
            )
        return sink.rows(products, sweeps.chunk_size, operator.outputs, operator.primals)


def blocks_into(sink: Sink, strategy: Strategy, operator: JacobianOperator) -> Blocks:
    """Blocks ``[*out_i, *in_j]`` by a strategy, in the sink if the strategy can write there."""
    if isinstance(strategy, Streaming):
        return strategy.into(sink, operator)
    return strategy.materialize(operator)
