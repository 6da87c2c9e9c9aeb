"""Layer by layer: what reaches an operation from behind, times what went into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from jacfunc._arguments import check_chunk_size
from jacfunc._factored import FactoredJacobian, LearnedUses, factored
from jacfunc._linear_map import JacobianOperator, Samples
from jacfunc._lock import alone
from jacfunc._memory import Chunk, FittedChunks, in_chunks, of_leaf
from jacfunc._torch import is_outermost
from jacfunc._types import Blocks, Leaves
from jacfunc.strategies._reverse import Reverse


@dataclass(frozen=True)
class Structured:
    """Pulls rows back onto what comes out of layers, and multiplies with what went in.

    The block of a layer's weight is an outer product of these two, written where it belongs
    without a pass through autograd. What no rule in ``jacfunc.layers`` covers is differentiated
    as ever, and the two parts add up.

    Best for Jacobians of every sample in a network's parameters. Inside another transform, which
    keeps no graph to look into, rows are pulled back as by :class:`Reverse`.

    Args:
        chunk_size: rows swept at once; None sweeps all, or per sample as many as keep to 32 MB of
            cotangents.

    Raises:
        TypeError, ValueError: if ``chunk_size`` is no positive integer.

    Cost:
        One evaluation, two at the first call, M/K sweeps of K pullbacks onto the layers' outputs,
        and one product a layer; memory of the result and of all layers' inputs and cotangents.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
        >>> jac(torch.ones(5, 3))["weight"].shape
        torch.Size([5, 2, 2, 3])
    """

    chunk_size: Chunk = None

    def __post_init__(self) -> None:
        if not isinstance(self.chunk_size, FittedChunks):
            check_chunk_size("Structured", self.chunk_size)

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]``; the whole call is one sample."""
        if not is_outermost():
            return Reverse(self.chunk_size).materialize(operator)
        factors = self.factors(operator)

        outputs = factors.of_one

        def of_rows(number: int) -> Iterator[Leaves]:
            def rows(start: int, stop: int) -> Leaves:
                return tuple(row[0] for row in factors.rows(start, stop, number))

            return in_chunks(outputs[number].numel(), of_leaf(chunk, number), rows)

        chunk = operator.sink.rows_at_once(self.chunk_size, outputs, operator.primals)
        return operator.from_rows(chain.from_iterable(map(of_rows, range(len(outputs)))))

    def factors(self, operator: JacobianOperator) -> FactoredJacobian:
        """The operator evaluated, its Jacobian kept as factors."""

        def of_one(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
            return operator.func(*params)

        met = LearnedUses.of(operator.call_kind)
        whole = Samples((), ())
        with alone():
            factors = operator.refusing(
                "look into layers",
                lambda: factored(
                    of_one, operator.func, operator.primals, whole, met, operator.repeat_draws
                ),
            )
        operator.evaluated(factors.of_one, factors.extras_of_one)
        return factors
