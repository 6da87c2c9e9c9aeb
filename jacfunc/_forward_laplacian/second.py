"""Value, first and second derivatives of a call: forward by rules, or by sweeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacfunc._arguments import are_plain
from jacfunc._assembly import DiagonalSink, columns_to_blocks, numel, unit_seeds
from jacfunc._calls import Derivation, FlatCall
from jacfunc._errors import Refused
from jacfunc._factored import users_modes
from jacfunc._forward_laplacian.jet import NoRule, Run
from jacfunc._forward_laplacian.propagation import Propagation
from jacfunc._forward_laplacian.table import RULES
from jacfunc._linear_map import detached
from jacfunc._lock import alone
from jacfunc._log import note
from jacfunc._memory import keep_heap
from jacfunc._torch import RandomState, holds_nan, untracked
from jacfunc._trees import Split
from jacfunc._types import LeafFunction, Leaves, Tree
from jacfunc.strategies import Reverse, Strategy, evaluate


class Derivatives(NamedTuple):
    """Outputs ``[*out_i]``, their first derivatives ``[N, *out_i]`` and second derivatives.

    The second ones are a sum over all N directions, ``[*out_i]``, or each of them, ``[N, *out_i]``.
    """

    outputs: Leaves
    extras: Leaves
    first: Leaves
    second: Leaves


def propagate(
    func: LeafFunction,
    primals: Leaves,
    directions: Leaves,
    is_summed: bool,
    has_first: bool,
) -> Derivatives:
    """Value and derivatives along N directions ``[N, *in_j]``, of one evaluation.

    Without ``has_first`` no first derivatives of the outputs come back.

    A forward Laplacian (Li et al. 2024, "A computational framework for neural network-based
    variational Monte Carlo with Forward Laplacian", algorithm 1): each operation maps value,
    first derivatives and the sum of second ones to its own.

    Raises:
        NoRule: where an operation has no rule.
    """
    keep_heap()
    keeps_graph = torch.is_grad_enabled()
    run = Run(is_summed)
    ctx = Propagation(run, RULES, keeps_graph)
    pairs = zip(primals, directions, strict=True)
    jets = [ctx.jet(x, seeds, None) for x, seeds in pairs]
    try:
        # gradients are on, so that a rule sees where the function takes them off
        with nullcontext() if keeps_graph else torch.enable_grad(), ctx:
            outputs, extras = func(*jets)
    except Refused as refusal:
        run.reason = run.reason or str(refusal)
    except Exception:
        if run.reason is None:
            raise
    if run.reason is not None:  # the function may have caught the refusal
        raise NoRule(run.reason)
    extras = tuple(map(ctx.value, extras))
    if not all(map(ctx.owns, outputs)):
        raise NoRule("an output does not depend on the inputs, or on a way that no rule sees")
    results: Any = outputs
    values = tuple([out.value for out in results])
    firsts = tuple([out.first for out in results]) if has_first else ()
    seconds = tuple([_second(ctx, out) for out in results])
    if not keeps_graph:
        values, firsts, seconds = map(detached, (values, firsts, seconds))
    return Derivatives(values, extras, firsts, seconds)


def _second(ctx: Propagation, out: Any) -> Tensor:
    """Second derivatives of an output."""
    if out.second is None:
        return torch.zeros_like(out.value if ctx.is_summed else out.first)
    second: Tensor = out.second
    return second


@dataclass(frozen=True, eq=False)
class SecondDerivatives:
    """The results of one call, each in its tree.

    Args:
        value_and_aux: makes what the function returned.
        jacobian: makes the Jacobian, an output tree of input trees of blocks, if it was asked for.
        second: the Laplacians, a tree like the output; or the diagonals of the Hessians, an output
            tree of input trees of ``[*out_i, *in_j]``.
    """

    value_and_aux: Callable[[], tuple[Tree, Tree]]
    jacobian: Callable[[], Tree]
    second: Tree


class SecondOrder:
    """A function of which second derivatives are taken along each input, and summed or not.

    Args:
        derivation: the function.
        is_summed: are they summed, as in a Laplacian?
        chunk_size: directions at once; None for all.
        sweep: the strategy of the outer sweep, where an operation has no rule.
        has_jacobian: is the Jacobian asked for, too?
    """

    def __init__(
        self,
        derivation: Derivation,
        is_summed: bool,
        chunk_size: int | None,
        sweep: Strategy,
        has_jacobian: bool = False,
    ) -> None:
        self._derivation, self._is_summed = derivation, is_summed
        self._has_jacobian = has_jacobian
        self._chunk_size, self._sweep = chunk_size, sweep
        self._gradient = _Gradient(derivation)

    def __call__(self, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> SecondDerivatives:
        """Value and derivatives at these arguments."""
        call = FlatCall(self._derivation, args, kwargs)
        with untracked():
            size = numel(call.primals)
        is_seen = torch.compiler.is_compiling() or users_modes()  # a rule is not what these return
        if is_seen or not size or not are_plain(call.primals):
            return self._swept(args, kwargs)
        random_state = RandomState(call.primals)
        try:
            # the modes around see what the function does, and nothing else
            with alone() if call.may_share_module else nullcontext(), untracked():
                return self._carried(call, size, random_state)
        except NoRule as reason:
            note("%s: swept, as %s", self._derivation.api, reason)
        random_state.repeat()
        return self._swept(args, kwargs)

    def _carried(self, call: FlatCall, size: int, random_state: RandomState) -> SecondDerivatives:
        """Carried forward, some directions after the other."""
        step = self._chunk_size or size
        chunks: list[Derivatives] = []
        for start in range(0, size, step):
            if start:
                random_state.repeat()
            seeds = unit_seeds(call.primals, start, min(start + step, size))
            chunks.append(propagate(call, call.primals, seeds, self._is_summed, self._has_jacobian))
        last = chunks[-1]
        if any(holds_nan(x) for c in chunks for x in (*c.first, *c.second)):
            raise NoRule("it gives nan, which zeros and infinite derivatives may have made")
        seconds = zip(*[chunk.second for chunk in chunks], strict=True)
        second: Tree
        if self._is_summed:
            second = call.output_tree([sum(parts[1:], parts[0]) for parts in seconds])
        else:
            diagonals = tuple(torch.cat(parts) for parts in seconds)
            second = call.jacobian(columns_to_blocks(diagonals, last.outputs, call.primals))

        def jacobian() -> Tree:
            firsts = zip(*[chunk.first for chunk in chunks], strict=True)
            columns = tuple(torch.cat(parts) for parts in firsts)
            return call.jacobian(columns_to_blocks(columns, last.outputs, call.primals))

        return SecondDerivatives(partial(call.value, *last[:2]), jacobian, second)

    def _swept(self, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> SecondDerivatives:
        """The diagonal of the Jacobian of the reverse-mode Jacobian."""
        of = self._derivation
        call = FlatCall(Derivation(of.api, self._gradient, of.argnums, has_aux=True), args, kwargs)
        evaluation = evaluate(of.api, call, self._sweep, DiagonalSink(has_lead=True))
        jacobian, returned = evaluation.value_and_aux()
        (diagonals,) = evaluation.blocks
        if not self._is_summed:
            laplacian = call.output_tree(diagonals)
            return SecondDerivatives(lambda: returned, lambda: jacobian, laplacian)
        split = Split.of(returned[0])
        count = len(call.primals)
        laplacians = [
            _summed(out, diagonals[i * count : (i + 1) * count])
            for i, out in enumerate(split.leaves)
        ]
        return SecondDerivatives(lambda: returned, lambda: jacobian, split.place(laplacians))


class _Gradient:
    """The reverse-mode Jacobian of a function, beside the function's value and aux."""

    def __init__(self, derivation: Derivation) -> None:
        self._derivation = derivation
        self.__name__ = getattr(derivation.func, "__name__", "func")
        self.__wrapped__ = derivation.func

    def __call__(self, *args: Tree, **kwargs: Any) -> tuple[Tree, tuple[Tree, Tree]]:
        evaluation = evaluate(
            self._derivation.api, FlatCall(self._derivation, args, kwargs), Reverse()
        )
        return evaluation.jacobian(), evaluation.value_and_aux()


def _summed(out: Tensor, diagonals: tuple[Tensor, ...]) -> Tensor:
    """The Laplacian ``[*out]`` of diagonals ``[*out, *in_j]``."""
    total = torch.zeros_like(out)
    for diagonal in diagonals:
        dims = tuple(range(out.dim(), diagonal.dim()))
        total = total + (diagonal.sum(dims) if dims else diagonal)
    return total
