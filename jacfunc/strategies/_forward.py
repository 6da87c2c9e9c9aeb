"""The strategy that pushes columns of the Jacobian forward, many at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jacfunc._arguments import check_randomness
from jacfunc._assembly import Sweep, sweep
from jacfunc._linear_map import JacobianOperator
from jacfunc._types import Randomness
from jacfunc.strategies._strategy import InChunks, Sweeps

ONE_MASK = "'same' gives one dropout mask to the whole Jacobian."


@dataclass(frozen=True)
class Forward(InChunks):
    """Pushes the standard basis of the inputs forward, ``chunk_size`` columns at once, vmapped.

    Best where there are many more outputs than inputs. It keeps no graph, but a small one for a
    moment where calls of a function of one tensor are written down (at most 64 MiB).

    Args:
        chunk_size: columns swept at once; None sweeps all.
        randomness: of random functions under the vmap over columns. ``"same"``, the default,
            gives one dropout mask to the whole Jacobian; ``"error"`` refuses random functions.

    Raises:
        TypeError, ValueError: if ``chunk_size`` is no positive integer, or ``randomness`` unknown.
        NotImplementedError: when it sweeps, if a column holds a nan.

    Cost:
        N/K evaluations, each with K tangents; memory of the result and one chunk.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.jacobian(torch.exp, strategy=jacfunc.Forward())(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    randomness: Randomness = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_randomness("Forward", self.randomness, ONE_MASK)

    @property
    def sweeps(self) -> Sweeps:
        """Columns, as many at once as the chunk says."""
        return Sweeps("columns", self.chunk_size)

    def products(self, operator: JacobianOperator) -> Sweep:
        """Columns, by vmapped pushforwards."""
        push = partial(operator.pushforward_batch, randomness=self.randomness)
        return partial(sweep, push, operator.primals)
