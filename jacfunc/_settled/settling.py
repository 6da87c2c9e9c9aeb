"""What a call has settled for later ones of its kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache

from jacfunc._calls import OneTensor
from jacfunc._factored import LearnedUses
from jacfunc._faults import is_unwatched
from jacfunc._layouts import OUT, Layout
from jacfunc._lending import ModuleState, Version
from jacfunc._measuring import InTurn
from jacfunc._remembered import Remembered
from jacfunc._samples import SampledCall
from jacfunc._settled.batch import ALONE, PLAIN, SettledBatch
from jacfunc._settled.sweeps import Work
from jacfunc._settled.works import KnownWork
from jacfunc._traces import FEWEST_CALLS, MOST_MISSES
from jacfunc._trees import flatten
from jacfunc._types import Tree


@cache
def by_layers() -> Remembered[SettledBatch]:
    """What is settled of each version of a module, by the kind of what it is given."""
    return Remembered()


@cache
def by_door() -> Remembered[SettledBatch]:
    """What doors have settled of each version of a module, by that kind, and by their options."""
    return Remembered()


def kept(
    memory: Remembered[SettledBatch],
    version: Version,
    kind: Hashable,
    settled_now: Callable[[], SettledBatch | None],
    has_second: bool = False,
    is_second: bool = False,
) -> SettledBatch | None:
    """What a call has settled, which is kept for later ones of its kind.

    None where it has settled nothing new, or where too many calls had to be taken anew.

    Args:
        has_second: is there another way, which may be as fast?
        is_second: was the call taken by that? Then later ones take both ways in turn.
    """
    before = memory.get(version, kind)
    if before is not None and (before.misses >= MOST_MISSES or before.turns is not None):
        return None
    if settled := settled_now():
        if before is None:
            settled.has_second = has_second
        elif is_second:
            settled.is_second, settled.turns = True, InTurn((before, settled))
            # so many calls were there of the kind that one more is written down
            settled.works = {work: KnownWork(work, FEWEST_CALLS - 1) for work in before.works}
        else:
            settled.has_second = before.has_second
            settled.works = before.works  # what was written down holds, too
        memory.put(version, kind, settled)
    return settled


def takes_second(
    memory: Remembered[SettledBatch], version: Version, kind: Hashable, work: Work
) -> bool:
    """Is a call that is taken anew to be taken by the second way?

    That is tried once the first way is as fast as it can be. Of the two, calls go on with the
    faster one, as long as that holds: where it does not, a call is evaluated once more, and a
    function that draws its way would take rare ways more rarely. So one miss ends it.
    """
    settled = memory.get(version, kind)
    if settled is None:
        return False
    if settled.turns is None:
        is_due = settled.has_second and settled.is_known(work)
        settled.has_second &= not is_due
        return is_due
    way = settled.turns.way
    if way.misses:
        settled.turns, settled.is_second = None, False
        settled.works = {work: KnownWork(work) for work in settled.works}
        return False
    return way.is_second


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
    is_alone, learned, returned = batch.size == 1, batch.learned_as_a_whole, OneTensor.of(output)
    is_refused = "as a whole" in LearnedUses.of(batch.kind).refused
    if returned is None or not batch.size or (is_refused and not is_alone):
        return None
    inputs = _inputs_of(batch, len(names)) if batch.differentiates[1] else ()
    if inputs is None:
        return None
    # while numbers may be moved anew, each evaluation is compared
    if not is_alone and (learned.moves_samples or not _is_in_front(learned, bool(names))):
        return None
    if by_layers and (is_refused or learned.ruled is None or learned.others):
        return None
    around = ALONE if is_alone and not by_layers else PLAIN
    (tensor,), is_watched = flatten(output)[0], not is_unwatched(call, around)
    return SettledBatch(batch, names, tensor, is_watched, by_layers, inputs, returned)


def _inputs_of(batch: SampledCall, num_params: int) -> tuple[int, ...] | None:
    """Numbers of the tensors by which a batch is differentiated; None if they are not clear."""
    leaves = batch.samples.leaves
    if batch.whole is None or len({*map(id, leaves)}) < len(leaves):
        return None
    call, numbers = batch.whole(leaves)
    own = range(num_params, len(call.primals))
    return tuple(map(numbers.__getitem__, own)) if numbers.keys() >= {*own} else None


def _is_in_front(learned: LearnedUses, has_layers: bool) -> bool:
    """Have evaluations shown that the output, and without layers all, has the samples in front?"""
    sites = learned.sites or {}
    every = [sites.get((~0, OUT))] if has_layers else [*sites.values()]
    return bool(every) and all(site is not None and site.layout == Layout(0) for site in every)
