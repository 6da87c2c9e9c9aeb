"""What a call has settled for later ones of its kind."""

from __future__ import annotations

from torch import Tensor

from jacfunc._factored import LearnedUses
from jacfunc._faults import is_unwatched
from jacfunc._layouts import OUT, Layout
from jacfunc._lending import ModuleState
from jacfunc._samples import SampledCall
from jacfunc._settled.batch import ALONE, PLAIN, SettledBatch
from jacfunc._types import Tree


def settled_by(
    batch: SampledCall, state: ModuleState, call: object, output: Tree, by_layers: bool = True
) -> SettledBatch | None:
    """What a call has settled; None if it has not settled all but the numbers.

    Args:
        call: that was made, which tells whether calls of its kind must be watched.
        output: the tree that it returned.
        by_layers: are parameters differentiated by factors of layers?
    """
    names = tuple(state.point) if batch.differentiates[0] else ()
    by_layers = by_layers and bool(names)
    is_alone, learned = batch.size == 1, batch.learned_as_a_whole
    is_refused = "as a whole" in LearnedUses.of(batch.kind).refused
    if type(output) is not Tensor or not batch.size or (is_refused and not is_alone):
        return None
    if not (is_alone or _is_in_front(learned, bool(names))):
        return None
    if by_layers and (is_refused or learned.ruled is None or learned.others):
        return None
    around = ALONE if is_alone and not by_layers else PLAIN
    return SettledBatch(batch, names, output, not is_unwatched(call, around), by_layers)


def _is_in_front(learned: LearnedUses, has_layers: bool) -> bool:
    """Have evaluations shown that the output, and without layers all, has the samples in front?"""
    sites = learned.sites or {}
    every = [sites.get((~0, OUT))] if has_layers else [*sites.values()]
    return bool(every) and all(site is not None and site.layout == Layout(0) for site in every)
