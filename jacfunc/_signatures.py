"""Types of the functions that doors take and return, and of options that several doors share."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, TypeVar

from jacfunc._types import Memory, Tree

InT = TypeVar("InT")
OutT = TypeVar("OutT")
AuxT = TypeVar("AuxT")
ArgumentT = TypeVar("ArgumentT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)


class FunctionOf(Protocol[ArgumentT, ResultT]):
    """A function whose first argument, and whose result, have known types."""

    def __call__(self, argument: ArgumentT, /, *args: Any, **kwargs: Any) -> ResultT:
        """The result."""
        ...


class SweepOptions(TypedDict, total=False):
    """What all Jacobians of functions take by keyword."""

    chunk_size: int | None
    memory: Memory
    out: Tree
