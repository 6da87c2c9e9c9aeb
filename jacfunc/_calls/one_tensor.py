"""The trees of calls that return one tensor, and nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacfunc._trees import LEAF, Structure, flatten, unflatten
from jacfunc._types import Blocks, Leaves, Tree


@dataclass(frozen=True)
class OneTensor:
    """A call that returned one tensor, for whoever asks for the trees of its output.

    Args:
        structure: the tree in which it did; by default the tensor alone.
    """

    structure: Structure = LEAF

    @classmethod
    def of(cls, output: Tree) -> OneTensor | None:
        """The call that returned this; None if it is another tree."""
        if type(output) is Tensor:
            return BARE
        leaves, structure = flatten(output)
        return cls(structure) if [*map(type, leaves)] == [Tensor] else None

    def tensor_in(self, output: Tree) -> Tensor | None:
        """The tensor in the output of another call; None if that is another tree."""
        if self.structure is LEAF:
            return output if type(output) is Tensor else None
        leaves, structure = flatten(output)
        is_like = structure == self.structure and type(leaves[0]) is Tensor
        return leaves[0] if is_like else None

    def jacobian(self, blocks: Blocks) -> Tree:
        """The only block, in the place of the tensor."""
        return blocks[0][0] if self.structure is LEAF else self.output_tree(blocks[0])

    def output_tree(self, values: Sequence[Any]) -> Tree:
        """The tree of the output, with this value in its place."""
        (value,) = values
        return value if self.structure is LEAF else unflatten(self.structure, (value,))

    def value(self, outputs: Leaves, extras: Leaves) -> tuple[Tree, Tree]:
        """The output, and None."""
        return self.output_tree(outputs), None


BARE = OneTensor()
"""A call that returned a tensor alone."""
