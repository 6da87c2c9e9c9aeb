"""A module at a batch as a linear operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacfunc._arguments import check_chunk_size, check_flags
from jacfunc._calls import FlatCall, OfCalls
from jacfunc._curvature import Recorded, by_samples, check_alone
from jacfunc._errors import RANDOM, Refused
from jacfunc._kernels import gram_of_samples, variances_of_samples
from jacfunc._linear_map import JacobianOperator, LinearMap, is_followed
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
from jacfunc._samples import SampledCall
from jacfunc._solving import check_gram
from jacfunc._torch import RandomState, is_outermost
from jacfunc._trees import Arguments
from jacfunc._trials import IN_FRONT
from jacfunc._types import Argnums, LeafFunction, Leaves, Tree
from jacfunc.operators import Linearized, Space


@dataclass(eq=False)
class Evaluated:
    """A module at one batch, as a point to linearize at.

    Args:
        call: of the module.
        at_batch: the batch, where samples are taken apart; else None.
    """

    call: ModuleCall
    at_batch: ModuleAtBatch | None

    def __post_init__(self) -> None:
        self.flat = self.call.flat_call()
        self._calls: list[FlatCall] = [self.flat]
        func: LeafFunction = self.flat
        if self._randomness not in (None, "error") and self._is_by_params:
            assert self.at_batch is not None
            func = OfCalls(by_samples(self.at_batch, self._calls), self.flat.state)
        self._func = Recorded(func)

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
        if not evaluated.flat.primals:
            raise ValueError(
                f"{api}: vectors must have at least one tensor, got a module without parameters "
                "that require gradients. Name some with select=, or pass wrt='inputs'."
            )
        if options.batching is not None:
            evaluated._check_samples(options)
        return evaluated

    def _check_samples(self, options: ModuleOptions) -> None:
        """Refuse samples that depend on each other, and what inputs can't be told of."""
        assert options.batching is not None
        with self.call.undisturbed():
            self.call.check_independent(self.call.batch(options.batching))
        if self._randomness == "same" and not self._is_by_params:
            raise NotImplementedError(
                f"{options.api}: by inputs each sample must draw numbers of its own, got "
                "randomness='same'. Use randomness='different', or jacfunc.module_jacobian."
            )

    @property
    def _randomness(self) -> str | None:
        """Along the batch; None where samples are not taken apart."""
        return None if self.at_batch is None else self.at_batch.batch.samples.randomness

    @property
    def _is_by_params(self) -> bool:
        return self.call.argnums == argnums_of(self.call.api, "params")

    @property
    def domain(self) -> Space:
        """Of vectors like the parameters, the inputs, or both."""
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

    def point(self) -> JacobianOperator:
        """The call as a linear map, not evaluated yet."""
        point = JacobianOperator(self._func, self.flat.primals)
        point.rewind_generators()
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
                if before.has_changed():
                    batch.check_randomness(Refused(RANDOM))
                if batch.size > 1 and is_outermost():
                    self._check_evaluated(batch, leaves)
            return self._calls[-1].value(tuple(map(Tensor.clone, leaves)), extras)[0]

    def _check_evaluated(self, batch: SampledCall, outputs: Leaves) -> None:
        """Refuse samples that depend on each other, by what their evaluation has shown."""
        if self._func.recorder.reads_values:
            check_alone(batch, outputs, "Use module_jacobian, or leave per_sample out.")
        batch.check_plain(self._func.recorder, outputs)


class DetachedOperator(Linearized):
    """A Jacobian whose products can be differentiated by their vectors, not by the point."""

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        push = self._map(True) if is_followed(tangents) else super().pushforward_batch
        return push(tangents)

    def pullback_batch(self, cotangents: Leaves) -> Leaves:
        pull = self._map(False) if is_followed(cotangents) else super().pullback_batch
        return pull(cotangents)

    def _map(self, is_push: bool) -> LinearMap:
        """The products of K vectors, differentiable by these; a transform may batch them again."""
        products = super().pushforward_batch if is_push else super().pullback_batch
        return LinearMap.of_batches(products, lambda: self._map(not is_push))


class ModuleOperator(DetachedOperator):
    """The Jacobian of a module at a batch, as a linear operator.

    Args:
        evaluated: the module at the batch.
    """

    def __init__(self, evaluated: Evaluated) -> None:
        point = evaluated.point()
        self.outputs: Tree = evaluated.outputs(point)
        api, spaces = evaluated.call.api, (evaluated.domain, Space.of(self.outputs))
        super().__init__(api, *spaces, point, evaluated.around)
        self.evaluated = evaluated

    def matrix(self, *, chunk_size: int | None = 256) -> Tensor:
        """As of any operator; of independent samples by a sweep for each number of one sample."""
        samples = self._lone_samples
        if samples is None:
            return super().matrix(chunk_size=chunk_size)
        check_chunk_size(self.api, chunk_size)
        (out,), width = self.codomain.leaves, self.codomain.leaves[0].shape[1:].numel()
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        step = max(1, (chunk_size or len(matrix)) // max(1, width))
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            matrix[start * width : stop * width] = samples.rows(start, stop).flatten(0, 1)
        return matrix

    def gram(self, *, center: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """As of any operator; of independent samples from the factors of layers, without J."""
        samples = self._lone_samples
        if samples is None:
            return super().gram(center=center, dtype=dtype)
        check_gram(self.api, center, dtype)
        return gram_of_samples([samples.at_batch], center=center, dtype=dtype or self.dtype)

    def quad(self, middle: Any, *, per_sample: bool = False) -> Tensor:
        """As of any operator; of a diagonal and independent samples from the factors of layers."""
        check_flags(self.api, per_sample=per_sample)
        samples = self._lone_samples
        leaves = self.diagonal_of(middle) if per_sample and samples else None
        if samples is None or leaves is None or is_followed(leaves):
            return super().quad(middle, per_sample=per_sample)
        return variances_of_samples(samples.at_batch, samples.by_name(leaves))

    def rows_of_samples(self, start: int, stop: int) -> Tensor:
        """As of any operator; of independent samples from the factors of layers."""
        samples = self.evaluated.samples
        return samples.rows(start, stop) if samples else super().rows_of_samples(start, stop)

    @property
    def _lone_samples(self) -> SampleFactors | None:
        """The samples, where the module returns one tensor of them."""
        return self.evaluated.samples if len(self.codomain.leaves) == 1 else None
