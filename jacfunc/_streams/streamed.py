"""A call of a module that is answered block by block: its evaluations, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

from jacfunc._calls import FlatCall, OfCalls
from jacfunc._errors import Refused
from jacfunc._factored import Direct, FactoredJacobian
from jacfunc._linear_map import EVERY, JacobianOperator, linearize
from jacfunc._lock import kept_property
from jacfunc._log import note
from jacfunc._memory import Budget
from jacfunc._modules import Batching, ModuleAtBatch, ModuleCall
from jacfunc._remembered import Remembered
from jacfunc._samples import is_new
from jacfunc._streams.held import HeldSamples
from jacfunc._torch import RandomState
from jacfunc._trees import flatten, kinds_of
from jacfunc._types import Leaves, Tree, is_tensor
from jacfunc.strategies import Structured, in_words_of

ResultT = TypeVar("ResultT")


class StreamedCall:
    """A call of a module, which is evaluated when blocks are asked for, as it was when it was made.

    Args:
        batching: of its samples; None where it is differentiated as a whole.
    """

    def __init__(self, call: ModuleCall, batching: Batching | None, budget: Budget) -> None:
        self.budget, self.names = budget, tuple(call.state.point)
        self._call, self._is_whole = call, batching is None
        self._draws = None if batching is None else batching.randomness
        self._at: ModuleAtBatch | WholeCall = (
            WholeCall(call) if batching is None else ModuleAtBatch(call, batching, None, budget)
        )
        self._first: list[HeldSamples] = []

    def answer(self, work: Callable[[], ResultT]) -> ResultT:
        """What ``work`` returns; it changes nothing outside, and draws what the call would have."""
        with self._at.undisturbed():
            return in_words_of(
                self._call.api,
                work,
                "the module must be one whose rows can be pulled back from a graph that is kept",
                " Use module_jacobian, which knows other ways.",
            )

    @property
    def may_go_ahead(self) -> bool:
        """May blocks be made before they are asked for? Not on a budget, nor of what may change."""
        return self.budget.is_open and self._call.state.originals is None

    @property
    def size(self) -> int:
        """How many samples there are; the call as a whole is one."""
        return self._at.size

    def evaluated(self) -> HeldSamples:
        """All samples, evaluated once for all blocks."""
        with self.budget.keeping():
            return self.every

    @kept_property
    def every(self) -> HeldSamples:
        """All samples, evaluated."""
        return self.between(0, self.size)

    @property
    def is_grouped(self) -> bool:
        """Are samples evaluated some after the other, and anew for each sweep?"""
        return not (self.budget.is_open or self._is_whole or self._draws == "different")

    def some(self) -> HeldSamples:
        """Samples that show what blocks look like: all if they are not grouped, else few."""
        if not self.is_grouped:
            return self.evaluated()
        if isinstance(self._at, ModuleAtBatch) and is_new(self._at.independent):
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
                work(EVERY, self.every)
                return ()
            work(
                slice(start, stop), self._first.pop() if self._first else self.between(start, stop)
            )
            return ()

        total = self.size if self.is_grouped else 1
        for _ in self.budget.pieces(total, None, take, result, spare):
            yield

    def between(self, start: int, stop: int) -> HeldSamples:
        """The samples from start to stop: evaluated."""
        at = self._at
        if not (isinstance(at, ModuleAtBatch) and self._draws == "different"):
            return HeldSamples(at.between(start, stop))
        at.random_state.repeat()
        factors, at.last_call = at.independent.factors(start, stop)
        return HeldSamples(factors)

    def go_on(self) -> None:
        """Let the samples that follow draw other numbers, if each sample draws its own."""
        if isinstance(self._at, ModuleAtBatch) and self._draws == "different":
            self._at.random_state = self._at.independent.random_state()

    def known_bytes(self) -> int | None:
        """The bytes of a sample that earlier calls of the kind have kept, if there were any."""
        return _bytes_of_samples().get(self._call.state.version, kinds_of(self._call.arguments))

    def learn_bytes(self, nbytes: int) -> None:
        """Remember the bytes that are kept of a sample."""
        _bytes_of_samples().put(self._call.state.version, kinds_of(self._call.arguments), nbytes)

    def output_tree(self, blocks: Sequence[Any]) -> Tree:
        """The tree of the output, with a block in the place of each leaf."""
        return self._at.last_call.output_tree(blocks)

    def by_name(self, blocks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Blocks of all parameters, by name; the call as a whole has no batch in front."""
        return dict(zip(self.names, map(self._unbatched, blocks), strict=True))

    def shaped(self, rows: Tensor, out: Tensor) -> Tensor:
        """All rows ``[B, M, *param]`` of an output as its block; the call as a whole has no B."""
        return self._unbatched(rows.view(len(rows), *out.shape, *rows.shape[2:]))

    def _unbatched(self, block: Tensor) -> Tensor:
        return block[0] if self._is_whole else block


class WholeCall:
    """A call of a module that is differentiated as a whole: it counts as its only sample."""

    size = 1

    def __init__(self, call: ModuleCall) -> None:
        tensors = tuple(filter(is_tensor, flatten(call.arguments)[0]))
        self.random_state = RandomState(tensors)
        self._call = call.with_samples(None)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around evaluations and pullbacks: nothing outside is changed, all draw the same."""
        with self._call.undisturbed():
            self.random_state.repeat()
            yield

    def between(self, start: int, stop: int) -> FactoredJacobian:
        """The call, evaluated; its parameters are differentiated as such where layers refuse."""
        flat = self._call.flat_call()
        factors = _factors(flat)
        self.last_call = flat.without_graph()
        return factors


@cache
def _bytes_of_samples() -> Remembered[int]:
    """What was kept of a sample, of each version of a module, by the kind of its arguments."""
    return Remembered()


def _factors(flat: FlatCall) -> FactoredJacobian:
    """A call as the only sample; its parameters are differentiated as such where layers refuse."""
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
