"""Which side of a matrix right-hand sides belong to."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, get_args

from torch import Tensor

Side: TypeAlias = Literal["auto", "rows", "columns", "both"]
"""Which side of a matrix vectors belong to; both, if it is symmetric and meant itself."""


class Fitting(Protocol):
    """A space of vectors."""

    def fits(self, vectors: Any) -> bool:
        """Are these vectors of the space?"""
        ...


def side_of(
    api: str, codomain: Fitting, domain: Fitting, side: Side, b: Any, is_symmetric: bool
) -> Side:
    """The side that b belongs to, if it is not said.

    Raises:
        ValueError: if b fits none, or either.
    """
    if not isinstance(side, str) or side not in get_args(Side):
        raise ValueError(
            f"{api}: side must be 'auto', 'rows', 'columns' or 'both', got {side!r}. Say 'rows' "
            "for a b like products, 'columns' for one like vectors."
        )
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
