"""The door to compiled derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, overload

from jacfunc._arguments import check_func
from jacfunc._compiled.compiled import API, Compiled, P, ResultT
from jacfunc._errors import check_uncompiled
from jacfunc._planning import Plan
from jacfunc._showing import named
from jacfunc._traces import Backend, Compiler


@dataclass(frozen=True)
class CompilesDerivatives:
    """What a compiled plan does with a derivative."""

    compiler: Compiler

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self.compiler.backend

    def __call__(self, derivative: Callable[P, ResultT]) -> Compiled[P, ResultT]:
        """The derivative, compiled."""
        return named(API, derivative, Compiled(derivative, self.compiler))


@overload
def compile(
    transformed: Plan, *, backend: Backend = ..., directory: str | PathLike[str] | None = ...
) -> Plan: ...
@overload
def compile(
    transformed: Callable[P, ResultT],
    *,
    backend: Backend = ...,
    directory: str | PathLike[str] | None = ...,
) -> Compiled[P, ResultT]: ...
def compile(
    transformed: Any,
    *,
    backend: Backend = "inductor",
    directory: str | PathLike[str] | None = None,
) -> Any:
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
            ``lambda x, y, v: ggn(model, loss)(x, y) @ v``. Or a :class:`jacfunc.Plan`.
        backend: ``"inductor"`` generates code, in seconds; ``"replay"`` calls the operators of the
            trace one after the other, which needs no time; ``"aot"`` keeps Inductor's code in a
            file, where later processes find it; ``"cudagraphs"`` launches all kernels at once.
        directory: where ``"aot"`` keeps its files.

    Returns:
        A :class:`jacfunc.Compiled`: called as ``transformed`` is. Inside transforms, modes of
        torch, other traces and ``torch.compile`` it is ``transformed`` itself. Its ``compilations``
        tell what the kinds of calls have cost, in seconds and bytes. Where the result of
        ``transformed`` has a graph, because arguments or parameters require gradients, it can be
        differentiated, too, once. A plan is returned as a compiled one: a door that takes it as
        ``strategy`` returns a :class:`jacfunc.Compiled`.

    Raises:
        TypeError, ValueError: arguments that do not fit. ValueError: a function that is not pure
            (draws random numbers, counts, writes into what it gets), that refers to objects which
            may change unseen, reads globals by text, files, clocks, or which thread it is in, of
            which shapes depend on numbers, or whose result has a graph to tensors with hooks.
            NotImplementedError: a function that reads numbers, to branch on them for example, also
            by errors that they raise, or where tensors lie, or that torch can't trace.

    Cost:
        The first call of a kind takes the derivative two to five times, two to four traces, and the
        time of the backend, which may be ten seconds: :func:`jacfunc.estimate` tells before. Later
        ones add to the work about ten microseconds, and one for each module or so that the function
        refers to. Samples of a batch are compared with those of others at the first call of a kind
        alone.

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
        >>> plan = jacfunc.compile(jacfunc.plan(torch.sin, torch.zeros(2)), backend="replay")
        >>> jacfunc.jacobian(torch.sin, strategy=plan)(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_uncompiled(API, "Call it before, and what it returns inside.")
    compiles = CompilesDerivatives(Compiler.of(API, backend, directory))
    if isinstance(transformed, Plan):
        return replace(transformed, compiler=compiles)
    check_func(API, transformed)
    return compiles(transformed)
