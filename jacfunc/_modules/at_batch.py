"""A module at a batch, evaluated when something is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jacfunc._assembly import stack
from jacfunc._calls import FlatCall
from jacfunc._factored import FactoredJacobian, Part
from jacfunc._lending import check_outermost
from jacfunc._linear_map import Evaluations, LeafNumbers, chosen_leaves, nonzero_numbers
from jacfunc._lock import kept_property
from jacfunc._losses import is_of_torch
from jacfunc._memory import Budget, sparing
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.function import FunctionAsModule
from jacfunc._modules.options import Batching, ModuleOptions
from jacfunc._modules.trials import BatchOutputs
from jacfunc._samples import SampledCall
from jacfunc._torch import RandomState
from jacfunc._trees import Arguments
from jacfunc._types import Leaves, Tree
from jacfunc.strategies import in_words_of

SAME_EACH_TIME = (
    "each evaluation must give the same",
    " Draw from torch's default generators, and keep nothing from call to call.",
)
"""What must hold of evaluations of the same samples, and what to do."""


@dataclass(frozen=True)
class BatchOptions(ModuleOptions):
    """The options of a door whose calls are evaluated for all samples, maybe several times.

    It takes functions, too: ``func(params, *inputs)``, at the parameters of each call.
    """

    takes_functions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in ("chunk_size", self.chunk_size), ("memory", self.memory):
            if self._batching.randomness == "different" and value is not None:
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
        self, args: tuple[Tree, ...], kwargs: dict[str, Tree], loss: Any, is_kept: bool = False
    ) -> tuple[ModuleAtBatch, Tree]:
        """The call of all positional arguments but the last, and that one: targets of the loss."""
        if not args:
            raise TypeError(
                f"{self.api}: the last positional argument must be the targets of the loss, got "
                "none. Call it as (inputs, targets)."
            )
        at_batch, targets = self._at((args[:-1], kwargs), args[-1], is_kept, keeps_all=True)
        at_batch.is_lent_once = is_of_torch(loss)
        return at_batch, targets

    def _at(
        self, arguments: Arguments, targets: Tree, is_kept: bool, keeps_all: bool
    ) -> tuple[ModuleAtBatch, Tree]:
        check_outermost(self.api)
        if not isinstance(self.module, nn.Module):
            module, arguments = FunctionAsModule.called(self.api, self.module, arguments)
            return replace(self, module=module)._at(arguments, targets, is_kept, keeps_all)
        budget = Budget(self.api, self.memory)
        if is_kept or self.stays:
            state, (arguments, targets) = self.kept((arguments, targets), budget)
        else:
            state = self.current.now()
        call = ModuleCall(
            *(self.api, state, arguments), independence=self.independence, asked=self.outputs
        ).with_samples(self._batching, keeps_all)
        batch = call.batch(self._batching)
        random_state = RandomState(batch.samples.leaves)
        return ModuleAtBatch(call, batch, self.chunk_size, random_state, budget), targets

    @property
    def _batching(self) -> Batching:
        assert self.batching is not None
        return self.batching


@dataclass(eq=False)
class ModuleAtBatch:
    """A module at its parameters and a batch.

    Args:
        chunk_size: samples that are evaluated at once; None for all.
        random_state: as it was when the call began: every evaluation draws the same numbers.
        budget: of bytes, by which fewer samples may be evaluated at once.
        is_lent_once: may the module be lent once for a whole answer? Not if a user's loss runs in
            between, which may look at the module.
    """

    call: ModuleCall
    batch: SampledCall
    chunk_size: int | None
    random_state: RandomState
    budget: Budget
    last_call: FlatCall = field(init=False)
    """The call of a sample that was evaluated last: it has the trees of the output."""
    is_lent_once: bool = True
    _thread: int | None = None
    """The thread for which it is undisturbed."""

    def __repr__(self) -> str:
        numbers = sum(param.numel() for param in self.params.values())
        chosen = f"{len(self.params)} parameters of {numbers:,} numbers"
        name = type(self.call.state.module).__name__
        return f"<{self.api} of {name}, {chosen}, {self.size} samples>"

    @property
    def api(self) -> str:
        return self.call.api

    @property
    def params(self) -> dict[str, Tensor]:
        """The chosen parameters, by name."""
        return self.call.state.point

    @property
    def size(self) -> int:
        """How many samples there are."""
        return self.batch.samples.size

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around evaluations and pullbacks: nothing outside is changed, all draw the same."""
        is_inside = self._thread == get_ident()
        with nullcontext() if is_inside else self.call.undisturbed():
            self._thread = get_ident()
            self.random_state.repeat()
            try:
                yield
            finally:
                self._thread = get_ident() if is_inside else None

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

        def between(start: int, stop: int) -> Leaves:
            return work(slice(start, stop), self.between(start, stop))

        yield from self.budget.pieces(self.size, self.chunk_size, between, result)

    @kept_property
    def _all_factors(self) -> FactoredJacobian:
        return self.between(0, self.size)

    def parts_of(
        self, factors: FactoredJacobian, cotangents: Leaves, of: LeafNumbers | None = None
    ) -> dict[str, list[Part]]:
        """What cotangents ``[K, B, *out]`` pull back to parameters, by name; none if unused.

        The cotangents are those ``of`` some outputs; by default of all, some of which may be zero.
        """
        if of is None:
            of = nonzero_numbers(cotangents)
            cotangents = chosen_leaves(cotangents, of)
        with self.undisturbed():
            every = factors.parts_of_cotangents(cotangents, of)
        return {name: parts for name, parts in zip(self.params, every, strict=True) if parts}

    @contextmanager
    def evaluated(self, start: int, stop: int) -> Iterator[FactoredJacobian]:
        """A context for pullbacks, with the factored Jacobian of the samples from start to stop."""
        with self.undisturbed():
            factors, call = self._independent.factors(start, stop)
            self.last_call = call.without_graph()
            check = partial(self._evaluations.check, (start, stop), factors.outputs)
            in_words_of(self.api, check, *SAME_EACH_TIME)
            self.random_state.repeat()
            yield factors

    def between(self, start: int, stop: int) -> FactoredJacobian:
        """The samples from start to stop, evaluated."""
        with self.evaluated(start, stop) as factors:
            return factors

    @kept_property
    def _independent(self) -> SampledCall:
        """The batch, once its samples are seen to be independent."""
        self.call.check_independent(self.batch)
        return self.batch

    @kept_property
    def _evaluations(self) -> Evaluations:
        return Evaluations()

    @contextmanager
    def contracting(self) -> Iterator[None]:
        """Around contractions of factors: no graph, and no autocast to a lower precision."""
        devices = {tensor.device.type for tensor in self.params.values()}
        with torch.no_grad(), sparing(self.call.independence.memory), ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, devices):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

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
        dims = self.call.output_dims
        return BatchOutputs(leaves[:count], leaves[count:], self.last_call, dims)
