"""What a call needs to know of a tree: its paths, its kind, its differentiable leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from jacfunc._trees.tree import (
    LEAF,
    Structure,
    StructureError,
    aligned,
    flatten,
    is_inside,
    is_leaf,
    unflatten,
)
from jacfunc._types import Leaves, Tree, is_differentiable, is_tensor


def paths(tree: Tree, root: str) -> list[str]:
    """The path of each leaf, written as code: ``params['encoder.weight']``."""
    return Split.of(tree, lambda _: True).paths(root)


def kind_of(leaf: object) -> Hashable:
    """Shape, dtype and device of a tensor, or a setting's value: equal for leaves of equal cost."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf).__qualname__


def kinds_of(tree: Tree) -> Hashable:
    """Structure and kinds of the leaves of a tree: equal for trees of equal cost."""
    leaves, spec = flatten(tree)
    return spec, tuple([kind_of(leaf) for leaf in leaves])


def holds_floats_alone(tree: Tree) -> bool:
    """Is it a floating tensor, or containers of Python's own that hold nothing else?"""
    kind = type(tree)
    if kind is dict:
        return all(map(holds_floats_alone, tree.values()))
    if kind is tuple or kind is list:
        return all(map(holds_floats_alone, tree))
    return (kind is Tensor or kind is Parameter) and bool(tree.is_floating_point())


def without_settings(tree: Tree, root: str) -> dict[str, Any]:
    """The leaves of a tree by their paths, but for what objects have beside their tensors."""
    leaves, spec = flatten(tree)
    pairs = zip(leaves, spec.accessors(), strict=True)
    return {way.codify(root): x for x, way in pairs if is_tensor(x) or not is_inside(way)}


_STEP = re.compile(r"\['([^']*)'\]|\[([^\]]*)\]|\.(\w+)")
"""A step of a path that is written as code: an item by its key or number, or an attribute."""


@dataclass(slots=True)
class Split:
    """A tree split into chosen leaves, by default the differentiable ones, and constants."""

    spec: Structure
    is_chosen: tuple[bool, ...]
    leaves: tuple[Any, ...]
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Tree, chosen: Callable[[object], bool] = is_differentiable) -> Split:
        """Split a tree; ``chosen`` tells for each leaf whether it is one."""
        # the commonest tree by far, and a leaf of every choice
        if type(tree) is Tensor and tree.is_floating_point():
            return cls(LEAF, (True,), (tree,), ())
        everything, spec = flatten(tree)
        is_chosen = tuple(map(chosen, everything))
        if all(is_chosen):
            return cls(spec, is_chosen, tuple(everything), ())
        leaves = tuple(leaf for leaf, yes in zip(everything, is_chosen, strict=True) if yes)
        constants = tuple(leaf for leaf, yes in zip(everything, is_chosen, strict=True) if not yes)
        return cls(spec, is_chosen, leaves, constants)

    @property
    def everything(self) -> Sequence[Any]:
        """All leaves of the tree, in order."""
        if not self.constants:
            return self.leaves
        new, kept = iter(self.leaves), iter(self.constants)
        return [next(new if yes else kept) for yes in self.is_chosen]

    def merge(self, leaves: Sequence[Any], constants: Sequence[Any] | None = None) -> Tree:
        """The tree with new chosen leaves, and with new constants if there are any."""
        if not self.constants:
            return unflatten(self.spec, leaves)
        new, kept = iter(leaves), iter(self.constants if constants is None else constants)
        return unflatten(self.spec, [next(new if yes else kept) for yes in self.is_chosen])

    @property
    def kinds(self) -> Hashable:
        """Structure and kinds of the chosen leaves, and of the constants."""
        kinds = map(kind_of, (*self.leaves, *self.constants))
        return self.spec, self.is_chosen, tuple(kinds)

    def place(self, values: Sequence[Any]) -> Tree:
        """A tree with a value in the place of each chosen leaf, and None for each constant."""
        return self.merge(values, [None] * len(self.constants))

    def without_leaves(self) -> Split:
        """The tree for later :meth:`place`, which keeps no tensor."""
        return Split(self.spec, self.is_chosen, (), (None,) * len(self.constants))

    @property
    def is_bare(self) -> bool:
        """Is the tree a single leaf, in no container?"""
        return is_leaf(self.spec)

    def align(self, tree: Tree, root: str) -> list[Any]:
        """What another tree has in the places of the chosen leaves.

        Raises:
            StructureError: if the structures differ, or a differentiable tensor is in the place
                of a constant. Others may be, as in outputs that are given as cotangents.
        """
        values = aligned(self.spec, tree, root)
        if not self.constants:
            return values
        for value, yes, accessor in zip(values, self.is_chosen, self.spec.accessors(), strict=True):
            if not yes and is_differentiable(value):
                raise StructureError(
                    f"{accessor.codify(root)} is a tensor, not None as for a constant"
                )
        return [value for value, yes in zip(values, self.is_chosen, strict=True) if yes]

    def paths(self, root: str) -> list[str]:
        """The path of each chosen leaf, written as code."""
        accessors = self.spec.accessors()
        return [a.codify(root) for a, yes in zip(accessors, self.is_chosen, strict=True) if yes]

    def names(self) -> tuple[str, ...]:
        """The path of each chosen leaf without brackets: ``encoder.weight``.

        They are written as code where dots would not tell two apart; a lone leaf is ``""``.
        """
        paths = self.paths("")
        names = [".".join(map("".join, _STEP.findall(path))) for path in paths]
        return tuple(names if len(set(names)) == len(names) else paths)


_PLAIN = frozenset({bool, int, float, str})


@dataclass(eq=False, slots=True)
class Given:
    """What a module is given in a call whose kind tells all about it but the numbers.

    Args:
        tensors: all there are, in the order of the arguments.
        kind: equal for calls that differ in the numbers of their tensors alone.
        merge: puts tensors in the places of these; None where there is one, by position.
    """

    tensors: Leaves
    kind: Hashable
    merge: Callable[[Leaves], Tree] | None = None

    @classmethod
    def of(cls, arguments: tuple[tuple[Tree, ...], dict[str, Tree]]) -> Given | None:
        """What arguments hold; None where not all of it is plain, or has the samples in front."""
        args, kwargs = arguments
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor:  # the usual case
            return cls(args, kind_of(args[0]))
        split = Split.of(arguments, is_tensor)
        tensors, constants = split.leaves, split.constants
        if not (tensors and all(type(x) is Tensor and x.dim() for x in tensors)):
            return None
        if len({x.shape[0] for x in tensors}) > 1 or not _PLAIN.issuperset(map(type, constants)):
            return None
        # 1, 1.0 and True are equal, but no settings that are
        settings = tuple(map(repr, constants))
        kind = split.spec, split.is_chosen, tuple(map(kind_of, tensors)), settings
        return cls(tensors, kind, split.merge)

    def called(self, module: Callable[..., Any]) -> Callable[..., Any]:
        """The module as a function of tensors in the places of these."""
        merge = self.merge
        if merge is None:
            return module

        def call(*tensors: Tensor) -> Any:
            args, kwargs = merge(tensors)
            return module(*args, **kwargs)

        return call
