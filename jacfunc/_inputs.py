"""A module's own inputs: which of them are differentiated, and which dimension holds samples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from jacfunc._tree import StructureError, broadcast_prefix, flatten, paths, unflatten
from jacfunc._types import Tree

Key: TypeAlias = int | str
Arguments: TypeAlias = tuple[tuple[Tree, ...], dict[str, Tree]]
"""``(args, kwargs)`` of a call."""


@dataclass(frozen=True)
class Held:
    """An input that stays constant, hidden from whoever differentiates every tensor."""

    tensor: Tensor


@dataclass(frozen=True)
class Pick:
    """An argument of one call, by position or name, or those of its leaves that a path fits."""

    key: Key
    path: str

    def of(self, arguments: Arguments) -> Tree:
        """The argument, with leaves that do not fit held."""
        args, kwargs = arguments
        tree = args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        if not self.path:
            return tree
        leaves, spec = flatten(tree)
        shown = zip(leaves, paths(tree, ""), strict=True)
        return unflatten(spec, [x if self.fits(path) else _held(x) for x, path in shown])

    def fits(self, path: str) -> bool:
        """Is it this path, one that its stars stand for, or one below?"""
        pattern = re.escape(self.path).replace(r"\*", ".*")
        return re.fullmatch(rf"{pattern}([\[.].*)?", path) is not None


@dataclass(frozen=True)
class Choice:
    """What is differentiated of one call's arguments: the picks, or whatever there is."""

    picks: tuple[Pick, ...] = ()
    is_single: bool = False

    @classmethod
    def of(
        cls, api: str, module: nn.Module, inputs: Key | Sequence[Key] | None, arguments: Arguments
    ) -> Choice:
        """From positions, names and paths: ``0``, ``"mask"``, ``"batch['image']"``.

        Raises:
            ValueError: if there is no such argument, or no such path in it.
        """
        if inputs is None:
            return cls()
        is_single = isinstance(inputs, int | str)
        keys: Sequence[Any] = [inputs] if is_single else list(inputs)  # type: ignore[arg-type]
        return cls(tuple(_pick(api, module, key, arguments) for key in keys), is_single)

    def split(self, arguments: Arguments) -> Tree:
        """The chosen arguments: one alone, several in a tuple, all of them by name in a dict."""
        args, kwargs = arguments
        if not self.picks:
            return (args[0] if len(args) == 1 else args) if args else kwargs
        chosen = tuple(pick.of(arguments) for pick in self.picks)
        return chosen[0] if self.is_single else chosen

    def join(self, chosen: Tree, arguments: Arguments) -> Arguments:
        """All arguments, those that were chosen given anew."""
        args, kwargs = arguments
        if not self.picks:
            if not args:
                return args, chosen
            return ((chosen,) if len(args) == 1 else chosen), kwargs
        left, named = list(args), dict(kwargs)
        for pick, tree in zip(self.picks, (chosen,) if self.is_single else chosen, strict=True):
            place: Any = left if isinstance(pick.key, int) else named
            place[pick.key] = _laid_over(place[pick.key], tree)
        return tuple(left), named


def _pick(api: str, module: nn.Module, key: Any, arguments: Arguments) -> Pick:
    """Positional arguments have names too: those of ``forward``."""
    args, kwargs = arguments
    name, path = (key, "") if isinstance(key, int) else _parted(key)
    if isinstance(name, str) and name not in kwargs:
        named = list(inspect.signature(module.forward).parameters)[: len(args)]
        name = named.index(name) if name in named else name
    if (isinstance(name, int) and not -len(args) <= name < len(args)) or (
        isinstance(name, str) and name not in kwargs
    ):
        known = [*range(len(args)), *kwargs]
        raise ValueError(
            f"{api}: inputs must be positions or names of this call's inputs, got {key!r}. "
            f"There are {', '.join(map(repr, known))}."
        )
    pick = Pick(name, path)
    tree = args[name] if isinstance(name, int) else kwargs[name]
    if path and not any(map(pick.fits, paths(tree, ""))):
        raise ValueError(
            f"{api}: inputs must be paths to leaves, got {key!r}. "
            f"There are {', '.join(paths(tree, str(name))[:5])}."
        )
    return pick


def _parted(key: str) -> tuple[str, str]:
    """``"batch['image']"`` → ``("batch", "['image']")``."""
    found = re.search(r"[\[.]", key)
    return (key, "") if found is None else (key[: found.start()], key[found.start() :])


def _held(leaf: Any) -> Any:
    return Held(leaf) if isinstance(leaf, Tensor) else leaf


def _laid_over(given: Tree, tree: Tree) -> Tree:
    """The new leaves where they are not held, those given before elsewhere."""
    new, spec = flatten(tree)
    pairs = zip(new, flatten(given)[0], strict=True)
    return unflatten(spec, [old if isinstance(x, Held) else x for x, old in pairs])


def sample_dims(api: str, in_dims: Tree, arguments: Arguments) -> list[int | None]:
    """The dimension of samples of every leaf of the arguments, left to right.

    Raises:
        ValueError, TypeError: if they do not fit the arguments.
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
    if isinstance(in_dims, tuple | list) and len(in_dims) != len(args):
        raise ValueError(
            f"{api}: in_dims must have one entry for each of the {len(args)} inputs, got "
            f"{len(in_dims)}. Use None for what all samples share."
        )
    entire = in_dims if isinstance(in_dims, int) else 0
    positional = in_dims if isinstance(in_dims, tuple | list) else [entire] * len(args)
    prefixes = [*positional, *(by_name.get(name, entire) for name in kwargs)]
    dims: list[Any] = []
    names = [*range(len(args)), *kwargs]
    for name, prefix, tree in zip(names, prefixes, (*args, *kwargs.values()), strict=True):
        try:
            dims += broadcast_prefix(prefix, tree, f"input {name!r}")
        except StructureError as error:
            raise ValueError(
                f"{api}: in_dims must have the structure of the inputs, got one where {error}. "
                "Give dicts the same keys."
            ) from error
    leaves = flatten(arguments)[0]
    return [d if isinstance(x, Tensor) else None for x, d in zip(leaves, dims, strict=True)]


def check_batch(api: str, leaves: Sequence[Tensor], dims: Sequence[int | None]) -> None:
    """All tensors that have samples have equally many, and at least one."""
    for leaf, dim in zip(leaves, dims, strict=True):
        if dim is not None and not -leaf.dim() <= dim < leaf.dim():
            raise ValueError(
                f"{api}: with per_sample every input tensor must have the batch in its dimension "
                f"{dim}, got shape {tuple(leaf.shape)}. Say in in_dims what all samples share."
            )
    sizes = {x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None}
    if len(sizes) != 1:
        raise ValueError(
            f"{api}: with per_sample every input tensor must have the same batch, got "
            f"{sorted(sizes) or 'none'}. Say in in_dims what all samples share, and where."
        )
    if sizes == {0}:
        raise ValueError(
            f"{api}: per_sample needs at least one sample, got an empty batch. "
            "Pass inputs with samples, or leave per_sample out."
        )
