"""The strategy that pulls rows of the Jacobian back, many at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jacfunc._assembly import Sweep, sweep_leaves
from jacfunc._linear_map import JacobianOperator
from jacfunc.strategies._strategy import InChunks


@dataclass(frozen=True)
class Reverse(InChunks):
    """Pulls the standard basis of the outputs back, ``chunk_size`` rows at once, vmapped.

    Best where there are fewer outputs than inputs.

    Args:
        chunk_size: rows swept at once; None sweeps all.

    Raises:
        TypeError, ValueError: if ``chunk_size`` is no positive integer.

    Cost:
        One evaluation and M/K sweeps of K pullbacks; memory of the result and one chunk.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.jacobian(torch.exp, strategy=jacfunc.Reverse(chunk_size=1))(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def products(self, operator: JacobianOperator) -> Sweep:
        """Rows, by vmapped pullbacks."""
        return partial(sweep_leaves, operator.pullback_batch, operator.outputs)
