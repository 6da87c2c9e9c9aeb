"""Aliases that the whole package shares: what flows between the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = Any
"""Any nesting of containers that optree or torch's own pytree knows."""

Leaves: TypeAlias = tuple[Tensor, ...]
"""Tensors with the tree taken off; a chunk of K seeds or products is Leaves of ``[K, *shape]``."""

Blocks: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""``blocks[i][j]`` has shape ``[*out_i, *in_j]``: output leaf i against input leaf j."""

LeafFunction: TypeAlias = Callable[..., tuple[Leaves, Leaves]]
"""``func(*primals) -> (outputs, extras)``; extras are tensors that ride along undifferentiated."""

Argnums: TypeAlias = int | tuple[int, ...]


def is_tensor(leaf: object) -> bool:
    """Everything else rides along as it is."""
    return isinstance(leaf, torch.Tensor)


def is_differentiable(leaf: object) -> bool:
    """Floating and complex tensors carry derivatives; every other leaf is a constant."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


Memory = int | str | None
"""Bytes, as a number or in words (``"2 GiB"``)."""


Randomness = Literal["error", "same", "different"]
