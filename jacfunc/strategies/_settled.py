"""Calls of a function of one tensor that leave nothing to look at but the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacfunc._assembly import NEW_TENSORS, columns_to_blocks, owned, unit_seeds
from jacfunc._calls import BARE, Derivation, FlatCall
from jacfunc._faults import runs_alone
from jacfunc._linear_map import (
    check_numbers,
    is_pushed_unwatched,
    pushed_tensor,
)
from jacfunc._log import is_heard
from jacfunc._remembered import MOST_KINDS, Recent
from jacfunc._torch import is_undisturbed
from jacfunc._types import Tree
from jacfunc.strategies._evaluation import Evaluation
from jacfunc.strategies._forward import Forward
from jacfunc.strategies._looped import Looped
from jacfunc.strategies._reverse import Reverse
from jacfunc.strategies._rows import SettledRows
from jacfunc.strategies._second import SecondCall
from jacfunc.strategies._strategy import Strategy, Streaming

MOST_LOOKS = 8
"""Calls of a kind that are looked at: plans are settled within a few calls, or at none."""


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
        self._func, self._strategy, self._order = derivation.func, strategy, order
        self._at_once: tuple[type, ...] = (Reverse, Forward) if order == 1 else (Reverse,)
        self._by_kind = Recent["SettledRows | tuple[torch.Size, str]"](MOST_KINDS)
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
        if isinstance(settled, SettledRows):
            evaluation = self._pulled(x, settled)
        else:
            evaluation = self._pushed(x, *settled)
        if evaluation is None:
            self._by_kind.pop(kind, None)
        return evaluation

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
            return
        out = evaluation.value_and_aux()[0]
        is_constant = out.dtype == x.dtype and out.numel() > 0 and not out.requires_grad
        if not is_constant or (self._order == 2 and out.numel() > 1):
            return
        if type(strategy) is Forward:
            if is_pushed_unwatched(func):
                self._by_kind.put(kind, (out.shape, strategy.randomness))
            return
        is_alone = runs_alone(func, (torch.is_grad_enabled(), False, self._order))
        if is_alone is not None:
            is_looped = isinstance(strategy, Looped)
            is_free = is_looped and out.numel() > 1 and not isinstance(self._strategy, Looped)
            how = is_alone, is_looped, is_free
            self._by_kind.put(kind, SettledRows(self._func, self._order, out.shape, *how))

    def _settled_strategy(self, call: FlatCall | SecondCall) -> Reverse | Forward | Looped | None:
        """What takes all later calls of this kind; None if it is not known, or takes chunks."""
        chosen: Strategy | None = self._strategy
        if isinstance(chosen, Streaming):
            chosen = chosen.settled_for(call.call_kind)
        if isinstance(chosen, Looped):
            return chosen if chosen == Looped("rows") else None
        if isinstance(chosen, Reverse | Forward) and type(chosen) in self._at_once:
            return chosen if chosen.chunk_size is None else None
        return None

    def _pushed(self, x: Tensor, shape: torch.Size, randomness: str) -> Evaluation | None:
        """An evaluation by columns; None where the output is of another kind, or it is refused."""
        try:
            (tangents,) = unit_seeds((x,), 0, x.numel())
            out, columns = pushed_tensor(self._func, x, tangents, randomness)
            check_numbers((columns,))
        except Exception:  # the way of a first call tells what it is about
            return None
        leads_out = out.requires_grad or columns.requires_grad  # to what somebody differentiates by
        if leads_out or out.shape != shape or out.dtype != x.dtype:
            return None
        blocks = columns_to_blocks(owned((columns,)), (out,), (x,))
        return Evaluation(BARE, blocks, lambda: ((out,), ()), NEW_TENSORS)

    def _pulled(self, x: Tensor, rows: SettledRows) -> Evaluation | None:
        """An evaluation by rows; None where the output, or the graph, is of another kind."""
        try:
            known = rows.at(x)
        except RuntimeError:  # torch's; the way of a first call tells what it is about
            return None
        if known is None:
            return None
        out, block = known
        return Evaluation(BARE, ((block,),), lambda: ((out.detach(),), ()), NEW_TENSORS)


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
