"""When to look whether samples depend on each other: whenever the answer may have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from operator import is_
from typing import Any, Literal, TypeAlias
from weakref import ref

from torch import nn
from torch.nn.modules import module as torch_module

from jacfunc._errors import Refused
from jacfunc._lending import SIMPLE, ModulePart, ModuleState
from jacfunc._remembered import MOST_KINDS, Recent, Remembered
from jacfunc._samples import Coupling, GradientOf, Subject, coupling, loss_coupling
from jacfunc._types import Leaves

Independent: TypeAlias = Literal[True, "always"] | None
"""Whether samples depend on each other: looked at now and then, known not to, always looked at."""

MANY, LARGE = 128, 2**24
"""Outputs of a sample, and entries of all samples' Jacobians, from which on a check is a few
hundredths of their cost."""

FEW_CALLS = 8
"""Samples that are evaluated at once where memory is to be spared."""

_TORCHS = frozenset(vars(nn.Module())) - {"training"}
"""What parts hold beside attributes of their own."""


@dataclass
class KnownCalls:
    """Calls of one kind."""

    calls: int = 0
    is_large: bool = False

    @property
    def is_due(self) -> bool:
        """Is the last of them to be looked at?"""
        return self.calls & (self.calls - 1) == 0


@dataclass(frozen=True)
class Independence:
    """What a user says about samples, and what may be evaluated to see it."""

    said: Independent = None
    at_once: int | None = None
    """Samples evaluated together, drawn at random; None for all."""
    by_rows: bool = True
    """Is every output of a sample swept?"""

    @classmethod
    def of(
        cls, api: str, said: Any, at_once: int | None = None, by_rows: bool = True
    ) -> Independence:
        """Raises ValueError for anything else than None, True and "always"."""
        if said is not None and said is not True and said != "always":
            raise ValueError(
                f"{api}: independent must be None, True or 'always', got {said!r}. "
                "Pass True if you know that samples do not depend on each other."
            )
        return cls(said, None if at_once is None else max(FEW_CALLS, at_once), by_rows)

    def check(
        self, api: str, state: ModuleState, kind: Hashable, subject_of: Callable[[], Subject]
    ) -> None:
        """Refuse samples that change with others.

        Raises:
            ValueError: if they do.
            Refused: if the module returns other numbers each time.
        """

        def look(number: int) -> Coupling:
            try:
                return coupling(subject_of(), number, number == 1, self.at_once)
            except Refused as refusal:
                raise Refused(
                    f"{api}: per_sample needs samples that can be compared with those of another "
                    f"batch, got a module that can't be: {refusal}. Draw from torch's default "
                    "generators, or pass independent=True to take each sample alone."
                ) from refusal

        kind = kind, *torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks
        if what := self._changing(lambda: _kinds_of_state(state), kind, look):
            raise ValueError(
                f"{api}: per_sample needs samples that do not depend on each other, got a module "
                f"with {what}. Use module_jacobian without per_sample, which differentiates the "
                "batch as a whole, or pass independent=True to take each sample alone all the same."
            )

    def check_loss(self, api: str, loss: Any, outputs: Leaves, gradient_of: GradientOf) -> None:
        """Refuse a loss whose gradient in the outputs of a sample changes with those of others.

        Raises:
            ValueError: if it does.
        """
        kind = tuple((out.shape, out.dtype) for out in outputs)

        def look(number: int) -> Coupling:
            return loss_coupling(gradient_of, outputs, number)

        if self._changing(lambda: _kinds_of_loss(loss), kind, look):
            raise ValueError(
                f"{api}: the loss must be a sum or mean over samples, got one whose gradient in "
                "the outputs of a sample changes with those of others. Use a loss that adds up "
                "what it finds of each sample, or pass independent=True to take it as it is."
            )

    def _changing(
        self,
        kinds_of: Callable[[], Recent[KnownCalls]],
        kind: Hashable,
        look: Callable[[int], Coupling],
    ) -> str | None:
        """What changes with the other samples, where it is time to look.

        That is at the first call of a kind of what is as it was; at the second, fourth, eighth, …,
        as values that nobody sees may have changed; at every call where it costs little.
        """
        if self.said is True:
            return None
        kinds = kinds_of()
        seen = kinds.pop(kind, None) or KnownCalls()
        seen.calls += 1
        if seen.is_due or self.said == "always" or (self.by_rows and seen.is_large):
            found = look(seen.calls)
            if found.what:
                return found.what
            seen.is_large = found.rows >= MANY and found.entries >= LARGE
        kinds.put(kind, seen)
        return None


def now_and_then(state: ModuleState, kind: Hashable, look: Callable[[], None]) -> None:
    """Look at a module as it is, at the first, second, fourth, eighth, … call of a kind.

    After a look that raises, the next call is a first one.
    """
    kinds = _kinds_of_state(state)
    seen = kinds.pop(kind, None) or KnownCalls()
    seen.calls += 1
    if seen.is_due:
        look()
    kinds.put(kind, seen)


@dataclass
class _MarkedCalls:
    """Calls of a module, or a loss, while its marks stay the same."""

    marks: list[Any]
    kinds: Recent[KnownCalls] = field(default_factory=lambda: Recent(MOST_KINDS))


@cache
def _calls_of() -> Remembered[_MarkedCalls]:
    """By module or loss."""
    return Remembered()


@cache
def _calls_of_state() -> Remembered[Recent[KnownCalls]]:
    """By state, so that marks are compared once for each."""
    return Remembered()


def _kinds_of(called: Any, marks: list[Any]) -> Recent[KnownCalls]:
    """Known calls by kind: none of a module or loss that has changed."""
    known = _calls_of().get(called, None)
    if known is None or not _are_same(known.marks, marks):
        known = _MarkedCalls(marks)
        _calls_of().put(called, None, known)
    return known.kinds


def _kinds_of_state(state: ModuleState) -> Recent[KnownCalls]:
    """Known calls of a module at its chosen parameters, by kind."""
    state = state.origin or state

    def find() -> Recent[KnownCalls]:
        marks = [mark for part in state.parts.values() for mark in _of(part)]
        marks += [_mark(param) for param in state.point.values()]
        return _kinds_of(state.module, marks)

    return _calls_of_state().get_or_make(state, None, find)


def _kinds_of_loss(loss: Any) -> Recent[KnownCalls]:
    parts = map(ModulePart.of, loss.modules()) if isinstance(loss, nn.Module) else ()
    return _kinds_of(loss, [mark for part in parts for mark in _of(part)])


def _are_same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _of(part: ModulePart) -> list[Any]:
    """What a part is made of, kept weakly: whoever remembers it must not keep it alive."""
    own = {key: x for key, x in part.attributes.items() if key not in _TORCHS}
    filled = [some for _, some in part.filled if isinstance(some, dict)]
    marks: list[Any] = [ref(part.module), getattr(type(part.module), "forward", None), len(own)]
    for some in (own, part.params, part.buffers, *filled):
        for key, value in some.items():
            marks += (key, _mark(value))
    return marks


def _mark(value: Any) -> Any:
    """The same object for the same object, and for no other."""
    if type(value) in SIMPLE:
        return value
    try:
        return ref(value)
    except TypeError:
        return value
