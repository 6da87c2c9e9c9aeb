"""What solves with a module's Jacobian need of its samples: factors of layers, rows of some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._modules import ModuleAtBatch, as_tree, tangents_of
from jacfunc._types import Leaves
from jacfunc.operators import Space


@dataclass(frozen=True, eq=False)
class SampleFactors:
    """The samples of a batch, whose Jacobian in the parameters is taken as factors of layers.

    Args:
        at_batch: the module at the batch.
        domain: of vectors like the parameters.
    """

    at_batch: ModuleAtBatch
    domain: Space

    def by_name(self, leaves: Leaves) -> dict[str, Tensor]:
        """One vector, as a tensor for each parameter."""
        state, tree = self.at_batch.call.state, self.domain.split.place(leaves)
        tangents = tangents_of(self.at_batch.api, state, tree)
        return dict(zip(self.at_batch.params, tangents, strict=True))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of some samples, ``[B, C, N]``."""
        state, every = self.at_batch.call.state, list[Tensor]()
        with self.at_batch.evaluated(start, stop) as factors:
            for number, out in enumerate(factors.outputs):
                blocks = factors.rows(0, out.shape[1:].numel(), number)
                named = dict(zip(self.at_batch.params, blocks, strict=True))
                leaves = self.domain.split.align(as_tree(state, named), "rows")
                flat = self.domain.rows(tuple(leaf.flatten(0, 1) for leaf in leaves))
                every.append(flat.view(stop - start, -1, self.domain.size))
        return torch.cat(every, 1)
