"""The vectors on one side of a linear operator: a tree of tensors, or one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._arguments import check_like
from jacfunc._assembly import numel
from jacfunc._lock import kept_property
from jacfunc._trees import Split, StructureError
from jacfunc._types import Leaves, Tree

Write: TypeAlias = Callable[["Space", Leaves], Tree]
"""Puts products ``[K, *shape]`` of a space into the form in which their seeds came."""


@dataclass(frozen=True, eq=False)
class Space:
    """What vectors on one side of an operator look like.

    A vector is a tree like the one that the space was made of, or a flat tensor ``[size]``, whose
    numbers are those of all leaves in order. K vectors are a matrix ``[size, K]``, or a tree whose
    leaves have K in front. Products come in the form of what they are products of; a tensor of the
    shape of a lone leaf is a tree.

    Args:
        split: the tree; its leaves have shapes, dtypes and a device, but no numbers.

    Example:
        >>> import torch
        >>> from jacfunc.operators import Space
        >>> space = Space.of({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        >>> space.size, space.names
        (8, ('weight', 'bias'))
        >>> space.flat({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
        tensor([0., 0., 0., 0., 0., 0., 1., 1.])
    """

    split: Split

    @classmethod
    def of(cls, tree: Tree) -> Space:
        """The space of trees like this one; what is not floating in it is a constant, and None."""
        split = Split.of(tree)
        empty = tuple(x.new_empty(()).detach().expand(x.shape) for x in split.leaves)
        return cls(replace(split, leaves=empty))

    @property
    def leaves(self) -> Leaves:
        """Tensors without memory that have the shapes, dtypes and devices of the leaves."""
        return self.split.leaves

    @kept_property
    def size(self) -> int:
        """How many numbers a vector has."""
        return numel(self.leaves)

    @kept_property
    def dtype(self) -> torch.dtype:
        """The dtype of flat vectors: the widest of the leaves' dtypes."""
        default = torch.get_default_dtype()
        return reduce(torch.promote_types, {x.dtype for x in self.leaves} or {default})

    @property
    def device(self) -> torch.device:
        """The device of flat vectors: that of the first leaf."""
        return self.leaves[0].device if self.leaves else torch.get_default_device()

    @kept_property
    def names(self) -> tuple[str, ...]:
        """A name for each leaf: its path without brackets (``"encoder.weight"``)."""
        return self.split.names()

    def flat(self, tree: Tree) -> Tensor:
        """The numbers of a tree in a row, ``[size]``."""
        return self.rows(tuple(leaf[None] for leaf in self.split.align(tree, "vector")))[0]

    def tree(self, vector: Tensor) -> Tree:
        """The tree of a flat vector ``[size]``."""
        return self.split.place([leaf[0] for leaf in self.cut(vector[None])])

    def rows(self, leaves: Leaves) -> Tensor:
        """K vectors in rows, ``[K, size]``, from leaves ``[K, *shape]``."""
        if not self.leaves:
            return torch.zeros(0, 0, dtype=self.dtype, device=self.device)
        rows = [leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in leaves]
        return rows[0] if len(rows) == 1 else torch.cat([row.to(self.dtype) for row in rows], 1)

    def cut(self, rows: Tensor) -> Leaves:
        """Leaves ``[K, *shape]`` of K vectors in rows, ``[K, size]``."""
        leaves = self.leaves
        parts = (rows,) if len(leaves) == 1 else rows.split([x.numel() for x in leaves], 1)
        pairs = zip(parts, leaves, strict=True)
        return tuple([part.reshape(len(rows), *x.shape).to(x.dtype) for part, x in pairs])

    def spread(self, leaves: Leaves, numbers: Sequence[int]) -> Leaves:
        """K vectors that have these leaves ``[K, *shape]``, and zeros in the place of others."""
        count = leaves[0].shape[:1] if leaves else ()
        given, pairs = dict(zip(numbers, leaves, strict=True)), enumerate(self.leaves)
        return tuple([given[n] if n in given else x.new_zeros(*count, *x.shape) for n, x in pairs])

    def chosen(self, patterns: Sequence[str]) -> list[int]:
        """Numbers of the leaves whose names fit one of the patterns."""
        return [
            number
            for number, name in enumerate(self.names)
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ]

    def is_leaf(self, vector: Any) -> bool:
        """Is it the whole tree: a lone tensor of the right shape, where the space has no more?"""
        is_tensor = isinstance(vector, Tensor) and self.split.is_bare
        return is_tensor and vector.shape == self.leaves[0].shape

    def is_matrix(self, vectors: Any, rows: bool = False) -> bool:
        """Is it a matrix ``[size, K]``, or of rows ``[K, size]``, rather than the whole tree?"""
        is_flat = isinstance(vectors, Tensor) and vectors.dim() == 2 and not self.is_leaf(vectors)
        return is_flat and vectors.shape[int(rows)] == self.size

    def read(self, api: str, name: str, vector: Tree) -> tuple[Leaves, Write]:
        """A vector as leaves ``[1, *shape]``, and how to write products in its form.

        Raises:
            TypeError, ValueError: if it has another structure, shape or dtype.
        """
        if isinstance(vector, Tensor) and vector.dim() == 1 and not self.is_leaf(vector):
            self._check_flat(api, name, vector, (self.size,))
            return self.cut(vector[None]), lambda space, leaves: space.rows(leaves)[0]
        leaves = self._aligned(api, name, vector)
        check_like(api, name, leaves, self.leaves)
        first = tuple(leaf[None] for leaf in leaves)
        return first, lambda space, products: space.split.place([x[0] for x in products])

    def read_many(self, api: str, name: str, vectors: Tree) -> tuple[Leaves, Write]:
        """K vectors as leaves ``[K, *shape]``, and how to write products in their form.

        Raises:
            TypeError, ValueError: if they have another structure, shape or dtype, or K differs.
        """
        if isinstance(vectors, Tensor) and vectors.dim() == 2:
            self._check_flat(api, name, vectors, (self.size, vectors.shape[1]))
            return self.cut(vectors.T), lambda space, leaves: space.rows(leaves).T
        leaves = self._aligned(api, name, vectors)
        count = leaves[0].shape[:1] if leaves and isinstance(leaves[0], Tensor) else ()
        check_like(api, name, leaves, tuple(x.expand(*count, *x.shape) for x in self.leaves))
        return leaves, lambda space, products: space.split.place(products)

    def read_any(self, api: str, name: str, vectors: Tree) -> tuple[Leaves, Write]:
        """One vector, or a matrix of K columns, as leaves ``[K, *shape]``."""
        read = self.read_many if self.is_matrix(vectors) else self.read
        return read(api, name, vectors)

    def fits(self, vectors: Tree) -> bool:
        """Can they be read as one vector, or as a matrix of K columns?"""
        try:
            self.read_any("", "", vectors)
        except (TypeError, ValueError):
            return False
        return True

    def samples(self, api: str) -> int:
        """How many samples vectors have in front.

        Raises:
            ValueError: if leaves differ in that, or have no dimensions.
        """
        sizes = {leaf.shape[0] if leaf.dim() else None for leaf in self.leaves}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(
                f"{api}: with center or per_sample products must have the samples in front, got "
                f"{self}. Use a function whose outputs have the same first dimension."
            )
        return int(sizes.pop() or 0)

    def centring(self, api: str, center: bool) -> Callable[[Tensor], Tensor]:
        """What subtracts from vectors in rows their mean over samples, if it is to be done."""
        if not center:
            return lambda rows: rows
        self.samples(api)
        return lambda rows: self.rows(
            tuple([leaf - leaf.mean(1, keepdim=True) for leaf in self.cut(rows)])
        )

    def _aligned(self, api: str, name: str, tree: Tree) -> Leaves:
        try:
            leaves = tuple(self.split.align(tree, name))
        except StructureError as error:
            raise ValueError(
                f"{api}: {name} must be a flat tensor of {self.size} numbers or have the structure "
                f"of what it belongs to, got one where {error}. Give dicts the same keys, and None "
                "for what is not differentiated."
            ) from error
        _check_dense(api, name, leaves)
        return leaves

    def _check_flat(self, api: str, name: str, vector: Tensor, shape: tuple[int, ...]) -> None:
        _check_dense(api, name, (vector,))
        if vector.shape != shape:
            raise ValueError(
                f"{api}: {name} must have {self.size} numbers in its first dimension, got shape "
                f"{tuple(vector.shape)}. Give a tree like what it belongs to, or its numbers in "
                "a row."
            )
        if vector.dtype != self.dtype:
            raise TypeError(
                f"{api}: {name} must match in dtype, a flat vector being {self.dtype}, got "
                f"{vector.dtype}. Convert it with .to({self.dtype})."
            )

    def check_fits(self, api: str, other: Space) -> None:
        """Raise ValueError unless vectors of another space are vectors of this one, too."""
        these, those = ([(x.shape, x.dtype) for x in space.leaves] for space in (self, other))
        if these != those:
            raise ValueError(
                f"{api}: two operators must agree on the vectors between them, got {self} and "
                f"{other}. Compose operators of the same trees, or restrict them."
            )

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in self.leaves[:3])
        more = ", …" if len(self.leaves) > 3 else ""
        return f"Space({self.size} numbers: {shapes}{more})"


def on_rows(
    source: Space, target: Space, products_of: Callable[[Leaves], Leaves]
) -> Callable[[Tensor], Tensor]:
    """Products of K vectors in rows, ``[K, N]`` → ``[K, M]``, from those of leaves."""
    return lambda rows: target.rows(products_of(source.cut(rows.to(source.device))))


def _check_dense(api: str, name: str, leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
            raise ValueError(
                f"{api}: {name} must be dense, got {leaf.layout}. Convert it with .to_dense()."
            )
