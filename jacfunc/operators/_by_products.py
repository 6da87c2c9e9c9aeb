"""A linear operator as estimators see it, and the sum of its squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from jacfunc._assembly import Sink, Sweep
from jacfunc._memory import Chunk
from jacfunc._types import Blocks, Leaves
from jacfunc.estimators import ByProducts
from jacfunc.operators._linear_operator import LinearOperator
from jacfunc.operators._space import on_rows


class SumOfSquares(Sink):
    """Adds up the squares of all entries of a matrix, as the only block."""

    def rows(self, sweep: Sweep, chunk: Chunk, outputs: Leaves, primals: Leaves) -> Blocks:
        return self._total(sweep(chunk))

    def columns(
        self, sweep: Sweep, chunk: Chunk, outputs: Callable[[], Leaves], primals: Leaves
    ) -> Blocks:
        return self._total(sweep(chunk))

    def _total(self, chunks: Iterable[Leaves]) -> Blocks:
        leaves = (leaf for chunk in chunks for leaf in chunk)
        squares = [x.to(_computed_in(x.dtype)).square().sum() for x in leaves]
        return ((torch.stack(squares).sum(),),)


def by_products(
    api: str,
    operator: LinearOperator,
    estimator: object,
    method: str,
    known: str,
    *,
    is_square: bool = True,
) -> ByProducts:
    """The operator as estimators see it, after checks of both.

    Raises:
        TypeError, ValueError: what is no operator, is empty or not square, or estimates another
            number.
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"{api}: operator must be a LinearOperator, got {type(operator).__name__}. Make one "
            "with jacfunc.linearize(func, x)."
        )
    rows, columns = operator.shape
    if not rows * columns or (is_square and rows != columns):
        must = "be square, with rows" if is_square else "have rows and columns"
        raise ValueError(
            f"{api}: the operator must {must}, got {rows} × {columns}. Restrict it, or take "
            "that of A.T @ A."
        )
    is_one = callable(getattr(estimator, method, None)) and not isinstance(estimator, type)
    if estimator is not None and not is_one:
        raise TypeError(
            f"{api}: estimator must be {known}, or None for the exact value, got "
            f"{type(estimator).__name__}. They are in jacfunc.estimators, as in XTrace(100)."
        )
    return seen_by_estimators(api, operator)


def seen_by_estimators(api: str, operator: LinearOperator) -> ByProducts:
    """The operator as a matrix that is known by its products."""
    dtype, domain, codomain = _computed_in(operator.dtype), operator.domain, operator.codomain
    push = on_rows(domain, codomain, operator.pushforward_batch)
    pull = on_rows(codomain, domain, operator.pullback_batch)
    return ByProducts(
        api,
        operator.shape,
        dtype,
        operator.device,
        max(torch.finfo(x.dtype).eps for x in (*domain.leaves, *codomain.leaves)),
        lambda rows: push(rows).to(dtype),
        lambda rows: pull(rows).to(dtype),
        lambda: domain.flat(operator.diagonal()).to(dtype),
    )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Half precision loses sums, and has no factorizations."""
    return torch.promote_types(dtype, torch.float32)
