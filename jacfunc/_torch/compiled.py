"""What torch.compile has compiled runs as it was written, wherever it is differentiated.

Compiled code is kept from call to call, and what it is kept by leaves out which transforms are
active: what was compiled for tangents is run again for a plain graph, and returns other numbers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Self, TypeVar

import torch

Result = TypeVar("Result")


class _Depth(threading.local):
    """How many evaluations of ours this thread is inside of."""

    inside = 0
    recorded = 0
    """How many of these are recorded: then torch.cond and its like are not compiled, either."""


class _Stance:
    """A stance of torch's compiler: eager for threads inside of an evaluation, else what it was.

    ``torch.compiler.set_stance`` is made for one thread: it turns the compiler off in all of them,
    and two that leave it in another order than they came leave it off for good.
    """

    def __init__(self, before: Any, depth: _Depth) -> None:
        self._before, self._depth = before, depth

    @property
    def stance(self) -> Any:
        """Asked whenever something compiled is called."""
        depth = self._depth
        if depth.recorded or (depth.inside and not _is_control_flow(sys._getframe(2))):
            return "force_eager"
        return self._before.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)


def _is_control_flow(caller: Any) -> bool:
    """Does torch.cond, or its like, run its function? Its graph is that of the compiled one."""
    frame = caller.f_back
    return frame is not None and frame.f_globals.get("__name__") == _CONTROL_FLOW


_CONTROL_FLOW = "torch._higher_order_ops.utils"


class _AsWritten:
    """Inside of it, this thread's calls of what was compiled run the original."""

    def __init__(self) -> None:
        self._compiler: Any = sys.modules["torch._dynamo.eval_frame"]
        self._depth = _Depth()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Control flow raises, too: recorders would make its compiler fail in all later calls."""
        self._depth.recorded += 1
        try:
            yield
        finally:
            self._depth.recorded -= 1

    def __enter__(self) -> Self:
        self._depth.inside += 1
        # it stays, since another thread may be inside when this one leaves
        if type(self._compiler._stance) is not _Stance:
            self._compiler._stance = _Stance(self._compiler._stance, self._depth)
        return self

    def __exit__(self, *error: object) -> None:
        self._depth.inside -= 1


@cache
def _as_written() -> _AsWritten:
    """One for the process, as the compiler has one stance."""
    return _AsWritten()


def as_written() -> AbstractContextManager[Any]:
    """Whatever torch.compile has compiled runs as it was written, in this thread.

    Nothing is compiled as long as the compiler, which takes a second to load, is not loaded.
    """
    if "torch._dynamo.eval_frame" not in sys.modules or torch.compiler.is_compiling():
        return _NOTHING
    return _as_written()


_NOTHING = nullcontext()


def run_as_written(func: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """A call as it was written; of small calls a context that does nothing is felt."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return func(*args, **kwargs)
    with as_written():
        return func(*args, **kwargs)


@contextmanager
def uncompiled() -> Iterator[None]:
    """As it was written, and where the compiler is loaded inside and fails, it forgets that."""
    was_loaded = "torch._dynamo" in sys.modules
    try:
        with as_written() as written, nullcontext() if written is None else written.recorded():
            yield
    except BaseException:
        if not was_loaded and "torch._dynamo" in sys.modules:  # nobody else's code is forgotten
            torch.compiler.reset()
        raise
