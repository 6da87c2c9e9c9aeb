"""Takes trees apart into leaves and puts them together again; the only importer of optree.

Dictionaries keep their insertion order, and ``None`` is structure. A node type that torch's own
pytree knows (HuggingFace's ``ModelOutput``, say) is registered with optree when it is first met,
and so is the class of an object with tensors in it (a dataclass, a ``UserDict``, a cache).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

from jacfunc._lock import alone
from jacfunc._trees.objects import Attribute, can_hold, holds_tensors, parts, put_together
from jacfunc._types import Tree

NAMESPACE = "jacfunc"
"""Register a node type with optree globally or in this namespace, and jacfunc sees through it."""

Structure: TypeAlias = optree.PyTreeSpec
"""What a tree is without its leaves."""

# A Jacobian's columns follow named_parameters(), whose order optree's default (sorted keys) would
# lose. The context is entered for the life of the process, in our namespace alone.
_INSERTION_ORDER = optree.dict_insertion_ordered(True, namespace=NAMESPACE)
_INSERTION_ORDER.__enter__()
LEAF = optree.treespec_leaf(namespace=NAMESPACE)


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves of a tree, left to right, and its structure."""
    if type(tree) is Tensor:  # the usual case; the general way costs as much as a small sweep
        return [tree], LEAF
    try:
        leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    except RecursionError:  # an object that leads to itself is no tree
        return flatten_containers(tree)
    return flatten(tree) if _has_new_kinds(tree, leaves) else (leaves, spec)


def flatten_containers(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves of a tree, and its structure; objects that hold tensors are leaves of it."""
    leaves, spec = optree.tree_flatten(tree, _object_test(), namespace=NAMESPACE)
    return flatten_containers(tree) if _has_foreign_kinds(tree, leaves) else (leaves, spec)


def unflatten(spec: Structure, leaves: Sequence[Any]) -> Tree:
    """A tree of this structure; in the place of a leaf may be anything, even a tree."""
    return leaves[0] if spec is LEAF else optree.tree_unflatten(spec, leaves)


class StructureError(ValueError):
    """The structures of two trees differ; the message begins with the place."""


def aligned(spec: Structure, tree: Tree, root: str) -> list[Any]:
    """The subtrees of ``tree`` where the structure has leaves; dicts are matched by key.

    Raises:
        StructureError: if keys, a length or a kind of node differ somewhere.
    """
    if is_leaf(spec):
        return [tree]
    flatten(tree)  # registers node types that are met for the first time
    try:
        return list(spec.flatten_up_to(tree))
    except ValueError as error:
        raise StructureError(_mismatch(spec, tree, root)) from error


def is_leaf(spec: Structure) -> bool:
    """Is it the structure of a lone leaf?"""
    return spec.num_leaves == 1 and spec.num_nodes == 1


def _mismatch(spec: Structure, tree: Tree, root: str) -> str:
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


def _root_in_words(spec: Structure) -> str:
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
    flatten(tree)  # registers node types that are met for the first time
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


def _has_new_kinds(tree: Tree, leaves: Sequence[Any]) -> bool:
    """Should some leaves of the tree be nodes? Their classes are registered, for the next time."""
    kinds: set[Any] = {type(leaf) for leaf in leaves}
    if _closed().issuperset(kinds) and not kinds & torch_pytree.SUPPORTED_NODES.keys():
        return False
    _closed().update(kind for kind in kinds if not can_hold(kind))
    objects = {type(leaf) for leaf in leaves if type(leaf) not in _closed() and holds_tensors(leaf)}
    with alone():
        is_foreign = _has_foreign_kinds(tree, leaves)
        # another thread may have registered some while this one waited
        for kind in objects - _objects() - torch_pytree.SUPPORTED_NODES.keys():
            _register_object(kind)
            _objects().add(kind)
    return is_foreign or bool(objects)


def _has_foreign_kinds(tree: Tree, leaves: Sequence[Any]) -> bool:
    """Should some leaves be nodes, of types that torch's pytree knows? These are registered."""
    foreign = {type(leaf) for leaf in leaves} & torch_pytree.SUPPORTED_NODES.keys()
    if not foreign:
        return False
    with alone():
        kinds = {type(leaf) for leaf in optree.tree_leaves(tree, namespace=NAMESPACE)}
        for kind in foreign & kinds:
            _register_foreign(kind)
    return True


def _object_test() -> Callable[[Any], bool] | None:
    """Tells whether something is an object whose class was registered for its tensors."""
    return (lambda thing: type(thing) in _objects()) if _objects() else None


@cache
def _closed() -> set[Any]:
    """Classes whose objects are no trees, whatever they hold."""
    return {Tensor, nn.Parameter, bool, int, float, str}


@cache
def _objects() -> set[Any]:
    """Classes of objects that were met with tensors in them."""
    return set()


def _register_foreign(kind: type) -> None:
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


def _register_object(kind: type) -> None:
    """Register a class of objects that hold tensors."""

    def take_apart(thing: Any) -> tuple[list[Any], Any, list[Any]]:
        keys, values = parts(thing)
        return values, tuple(keys), keys

    optree.register_pytree_node(
        kind, take_apart, partial(put_together, kind), path_entry_type=Inside, namespace=NAMESPACE
    )


class Inside(optree.PyTreeEntry):
    """The way from an object to an item or an attribute of it."""

    def codify(self, /, node: str = "") -> str:
        if not isinstance(self.entry, Attribute):
            return f"{node}[{self.entry!r}]"
        if self.entry.name == "data" and issubclass(self.type, UserDict):
            return node  # a UserDict reads its items from this attribute
        return f"{node}.{self.entry.name}"


def is_inside(way: Sequence[Any]) -> bool:
    """Does the way from the root to a leaf lead through an object?"""
    return any(isinstance(step, Inside) for step in way)
