"""Calls of a function of one tensor that leave nothing to look at but the graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._assembly import NEW_TENSORS
from jacfunc._calls import BARE, Derivation, FlatCall
from jacfunc._errors import Nameless
from jacfunc._faults import runs_alone
from jacfunc._linear_map import is_pushed_unwatched, linearize
from jacfunc._log import is_heard
from jacfunc._remembered import MOST_KINDS, Recent
from jacfunc._torch import is_undisturbed
from jacfunc._types import Tree
from jacfunc.strategies._evaluation import Evaluation
from jacfunc.strategies._forward import Forward
from jacfunc.strategies._looped import Looped
from jacfunc.strategies._reverse import Reverse
from jacfunc.strategies._rows import AtPoint, SettledColumns, SettledRows
from jacfunc.strategies._second import SecondCall
from jacfunc.strategies._strategy import Strategy, Streaming, Sweeping, Sweeps
from jacfunc.strategies._written import Evaluate, written_block

MOST_LOOKS = 8
"""Calls of a kind that are looked at: plans are settled within a few calls, or at none."""

CLEARLY = 0.5
"""All rows must take less than this part of what chunks of columns took, which may be faster in
later calls than in those that were timed."""

FAR_MORE = 4
"""Of so many times more rows than columns none is written down where columns may be."""


class SettledFunction:
    """What the calls of one derivative have settled, by the kind of their only argument.

    Of such a kind it is known that the function needs no watch and returns one tensor, and that all
    rows are swept at once, or one by one, or all columns at once. Later calls are evaluated, and
    their graph is looked at and swept: a small Jacobian takes half the time. What differs from the
    calls before, in kind, output or graph, or raises, is taken anew by the way of a first call.

    Args:
        order: two for the Hessian of a function that returns one number.
    """

    def __init__(self, derivation: Derivation, strategy: Strategy, order: int = 1) -> None:
        self._derivation, self._strategy, self._order = derivation, strategy, order
        self._at_once: tuple[type, ...] = (Reverse, Forward) if order == 1 else (Reverse,)
        self._by_kind = Recent[SettledRows | SettledColumns](MOST_KINDS)
        self._looks = Recent[int](MOST_KINDS)

    def evaluation(self, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Evaluation | None:
        """The evaluation of a call, where calls of its kind have settled all but the numbers."""
        if torch.compiler.is_compiling() or kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return None
        x = args[0]
        kind = _kind_of(x)
        settled = self._by_kind.get(kind)
        if settled is None or not _is_plain(x) or is_heard():
            return None
        try:
            known = settled.at(x)
        except RuntimeError:  # torch's; the way of a first call tells what it is about
            known = None
        if known is None:
            self._by_kind.pop(kind, None)
            return None
        out, block = known
        return Evaluation(BARE, ((block,),), lambda: ((out.detach(),), ()), NEW_TENSORS)

    def look_at(self, call: FlatCall | SecondCall, evaluation: Evaluation) -> None:
        """Note whether later calls of this kind need no more than this one has shown."""
        func: Any = call.func if isinstance(call, SecondCall) else call
        has_all_rows = not (isinstance(call, SecondCall) and call.chosen is not None)
        if torch.compiler.is_compiling() or not (has_all_rows and func.maps_tensor_to_tensor):
            return
        if not _is_plain(x := call.primals[0]):
            return
        kind = _kind_of(x)
        looks = self._looks.get(kind, 0)
        if looks == MOST_LOOKS:
            return
        self._looks.put(kind, looks + 1)
        strategy = self._settled_strategy(call)
        if strategy is None:
            if looks + 1 == MOST_LOOKS:
                self._look_at_chunks(call, evaluation)
            return
        out = evaluation.value_and_aux()[0]
        if not _is_constant(out, x) or (self._order == 2 and out.numel() > 1):
            return
        ways = self._ways(strategy, out.numel(), x.numel())
        if isinstance(strategy, Forward):
            if is_pushed_unwatched(func):
                begun = partial(_evaluating, self._derivation)
                columns = SettledColumns(
                    self._derivation.func, out.shape, strategy.randomness, begun, ways
                )
                self._by_kind.put(kind, columns)
            return
        is_alone = runs_alone(func, (torch.is_grad_enabled(), False, self._order))
        if is_alone is not None:
            how = self._order, out.shape, is_alone, isinstance(strategy, Looped), ways
            self._by_kind.put(kind, SettledRows(self._derivation.func, *how))

    def _look_at_chunks(self, call: FlatCall | SecondCall, evaluation: Evaluation) -> None:
        """Write all rows down where a plan takes columns in chunks, if that is faster.

        Until then, and where it does not hold, its calls are not settled: more columns at once than
        it has chosen may be slower, or take more memory.
        """
        chooses, x, kind = self._strategy, call.primals[0], call.call_kind
        if isinstance(call, SecondCall) or not isinstance(chooses, Streaming):
            return
        chunks, seconds = chooses.settled_for(kind), chooses.all_rows_within(kind)
        is_same = isinstance(chunks, Forward) and chunks.randomness == "same"
        if seconds is None or not is_same or not is_pushed_unwatched(call):
            return
        out, ((block,),) = evaluation.value_and_aux()[0], evaluation.blocks
        if not _is_constant(out, x) or block.requires_grad:
            return
        begun, rows = partial(_evaluating, self._derivation), [Reverse().sweeps]
        written = written_block(partial(begun, x), x, block, rows, True, CLEARLY * seconds)
        if written is not None:
            func = self._derivation.func
            columns = SettledColumns(func, out.shape, "same", begun, rows, written)
            self._by_kind.put(_kind_of(x), columns)

    def _ways(self, strategy: Sweeping, rows: int, columns: int) -> list[Sweeps]:
        """How the block may be written down: as it is swept, or as may be faster, if that is free.

        Columns are not that may draw numbers of their own, or none, or that a budget has chosen:
        once they are written down a graph is kept for them.
        """
        own, chooses = strategy.sweeps, self._strategy
        has_budget = getattr(chooses, "memory", None) is not None
        if isinstance(strategy, Forward) and (strategy.randomness != "same" or has_budget):
            return []
        if isinstance(chooses, Sweeping) or has_budget:
            return [own]
        ways = [Forward().sweeps] if 1 < rows >= columns else []
        if not own.are_pushes or rows <= FAR_MORE * columns:
            ways.append(Reverse().sweeps)
        return ways if own.is_vmapped else [*ways, own]

    def _settled_strategy(self, call: FlatCall | SecondCall) -> Reverse | Forward | Looped | None:
        """What takes all later calls of this kind; None if it is not known, or takes chunks."""
        chosen: Strategy | None = self._strategy
        if isinstance(chosen, Streaming):
            chosen = chosen.settled_for(call.call_kind)
        if chosen == Looped("columns") and chosen is not self._strategy:
            chosen = Forward()  # so few are soon pushed at once, too, until they are written down
        if isinstance(chosen, Looped):
            return chosen if chosen == Looped("rows") else None
        if isinstance(chosen, Reverse | Forward) and type(chosen) in self._at_once:
            return chosen if chosen.chunk_size is None else None
        return None


def _evaluating(derivation: Derivation, x: Tensor) -> Evaluate[AtPoint]:
    """What evaluates a function like that at a point for its graph, and nothing watches.

    Raises:
        Nameless: if it must be watched.
    """
    call = FlatCall(derivation, (x,), {})
    shape = linearize(call, call.primals).outputs[0].shape  # under a watch
    is_alone = runs_alone(call, (torch.is_grad_enabled(), False, 1))
    if is_alone is None:
        raise Nameless("a pullback of it is watched")
    return SettledRows(derivation.func, 1, shape, is_alone, False, ()).evaluated


def _is_constant(out: Tensor, x: Tensor) -> bool:
    """Is an output made of numbers of the input's dtype, by which nobody differentiates further?"""
    return out.dtype == x.dtype and out.numel() > 0 and not out.requires_grad


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, torch.is_grad_enabled()


def _is_plain(x: Tensor) -> bool:
    """Is it a constant of numbers, and is nobody but us looking at what torch does?"""
    is_constant = not (x.requires_grad or x.is_inference())
    return (
        is_constant
        and x.layout is torch.strided
        and is_undisturbed()
        and not torch.is_inference_mode_enabled()
    )
