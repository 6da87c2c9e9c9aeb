"""Reads of what nothing holds that a function refers to: refused, as no call sees it change."""

from __future__ import annotations

import types
from typing import Any

from jacfunc._calls import reads_unnamed
from jacfunc._errors import Nameless

_OF_OTHERS = frozenset(
    {
        *("_thread.get_ident", "threading.current_thread", "_thread.get_native_id"),
        *("posix.getcwd", "posix.getpid", "posix.stat", "posix.lstat", "posix.listdir"),
        *("posix.scandir", "posix.access", "posix.open", "os.walk", "glob.glob", "io.open"),
        *("genericpath.exists", "genericpath.isfile", "genericpath.isdir"),
        *("genericpath.getsize", "genericpath.getmtime"),
        *("time.localtime", "time.gmtime", "time.strftime", "time.ctime"),
        *("numpy.load", "numpy.loadtxt", "numpy.genfromtxt", "numpy.fromfile", "numpy.geterr"),
        *("torch.serialization.load", "decimal.getcontext", "locale.getlocale"),
        *("sys.getrefcount", "sys._getframe", "inspect.stack", "inspect.currentframe"),
    }
)
"""Functions that return what the thread, the process, a file or a clock is at the moment."""


def check_names(func: types.FunctionType, path: str) -> None:
    """Refuse a function whose code does not name what it reads.

    Raises:
        Nameless: if it does not.
    """
    if by := reads_unnamed(func):
        raise _refusal(path, by)


def check_inside(thing: Any, path: str) -> None:
    """Refuse what a function at ``path`` finds under a name, if that reads what nothing holds.

    Raises:
        Nameless: if it does.
    """
    if isinstance(thing, types.FunctionType | types.BuiltinFunctionType):
        name = getattr(thing, "__qualname__", "")
        if f"{thing.__module__}.{name}" in _OF_OTHERS:
            raise _refusal(path, name)


def _refusal(path: str, by: str) -> Nameless:
    return Nameless(
        "func must read nothing but what its code names, and no thread, file or clock, got "
        f"{path}, which calls {by}(). Read it before, and pass it as an argument; or call the "
        "derivative as it is."
    )
