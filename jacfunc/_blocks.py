"""Chunks of rows or columns ⇄ blocks: where the products of a sweep become the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._functorch import memory_of
from jacfunc._pages import empty
from jacfunc._types import Blocks, Leaves

Allocate: TypeAlias = Callable[[Leaves, int], Leaves]
"""From the first chunk, and how many seeds there are: what all chunks are written into."""


def allocated(first: Leaves, total: int) -> Leaves:
    """A tensor of its own for each leaf."""
    return tuple(empty(product, (total, *product.shape[1:])) for product in first)


def stack(chunks: Iterable[Leaves], total: int, into: Allocate = allocated) -> Leaves:
    """Chunks ``[K, *shape]`` written into one ``[total, *shape]`` tensor a leaf.

    A sweep of one chunk is the result itself, if it needs no other place. Products that carry a
    graph are concatenated: the backward of writing into a slice copies the whole result once a
    chunk.
    """
    iterator = iter(chunks)
    first = next(iterator)
    if len(first) == 0:
        return first
    is_whole = first[0].shape[0] == total
    if is_whole and into is allocated:
        return _owned(first)
    if any(product.requires_grad for product in first):
        return tuple(torch.cat(pieces) for pieces in zip(first, *iterator, strict=True))
    results = into(first, total)
    filled = _write(results, first, 0)
    del first
    for products in iterator:
        filled = _write(results, products, filled)
        del products  # or it would stay beside the next chunk
    return results


def stack_leaves(chunks: Iterable[Leaves], leaves: Leaves) -> list[Leaves]:
    """Rows of each output leaf in tensors of their own, from chunks that hold rows of one each."""
    iterator = iter(chunks)
    return [stack(_up_to(iterator, leaf.numel()), leaf.numel()) for leaf in leaves]


def rows_to_blocks(
    rows: Leaves, outputs: Leaves, primals: Leaves, dtype: torch.dtype | None = None
) -> Blocks:
    """Rows ``[M, *in_j]``, one a leaf of the input, cut into ``[*out_i, *in_j]``."""
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
    """Columns ``[N, *out_i]``, one a leaf of the output, cut and turned to ``[*out_i, *in_j]``."""
    by_output = [_cut(column, primals) for column in columns]
    return tuple(
        tuple(
            _block(by_output[i][j].movedim(0, out.dim()), out, primal, dtype)
            for j, primal in enumerate(primals)
        )
        for i, out in enumerate(outputs)
    )


def _up_to(chunks: Iterator[Leaves], total: int) -> Iterator[Leaves]:
    """Those of the next ``total`` seeds."""
    left = total
    while True:
        products = next(chunks)
        left -= products[0].shape[0] if products else total
        yield products
        if left <= 0:
            return
        del products


def _cut(products: Tensor, leaves: Leaves) -> Sequence[Tensor]:
    """Products of all seeds, cut into those of each leaf's seeds."""
    if len(leaves) == 1:
        return (products,)
    return products.split_with_sizes([leaf.numel() for leaf in leaves])


def _block(products: Tensor, out: Tensor, primal: Tensor, dtype: torch.dtype | None) -> Tensor:
    """One block ``[*out, *in]``, in the dtype that it has whichever side its products came from."""
    with torch._C.DisableTorchFunction():  # a watch outside would look at every attribute
        shape = out.shape + primal.shape
        is_shaped = products.shape == shape
        is_typed = dtype is None and out.dtype == primal.dtype == products.dtype
    block = products if is_shaped else products.view(shape)
    if is_typed:
        return block
    return block.to(dtype or torch.promote_types(out.dtype, primal.dtype))


def _owned(products: Leaves) -> Leaves:
    """Products in memory of their own: autograd hands out expanded views, and one tensor twice."""
    if len(products) == 1:
        return (products[0].clone(),) if 0 in products[0].stride() else products
    owned: list[Tensor] = []
    seen: set[int] = set()
    for product in products:
        memory = memory_of(product)
        owned.append(product.clone() if 0 in product.stride() or memory in seen else product)
        seen.add(memory)
    return tuple(owned)


def _write(results: Leaves, products: Leaves, start: int) -> int:
    """Put a chunk in its place; where the next one goes."""
    stop = start + products[0].shape[0]
    for result, product in zip(results, products, strict=True):
        result[start:stop] = product
    return stop
