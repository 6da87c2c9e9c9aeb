"""One seed at a time, without vmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jacfunc._assembly import basis, sweep_leaves
from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Blocks


@dataclass(frozen=True)
class Looped:
    """Sweeps one cotangent (or tangent) at a time without vmap: the widest coverage.

    Works for what vmap cannot batch: data-dependent control flow, ``autograd.Function`` of the
    old style, non-reentrant checkpointing, recurrent layers.

    Args:
        over: ``"rows"`` pulls one cotangent back at a time, ``"columns"`` pushes one tangent.

    Raises:
        ValueError: if ``over`` is neither.

    Cost:
        One evaluation and M pullbacks, or N evaluations with a tangent; memory of the result and
        one row or column.

    Example:
        >>> import torch, jacfunc
        >>> def f(x):
        ...     return x * 2 if x.sum().item() > 0 else x * 3
        >>> jacfunc.jacobian(f, strategy=jacfunc.Looped())(torch.ones(2))
        tensor([[2., 0.],
                [0., 2.]])
    """

    over: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        if self.over not in ("rows", "columns"):
            raise ValueError(
                f"Looped: over must be 'rows' or 'columns', got {self.over!r}. "
                "Rows pull cotangents back, columns push tangents forward."
            )

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]``, a row or a column at a time."""
        if self.over == "columns":
            columns = map(operator.pushforward_each, basis(operator.primals, 1))
            return operator.from_columns(columns)
        return operator.from_rows(sweep_leaves(operator.pullback_each, operator.outputs, 1))
