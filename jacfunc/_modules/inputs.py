"""A module's own inputs: which of them are differentiated, and which dimension holds samples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from jacfunc._trees import Arguments, flatten, paths, unflatten
from jacfunc._types import Tree

Key: TypeAlias = int | str


@dataclass(frozen=True)
class ConstantInput:
    """An input that stays constant, hidden from whoever differentiates every tensor."""

    tensor: Tensor


@dataclass(frozen=True)
class InputPick:
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
class InputChoice:
    """What is differentiated of one call's arguments: the picks, or whatever there is."""

    picks: tuple[InputPick, ...] = ()
    is_single: bool = False

    @classmethod
    def of(
        cls, api: str, module: nn.Module, inputs: Key | Sequence[Key] | None, arguments: Arguments
    ) -> InputChoice:
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


def _pick(api: str, module: nn.Module, key: Any, arguments: Arguments) -> InputPick:
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
    pick = InputPick(name, path)
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
    return ConstantInput(leaf) if isinstance(leaf, Tensor) else leaf


def _laid_over(given: Tree, tree: Tree) -> Tree:
    """The new leaves where they are not held, those given before elsewhere."""
    new, spec = flatten(tree)
    pairs = zip(new, flatten(given)[0], strict=True)
    return unflatten(spec, [old if isinstance(x, ConstantInput) else x for x, old in pairs])
