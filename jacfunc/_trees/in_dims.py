"""Reads ``in_dims``: in which dimension each leaf of the inputs holds the samples."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from jacfunc._trees.split import Split
from jacfunc._trees.tree import StructureError, broadcast_prefix, flatten, unflatten
from jacfunc._types import Tree

Arguments: TypeAlias = tuple[tuple[Tree, ...], dict[str, Tree]]
"""``(args, kwargs)`` of a call."""


def check_dims(api: str, dims: Iterable[object]) -> None:
    """Refuse ``in_dims`` that are neither a number nor None; True is no number, though an int."""
    for dim in dims:
        if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
            raise TypeError(
                f"{api}: in_dims must hold ints, or None for what is not mapped, got {dim!r}. "
                "A dimension is counted from 0."
            )


def sample_dims(api: str, in_dims: Tree, arguments: Arguments, tensors: Split) -> list[int | None]:
    """For every leaf of the arguments, left to right, the dimension of its samples, or None.

    Args:
        tensors: the arguments, split into tensors and constants.

    Raises:
        ValueError, TypeError: if ``in_dims`` does not fit the arguments.
    """
    args, kwargs = arguments
    by_name = in_dims if isinstance(in_dims, Mapping) else {}
    if unknown := by_name.keys() - kwargs.keys():
        raise ValueError(
            f"{api}: in_dims must name inputs that are given by keyword, got "
            f"{', '.join(map(repr, sorted(unknown)))}. Give a tuple for positional ones."
        )
    if not isinstance(in_dims, int | tuple | list | Mapping):
        raise TypeError(
            f"{api}: in_dims must be an int, a tuple with an entry an input, or a dict by "
            f"keyword, got {in_dims!r}. Write (0, None) where the second input is shared."
        )
    if isinstance(in_dims, Mapping) and not in_dims:
        raise ValueError(
            f"{api}: in_dims must say something of the inputs, got {{}}. Leave it out where the "
            "samples are in dimension 0 of all."
        )
    if isinstance(in_dims, tuple | list) and len(in_dims) != len(args):
        raise ValueError(
            f"{api}: in_dims must have one entry for each of the {len(args)} inputs, got "
            f"{len(in_dims)}. Use None for what all samples share."
        )
    if isinstance(in_dims, int):  # the usual case: every tensor has the samples there
        check_dims(api, (in_dims,))
        return [in_dims if is_tensor else None for is_tensor in tensors.is_chosen]
    positional = in_dims if isinstance(in_dims, tuple | list) else [0] * len(args)
    prefixes = [*positional, *(by_name.get(name, 0) for name in kwargs)]
    dims: list[Any] = []
    names = [*range(len(args)), *kwargs]
    for name, prefix, tree in zip(names, prefixes, (*args, *kwargs.values()), strict=True):
        try:
            dims += broadcast_prefix(_fitted(prefix, tree), tree, f"input {name!r}")
        except StructureError as error:
            raise ValueError(
                f"{api}: in_dims must have the structure of the inputs, got one where {error}. "
                "Give dicts the same keys."
            ) from error
    check_dims(api, dims)
    pairs = zip(tensors.is_chosen, dims, strict=True)
    return [dim if is_tensor else None for is_tensor, dim in pairs]


def _fitted(prefix: Tree, tree: Tree) -> Tree:
    """The prefix, with a ``UserDict`` where it has a dict for one."""
    if isinstance(tree, UserDict) and type(prefix) is dict:
        leaves, spec = flatten(tree)
        like = unflatten(spec, [None] * len(leaves))
        like.data = _fitted(prefix, tree.data)
        return like
    if isinstance(tree, dict) and type(prefix) is dict:
        return {key: _fitted(value, tree.get(key)) for key, value in prefix.items()}
    if type(tree) is type(prefix) and type(prefix) in (tuple, list) and len(prefix) == len(tree):
        return type(prefix)(map(_fitted, prefix, tree))
    return prefix


def check_batch(api: str, leaves: Sequence[Tensor], dims: Sequence[int | None]) -> None:
    """Check that all tensors with samples have the same number of them.

    Raises:
        ValueError: if they do not.
    """
    for leaf, dim in zip(leaves, dims, strict=True):
        if dim is not None and not -leaf.dim() <= dim < leaf.dim():
            raise ValueError(
                f"{api}: with per_sample every input tensor must have the batch in its dimension "
                f"{dim}, got shape {tuple(leaf.shape)}. Say in in_dims what all samples share."
            )
    sizes = {x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None}
    if not leaves:
        raise ValueError(
            f"{api}: with per_sample an input must hold the batch, got no tensor. Pass the samples "
            "in tensors, all of them at once."
        )
    if len(sizes) != 1:
        raise ValueError(
            f"{api}: with per_sample every input tensor must have the same batch, got "
            f"{sorted(sizes) or 'none'}. Say in in_dims what all samples share, and where."
        )


def is_batch(x: Any) -> bool:
    """Is it one batch: a tensor, a tuple, a dict or another tree, and no list of batches?"""
    return isinstance(x, Tensor | tuple | Mapping) or not isinstance(x, Iterable)


def positional(batch: Any) -> tuple[Any, ...]:
    """The positional arguments that a batch stands for: a tuple is several."""
    return batch if isinstance(batch, tuple) else (batch,)
