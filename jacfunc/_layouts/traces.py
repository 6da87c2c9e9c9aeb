"""The operations of one evaluation, by number, to find them again in another one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from jacfunc._layouts.layouts import OUT, Key
from jacfunc._trees import map_tensors
from jacfunc.layers import Rule


class OperationCall(NamedTuple):
    """A call of one of torch's functions, by its number in an evaluation."""

    number: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


class Listener(Protocol):
    """Is told of all operations of an evaluation."""

    def begin(self) -> None:
        """Forget all: only what follows is part of the user's function."""
        ...

    def hear(self, operation: OperationCall) -> None:
        """Take in an operation that has ended."""
        ...


class WhatWasSeen(Protocol):
    """What was seen of the operations of an evaluation, as a recorder sees it."""

    @property
    def signature(self) -> int: ...

    @property
    def moves_samples(self) -> bool: ...

    @property
    def moves_unseen(self) -> bool: ...

    @property
    def reads_values(self) -> bool: ...

    @property
    def apart(self) -> Collection[int]: ...


@dataclass
class Trace:
    """The operations of another batch, by number: what each was called with, and returned.

    Args:
        samples: numbers of the samples of this batch, of which the other batch is made: one of
            them, or all of them twice.
    """

    samples: list[int]
    calls: dict[int, tuple[Any, tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    versions: dict[int, list[int]] = field(default_factory=dict)
    """Those of the tensors in each result when the operation had ended."""
    copies: dict[int, Any] = field(default_factory=dict)
    """Results as they were then, of those that were written into later."""

    def begin(self) -> None:
        for kept in (self.calls, self.results, self.versions):
            kept.clear()

    def hear(self, operation: OperationCall) -> None:
        number, func, args, kwargs, result = operation
        self.calls[number], self.results[number] = (func, args, kwargs), result
        self.versions[number] = _versions(result)

    def written(self) -> Copying | None:
        """Takes copies in one more evaluation of what was written into later, if anything was."""
        numbers = {n for n, versions in self.versions.items() if versions != self._now(n)}
        return Copying(self, numbers) if numbers else None

    def as_made(self, number: int) -> Any:
        """The result of an operation when it had ended; None if it was written into since."""
        if number in self.copies:
            return self.copies[number]
        return self.results[number] if self.versions[number] == self._now(number) else None

    def _now(self, number: int) -> list[int]:
        return _versions(self.results[number])

    def is_like(self, operations: Sequence[Any]) -> bool:
        """Did an evaluation call these functions, with values of other kinds in between?"""
        numbers = [number for number in self.calls if number >= 0]
        last = max(numbers, default=-1)
        are_same = all(n < len(operations) and operations[n] == self.calls[n][0] for n in numbers)
        return are_same and not any(callable(x) for x in operations[last + 1 :])

    def tensor(self, key: Key, func: Any, rule: Rule | None) -> Tensor | None:
        """A tensor of the operation with this number; None if that is another function."""
        number, name = key
        if number not in self.calls or self.calls[number][0] != func:
            return None
        _, args, kwargs = self.calls[number]
        named = {} if rule is None else rule.named(args, kwargs) or {}
        value = self.results.get(number) if name == OUT else named.get(name)
        return value if isinstance(value, Tensor) else None


@dataclass
class Copying:
    """Copies the results of operations, as the next ones may write into them.

    Args:
        trace: gets the copies.
        numbers: of the operations; None for all, of which the trace knows nothing yet.
    """

    trace: Trace
    numbers: set[int] | None = None

    def begin(self) -> None:
        self.trace.copies.clear()

    def hear(self, operation: OperationCall) -> None:
        number, func, args, kwargs, result = operation
        if self.numbers is None:
            self.trace.calls[number] = func, args, kwargs
        elif number not in self.numbers or self.trace.calls[number][0] != func:
            return
        self.trace.copies[number] = map_tensors(_copied, result)


def pairs_in(value: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors in two values of one structure, at any depth of containers, in pairs."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        yield value, other
    elif isinstance(value, Mapping) and isinstance(other, Mapping):
        yield from pairs_in(list(value.values()), list(other.values()))
    elif isinstance(value, tuple | list) and isinstance(other, tuple | list):
        for one, two in zip(value, other, strict=False):
            yield from pairs_in(one, two)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _versions(value: Any) -> list[int]:
    return [tensor._version for tensor, _ in pairs_in(value, value)]
