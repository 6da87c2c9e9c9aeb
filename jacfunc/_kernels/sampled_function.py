"""A function whose Jacobian is kept as factors: at samples, or at one call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jacfunc._calls import Derivation, FlatCall
from jacfunc._factored import FactoredJacobian
from jacfunc._linear_map import Evaluations, JacobianOperator, Samples
from jacfunc._modules import SampledCall
from jacfunc._remembered import CallKind
from jacfunc._trees import Split, check_batch, kinds_of, sample_dims
from jacfunc._types import Leaves, Randomness, Tree, is_tensor
from jacfunc.strategies import Structured


class KernelSamples(Protocol):
    """Samples, of a module (:class:`jacfunc._points.Point`) or a function."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def last_call(self) -> FlatCall:
        """Of a sample that was evaluated."""
        ...

    def between(self, start: int, stop: int) -> FactoredJacobian:
        """Some of the samples, evaluated."""
        ...

    def undisturbed(self) -> AbstractContextManager[Any]:
        """What must hold around pullbacks."""
        ...

    def factored(self) -> AbstractContextManager[Any]:
        """Refusals of what is done under vmap, in words of the door."""
        ...


@dataclass(eq=False)
class FunctionSamples:
    """A function of parameters and one sample, at a batch."""

    batch: SampledCall
    last_call: FlatCall = field(init=False)
    evaluations: Evaluations = field(default_factory=Evaluations)

    @property
    def size(self) -> int:
        return self.batch.samples.size

    def between(self, start: int, stop: int) -> FactoredJacobian:
        with self.factored():
            return self._evaluated(start, stop)

    def factored(self) -> AbstractContextManager[Any]:
        return self.batch.under_vmap("per-sample factors need", "Write func in other operations")

    def undisturbed(self) -> AbstractContextManager[Any]:
        return torch.no_grad()

    def _evaluated(self, start: int, stop: int) -> FactoredJacobian:
        factors, self.last_call = self.batch.factors(start, stop)
        self.evaluations.check((start, stop), factors.outputs)
        return factors


@dataclass(frozen=True)
class SingleCall:
    """One call, which is its only sample."""

    last_call: FlatCall
    strategy: Structured
    size: int = 1

    def between(self, start: int, stop: int) -> FactoredJacobian:
        return self.strategy.factors(JacobianOperator(self.last_call, self.last_call.primals))

    def factored(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def undisturbed(self) -> AbstractContextManager[Any]:
        return torch.no_grad()


def samples_of(
    api: str,
    func: Callable[..., Any],
    params: Any,
    args: tuple[Tree, ...],
    in_dims: Tree,
    randomness: Randomness,
) -> FunctionSamples:
    """``func(params, *inputs)`` at a batch of inputs.

    Raises:
        TypeError, ValueError: dimensions that do not fit.
    """
    every_dim = sample_dims(api, in_dims, (args, {}))
    split = Split.of((args, {}), is_tensor)
    dims = [d for d, is_leaf in zip(every_dim, split.is_chosen, strict=True) if is_leaf]
    check_batch(api, split.leaves, dims)

    def call_of(leaves: Leaves) -> FlatCall:
        inner, _ = split.merge(leaves)
        return FlatCall(Derivation(api, func), (params, *inner), {})

    kind = CallKind(func, (kinds_of((params, args)), tuple(dims)), func)
    samples = Samples(split.leaves, dims, randomness)
    return FunctionSamples(SampledCall(api, call_of, samples, kind, has_layers=True))
