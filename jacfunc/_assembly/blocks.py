"""Chunks of rows or columns, stacked and cut into the blocks of the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly.pages import empty
from jacfunc._torch import memories_of, untracked
from jacfunc._types import Blocks, Leaves

Allocate: TypeAlias = Callable[[Leaves, int], Leaves]
"""Makes the tensors for all chunks, from the first chunk and the number of seeds."""


def allocated(first: Leaves, total: int) -> Leaves:
    """A new tensor ``[total, *shape]`` for each leaf of the first chunk."""
    return tuple(empty(product, (total, *product.shape[1:])) for product in first)


def stack(chunks: Iterable[Leaves], total: int, into: Allocate = allocated) -> Leaves:
    """Chunks ``[K, *shape]`` stacked into one tensor ``[total, *shape]`` a leaf.

    A single chunk is the result itself, unless ``into`` has another place for it. Products that
    carry a graph are concatenated, since the backward pass of a write into a slice copies the whole
    result once a chunk.
    """
    iterator = iter(chunks)
    first = next(iterator)
    if len(first) == 0:
        return first
    is_whole = first[0].shape[0] == total
    if is_whole and into is allocated:
        return owned(first)
    if _has_graph(first):
        return _concatenated(first, iterator)
    results = into(first, total)
    filled = _write(results, first, 0)
    del first
    for products in iterator:
        if _has_graph(products):  # all chunks before this one had no graph
            before = tuple(result[:filled] for result in results)
            return _concatenated(before, chain((products,), iterator))
        filled = _write(results, products, filled)
        del products  # or it would stay beside the next chunk
    return results


def _has_graph(products: Leaves) -> bool:
    return any(product.requires_grad for product in products)


def _concatenated(first: Leaves, others: Iterable[Leaves]) -> Leaves:
    return tuple(torch.cat(pieces) for pieces in zip(first, *others, strict=True))


def _stack_leaves(chunks: Iterable[Leaves], leaves: Leaves) -> list[Leaves]:
    """Rows ``[M_i, *in_j]`` of each output leaf, from chunks that hold rows of one leaf each."""
    iterator = iter(chunks)
    return [stack(_up_to(iterator, leaf.numel()), leaf.numel()) for leaf in leaves]


def stacked_rows(chunks: Iterable[Leaves], outputs: Leaves, primals: Leaves) -> Blocks:
    """Blocks ``[*out_i, *in_j]``, from chunks that hold rows of one output leaf each."""
    if len(outputs) == 1:  # most functions have one output, and no chunk need be told from another
        return rows_to_blocks(stack(chunks, outputs[0].numel()), outputs, primals)
    pairs = zip(_stack_leaves(chunks, outputs), outputs, strict=True)
    return tuple([rows_to_blocks(rows, (out,), primals)[0] for rows, out in pairs])


def rows_to_blocks(
    rows: Leaves, outputs: Leaves, primals: Leaves, dtype: torch.dtype | None = None
) -> Blocks:
    """Rows ``[M, *in_j]`` of all outputs, cut into blocks ``[*out_i, *in_j]``."""
    if len(outputs) == len(primals) == 1:  # the generators below cost as much as a small operation
        return ((_block(rows[0], outputs[0], primals[0], dtype),),)
    by_input = [_cut(row, outputs) for row in rows]
    return tuple(
        tuple(_block(by_input[j][i], out, primal, dtype) for j, primal in enumerate(primals))
        for i, out in enumerate(outputs)
    )


def columns_to_blocks(
    columns: Leaves, outputs: Leaves, primals: Leaves, dtype: torch.dtype | None = None
) -> Blocks:
    """Columns ``[N, *out_i]`` of all inputs, cut and transposed to blocks ``[*out_i, *in_j]``."""
    by_output = [_cut(column, primals) for column in columns]
    return tuple(
        tuple(
            _block(by_output[i][j].movedim(0, out.dim()), out, primal, dtype)
            for j, primal in enumerate(primals)
        )
        for i, out in enumerate(outputs)
    )


def _up_to(chunks: Iterator[Leaves], total: int) -> Iterator[Leaves]:
    """The chunks of the next ``total`` seeds."""
    left = total
    while True:
        products = next(chunks)
        left -= products[0].shape[0] if products else total
        yield products
        if left <= 0:
            return
        del products


def _cut(products: Tensor, leaves: Leaves) -> Sequence[Tensor]:
    """Products of all seeds, cut into the products of each leaf's seeds."""
    if len(leaves) == 1:
        return (products,)
    return products.split_with_sizes([leaf.numel() for leaf in leaves])


def _block(products: Tensor, out: Tensor, primal: Tensor, dtype: torch.dtype | None) -> Tensor:
    """One block ``[*out, *in]``; its dtype is the same for rows and for columns."""
    with untracked():
        shape = out.shape + primal.shape
        is_shaped = products.shape == shape
        is_typed = dtype is None and out.dtype == primal.dtype == products.dtype
    block = products if is_shaped else products.view(shape)
    if is_typed:
        return block
    return block.to(dtype or torch.promote_types(out.dtype, primal.dtype))


def owned(products: Leaves, beside: Leaves = ()) -> Leaves:
    """Products in memory of their own: autograd may return expanded views, or one tensor twice.

    Nor have they that of tensors ``beside`` them, as of seeds that are kept.
    """
    if len(products) == 1 and not beside:
        return (products[0].clone(),) if 0 in products[0].stride() else products
    results, seen = list[Tensor](), set(memories_of(beside))
    for product, memory in zip(products, memories_of(products), strict=True):
        results.append(product.clone() if 0 in product.stride() or memory in seen else product)
        seen.add(memory)
    return tuple(results)


def _write(results: Leaves, products: Leaves, start: int) -> int:
    """Write a chunk to where it begins, and return where the next one begins."""
    stop = start + products[0].shape[0]
    for result, product in zip(results, products, strict=True):
        result[start:stop] = product
    return stop
