"""What calls of a module have settled for later ones: of one door, and by layers of all doors."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, Self, TypeVar

from torch.compiler import is_compiling

from jacfunc._calls import BARE, FlatCall, OneTensor
from jacfunc._factored import FactoredJacobian
from jacfunc._lending import ModuleState, Version
from jacfunc._lock import alone
from jacfunc._modules.batch import SampledJacobian
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.independence import Independence, KnownCalls
from jacfunc._modules.inputs import POSITIONS
from jacfunc._modules.options import Batching, ModuleOptions
from jacfunc._planning import Auto, Autotune
from jacfunc._remembered import MOST_KINDS
from jacfunc._samples import SampledCall
from jacfunc._settled import (
    Beside,
    KnownProducts,
    SettledBatch,
    Work,
    blocks_of,
    by_door,
    by_layers,
    kept,
    matrix_of,
    settled_by,
    takes_second,
)
from jacfunc._torch import RandomState, is_undisturbed
from jacfunc._traces import MOST_BYTES, MOST_MISSES
from jacfunc._trees import Arguments, Given, Split
from jacfunc._trials import IN_FRONT
from jacfunc._types import Argnums, Leaves, Tree
from jacfunc.strategies import Evaluation, Forward, Looped, Reverse, Strategy, Structured

ResultT = TypeVar("ResultT")


class SettledCalls:
    """What the calls of one door have settled, by the kind of what the module is given.

    They differentiate each sample by parameters, by inputs, or by both, and return new tensors;
    ``flat``, one matrix. A whole batch is differentiated so by parameters, if it is one sample: the
    Jacobian is the same. Equal doors share what they have settled.
    """

    def __init__(
        self, independence: Independence, flat: bool, of_whole: bool, door: Hashable
    ) -> None:
        self._independence, self._flat, self._of_whole = independence, flat, of_whole
        self._door, self._work = _alike((door, flat, of_whole)), matrix_of if flat else blocks_of

    @classmethod
    def of(
        cls,
        options: ModuleOptions,
        argnums: Argnums,
        inputs: object,
        strategy: Strategy,
        flat: bool,
        beside: Sequence[Any],
    ) -> Self | None:
        """The settled calls of a door; None if an option asks for results of another form."""
        # of another order, or a tuple of one, the tree is another one
        is_known = argnums in (*POSITIONS.values(), (*POSITIONS.values(),))
        if is_compiling() or not (is_known and _are_usual(options, beside)):
            return None
        of_whole = options.batching is None
        if of_whole and argnums != POSITIONS["params"]:
            return None
        # of others nothing tells which are equal, nor what they keep alive
        is_ours = type(strategy) in (Auto, Autotune, Reverse, Forward, Structured, Looped)
        door = argnums, repr(inputs), strategy if is_ours else object()
        return cls(options.independence, flat, of_whole, door)

    def jacobian(self, state: ModuleState, arguments: Arguments) -> Tree | None:
        """The Jacobian of a call, where one of its kind has settled all but the numbers."""
        given = Given.of(arguments) if is_undisturbed() else None
        if given is None:
            return None
        settled = by_door().get(state.version, (given.kind, self._door))
        if settled is None:
            return None
        turns = settled.turns
        settled = settled if turns is None else turns.way
        if settled.has_second and settled.is_known(self._work):
            return None  # it is tried now
        again = partial(settled.result, state, given, work=self._work)
        make = partial(_counted, self._independence, state, settled, again)
        made = make() if turns is None or turns.is_over else turns.timed(make, *given.tensors)
        if made is None:
            return None
        if self._flat:
            return made[0][0] if self._of_whole else made[0]
        names, tree = settled.names, settled.tree
        jacobian: Tree = dict(zip(names, made, strict=False))
        if settled.inputs:
            of_inputs = made[-1] if tree is None else tree.place(made[len(names) :])
            jacobian = (jacobian, of_inputs) if names else of_inputs
        return jacobian if settled.returned is BARE else settled.returned.output_tree((jacobian,))

    def takes_second(self, call: ModuleCall) -> bool:
        """Is a call that is not settled to be taken by the second choice of its plan?"""
        of = self._kind_of(call)
        return of is not None and takes_second(by_door(), *of, self._work)

    def learn(self, call: ModuleCall, sampled: SampledJacobian, result: Evaluation) -> None:
        """Keep what a call has shown for later ones of its kind, if these need nothing else."""
        of, settles = self._kind_of(call), sampled.settles
        if of is None or call.output_dims != IN_FRONT or settles is None:
            return
        output, _ = result.value_and_aux()
        settled_now = partial(settles, sampled.batch, call.state, result.call, output)
        is_large = sum(x.nbytes for row in result.blocks for x in row) > MOST_BYTES
        seconds = sampled.has_second and not is_large, sampled.by_second
        if settled := kept(by_door(), *of, settled_now, *seconds):
            inputs = Split.of(call.choice.split(call.arguments))
            settled.tree = None if inputs.is_bare else inputs.without_leaves()

    def _kind_of(self, call: ModuleCall) -> tuple[Version, Hashable] | None:
        """What is remembered of a call, by the version of its module; None if nothing is."""
        given = Given.of(call.arguments) if is_undisturbed() else None
        return None if given is None else (call.state.version, (given.kind, self._door))


def made_at_once(
    options: ModuleOptions, arguments: Arguments, work: Work, beside: Leaves | Beside = ()
) -> tuple[Leaves, OneTensor] | None:
    """What ``work`` makes of all samples of a call by layers, which are evaluated once.

    It comes with the tree that the module returns. None where earlier calls have not settled all
    but the numbers, or where there is more to do.

    Args:
        beside: the tensors that the work takes beside, or what gives them.
    """
    is_usual = options.batching is not None and _are_usual(options)
    given = Given.of(arguments) if is_usual and is_undisturbed() else None
    if given is None:
        return None
    with alone():
        state = options.current.found()
        if (settled := by_layers().get(state.version, given.kind)) is None:
            return None
        again = partial(settled.result, state, given, work=work, beside=beside, api=options.api)
        made = _counted(options.independence, state, settled, again)
        return None if made is None else (made, settled.returned)


def settled_at(
    call: ModuleCall, batching: Batching
) -> tuple[Given | None, SettledBatch | None, KnownProducts]:
    """What the module is given in a call, what earlier such calls have settled, and products have.

    Nothing is known where others look at what torch does, or where not all outputs are asked for.
    """
    is_usual = call.asked is None and _are_in_front(batching) and is_undisturbed()
    given = Given.of(call.arguments) if is_usual else None
    if given is None:
        return None, None, KnownProducts(are_counted=False)
    of = call.state.version, given.kind
    is_told = call.independence.independent != "always"
    return given, by_layers().get(*of), KnownProducts.of(*of) if is_told else KnownProducts(False)


def again(
    call: ModuleCall,
    given: Given | None,
    settled: SettledBatch,
    make: Callable[[ModuleState, Given, Container[int]], ResultT | None],
    tried: Callable[[Callable[[], ResultT | None]], ResultT | None],
) -> ResultT | None:
    """What is made of one more evaluation of all samples; None if that does not suffice.

    Args:
        tried: lends the module and calls what it is given; None if that shows something new.
    """
    if given is None or not is_undisturbed():
        return None
    every = lambda compared: tried(partial(make, call.state, given, compared))  # noqa: E731
    return _counted(call.independence, call.state, settled, every)


def evaluated_anew(
    call: ModuleCall,
    given: Given | None,
    batch: SampledCall,
    random_state: RandomState,
    start: int,
    stop: int,
) -> tuple[FactoredJacobian, FlatCall]:
    """Samples evaluated as if nothing was settled, and a call of one; what they settle is kept."""
    factors, made = batch.factors(start, stop)
    is_whole = stop - start == batch.size and call.output_dims == IN_FRONT
    if given is not None and is_whole and is_undisturbed():
        output, _ = made.value(factors.outputs, factors.extras)
        settled_now = partial(settled_by, batch, call.state, made, output)
        kept(by_layers(), call.state.version, given.kind, settled_now)
    random_state.repeat()
    return factors, made.without_graph()


def _are_usual(options: ModuleOptions, beside: Sequence[Any] = ()) -> bool:
    """Are all outputs asked for of samples in front, all at once? So, too, ``beside`` these."""
    others = options.outputs, options.memory, options.chunk_size, *beside
    for other in others:
        if other is not None and other is not False:
            return False
    return options.batching is None or _are_in_front(options.batching)


def _are_in_front(batching: Batching) -> bool:
    """Are samples in front of all inputs, and must draw nothing?"""
    in_dims = batching.in_dims
    return type(in_dims) is int and in_dims == 0 and batching.randomness == "error"


def _counted(
    independence: Independence,
    state: ModuleState,
    settled: SettledBatch,
    again: Callable[[Container[int]], ResultT | None],
) -> ResultT | None:
    """What is made ``again``, from the signatures after which batches were compared; a call more.

    None if batches are to be compared now, if too many calls were taken anew, or if that fails.
    """
    # with one sample nothing is compared
    is_alone = settled.is_alone
    calls = KnownCalls() if is_alone else independence.known_at_next(state, settled.kind)
    if calls is None or settled.misses >= MOST_MISSES:
        return None
    compared = settled.learned if independence.independent is True else calls
    made = again(compared.signatures)
    if made is not None:
        calls.count += 1
    return made


@lru_cache(MOST_KINDS)
def _alike(door: Hashable) -> object:
    """One object for equal doors: a settled call need not take the hash of all their options."""
    return object()
