"""Runs functions that torch.compile has compiled as they were written, where jacfunc calls them.

Torch keeps compiled code from call to call, and does not look at which transforms are active: code
compiled for tangents is run again for a plain graph, and returns wrong numbers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Self, TypeVar

import torch

ResultT = TypeVar("ResultT")


class _Depth(threading.local):
    """How many of jacfunc's evaluations this thread is inside of."""

    inside = 0
    recorded = 0
    """How many of these are recorded: inside them even torch.cond and its like are not compiled."""


class _Stance:
    """A stance of torch's compiler: eager in threads inside an evaluation, else the former stance.

    ``torch.compiler.set_stance`` is made for one thread: it turns the compiler off in all threads,
    and if two threads leave it in another order than they entered, it stays off.
    """

    def __init__(self, before: Any, depth: _Depth) -> None:
        self._before, self._depth = before, depth

    @property
    def stance(self) -> Any:
        """Read by torch whenever a compiled function is called."""
        depth = self._depth
        if depth.recorded or (depth.inside and not _is_control_flow(sys._getframe(2))):
            return "force_eager"
        return self._before.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)


def _is_control_flow(caller: Any) -> bool:
    """Does torch.cond, or its like, run its function? It needs the graph of the compiled one."""
    frame = caller.f_back
    return frame is not None and frame.f_globals.get("__name__") == _CONTROL_FLOW


_CONTROL_FLOW = "torch._higher_order_ops.utils"


class _AsWritten:
    """A context in which compiled functions run as they were written, in this thread."""

    def __init__(self) -> None:
        self._compiler: Any = sys.modules["torch._dynamo.eval_frame"]
        self._depth = _Depth()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context in which torch.cond and its like raise.

        If recorded, they would make their compiler fail in all later calls.
        """
        self._depth.recorded += 1
        try:
            yield
        finally:
            self._depth.recorded -= 1

    def __enter__(self) -> Self:
        self._depth.inside += 1
        # it is not taken back: another thread may be inside when this one leaves
        if type(self._compiler._stance) is not _Stance:
            self._compiler._stance = _Stance(self._compiler._stance, self._depth)
        return self

    def __exit__(self, *error: object) -> None:
        self._depth.inside -= 1


@cache
def _as_written() -> _AsWritten:
    """The only one of the process, as the compiler has one stance."""
    return _AsWritten()


def as_written() -> AbstractContextManager[Any]:
    """A context in which compiled functions run as they were written, in this thread.

    It does nothing while the compiler is not loaded: then nothing is compiled yet.
    """
    if "torch._dynamo.eval_frame" not in sys.modules or torch.compiler.is_compiling():
        return _NOTHING
    return _as_written()


_NOTHING = nullcontext()


def run_as_written(func: Callable[..., ResultT], *args: Any, **kwargs: Any) -> ResultT:
    """``func(*args, **kwargs)`` under :func:`as_written`, cheaply if the compiler is not loaded."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return func(*args, **kwargs)
    with as_written():
        return func(*args, **kwargs)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Act as :func:`as_written`, and reset a compiler that is first loaded inside and fails."""
    was_loaded = "torch._dynamo" in sys.modules
    try:
        with as_written() as written, nullcontext() if written is None else written.recorded():
            yield
    except BaseException:
        if not was_loaded and "torch._dynamo" in sys.modules:  # then it knows no other code
            torch.compiler.reset()
        raise
