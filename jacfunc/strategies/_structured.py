"""The strategy by layers: cotangents of a layer's outputs, times the layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from jacfunc._assembly import Sweep
from jacfunc._factored import FactoredJacobian, LearnedUses, VmappedBatch, factored
from jacfunc._linear_map import JacobianOperator, Samples
from jacfunc._lock import alone
from jacfunc._memory import Chunk, in_chunks, of_leaf
from jacfunc._torch import is_outermost
from jacfunc._types import Leaves
from jacfunc.strategies._reverse import Reverse
from jacfunc.strategies._strategy import InChunks, Sweeps


@dataclass(frozen=True)
class Structured(InChunks):
    """Pulls rows back onto the outputs of layers, and multiplies these with the layers' inputs.

    The block of a layer's weight is an outer product of the two, written where it belongs without
    a pass through autograd. Operations that no rule in ``jacfunc.layers`` covers are differentiated
    by autograd, and the two parts are added.

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

    @property
    def sweeps(self) -> Sweeps:
        """Rows, pulled back as far as the outputs of layers."""
        return Sweeps("rows", self.chunk_size, by_layers=True)

    def products(self, operator: JacobianOperator) -> Sweep:
        """Rows, by products of factors; the whole call is one sample."""
        if not is_outermost():
            return Reverse(self.chunk_size).products(operator)
        factors = self.factors(operator)

        def rows(chunk: Chunk) -> Iterator[Leaves]:
            for number, out in enumerate(factors.sample_outputs):
                yield from in_chunks(out.numel(), of_leaf(chunk, number), partial(rows_of, number))

        def rows_of(number: int, start: int, stop: int) -> Leaves:
            return tuple(row[0] for row in factors.rows(start, stop, number))

        return rows

    def factors(self, operator: JacobianOperator) -> FactoredJacobian:
        """The operator's Jacobian as factors, from an evaluation that finds uses of parameters."""

        def of_one(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
            return operator.func(*params)

        batch = VmappedBatch(of_one, operator.func, operator.primals, Samples((), ()))
        uses = LearnedUses.of(operator.call_kind)
        with alone():
            factors = operator.refusing(
                "look into layers", lambda: factored(batch, uses, operator.rewind_generators)
            )
        operator.keep_image(factors.sample_outputs, factors.sample_extras)
        return factors
