"""Takes trees apart into leaves and puts them together again; the only importer of optree.

Dictionaries keep their insertion order, and ``None`` is structure. A node type that torch's own
pytree knows (HuggingFace's ``ModelOutput``, say) is registered with optree when it is first met.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from jacfunc._lock import alone
from jacfunc._types import Tree, is_differentiable

NAMESPACE = "jacfunc"
"""Register a node type with optree globally or in this namespace, and jacfunc sees through it."""

# A Jacobian's columns follow named_parameters(), whose order optree's default (sorted keys) would
# lose. The context is entered for the life of the process, in our namespace alone.
_INSERTION_ORDER = optree.dict_insertion_ordered(True, namespace=NAMESPACE)

_INSERTION_ORDER.__enter__()

_LEAF = optree.treespec_leaf(namespace=NAMESPACE)


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves of a tree, left to right, and its structure."""
    if type(tree) is Tensor:  # the usual case; the general way costs as much as a small sweep
        return [tree], _LEAF
    leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    foreign = {type(leaf) for leaf in leaves} & torch_pytree.SUPPORTED_NODES.keys()
    if not foreign:
        return leaves, spec
    with alone():
        # another thread may have registered some while this one waited
        kinds = {type(leaf) for leaf in optree.tree_leaves(tree, namespace=NAMESPACE)}
        for kind in foreign & kinds:
            _register(kind)
    return flatten(tree)


def unflatten(spec: optree.PyTreeSpec, leaves: Sequence[Any]) -> Tree:
    """A tree of this structure; in the place of a leaf may be anything, even a tree."""
    return leaves[0] if spec is _LEAF else optree.tree_unflatten(spec, leaves)


def paths(tree: Tree, root: str) -> list[str]:
    """The path of each leaf, written as code: ``params['encoder.weight']``."""
    return Split.of(tree, lambda _: True).paths(root)


class StructureError(ValueError):
    """The structures of two trees differ; the message begins with the place."""


def aligned(spec: optree.PyTreeSpec, tree: Tree, root: str) -> list[Any]:
    """The subtrees of ``tree`` where the structure has leaves; dicts are matched by key.

    Raises:
        StructureError: if keys, a length or a kind of node differ somewhere.
    """
    if _is_leaf(spec):
        return [tree]
    flatten(tree)  # registers node types that are met for the first time
    try:
        return list(spec.flatten_up_to(tree))
    except ValueError as error:
        raise StructureError(_mismatch(spec, tree, root)) from error


def _is_leaf(spec: optree.PyTreeSpec) -> bool:
    return spec.num_leaves == 1 and spec.num_nodes == 1


def _mismatch(spec: optree.PyTreeSpec, tree: Tree, root: str) -> str:
    """Words for the outermost place where a structure and a tree differ."""
    level = spec.one_level()
    assert level is not None, "anything fits a leaf"
    try:
        parts = level.flatten_up_to(tree)
    except ValueError:
        return f"{root} is {_in_words(tree)}, not {_root_in_words(spec)}"
    for part, below, accessor in zip(parts, spec.children(), level.accessors(), strict=True):
        try:
            below.flatten_up_to(part)
        except ValueError:
            return _mismatch(below, part, accessor.codify(root))
    return f"{root} has another structure"


def _root_in_words(spec: optree.PyTreeSpec) -> str:
    """Words for the outermost node of a structure."""
    return _in_words(optree.tree_unflatten(spec, [None] * spec.num_leaves))


def _in_words(tree: Tree) -> str:
    """Words for the outermost node of a tree."""
    kind = type(tree).__name__
    if isinstance(tree, Mapping):
        return f"a {kind} of {', '.join(map(repr, tree)) or 'nothing'}"
    return f"a {kind} of {len(tree)}" if isinstance(tree, tuple | list) else kind


def broadcast_prefix(prefix: Tree, tree: Tree, root: str = "dims") -> list[Any]:
    """A value for each leaf of a tree, from a prefix of it (``in_dims``), where None is a value.

    Raises:
        StructureError: if ``prefix`` is not a prefix of the tree.
    """
    if isinstance(prefix, int):
        return [prefix] * len(flatten(tree)[0])
    leaf = object()
    full = optree.tree_map(lambda _: leaf, tree, namespace=NAMESPACE)
    # None is structure in the tree and a value in the prefix: keep it in both, drop it at the end
    values, spec = optree.tree_flatten(prefix, none_is_leaf=True, namespace=NAMESPACE)
    slots, whole = optree.tree_flatten(full, none_is_leaf=True, namespace=NAMESPACE)
    below = [
        optree.tree_map(lambda _, v=value: v, part, none_is_leaf=True, namespace=NAMESPACE)
        for value, part in zip(values, aligned(spec, full, root), strict=True)
    ]
    # dicts of the prefix may have another order than those of the tree
    spread = aligned(whole, optree.tree_unflatten(spec, below), root)
    return [value for value, slot in zip(spread, slots, strict=True) if slot is leaf]


def stack_trees(trees: Sequence[Tree]) -> Tree:
    """One tree with leaves ``[len(trees), *shape]``, from trees of one structure."""
    first, spec = flatten(trees[0])
    rest = [aligned(spec, tree, "output") for tree in trees[1:]]
    return unflatten(spec, [torch.stack(column) for column in zip(first, *rest, strict=True)])


def map_tensors(func: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The tree with ``func`` applied to every tensor, and all else as it is."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [func(x) if isinstance(x, Tensor) else x for x in leaves])


def kind_of(leaf: object) -> Hashable:
    """Shape, dtype and device of a tensor, or a setting's value: equal for leaves of equal cost."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf).__qualname__


def kinds_of(tree: Tree) -> Hashable:
    """Structure and kinds of the leaves of a tree: equal for trees of equal cost."""
    leaves, spec = flatten(tree)
    return spec, tuple([kind_of(leaf) for leaf in leaves])


def _register(kind: type) -> None:
    """Register with optree, in our namespace, a node type that torch's pytree knows."""
    node = torch_pytree.SUPPORTED_NODES[kind]

    def take_apart(tree: Tree) -> tuple[list[Any], Any, list[Any] | None]:
        children, context = node.flatten_fn(tree)
        # without names optree would count the fields, wrongly where those of None are left out
        return children, context, list(tree) if issubclass(kind, dict) else None

    def put_together(context: Any, children: Any) -> Tree:
        values = list(children)
        if not (issubclass(kind, dict) and is_dataclass(kind)):
            return node.unflatten_fn(values, context)
        # fill it after it is made: HuggingFace's ModelOutput takes a lone dict for its own fields
        slots = [None if value is None else object() for value in values]
        tree = node.unflatten_fn(slots, context)
        filling = {id(slot): value for slot, value in zip(slots, values, strict=True)}
        for key, slot in list(tree.items()):
            tree[key] = filling.get(id(slot), slot)
        return tree

    optree.register_pytree_node(kind, take_apart, put_together, namespace=NAMESPACE)


@dataclass(slots=True)
class Split:
    """A tree split into chosen leaves, by default the differentiable ones, and constants."""

    spec: optree.PyTreeSpec
    is_chosen: tuple[bool, ...]
    leaves: tuple[Any, ...]
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Tree, chosen: Callable[[object], bool] = is_differentiable) -> Split:
        """Split a tree; ``chosen`` tells for each leaf whether it is one."""
        # the commonest tree by far, and a leaf of every choice
        if type(tree) is Tensor and tree.is_floating_point():
            return cls(_LEAF, (True,), (tree,), ())
        everything, spec = flatten(tree)
        is_chosen = tuple(map(chosen, everything))
        if all(is_chosen):
            return cls(spec, is_chosen, tuple(everything), ())
        leaves = tuple(leaf for leaf, yes in zip(everything, is_chosen, strict=True) if yes)
        constants = tuple(leaf for leaf, yes in zip(everything, is_chosen, strict=True) if not yes)
        return cls(spec, is_chosen, leaves, constants)

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

    @property
    def is_bare(self) -> bool:
        """Is the tree a single leaf, in no container?"""
        return _is_leaf(self.spec)

    def align(self, tree: Tree, root: str) -> list[Any]:
        """What another tree has in the places of the chosen leaves.

        Raises:
            StructureError: if the structures differ, or a tensor is in the place of a constant.
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
        """The path of each chosen leaf, written as code."""
        accessors = self.spec.accessors()
        return [a.codify(root) for a, yes in zip(accessors, self.is_chosen, strict=True) if yes]
