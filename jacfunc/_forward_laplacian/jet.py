"""Jets, which carry derivatives; first ones may wait until asked for: a last layer's never are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from jacfunc._torch import below_transforms, innermost

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = Mapping[str, Any]

_VERSION = attrgetter("_version")

DEEPEST = 20
"""Operations whose first derivatives wait for each other."""


class NoRule(NotImplementedError):  # noqa: N818 (no error: a sweep does it instead)
    """No rule carries derivatives through an operation that the function does."""


class Later(NamedTuple):
    """First derivatives that are computed when they are asked for.

    Args:
        compute: computes them, ``[N, *shape]``.
        constants, versions: tensors that it reads, and how often they were written into.
        depth: how many operations wait, with this one.
    """

    compute: Callable[[], Tensor]
    constants: Collection[Tensor]
    versions: list[int]
    depth: int


First: TypeAlias = Tensor | Later


class Carried:
    """A value and its derivatives along N directions: of one sample, or of all in a vmap.

    Args:
        owner: the evaluation whose directions these are.
        value: ``[*shape]``; of all samples ``[B, *shape]``, or ``[1, *shape]`` if they share it.
        first: ``[N, *shape]``; of all samples ``[N, B, *shape]``. Or what computes it: by then the
            tensors that the value was made of may be gone.
        second: the sum of second derivatives, like the value, or each of them, like ``first``;
            None for zeros.
    """

    def __init__(self, owner: Run, value: Tensor, first: First, second: Tensor | None) -> None:
        self.owner, self.value, self._first, self.second = owner, value, first, second

    @property
    def first(self) -> Tensor:
        """First derivatives.

        Raises:
            NoRule: if they waited, and a constant has changed since.
        """
        first = self._first
        if isinstance(first, Tensor):
            return first
        if [*map(_VERSION, first.constants)] != first.versions:
            self.owner.give_up("it writes into what an operation has read")
        self._first = first = first.compute()
        return first

    def later(self, compute: Callable[[], Tensor], constants: Collection[Tensor] = ()) -> First:
        """What ``compute`` makes of this one's, later if the constants tell of writes."""
        depth = 1 if isinstance(self._first, Tensor) else self._first.depth + 1
        if depth > DEEPEST:
            return compute()
        for x in constants:
            if x.is_inference() or below_transforms(x) is not x:
                return compute()
        return Later(compute, constants, [*map(_VERSION, constants)], depth)


class Run:
    """One evaluation of a function at jets.

    Args:
        is_summed: are second derivatives summed over the directions, as in a Laplacian?
    """

    reason: str | None = None
    """Why no derivatives come of it, if that is so."""

    def __init__(self, is_summed: bool) -> None:
        self.is_summed, level = is_summed, innermost()
        self.vmap: Any = level if level is not None and level.kind.name == "Vmap" else None
        """The vmap around, below which most rules run: there operations take less time."""

    def give_up(self, reason: str) -> NoReturn:
        """End it: whatever the function does now, its result is not used.

        Raises:
            NoRule: always.
        """
        self.reason = self.reason or reason
        raise NoRule(self.reason)

    def moved(self, x: Carried, first: First, move: Callable[[Tensor, int], Tensor]) -> Carried:
        """What is carried for one sample as it is for all, or the other way; ``first`` is moved."""
        second = None if x.second is None else move(x.second, int(not self.is_summed))
        return Carried(self, move(x.value, 0), first, second)


class Jet(Tensor):
    """A tensor with its first and second derivatives along N directions.

    It has a shape and no memory: whatever reaches it on a way that its propagation does not see, a
    transform, compiled code or a kernel, ends in :meth:`__torch_dispatch__`, and is refused there.

    Args:
        carried: the value and the derivatives.
        is_of_all: are these of all samples in the vmap around?
    """

    owner: Run
    kind: tuple[int, torch.dtype]
    """How many dimensions it has, and its dtype."""
    _one: Any
    _every: Any

    @staticmethod
    def __new__(cls, shape: torch.Size, carried: Carried, is_of_all: bool) -> Jet:
        value = carried.value
        jet: Jet = Tensor._make_wrapper_subclass(cls, shape, dtype=value.dtype, device=value.device)
        jet.owner, jet.kind = carried.owner, (len(shape), value.dtype)
        jet._one, jet._every = (None, carried) if is_of_all else (carried, None)
        return jet

    @property
    def of_one(self) -> Carried:
        """What it carries for one sample."""
        if self._one is None:
            every, move = self._every, self.owner.vmap.of_one
            first = every.later(lambda: move(every.first, 1))
            self._one = self.owner.moved(every, first, move)
        one: Carried = self._one
        return one

    @property
    def of_all(self) -> Carried:
        """What it carries for all samples in the vmap around."""
        if self._every is None:
            one, move = self._one, self.owner.vmap.of_all
            self._every = self.owner.moved(one, move(one.first, 1), move)
        every: Carried = self._every
        return every

    def forget(self, owner: Any) -> None:
        """Let go of all that it has; from now on ``owner`` is told where somebody asks for it."""
        vars(self).clear()
        self.owner = owner

    def __hash__(self) -> int:
        if "_one" not in vars(self):
            _give_up((self,), "it is remembered by identity, where it stands for others")
        return id(self)

    value: Any = property(lambda self: self.of_one.value)
    first: Any = property(lambda self: self.of_one.first)
    second: Any = property(lambda self: self.of_one.second)

    def later(self, compute: Callable[[], Tensor], constants: Collection[Tensor] = ()) -> First:
        """First derivatives of a function of this one, see :meth:`Carried.later`."""
        return self.of_one.later(compute, constants)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> NoReturn:
        _give_up(args, f"{name_of(func)} is called where no propagation sees it")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> NoReturn:
        _give_up(args, f"{func} is reached past the functions of torch")


def leaves_in(values: Any) -> list[Any]:
    """All values in nested tuples and lists."""
    leaves: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            leaves += leaves_in(value)
        else:
            leaves.append(value)
    return leaves


def _give_up(args: Args, reason: str) -> NoReturn:
    """End the propagations whose jets are among the arguments, though the function may go on."""
    for leaf in leaves_in(args):
        if type(leaf) is Jet:
            leaf.owner.reason = leaf.owner.reason or reason
    raise NoRule(reason)


def name_of(func: Any) -> str:
    """What a function of torch is called in the log."""
    name: str = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"the attribute {owner}" if name in ("__get__", "__set__") else name or str(func)
