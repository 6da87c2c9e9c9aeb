"""A module, or a function of one sample, as a batch whose Jacobian is kept as factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jacfunc._batching import batch_size
from jacfunc._check import is_tensor
from jacfunc._factors import Factors
from jacfunc._flat import FlatCall
from jacfunc._inputs import Choice, check_batch, sample_dims
from jacfunc._module_calls import POSITIONS, ModuleCall
from jacfunc._module_checks import check_module
from jacfunc._operators import JacobianOperator
from jacfunc._parameters import ModuleState
from jacfunc._samples import Batch
from jacfunc._sinks import Sink
from jacfunc._tree import Split, kinds_of
from jacfunc._types import Leaves, Tree
from jacfunc.strategies import Structured
from jacfunc.strategies._forward import Randomness


@dataclass(frozen=True)
class OfSamples:
    """Samples, and what must hold around whatever evaluates or pulls back."""

    batch: Batch
    around: Callable[[], AbstractContextManager[Any]]

    @property
    def size(self) -> int:
        """How many there are."""
        return batch_size(self.batch.leaves, self.batch.dims)

    def factors(self, strategy: Structured, start: int, stop: int) -> Factors:
        """Some of them, evaluated."""
        try:
            return self.batch.factors(strategy, start, stop)
        except RuntimeError as error:
            self.batch.check_randomness(error)
            raise

    def place(self, values: Sequence[Any]) -> Tree:
        """Values at the output leaves as the tree of the output."""
        return self.batch.seen[-1][0].output_tree(values)


@dataclass(frozen=True)
class OfCall:
    """One call, which is its only sample."""

    call: FlatCall
    around: Callable[[], AbstractContextManager[Any]] = torch.no_grad

    def factors(self, strategy: Structured, start: int, stop: int) -> Factors:
        """The call, evaluated."""
        return strategy.factors(JacobianOperator(self.call, self.call.primals))

    def place(self, values: Sequence[Any]) -> Tree:
        """Values at the output leaves as the tree of the output."""
        return self.call.output_tree(values)


def samples_of(
    api: str,
    func: nn.Module | Callable[..., Any],
    params: Any,
    args: tuple[Tree, ...],
    in_dims: Tree,
    randomness: Randomness,
) -> OfSamples:
    """A batch of calls, with respect to parameters.

    Raises:
        TypeError, ValueError: arguments that do not fit, samples that depend on each other.
    """
    if isinstance(func, nn.Module):
        check_module(api, func)
        state, at = ModuleState.of(api, func, params), POSITIONS["params"]
        call = ModuleCall(api, state, at, Choice(), (args, {}), False, False)
        batch = call.batch(Sink(), in_dims, randomness)
        with call.undisturbed():
            call.check_independent(batch)
        return OfSamples(batch, call.undisturbed)
    every_dim = sample_dims(api, in_dims, (args, {}))
    split = Split.of((args, {}), is_tensor)
    dims = [d for d, is_leaf in zip(every_dim, split.is_chosen, strict=True) if is_leaf]
    check_batch(api, split.leaves, dims)

    def call_of(leaves: Leaves) -> FlatCall:
        inner, _ = split.merge(leaves)
        return FlatCall(api, func, 0, False, (params, *inner), {})

    kind = kinds_of((params, args)), tuple(dims)
    batch = Batch(api, call_of, split.leaves, dims, kind, randomness, Sink(), has_layers=True)
    return OfSamples(batch, torch.no_grad)
