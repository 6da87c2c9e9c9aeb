"""A module at a batch, as a point to linearize at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import attrgetter

from torch import Tensor

from jacfunc._calls import FlatCall, OfCalls
from jacfunc._curvature import Recorded, by_samples, check_alone
from jacfunc._errors import RANDOM, Refused
from jacfunc._linear_map import JacobianOperator
from jacfunc._lock import kept_property
from jacfunc._memory import Budget
from jacfunc._module_operators.solve import SampleFactors
from jacfunc._modules import (
    BatchOptions,
    InputChoice,
    Key,
    ModuleAtBatch,
    ModuleCall,
    ModuleOptions,
    argnums_of,
    as_tree,
)
from jacfunc._remembered import Remembered
from jacfunc._samples import SampledCall
from jacfunc._torch import RandomState, is_outermost
from jacfunc._trees import Arguments
from jacfunc._trials import IN_FRONT
from jacfunc._types import Argnums, LeafFunction, Leaves, Tree
from jacfunc.operators import Space

_KIND = attrgetter("shape", "dtype", "device")


@dataclass(eq=False)
class Evaluated:
    """A module at one batch.

    Args:
        call: of the module.
        at_batch: the batch, where samples are taken apart; else None.
    """

    call: ModuleCall
    at_batch: ModuleAtBatch | None

    def __post_init__(self) -> None:
        self._calls: list[FlatCall] = []

    @kept_property
    def flat(self) -> FlatCall:
        """The call as a function of leaves."""
        return self.call.flat_call()

    @kept_property
    def _func(self) -> Recorded:
        self._calls = [self.flat]
        func: LeafFunction = self.flat
        if self._randomness not in (None, "error") and self._is_by_params:
            assert self.at_batch is not None
            func = OfCalls(by_samples(self.at_batch, self._calls), self.flat.state)
        return Recorded(func)

    @classmethod
    def at(
        cls,
        options: ModuleOptions,
        arguments: Arguments,
        argnums: Argnums,
        inputs: Key | Sequence[Key] | None,
    ) -> Evaluated:
        """The module with the state that it has now, as the options say."""
        api, at_batch = options.api, None
        if isinstance(options, BatchOptions):
            at_batch = options.at(arguments, is_kept=True)
            call, arguments = at_batch.call, at_batch.call.arguments
        else:
            state, arguments = options.kept(arguments, Budget(api, options.memory))
            independence, asked = options.independence, options.outputs
            call = ModuleCall(api, state, arguments, independence=independence, asked=asked)
            call = call.with_samples(options.batching)
        choice = InputChoice.of(api, call.state.module, inputs, arguments)
        evaluated = cls(replace(call, argnums=argnums, choice=choice), at_batch)
        if not evaluated.domain.leaves:
            raise ValueError(
                f"{api}: vectors must have at least one tensor, got a module without parameters "
                "that require gradients. Name some with select=, or pass wrt='inputs'."
            )
        return evaluated

    def checked(self) -> Evaluated:
        """The evaluation, after a look whether its samples depend on each other.

        Raises:
            ValueError, NotImplementedError: where not.
        """
        if self.at_batch is None:
            return self
        with self.call.undisturbed():
            self.call.check_independent(self.call.batch(self.at_batch.batching))
        if self._randomness == "same" and not self._is_by_params:
            raise NotImplementedError(
                f"{self.call.api}: by inputs each sample must draw numbers of its own, got "
                "randomness='same'. Use randomness='different', or jacfunc.module_jacobian."
            )
        return self

    @property
    def _randomness(self) -> str | None:
        """Along the batch; None where samples are not taken apart."""
        return None if self.at_batch is None else self.at_batch.batching.randomness

    @kept_property
    def _is_by_params(self) -> bool:
        return self.call.argnums == argnums_of(self.call.api, "params")

    @kept_property
    def domain(self) -> Space:
        """The space of vectors like the parameters, the inputs, or both."""
        if not self._is_by_params or self.at_batch is None or self.at_batch.settled is None:
            return self._domain_now()
        kinds = tuple(map(_KIND, self.call.state.point.values()))
        return _spaces().get_or_make(self.call.state.version, kinds, self._domain_now)

    def codomain(self, output: Tensor) -> Space:
        """The space of vectors like the only output of a settled kind of call."""
        make = partial(Space.of, output)
        return _spaces().get_or_make(self.call.state.version, _KIND(output), make)

    def _domain_now(self) -> Space:
        call = self.call
        every = as_tree(call.state, call.state.point), call.choice.split(call.arguments)
        argnums = call.argnums
        if isinstance(argnums, int):
            return Space.of(every[argnums])
        return Space.of(tuple(every[n] for n in argnums))

    @kept_property
    def samples(self) -> SampleFactors | None:
        """The samples, where each alone gives rows of this J: by parameters, nothing drawn."""
        if self.at_batch is None or not self._is_by_params or self.call.output_dims != IN_FRONT:
            return None
        return SampleFactors(self.at_batch, self.domain) if self._randomness == "error" else None

    def point(self, drawing: RandomState | None = None) -> JacobianOperator:
        """The call as a linear map, not evaluated yet; it draws as from now on, or from then."""
        point = JacobianOperator(self._func, self.flat.primals)
        point.rewind_generators(drawing)
        return point

    def point_with(self, output: Tensor) -> Callable[[], JacobianOperator]:
        """What makes the point, if more is asked for than an evaluation has shown."""
        drawing = RandomState(tuple(self.call.state.point.values()))

        def point() -> JacobianOperator:
            point = self.point(drawing)
            point.keep_image((output,), (), in_same_way=False)  # later evaluations must agree
            return point

        return point

    @contextmanager
    def around(self) -> Iterator[None]:
        """A context for products, in which the module may be evaluated: nothing outside changes."""
        with self.call.undisturbed():
            yield
        for call in self._calls:
            call.forget_outputs()

    def outputs(self, point: JacobianOperator) -> Tree:
        """What the module returns, in tensors of its own, by an evaluation of the point.

        Raises:
            NotImplementedError: if the module draws random numbers under ``randomness="error"``.
        """
        with self.around():
            before = RandomState(self.flat.primals)
            leaves, extras = point.image()
            if self._randomness == "error":
                assert self.at_batch is not None
                batch = self.call.batch(self.at_batch.batching)
                if before.has_drawn(self.flat, self.flat.primals):
                    batch.check_randomness(Refused(RANDOM))
                if batch.size > 1 and is_outermost():
                    self._check_evaluated(batch, leaves)
            return self._calls[-1].value(tuple(map(Tensor.clone, leaves)), extras)[0]

    def _check_evaluated(self, batch: SampledCall, outputs: Leaves) -> None:
        """Refuse samples that depend on each other, by what their evaluation has shown."""
        if self._func.recorder.reads_values:
            check_alone(batch, outputs, "Use module_jacobian, or leave per_sample out.")
        batch.check_plain(self._func.recorder, outputs)


@cache
def _spaces() -> Remembered[Space]:
    """The spaces of settled kinds of calls, by the kinds of parameters and of outputs."""
    return Remembered()
