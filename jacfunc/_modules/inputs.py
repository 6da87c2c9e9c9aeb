"""What a module is differentiated by: parameters or inputs; these by position, name or path."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from jacfunc._arguments import are_plain
from jacfunc._errors import Refused
from jacfunc._torch import untracked
from jacfunc._trees import Arguments, Split, flatten, kind_of, paths, unflatten
from jacfunc._types import Argnums, Leaves, Tree

Key: TypeAlias = int | str


Wrt: TypeAlias = Literal["params", "inputs"]
POSITIONS = {"params": 0, "inputs": 1}
"""Positions of what a module is differentiated by, as ``argnums`` counts them."""


def argnums_of(api: str, wrt: Any) -> Argnums:
    """The positions of ``"params"``, ``"inputs"``, or a tuple of both.

    Raises:
        ValueError: if ``wrt`` is anything else.
    """
    if isinstance(wrt, str) and wrt in POSITIONS:
        return POSITIONS[wrt]
    names = wrt if isinstance(wrt, tuple | list) else (wrt,)
    every = [*POSITIONS]
    are_words = all(isinstance(name, str) for name in names)
    if not (names and are_words and set(names) <= set(every) and len(set(names)) == len(names)):
        raise ValueError(
            f"{api}: wrt must be 'params', 'inputs' or a tuple of both, got {wrt!r}. "
            "Choose single parameters with select=, single inputs with inputs=."
        )
    return tuple(POSITIONS[name] for name in names)


@dataclass(frozen=True)
class ConstantInput:
    """An input that stays constant: a tensor in a box, which is no leaf to differentiate."""

    tensor: Tensor


@dataclass(frozen=True)
class InputPick:
    """An argument of one call, by position or name; with a path, some of its leaves."""

    key: Key
    path: str

    def of(self, arguments: Arguments) -> Tree:
        """The argument; leaves that the path does not name are constants in it."""
        tree = self.argument(arguments)
        if not self.path:
            return tree
        leaves, spec = flatten(tree)
        pairs = zip(leaves, paths(tree, ""), strict=True)
        return unflatten(spec, [x if self.names(path) else _constant(x) for x, path in pairs])

    def argument(self, arguments: Arguments) -> Tree:
        """The argument as a whole."""
        args, kwargs = arguments
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]

    def overlaps(self, other: InputPick, arguments: Arguments) -> bool:
        """Do both name a leaf?"""
        if self.key != other.key:
            return False
        every = paths(self.argument(arguments), "")
        return not every or any(self.names(path) and other.names(path) for path in every)

    def names(self, path: str) -> bool:
        """Does the pick name the leaf at a path? It names all leaves below its own; * fits all."""
        pattern = re.escape(self.path).replace(r"\*", ".*")
        return re.fullmatch(rf"{pattern}([\[.].*)?", path) is not None


@dataclass(frozen=True)
class InputChoice:
    """The inputs that one call is differentiated by: some picks, or all there are."""

    picks: tuple[InputPick, ...] = ()
    is_single: bool = False

    @classmethod
    def of(
        cls, api: str, module: nn.Module, inputs: Key | Sequence[Key] | None, arguments: Arguments
    ) -> InputChoice:
        """The choice by positions, names and paths: ``0``, ``"mask"``, ``"batch['image']"``.

        Raises:
            TypeError, ValueError: if it is no such choice, if there is no such argument, or no such
                path in it, or if two name the same.
        """
        if inputs is None:
            return cls()
        is_single = _is_key(inputs)
        keys: Any = inputs if isinstance(inputs, Sequence) and not is_single else [inputs]
        if wrong := next((type(key).__name__ for key in keys if not _is_key(key)), None):
            raise TypeError(
                f"{api}: inputs must be a position, a name or a path, or several of these, got "
                f"{wrong}. Write 0, 'mask' or \"batch['image']\"."
            )
        if not keys:
            raise ValueError(
                f"{api}: inputs must name at least one input, got {inputs!r}. Leave it out to "
                "choose all."
            )
        picks = tuple(_pick(api, module, key, arguments) for key in keys)
        for number, (key, pick) in enumerate(zip(keys, picks, strict=True)):
            if any(pick.overlaps(other, arguments) for other in picks[:number]):
                raise ValueError(
                    f"{api}: inputs must name each input once, got {key!r} beside others that "
                    "name it. Leave one out."
                )
        return cls(picks, is_single)

    def split(self, arguments: Arguments) -> Tree:
        """The chosen arguments: one as it is, several as a tuple, all by keyword as a dict."""
        args, kwargs = arguments
        if not self.picks:
            return (args[0] if len(args) == 1 else args) if args else kwargs
        chosen = tuple(pick.of(arguments) for pick in self.picks)
        return chosen[0] if self.is_single else chosen

    def join(self, chosen: Tree, arguments: Arguments) -> Arguments:
        """All arguments, with new ones in the place of those that are chosen."""
        args, kwargs = arguments
        if not self.picks:
            if not args:
                return args, chosen
            return ((chosen,) if len(args) == 1 else chosen), kwargs
        positional, by_name = list(args), dict(kwargs)
        for pick, tree in zip(self.picks, (chosen,) if self.is_single else chosen, strict=True):
            place: Any = positional if isinstance(pick.key, int) else by_name
            place[pick.key] = _overlaid(place[pick.key], tree)
        return tuple(positional), by_name


class OwnArguments:
    """The arguments of a call, of which each evaluation gets copies: a module may write there.

    With ``dims`` they are those of one sample, of which a module gets a batch of one.
    """

    def __init__(
        self,
        choice: InputChoice,
        arguments: Arguments,
        split: Split,
        dims: Sequence[int | None] | None,
    ) -> None:
        self._choice, self._arguments, self._split, self._dims = choice, arguments, split, dims
        self._originals = set(map(id, split.leaves))
        # the clone of another class would be a plain tensor where nobody sees it made
        self._sight: Any = untracked if are_plain(split.leaves) else nullcontext

    @property
    def kinds(self) -> Hashable:
        """Structure and kinds of the leaves."""
        return self._split.spec, tuple(map(kind_of, self._split.everything))

    def copied(self, chosen: Tree) -> Arguments:
        """The arguments with the chosen ones as they are, and copies of the rest."""
        with self._sight():
            leaves, spec = self._split.everything, self._split.spec
            if chosen is not None:
                leaves, spec = flatten(self._choice.join(chosen, self._arguments))
            own = [x.clone() if id(x) in self._originals else x for x in leaves]
            if self._dims is not None:
                pairs = zip(own, self._dims, strict=True)
                own = [x if dim is None else x.unsqueeze(dim) for x, dim in pairs]
            copies: Arguments = unflatten(spec, own)
            return copies


def _is_key(key: object) -> bool:
    """Is it a position, a name or a path?"""
    return isinstance(key, int | str) and not isinstance(key, bool)


@contextmanager
def noted(api: str, tensors: Leaves) -> Iterator[None]:
    """A context of which the module's own errors get a note: what it was called with."""
    try:
        yield
    except Exception as error:
        told = f"{error}{getattr(error, '__notes__', '')}"
        if not isinstance(error, Refused) and f"{api}: " not in told:
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            error.add_note(
                f"{api}: the module must run on its inputs, got this error of its own for shapes "
                f"{shapes}. Where samples are taken apart they are in front, or where in_dims says."
            )
        raise


def _pick(api: str, module: nn.Module, key: Any, arguments: Arguments) -> InputPick:
    """The pick that a key means; positional arguments have names, too: those of ``forward``."""
    args, kwargs = arguments
    name, path = (key, "") if isinstance(key, int) else _name_and_path(key)
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
    pick = InputPick(name % len(args) if isinstance(name, int) else name, path)
    tree = pick.argument(arguments)
    if path and not any(map(pick.names, paths(tree, ""))):
        raise ValueError(
            f"{api}: inputs must be paths to leaves, got {key!r}. "
            f"There are {', '.join(paths(tree, str(name))[:5])}."
        )
    return pick


def _name_and_path(key: str) -> tuple[str, str]:
    """``"batch['image']"`` → ``("batch", "['image']")``."""
    start = re.search(r"[\[.]", key)
    return (key, "") if start is None else (key[: start.start()], key[start.start() :])


def _constant(leaf: Any) -> Any:
    return ConstantInput(leaf) if isinstance(leaf, Tensor) else leaf


def _overlaid(argument: Tree, tree: Tree) -> Tree:
    """The leaves of a tree, and where these are constants, those of the argument."""
    new, spec = flatten(tree)
    pairs = zip(new, flatten(argument)[0], strict=True)
    return unflatten(spec, [old if isinstance(x, ConstantInput) else x for x, old in pairs])
