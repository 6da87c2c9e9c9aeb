"""Recorders of evaluations in which uses of parameters are known, or are not looked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence, Set
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jacfunc._errors import Refused
from jacfunc._factored import METADATA
from jacfunc._faults import TAKES_DERIVATIVES
from jacfunc._layouts import KIND, READING, TELLING, VALUES, Args, OperationRecorder
from jacfunc.layers import table

_REFUSED = frozenset({*TAKES_DERIVATIVES, Tensor.retain_grad})


class PlainRecorder(OperationRecorder):
    """Numbers the operations of a function, of which no parameter is looked for.

    Args:
        lent: identities of parameters that are no copies.
        reads: operations that are known to read such a parameter alone, by their numbers.
    """

    def __init__(self, lent: Container[int] = (), reads: Mapping[int, Any] | None = None) -> None:
        super().__init__(None, _REFUSED, lent)
        self._reads, self._openings = reads or {}, table().openings

    def call(
        self, number: int, func: Any, args: Args, kwargs: Mapping[str, Any], is_tracked: bool
    ) -> Any:
        if func in TAKES_DERIVATIVES:
            raise Refused("the function takes a derivative itself, of what may stand for others")
        if is_tracked and func in self._openings:  # as where uses were looked for
            with self:
                return self._openings[func](*args, **kwargs)
        if is_tracked and func not in METADATA and self._reads.get(number) is not func:
            raise Refused("a parameter that is no copy may be written into")
        # nobody reads what retain_grad keeps, and a second sweep would add to that
        return None if func is Tensor.retain_grad else func(*args, **kwargs)


class Step(NamedTuple):
    """An operation of a known evaluation, which gets tensors first, and plain values behind them.

    Args:
        func: is called.
        kinds: of its arguments; those by keyword, and their names, are the last.
        lead: so many of these are tensors.
        values: the others.
        number: that of the operation in the evaluation.
        length: so many numbers it takes there.
        reads: is it known to read parameters alone?
    """

    func: Any
    kinds: Args
    lead: int
    values: Args
    number: int
    length: int
    reads: bool


class Steps:
    """The operations of evaluations of one kind: noted in one of them, and followed in later ones.

    Those that must be looked at in detail are None; ``others`` is what is noted of these.
    """

    def __init__(self) -> None:
        self.every, self.others = list[Step | None](), list[Any]()
        self.signature: int | None = None  # until all are known


class Reads(NamedTuple):
    """Operations that only read what they get of the parameters, as an evaluation has shown.

    Args:
        operations: functions, by their numbers in the evaluation.
        lent: numbers of the parameters that no others get, which need not be copied.
        attends: may attention be among all operations? Then its kernel must be chosen.
        is_watched: must an evaluation be watched, as there was something to watch for? If not, one
            that calls the same operations needs no watch, though the function may catch errors.
        steps: all operations that an evaluation calls, if later ones are compared with these.
    """

    operations: Mapping[int, Any]
    lent: Set[int]
    attends: bool = True
    is_watched: bool = True
    steps: Steps | None = None

    @classmethod
    def of(
        cls,
        operations: Sequence[Any],
        arguments: Mapping[int, Sequence[Tensor]],
        handles: Sequence[Tensor],
        written: Collection[int],
    ) -> Reads:
        """What an evaluation with copies of all parameters has shown.

        Operations that have rules read their parameters alone; nothing tells what others do.

        Args:
            operations: that were called, by their numbers.
            arguments: the tensors that these got, by the same numbers.
            handles: the copies.
            written: numbers of those that were written into.
        """
        numbers = {id(handle): number for number, handle in enumerate(handles)}
        reading, seen, others = dict[int, Any](), set[int](), set(written)
        for number, tensors in arguments.items():
            func, got = operations[number], {numbers[id(x)] for x in tensors if id(x) in numbers}
            if not got or func in METADATA:
                continue
            if func in table().rules and func not in table().openings:
                reading[number] = func
                seen |= got
            else:
                others |= got
        return cls(reading, seen - others)


class Following(PlainRecorder):
    """Compares operations with known ones, one by one, which takes less than to note them all.

    An evaluation that calls these and no others has their signature.

    Args:
        steps: the known ones; if there are none yet, they are noted there.
        lent: identities of parameters that are no copies.
        reads: operations that are known to read such a parameter alone, by their numbers.
    """

    def __init__(self, steps: Steps, lent: Set[int], reads: Mapping[int, Any]) -> None:
        super().__init__(lent, reads)
        self._lent, self._steps, self._is_known = lent, steps, steps.signature is not None
        self._count, self._is_lost, self._has_read = 0, False, False

    @property
    def signature(self) -> int:
        known, steps = self._steps.signature, self._steps
        if not self._is_known or known is None:
            return super().signature
        is_like = not self._is_lost and self._count == len(steps.every)
        return known if is_like and self.operations == steps.others else ~known

    def begin(self, module: nn.Module, buffers: Iterable[Tensor]) -> None:
        super().begin(module, buffers)
        self._count, self.num_followed, self._is_lost = 0, 0, False
        if not self._is_known:
            self._steps.every.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        # called for every operation: as short as it can be
        if not self._is_known or self._is_over:
            return self._noted(func, types, args, kwargs)
        number, every = self._count, self._steps.every
        self._count = number + 1
        step = every[number] if number < len(every) else None
        if step is not None:
            known, kinds, lead, values, at, length, reads = step
            row = (*args, *kwargs, *kwargs.values()) if kwargs else args
            is_like = func == known and (*map(type, row),) == kinds and row[lead:] == values
            if is_like and (reads or not (lent := self._lent) or lent.isdisjoint(map(id, row))):
                self.num_followed += length
                if self.kinds is not None:
                    self.kinds += map(KIND, row[:lead])
                if self.wanted is None or at in self.wanted:
                    self.arguments[at] = row[:lead]
                return func(*args, **kwargs) if kwargs else func(*args)
            self._is_lost = True
        return super().__torch_function__(func, types, args, kwargs)

    def _noted(self, func: Any, types: Any, args: Args, kwargs: Any) -> Any:
        """The result of an operation, which is noted for later evaluations."""
        if self._is_over:
            return func(*args, **kwargs or {})
        every, number, place = self._steps.every, len(self.operations), len(self._steps.every)
        every.append(None)  # some call others before they return
        result = super().__torch_function__(func, types, args, kwargs)
        row = (*args, *kwargs, *kwargs.values()) if kwargs else args
        lead = len([*takewhile(lambda x: isinstance(x, Tensor), row)])
        self._has_read |= func in READING
        is_special = func in TELLING or func in self._noticed or func in self._openings
        if all(map(_is_plain, row[lead:])) and not is_special:
            kinds, length = (*map(type, row),), len(self.operations) - number
            reads = func in METADATA or number in self._reads
            every[place] = Step(func, kinds, lead, row[lead:], number, length, reads)
        return result

    def known(self) -> Steps | None:
        """The operations, once all were noted; None where numbers tell what is done."""
        if self.moves_samples or self._has_read:  # what made these numbers is noted at each call
            return None
        steps = self._steps
        ranges = [range(s.number, s.number + s.length) for s in steps.every if s is not None]
        rest = {*range(len(self.operations))}.difference(*ranges)
        steps.others = [self.operations[number] for number in sorted(rest)]
        steps.signature = self.signature
        return steps


def _is_plain(value: Any) -> bool:
    """Is it a value that nobody can change, or a tuple of such?"""
    kind = type(value)
    is_row = kind is tuple or kind is torch.Size
    return kind in VALUES or (is_row and VALUES.issuperset(map(type, value)))
