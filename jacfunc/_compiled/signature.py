"""What tells calls apart for which one trace holds from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import call
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._arguments import are_plain
from jacfunc._errors import Nameless
from jacfunc._surroundings import is_value, value_of
from jacfunc._torch import Graphs
from jacfunc._trees import flatten_containers, unflatten
from jacfunc._types import Leaves, Tree

_call: Any = call  # which map has no types for


class CallArguments(NamedTuple):
    """The arguments of a call: its tensors, and the trees and plain values that they are in.

    Args:
        leaves: the tensors.
        structure: all else; calls of equal structures differ in tensors alone.
    """

    leaves: Leaves
    structure: Any

    @classmethod
    def of(cls, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> CallArguments:
        """Take the arguments of a call apart."""
        if not kwargs and all(type(arg) is Tensor for arg in args):
            return cls(args, len(args))
        everything, spec = flatten_containers((args, kwargs))
        tensors = tuple([x for x in everything if isinstance(x, Tensor)])
        rest = [None if isinstance(x, Tensor) else (type(x), value_of(x)) for x in everything]
        return cls(tensors, (spec, rest))

    def check(self) -> None:
        """Refuse arguments of which a copy would not do.

        Raises:
            Nameless: if there are other objects than plain tensors and values.
        """
        if not are_plain(self.leaves):
            kinds = ", ".join(sorted({type(x).__name__ for x in self.leaves}))
            raise Nameless(
                f"arguments must be plain tensors, got {kinds}. Call the derivative as it is."
            )
        if isinstance(self.structure, tuple):
            for told in filter(None, self.structure[1]):
                if not issubclass(told[0], float | complex) and not is_value(told[1]):
                    raise Nameless(
                        "arguments must be trees of tensors and plain values, got "
                        f"{told[0].__name__}. Let the function close over it."
                    )

    def put_into(self, args: Any, kwargs: Any) -> Callable[[Leaves], Tree]:
        """Makes arguments of other leaves: a function that returns ``(args, kwargs)``."""
        if isinstance(self.structure, int):
            return lambda leaves: (leaves, {})
        return _divided((args, kwargs))[2]


def _divided(tree: Tree) -> tuple[Leaves, list[Any], Callable[[Leaves], Tree]]:
    """The tensors of a tree, all else in it, and what puts other tensors in their places."""
    everything, spec = flatten_containers(tree)
    tensors = tuple([x for x in everything if isinstance(x, Tensor)])
    # the first tensors themselves would keep their memory
    rest = [_PLACE if isinstance(x, Tensor) else x for x in everything]

    def put(leaves: Leaves) -> Tree:
        new = iter(leaves)
        return unflatten(spec, [next(new) if x is _PLACE else x for x in rest])

    return tensors, [x for x in rest if x is not _PLACE], put


def copied(tensors: Leaves) -> Leaves:
    """Copies that lie in memory as the tensors do, to a trace for which strides matter."""
    copies = []
    for x in tensors:
        copy = x.detach().clone()
        if copy.stride() != x.stride():  # it overlaps, or has gaps
            storage = x.detach().untyped_storage().clone()
            copy = torch.empty_like(x).set_(storage, x.storage_offset(), x.shape, x.stride())
        copies.append(copy)
    return tuple(copies)


class Guard:
    """Tells whether a trace holds for a call."""

    def __init__(self, arguments: CallArguments, kind: Any, tensors: Sequence[Tensor]) -> None:
        self._structure, self._kind = arguments.structure, kind
        # one for each argument, as torch's guard refuses a tensor that it gets twice
        self._like_leaves = [Graphs.guard_of_tensors((x,)) for x in arguments.leaves]
        self._like_tensors = Graphs.guard_of_tensors(tuple(tensors))
        self._is_set = Graphs.guard_of_settings()

    def admits(self, arguments: CallArguments, kind: Any, tensors: Sequence[Tensor]) -> bool:
        """Does it hold for these arguments, and surroundings of this kind with these tensors?"""
        return (
            arguments.structure == self._structure
            and (kind is self._kind or kind == self._kind)
            and self._is_set()
            and all(map(_call, self._like_leaves, arguments.leaves))
            and self._like_tensors(*tensors)
        )


@dataclass(frozen=True)
class ResultTree:
    """The tree of a result, and all of it that is no tensor."""

    put: Callable[[Leaves], Tree]

    @classmethod
    def of(cls, answer: Tree) -> tuple[Leaves, ResultTree]:
        """Take an answer apart.

        Raises:
            Nameless: if it holds objects.
        """
        if type(answer) is Tensor:
            return (answer,), cls(lambda leaves: leaves[0])
        tensors, rest, put = _divided(answer)
        for x in rest:
            if not is_value(x):
                raise Nameless(
                    f"what is compiled must return tensors and plain values, got {type(x).__name__}"
                    ". Compile a function that returns what you ask of it: "
                    "`lambda x, y, v: ggn(model, loss)(x, y) @ v`."
                )
        return tensors, cls(put)


_PLACE = object()
"""Marks where a tensor is."""
