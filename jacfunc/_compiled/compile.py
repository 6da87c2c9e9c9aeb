"""The door to compiled derivatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from threading import RLock
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from jacfunc._arguments import check_func
from jacfunc._compiled.backends import Backend, Compiler
from jacfunc._compiled.making import Compilation, CompiledCall, Making
from jacfunc._compiled.signature import CallArguments
from jacfunc._compiled.surroundings import Surroundings
from jacfunc._lock import alone
from jacfunc._showing import named
from jacfunc._torch import Graphs, is_undisturbed
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

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.compile(jacfunc.jacrev(torch.sin), backend="replay")
        >>> for size in (2, 3, 2):
        ...     matrix = jac(torch.zeros(size))
        >>> len(jac.compilations)  # one for each shape
        2
    """

    def __init__(self, transformed: Callable[P, ResultT], compiler: Compiler) -> None:
        self.transformed, self._compiler = transformed, compiler
        self._entries: tuple[CompiledCall, ...] = ()
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
            for entry in self._entries:
                if entry.guard.admits(arguments, now.kind, now.tensors):
                    return entry((*arguments.leaves, *now.tensors))  # type: ignore[no-any-return]
        return self._called_anew(arguments, args, kwargs)  # type: ignore[no-any-return]

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What each kind of call has cost, the latest kind first."""
        return tuple([entry.compilation for entry in self._entries if entry.compilation])

    def _called_anew(self, arguments: CallArguments, args: Any, kwargs: Any) -> Any:
        """The result where something has changed: by another trace, if one holds, or a new one."""
        with worded(API, "func must be one that can be compiled", ""), ExitStack() as locks:
            with alone():  # no other thread lends a module meanwhile
                locks.enter_context(self._lock)
                now = self._surroundings_now()
                for entry in self._entries:
                    if entry.guard.admits(arguments, now.kind, now.tensors):
                        return entry((*arguments.leaves, *now.tensors))
                arguments.check()
                self.transformed(*args, **kwargs)  # later calls do not learn or make what it does
                now = self._surroundings_now()
                making = Making(self.transformed, now, arguments, args, kwargs, self._compiler)
                entry = making.entry()
            making.check(entry)  # which compiles, and keeps nobody from lending
            self._entries = (entry, *self._entries[: MOST_KINDS - 1])
            return making.answer

    def _surroundings_now(self) -> Surroundings:
        last = self._surroundings
        if last is None or not last.are_current():
            self._surroundings = last = Surroundings(self.transformed)
        return last


def compile(
    transformed: Callable[P, ResultT],
    *,
    backend: Backend = "inductor",
    directory: str | PathLike[str] | None = None,
) -> Compiled[P, ResultT]:
    """A derivative that is traced once for each kind of call, and then runs without Python.

    For what is asked again and again: the work of a small derivative is a hundredth of the time
    that Python and torch's dispatcher take. It is compared with the derivative itself at the first
    call of a kind.

    Calls are of one kind if trees, shapes, strides, dtypes, devices, ``requires_grad`` and plain
    values of arguments are equal, torch's settings, and all that the function refers to but for
    the numbers in tensors: closures, globals, attributes, modes, hooks. All of it is compared at
    each call; functions and classes that installed packages define are taken as they are. Numbers
    are those of the call, of parameters and buffers, too: a module may be trained between calls,
    without another trace.

    Args:
        transformed: what :func:`jacfunc.jacobian`, :func:`jacfunc.module_jacobian` and the like
            return, or a function of tensors that asks jacfunc for something:
            ``lambda x, y, v: ggn(model, loss)(x, y) @ v``.
        backend: ``"inductor"`` generates code, in seconds; ``"replay"`` calls the operators of the
            trace one after the other, which needs no time; ``"aot"`` keeps Inductor's code in a
            file, where later processes find it; ``"cudagraphs"`` launches all kernels at once.
        directory: where ``"aot"`` keeps its files.

    Returns:
        A :class:`jacfunc.Compiled`: called as ``transformed`` is. Inside transforms, modes of
        torch, other traces and ``torch.compile`` it is ``transformed`` itself. Its ``compilations``
        tell what the kinds of calls have cost. Where the result of ``transformed`` has a graph,
        because arguments or parameters require gradients, it can be differentiated, too, once.

    Raises:
        TypeError, ValueError: arguments that do not fit. ValueError: a function that is not pure
            (draws random numbers, counts, writes into what it gets), that refers to objects which
            may change unseen, reads globals or files by text, or of which shapes depend on numbers.
            NotImplementedError: a function that reads numbers, to branch on them for example, also
            by errors that they raise, or that torch can't trace.

    Cost:
        The first call of a kind takes the derivative twice, two to four traces, and the time of
        the backend, which may be ten seconds. Later ones add to the work about ten microseconds,
        and one for each module or so that the function refers to. Samples of a batch are compared
        with those of others at the first call of a kind alone.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> jac = jacfunc.compile(jacfunc.module_jacobian(model, "inputs"), backend="replay")
        >>> x = torch.ones(3)
        >>> torch.equal(jac(x), model.weight)
        True
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> jac(x)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
        >>> len(jac.compilations)
        1
    """
    check_func(API, transformed)
    compiled = Compiled(transformed, Compiler.of(API, backend, directory))
    return named(API, transformed, compiled)
