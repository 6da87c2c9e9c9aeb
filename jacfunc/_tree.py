"""Trees ⇄ leaves: the only importer of optree.

Dictionaries keep their insertion order, ``None`` is structure, and node types registered with
torch's own pytree (HuggingFace's ``ModelOutput``, say) are adopted when they are first met.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from jacfunc._check import is_differentiable
from jacfunc._lock import alone
from jacfunc._types import Tree

NAMESPACE = "jacfunc"
"""Register a node type with optree globally or in this namespace, and jacfunc sees through it."""

# Entered for the life of the process, and for our namespace alone: a Jacobian's columns follow
# named_parameters(), whose order optree's default (sorted keys) would lose.
_INSERTION_ORDER = optree.dict_insertion_ordered(True, namespace=NAMESPACE)
_INSERTION_ORDER.__enter__()

_LEAF = optree.treespec_leaf(namespace=NAMESPACE)


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves of a tree, left to right, and what puts them back."""
    if type(tree) is Tensor:  # most trees are; the general way costs as much as a small sweep
        return [tree], _LEAF
    leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    foreign = {type(leaf) for leaf in leaves} & torch_pytree.SUPPORTED_NODES.keys()
    if not foreign:
        return leaves, spec
    with alone():
        # another thread may have adopted them while this one waited
        known = {type(leaf) for leaf in optree.tree_leaves(tree, namespace=NAMESPACE)}
        for kind in foreign & known:
            _adopt(kind)
    return flatten(tree)


def unflatten(spec: optree.PyTreeSpec, leaves: Sequence[Any]) -> Tree:
    """The tree again; a leaf may be replaced by anything, a tree included."""
    return leaves[0] if spec is _LEAF else optree.tree_unflatten(spec, leaves)


def paths(tree: Tree, root: str) -> list[str]:
    """Leaf paths as code: ``params['encoder.weight']``."""
    return Split.of(tree, lambda _: True).paths(root)


class StructureError(ValueError):
    """Two trees whose structures differ, in words that begin with the place."""


def aligned(spec: optree.PyTreeSpec, tree: Tree, root: str) -> list[Any]:
    """What lies in a tree where another has its leaves: by key in dicts, whatever their order.

    Raises:
        StructureError: if it has other keys, another length or another kind of node somewhere.
    """
    if _is_leaf(spec):
        return [tree]
    flatten(tree)  # adopts node types that are met for the first time
    try:
        return list(spec.flatten_up_to(tree))
    except ValueError as error:
        raise StructureError(_mismatch(spec, tree, root)) from error


def _is_leaf(spec: optree.PyTreeSpec) -> bool:
    return spec.num_leaves == 1 and spec.num_nodes == 1


def _mismatch(spec: optree.PyTreeSpec, tree: Tree, root: str) -> str:
    """The outermost place where the structures differ."""
    level = spec.one_level()
    assert level is not None, "whatever is there fits a leaf"
    try:
        parts = level.flatten_up_to(tree)
    except ValueError:
        return f"{root} is {_node(tree)}, not {_like(spec)}"
    for part, below, accessor in zip(parts, spec.children(), level.accessors(), strict=True):
        try:
            below.flatten_up_to(part)
        except ValueError:
            return _mismatch(below, part, accessor.codify(root))
    return f"{root} has another structure"


def _like(spec: optree.PyTreeSpec) -> str:
    """A node of a structure in words."""
    return _node(optree.tree_unflatten(spec, [None] * spec.num_leaves))


def _node(tree: Tree) -> str:
    kind = type(tree).__name__
    if isinstance(tree, Mapping):
        return f"a {kind} of {', '.join(map(repr, tree)) or 'nothing'}"
    return f"a {kind} of {len(tree)}" if isinstance(tree, tuple | list) else kind


def broadcast_prefix(prefix: Tree, tree: Tree, root: str = "dims") -> list[Any]:
    """A prefix tree (``in_dims``), where None is a value, spread over the leaves of the tree.

    Raises:
        StructureError: if it is no prefix.
    """
    if isinstance(prefix, int):
        return [prefix] * len(flatten(tree)[0])
    leaf = object()
    full = optree.tree_map(lambda _: leaf, tree, namespace=NAMESPACE)
    # None is structure in the tree and a value in the prefix: count it in both, drop it after
    values, spec = optree.tree_flatten(prefix, none_is_leaf=True, namespace=NAMESPACE)
    slots, whole = optree.tree_flatten(full, none_is_leaf=True, namespace=NAMESPACE)
    below = [
        optree.tree_map(lambda _, v=value: v, part, none_is_leaf=True, namespace=NAMESPACE)
        for value, part in zip(values, aligned(spec, full, root), strict=True)
    ]
    # in the order of the tree: dicts of the prefix may have another
    spread = aligned(whole, optree.tree_unflatten(spec, below), root)
    return [value for value, slot in zip(spread, slots, strict=True) if slot is leaf]


def stack_trees(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as a tree of leaves ``[len(trees), *shape]``."""
    first, spec = flatten(trees[0])
    rest = [aligned(spec, tree, "output") for tree in trees[1:]]
    return unflatten(spec, [torch.stack(column) for column in zip(first, *rest, strict=True)])


def map_tensors(func: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The tree with every tensor replaced, and everything else as it is."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [func(x) if isinstance(x, Tensor) else x for x in leaves])


def kind_of(leaf: object) -> Hashable:
    """Equal for leaves that cost the same: shape, dtype and device, or the value of a setting."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf).__qualname__


def kinds_of(tree: Tree) -> Hashable:
    """Equal for trees that cost the same."""
    leaves, spec = flatten(tree)
    return spec, tuple([kind_of(leaf) for leaf in leaves])


def _adopt(kind: type) -> None:
    """Teach optree, in our namespace, a node type that torch's pytree knows."""
    node = torch_pytree.SUPPORTED_NODES[kind]

    def take_apart(tree: Tree) -> tuple[list[Any], Any, list[Any] | None]:
        children, context = node.flatten_fn(tree)
        # the fields that optree would count off are wrong where those of None are left out
        return children, context, list(tree) if issubclass(kind, dict) else None

    def put_together(context: Any, children: Any) -> Tree:
        values = list(children)
        if not (issubclass(kind, dict) and is_dataclass(kind)):
            return node.unflatten_fn(values, context)
        # filled when it is made: HuggingFace's ModelOutput takes a lone dict for its own fields
        slots = [None if value is None else object() for value in values]
        tree = node.unflatten_fn(slots, context)
        filling = {id(slot): value for slot, value in zip(slots, values, strict=True)}
        for key, slot in list(tree.items()):
            tree[key] = filling.get(id(slot), slot)
        return tree

    optree.register_pytree_node(kind, take_apart, put_together, namespace=NAMESPACE)


@dataclass(slots=True)
class Split:
    """A tree as its chosen leaves, by default the differentiable ones, among the constants."""

    spec: optree.PyTreeSpec
    is_chosen: tuple[bool, ...]
    leaves: tuple[Any, ...]
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Tree, chosen: Callable[[object], bool] = is_differentiable) -> Split:
        if type(tree) is Tensor and chosen(tree):
            return cls(_LEAF, (True,), (tree,), ())
        everything, spec = flatten(tree)
        is_chosen = tuple(map(chosen, everything))
        if all(is_chosen):
            return cls(spec, is_chosen, tuple(everything), ())
        leaves = tuple(leaf for leaf, yes in zip(everything, is_chosen, strict=True) if yes)
        constants = tuple(leaf for leaf, yes in zip(everything, is_chosen, strict=True) if not yes)
        return cls(spec, is_chosen, leaves, constants)

    def merge(self, leaves: Sequence[Any], constants: Sequence[Any] | None = None) -> Tree:
        """The tree with new chosen leaves; its constants stay unless they are given too."""
        if not self.constants:
            return unflatten(self.spec, leaves)
        new, kept = iter(leaves), iter(self.constants if constants is None else constants)
        return unflatten(self.spec, [next(new if yes else kept) for yes in self.is_chosen])

    def place(self, values: Sequence[Any]) -> Tree:
        """The tree of results: a value at each chosen leaf, None at each constant."""
        return self.merge(values, [None] * len(self.constants))

    @property
    def is_bare(self) -> bool:
        """Is it one leaf, in no container?"""
        return _is_leaf(self.spec)

    def align(self, tree: Tree, root: str) -> list[Any]:
        """What another tree has where the chosen leaves are; None at the constants.

        Raises:
            StructureError: if the structures differ, or it has a tensor in a constant's place.
        """
        values = aligned(self.spec, tree, root)
        if not self.constants:
            return values
        for value, yes, accessor in zip(values, self.is_chosen, self.spec.accessors(), strict=True):
            if isinstance(value, Tensor) and not yes:
                raise StructureError(
                    f"{accessor.codify(root)} is a tensor, not None as for a constant"
                )
        return [value for value, yes in zip(values, self.is_chosen, strict=True) if yes]

    def paths(self, root: str) -> list[str]:
        """Paths of the chosen leaves as code."""
        every = self.spec.accessors()
        return [a.codify(root) for a, yes in zip(every, self.is_chosen, strict=True) if yes]
