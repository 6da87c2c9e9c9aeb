"""Laplacians, diagonals of Hessians, and divergences: traces and diagonals without the matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias, TypedDict, Unpack, overload

import torch
from torch import Tensor

from jacfunc._assembly import DiagonalSink
from jacfunc._calls import Derivation, FlatCall
from jacfunc._carried import with_settled_calls
from jacfunc._forward_laplacian import SecondDerivatives, SecondOrder
from jacfunc._planning import compilable, resolve
from jacfunc._showing import named
from jacfunc._types import Argnums, First, Func, FunctionOf, Memory, No, OfOne, Tree
from jacfunc.strategies import Strategy, evaluate, worded

Size: TypeAlias = int | None


@overload
def laplacian(
    func: OfOne[Tensor], argnums: First = 0, *, has_aux: No = False, chunk_size: Size = ...
) -> FunctionOf[Tensor, Tensor]: ...
@overload
def laplacian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: Size = ...
) -> Callable[..., Tree]: ...
def laplacian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: Size = None
) -> Callable[..., Any]:
    """Laplacian of each output of ``func``, carried forward with value and gradient.

    ``Δf(x)[i] = Σⱼ ∂² f(x)[i] / ∂ xⱼ²``, the trace of the Hessian, over all numbers in the chosen
    arguments. A forward Laplacian (Li et al. 2024, Nature Machine Intelligence 6, algorithm 1):
    each operation maps value, gradient and Laplacian to its own, and no Hessian is made.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``; of a
            batch, ``jacfunc.vmap(laplacian(func))`` takes each sample's Laplacian.
        argnums: which positional arguments to differentiate; negative counts from the end.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: directions carried at once; None for all.

    Returns:
        A function of the same arguments: a tree like the output, ``[*out]``; or with aux.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: complex tensors, and
            what torch refuses.

    Cost:
        One evaluation with N directions, in two to three times N activations. Where an operation
        has no rule, the Hessian's diagonal is swept; the logger ``jacfunc`` says so.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.laplacian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor(18.)
        >>> batch = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> jacfunc.vmap(jacfunc.laplacian(lambda x: (x ** 3).sum()))(batch)
        tensor([18.,  6.])
    """
    return _carrying(Derivation("laplacian", func, argnums, has_aux), True, chunk_size, _second)


@overload
def value_jacobian_laplacian(
    func: OfOne[Tensor], argnums: First = 0, *, has_aux: No = False, chunk_size: Size = ...
) -> FunctionOf[Tensor, tuple[Tensor, Tensor, Tensor]]: ...
@overload
def value_jacobian_laplacian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: Size = ...
) -> Callable[..., tuple[Tree, Tree, Tree]]: ...
def value_jacobian_laplacian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: Size = None
) -> Callable[..., Any]:
    """Value, Jacobian and Laplacian of ``func``, by the one evaluation of :func:`laplacian`.

    ``(f(x), ∂f/∂x, Δf(x))``: a local energy, say, is ``-½ (Δ log ψ + |∇ log ψ|²) + V``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: directions carried at once; None for all.

    Returns:
        A function of the same arguments: ``(value, jacobian, laplacian)``, or
        ``((value, aux), jacobian, laplacian)``; blocks ``[*out, *in]`` as in :func:`jacrev`.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`laplacian`.

    Cost:
        That of :func:`laplacian`, and the Jacobian, which it carries along.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.value_jacobian_laplacian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        (tensor(9.), tensor([ 3., 12.]), tensor(18.))
    """

    def pack(results: SecondDerivatives, has_aux: bool) -> Any:
        value, aux = results.value_and_aux()
        return (value, aux) if has_aux else value, results.jacobian(), results.second

    derivation = Derivation("value_jacobian_laplacian", func, argnums, has_aux)
    return _carrying(derivation, True, chunk_size, pack)


@overload
def hessian_diagonal(
    func: OfOne[Tensor], argnums: First = 0, *, has_aux: No = False, chunk_size: Size = ...
) -> FunctionOf[Tensor, Tensor]: ...
@overload
def hessian_diagonal(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: Size = ...
) -> Callable[..., Tree]: ...
def hessian_diagonal(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: Size = None
) -> Callable[..., Any]:
    """Diagonal of the Hessian of each output, carried forward with value and gradient.

    ``D[i, j] = ∂² func(x)[i] / ∂ xⱼ²``. :func:`laplacian` is its sum, and takes less.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: directions carried at once; None for all.

    Returns:
        A function of the same arguments: output tree of input trees of ``[*out, *in]``, with aux.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`laplacian`.

    Cost:
        One evaluation with N directions, each with a first and a second derivative.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.hessian_diagonal(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor([ 6., 12.])
    """
    derivation = Derivation("hessian_diagonal", func, argnums, has_aux)
    return _carrying(derivation, False, chunk_size, _second)


def _second(results: SecondDerivatives, has_aux: bool) -> Any:
    return (results.second, results.value_and_aux()[1]) if has_aux else results.second


def _carrying(
    derivation: Derivation,
    is_summed: bool,
    chunk_size: Size,
    pack: Callable[[SecondDerivatives, bool], Any],
) -> Callable[..., Any]:
    """A function of the arguments of ``func`` that returns what ``pack`` makes of the results."""
    sweep = resolve(derivation.api, "auto", chunk_size)

    def derive(func: Func) -> Func:
        of = Derivation(derivation.api, func, derivation.argnums, derivation.has_aux)
        results_of = SecondOrder(of, is_summed, chunk_size, sweep, pack is not _second)

        @wraps(func, updated=())
        def derived(*args: Tree, **kwargs: Any) -> Any:
            return pack(results_of(args, kwargs), of.has_aux)

        return named(of.api, func, derived)

    is_whole = chunk_size is None and not derivation.has_aux
    return with_settled_calls(derivation.func, derive) if is_whole else derive(derivation.func)


class Options(TypedDict, total=False):
    """What a divergence takes by keyword."""

    strategy: str | Strategy
    chunk_size: Size
    memory: Memory


@overload
def divergence(
    func: Func, argnums: Argnums = 0, *, has_aux: No = False, **options: Unpack[Options]
) -> Callable[..., Tensor]: ...
@overload
def divergence(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, **options: Unpack[Options]
) -> Callable[..., Any]: ...
@compilable
def divergence(
    func: Func,
    argnums: Argnums = 0,
    *,
    strategy: str | Strategy = "auto",
    has_aux: bool = False,
    chunk_size: Size = None,
    memory: Memory = None,
) -> Callable[..., Any]:
    """Divergence of ``func``: the exact trace of its Jacobian, of which the diagonal alone is kept.

    ``div f(x) = Σⱼ ∂ f(x)ⱼ / ∂ xⱼ``.

    Args:
        func: takes trees, returns tensors of the shapes that it is differentiated by, or
            ``(output, aux)`` with ``has_aux``; of a batch, ``jacfunc.vmap(divergence(func))``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: as in :func:`jacobian`: ``"auto"`` chooses forward or reverse mode by cost.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: as in :func:`jacrev`, for a strategy given by name.

    Returns:
        A function of the same arguments: a number, ``[]``; or ``(divergence, aux)``.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`laplacian`; other shapes.

    Cost:
        The sweeps of :func:`jacobian`; memory of one chunk.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.divergence(lambda x: x ** 2)(torch.tensor([1.0, 2.0]))
        tensor(6.)
    """
    api = "divergence"
    derivation = Derivation(api, func, argnums, has_aux)
    chosen = resolve(api, strategy, chunk_size, memory)

    @wraps(func, updated=())
    def derived(*args: Tree, **kwargs: Any) -> Any:
        with worded(api):
            evaluation = evaluate(api, FlatCall(derivation, args, kwargs), chosen, DiagonalSink())
        (diagonals,) = evaluation.blocks
        total = torch.cat([diagonal.flatten() for diagonal in diagonals]).sum()
        return (total, evaluation.value_and_aux()[1]) if has_aux else total

    return named(api, func, derived)
