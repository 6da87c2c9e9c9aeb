"""``vmap``: torch's vmap for all trees that optree knows, with a loop where torch can't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, Concatenate, overload

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size, check_func, check_outputs, check_randomness
from jacfunc._assembly import stack
from jacfunc._calls import reaches_module
from jacfunc._carried import in_batches
from jacfunc._errors import Refused, check_fallback
from jacfunc._faults import NestedWatch, handled
from jacfunc._functions.derive import watches_itself
from jacfunc._linear_map import Dims, batch_size, one_sample, sample_chunks
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._showing import named
from jacfunc._torch import RandomState, run_as_written, sweep_batch
from jacfunc._trees import (
    Split,
    StructureError,
    aligned,
    broadcast_prefix,
    check_dims,
    flatten,
    stack_trees,
    unflatten,
)
from jacfunc._types import FunctionOf, InT, Leaves, OutT, Randomness, Tree, is_tensor
from jacfunc.strategies import in_words_of

OTHERWISE = " Use other operations in func, or loop over the samples."
FEWER = " Take fewer samples at once with chunk_size."


@overload
def vmap(
    func: Callable[Concatenate[InT, ...], OutT],
    in_dims: Tree = 0,
    out_dims: Tree = 0,
    randomness: Randomness = ...,
    *,
    chunk_size: int | None = None,
) -> FunctionOf[InT, OutT]: ...
@overload
def vmap(
    func: Callable[..., Any],
    in_dims: Tree = 0,
    out_dims: Tree = 0,
    randomness: Randomness = ...,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Tree]: ...
def vmap(
    func: Callable[..., Any],
    in_dims: Tree = 0,
    out_dims: Tree = 0,
    randomness: Randomness = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Maps ``func`` over a batch dimension: :func:`torch.vmap` on every tree that jacfunc knows.

    ``vmap(f)(x)[b] = f(x[b])``; ``vmap(jacrev(f))`` gives Jacobians ``[B, *out, *in]``. Where torch
    can't vmap ``func``, or is wrong under vmap, samples go one by one, and the log says so.

    Args:
        func: takes trees, returns a tree of tensors.
        in_dims: the mapped dimension of each argument: an int, None (not mapped), or a tuple with
            a prefix tree for each argument. Leaves that are not tensors are never mapped.
        out_dims: where the batch dimension of each output goes: an int or a prefix tree.
        randomness: ``"error"``, ``"same"`` or ``"different"`` random numbers along the batch.
        chunk_size: samples at once; None maps all.

    Returns:
        A function of the same arguments, whose output leaves are ``[B, *out]``. Keyword arguments
        are mapped over dimension 0, as in torch.

    Raises:
        TypeError, ValueError: dimensions that do not fit.

    Cost:
        One vectorized evaluation for each chunk.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.vmap(jacfunc.jacrev(torch.sin))(torch.zeros(2, 1))
        tensor([[[1.]],
        <BLANKLINE>
                [[1.]]])
    """
    check_func("vmap", func)
    check_chunk_size("vmap", chunk_size)
    check_randomness("vmap", randomness, "'same' draws the same numbers for all samples.")

    @wraps(func, updated=())
    def mapped(*args: Tree, **kwargs: Any) -> Any:
        split = Split.of((args, kwargs), is_tensor)
        dims = _checked_dims(_leaf_dims(in_dims, args, kwargs, split), split.leaves)
        structure: list[Any] = []
        lock = _lock_for(func, randomness)
        watching = nullcontext if watches_itself(func) else NestedWatch

        def on_leaves(leaves: Leaves) -> tuple[Leaves, Leaves]:
            inner_args, inner_kwargs = split.merge(leaves)
            output = run_as_written(func, *inner_args, **inner_kwargs)
            if output is None:
                check_outputs("vmap", (), tuple)
            if not structure:
                structure.append(flatten(output)[1])
            outputs = _in_words(lambda: aligned(structure[0], output, "output"), "func's output")
            _check_all_tensors(outputs)
            return tuple(outputs), ()

        one_chunk = partial(_vmapped_or_looped, on_leaves, randomness, watching, lock)
        chunks = sample_chunks(one_chunk, split.leaves, dims, chunk_size)
        size, must = batch_size(split.leaves, dims), "func must be one to map"
        outputs = in_words_of("vmap", lambda: stack(chunks, size), must, OTHERWISE, FEWER)
        tree = unflatten(structure[0], outputs)
        targets = _in_words(lambda: broadcast_prefix(out_dims, tree, "out_dims"), "out_dims")
        moved = [_move(out, dim) for out, dim in zip(outputs, targets, strict=True)]
        return unflatten(structure[0], moved)

    settled = in_batches(func, mapped, (in_dims, out_dims, randomness, chunk_size))
    return named("vmap", func, settled)


def _checked_dims(dims: Sequence[int | None], leaves: Leaves) -> list[int | None]:
    """The mapped dimensions, counted from the front.

    Raises:
        ValueError: if they have different sizes, or nothing is mapped.
    """
    pairs = list(zip(dims, leaves, strict=True))
    for dim, leaf in pairs:
        if dim is not None and not -leaf.dim() <= dim < leaf.dim():
            raise ValueError(
                f"vmap: in_dims must be dimensions of the arguments, got {dim} for a tensor of "
                f"shape {tuple(leaf.shape)}. Use None for what is not mapped."
            )
    # in a set torch.compile would fix sizes that it leaves open
    sizes = [leaf.shape[dim] for dim, leaf in pairs if dim is not None]
    if not sizes or any(size != sizes[0] for size in sizes):
        raise ValueError(
            "vmap: mapped tensors must have the same size in the mapped dimension, "
            f"got {sorted(set(sizes)) or 'none'}. Map at least one tensor, and give in_dims for "
            "each."
        )
    return [None if dim is None else dim % leaf.dim() for dim, leaf in pairs]


def _vmapped_or_looped(
    func: Callable[[Leaves], tuple[Leaves, Leaves]],
    randomness: Randomness,
    watching: Callable[[], AbstractContextManager[Any]],
    lock: AbstractContextManager[Any],
    leaves: Leaves,
    dims: Dims,
) -> Leaves:
    """Output leaves ``[B, *out]``: of all samples at once, or of a loop where torch can't vmap."""
    try:
        with watching(), lock:
            return sweep_batch(func, leaves, randomness, dims)[0]
    except Exception as error:  # torch has no type for what it can't vmap
        if torch.compiler.is_compiling():
            raise
        if not isinstance(error, Refused):
            check_fallback(error)
        if batch_size(leaves, dims) == 0:
            raise Refused(f"it does not run under vmap, and no sample is there: {error}") from error
        note("func does not run under vmap, samples go one by one: %s", error)
        handled(error)
    samples = []
    with alone():
        random_state = RandomState(leaves)
        for number in range(batch_size(leaves, dims)):
            with random_state.of_one(randomness), watching():
                samples.append(func(one_sample(leaves, dims, number))[0])
    stacked: Leaves = stack_trees(samples)
    return stacked


def _lock_for(func: Callable[..., Any], randomness: Randomness) -> AbstractContextManager[Any]:
    """The process's lock, if ``func`` may draw or call a module; others run side by side."""
    if torch.compiler.is_compiling() or (randomness == "error" and not reaches_module(func)):
        return nullcontext()
    return alone()


def _leaf_dims(
    in_dims: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any], split: Split
) -> list[Any]:
    """The mapped dimension of every tensor in ``(args, kwargs)``, left to right."""
    if not isinstance(in_dims, int | tuple | list):
        raise TypeError(
            f"vmap: in_dims must be an int or a tuple with an entry per argument, got {in_dims!r}. "
            "Write (0, None) to map the first of two arguments."
        )
    if isinstance(in_dims, int) and not kwargs:  # the usual case
        check_dims("vmap", (in_dims,))
        return [in_dims] * len(split.leaves)
    per_argument = (in_dims,) * len(args) if isinstance(in_dims, int) else tuple(in_dims)
    if len(per_argument) != len(args):
        raise ValueError(
            f"vmap: in_dims must have one entry for each of the {len(args)} arguments, "
            f"got {len(per_argument)}. Use None for an argument that is not mapped."
        )
    dims: list[Any] = []
    for number, (prefix, arg) in enumerate(zip(per_argument, args, strict=True)):
        spread = partial(broadcast_prefix, prefix, arg, f"args[{number}]")
        dims.extend(_in_words(spread, "in_dims"))
    check_dims("vmap", dims)
    every_dim = zip(dims + broadcast_prefix(0, kwargs), split.is_chosen, strict=True)
    return [dim for dim, is_leaf in every_dim if is_leaf]


def _in_words(align: Callable[[], list[Any]], what: str) -> list[Any]:
    try:
        return align()
    except StructureError as error:
        raise ValueError(
            f"vmap: {what} must have one structure, that of the tree it belongs to, got one where "
            f"{error}. Give dicts the same keys."
        ) from error


def _check_all_tensors(outputs: list[Any]) -> None:
    for out in outputs:
        if not is_tensor(out):
            raise TypeError(
                f"vmap: func must return tensors, got {type(out).__name__}. "
                "Return torch.as_tensor(...) of it, or leave it out."
            )


def _move(out: Tensor, dim: Any) -> Tensor:
    """An output with its batch dimension moved from the front to ``dim``."""
    if not isinstance(dim, int) or isinstance(dim, bool) or not -out.dim() <= dim < out.dim():
        raise ValueError(
            f"vmap: out_dims must be dimensions of the outputs, got {dim!r} for an output of "
            f"shape {tuple(out.shape)}. Give an int, or a prefix tree of ints."
        )
    return out.movedim(0, dim) if dim else out
