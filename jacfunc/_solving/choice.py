"""What solves are asked for: which side of a matrix b belongs to, and options."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from jacfunc._arguments import check_flags
from jacfunc._errors import check_uncompiled
from jacfunc._solving.solvers import Solver

Side: TypeAlias = Literal["auto", "rows", "columns", "both"]
"""Which side of a matrix vectors belong to; both, if it is symmetric and meant itself."""


class Fitting(Protocol):
    """A space of vectors."""

    def fits(self, vectors: Any) -> bool:
        """Are these vectors of the space?"""
        ...


def check_side(api: str, side: object) -> None:
    """Refuse what names no side."""
    if not isinstance(side, str) or side not in ("rows", "columns", "both"):
        raise ValueError(
            f"{api}: side must be 'rows', 'columns' or 'both', got {side!r}. Say 'rows' for "
            "vectors like products, 'columns' for those that are multiplied."
        )


def side_of(
    api: str, codomain: Fitting, domain: Fitting, side: Side, b: Any, is_symmetric: bool
) -> Side:
    """The side that b belongs to, if it is not said.

    Raises:
        ValueError: if b fits none, or either.
    """
    if not (isinstance(side, str) and side == "auto"):
        check_side(api, side)
    if side != "auto" or is_symmetric:
        return "both" if side == "auto" else side
    spaces: dict[Side, Fitting] = {"rows": codomain, "columns": domain}
    sides = [name for name, space in spaces.items() if space.fits(b)]
    if not sides:
        kind = f"{tuple(b.shape)} of {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(
            f"{api}: b must be like products or like vectors, {codomain} or {domain}, got {kind}. "
            "Give it the shapes and dtypes of one of these."
        )
    if len(sides) > 1:
        raise ValueError(
            f"{api}: side must be said where b fits both, got 'auto'. Say 'rows' for "
            "(A Aᵀ + λ)⁻¹ b, 'columns' for (Aᵀ A + λ)⁻¹ b, 'both' for (A + λ)⁻¹ b of a symmetric A."
        )
    return sides[0]


def check_options(api: str, side: str, damping: Any, center: object, solver: object) -> None:
    """Refuse options of a solve that mean nothing, and a solve whose numbers can't be looked at."""
    check_uncompiled(api)
    check_flags(api, center=center)
    if center and side == "both":
        raise ValueError(
            f"{api}: center must be False where the matrix itself is solved, got True. Say "
            "side='rows' or 'columns'."
        )
    is_number = isinstance(damping, Real) and not isinstance(damping, bool)
    if not (is_number and 0 <= float(damping) < float("inf")):
        raise ValueError(
            f"{api}: damping must be a finite number from 0 on, got {damping!r}. Write 1e-3; of a "
            "tensor take .item()."
        )
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"{api}: solver must be Cholesky() or ConjugateGradient() of jacfunc.operators, got "
            f"{solver!r}. Leave it out for what fits into memory."
        )


def check_gram(api: str, center: object, dtype: Any) -> None:
    """Refuse options of a Gramian that mean nothing."""
    check_flags(api, center=center)
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise TypeError(
            f"{api}: dtype must be a floating point dtype, got {dtype!r}. Write torch.float64, or "
            "leave it out."
        )
