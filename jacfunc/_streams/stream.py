"""The door to Jacobians that are never whole: an iterator over blocks, from one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, Literal, Unpack, get_args, overload

from torch import Tensor, nn

from jacfunc._arguments import check_flags
from jacfunc._errors import check_uncompiled
from jacfunc._lending import Select, check_outermost
from jacfunc._memory import Budget, in_chunks, of_leaf
from jacfunc._modules import (
    FEW_CALLS,
    Independent,
    ModuleCall,
    ModuleOptions,
    RowOptions,
    batching_of,
)
from jacfunc._outputs import Outputs
from jacfunc._showing import named
from jacfunc._streams.groups import SampleGroups
from jacfunc._streams.held import RowBlocks
from jacfunc._streams.parameters import ParameterBlocks
from jacfunc._streams.streamed import StreamedCall
from jacfunc._torch import inside_transform
from jacfunc._types import Memory, Randomness, Tree

API = "stream_jacobian"
By = Literal["params", "rows", "samples"]
Items = Iterator[tuple[Any, Tree]]
Item = tuple[Any, Tree, int | None]
"""Where a block is, the block, and about how many bytes the next one takes; None if it is the last.
"""

AHEAD_BYTES = 2**20
"""Blocks that are made before they are asked for take at most so many bytes."""


class StreamOptions(RowOptions, total=False):
    """What :func:`stream_jacobian` takes by keyword."""

    per_sample: bool
    copy: bool


@overload
def stream_jacobian(
    module: nn.Module, by: Literal["params"] = "params", **options: Unpack[StreamOptions]
) -> Callable[..., Iterator[tuple[str, Tree]]]: ...
@overload
def stream_jacobian(
    module: nn.Module, by: Literal["rows"], **options: Unpack[StreamOptions]
) -> Callable[..., Iterator[tuple[slice, dict[str, Tensor]]]]: ...
@overload
def stream_jacobian(
    module: nn.Module, by: Literal["samples"], **options: Unpack[StreamOptions]
) -> Callable[..., Iterator[tuple[slice, Tree]]]: ...


def stream_jacobian(
    module: nn.Module,
    by: By = "params",
    *,
    select: Select = None,
    outputs: Outputs = None,
    per_sample: bool = False,
    in_dims: Tree = 0,
    chunk_size: int | None = None,
    memory: Memory = None,
    randomness: Randomness = "error",
    independent: Independent = None,
    copy: bool = True,
) -> Callable[..., Items]:
    """A module's Jacobian in its parameters, a block at a time: to reduce one that would not fit.

    The module is evaluated once, and its Jacobian is kept as factors of layers, which are small.
    Each block is written when the loop asks for it. Norms, projections and Gram matrices are sums
    over blocks.

    Args:
        module: any ``nn.Module``.
        by: what a block is. ``"params"`` gives ``(name, block)``, one parameter at a time.
            ``"rows"`` gives ``(slice, {name: [K, *param]})``: rows of the Jacobian, counted through
            all output leaves; no block has rows of two leaves. ``"samples"`` gives ``(slice, J)``:
            some samples, and what :func:`jacfunc.module_jacobian` returns for them.
        select: which parameters, as in :func:`jacfunc.module_jacobian`.
        outputs: which outputs, as in :func:`jacfunc.module_jacobian`; no other row is swept.
        per_sample: differentiate each sample on its own; blocks have the batch in front.
        in_dims: the dimension of samples in the inputs, as in :func:`jacfunc.module_jacobian`.
        chunk_size: rows swept at once, or samples taken at once; by default as many as take
            16 MiB, or an eighth of all; but no more samples than are evaluated within 64 MiB.
        memory: bytes that the stream may take, as a number or in words (``"2 GiB"``): what it
            keeps, a block, and the one before, which a loop still has. The sizes of blocks, and of
            what is kept for later ones, follow.
        randomness: how samples draw random numbers, as in :func:`jacfunc.module_jacobian`.
        independent: when to compare batches to see whether samples depend on each other, as in
            :func:`jacfunc.module_jacobian`.
        copy: blocks are computed from copies of parameters, buffers and the batch. With False the
            tensors themselves are kept, which takes less time and memory. They must then stay as
            they are: writes that torch counts are refused, those by ``.data`` or NumPy are not
            noticed.

    Returns:
        A function of the module's own inputs, which returns an iterator. Whenever it has handed out
        a block, the module is as it was. All blocks are those of the point at which the function
        was called, of which it keeps copies: module and data may change meanwhile, unless ``copy``
        is False.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: what torch refuses; inside a transform, where no graph is kept.

    Cost:
        About the time of the whole Jacobian. One evaluation, two at the first call of a kind; by
        samples, one of each chunk. By parameters, all rows are pulled back once. Memory of one
        evaluation, of a block, of a copy of the module and the batch, and of what is kept for the
        blocks to come: factors of layers, or blocks where these are smaller, of up to an eighth of
        the free memory. Beyond that, and for parameters that no rule in ``jacfunc.layers`` knows,
        rows are pulled back again for the parameters that are left. With ``memory``, by parameters,
        as many samples are evaluated at once as fit. Without it small blocks, of up to 1 MiB
        together, are made with the one before, as to lend the module takes longer.

    Example:
        The squared norm of each parameter's block, per sample, without the Jacobian:

        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> blocks = jacfunc.stream_jacobian(model, "params", per_sample=True)(torch.ones(5, 3))
        >>> {name: block.square().sum((1, 2, 3)) for name, block in blocks if block.dim() == 4}
        {'weight': tensor([6., 6., 6., 6., 6.])}
    """
    check_flags(API, per_sample=per_sample)
    _check_by(by, per_sample)
    batching = batching_of(API, per_sample, in_dims, randomness)
    at_once = (chunk_size or FEW_CALLS) if by == "samples" else None
    options = ModuleOptions.read(
        *(API, module, select, batching, chunk_size, memory, independent, at_once),
        copy=copy,
        outputs=outputs,
    )

    def stream_jacobian_of(*args: Tree, **kwargs: Any) -> Items:
        check_uncompiled(API)
        if inside_transform():
            raise NotImplementedError(
                f"{API}: blocks must be pulled back one after the other from a graph that is kept, "
                "got a call inside a transform. Use module_jacobian there."
            )
        check_outermost(API, (args, kwargs))
        # blocks come later, and must be those of the module and the batch as they are now
        budget = Budget(API, options.memory)
        state, arguments = options.kept((args, kwargs), budget)
        call = ModuleCall(
            *(API, state, arguments), independence=options.independence, asked=options.outputs
        )
        streamed = StreamedCall(call, batching, budget)
        return _answered(streamed, BLOCKS[by](streamed, chunk_size))

    return named("stream_jacobian", module, stream_jacobian_of)


def _check_by(by: object, per_sample: bool) -> None:
    if not isinstance(by, str) or by not in get_args(By):
        raise ValueError(
            f"{API}: by must be one of {', '.join(map(repr, get_args(By)))}, got {by!r}. "
            "Take parameters, rows of the Jacobian, or samples one after the other."
        )
    if by == "samples" and not per_sample:
        raise ValueError(
            f"{API}: by='samples' needs per_sample=True, got False. "
            "Use by='rows', or let each sample be differentiated on its own."
        )


def _answered(call: StreamedCall, items: Iterator[Item]) -> Items:
    """The blocks, made while the module is lent: whenever one is handed out, it is as it was.

    To lend it takes longer than to write a small block: such ones are made with the one before.
    """
    is_last = False

    def made() -> list[tuple[Any, Tree]]:
        nonlocal is_last
        blocks, ahead = [], 0
        for at, block, after in items:
            blocks.append((at, block))
            is_last, ahead = after is None, ahead + (after or 0)
            if is_last or ahead > AHEAD_BYTES or not call.may_go_ahead:
                break
        return blocks

    while not is_last and (blocks := call.answer(made)):
        while blocks:
            yield blocks.pop(0)


def _by_params(call: StreamedCall, chunk_size: int | None) -> Iterator[Item]:
    shapes = call.some().shapes
    blocks = ParameterBlocks(call, shapes, chunk_size)
    for name, number, after in zip(call.names, count(), [*blocks.sizes[1:], None], strict=False):
        rows = blocks.of(number)
        block = call.output_tree(list(map(call.shaped, rows, shapes.outputs)))
        yield name, block, after
        del rows, block  # or they would stay beside the next block


def _by_rows(call: StreamedCall, chunk_size: int | None) -> Iterator[Item]:
    samples, start = call.evaluated(), 0
    num_rows, last = samples.shapes.num_rows, len(samples.outputs) - 1
    if not call.names:  # one block says that all rows are there, and have no entries
        yield slice(0, num_rows), {}, None
        return
    chunk = call.budget.chunk(chunk_size, num_rows, samples.row_bytes)
    blocks = RowBlocks(samples, call.budget.is_open and chunk_size is None)
    for leaf, out in enumerate(samples.outputs):
        for rows in in_chunks(out.numel(), of_leaf(chunk, leaf), partial(blocks.of, leaf)):
            width = rows[0].shape[1]
            after = None if leaf == last and start + width == num_rows else width
            block = call.by_name(rows)
            yield slice(start, start + width), block, after and after * samples.row_bytes
            start += width
            del rows, block  # or they would stay beside the next block


def _by_samples(call: StreamedCall, chunk_size: int | None) -> Iterator[Item]:
    if not call.names:
        yield slice(0, call.size), call.output_tree([{} for _ in call.evaluated().outputs]), None
        return
    groups, start = SampleGroups(call), 0
    is_chosen = not call.budget.is_open or chunk_size
    chunk = call.budget.chunk(chunk_size, call.size, 0) if is_chosen else groups.begin()
    for rows in in_chunks(call.size, chunk, groups.of):
        stop = start + len(rows[0])
        after = None if stop == call.size else sum(block.nbytes for block in rows)
        yield slice(start, stop), groups.tree(rows), after
        start = stop
        del rows  # or they would stay beside the next block


BLOCKS = {"params": _by_params, "rows": _by_rows, "samples": _by_samples}
