"""A compiled function: the traces of each kind of call, and the same at a point."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from threading import RLock
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from jacfunc._compiled.making import CompiledCall, Making, first_that_holds
from jacfunc._compiled.signature import CallArguments, copied
from jacfunc._forecasting import Compilation
from jacfunc._lock import alone
from jacfunc._surroundings import Surroundings
from jacfunc._torch import Graphs, is_outermost, is_undisturbed, outside_transforms
from jacfunc._traces import Compiler, Divided, Kept
from jacfunc.strategies import worded

API = "compile"
MOST_KINDS = 16
"""Kinds of calls that are kept of one compiled derivative, the latest."""

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class Compiled(Generic[P, ResultT]):
    """What :func:`jacfunc.compile` returns; it is called as what it was made of.

    Any number of threads may call it.

    Args:
        transformed: what is compiled.
        compiler: how.
        num_fixed: so many arguments are fixed at a point, the first ones; None if there is none.

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.compile(jacfunc.jacrev(torch.sin), backend="replay")
        >>> for size in (2, 3, 2):
        ...     matrix = jac(torch.zeros(size))
        >>> len(jac.compilations)  # one for each shape
        2
    """

    def __init__(
        self, transformed: Callable[P, ResultT], compiler: Compiler, num_fixed: int | None = None
    ) -> None:
        self.transformed, self._how = transformed, (compiler, num_fixed)
        self._entries: tuple[CompiledCall, ...] = ()
        self._divided = dict[int, Compiled[P, ResultT]]()
        self._surroundings: Surroundings | None = None
        self._lock = RLock()
        self.__qualname__ = type(self).__qualname__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """The result; of the derivative itself inside transforms, modes and traces."""
        if torch.compiler.is_compiling():
            return self.transformed(*args, **kwargs)
        if Graphs.tracer() is not None:
            with Graphs.untraced():
                return self(*args, **kwargs)
        if not is_undisturbed():
            return self.transformed(*args, **kwargs)
        arguments = CallArguments.of(args, kwargs)
        now = self._surroundings
        if now is not None and now.are_current():
            entry = first_that_holds(self._entries, arguments, now.kind, now.tensors)
            if entry is not None:
                return entry((*arguments.leaves, *now.tensors))  # type: ignore[no-any-return]
        return self._called_anew(arguments, args, kwargs)  # type: ignore[no-any-return]

    def at(self, *args: Any) -> Callable[..., ResultT]:
        """What is left once the first arguments are fixed: of ``ggn(x, y) @ v``, the products.

        What depends on no other argument is computed once, at the first call: the evaluation, say.

        Args:
            args: the first arguments, by position.

        Returns:
            A function of the other arguments, by position. Its answers are those of this moment,
            of which it keeps the numbers: copies of arguments, and of all tensors that the function
            refers to. They are detached.

        Raises:
            TypeError, ValueError, NotImplementedError: as a call. It also refuses to be called
                inside transforms, with arguments that require gradients, and for another kind of
                call once anything but numbers has changed.

        Cost:
            The copies. The first call of a kind compiles what is fixed and what is left, for all
            points. What lies between is kept, for a product the inputs of layers. Products with a
            Gauss-Newton matrix are taken from factors where that is less work, and the samples are
            seen to be independent: half the arithmetic, and as many cotangents are kept as a
            sample has outputs. At each point one is compared with a product through the layers.

        Example:
            >>> import torch, jacfunc
            >>> push = lambda x, v: jacfunc.jvp(torch.sin, (x,), (v,))[1]
            >>> at_zero = jacfunc.compile(push, backend="replay").at(torch.zeros(2))
            >>> at_zero(torch.tensor([1.0, 2.0]))
            tensor([1., 2.])
        """
        own = Compiled(self.transformed, self._how[0], len(args))
        return _AtPoint(self._divided.setdefault(len(args), own), args)

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What each kind of call has cost, the latest kind first; then those at points."""
        own = [entry.compilation for entry in self._entries if entry.compilation]
        return (*own, *[each for of in self._divided.values() for each in of.compilations])

    def _called_anew(self, arguments: CallArguments, args: Any, kwargs: Any) -> Any:
        """The result where something has changed: by another trace, if one holds, or a new one."""
        with worded(API, "func must be one that can be compiled", ""), ExitStack() as locks:
            with alone():  # no other thread lends a module meanwhile
                locks.enter_context(self._lock)
                now = self._surroundings_now()
                entry = first_that_holds(self._entries, arguments, now.kind, now.tensors)
                if entry is not None:
                    return entry((*arguments.leaves, *now.tensors))
                arguments.check()
                Graphs.load_tracer()
                # an untraced call comes first: what it learns or makes is no part of the trace
                self.transformed(*args, **kwargs)
                now = self._surroundings_now()
                making = Making(self.transformed, now, arguments, args, kwargs, *self._how)
                entry = making.entry()
            making.check(entry)  # compiling takes long: other threads may lend modules meanwhile
            self._entries = (entry, *self._entries[: MOST_KINDS - 1])
            return making.answer

    def _surroundings_now(self) -> Surroundings:
        last = self._surroundings
        if last is None or not last.are_current():
            self._surroundings = last = Surroundings(self.transformed)
        return last


class _AtPoint(Generic[ResultT]):
    """A compiled function at its first arguments, and at what it referred to when it was made."""

    def __init__(self, compiled: Compiled[..., ResultT], args: tuple[Any, ...]) -> None:
        arguments = CallArguments.of(args, {})
        self._compiled, self._fixed = compiled, arguments.leaves
        # in containers of its own, which nobody changes
        self._args, _ = arguments.put_into(args, {})(arguments.leaves)
        with worded(API, "func must be one that can be compiled", ""), alone():
            now = compiled._surroundings_now()
        self._kind, self._others = now.kind, tuple(now.tensors)
        self._copies = copied(self._fixed), copied(self._others)
        self._kept: dict[CompiledCall, Kept] = {}

    def __call__(self, *args: Any) -> ResultT:
        """The result, of the other arguments; for modes, such as counters, operator by operator."""
        arguments = CallArguments.of((*self._args, *args), {})
        free, is_seen = arguments.leaves[len(self._fixed) :], not is_undisturbed()
        with outside_transforms() if is_seen else nullcontext():  # guards would see modes
            known = first_that_holds(self._kept, arguments, self._kind, self._others)
        is_new = known is None
        if not is_outermost() or any(x.requires_grad for x in free) or (is_seen and is_new):
            raise NotImplementedError(
                f"{API}: a function at a point must be called outside of transforms, at first also "
                "of modes, with arguments without gradients, got another call. Call the compiled "
                "function itself."
            )
        if known is None:
            known, (fixed, others) = self._entry(arguments, args), self._copies
            assert isinstance(known.run, Divided)
            kept = known.run.at((*fixed, *free, *others))
            latest = [*self._kept.items()][-MOST_KINDS:]
            self._kept = dict([*latest, (known, kept)])  # other threads may read the former one
        return known.at_point(arguments.leaves, self._kept[known], is_seen)  # type: ignore[no-any-return]

    def _entry(self, arguments: CallArguments, args: tuple[Any, ...]) -> CompiledCall:
        for _ in range(2):
            entries = self._compiled._entries
            entry = first_that_holds(entries, arguments, self._kind, self._others)
            if entry is not None:
                return entry
            self._compiled(*self._args, *args)  # this call makes the entry
        raise ValueError(
            f"{API}: func must refer to the objects that it referred to when at() was called, got "
            "others, and a kind of call that was not compiled before. Call at() again."
        )
