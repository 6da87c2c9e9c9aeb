"""Some of the leaves, or of the numbers, of the vectors on one side of an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._linear_map import chosen_leaves
from jacfunc._types import Leaves
from jacfunc.operators._space import Space

Which: TypeAlias = str | Sequence[str] | slice | Sequence[int] | Tensor | None
"""Patterns of names of leaves; or a slice, or the numbers, of elements; None for all."""


@dataclass(frozen=True)
class Choice:
    """A part of a space, and the way between vectors of the part and of the whole.

    Args:
        space: of the part.
        extract: takes the part out of vectors of the whole, leaf by leaf, ``[K, *shape]``.
        embed: makes vectors of the whole, which are zero elsewhere.
    """

    space: Space
    extract: Callable[[Leaves], Leaves]
    embed: Callable[[Leaves], Leaves]

    @classmethod
    def of(cls, api: str, name: str, space: Space, which: Which) -> Choice:
        """The part that a user names.

        Raises:
            TypeError, ValueError: if it is not there, or named in another form.
        """
        if which is None:
            return cls(space, lambda leaves: leaves, lambda leaves: leaves)
        if isinstance(which, slice):
            return _of_numbers(space, torch.arange(space.size, device=space.device)[which])
        patterns = [which] if isinstance(which, str) else which
        if isinstance(patterns, Sequence) and patterns and all(type(x) is str for x in patterns):
            return _of_leaves(api, name, space, [str(pattern) for pattern in patterns])
        return _of_numbers(space, _checked(api, name, space, which))


def _of_leaves(api: str, name: str, space: Space, patterns: Sequence[str]) -> Choice:
    names, numbers = space.names, space.chosen(patterns)
    for pattern in patterns:
        if not space.chosen([pattern]):
            raise ValueError(
                f"{api}: {name} must name leaves that are there, got {pattern!r}, which fits none "
                f"of {', '.join(map(repr, names[:6]))}. Use a name or a pattern, as 'encoder.*'."
            )

    def extract(leaves: Leaves) -> Leaves:
        return chosen_leaves(leaves, numbers)

    def embed(leaves: Leaves) -> Leaves:
        return space.spread(leaves, numbers)

    return Choice(Space.of({names[n]: space.leaves[n] for n in numbers}), extract, embed)


def _of_numbers(space: Space, numbers: Tensor) -> Choice:
    def extract(leaves: Leaves) -> Leaves:
        return (space.rows(leaves)[:, numbers],)

    def embed(leaves: Leaves) -> Leaves:
        whole = leaves[0].new_zeros(len(leaves[0]), space.size)
        return space.cut(whole.index_add(1, numbers, leaves[0]))

    like = torch.empty(len(numbers), dtype=space.dtype, device=space.device)
    return Choice(Space.of(like), extract, embed)


def _checked(api: str, name: str, space: Space, which: Any) -> Tensor:
    """The numbers of elements, of which negative ones count from the end."""
    is_whole = (
        which.dim() == 1 and not (which.is_floating_point() or which.dtype == torch.bool)
        if isinstance(which, Tensor)
        else isinstance(which, Sequence) and all(type(x) is int for x in which)
    )
    if not is_whole:
        raise TypeError(
            f"{api}: {name} must be patterns of names, a slice, or numbers of elements, got "
            f"{type(which).__name__}. Write 'encoder.*', slice(0, 5) or [0, 3]."
        )
    numbers, size = torch.as_tensor(which, dtype=torch.long, device=space.device), space.size
    if ((numbers < -size) | (numbers >= size)).any():
        raise ValueError(
            f"{api}: {name} must be numbers below {size}, got {int(numbers.min())} to "
            f"{int(numbers.max())}. Negative numbers count from the end."
        )
    return numbers % max(size, 1)
