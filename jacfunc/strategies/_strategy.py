"""What every strategy is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Blocks


@runtime_checkable
class Strategy(Protocol):
    """Anything that makes an operator explicit; a frozen dataclass that carries its own options.

    A strategy sees the linear map alone: no tree, no ``argnums``, no module.

    Example:
        A strategy of your own, here one that announces itself:

        >>> import torch, jacfunc
        >>> class Loud:
        ...     def materialize(self, operator):
        ...         print(sum(out.numel() for out in operator.outputs), "rows")
        ...         return jacfunc.Reverse().materialize(operator)
        >>> jacfunc.jacobian(torch.sin, strategy=Loud())(torch.zeros(2))
        2 rows
        tensor([[1., 0.],
                [0., 1.]])
    """

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` of the operator's Jacobian."""
        ...
