"""Jacobians of every sample of a batch: vmapped, or looped where nothing is vmapped."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import Tensor

from jacfunc._autotune import Autotune
from jacfunc._batching import in_batches
from jacfunc._check import Refused, is_out_of_memory
from jacfunc._chunks import Chunk
from jacfunc._derive import jacobian_by
from jacfunc._flat import FlatCall
from jacfunc._operators import JacobianOperator
from jacfunc._planner import Auto
from jacfunc._plans import attempt
from jacfunc._trail import note
from jacfunc._tree import flatten, map_tensors, stack_trees
from jacfunc._types import Argnums, Tree
from jacfunc.strategies import Looped, Strategy
from jacfunc.strategies._forward import Randomness


def each_sample(
    api: str,
    call: Callable[..., Tree],
    argnums: Argnums,
    strategy: Strategy,
    randomness: Randomness,
) -> Callable[..., Tree]:
    """Jacobians of ``call(params, point, kwargs, setting)``, a sample of point and kwargs each."""

    def batched(params: Tree, point: Tree, kwargs: Tree, setting: Any) -> Tree:
        size = _batch_size(api, (point, kwargs))

        def sample(number: int) -> tuple[Tree, Tree]:
            picked: tuple[Tree, Tree] = map_tensors(itemgetter(number), (point, kwargs))
            return picked

        def by(chosen: Strategy, chunk: Chunk) -> Tree:
            derive = jacobian_by(api, call, argnums, chosen, has_aux=False)

            def one(at: Tree, also: Tree) -> Tree:
                return derive(params, at, also, setting)

            if not isinstance(strategy, Looped):
                try:
                    return in_batches(one, 0, 0, randomness, chunk)(point, kwargs)
                except RuntimeError as error:
                    _go_on_looped(api, strategy, error)
            return stack_trees([one(*sample(number)) for number in range(size)])

        if not isinstance(strategy, Auto | Autotune):
            return by(strategy, None)
        flat = FlatCall(api, call, argnums, False, (params, *sample(0), setting), {})
        operator = JacobianOperator(flat, flat.primals)
        signature = operator.signature(), size
        plan, chunk = strategy.known.get(signature) or strategy.plan_samples(operator, size)
        plan, result = attempt(plan, lambda plan: by(plan.strategy, chunk))
        strategy.known[signature] = plan, chunk
        return result

    return batched


def _go_on_looped(api: str, strategy: Strategy, error: RuntimeError) -> None:
    """Only auto may take the samples one by one unasked; other strategies say how to ask."""
    if isinstance(error, Refused) or is_out_of_memory(error):
        raise error
    if not isinstance(strategy, Auto | Autotune):
        raise Refused(
            f"{api}: per_sample needs a module that runs under vmap, got: {error}. "
            "Use strategy='looped', which takes the samples one by one."
        ) from error
    note("the module does not run under vmap, samples go one by one: %s", error)


def _batch_size(api: str, tree: Tree) -> int:
    """The size that every tensor's first dimension has."""
    sizes = {tuple(x.shape[:1]) for x in flatten(tree)[0] if isinstance(x, Tensor)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"{api}: with per_sample every input tensor must have the same batch in front, "
            f"got leading dimensions {sorted(sizes)}. Expand what all samples share."
        )
    return int(sizes.pop()[0])
