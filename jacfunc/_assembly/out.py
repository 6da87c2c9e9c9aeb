"""Sinks that write into the tensors of ``out=``, so that a loop pays for its memory once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacfunc._assembly.blocks import Allocate, allocated
from jacfunc._assembly.pages import empty
from jacfunc._assembly.sinks import Grid, MatrixSink, Sink
from jacfunc._assembly.writable import (
    check_holds_numbers,
    check_target,
    check_unread,
    check_writable,
    read_by,
)
from jacfunc._trees import StructureError, aligned, flatten
from jacfunc._types import Blocks, Leaves, Tree, is_tensor


def sink_for(
    api: str,
    out: Tree,
    flat: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    read: Callable[[], Iterable[object]] = tuple,
) -> Sink:
    """The sink for the blocks of one call, as its options say.

    Args:
        read: tells what the call reads, tensors among it, into which nothing may be written.

    Raises:
        TypeError, ValueError: an ``out`` that can't be written into, or a dtype beside it.
    """
    if out is None:
        check_target(api, dtype, device)
        return MatrixSink(dtype, device) if flat else Sink(dtype, device)
    if dtype is not None or device is not None:
        raise ValueError(
            f"{api}: out must come alone, got dtype or device beside it. The tensors of out have "
            "their own: leave one of the two out."
        )
    tensors = _checked_tensors(api, out, flat)
    check_unread(api, tensors, read())
    return IntoMatrix(api, out) if flat else IntoBlocks(api, out, tensors)


@dataclass(frozen=True)
class Places:
    """The tensors of ``out=`` for a tree of results that is no Jacobian; None for new ones."""

    api: str
    out: Tree

    @classmethod
    def of(cls, api: str, out: Tree) -> Places:
        """Raises TypeError or ValueError for an ``out`` that can't be written into."""
        if out is not None:
            _checked_tensors(api, out)
        return cls(api, out)

    def check_unread(self, func: Any, *arguments: Tree) -> None:
        """Raises ValueError if the user's tensors are what a call reads."""
        if self.out is not None:
            check_unread(self.api, flatten(self.out)[0], read_by(func, *arguments))

    def tensors(self, tree: Tree, likes: Leaves, shapes: Sequence[tuple[int, ...]]) -> Leaves:
        """The tensors for the leaves of a tree like the result: of these shapes, or refused.

        New ones are like ``likes``.
        """
        if self.out is None:
            return tuple(empty(like, shape) for like, shape in zip(likes, shapes, strict=True))
        places = _aligned(self.api, flatten(tree)[1], self.out)
        for place, like, shape in zip(places, likes, shapes, strict=True):
            check_holds_numbers(self.api, place, like.device)
            if place.shape != shape:
                raise ValueError(
                    f"{self.api}: out must have the shapes of the result, got "
                    f"{tuple(place.shape)} for {shape}. Pass what an earlier call returned."
                )
        return tuple(places)

    def into(self, tree_of: Callable[[Sequence[Any]], Tree]) -> Allocate:
        """Makes the tensors that chunks of samples are written into."""
        if self.out is None:
            return allocated

        def places(first: Leaves, total: int) -> Leaves:
            shapes = [(total, *leaf.shape[1:]) for leaf in first]
            return self.tensors(tree_of(first), first, shapes)

        return places

    def placed(self, tree: Tree) -> Tree:
        """What the user gets for a tree of results: ``out``, into which they were written."""
        return tree if self.out is None else self.out


def _checked_tensors(api: str, out: Tree, flat: bool = False) -> Sequence[Tensor]:
    """The tensors of ``out``, if they can be written into."""
    tensors = flatten(out)[0]
    if not all(map(is_tensor, tensors)) or (flat and not isinstance(out, Tensor)):
        what = "a matrix" if flat else "a tree of tensors"
        raise TypeError(
            f"{api}: out must be {what}, got {type(out).__name__}. Pass what an earlier call "
            "returned."
        )
    check_writable(api, tensors)
    return tensors


def _aligned(api: str, spec: Any, out: Tree) -> Sequence[Tensor]:
    """The leaves of ``out`` by key, as its dicts may have another order than the result's."""
    try:
        tensors = aligned(spec, out, "out")
        if all(map(is_tensor, tensors)):
            return tensors
        raise StructureError("there is a tree in the place of a tensor")
    except StructureError as error:
        raise ValueError(
            f"{api}: out must have the structure of the result, got one where {error}. "
            "Pass what an earlier call returned."
        ) from error


class IntoBlocks(Sink):
    """Puts each block into a tensor of the user's: as it comes where possible, or by a copy."""

    copies, allocates = True, False

    def __init__(self, api: str, tree: Tree, out: Sequence[Tensor]) -> None:
        super().__init__()
        self.api = api
        self.tree = tree
        self.out = out

    def placed(self, tree: Tree) -> Tree:
        """The user's tree, filled by key, as its dicts may have another order than the result's."""
        leaves, spec = flatten(tree)
        places = _aligned(self.api, spec, self.tree)
        if all(place is leaf for place, leaf in zip(places, leaves, strict=True)):
            return tree
        blocks = [leaf.clone() for leaf in leaves]
        for place, block in zip(places, blocks, strict=True):
            place.copy_(block)
        return self.tree

    def into_rows(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        if len(grid.rows) > 1 or len(self.out) != len(first):
            return self._apart(first, total)
        pairs = zip(self._checked(grid, ()), first, strict=True)
        return tuple(out.view(total, *product.shape[1:]) for out, product in pairs)

    def into_samples(self, grid: Grid, first: Leaves, total: int) -> Leaves:
        return self._checked(grid, (total,))

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        """The user's tensors, into which all blocks that are elsewhere are copied."""
        width, flat = len(grid.columns), [block for row in blocks for block in row]
        check_undifferentiated(self.api, flat)
        places = self._checked(grid, batch)
        for out, block in zip(places, flat, strict=True):
            if out.shape != block.shape:
                raise ValueError(
                    f"{self.api}: out must have the shapes of the blocks, got "
                    f"{tuple(out.shape)} for a block of {tuple(block.shape)}. "
                    "Pass what an earlier call returned."
                )
            if out.data_ptr() != block.data_ptr():
                out.copy_(block)
        return tuple(tuple(places[i * width : (i + 1) * width]) for i in range(len(grid.rows)))

    def _checked(self, grid: Grid, batch: tuple[int, ...]) -> Leaves:
        """The user's tensors, once they are seen to be as many and as large as the blocks."""
        sizes = [m * n for m in grid.rows for n in grid.columns]
        lead = batch[0] if batch else 1
        if [lead * size for size in sizes] != [out.numel() for out in self.out]:
            raise ValueError(
                f"{self.api}: out must hold a tensor for each of the {len(sizes)} blocks, in the "
                f"order of the result, got {len(self.out)} of "
                f"{[tuple(out.shape) for out in self.out][:5]}. Pass what an earlier call returned."
            )
        for out in self.out:
            check_holds_numbers(self.api, out, grid.device)
        return tuple(self.out)


class IntoMatrix(MatrixSink):
    """Writes all blocks into the user's matrix ``[*batch, M, N]``."""

    allocates = False

    def __init__(self, api: str, out: Tensor) -> None:
        super().__init__()
        self.api = api
        self.out = out

    def finished(self, blocks: Blocks, grid: Grid, batch: tuple[int, ...]) -> Blocks:
        check_undifferentiated(self.api, [block for row in blocks for block in row])
        ((matrix,),) = super().finished(blocks, grid, batch)
        if matrix is not self.out:
            self._checked(matrix.shape, matrix.device).copy_(matrix)
        return ((self.out,),)

    def _empty(self, products: Leaves, shape: tuple[int, ...], grid: Grid) -> Tensor:
        self.matrix = self._checked(shape, grid.device)
        return self.matrix

    def _checked(self, shape: Sequence[int], device: torch.device) -> Tensor:
        check_holds_numbers(self.api, self.out, device)
        if self.out.shape != tuple(shape):
            raise ValueError(
                f"{self.api}: out must have the shape of the matrix, {tuple(shape)}, got "
                f"{tuple(self.out.shape)}. Pass what an earlier call returned."
            )
        return self.out


def check_undifferentiated(api: str, blocks: Sequence[Tensor]) -> None:
    """Refuse blocks that carry a graph, which the user's tensors must not get.

    Raises:
        ValueError: if a block requires gradients.
    """
    if any(block.requires_grad for block in blocks):
        raise ValueError(
            f"{api}: out must be for a result without a graph, got one that is differentiable. "
            "Call it under torch.no_grad(), or leave out= away."
        )
