"""Jacobians beside the value, and of a Jacobian: Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, Literal, Unpack, overload

from torch import Tensor

from jacfunc._calls import Derivation
from jacfunc._functions.derive import deriving, jacobian_by
from jacfunc._planning import resolve
from jacfunc._showing import named
from jacfunc._types import Argnums, FunctionOf, InT, Memory, SweepOptions, Tree
from jacfunc.strategies import Evaluation, Reverse, Strategy


@overload
def value_and_jacobian(
    func: Callable[Concatenate[InT, ...], Tensor],
    argnums: Literal[0] = 0,
    *,
    has_aux: Literal[False] = False,
    strategy: str | Strategy = ...,
    **options: Unpack[SweepOptions],
) -> FunctionOf[InT, tuple[Tensor, InT]]: ...
@overload
def value_and_jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    strategy: str | Strategy = ...,
    **options: Unpack[SweepOptions],
) -> Callable[..., tuple[Tree, Tree]]: ...
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
    func: Callable[Concatenate[Tensor, ...], Tensor],
    argnums: Literal[0] = 0,
    *,
    has_aux: Literal[False] = False,
    strategy: str | Strategy = ...,
    **options: Unpack[SweepOptions],
) -> FunctionOf[Tensor, Tensor]: ...
@overload
def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    strategy: str | Strategy = ...,
    **options: Unpack[SweepOptions],
) -> Callable[..., Tree]: ...
def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    strategy: str | Strategy = "reverse",
    has_aux: bool = False,
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
) -> Callable[..., Any]:
    """Hessian of ``func``: the Jacobian, by ``strategy``, of its reverse-mode Jacobian.

    ``H[i, j, k] = ∂² func(*args)[i] / ∂ x[j] ∂ x[k]``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: of the outer sweep, as in :func:`jacobian`: ``"reverse"`` differentiates the
            backward graph, ``"forward"`` pushes tangents through it.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: seeds of the outer sweep at once, for a strategy given by name.
        memory: as in :func:`jacrev`, for a strategy given by name.
        out: as in :func:`jacrev`: a Hessian of an earlier call.

    Returns:
        A function of the same arguments: the output tree of input trees of input trees of blocks
        ``[*out, *in, *in]``; or ``(hessian, aux)``.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: what torch refuses.

    Cost:
        M·N pullbacks through the graph of the Jacobian, or N pushforwards through all of it.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.hessian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    chosen = resolve("hessian", strategy, chunk_size, memory)
    inner = jacobian_by(Derivation("hessian", func, argnums, has_aux), Reverse())
    outer = jacobian_by(Derivation("hessian", inner, argnums, has_aux), chosen, out)
    return named("hessian", func, outer)
