"""The tensors of a function that are parameters, or views of parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from jacfunc._errors import Refused, UnseenWrite
from jacfunc._factored.use import Path, UsedPart, View
from jacfunc._torch import below_transforms, untracked
from jacfunc.layers import FormOf, Rule

UNSEEN_WRITE = (
    "a parameter must be written into by operations that Python sees, or from the first call on, "
    "got a write by others, which has changed it. Write into a copy of it."
)


@dataclass(eq=False)
class TrackedParameter:
    """A tensor that a function has, which is a parameter or a view of one."""

    number: int
    handle: Tensor
    """The tensor, known by its identity."""
    twin: Tensor
    """Operations with a rule get it in place of the handle."""
    path: Path
    """The views that lead from the parameter to the handle."""
    memory: Tensor
    """The handle without the wrappers of transforms, which knows of writes."""
    version: int
    """That of the memory when it was tracked: if it is another one, something has written there."""


@dataclass(eq=False)
class RuledCall:
    """A call of an operation with a rule: its arguments, and the parameters that the rule covers.

    Both are by the names that the rule has for them.
    """

    number: int
    rule: Rule
    func: Callable[..., Any]
    named: dict[str, Any]
    params: dict[str, TrackedParameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = list(self.named.values())

    def parts(self, forms: Mapping[str, FormOf]) -> list[UsedPart]:
        """The parts of parameters that it uses."""
        return [(param.number, param.path, forms[name]) for name, param in self.params.items()]


@dataclass(eq=False)
class UnruledUse:
    """Parameters, by number, that operations without a rule have got as arguments."""

    numbers: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    """Parameters that were written into, or may have been."""


@dataclass
class TrackedParameters:
    """Parameters, and views of them, by the identities of the tensors that a function has.

    Args:
        lent: numbers of the parameters that are no copies, which must not be written into.
        unruled: is told which parameters operations without a rule get.
    """

    lent: Set[int]
    unruled: UnruledUse
    by_id: dict[int, TrackedParameter] = field(default_factory=dict)

    def track(self, number: int, handle: Tensor, twin: Tensor, path: Path = ()) -> None:
        """Track a tensor that is parameter ``number``, or the view of it that the path makes."""
        memory = below_transforms(handle)
        tracked = TrackedParameter(number, handle, twin, path, memory, memory._version)
        self.by_id[id(handle)] = tracked

    def track_views(
        self, whole: TrackedParameter, view: View, result: Any, are_parts: Sequence[bool]
    ) -> None:
        """Track the views that a call has made of a tensor, those that are parts of it."""
        # tuples: the function may change its lists later
        args = tuple(tuple(a) if isinstance(a, list) else a for a in view.args)
        kwargs = {k: tuple(a) if isinstance(a, list) else a for k, a in view.kwargs.items()}
        twins = view.func(whole.twin, *args, **kwargs)
        is_single = not isinstance(result, tuple | list)
        views, of_twin = ([result], [twins]) if is_single else (result, twins)
        with untracked():
            for item, handle in enumerate(views):
                if are_parts[item]:
                    step = View(view.func, args, kwargs, None if is_single else item)
                    self.track(whole.number, handle, of_twin[item], (*whole.path, step))

    def are_among(self, values: Iterable[Any], without: Collection[int] = ()) -> bool:
        """Is a tracked tensor among the arguments, or in lists of them?

        Those with identities in ``without`` do not count.
        """
        by_id = self.by_id
        for value in values:
            if id(value) in by_id and id(value) not in without:
                return True
            is_list = type(value) is not Tensor and isinstance(value, tuple | list)
            if is_list and self.are_among(value, without):
                return True
        return False

    def note_unruled(self, values: Iterable[Any], may_write_unseen: bool = False) -> None:
        """Note the parameters among the arguments of an operation without a rule.

        Nothing tells whether the operation writes into them.
        """
        for value in values:
            if tracked := self.by_id.get(id(value)):
                is_lent = tracked.number in self.lent
                if is_lent and _is_written(tracked):
                    raise UnseenWrite(UNSEEN_WRITE)
                self.unruled.numbers.add(tracked.number)
                if is_lent:
                    raise Refused("a parameter that is no copy may be written into")
                if may_write_unseen:
                    self.unruled.written.add(tracked.number)
            elif type(value) is not Tensor and isinstance(value, tuple | list):
                self.note_unruled(value, may_write_unseen)

    def find(self, value: Any) -> TrackedParameter | None:
        """The tracked parameter that a value is, if nothing has written into it."""
        tracked = self.by_id.get(id(value))
        if tracked is None or _is_written(tracked) or tracked.number in self.unruled.written:
            return None
        return tracked

    def written(self) -> set[int]:
        """Numbers of the parameters that were written into.

        Raises:
            UnseenWrite: if one of them is no copy.
        """
        written = {tracked.number for tracked in self.by_id.values() if _is_written(tracked)}
        if written & self.lent:
            raise UnseenWrite(UNSEEN_WRITE)
        return written


def _is_written(tracked: TrackedParameter) -> bool:
    """Has something written into the tensor since it is tracked?"""
    return tracked.memory._version != tracked.version


class Versions:
    """Tensors, and the versions that they had when they were kept."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, int]] = []

    def keep(self, values: Iterable[Any]) -> None:
        """Keep the tensors among values, as they are now."""
        for value in values:
            if isinstance(value, Tensor):
                tensor = below_transforms(value)
                if not tensor.is_inference():
                    self._pairs.append((tensor, tensor._version))

    def have_changed(self) -> bool:
        """Was one of them written into since?"""
        return any(tensor._version != version for tensor, version in self._pairs)


def tensors_among(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from tensors_among(value)


def without_lists(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments, with the items of lists in the place of these."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
