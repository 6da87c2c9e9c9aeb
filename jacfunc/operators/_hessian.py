"""The Hessian of a function at a point as a linear operator, on the graph of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size
from jacfunc._assembly import sweep
from jacfunc._calls import at_all
from jacfunc._lending import Revisits
from jacfunc._linear_map import JacobianOperator, LinearMap, is_followed
from jacfunc._planning import HESSIAN_PRODUCT, Plan, attempt
from jacfunc._trees import map_tensors
from jacfunc._types import AuxT, Leaves, OutT, Tree
from jacfunc.operators._linear_operator import LinearOperator, SymmetricOperator
from jacfunc.operators._products import MANY
from jacfunc.operators._restriction import Which
from jacfunc.operators._space import Space
from jacfunc.strategies import FirstDerivative, SecondCall, in_words_of

API = "hessian_operator"
WORDS = (
    "the function must be one whose gradient torch can differentiate",
    " Write the function in other operations.",
    " Take fewer vectors at once.",
)


@overload
def hessian_operator(
    func: Callable[..., OutT], *primals: Tree, has_aux: Literal[False] = False
) -> tuple[OutT, HessianOperator]: ...
@overload
def hessian_operator(
    func: Callable[..., tuple[OutT, AuxT]], *primals: Tree, has_aux: Literal[True]
) -> tuple[OutT, HessianOperator, AuxT]: ...
def hessian_operator(
    func: Callable[..., Any], *primals: Tree, has_aux: bool = False
) -> tuple[Any, ...]:
    """The value of ``func`` and its Hessian as a linear operator, by one evaluation.

    ``v ↦ H v`` with ``H = ∂² func / ∂x²``, from the graph of the gradient, which is kept.

    Args:
        func: takes trees, returns one number, or ``(number, aux)`` with ``has_aux``.
        primals: the arguments, all differentiated.
        has_aux: ``func`` returns ``(number, aux)``.

    Returns:
        ``(value, H)`` or ``(value, H, aux)``: a :class:`jacfunc.operators.HessianOperator`. Its
        vectors are trees like the primal, or tuples of trees for more than one. It answers from
        the point at which it was made, with the random numbers that were drawn there.

    Raises:
        TypeError, ValueError: arguments that do not fit, a function of more than one number.
        NotImplementedError: complex tensors, and what torch has no second derivative of.

    Cost:
        One evaluation and one pullback, whose graph is kept. No product evaluates again, unless
        torch has no second backward pass.

    Example:
        >>> import torch, jacfunc
        >>> point = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
        >>> value, H = jacfunc.hessian_operator(lambda x: (x["a"] ** 2 * x["b"]).sum(), point)
        >>> H @ {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])}
        {'a': tensor([6., 0.]), 'b': tensor([2.])}
        >>> H["a", "b"].matrix()
        tensor([[2.],
                [4.]])
    """
    primals = map_tensors(Tensor.clone, primals)
    call = at_all(API, func, primals, has_aux)
    second = SecondCall(call, of_one_number=True)
    space = Space.of(primals[0] if len(primals) == 1 else primals)
    operator = HessianOperator(API, space, second, nullcontext)
    point = operator._point
    operator._around = Revisits(API, func, call.primals, point.forget_graph, call.forget_outputs)
    call.forget_outputs()
    value, aux = second.value(*point.image())
    value = map_tensors(Tensor.clone, value)  # the user may write into it
    return (value, operator, aux) if has_aux else (value, operator)


class HessianOperator(SymmetricOperator):
    """The Hessian of a function of one number: symmetric, on the graph of the gradient.

    Args:
        api: the name of the public function that made it, with which error messages begin.
        space: of its vectors.
        second: the gradient of the function.
        around: a context for each product, in which the function may be evaluated.

    Raises:
        ValueError: if tensors that the function closes over have changed since.

    Cost:
        The graph of one gradient, which is kept; K products are a sweep of K pullbacks through it.

    Example:
        Newton's method in one step, as the function is quadratic:

        >>> import torch, jacfunc
        >>> A, x = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.ones(2)
        >>> value, H = jacfunc.hessian_operator(lambda x: x @ A @ x / 2 - x.sum(), x)
        >>> (x - torch.linalg.solve(H.matrix(), H.gradient())).allclose(A.inverse().sum(1))
        True
    """

    def __init__(
        self,
        api: str,
        space: Space,
        second: FirstDerivative,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(api, space, space)
        self._second, self._around = second, around
        self._point = JacobianOperator(second, second.primals)
        self._plan: Plan = HESSIAN_PRODUCT
        self._point.rewind_generators()
        self._run(self._evaluated)
        # who can differentiate by the point needs the graph of the evaluation itself
        self._is_differentiated = any(row.requires_grad for row in self._point.outputs)

    @property
    def value(self) -> Tensor:
        """The number that the function returned."""
        return self._point.image()[1][0].clone()

    def gradient(self) -> Tree:
        """The gradient at the point, a tree like a vector; it was taken for the operator."""
        pairs = zip(self._point.outputs, self.domain.leaves, strict=True)
        return self.domain.split.place([row.clone().view(leaf.shape) for row, leaf in pairs])

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        if is_followed(tangents) and not self._is_differentiated:
            return self._as_map()(tangents)
        return self._by_hessian(tangents)

    def __getitem__(self, which: tuple[Which, Which]) -> LinearOperator:
        """``H[rows, columns]``, a block: as :meth:`restrict`, by names of leaves or by numbers."""
        rows, columns = which
        return self.restrict(rows, columns)

    def blocks(self, *, chunk_size: int | None = MANY) -> Tree:
        """The diagonal blocks, one for each leaf of a vector.

        Args:
            chunk_size: rows that are swept at once; None for all.

        Returns:
            A tree like a vector, of matrices ``[numel, numel]``.

        Cost:
            N products, each pulled back to one leaf alone.

        Example:
            >>> import torch, jacfunc
            >>> value, H = jacfunc.hessian_operator(lambda x: x @ x * 3.0, torch.ones(2))
            >>> H.blocks()
            tensor([[6., 0.],
                    [0., 6.]])
        """
        return self.domain.split.place(self._by_leaf(chunk_size, lambda rows, _: rows))

    def diagonal(self, *, chunk_size: int | None = MANY) -> Tree:
        """The exact diagonal, a tree like a vector: as :meth:`blocks`, in the memory of a chunk."""
        parts = self._by_leaf(chunk_size, lambda rows, first: rows.diagonal(first).clone())
        pairs = zip(parts, self.domain.leaves, strict=True)
        return self.domain.split.place([part.view(leaf.shape) for part, leaf in pairs])

    def _by_leaf(
        self, chunk_size: int | None, take: Callable[[Tensor, int], Tensor]
    ) -> list[Tensor]:
        """What ``take(rows [K, n], first)`` returns of the diagonal block of each leaf."""
        check_chunk_size(self.api, chunk_size)
        taken = []
        for number, leaf in enumerate(self.domain.leaves):
            parts, first = [], 0
            for (rows,) in sweep(partial(self._onto_leaf, number), (leaf,), chunk_size):
                parts.append(take(rows.reshape(len(rows), leaf.numel()), first))
                first += len(rows)
            taken.append(torch.cat(parts))
        return taken

    def _onto_leaf(self, number: int, units: Leaves) -> Leaves:
        """Products with vectors that are zero but for one leaf, and that leaf of each."""
        onto, row = slice(number, number + 1), self._point.outputs[number]
        seeds = (units[0].to(row.dtype).reshape(len(units[0]), *row.shape),)

        def onto_leaf(plan: Plan) -> Leaves:
            if plan.strategy == HESSIAN_PRODUCT.strategy:
                return self._point.pullback_onto(onto, seeds, onto)
            every = self.domain.spread(units, [number])
            return self._second.products(self._point, every, plan.strategy)[onto]

        return self._run(onto_leaf) if len(units[0]) else units

    def _by_hessian(self, vectors: Leaves) -> Leaves:
        """K products with the Hessian; zero where there is nothing to multiply."""
        if not vectors or not len(vectors[0]):
            return vectors
        return self._run(lambda plan: self._second.products(self._point, vectors, plan.strategy))

    def _run(self, run: Callable[[Plan], Leaves]) -> Leaves:
        """What ``run`` returns for the first order of modes that torch does not refuse."""
        with self._around():
            run_one = partial(attempt, self._plan, run)
            self._plan, result = in_words_of(self.api, run_one, *WORDS)
        return result

    def _evaluated(self, plan: Plan) -> Leaves:
        """The gradient, on a graph of its own where the plan pulls back through that."""
        if plan.strategy != HESSIAN_PRODUCT.strategy:
            self._second.take(self._point)
        return self._point.outputs

    def _as_map(self) -> LinearMap:
        """The products as a map differentiable by the vectors; it is its own transpose."""
        return LinearMap.of_batches(self._by_hessian, self._as_map)
