"""Jacobians beside the value, and of a Jacobian: Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, overload

import torch
from torch import Tensor

from jacfunc._calls import Derivation, FlatCall
from jacfunc._functions.derive import StrategyOptions, deriving, jacobian_by
from jacfunc._planning import compilable, resolve, resolve_second
from jacfunc._types import Argnums, First, Func, FunctionOf, InT, Memory, No, OfOne, Rows, Tree
from jacfunc.strategies import Evaluation, SecondCall, Strategy


class HessianOptions(StrategyOptions, total=False):
    """What :func:`hessian` takes by keyword."""

    rows: Rows


@overload
def value_and_jacobian(
    func: OfOne[InT], argnums: First = 0, *, has_aux: No = False, **options: Unpack[StrategyOptions]
) -> FunctionOf[InT, tuple[Tensor, InT]]: ...
@overload
def value_and_jacobian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, **options: Unpack[StrategyOptions]
) -> Callable[..., tuple[Tree, Tree]]: ...
@compilable
def value_and_jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    strategy: str | Strategy = "auto",
    has_aux: bool = False,
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
) -> Callable[..., Any]:
    """Value and Jacobian of ``func``; the value comes from the evaluation that J needs anyway.

    ``(f(x), ∂f/∂x)``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: as in :func:`jacobian`.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: as in :func:`jacrev`, for a strategy given by name; ``"auto"`` keeps to half of
            what is free where none is given.
        out: as in :func:`jacrev`.

    Returns:
        A function of the same arguments: ``(value, jacobian)``, or ``((value, aux), jacobian)``
        with ``has_aux``; blocks ``[*out, *in]`` as in :func:`jacrev`.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: what torch refuses.

    Cost:
        That of :func:`jacobian`.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.value_and_jacobian(torch.square)(torch.tensor([3.0]))
        (tensor([9.]), tensor([[6.]]))
    """

    def pack(evaluation: Evaluation) -> Any:
        value, aux = evaluation.value_and_aux()
        return (value, aux) if has_aux else value, evaluation.jacobian()

    chosen = resolve("value_and_jacobian", strategy, chunk_size, memory)
    return deriving(Derivation("value_and_jacobian", func, argnums, has_aux), chosen, pack, out)


@overload
def hessian(
    func: OfOne[Tensor],
    argnums: First = 0,
    *,
    has_aux: No = False,
    **options: Unpack[HessianOptions],
) -> FunctionOf[Tensor, Tensor]: ...
@overload
def hessian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, **options: Unpack[HessianOptions]
) -> Callable[..., Tree]: ...
@compilable
def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    strategy: str | Strategy = "auto",
    has_aux: bool = False,
    rows: Rows = None,
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
) -> Callable[..., Any]:
    """Hessian of ``func``: the Jacobian, by ``strategy``, of its reverse-mode Jacobian.

    ``H[i, j, k] = ∂² func(*args)[i] / ∂ x[j] ∂ x[k]``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: ``"reverse-over-reverse"`` differentiates the backward graph,
            ``"forward-over-reverse"`` pushes tangents through it, ``"reverse-over-forward"`` pulls
            back through pushforwards, for what has no second backward pass. ``"auto"`` takes the
            one that is forecast to be the fastest, or that torch does not refuse. Any other name or
            object is the outer sweep over reverse mode, as in :func:`jacobian`.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        rows: along the first dimension of the only tensor that is differentiated, such as atoms: a
            slice, numbers or a mask. Other rows of the Hessian are not swept.
        chunk_size: seeds of the outer sweep at once, for a strategy given by name.
        memory: as in :func:`jacrev`, for a strategy given by name.
        out: as in :func:`jacrev`: a Hessian of an earlier call.

    Returns:
        A function of the same arguments: the output tree of input trees of input trees of blocks
        ``[*out, *in, *in]``, with ``rows`` ``[*out, R, *in[1:], *in]``; or ``(hessian, aux)``.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: what torch refuses.

    Cost:
        One evaluation and M·N pullbacks through the graph of the Jacobian; or N pushforwards
        through all of it, whichever rows are asked for. No graph of a third order is kept, unless
        arguments, or what ``func`` closes over, require gradients: ``torch.no_grad()`` spares it.

    Example:
        >>> import torch, jacfunc
        >>> energy = lambda x: (x ** 3).sum()
        >>> jacfunc.hessian(energy)(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
        >>> jacfunc.hessian(energy, rows=[1])(torch.tensor([1.0, 2.0]))
        tensor([[ 0., 12.]])
    """

    def twice(call: FlatCall) -> SecondCall:
        return SecondCall(call, None if rows is None else chosen_rows("hessian", rows, call))

    chosen = resolve_second("hessian", strategy, chunk_size, memory)
    return jacobian_by(Derivation("hessian", func, argnums, has_aux), chosen, out, of=twice)


def chosen_rows(api: str, rows: object, call: FlatCall) -> Tensor:
    """The numbers of the rows, along the first dimension of the only primal.

    Raises:
        TypeError, ValueError: if they are none, or there is another number of primals.
    """
    primals = call.primals
    if len(primals) != 1 or not primals[0].dim():
        shapes = [tuple(primal.shape) for primal in primals]
        raise ValueError(
            f"{api}: rows must be those of one tensor of at least one dimension, got {shapes}. "
            "Choose it by argnums, or take products by hvp."
        )
    every = torch.arange(len(primals[0]), device=primals[0].device)
    if isinstance(rows, slice):
        return every[rows]
    if isinstance(rows, list | tuple | range) or (isinstance(rows, Tensor) and rows.dim() == 1):
        try:
            index = torch.as_tensor(rows, device=every.device)
            return every[index if index.dtype == torch.bool or len(index) else index.long()]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{api}: rows must lie among the {len(every)} of the tensor, got {rows!r}. Count "
                "from 0, or from the end by negative numbers."
            ) from error
    raise TypeError(
        f"{api}: rows must be a slice, a list of integers, or a tensor of integers or booleans of "
        f"one dimension, got {type(rows).__name__}. Write [3] for the fourth row."
    )
