"""Aliases that the whole package shares: what flows between the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

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
