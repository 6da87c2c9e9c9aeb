"""The strategy that sweeps rows or columns one at a time, without vmap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from jacfunc._assembly import Sweep, sweep, sweep_leaves
from jacfunc._linear_map import JacobianOperator
from jacfunc.strategies._strategy import Sweeping, Sweeps


@dataclass(frozen=True)
class Looped(Sweeping):
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
        if not isinstance(self.over, str) or self.over not in ("rows", "columns"):
            raise ValueError(
                f"Looped: over must be 'rows' or 'columns', got {self.over!r}. "
                "Rows pull cotangents back, columns push tangents forward."
            )

    @property
    def sweeps(self) -> Sweeps:
        """Rows or columns, one at a time."""
        return Sweeps(self.over, 1, is_vmapped=False)

    def products(self, operator: JacobianOperator) -> Sweep:
        """Rows or columns, by single pullbacks or pushforwards."""
        if self.over == "columns":
            return partial(sweep, operator.pushforward_each, operator.primals)
        return partial(sweep_leaves, operator.pullback_each, operator.outputs)
