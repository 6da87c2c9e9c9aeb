"""First derivatives that wait until they are asked for: those of a last layer never are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._forward_laplacian.jet import First, Jet, Propagation, leaves_in
from jacfunc._torch import below_transforms

DEEPEST = 20
"""Operations whose first derivatives wait for each other."""


@dataclass(eq=False)
class Later:
    """First derivatives that are computed when they are asked for.

    Args:
        compute: computes them, ``[N, *shape]``.
        constants: tensors that it reads, into which nobody may write before.
        depth: how many operations wait, with this one.
    """

    ctx: Propagation
    compute: Callable[[], Tensor]
    constants: list[Tensor]
    depth: int

    def __post_init__(self) -> None:
        self._versions = [x._version for x in self.constants]

    def __call__(self) -> Tensor:
        """The derivatives.

        Raises:
            NoRule: if a constant has changed since.
        """
        if [x._version for x in self.constants] != self._versions:
            self.ctx.give_up("it writes into what an operation has read")
        return self.compute()


def later(
    ctx: Propagation, jet: Jet, compute: Callable[[], Tensor], constants: Iterable[Any] = ()
) -> First:
    """The first derivatives of a function of a jet, later if its constants tell of writes."""
    tensors = [x for x in leaves_in(constants) if isinstance(x, Tensor) and not ctx.owns(x)]
    if jet.depth >= DEEPEST or any(x.is_inference() for x in tensors):
        return compute()
    if any(below_transforms(x) is not x for x in tensors):
        return compute()
    return Later(ctx, compute, tensors, jet.depth + 1)
