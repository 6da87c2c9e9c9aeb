"""Functions at the samples of a batch, or at one call, with factored Jacobians for kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch

from jacfunc._calls import Derivation, FlatCall
from jacfunc._factored import FactoredJacobian
from jacfunc._linear_map import Evaluations, JacobianOperator, Samples
from jacfunc._modules import ModuleAtBatch
from jacfunc._outputs import Asked, ChosenOutputs
from jacfunc._remembered import CallKind
from jacfunc._samples import SAME_EACH_TIME, SampledCall
from jacfunc._trees import Split, check_batch, is_batch, kinds_of, positional, sample_dims
from jacfunc._types import Leaves, Randomness, Tree, is_tensor
from jacfunc.strategies import Structured, in_words_of


@dataclass(eq=False)
class FunctionSamples:
    """A function of parameters and one sample, at all samples of a batch."""

    batch: SampledCall
    last_call: FlatCall = field(init=False)
    evaluations: Evaluations = field(default_factory=Evaluations)

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.batch.samples.size

    @contextmanager
    def evaluated(self, start: int, stop: int) -> Iterator[FactoredJacobian]:
        """A context for pullbacks, with the factored Jacobian of the samples from start to stop."""
        with torch.no_grad():
            jacobian, call = self.batch.factors(start, stop)
            self.last_call = call.without_graph()
            check = partial(self.evaluations.check, (start, stop), jacobian.outputs)
            in_words_of(self.batch.api, check, *SAME_EACH_TIME)
            yield jacobian


@dataclass(frozen=True)
class SingleCall:
    """One call of a function, as a batch with one sample."""

    last_call: FlatCall
    strategy: Structured
    size: int = 1

    @contextmanager
    def evaluated(self, start: int, stop: int) -> Iterator[FactoredJacobian]:
        with torch.no_grad():
            operator = JacobianOperator(self.last_call, self.last_call.primals)
            yield self.strategy.factors(operator)


KernelSamples: TypeAlias = ModuleAtBatch | FunctionSamples | SingleCall
"""Samples that a kernel is of: those of a module, or of a function."""


def samples_of(
    api: str,
    func: Callable[..., Any],
    params: Any,
    args: tuple[Tree, ...],
    in_dims: Tree,
    randomness: Randomness,
    asked: Asked | None = None,
) -> FunctionSamples:
    """``func(params, *inputs)`` at a batch of inputs.

    Raises:
        TypeError, ValueError: ``in_dims`` that do not fit the inputs.
    """
    split = Split.of((args, {}), is_tensor)
    leaf_dims = sample_dims(api, in_dims, (args, {}), split)
    dims = [d for d, is_leaf in zip(leaf_dims, split.is_chosen, strict=True) if is_leaf]
    check_batch(api, split.leaves, dims)

    def call_of(leaves: Leaves) -> FlatCall:
        inner, _ = split.merge(leaves)
        return FlatCall(Derivation(api, func), (params, *inner), {})

    kind = CallKind(func, (kinds_of((params, args)), tuple(dims)), func)
    samples = Samples(split.leaves, dims, randomness)
    batch = SampledCall(api, call_of, samples, kind)
    if asked is not None:
        with torch.no_grad():
            batch = ChosenOutputs.of_batch(batch, asked).of_samples(batch)
    return FunctionSamples(batch)


SamplesAt: TypeAlias = Callable[[tuple[Tree, ...]], KernelSamples]
"""Gives the samples of a batch, from the positional arguments of the function."""


def named_sides(x1: Any, x2: Any) -> tuple[dict[str, Iterable[Any]], bool]:
    """The batches of each argument, and whether each is one batch.

    Without a second argument the first is both sides.
    """
    named = {"x1": x1} if x2 is None else {"x1": x1, "x2": x2}
    single = {name for name, x in named.items() if is_batch(x)}
    sides = {name: [x] if name in single else x for name, x in named.items()}
    return sides, len(single) == len(named)


def sides_of(
    api: str, sides: Mapping[str, Iterable[Any]], samples_at: SamplesAt
) -> list[list[KernelSamples]]:
    """The samples of the batches of each argument, by name.

    Raises:
        ValueError: if there is no batch.
    """
    every = []
    for name, batches in sides.items():
        every.append([samples_at(positional(batch)) for batch in batches])
        if not every[-1]:
            raise ValueError(
                f"{api}: {name} must hold at least one batch, got an iterable of none. Pass a "
                "batch, or an iterable of batches that has not been used up."
            )
    return every
