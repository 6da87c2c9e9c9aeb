"""``estimate``: a table of what each strategy would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jacfunc._arguments import check_chunk_size
from jacfunc._calls import Derivation
from jacfunc._errors import check_uncompiled
from jacfunc._forecasting import CallForecast, Forecast, price_in_words
from jacfunc._lock import alone
from jacfunc._showing import html_table
from jacfunc._torch import inside_transform
from jacfunc._types import Argnums, Tree
from jacfunc._units import in_bytes, in_counts, in_digits, in_seconds
from jacfunc.strategies import Forward, Looped, Reverse, Sweeping

API = "estimate"
HEADER = (
    *("strategy", "chunk", "calls", "sweeps", "FLOPs", "result", "peak", "time"),
    *("compiled", "repaid", "how we know"),
)


def estimate(
    func: Callable[..., Any],
    *args: Tree,
    argnums: Argnums = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Estimate:
    """Cost of the Jacobian of ``func`` by each strategy, counted on shapes without numbers.

    Nothing is computed and no memory taken, so the arguments may be larger than the machine:
    tensors on the device ``"meta"``, for example. ``func`` runs on fake tensors; what it stores
    outside itself is fake.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        *args: where the Jacobian would be taken; the numbers in them are not read.
        argnums: which positional arguments to differentiate; negative counts from the end.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: rows or columns swept at once; None sweeps all.
        **kwargs: passed on to ``func``.

    Returns:
        An :class:`Estimate`: a table with a row for each of reverse, forward and looped. FLOPs
        are those of torch's ``FlopCounterMode``: products of matrices, convolutions, attention.
        Seconds are a forecast from how fast this machine is, which is measured when first asked
        for; a factor of two off is usual. ``compiled`` is the time of a call that
        :func:`jacfunc.compile` has compiled by Inductor, ``repaid`` the number of calls after
        which that has paid for itself; strategies that loop have long traces.
        A strategy that torch refuses, or a function whose course depends on its data, has a row
        that says so, with what the sizes alone tell.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Cost:
        At most three sweeps a strategy, on fake tensors: milliseconds an operation, no memory.

    Example:
        >>> import torch, jacfunc
        >>> W = torch.empty(100_000, 100_000, device="meta")
        >>> x = torch.empty(100_000, device="meta")
        >>> costs = jacfunc.estimate(lambda x: torch.tanh(W @ x), x, chunk_size=64)
        >>> costs["reverse"].peak_bytes / costs["reverse"].result_bytes < 1.01
        True
    """
    check_uncompiled(API, "Call it before.")
    check_chunk_size(API, chunk_size)
    if inside_transform():
        raise ValueError(
            f"{API}: it must be called outside of transforms, got a call inside vmap or a "
            "derivative. Give the function that they transform."
        )
    strategies: tuple[Sweeping, ...] = (Reverse(chunk_size), Forward(chunk_size), Looped())
    with alone():  # torch's fake tensors turn a switch of the process, too
        call = CallForecast(Derivation(API, func, argnums, has_aux), args, kwargs)
        return Estimate(call.rows, call.columns, tuple(map(call.forecast, strategies)))


@dataclass(frozen=True, repr=False)
class Estimate:
    """What :func:`estimate` returns: a table with a row for each strategy; ``[name]`` is one row.

    Args:
        outputs: M, the rows of the Jacobian as a matrix; None if the function needs data.
        inputs: N, its columns.
        rows: forecasts, one for each strategy.

    Example:
        >>> import torch, jacfunc
        >>> costs = jacfunc.estimate(torch.tanh, torch.zeros(1000))
        >>> costs["forward"].result_bytes
        4000000
        >>> [row["strategy"] for row in costs.to_dicts()]
        ['reverse', 'forward', 'looped']
    """

    outputs: int | None
    inputs: int
    rows: tuple[Forecast, ...]

    def __getitem__(self, name: str) -> Forecast:
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(repr(row.name) for row in self.rows)
        raise KeyError(f"{API}: the table has the rows {names}, got {name!r}. Name one of them.")

    def __iter__(self) -> Iterator[Forecast]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        table = [HEADER, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_line(cells, widths) for cells in table]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        """The table as HTML, for notebooks."""
        return html_table(self._title(), HEADER, map(_cells, self.rows))

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain strings and numbers."""
        return [
            {
                "strategy": row.name,
                "chunk_size": row.chunk_size,
                "evaluations": row.evaluations,
                "sweeps": row.sweeps,
                "flops": row.flops,
                "result_bytes": row.result_bytes,
                "peak_bytes": row.peak_bytes,
                "seconds": row.seconds,
                "compile_seconds": row.compilation and row.compilation.build_seconds,
                "compiled_seconds": row.compilation and row.compilation.call_seconds,
                "calls_to_repay": row.compilation and row.compilation.calls_to_repay,
                "reason": row.reason,
            }
            for row in self.rows
        ]

    def _title(self) -> str:
        outputs = "?" if self.outputs is None else self.outputs
        return f"Jacobian of {outputs} outputs by {self.inputs} inputs"


def _cells(row: Forecast) -> tuple[str, ...]:
    """The cells of a row, as text."""
    compiled, _, calls = price_in_words(row.compilation)
    return (
        row.name,
        "all" if row.chunk_size is None else str(row.chunk_size),
        in_digits(row.evaluations),
        in_digits(row.sweeps),
        in_counts(row.flops),
        in_bytes(row.result_bytes),
        in_bytes(row.peak_bytes),
        in_seconds(row.seconds),
        compiled,
        calls,
        row.reason if len(row.reason) <= 80 else row.reason[:79] + "…",
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """A row of the table as text: words are aligned to the left, numbers to the right."""
    first, *numbers, last = cells
    padded = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join([first.ljust(widths[0]), *padded, last]).rstrip()
