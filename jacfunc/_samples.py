"""Jacobians of every sample of a batch: vmapped, or one by one where nothing is vmapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from jacfunc._autotune import Autotune
from jacfunc._batching import in_batches
from jacfunc._check import Refused, is_out_of_memory, is_tensor
from jacfunc._chunks import Chunk
from jacfunc._derive import carry_out, jacobian_by
from jacfunc._draws import Draws
from jacfunc._flat import FlatCall
from jacfunc._operators import JacobianOperator
from jacfunc._planner import Auto
from jacfunc._plans import attempt
from jacfunc._trail import note
from jacfunc._tree import flatten, kinds_of, map_tensors, stack_trees
from jacfunc._types import Argnums, Tree
from jacfunc.strategies import Looped, Strategy
from jacfunc.strategies._forward import Randomness

UNMAPPED = 0
"""Samples at once, where no plan runs under vmap."""


def each_sample(
    api: str,
    call: Callable[..., Tree],
    argnums: Argnums,
    strategy: Strategy,
    randomness: Randomness,
) -> Callable[..., Tree]:
    """Jacobians of ``call(params, point, kwargs, setting)``, a sample of point and kwargs each."""

    def batched(params: Tree, point: Tree, kwargs: Tree, setting: Any) -> Tree:
        batch = _Batch(api, call, argnums, randomness, params, point, kwargs, setting)
        try:
            return batch.run(strategy)
        except RuntimeError as error:
            batch.check_randomness(error)
            raise

    return batched


@dataclass(frozen=True)
class _Batch:
    """One call: what is differentiated, at which samples."""

    api: str
    call: Callable[..., Tree]
    argnums: Argnums
    randomness: Randomness
    params: Tree
    point: Tree
    kwargs: Tree
    setting: Any

    def run(self, strategy: Strategy) -> Tree:
        """Only what plans may take the samples one by one unasked; others say how to ask."""
        self._size()
        if isinstance(strategy, Looped):
            return self.looped(strategy)
        if isinstance(strategy, Auto | Autotune):
            return self.planned(strategy)
        try:
            return self.vmapped(strategy)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.check_randomness(error)
            # what fails for one sample is not the fault of vmap
            self.call(map_tensors(Tensor.clone, self.params), *self._sample(0), self.setting)
            raise Refused(
                f"{self.api}: per_sample needs a module that runs under vmap, got: {error}. "
                "Use strategy='looped', which takes the samples one by one."
            ) from error

    def vmapped(self, strategy: Strategy, chunk: Chunk = None) -> Tree:
        """All samples at once, or a chunk of them at a time."""
        derive = self._derive(strategy)

        def one(point: Tree, kwargs: Tree) -> Tree:
            return derive(self.params, point, kwargs, self.setting)

        return in_batches(one, 0, 0, self.randomness, chunk)(self.point, self.kwargs)

    def looped(self, strategy: Strategy) -> Tree:
        """One sample after the other, without vmap."""
        derive = self._derive(strategy)
        leaves, _ = flatten((self.params, self.point))
        draws, trees = Draws(tuple(filter(is_tensor, leaves))), []
        for sample in map(self._sample, range(self._size())):
            with draws.of_one(self.randomness):
                trees.append(derive(self.params, *sample, self.setting))
        return stack_trees(trees)

    def planned(self, strategy: Auto | Autotune) -> Tree:
        """As the strategy plans for calls of this kind; looped where torch vmaps no plan."""
        signature = kinds_of((self.params, self.point, self.kwargs))
        plan, chunk = strategy.known.get(signature) or self._plan(strategy)
        if chunk == UNMAPPED:
            note("samples go one by one, as none of the plans ran under vmap before")
            return self.looped(strategy)
        try:
            plan, result = attempt(plan, lambda plan: self._refusable(plan.strategy, chunk))
        except Refused as refusal:
            note("samples go one by one: %s", refusal)
            strategy.known[signature] = plan, UNMAPPED
            return self.looped(strategy)
        strategy.known[signature] = plan, chunk
        note("%s samples at once, each: %s: %s", chunk or "all", plan.strategy, plan.reason)
        return result

    def check_randomness(self, error: RuntimeError) -> None:
        """Was it that a random module was not to draw?"""
        if self.randomness == "error" and "randomness" in str(error):
            raise NotImplementedError(
                f"{self.api}: per_sample must know how samples draw random numbers, got a module "
                "that draws and randomness='error'. Pass randomness='same' or 'different'."
            ) from error

    def _plan(self, strategy: Auto | Autotune) -> Any:
        args = (self.params, *self._sample(0), self.setting)
        call = FlatCall(self.api, self.call, self.argnums, False, args, {})
        operator = JacobianOperator(call, call.primals)
        size = self._size()
        return carry_out(self.api, lambda: strategy.plan_samples(operator, size, self._refusable))

    def _refusable(self, strategy: Strategy, chunk: Chunk) -> Tree:
        try:
            return self.vmapped(strategy, chunk)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.check_randomness(error)  # no plan is better in this
            raise Refused(f"the samples do not run under vmap: {error}") from error

    def _derive(self, strategy: Strategy) -> Callable[..., Tree]:
        return jacobian_by(self.api, self.call, self.argnums, strategy, has_aux=False)

    def _sample(self, number: int) -> tuple[Tree, Tree]:
        picked: tuple[Tree, Tree] = map_tensors(itemgetter(number), (self.point, self.kwargs))
        return picked

    def _size(self) -> int:
        """The size that every tensor's first dimension has."""
        leaves, _ = flatten((self.point, self.kwargs))
        sizes = {tuple(x.shape[:1]) for x in leaves if isinstance(x, Tensor)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                f"{self.api}: with per_sample every input tensor must have the same batch in "
                f"front, got leading dimensions {sorted(sizes)}. Expand what all samples share."
            )
        size = int(sizes.pop()[0])
        if size == 0:
            raise ValueError(
                f"{self.api}: per_sample needs at least one sample, got an empty batch. "
                "Pass inputs with samples, or leave per_sample out."
            )
        return size
