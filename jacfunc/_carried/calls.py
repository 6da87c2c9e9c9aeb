"""Derivatives that are carried forward by rules, written down: rules read no numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jacfunc._assembly import owned
from jacfunc._calls import reaches_module
from jacfunc._carried.steps import StepRecorder
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._remembered import MOST_KINDS, Recent
from jacfunc._torch import RandomState, holds_nan, is_undisturbed, sweep_batch
from jacfunc._traces import FEWEST_CALLS, MOST_BYTES, MOST_MISSES, WrittenWork
from jacfunc._trees import Structure, flatten, unflatten
from jacfunc._types import Leaves, Tree

Func: TypeAlias = Callable[..., Any]
Written: TypeAlias = Callable[[Tensor], Tree | None]
"""From a tensor to the result of a call; None if it must be made, as something else is done."""


class SettledCarrying:
    """What calls of a derivative with one tensor have settled, by its kind.

    After sixteen calls of a kind all operators are written down. Later calls of that kind call the
    function with jets that have no numbers, to see that it does what it did, and run operators
    alone. What differs is taken anew by the way of a first call.

    Args:
        func: the function.
        derive: makes the derivative of a function.
        is_batch: is that mapped over the samples in a batch?
    """

    def __init__(self, func: Func, derive: Callable[[Func], Func], is_batch: bool = False) -> None:
        self._func, self._derive, self._is_batch = func, derive, is_batch
        self._kinds = Recent[_Kind](MOST_KINDS)

    def around(self, usual: Func) -> Func:
        """The usual way of a call, which settled ones do not take."""

        @wraps(usual)
        def settled(*args: Tree, **kwargs: Any) -> Any:
            kind = self._kind_of(args, kwargs)
            result = None if kind is None else kind.result(args[0])
            if result is not None:
                return result
            result = usual(*args, **kwargs)
            if kind is not None and kind.is_to_be_written:
                kind.written = self._written(args[0], result)
            return result

        return settled

    def _kind_of(self, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> _Kind | None:
        """What is known of such calls; None of those that are never written down."""
        if torch.compiler.is_compiling() or kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return None
        x = args[0]
        if not is_undisturbed() or torch.is_inference_mode_enabled():  # x is not looked at then
            return None
        if x.requires_grad or x.is_inference() or x.layout is not torch.strided:
            return None
        key = x.shape, x.dtype, x.device, torch.is_grad_enabled()
        kind = self._kinds.get(key)
        if kind is None:
            self._kinds.put(key, kind := _Kind())
        return kind

    def _written(self, x: Tensor, result: Tree) -> Written | None:
        """All operators of a call with this result; None if they can't be written down."""
        random_state = RandomState((x,))
        try:
            return self._written_at(x, *flatten(result))
        except Exception as error:  # it goes on as before
            note("derivatives are not written down: %s", error)
            return None
        finally:
            random_state.repeat()

    def _written_at(self, x: Tensor, expected: Any, structure: Structure) -> Written | None:
        if {*map(type, expected)} != {Tensor} or any(out.requires_grad for out in expected):
            return None
        recorder = StepRecorder(self._func)
        self._results(recorder, x)
        steps = recorder.known()
        sources = x, *steps.roots
        if sum(source.nbytes for source in (*sources, *expected)) > MOST_BYTES:
            return None
        work = WrittenWork(lambda: self._results(steps.again, x), sources)
        if not work.gives(sources, tuple(expected)):
            return None
        may_share = reaches_module(self._func)  # into which another thread may put parameters

        def written(x: Tensor) -> Tree | None:
            with alone() if may_share else nullcontext():
                roots = steps.compared()
            results = None if roots is None else work.result((x, *roots))
            if results is None or any(map(holds_nan, results)):
                return None
            return unflatten(structure, owned(results))

        return written

    def _results(self, func: Func, x: Tensor) -> Leaves:
        """All tensors in the result of a call of another function's derivative."""
        derived = self._derive(func)

        def of_one(leaves: Leaves) -> tuple[Leaves, Leaves]:
            return tuple(flatten(derived(*leaves))[0]), ()

        return sweep_batch(of_one, (x,), "error")[0] if self._is_batch else of_one((x,))[0]


class _Kind:
    """What is known of calls of a kind: how many were made, and what is written down."""

    def __init__(self) -> None:
        self._calls = self._misses = 0
        self.written: Written | None = None
        self._free = Lock()
        """Held while a thread compares steps; other threads make their calls meanwhile."""

    @property
    def is_to_be_written(self) -> bool:
        """Is this the call after which it is tried? It counts calls."""
        self._calls += 1
        return self._calls == FEWEST_CALLS

    def result(self, x: Tensor) -> Tree | None:
        """The result of a settled call; None if it must be made."""
        if self.written is None or not self._free.acquire(blocking=False):
            return None
        try:
            result = self.written(x)
        except Exception:  # the call that is made tells what it is about
            result = None
        finally:
            self._free.release()
        self._misses += result is None  # each evaluates the function again: it may have drawn a way
        if self._misses >= MOST_MISSES:
            self.written = None
        return result


def with_settled_calls(func: Func, derive: Callable[[Func], Func]) -> Func:
    """The derivative of a function, whose calls with a tensor, alone or in vmap, are settled."""
    if torch.compiler.is_compiling():  # nothing is settled there
        return derive(func)
    derived = SettledCarrying(func, derive).around(derive(func))
    vars(derived)[_OF_BATCHES] = derived, SettledCarrying(func, derive, is_batch=True)
    return derived


def in_batches(derived: Func, mapped: Func, options: tuple[Any, ...]) -> Func:
    """A derivative under ``vmap`` with these options; usual calls with a batch are settled."""
    is_usual = [*map(type, options)] == [*map(type, _USUAL)] and options == _USUAL
    known: Any = getattr(derived, _OF_BATCHES, None)
    if known is None or known[0] is not derived or not is_usual:
        return mapped  # what wraps a derivative may have its attributes, but does something else
    settled: Func = known[1].around(mapped)
    return settled


_OF_BATCHES = "_settled_in_batches"
"""An attribute of a derivative: itself, and what its calls with batches have settled."""

_USUAL = 0, 0, "error", None
"""The options of a vmap: dimensions of inputs and outputs, randomness, samples at once."""
