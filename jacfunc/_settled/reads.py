"""Operations that only read parameters: what they alone get need not be copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, NamedTuple

from torch import Tensor

from jacfunc._factored import METADATA
from jacfunc._settled.following import Steps
from jacfunc.layers import table


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
