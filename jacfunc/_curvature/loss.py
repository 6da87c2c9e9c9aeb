"""The second derivative of a loss in the outputs of a module, one block for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import as_leaves, in_a_row, shared_units
from jacfunc._lending import Captured
from jacfunc._linear_map import Anchor, Graph, JacobianOperator, differentiable_alias, map_of_graph
from jacfunc._lock import kept_property
from jacfunc._log import note
from jacfunc._losses import SecondDerivative, known_formula
from jacfunc._modules import Independence
from jacfunc._samples import at, has_batch
from jacfunc._torch import is_undisturbed, noise_like, recording, run_as_written, run_backward
from jacfunc._trees import map_tensors
from jacfunc._trials import BatchOutputs
from jacfunc._types import Leaves, Tree, is_differentiable

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(outputs, targets)`` of a batch, as in training."""


class OutputCurvature(Protocol):
    """``H [B, M, M]``, with a block for the M outputs of each sample."""

    @property
    def roots(self) -> Leaves:
        """Columns of ``S`` with ``H = S Sᵀ``, as cotangents ``[R, B, *out]``."""
        ...

    def times_batch(self, tangents: Leaves) -> Leaves:
        """``H u`` of K vectors, ``[K, B, *out]``."""
        ...


@dataclass(frozen=True)
class Loss:
    """A loss of the outputs of a batch, and its derivatives there."""

    api: str
    func: LossFunction
    targets: Tree
    outputs: BatchOutputs
    captured: Captured | None = None
    """What the loss closes over, if its derivatives may be asked for after the call."""

    def __call__(self, *leaves: Tensor) -> tuple[Leaves, Leaves]:
        """The loss at other leaves of the outputs."""
        value: Any = run_as_written(self.func, self.outputs.tree(leaves), self.targets)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else None
            kind = shape or type(value).__name__
            raise ValueError(
                f"{self.api}: loss(outputs, targets) must be one number for the batch, got {kind}. "
                "Return the sum or the mean over samples."
            )
        return (value,), ()

    def gradient(self) -> Leaves:
        """The gradient in the outputs, ``[B, *out]``."""
        if self._formula is None:
            operator = JacobianOperator(self, self.outputs.leaves)
            return operator.pullback(tuple(map(torch.ones_like, operator.outputs)))
        with recording():  # torch's own losses take one tensor, write into nothing, need no watch
            leaves = (differentiable_alias(self.outputs.leaves[0], False),)
            value, _ = self(*leaves)
            (product,) = run_backward(value, leaves, tuple(map(torch.ones_like, value)), False)
        assert product is not None
        return (product,)

    def check_samples(self, independence: Independence) -> None:
        """Raise ValueError if the gradient in a sample's outputs depends on other samples."""
        size = len(self.outputs.leaves[0])

        def gradient_of(output_samples: Tensor, target_samples: Tensor) -> Leaves:
            leaves = tuple(at(out, output_samples, 0) for out in self.outputs.leaves)
            targets = self.targets
            if self.outputs.are_in_front:  # else nobody knows where the targets have them
                targets = map_tensors(
                    lambda x: at(x, target_samples, 0) if has_batch(x, size) else x, targets
                )
            outputs = replace(self.outputs, leaves=leaves)
            return replace(self, outputs=outputs, targets=targets).gradient()

        if size and self._formula is None:
            independence.check_loss(self.api, self.func, self.outputs.leaves, gradient_of)

    def _gradient(self, *leaves: Tensor) -> tuple[Leaves, Leaves]:
        """The gradient at other leaves, on a graph by which it may be differentiated."""
        anchors = [differentiable_alias(leaf, True) for leaf in leaves]
        copies = [anchor.clone() for anchor in anchors]  # the loss may write into them
        starts = {copy.grad_fn for copy in copies}
        value, _ = self(*copies)
        graph = Graph.of(value, starts)
        targets = [Anchor.at(anchor) for anchor in anchors]
        linear = map_of_graph(value, (), targets, graph, True)
        return linear.pull(tuple(map(torch.ones_like, value))), ()

    @kept_property
    def _of_gradient(self) -> JacobianOperator:
        # not of itself: that would be a cycle, which keeps the module and the batch
        return JacobianOperator(replace(self)._gradient, self.outputs.leaves)

    def times_batch(self, tangents: Leaves) -> Leaves:
        """``H u`` of K vectors, ``[K, B, *out]``: as H is symmetric, pullbacks of the gradient."""
        self._check_captured()
        with torch.no_grad():
            if self._fitting is not None:
                return (self._fitting.times(*tangents),)
            return self._of_gradient.pullback_batch(tangents)

    def _check_captured(self) -> None:
        """Raise ValueError if what the loss closes over has changed since the call."""
        if self.captured is not None:
            self.captured.check(self.api, "the loss")

    @property
    def precise(self) -> Loss:
        """The loss in double precision.

        Where an output is almost certain, the Hessian in single precision is mostly rounding.
        """
        outputs = replace(self.outputs, leaves=tuple(x.double() for x in self.outputs.leaves))
        targets = map_tensors(lambda x: x.double() if is_differentiable(x) else x, self.targets)
        return replace(self, targets=targets, outputs=outputs)

    @kept_property
    def roots(self) -> Leaves:
        """Columns of ``S`` with ``H = S Sᵀ``, ``[R, B, *out]``, as many as one sample needs."""
        self._check_captured()
        columns, negligible = self._known() or self._computed()
        if is_undisturbed():  # else how many columns there are may not depend on numbers
            entries = columns.square()
            squares, rounding = entries.sum(1), torch.finfo(columns.dtype).eps * columns.shape[1]
            bound = rounding * entries.amax() if negligible is None else negligible
            count = max(1, int((squares > bound).sum(1).max()))  # a sweep needs at least one
            if count < squares.shape[1]:
                order = squares.argsort(1, descending=True)[:, None, :count]
                columns = columns.gather(2, order.expand(-1, columns.shape[1], -1))
        # contiguous, or a matrix product with a weight would take them one after the other
        return as_leaves(columns.permute(2, 0, 1).contiguous(), self.outputs.leaves)

    @kept_property
    def _formula(self) -> SecondDerivative | None:
        """The second derivative by a formula, where one is known."""
        if not self.outputs.are_in_front:
            return None
        return known_formula(self.func, self.outputs.tree(self.outputs.leaves), self.targets)

    @kept_property
    def _fitting(self) -> SecondDerivative | None:
        """The formula, for targets that the loss itself takes: it raises for others."""
        if self._formula is not None:
            self(*self.outputs.leaves)
        return self._formula

    def _known(self) -> tuple[Tensor, float | None] | None:
        """Columns ``[B, M, R]`` by a formula, if one is known; a bound is that of their size."""
        with torch.set_grad_enabled(False):  # as no_grad, in fewer calls
            columns = None if self._fitting is None else self._fitting.roots()
        return None if columns is None else (columns, None)

    def _computed(self) -> tuple[Tensor, float]:
        """Columns ``[B, M, R]`` from the second derivatives, and a bound of negligible squares."""
        try:
            blocks, rounding = self.precise._blocks(), torch.finfo(torch.float64).eps
        except (RuntimeError, TypeError) as error:  # e.g. for weights that the loss closes over
            note("the loss is differentiated in the precision of the outputs: %s", error)
            blocks, rounding = self._blocks(), self._rounding
        size = blocks.shape[-1]
        least, largest = map(float, blocks.diagonal(dim1=1, dim2=2).amax(1).aminmax())
        noise = 8 * size * rounding * largest
        is_small = noise <= self._rounding * least  # beside the block of any sample
        if is_small and (columns := _triangles(blocks, noise)) is not None:
            return columns, 8 * size * noise
        return self._eigenvectors(blocks, rounding), noise

    def _eigenvectors(self, blocks: Tensor, rounding: float) -> Tensor:
        """The eigenvectors of all blocks, each times the root of its eigenvalue: ``[B, M, M]``."""
        values, vectors = torch.linalg.eigh(blocks)
        largest = 8 * values.shape[-1] * values.abs().max()
        if values.min() < -(rounding**0.5) * largest:
            raise ValueError(
                f"{self.api}: the loss must be convex in the outputs, got a Hessian with the "
                f"eigenvalue {values.min():.2g}. Use product(), which needs no root of it, or "
                "jacfunc.fisher."
            )
        columns: Tensor = vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)
        return columns

    def _blocks(self) -> Tensor:
        """The blocks of H, ``[B, M, M]``, from cotangents that all samples share.

        One more cotangent, of noise, tells whether H has entries outside of these blocks.
        """
        leaves = self.outputs.leaves
        noise = noise_like(leaves)
        pairs = zip(shared_units(leaves), noise, strict=True)
        seeds = tuple(torch.cat((units, x.unsqueeze(0))) for units, x in pairs)
        products = in_a_row(self.times_batch(seeds)).transpose(0, 1)
        # torch has no eigenvectors in half precision
        products = products.to(torch.promote_types(products.dtype, torch.float32))
        vector = in_a_row(tuple(x.unsqueeze(0) for x in noise))[0].unsqueeze(2)
        columns, product = products[:, :-1], products[:, -1]
        terms = vector * columns  # not a matrix product, which autocast would round
        expected, scale = terms.sum(1), float(terms.abs().sum(1).max())
        apart = float((product - expected).abs().nan_to_num(0.0).max())
        if apart > self._rounding**0.5 * scale:
            share = apart / scale if scale else math.inf
            raise ValueError(
                f"{self.api}: the loss must be a sum or mean over samples, got one whose Hessian "
                f"couples them (by {share:.2g} of its size). Use product(), which needs no samples."
            )
        return columns

    @property
    def _rounding(self) -> float:
        """The precision of the coarsest output."""
        return max(torch.finfo(leaf.dtype).eps for leaf in self.outputs.leaves)


def _triangles(blocks: Tensor, noise: float) -> Tensor | None:
    """The Cholesky factors of ``H + noise``, much faster than eigenvectors.

    None if a block is not positive even with the noise on its diagonal.
    """
    shift = noise * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    columns, failed = torch.linalg.cholesky_ex(blocks + shift)
    return None if failed.any() else columns
