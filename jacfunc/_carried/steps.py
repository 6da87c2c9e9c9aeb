"""What a function does with its only argument: noted in one call, and compared in later ones.

Rules that carry derivatives forward look at no numbers. So where a function calls the same
operations as before, they do what they did: it is enough that it calls them, with jets that have no
numbers, and nothing need be computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, NoReturn, Self, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import Nameless
from jacfunc._factored import METADATA, RAW_MEMORY
from jacfunc._faults import TAKES_DERIVATIVES
from jacfunc._forward_laplacian import Jet
from jacfunc._torch import DRAWING, may_draw, run_as_written
from jacfunc._types import Leaves

Func: TypeAlias = Callable[..., Any]
_VERSION = attrgetter("_version")

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = frozenset({bool, int, float, complex, str, type(None), type(...), torch.Size})
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_REFUSED = RAW_MEMORY | TAKES_DERIVATIVES.keys()
"""What writes into memory unseen; derivatives that a function takes, which rules do not carry."""


class CarriedStep(NamedTuple):
    """An operation on what depends on the argument.

    Args:
        func: a function of torch.
        args, kwargs: what it got.
        new: numbers of those tensors from outside that no step before has got.
        result: jets, or what is the same for all tensors of a shape.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    new: Collection[int]
    result: Any


class StepRecorder(TorchFunctionMode):
    """A function that notes what it does while derivatives are carried through it."""

    def __init__(self, func: Func) -> None:
        super().__init__()
        self.func = func
        self.steps: list[CarriedStep] = []
        self.roots: dict[int, Tensor] = {}
        """All tensors from outside that steps got, by identity."""
        self.ends: list[tuple[Any, Any]] = []
        """The argument and the result of each evaluation."""
        self._reason: str | None = None

    def __call__(self, x: Any) -> Any:
        with self:
            out = self.func(x)
        self.ends += ((x, out),)
        return out

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        leaves = _leaves((args, named))
        if func in _REFUSED or (func in DRAWING and may_draw(func, args, named)):
            self._reason = "it does more than compute"
        elif any(type(x) is Jet for x in leaves):
            self._note(func, args, named, leaves, result)
        return result

    def _note(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], leaves: list[Any], result: Any
    ) -> None:
        """Note an operation on jets."""
        are_jets = not isinstance(result, list) and all(type(x) is Jet for x in _leaves(result))
        if not (are_jets or func in METADATA):
            self._reason = "it reads numbers, or makes constants of them"
        if not _records_as_usual():
            self._reason = "it takes gradients off, or casts"
        others = [x for x in leaves if type(x) is not Jet and type(x) not in _PLAIN]
        if not _TENSORS.issuperset(map(type, others)):
            self._reason = "it gets what is no tensor"
        new = {id(x): x for x in others if id(x) not in self.roots}
        numbers = range(len(self.roots), len(self.roots) + len(new))
        self.roots |= new
        args, kwargs = _mapped(lambda x: x, (args, kwargs))
        self.steps += (CarriedStep(func, args, kwargs, numbers, result),)

    def known(self) -> KnownSteps:
        """What was noted.

        Raises:
            Nameless: if it does not tell all that the function does.
        """
        if len(self.ends) != 1 or not all(type(x) is Jet for x in self.ends[0]):
            self._reason = self._reason or "it is not carried forward at once"
        if self._reason is not None:
            raise Nameless(self._reason)
        return KnownSteps(self.func, self.steps, (*self.roots.values(),), *self.ends[0])


class KnownSteps(TorchFunctionMode):
    """What a function does, to be compared when it is called again, by one thread at a time.

    It gets the jets of the call that was noted, which have no numbers any more: what the function
    is handed, and hands on, can then be told by identity. What happens to tensors from outside
    alone is computed as ever, as the function may keep it.

    Args:
        func: the function.
        steps: all that it does with what depends on its argument.
        roots: tensors from outside that steps get; there may be others in later calls.
        start, end: the argument and the result.
    """

    def __init__(
        self, func: Func, steps: Sequence[CarriedStep], roots: Leaves, start: Jet, end: Jet
    ) -> None:
        super().__init__()
        self.roots, self._func, self._steps = roots, func, steps
        self._start, self._end = start, end
        self._numbers = {id(root): number for number, root in enumerate(roots)}
        jets = [x for x in (start, *_leaves([s.result for s in steps])) if type(x) is Jet]
        for jet in jets:
            jet.forget(self)
        self._attributes = [*map(vars, jets)]
        self._begin()

    def _begin(self) -> None:
        self._left = iter(self._steps)
        self._step = next(self._left, None)
        self._bound: dict[int, Tensor] = {}
        self._versions = [*map(_VERSION, self.roots)]
        self.reason: str | None = None

    def __enter__(self) -> Self:
        torch._C._push_on_torch_function_stack(self)  # what the base class does, in fewer steps
        return self

    def __exit__(self, *error: object) -> None:
        torch._C._pop_torch_function_stack()

    def compared(self) -> Leaves | None:
        """Call the function: tensors from outside, if it did what it does, and wrote into none."""
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self.compared()
        self._begin()
        with self:
            end = run_as_written(self._func, self._start)
        is_done = end is self._end and self._step is None and self.reason is None
        if not is_done or {*map(len, self._attributes)} != {1}:  # what it notes there would stay
            return None
        roots = self.roots
        if self._bound:
            roots = tuple([self._bound.get(number, x) for number, x in enumerate(roots)])
        return roots if [*map(_VERSION, roots)] == self._versions else None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # called for every operation: as short as it can be
        if (step := self._step) is not None:
            known, before, named, new, result = step
            if func == known and _records_as_usual():
                is_same = not (kwargs or named or self._bound) and len(args) == len(before)
                is_same = is_same and all(map(is_, args, before))
                if is_same or self._is((args, kwargs or {}), (before, named), new):
                    self._step = next(self._left, None)
                    return result
        if any(type(x) is Jet for x in _leaves((args, kwargs))):
            self._refuse("it does something else than before")
        if func in _REFUSED or func in DRAWING:
            self._refuse("it does more than compute")
        return func(*args, **(kwargs or {}))

    def _refuse(self, reason: str) -> NoReturn:
        self.reason = reason  # the function may catch what is raised, and go on
        raise Nameless(reason)

    def _is(self, value: Any, known: Any, new: Collection[int]) -> bool:
        """Is it what is known, but for tensors from outside, of which some may be new?"""
        number = self._numbers.get(id(known))
        if number is not None:
            if number in new and number not in self._bound and type(value) in _TENSORS:
                self._bound[number], self._versions[number] = value, value._version
            return value is self._bound.get(number, known)
        if value is known:
            return True
        items, others = _items(known), _items(value)
        if type(value) is not type(known) or items is None or others is None:
            return type(value) is type(known) in _PLAIN and repr(value) == repr(known)
        return len(items) == len(others) and all(
            self._is(x, item, new) for x, item in zip(others, items, strict=True)
        )

    def again(self, x: Tensor) -> Any:
        """What the function does, with another argument, without calling it."""
        made: dict[int, Any] = {id(self._start): x}
        for step in self._steps:
            args, kwargs = _mapped(lambda x: made.get(id(x), x), (step.args, step.kwargs))
            result = step.func(*args, **kwargs)
            made.update(zip(map(id, _leaves(step.result)), _leaves(result), strict=True))
        return made[id(self._end)]


def _records_as_usual() -> bool:
    """Are gradients on, and does nobody cast numbers, or see operators below torch's functions?"""
    is_seen = torch._C._is_any_autocast_enabled() or torch._C._len_torch_dispatch_stack()
    return torch.is_grad_enabled() and not is_seen


def _items(x: Any) -> tuple[Any, ...] | None:
    """What is in a container or slice; None if it is neither."""
    if isinstance(x, dict):
        return (*x, *x.values())
    if type(x) in (tuple, list):
        return tuple(x)
    return (x.start, x.stop, x.step) if type(x) is slice else None


def _leaves(x: Any) -> list[Any]:
    """All values in containers."""
    items = _items(x)
    return [x] if items is None else [leaf for item in items for leaf in _leaves(item)]


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """New containers, with what a function makes of the values in them."""
    if isinstance(x, dict):
        return {name: _mapped(function, value) for name, value in x.items()}
    if type(x) is slice:
        return slice(*[_mapped(function, item) for item in (x.start, x.stop, x.step)])
    if type(x) in (tuple, list):
        return type(x)([_mapped(function, item) for item in x])
    return function(x)
