"""``linearize``: a function's value at a point, and its Jacobian there as a linear operator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from jacfunc._assembly import sweep_leaves
from jacfunc._calls import at_all
from jacfunc._lending import Revisits
from jacfunc._linear_map import JacobianOperator
from jacfunc._products import PointProducts
from jacfunc._trees import map_tensors
from jacfunc._types import AuxT, Leaves, OutT, Tree
from jacfunc.operators._linear_operator import LinearOperator
from jacfunc.operators._products import MANY
from jacfunc.operators._space import Space
from jacfunc.strategies import in_words_of


@overload
def linearize(
    func: Callable[..., OutT], *primals: Tree, has_aux: Literal[False] = False
) -> tuple[OutT, LinearOperator]: ...
@overload
def linearize(
    func: Callable[..., tuple[OutT, AuxT]], *primals: Tree, has_aux: Literal[True]
) -> tuple[OutT, LinearOperator, AuxT]: ...
def linearize(func: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> tuple[Any, ...]:
    """The value of ``func`` and its Jacobian as a linear operator, by one evaluation.

    ``J v`` and ``Jᵀ u`` without J: ``value, J = linearize(func, x)``, then ``J @ v``, ``J.T @ u``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        primals: the arguments, all differentiated.
        has_aux: ``func`` returns ``(output, aux)``.

    Returns:
        ``(value, J)`` or ``(value, J, aux)``. The domain of J are trees like the primal, or tuples
        of trees for more than one; its codomain trees like the value. It answers from the point at
        which it was made, with the random numbers that were drawn there. Where gradients are
        followed, products can be differentiated by the vector and by the primals.

    Raises:
        TypeError, ValueError: arguments that do not fit; a function that closes over tensors which
            have changed since. NotImplementedError: complex tensors, and what torch refuses.

    Cost:
        One evaluation, whose graph is kept: products with ``Jᵀ`` are pullbacks on it. A product
        with J before any with ``Jᵀ`` lets go of the graph, and is one evaluation with a tangent.
        After one with ``Jᵀ`` the graph is kept for good, and products with J take one pullback on
        the graph of a pullback. What torch can push through in neither way takes M pullbacks for a
        product with J. Beside it copies of the primals and of what ``func`` closes over.

    Example:
        >>> import torch, jacfunc
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value, J = jacfunc.linearize(lambda x: A @ x, torch.ones(2))
        >>> value, J @ torch.tensor([1.0, 0.0]), J.T @ torch.tensor([0.0, 1.0])
        (tensor([3., 7.]), tensor([1., 3.]), tensor([3., 4.]))
    """
    api = "linearize"
    primals = map_tensors(Tensor.clone, primals)
    call = at_all(api, func, primals, has_aux)
    point = JacobianOperator(call, call.primals)
    point.rewind_generators()
    outputs, extras = in_words_of(api, point.image, *PointProducts.words)
    # the user may write into the value, and the graph needs its outputs
    value, aux = call.value(tuple(map(Tensor.clone, outputs)), extras)
    domain = Space.of(primals[0] if len(primals) == 1 else primals)
    around = Revisits(api, func, call.primals, point.forget_graph, call.forget_outputs)
    is_differentiated = any(out.requires_grad for out in outputs)
    operator = Linearized(api, domain, Space.of(value), lambda: point, around, is_differentiated)
    call.forget_outputs()
    return (value, operator, aux) if has_aux else (value, operator)


class Linearized(PointProducts, LinearOperator):
    """The Jacobian of a function at a point, as a linear operator: see :class:`PointProducts`."""

    def __init__(
        self,
        api: str,
        domain: Space,
        codomain: Space,
        point: Callable[[], JacobianOperator],
        around: Callable[[], AbstractContextManager[None]],
        is_differentiated: bool = False,
    ) -> None:
        LinearOperator.__init__(self, api, domain, codomain)
        PointProducts.__init__(self, api, point, around, is_differentiated)

    def _by_rows(self, tangents: Leaves) -> Leaves:
        self._keep_graph()
        vectors = self.domain.rows(tangents).T

        def times(cotangents: Leaves, of: slice) -> Leaves:
            rows = self._point.pullback_batch(cotangents, of)
            return (self.domain.rows(rows) @ vectors,)

        chunks = sweep_leaves(times, self.codomain.leaves, MANY)
        columns = torch.cat([products for (products,) in chunks])
        return self.codomain.cut(columns.T)
