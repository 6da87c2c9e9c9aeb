"""The door to Jacobians that are never whole: an iterator over blocks, from one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from jacfunc._arguments import check_chunk_size
from jacfunc._assembly import rows_to_blocks, stack_leaves, sweep_leaves
from jacfunc._errors import Refused
from jacfunc._lending import CurrentState, Select, detached_copy
from jacfunc._linear_map import EVERY, JacobianOperator, narrowed
from jacfunc._memory import STAGED_BYTES, Chunk, FittedChunks, in_chunks
from jacfunc._modules.batch import SampledCall
from jacfunc._modules.call import Batching, ModuleCall
from jacfunc._modules.checks import check_module
from jacfunc._modules.independence import FEW_CALLS, Independence, Independent
from jacfunc._planning import Auto
from jacfunc._torch import RandomState, inside_transform
from jacfunc._trees import Split, flatten, unflatten
from jacfunc._types import Leaves, Randomness, Tree, is_tensor

API = "stream_jacobian"
By = Literal["params", "rows", "samples"]
Items = Iterator[tuple[Any, Tree]]


def stream_jacobian(
    module: nn.Module,
    by: By = "params",
    *,
    select: Select = None,
    per_sample: bool = False,
    in_dims: Tree = 0,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
    independent: Independent = None,
) -> Callable[..., Items]:
    """A module's Jacobian in its parameters, a block at a time: to reduce one that would not fit.

    The module is evaluated once, and each block is pulled back from that evaluation when the loop
    asks for it. Norms, projections and Gram matrices are sums over blocks.

    Args:
        module: any ``nn.Module``.
        by: what a block is. ``"params"`` gives ``(name, block)``, one parameter at a time.
            ``"rows"`` gives ``(slice, {name: [K, *param]})``: rows of the Jacobian, counted through
            all output leaves; no block has rows of two leaves. ``"samples"`` gives ``(slice, J)``:
            some samples, and what :func:`jacfunc.module_jacobian` returns for them.
        select: which parameters, as in :func:`jacfunc.module_jacobian`.
        per_sample: differentiate each sample on its own; blocks have the batch in front.
        in_dims: the dimension of samples in the inputs, as in :func:`jacfunc.module_jacobian`.
        chunk_size: rows swept at once, or samples taken at once; by default as many as take
            16 MiB, or an eighth of all.
        randomness: how samples draw random numbers, as in :func:`jacfunc.module_jacobian`.
        independent: when to compare batches to see whether samples depend on each other, as in
            :func:`jacfunc.module_jacobian`.

    Returns:
        A function of the module's own inputs, which returns an iterator. Whenever it has handed out
        a block, the module is as it was. All blocks are those of the point at which the function
        was called, of which it keeps copies: module and data may change meanwhile.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: what torch refuses; inside a transform, where no graph is kept.

    Cost:
        One evaluation. By rows, the pullbacks of a whole Jacobian; by parameters, for each one the
        part of these pullbacks that leads to it. Memory of one evaluation, of one block, and of a
        copy of the module and the batch.

    Example:
        The squared norm of each parameter's block, per sample, without the Jacobian:

        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> blocks = jacfunc.stream_jacobian(model, "params", per_sample=True)(torch.ones(5, 3))
        >>> {name: block.square().sum((1, 2, 3)) for name, block in blocks if block.dim() == 4}
        {'weight': tensor([6., 6., 6., 6., 6.])}
    """
    check_module(API, module)
    check_chunk_size(API, chunk_size)
    _check_by(by, per_sample)
    at_once = (chunk_size or FEW_CALLS) if by == "samples" else None
    independence = Independence.of(API, independent, at_once)

    def stream_jacobian_of(*args: Tree, **kwargs: Any) -> Items:
        if inside_transform():
            raise NotImplementedError(
                f"{API}: blocks must be pulled back one after the other from a graph that is kept, "
                "got a call inside a transform. Use module_jacobian there."
            )
        # blocks come later, and must be those of the module and the batch as they are now
        state = CurrentState(API, module, select, stays=True).now()
        arguments = detached_copy((args, kwargs))
        random_state = RandomState(tuple(filter(is_tensor, flatten(arguments)[0])))
        call = ModuleCall(API, state, arguments, independence=independence)
        batching = Batching(in_dims, randomness)
        batch = call.batch(batching) if per_sample else None
        chunk: Chunk = chunk_size or FittedChunks.by_share(STAGED_BYTES)
        if batch is not None and by == "samples":
            return _by_samples(call, batch, batching, chunk, random_state)
        evaluate = partial(EvaluatedModule, call, batch, random_state)
        return _by_rows(evaluate, chunk) if by == "rows" else _by_params(evaluate, chunk)

    return stream_jacobian_of


def _check_by(by: object, per_sample: bool) -> None:
    if by not in get_args(By):
        raise ValueError(
            f"{API}: by must be one of {', '.join(map(repr, get_args(By)))}, got {by!r}. "
            "Take parameters, rows of the Jacobian, or samples one after the other."
        )
    if by == "samples" and not per_sample:
        raise ValueError(
            f"{API}: by='samples' needs per_sample=True, got False. "
            "Use by='rows', or let each sample be differentiated on its own."
        )


def _by_samples(
    call: ModuleCall,
    batch: SampledCall,
    batching: Batching,
    chunk: Chunk,
    random_state: RandomState,
) -> Items:
    split, strategy = Split.of(call.arguments, is_tensor), Auto()
    structure: list[Any] = []
    with call.undisturbed():
        random_state.repeat()
        call.check_independent(batch)

    def take(start: int, stop: int) -> Leaves:
        leaves = narrowed(batch.samples.leaves, batch.samples.dims, start, stop)
        part = replace(call, arguments=split.merge(leaves))
        with part.undisturbed():
            random_state.repeat()
            evaluation = part.batch(batching).run(strategy)
        blocks, spec = flatten(evaluation.jacobian())
        structure[:] = [spec]
        return tuple(blocks)

    for place, blocks in _with_places(in_chunks(batch.samples.size, chunk, take)):
        yield place, unflatten(structure[0], blocks)


def _by_rows(evaluate: Callable[[], EvaluatedModule], chunk: Chunk) -> Items:
    module = evaluate()
    for place, rows in _with_places(sweep_leaves(module.pulled, module.outputs, chunk)):
        blocks = [row.movedim(1, 0) for row in rows] if module.is_sampled else rows
        yield place, module.flat.input_tree(blocks)


def _with_places(chunks: Iterator[Leaves]) -> Iterator[tuple[slice, Leaves]]:
    """Each chunk with its place among all rows, or all samples."""
    start = 0
    for leaves in chunks:
        stop = start + leaves[0].shape[0]
        yield slice(start, stop), leaves
        start = stop


def _by_params(evaluate: Callable[[], EvaluatedModule], chunk: Chunk) -> Items:
    module = evaluate()
    for number, name in enumerate(module.names):
        onto = partial(module.pulled, chosen=slice(number, number + 1))
        chunks = sweep_leaves(onto, module.outputs, chunk)
        rows = [row for (row,) in stack_leaves(chunks, module.outputs)]
        blocks = [
            rows_to_blocks((row,), (out,), (row.new_empty(()).expand(row.shape[1:]),))[0][0]
            for row, out in zip(rows, module.outputs, strict=True)
        ]
        if module.is_sampled:  # ``[*out, B, *param]``
            pairs = zip(blocks, module.outputs, strict=True)
            blocks = [block.movedim(out.dim(), 0) for block, out in pairs]
        yield name, module.flat.output_tree(blocks)


@contextmanager
def _in_words() -> Iterator[None]:
    """A context that says in words of the door what torch refused."""
    try:
        yield
    except Refused as refusal:
        if str(refusal).startswith(f"{API}:"):
            raise
        raise Refused(
            f"{API}: the module must be one whose rows can be pulled back from one graph, got a "
            f"refusal: {refusal}. Use module_jacobian, which knows other ways."
        ) from refusal


class EvaluatedModule:
    """A module evaluated once, from which rows are pulled back as they are asked for."""

    def __init__(
        self, call: ModuleCall, batch: SampledCall | None, random_state: RandomState
    ) -> None:
        self._call, self._random_state = call, random_state
        self.names, self.is_sampled = tuple(call.state.point), batch is not None
        self._size: int | None = None
        with call.undisturbed(), _in_words():
            random_state.repeat()
            if batch is None:
                self.flat = call.flat_call(call.arguments)
                self._operator = JacobianOperator(self.flat, self.flat.primals)
                self.outputs = self._operator.outputs
                return
            call.check_independent(batch)
            self._operator, one = batch.operator()
            self._size = batch.samples.size
            with batch.under_vmap("rows of every sample need", "Use by='samples'"):
                self.outputs = tuple(out[0] for out in self._operator.outputs)
        self.flat = one.call

    def pulled(self, cotangents: Leaves, of: slice, chosen: slice = EVERY) -> Leaves:
        """Rows of the Jacobian, ``[K, *param]``, or of every sample's, ``[K, B, *param]``."""
        if self._size is not None:
            cotangents = tuple(
                seed.unsqueeze(1).expand(seed.shape[0], self._size, *seed.shape[1:])
                for seed in cotangents
            )
        with self._call.undisturbed(), _in_words():
            self._random_state.repeat()
            return self._operator.pullback_onto(chosen, cotangents, of)
