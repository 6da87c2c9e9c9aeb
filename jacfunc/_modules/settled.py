"""What calls of a module have settled for later ones: of one door, and by layers of all doors."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cache, partial
from typing import Any, Self, TypeVar

from torch import Tensor
from torch.compiler import is_compiling

from jacfunc._calls import FlatCall
from jacfunc._factored import FactoredJacobian
from jacfunc._lending import ModuleState
from jacfunc._lock import alone
from jacfunc._modules.batch import SampledJacobian
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.independence import Independence, KnownCalls
from jacfunc._modules.inputs import POSITIONS
from jacfunc._modules.options import Batching, ModuleOptions
from jacfunc._remembered import MOST_KINDS, Recent, Remembered
from jacfunc._samples import SampledCall
from jacfunc._settled import Beside, KnownProducts, SettledBatch, Work, settled_by
from jacfunc._torch import RandomState, is_undisturbed
from jacfunc._traces import MOST_MISSES
from jacfunc._trees import Arguments, kind_of
from jacfunc._trials import IN_FRONT
from jacfunc._types import Argnums, Leaves, Tree
from jacfunc.strategies import Evaluation

ResultT = TypeVar("ResultT")


class SettledCalls:
    """What the calls of one door have settled, by the kind of their only argument.

    They differentiate each sample by parameters, by that argument, or by both, and return new
    tensors; ``flat``, one matrix. A whole batch is differentiated so by parameters, if it is one
    sample: the Jacobian is the same.
    """

    def __init__(self, independence: Independence, flat: bool, of_whole: bool = False) -> None:
        self._independence, self._flat, self._of_whole = independence, flat, of_whole
        self._by_kind = Recent[tuple[ModuleState, SettledBatch]](MOST_KINDS)

    @classmethod
    def of(
        cls, options: ModuleOptions, argnums: Argnums, flat: bool, beside: Sequence[Any]
    ) -> Self | None:
        """Those of a door; None where its results are others, as options ``beside`` these say."""
        # of another order, or a tuple of one, the tree is another one
        is_known = argnums in (*POSITIONS.values(), (*POSITIONS.values(),))
        if is_compiling() or not (is_known and _are_usual(options, beside)):
            return None
        of_whole = options.batching is None
        if of_whole and argnums != POSITIONS["params"]:
            return None
        return cls(options.independence, flat, of_whole)

    def jacobian(self, state: ModuleState, arguments: Arguments) -> Tree | None:
        """The Jacobian of a call, where one of its kind has settled all but the numbers."""
        if not (_is_one_tensor(arguments) and is_undisturbed()):
            return None
        x = arguments[0][0]
        state_then, settled = self._by_kind.get(kind_of(x)) or (None, None)
        if settled is None or state_then is not state:
            return None
        make: Callable[..., Any] = settled.matrix if self._flat else settled.blocks
        made = _counted(self._independence, state, settled, partial(make, state, x))
        if made is None:
            return None
        if self._flat:
            return made[0] if self._of_whole else made
        if not settled.names:
            return made[0]
        jacobian = dict(zip(settled.names, made, strict=False))
        return (jacobian, made[-1]) if settled.by_inputs else jacobian

    def learn(self, call: ModuleCall, sampled: SampledJacobian, result: Evaluation) -> None:
        """Keep what a call has shown for later ones of its kind, if these need nothing else."""
        is_usual = _is_one_tensor(call.arguments) and call.output_dims == IN_FRONT
        if not is_usual or sampled.settles is None:
            return
        kind = kind_of(call.arguments[0][0])
        before = self._by_kind.get(kind)
        if before is not None and before[0] is call.state and before[1].misses >= MOST_MISSES:
            return
        output, _ = result.value_and_aux()
        if settled := sampled.settles(sampled.batch, call.state, result.call, output):
            if before is not None and before[0] is call.state:
                settled.works = before[1].works  # what was written down holds, too
            self._by_kind.put(kind, (call.state, settled))


def made_at_once(
    options: ModuleOptions, arguments: Arguments, work: Work, beside: Beside | None = None
) -> Leaves | None:
    """What ``work`` makes of all samples of a call by layers, which are evaluated once.

    None where earlier calls have not settled all but the numbers, or where there is more to do.

    Args:
        beside: gives the tensors that the work takes beside, if there are any.
    """
    is_usual = options.batching is not None and _are_usual(options)
    if not (is_usual and _is_one_tensor(arguments) and is_undisturbed()):
        return None
    (x,), _ = arguments
    with alone():
        state = options.current.found()
        settled = _by_layers().get(state.version, kind_of(x))
        if settled is None:
            return None
        again = partial(settled.result, state, x, work=work, beside=beside, api=options.api)
        return _counted(options.independence, state, settled, again)


def settled_at(call: ModuleCall, batching: Batching) -> tuple[SettledBatch | None, KnownProducts]:
    """What earlier calls at such arguments have settled, and what earlier products have.

    Nothing is known where others look at what torch does.
    """
    if not _is_of_all(call, batching):
        return None, KnownProducts(are_counted=False)
    of = call.state.version, kind_of(call.arguments[0][0])
    is_told = call.independence.independent != "always"
    return _by_layers().get(*of), KnownProducts.of(*of) if is_told else KnownProducts(False)


def again(
    call: ModuleCall,
    settled: SettledBatch,
    make: Callable[[ModuleState, Tensor, Container[int]], ResultT | None],
    tried: Callable[[Callable[[], ResultT | None]], ResultT | None],
) -> ResultT | None:
    """What is made of one more evaluation of all samples; None if that does not suffice.

    Args:
        tried: lends the module and calls what it is given; None if that shows something new.
    """
    state, x = call.state, call.arguments[0][0]
    every = lambda compared: tried(partial(make, state, x, compared))  # noqa: E731
    return _counted(call.independence, state, settled, every) if is_undisturbed() else None


def evaluated_anew(
    call: ModuleCall,
    batching: Batching,
    batch: SampledCall,
    random_state: RandomState,
    start: int,
    stop: int,
) -> tuple[FactoredJacobian, FlatCall]:
    """Samples evaluated as if nothing was settled, and a call of one; what they settle is kept."""
    factors, made = batch.factors(start, stop)
    if stop - start == batch.size:
        _settle(call, batching, batch, factors, made)
    random_state.repeat()
    return factors, made.without_graph()


def _settle(
    call: ModuleCall,
    batching: Batching,
    batch: SampledCall,
    factors: FactoredJacobian,
    made: FlatCall,
) -> None:
    """Keep what an evaluation of all samples has settled, if that is all but the numbers."""
    if not _is_of_all(call, batching) or call.output_dims != IN_FRONT:
        return
    of = call.state.version, kind_of(call.arguments[0][0])
    before = _by_layers().get(*of)
    if before is not None and before.misses >= MOST_MISSES:
        return
    output, _ = made.value(factors.outputs, factors.extras)
    if settled := settled_by(batch, call.state, made, output):
        if before is not None:
            settled.works = before.works  # what was written down holds, too
        _by_layers().put(*of, settled)


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


def _is_one_tensor(arguments: Arguments) -> bool:
    """Is a tensor all that the module gets?"""
    args, kwargs = arguments
    return not kwargs and len(args) == 1 and type(args[0]) is Tensor


def _is_of_all(call: ModuleCall, batching: Batching) -> bool:
    """Is a tensor all that the module gets, are all its outputs asked for, and looks nobody on?"""
    is_usual = call.asked is None and _are_in_front(batching)
    return is_usual and _is_one_tensor(call.arguments) and is_undisturbed()


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


@cache
def _by_layers() -> Remembered[SettledBatch]:
    """What is settled of each version of a module, by the kind of its only argument."""
    return Remembered()
