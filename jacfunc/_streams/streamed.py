"""A call of a module that is answered block by block: its evaluations, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from jacfunc._calls import FlatCall, OfCalls
from jacfunc._errors import Refused
from jacfunc._factored import Direct, FactoredJacobian
from jacfunc._linear_map import EVERY, JacobianOperator, linearize
from jacfunc._lock import kept_property
from jacfunc._log import note
from jacfunc._memory import MODEST_BYTES, Budget
from jacfunc._modules import FEW_CALLS, ModuleCall
from jacfunc._samples import SampledCall, is_new
from jacfunc._streams.held import Cell, HeldSamples
from jacfunc._torch import RandomState
from jacfunc._types import Leaves, Tree
from jacfunc.strategies import Structured, in_words_of

ResultT = TypeVar("ResultT")

GRAPH = 4
"""The graph of an evaluation keeps about as much as the cotangents of four rows."""


class StreamedCall:
    """A call of a module, which is evaluated when blocks are asked for, as it was when it was made.

    Args:
        batch: the call at many samples; None where it is differentiated as a whole.
        random_state: as it was when the call was made.
    """

    def __init__(
        self, call: ModuleCall, batch: SampledCall | None, random_state: RandomState, budget: Budget
    ) -> None:
        self.batch, self.budget, self.names = batch, budget, tuple(call.state.point)
        self._call, self._random_state = call, random_state
        self._first: list[tuple[HeldSamples, FlatCall]] = []

    def answer(self, work: Callable[[], ResultT]) -> ResultT:
        """What ``work`` returns; it changes nothing outside, and draws what the call would have."""
        with self._call.undisturbed():
            self._random_state.repeat()
            return in_words_of(
                self._call.api,
                work,
                "the module must be one whose rows can be pulled back from a graph that is kept",
                " Use module_jacobian, which knows other ways.",
            )

    def check_independent(self) -> None:
        """Refuse samples that depend on each other."""
        if self.batch is not None:
            self._call.check_independent(self.batch)

    @property
    def size(self) -> int:
        """How many samples there are; the call as a whole is one."""
        return 1 if self.batch is None else self.batch.size

    def evaluated(self) -> tuple[HeldSamples, FlatCall]:
        """All samples, evaluated once for all blocks, and the call of one, for its trees."""
        with self.budget.keeping():
            return self.every

    @kept_property
    def every(self) -> tuple[HeldSamples, FlatCall]:
        """All samples, evaluated, and the call of one."""
        self.check_independent()
        if self.batch is not None:
            return self.between(0, self.size)
        flat = self._call.flat_call()
        return HeldSamples(_factors(flat)), flat

    @property
    def is_grouped(self) -> bool:
        """Are samples evaluated some after the other, and anew for each sweep?"""
        batch = self.batch
        return not (self.budget.is_open or batch is None or batch.samples.randomness == "different")

    def some(self) -> tuple[HeldSamples, FlatCall]:
        """Samples that show what blocks look like: all if they are not grouped, else few."""
        if not self.is_grouped:
            return self.evaluated()
        self.check_independent()
        if self.batch is not None and is_new(self.batch):
            self.between(0, min(2, self.size))  # a first evaluation takes more than others
        with self.budget.keeping():  # the first group, unless it is taken again
            self._first.append(self.between(0, min(1, self.size)))
        return self._first[0]

    def groups(
        self, work: Callable[[slice, HeldSamples], None], result: int, spare: Callable[[], int]
    ) -> Iterator[None]:
        """Hand all samples to ``work``, evaluated, as many at once as fit.

        Args:
            result: bytes that must be left.
            spare: bytes that ``work`` may keep beside that.
        """

        def take(start: int, stop: int) -> Leaves:
            if not self.is_grouped:
                work(EVERY, self.every[0])
                return ()
            group = self._first.pop() if self._first else self.between(start, stop)
            work(slice(start, stop), group[0])
            return ()

        total = self.size if self.is_grouped else 1
        for _ in self.budget.pieces(total, None, take, result, spare):
            yield

    def between(self, start: int, stop: int) -> tuple[HeldSamples, FlatCall]:
        """The samples from start to stop: evaluated."""
        batch = self.batch
        assert batch is not None
        self._random_state.repeat()
        try:
            factors, flat = batch.factors(start, stop)
        except Exception as error:
            batch.check_randomness(error)
            raise
        return HeldSamples(factors), flat

    def go_on(self) -> None:
        """Let the samples that follow draw other numbers, if each sample draws its own."""
        if self.batch is not None and self.batch.samples.randomness == "different":
            self._random_state = RandomState(self.batch.samples.leaves)

    def shaped(self, rows: Tensor, out: Tensor) -> Tensor:
        """All rows ``[B, M, *param]`` of an output as its block; the call as a whole has no B."""
        block = rows.view(len(rows), *out.shape, *rows.shape[2:])
        return self.unbatched(block)

    def unbatched(self, block: Tensor) -> Tensor:
        """A block with the batch in front, which the call as a whole does not have."""
        return block if self.batch is not None else block[0]


class GroupedSamples:
    """Jacobians of some samples after the other.

    Args:
        evaluates_more: may more samples be evaluated at once than are asked for, and held?
    """

    def __init__(self, call: StreamedCall, evaluates_more: bool) -> None:
        self._call, self._evaluates_more = call, evaluates_more
        self._group: SampleGroup | None = None
        self._fitting = FEW_CALLS if evaluates_more else 0

    def of(self, start: int, stop: int) -> Tree:
        """What module_jacobian returns for the samples from start to stop."""
        group = self._holding(start, stop)
        every = zip(group.rows(start, stop), group.samples.outputs, strict=True)
        return group.flat.jacobian(
            tuple(tuple(self._call.shaped(row, out) for row in rows) for rows, out in every)
        )

    def _holding(self, start: int, stop: int) -> SampleGroup:
        """A group of evaluated samples that has these."""
        group = self._group
        if group is not None and group.holds(start, stop):
            return group
        while True:
            group = self._group = None  # or its graph would stay beside the next one
            end = max(stop, min(start + self._fitting, self._call.size))
            group = SampleGroup(start, *self._call.between(start, end))
            if self._evaluates_more:
                self._fitting = MODEST_BYTES // max(1, group.bytes_of_one)
            if end <= max(stop, start + self._fitting):  # else the first guess was too large
                self._call.go_on()
                self._group = group
                return group


@dataclass
class SampleGroup:
    """Consecutive samples that were evaluated; ``start`` is the number of the first."""

    start: int
    samples: HeldSamples
    flat: FlatCall
    _cells: list[Cell] = field(default_factory=list)

    def holds(self, start: int, stop: int) -> bool:
        """Are these samples among them?"""
        return self.start <= start and stop <= self.start + self.samples.size

    @property
    def bytes_of_one(self) -> int:
        """About the bytes that are kept of a sample: its graph, and factors of all rows."""
        samples = self.samples
        return (samples.factor_bytes + GRAPH * samples.factors.nbytes) // max(1, samples.size)

    def rows(self, start: int, stop: int) -> list[Leaves]:
        """All rows ``[B, M, *param]`` of some samples, for each output leaf."""
        samples, leaves = self.samples, range(len(self.samples.outputs))
        if stop - start == samples.size:
            return [samples.all_rows(leaf) for leaf in leaves]
        if not self._cells:  # one sweep serves all samples of the group
            for leaf in leaves:
                samples.sweep(leaf, None, self._cells.append)
        size, some = stop - start, slice(start - self.start, stop - self.start)
        outputs, places = enumerate(samples.outputs), samples.shapes.places
        every = [places(i, size, out.numel()) for i, out in outputs]
        for cell in self._cells:
            blocks = [block[:, cell.rows] for block in every[cell.leaf]]
            samples.factors.write(cell.of(some, cell.rows), blocks)
        return every


def _factors(flat: FlatCall) -> FactoredJacobian:
    """A call as the only sample; where layers refuse, its parameters are differentiated as such."""
    operator = JacobianOperator(flat, flat.primals)
    try:
        return Structured().factors(operator)
    except Refused as refusal:
        note("no factors of layers: %s", refusal)

    def of_all(*params: Tensor) -> tuple[Leaves, Leaves]:
        outputs, extras = flat(*params)
        return tuple(x.unsqueeze(0) for x in outputs), tuple(x.unsqueeze(0) for x in extras)

    operator.rewind_generators()
    linearization = operator.refusing(
        "keep a graph", lambda: linearize(OfCalls(of_all, flat.state), flat.primals)
    )
    every = [Direct(number, None) for number in range(len(flat.primals))]
    return FactoredJacobian(1, (), every, flat.primals, linearization)
