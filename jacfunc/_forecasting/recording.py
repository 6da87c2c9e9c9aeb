"""The operations of one evaluation, recorded while it runs: a sweep repeats each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils.flop_counter import flop_registry

from jacfunc._memory import PeakBytes, dense_tensors
from jacfunc._torch import memories_of, memory_of
from jacfunc._types import Leaves

aten = torch.ops.aten
CONVOLUTIONS = frozenset({aten.convolution, aten._convolution})
VECTOR_PRODUCTS = {aten.mv: 0, aten.dot: 0, aten.addmv: 1}
"""Products that torch's registry of FLOPs lacks; each with the argument whose size counts them."""
ADDED = {
    aten.addmm: 0,
    aten.addmv: 0,
    aten.baddbmm: 0,
    aten.convolution: 2,
    aten._convolution: 2,
}
"""Products with an argument that is added to them and takes no FLOPs, by its position."""
BOOKKEEPING = frozenset({aten.detach, aten.alias})
"""Views that autograd makes for itself, and no sweep repeats."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that depends on the primals; a sweep multiplies by its derivative.

    Args:
        read: bytes of its arguments that depend on the primals; 0 for a view.
        written: bytes of its results; 0 for a view.
        flops: as torch counts them, once for each factor that depends on the primals.
        primal_bytes: bytes of the arguments that are primals themselves.
        primal_flops: FLOPs of the product with the derivative in those arguments.
        channels: of a convolution, how many go in and come out; none of anything else.
        is_scaled: is a Python number among its arguments?
        widest: bytes of the largest of the arguments that are read; 0 where there is only one.
        by_vector: of a product of a matrix and a vector, bytes from one row of the matrix to the
            next; 0 of anything else.
    """

    read: int = 0
    written: int = 0
    flops: int = 0
    primal_bytes: int = 0
    primal_flops: int = 0
    channels: tuple[int, int] = (0, 0)
    is_scaled: bool = False
    widest: int = 0
    by_vector: int = 0

    @property
    def is_conv(self) -> bool:
        """Is it a convolution?"""
        return self.channels != (0, 0)

    def times(self, batch: int) -> Operation:
        """The operation of so many samples at once."""
        return replace(
            self,
            read=self.read * batch,
            written=self.written * batch,
            flops=self.flops * batch,
            primal_bytes=self.primal_bytes * batch,
            primal_flops=self.primal_flops * batch,
            widest=self.widest * batch,
        )

    def without_primals(self) -> Operation:
        """What it does for arguments that are no primals."""
        read, flops = self.read - self.primal_bytes, self.flops - self.primal_flops
        return replace(self, read=read, flops=flops, primal_bytes=0, primal_flops=0)

    def made(self, block: int, forward: bool) -> int:
        """Bytes of the largest block of memory that it makes for a seed."""
        if self.is_conv:
            return self.filled_up(block, forward)[1]
        return self.written if forward else min(self.widest, self.read) or self.read

    def filled_up(self, block: int, forward: bool) -> tuple[float, int]:
        """Of a convolution that takes so many channels together: what others would be are zeros.

        Returns:
            times how much it multiplies; and the bytes of what it makes for a seed.
        """
        into, out = (-(-count // block) * block / max(count, 1) for count in self.channels)
        if forward:  # channels that go in are left out where they are zeros
            return out, int(self.written * out)
        return into * out, int(max(self.written * out, self.read * into))


class Unrecordable(Exception):  # noqa: N818 (no error: the function runs unrecorded)
    """Raised at a control flow operator: once traced under a mode, it has no pullback."""


class Recorder(PeakBytes):
    """Records the operations that run inside the ``with`` block, below autograd and every vmap.

    Example:
        >>> import torch
        >>> from jacfunc._forecasting.recording import Recorder
        >>> A, x = torch.ones(3, 2), torch.ones(2)
        >>> with Recorder((x,)) as recorder:
        ...     y = torch.tanh(A @ x)
        >>> [(each.flops, each.read, each.written) for each in recorder.operations]
        [(12, 8, 12), (0, 12, 12)]
    """

    def __init__(self, primals: Leaves) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._active = set(memories_of(primals))
        self._primals = set(self._active)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise Unrecordable(f"{func} has no graph of its own under a dispatch mode")
        kwargs = {**(kwargs or {})}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        active = [
            x for x in dense_tensors((*args, *kwargs.values())) if memory_of(x) in self._active
        ]
        packet = getattr(func, "_overloadpacket", None)
        if active and packet not in BOOKKEEPING:
            results = list(dense_tensors((result,)))
            added = args[ADDED[packet]] if packet in ADDED else None
            factors = [x for x in active if x is not added]
            places = set(memories_of(results))
            is_view = places <= set(memories_of(active))
            once = 0 if is_view else _flops(packet, args, kwargs, result)
            primal_bytes = (
                0 if is_view else sum(x.nbytes for x in active if memory_of(x) in self._primals)
            )
            self._active |= places
            if packet is aten.clone and memory_of(active[0]) in self._primals:
                self._primals |= places
            self.operations.append(
                Operation(
                    0 if is_view else sum(x.nbytes for x in active),
                    0 if is_view else sum(x.nbytes for x in results),
                    once * min(len(factors), 2),
                    primal_bytes,
                    once if any(memory_of(x) in self._primals for x in factors) else 0,
                    (args[0].shape[1], result.shape[1]) if packet in CONVOLUTIONS else (0, 0),
                    not is_view and any(isinstance(arg, float | int) for arg in args[:2]),
                    0 if is_view or len(active) == 1 else max(x.nbytes for x in active),
                    _row_bytes(packet, args),
                )
            )
        return result

    def _forget(self, key: int) -> None:
        # a new tensor in the memory of an active one need not depend on the primals
        super()._forget(key)
        self._active.discard(key)
        self._primals.discard(key)


def _row_bytes(packet: Any, args: tuple[Any, ...]) -> int:
    """Bytes between rows of the matrix that a call multiplies by a vector; 0 if it does not."""
    if packet not in VECTOR_PRODUCTS or packet is aten.dot:
        return 0
    matrix = args[VECTOR_PRODUCTS[packet]]
    if matrix.layout is not torch.strided:
        return 0
    return int(max(matrix.stride()) * matrix.element_size())


def _flops(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """FLOPs of a call, by torch's registry or, for products with a vector, by size."""
    if packet in VECTOR_PRODUCTS:
        return 2 * int(args[VECTOR_PRODUCTS[packet]].numel())
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
