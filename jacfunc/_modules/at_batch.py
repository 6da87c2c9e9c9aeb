"""A module at a batch, evaluated when something is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from jacfunc._assembly import stack
from jacfunc._calls import FlatCall, OneTensor
from jacfunc._factored import FactoredJacobian, NamedParts
from jacfunc._lending import check_outermost
from jacfunc._linear_map import EVERY, Evaluations, LeafNumbers, chosen_leaves, nonzero_numbers
from jacfunc._lock import kept_property
from jacfunc._memory import Budget
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.function import FunctionAsModule
from jacfunc._modules.options import Batching, ModuleOptions
from jacfunc._modules.settled import again, evaluated_anew, settled_at
from jacfunc._rounding import contracting
from jacfunc._samples import SAME_EACH_TIME, SampledCall
from jacfunc._settled import Beside, Work, lent_again
from jacfunc._torch import RandomState
from jacfunc._trees import Arguments
from jacfunc._trials import BatchOutputs
from jacfunc._types import Leaves, Tree
from jacfunc.strategies import in_words_of

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class BatchOptions(ModuleOptions):
    """The options of a door whose calls are evaluated for all samples, maybe several times.

    It takes functions, too: ``func(params, *inputs)``, at the parameters of each call.
    """

    batching: Batching
    takes_functions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in ("chunk_size", self.chunk_size), ("memory", self.memory):
            if self.batching.randomness == "different" and value is not None:
                raise ValueError(
                    f"{self.api}: with randomness='different' all samples must be taken at once, "
                    f"to draw the same numbers in every answer, got {name}={value}. Leave it out, "
                    "or use randomness='same'."
                )

    def at(
        self, arguments: Arguments, is_kept: bool = False, keeps_all: bool = False
    ) -> ModuleAtBatch:
        """One call; ``is_kept`` for answers that come later, with all outputs if ``keeps_all``."""
        return self._at(arguments, None, is_kept, keeps_all)[0]

    def with_targets(
        self, arguments: Arguments, is_lent_once: bool, is_kept: bool = False
    ) -> tuple[ModuleAtBatch, Tree]:
        """The call of all positional arguments but the last, and that one: targets of the loss."""
        args, kwargs = arguments
        if not args:
            raise TypeError(
                f"{self.api}: the last positional argument must be the targets of the loss, got "
                "none. Call it as (inputs, targets)."
            )
        at_batch, targets = self._at((args[:-1], kwargs), args[-1], is_kept, keeps_all=True)
        at_batch.is_lent_once = is_lent_once
        return at_batch, targets

    def _at(
        self, arguments: Arguments, targets: Tree, is_kept: bool, keeps_all: bool
    ) -> tuple[ModuleAtBatch, Tree]:
        check_outermost(self.api, arguments)
        if not isinstance(self.module, nn.Module):
            module, arguments = FunctionAsModule.called(self.api, self.module, arguments)
            return replace(self, module=module)._at(arguments, targets, is_kept, keeps_all)
        budget = Budget(self.api, self.memory)
        if is_kept or self.stays:
            state, (arguments, targets) = self.kept((arguments, targets), budget)
        else:
            state = self.current.now()
        independence, asked = self.independence, self.outputs
        call = ModuleCall(self.api, state, arguments, independence=independence, asked=asked)
        return ModuleAtBatch(call, self.batching, self.chunk_size, budget, keeps_all), targets


@dataclass(eq=False)
class ModuleAtBatch:
    """A module at its parameters and a batch.

    Args:
        chunk_size: samples that are evaluated at once; None for all.
        budget: of bytes, by which fewer samples may be evaluated at once.
        keeps_all: are all outputs asked for later, beside those that the call returns?
        is_lent_once: for a whole answer? Not around a user's loss, which may look at the module.
    """

    call: ModuleCall
    batching: Batching
    chunk_size: int | None
    budget: Budget
    keeps_all: bool = False
    api: str = field(init=False)
    params: dict[str, Tensor] = field(init=False)  # those that are chosen, by name
    size: int = field(init=False)  # how many samples there are
    random_state: RandomState = field(init=False)
    """The state of the generators when the call began: every evaluation draws the same numbers."""
    last_call: FlatCall | OneTensor = field(init=False)  # with the trees of the output
    is_lent_once: bool = True
    evaluations: Evaluations = field(default_factory=Evaluations)
    _thread: int | None = None  # for which it is undisturbed

    def __post_init__(self) -> None:
        self.given, self.settled, self.products = settled_at(self.call, self.batching)
        self._is_settled = (settled := self.settled or self.products.settled) is not None
        if settled is None:  # arguments are checked now
            self.call = self.call.with_samples(self.batching, self.keeps_all)
        self.api, self.params = self.call.api, self.call.state.point
        self.size = (settled or self.batch).size
        given = self.given if settled else None
        self.random_state = RandomState(given.tensors if given else self.batch.samples.leaves)

    @kept_property
    def batch(self) -> SampledCall:
        """The call at all samples."""
        return self.call.batch(self.batching)

    def __repr__(self) -> str:
        numbers = sum(param.numel() for param in self.params.values())
        chosen = f"{len(self.params)} parameters of {numbers:,} numbers, {self.size} samples"
        return f"<{self.api} of {type(self.call.state.module).__name__}, {chosen}>"

    def undisturbed(self) -> AbstractContextManager[None]:
        """Around evaluations and pullbacks: nothing outside is changed, all draw the same."""
        if self._thread != get_ident():
            return self._from_outside()
        self.random_state.repeat()
        return nullcontext()

    @contextmanager
    def _from_outside(self) -> Iterator[None]:
        with self.call.undisturbed(self._is_settled):
            self._thread = get_ident()
            try:
                self.random_state.repeat()
                yield
            finally:
                self._thread = None

    def as_one(self) -> AbstractContextManager[None]:
        """Around all evaluations and pullbacks of an answer, for which the module is lent once."""
        return self.undisturbed() if self.is_lent_once else nullcontext()

    def pieces(
        self, work: Callable[[slice, FactoredJacobian], Leaves], result: int = 0
    ) -> Iterator[Leaves]:
        """What ``work`` returns of some samples after the other, with their Jacobian as factors.

        It returns leaves with its samples in front, which are kept, or none if it adds to a
        ``result`` of so many bytes.
        """
        if self.budget.is_open and (self.chunk_size or self.size) >= self.size:
            yield work(slice(None), self._all_factors)
            return
        if not (self.budget.is_open or hasattr(self, "last_call")):
            self.between(0, min(2, self.size))  # a first evaluation takes more than others
        some = lambda start, stop: work(slice(start, stop), self.between(start, stop))  # noqa: E731
        yield from self.budget.pieces(self.size, self.chunk_size, some, result)

    @kept_property
    def _all_factors(self) -> FactoredJacobian:
        return self.between(0, self.size)

    def made_at_once(self, work: Work, beside: Leaves | Beside = ()) -> Leaves | None:
        """What ``work`` makes of all samples, if that is settled; no later answer uses it."""
        if (settled := self.settled) is None or hasattr(self, "last_call"):
            return None
        self.last_call = settled.returned
        make = partial(settled.made, work=work, beside=beside)
        return again(self.call, self.given, settled, make, partial(lent_again, self, settled))

    def contracted(
        self,
        factors: FactoredJacobian,
        cotangents: Leaves,
        work: Callable[[NamedParts], ResultT],
        of: LeafNumbers | None = None,
    ) -> ResultT:
        """What ``work`` makes of what cotangents ``[K, B, *out]`` pull back to, by parameter.

        The cotangents are those ``of`` some outputs; by default of all, some of which may be zero.
        There is no graph around it, and no autocast to a lower precision.
        """
        if of is None and len(cotangents) > 1:
            of = nonzero_numbers(cotangents)
            cotangents = chosen_leaves(cotangents, of)
        with self.undisturbed():
            every = factors.parts_of_cotangents(cotangents, EVERY if of is None else of)
            pairs = zip(self.params, every, strict=True)
            with contracting(self.params.values()):
                return work({name: parts for name, parts in pairs if parts})

    @contextmanager
    def evaluated(self, start: int, stop: int) -> Iterator[FactoredJacobian]:
        """A context for pullbacks, with the factored Jacobian of the samples from start to stop."""
        with self.undisturbed():
            factors, drawn = None, self.random_state
            if (settled := self.settled) is not None and stop - start == self.size:
                self.last_call = settled.returned
                tried = lambda make: settled.tried(make, drawn)  # noqa: E731
                factors = again(self.call, self.given, settled, settled.evaluated, tried)
            if factors is None:
                every = self.call, self.given, self.independent, drawn, start, stop
                factors, self.last_call = evaluated_anew(*every)
            seen = (start, stop), factors.outputs
            in_words_of(self.api, lambda: self.evaluations.check(*seen), *SAME_EACH_TIME)
            yield factors

    def between(self, start: int, stop: int) -> FactoredJacobian:
        """The samples from start to stop, evaluated."""
        with self.evaluated(start, stop) as factors:
            return factors

    @kept_property
    def independent(self) -> SampledCall:
        """The batch, once its samples are seen to be independent."""
        self.call.check_independent(self.batch)
        return self.batch

    @kept_property
    def outputs(self) -> BatchOutputs:
        """The outputs of all samples, evaluated some at a time."""
        count = 0

        def returned(_: slice, jacobian: FactoredJacobian) -> Leaves:
            nonlocal count
            count = len(jacobian.outputs)
            return (*jacobian.outputs, *jacobian.extras)

        with self.budget.keeping():
            leaves = stack(self.pieces(returned), self.size)
        return BatchOutputs(leaves[:count], leaves[count:], self.last_call, self.call.output_dims)
