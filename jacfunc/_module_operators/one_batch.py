"""The Jacobian of a module at one batch as a linear operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size, check_flags
from jacfunc._linear_map import LinearMap, is_followed
from jacfunc._module_operators.evaluated import Evaluated
from jacfunc._module_operators.solve import SampleFactors
from jacfunc._solving import check_gram
from jacfunc._types import Leaves, Tree
from jacfunc.operators import Linearized, Space


class DetachedOperator(Linearized):
    """A Jacobian whose products can be differentiated by their vectors, not by the point."""

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        push = self._map(True) if is_followed(tangents) else super().pushforward_batch
        return push(tangents)

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        pull = self._map(False) if is_followed(cotangents) else super().pullback_batch
        return pull(cotangents)

    def _map(self, is_push: bool) -> LinearMap:
        """The products of K vectors, differentiable by these; a transform may batch them again."""
        products = super().pushforward_batch if is_push else super().pullback_batch
        return LinearMap.of_batches(products, lambda: self._map(not is_push))


class ModuleOperator(DetachedOperator):
    """The Jacobian of a module at a batch, as a linear operator.

    Args:
        evaluated: the module at the batch.
    """

    def __init__(self, evaluated: Evaluated) -> None:
        kept = evaluated.samples.kept if evaluated.samples else None
        if kept is not None:
            point_now, codomain = evaluated.point_with(kept.output), evaluated.codomain(kept.output)
            self.outputs: Tree = kept.output.clone()
        else:
            point = evaluated.point()
            self.outputs = evaluated.checked().outputs(point)
            point_now, codomain = (lambda: point), Space.of(self.outputs)
        spaces = evaluated.domain, codomain
        super().__init__(evaluated.call.api, *spaces, point_now, evaluated.around)
        self.evaluated = evaluated
        self._uncompared: Leaves | None = None
        """The last cotangent that was pulled back from rows alone."""

    def matrix(self, *, chunk_size: int | None = 256) -> Tensor:
        """The matrix; of independent samples by one sweep for each output of a sample."""
        samples = self._lone_samples
        if samples is None:
            return super().matrix(chunk_size=chunk_size)
        check_chunk_size(self.api, chunk_size)
        (out,), width = self.codomain.leaves, self.codomain.leaves[0].shape[1:].numel()
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        step = max(1, (chunk_size or len(matrix)) // max(1, width))
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            matrix[start * width : stop * width] = samples.rows(start, stop).flatten(0, 1)
        return matrix

    def gram(self, *, center: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """``J Jᵀ``; of independent samples from the factors of layers, without J."""
        samples = self._lone_samples
        if samples is None:
            return super().gram(center=center, dtype=dtype)
        check_gram(self.api, center, dtype)
        return samples.gram(center, dtype or self.dtype)

    def quad(self, middle: Any, *, per_sample: bool = False) -> Tensor:
        """``J S Jᵀ``; from the factors of layers, if S is diagonal and samples are independent."""
        check_flags(self.api, per_sample=per_sample)
        samples = self._lone_samples
        leaves = self.diagonal_of(middle) if per_sample and samples else None
        if samples is None or leaves is None or is_followed(leaves):
            return super().quad(middle, per_sample=per_sample)
        return samples.variances(leaves)

    def rows_of_samples(self, start: int, stop: int) -> Tensor:
        """Rows of some samples; of independent samples from the factors of layers."""
        samples = self.evaluated.samples
        return samples.rows(start, stop) if samples else super().rows_of_samples(start, stop)

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        """``J v`` of K vectors, compared with a product of the transpose."""
        uncompared, self._uncompared = self._uncompared, None
        if uncompared is not None:
            super().pullback_batch(uncompared)
        return super().pushforward_batch(tangents)

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        """``Jᵀ u`` of K vectors; from rows that are kept, until a product with J is asked for."""
        is_alone = self._pair is None and not (self._was_pulled or is_followed(cotangents))
        samples = self._lone_samples if is_alone else None
        products = samples.pulled(cotangents) if samples else None
        if products is None:
            return super().pullback_batch(cotangents)
        self._uncompared = tuple([u[:1].clone() for u in cotangents])
        return products

    @property
    def _lone_samples(self) -> SampleFactors | None:
        """The samples, where the module returns one tensor of them."""
        return self.evaluated.samples if len(self.codomain.leaves) == 1 else None
