"""What calls of a module by layers have settled, through whatever door, for later ones."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from jacfunc._calls import FlatCall
from jacfunc._factored import FactoredJacobian
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.independence import KnownCalls
from jacfunc._modules.options import Batching
from jacfunc._remembered import Remembered
from jacfunc._samples import MOST_MISSES, SampledCall, SettledBatch
from jacfunc._torch import RandomState, is_undisturbed
from jacfunc._trees import kind_of


def settled_at(call: ModuleCall, batching: Batching) -> SettledBatch | None:
    """What earlier calls at such arguments have settled.

    None where nothing is, and where others look at what torch does.
    """
    if not _is_plain(call, batching):
        return None
    return _by_layers().get(call.state.version, kind_of(call.arguments[0][0]))


def evaluated_again(
    call: ModuleCall, settled: SettledBatch, random_state: RandomState
) -> FactoredJacobian | None:
    """All samples, evaluated as before; None where that is not all there is to do.

    It is where batches are to be compared, or where the evaluation shows something new.
    """
    # with one sample nothing is compared
    alone = KnownCalls() if settled.is_alone else None
    calls = alone or call.independence.known_at_next(call.state, settled.kind)
    if calls is None or settled.misses >= MOST_MISSES or not is_undisturbed():
        return None
    compared = settled.learned if call.independence.independent is True else calls
    factors = settled.again(call.state, call.arguments[0][0], compared.signatures, random_state)
    if factors is not None:
        calls.count += 1
    return factors


def settle(
    call: ModuleCall,
    batching: Batching,
    batch: SampledCall,
    factors: FactoredJacobian,
    made: FlatCall,
) -> None:
    """Keep what an evaluation of all samples has settled, if that is all but the numbers."""
    if not _is_plain(call, batching):
        return
    version, kind = call.state.version, kind_of(call.arguments[0][0])
    before = _by_layers().get(version, kind)
    if before is not None and before.misses >= MOST_MISSES:
        return
    output, _ = made.value(factors.outputs, factors.extras)
    if settled := SettledBatch.of(batch, call.state, made, output):
        _by_layers().put(version, kind, settled)


def _is_plain(call: ModuleCall, batching: Batching) -> bool:
    """Is a tensor all that the module gets, and are all its outputs asked for, as it returns them?

    False, too, where others look at what torch does.
    """
    args, kwargs = call.arguments
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor or call.asked is not None:
        return False
    in_dims = batching.in_dims
    is_in_front = type(in_dims) is int and in_dims == 0
    return is_in_front and batching.randomness == "error" and is_undisturbed()


@cache
def _by_layers() -> Remembered[SettledBatch]:
    """What is settled of each version of a module, by the kind of its only argument."""
    return Remembered()
