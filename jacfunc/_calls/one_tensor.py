"""The trees of calls that return one tensor, and nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jacfunc._types import Blocks, Leaves, Tree


class OneTensor:
    """A call that returned one tensor, for whoever asks for the trees of its output."""

    def jacobian(self, blocks: Blocks) -> Tree:
        """The only block."""
        return blocks[0][0]

    def output_tree(self, values: Sequence[Any]) -> Tree:
        """The tree of the output, with this value in its place."""
        (value,) = values
        return value

    def value(self, outputs: Leaves, extras: Leaves) -> tuple[Tree, Tree]:
        """The output, and None."""
        return outputs[0], None
