"""Jacobians of functions of trees, as functions of the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, overload

from jacfunc._arguments import check_chunk_size, check_randomness
from jacfunc._calls import Derivation
from jacfunc._functions.derive import StrategyOptions, in_either_direction, jacobian_by
from jacfunc._planning import compilable, directed, resolve
from jacfunc._types import (
    Argnums,
    First,
    Func,
    FunctionOf,
    InT,
    Memory,
    No,
    OfOne,
    Randomness,
    SweepOptions,
    Tree,
)
from jacfunc.strategies import Forward, Reverse, Strategy


class PushOptions(SweepOptions, total=False):
    """What :func:`jacfwd` takes by keyword."""

    randomness: Randomness


@overload
def jacrev(
    func: OfOne[InT], argnums: First = 0, *, has_aux: No = False, **options: Unpack[SweepOptions]
) -> FunctionOf[InT, InT]: ...
@overload
def jacrev(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, **options: Unpack[SweepOptions]
) -> Callable[..., Tree]: ...
def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
) -> Callable[..., Any]:
    """Jacobian of ``func`` row by row: pulls the basis of the outputs back (reverse mode).

    ``J[i, j] = ∂ func(*args)[i] / ∂ args[argnums][j]``.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end. With a
            tuple each output leaf holds a tuple of blocks, one for each argument.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: rows swept at once; None sweeps all. Bounds the memory.
        memory: bytes that the call may take, its result among them: a number, or words such as
            ``"2 GiB"``; the sweep is cut into chunks that keep to it.
        out: the Jacobian of an earlier call, to write this one into: a loop over many points then
            pays for memory once.

    Returns:
        A function of the same arguments that returns the tree of ``func``'s output, each leaf
        replaced by the tree of the input, each leaf of that by a block ``[*out, *in]``: or
        ``(jacobian, aux)``. Leaves that are not floating have ``None`` in their place.

    Raises:
        TypeError, ValueError: arguments that do not fit, outputs that went through NumPy.
        NotImplementedError: complex or sparse tensors, and what torch has no backward pass for.
        RuntimeError: a result that does not fit into memory.

    Cost:
        One evaluation, M/K sweeps of K pullbacks for M outputs and chunks of K. Each output leaf
        has sweeps of its own, so that an infinite derivative of one spoils no row of another.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.jacrev(lambda x: x ** 2)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[2., 0., 0.],
                [0., 4., 0.],
                [0., 0., 6.]])
    """
    check_chunk_size("jacrev", chunk_size)
    reverse = directed("jacrev", Reverse(chunk_size), memory)
    return jacobian_by(Derivation("jacrev", func, argnums, has_aux), reverse, out)


@overload
def jacfwd(
    func: OfOne[InT], argnums: First = 0, has_aux: No = False, **options: Unpack[PushOptions]
) -> FunctionOf[InT, InT]: ...
@overload
def jacfwd(
    func: Func, argnums: Argnums = 0, has_aux: bool = False, **options: Unpack[PushOptions]
) -> Callable[..., Tree]: ...
def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
) -> Callable[..., Any]:
    """Jacobian of ``func`` column by column: pushes the basis of the inputs forward.

    ``J[i, j] = ∂ func(*args)[i] / ∂ args[argnums][j]``, the same blocks as :func:`jacrev`.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        randomness: for random functions: ``"error"`` refuses them, ``"same"`` draws one mask for
            the whole Jacobian, ``"different"`` one for each column.
        chunk_size: columns swept at once; None sweeps all. Bounds the memory.
        memory: bytes that the call may take, its result among them: a number, or words such as
            ``"2 GiB"``; the sweep is cut into chunks that keep to it.
        out: as in :func:`jacrev`.

    Returns:
        A function of the same arguments; blocks ``[*out, *in]`` as in :func:`jacrev`.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: complex tensors,
            operations whose forward mode torch lacks or gets wrong, or a column with a nan: a zero
            tangent times an infinite derivative may have made it.

    Cost:
        N/K evaluations with K tangents each, for N inputs and chunks of K. Keeps no graph.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.jacfwd(torch.sin)(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_chunk_size("jacfwd", chunk_size)
    check_randomness("jacfwd", randomness, "'same' gives one dropout mask to the whole Jacobian.")
    forward = directed("jacfwd", Forward(chunk_size, randomness), memory)
    return jacobian_by(Derivation("jacfwd", func, argnums, has_aux), forward, out)


@overload
def jacobian(
    func: OfOne[InT], argnums: First = 0, *, has_aux: No = False, **options: Unpack[StrategyOptions]
) -> FunctionOf[InT, InT]: ...
@overload
def jacobian(
    func: Func, argnums: Argnums = 0, *, has_aux: bool = False, **options: Unpack[StrategyOptions]
) -> Callable[..., Tree]: ...
@compilable
def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    strategy: str | Strategy = "auto",
    has_aux: bool = False,
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
) -> Callable[..., Any]:
    """Jacobian of ``func`` by the strategy that ``strategy`` names, or by the fastest.

    ``J[i, j] = ∂ func(*args)[i] / ∂ args[argnums][j]``; every strategy gives the same answer.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        argnums: which positional arguments to differentiate; negative counts from the end.
        strategy: ``"auto"``, ``"reverse"``, ``"forward"``, ``"looped"``, or an object such as
            ``Reverse(chunk_size=64)``. Auto logs its reason to the logger ``jacfunc``.
        has_aux: ``func`` returns ``(output, aux)``; aux is any Python object, handed back.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: as in :func:`jacrev`, for a strategy given by name; ``"auto"`` keeps to half of
            what is free where none is given.
        out: as in :func:`jacrev`.

    Returns:
        A function of the same arguments; blocks ``[*out, *in]`` as in :func:`jacrev`.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: what torch refuses.

    Cost:
        That of the strategy; ``"auto"`` adds an evaluation when it chooses forward mode.

    Example:
        >>> import torch, jacfunc
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> jacfunc.jacobian(lambda x: A @ x)(torch.ones(2))
        tensor([[1., 2.],
                [3., 4.]])
    """
    chosen = resolve("jacobian", strategy, chunk_size, memory)
    derivation = Derivation("jacobian", func, argnums, has_aux)
    derive = jacobian_by(derivation, chosen, out)
    if strategy == "auto" and chunk_size is memory is out is None:
        return in_either_direction(derive, derivation)
    return derive
