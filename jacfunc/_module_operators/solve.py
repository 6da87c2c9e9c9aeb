"""What solves with a module's Jacobian need of its samples: factors of layers, rows of some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacfunc._kernels import KeptRows, gram_of_samples, variances_of_samples
from jacfunc._lock import kept_property
from jacfunc._modules import ModuleAtBatch, as_tree, tangents_of
from jacfunc._types import Leaves
from jacfunc.operators import Space

FEW_ROWS = 4
"""Sweeps for so many rows of a sample take about as long as the evaluation, and its only sweep."""


@dataclass(eq=False)
class SampleFactors:
    """The samples of a batch, whose Jacobian in the parameters is taken as factors of layers.

    Args:
        at_batch: the module at the batch.
        domain: of vectors like the parameters.
    """

    at_batch: ModuleAtBatch
    domain: Space

    @kept_property
    def _kept(self) -> KeptRows | None:
        at_batch, settled = self.at_batch, self.at_batch.settled
        is_whole = at_batch.budget.is_open and at_batch.chunk_size is None
        if settled is None or not is_whole:
            return None
        if settled.output[0].numel() > FEW_ROWS * at_batch.size:
            return None
        rows = at_batch.made_at_once(KeptRows.of)
        if not isinstance(rows, KeptRows):
            return None
        at_batch.evaluations.check((0, at_batch.size), (rows.output,))
        return rows

    @property
    def kept(self) -> KeptRows | None:
        """All rows, from one evaluation for all answers, if each sample has few.

        None unless earlier calls have settled all but the numbers, and where these were written
        into since.

        Raises:
            ValueError: if tensors have changed that are no copies.
        """
        if (rows := self._kept) is None or not rows.are_as_kept:
            return None
        originals = self.at_batch.call.state.originals
        if originals is not None:
            originals.check(self.at_batch.api)
        return rows

    def gram(self, center: bool, dtype: torch.dtype) -> Tensor:
        """``J Jᵀ`` of the only output."""
        if (rows := self.kept) is not None:
            return rows.gram(self._params, center, dtype)
        return gram_of_samples([self.at_batch], center=center, dtype=dtype)

    def pulled(self, cotangents: Leaves) -> Leaves | None:
        """``Jᵀ u`` of K vectors u, ``[K, *out]``; None where no rows are kept."""
        if (rows := self.kept) is None:
            return None
        every = [self._in_order(rows.pulled(self._params, u)) for u in cotangents[0]]
        if len(every) == 1:
            return tuple([x[None] for x in every[0]])
        return tuple(map(torch.stack, zip(*every, strict=True)))

    @property
    def _params(self) -> Leaves:
        return tuple(self.at_batch.params.values())

    def by_name(self, leaves: Leaves) -> dict[str, Tensor]:
        """One vector, as a tensor for each parameter."""
        state, tree = self.at_batch.call.state, self.domain.split.place(leaves)
        tangents = tangents_of(self.at_batch.api, state, tree)
        return dict(zip(self.at_batch.params, tangents, strict=True))

    def variances(self, diagonal: Leaves) -> Tensor:
        """``J_b S J_bᵀ`` of each sample's only output, for a diagonal S like a vector."""
        return variances_of_samples(self.at_batch, self.by_name(diagonal), self.kept)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of some samples, ``[B, C, N]``."""
        if (kept := self.kept) is not None:
            return self._in_rows(kept.blocks(self._params, slice(start, stop)))
        every = list[Tensor]()
        with self.at_batch.evaluated(start, stop) as factors:
            for number, out in enumerate(factors.outputs):
                blocks = factors.rows(0, out.shape[1:].numel(), number)
                every.append(self._in_rows(blocks))
        return torch.cat(every, 1)

    def _in_rows(self, blocks: Sequence[Tensor]) -> Tensor:
        """Rows ``[B, C, N]`` of blocks ``[B, C, *param]``."""
        leaves = tuple([leaf.flatten(0, 1) for leaf in self._in_order(blocks)])
        return self.domain.rows(leaves).view(*blocks[0].shape[:2], self.domain.size)

    def _in_order(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """What there is for each parameter of the module, in the order of vectors' leaves."""
        named = dict(zip(self.at_batch.params, leaves, strict=True))
        return self.domain.split.align(as_tree(self.at_batch.call.state, named), "vector")
