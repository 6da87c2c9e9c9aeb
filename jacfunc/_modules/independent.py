"""The Jacobian of a call of a module; of a whole batch by samples, where these are independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, Self

from torch import Tensor

from jacfunc._assembly import NEW_TENSORS, Sink
from jacfunc._errors import is_out_of_memory
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._modules.batch import SampledJacobian
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.independence import Independence, KnownCalls
from jacfunc._modules.inputs import POSITIONS, InputChoice, Key
from jacfunc._modules.options import Batching, ModuleOptions
from jacfunc._planning import Auto
from jacfunc._remembered import MOST_KINDS, Recent, Remembered
from jacfunc._samples import MOST_MISSES, SettledBatch
from jacfunc._torch import is_outermost, is_undisturbed
from jacfunc._trees import Arguments, flatten
from jacfunc._types import Argnums, Tree, is_tensor
from jacfunc.strategies import Evaluation, Strategy, evaluate

FEWEST = 16
"""Samples from which on it pays to look at each alone."""


class ModuleResult(NamedTuple):
    """The result of ``module_jacobian(..., full_output=True)``, all of it from one evaluation.

    Args:
        jacobian: the result of the same call without ``full_output``.
        outputs: what the module returned.
        buffers: the buffers as the module would have left them, by name; per sample with the batch
            in front.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.BatchNorm1d(2, affine=False)
        >>> result = jacfunc.module_jacobian(model, "inputs", full_output=True)(torch.eye(2))
        >>> result.jacobian.shape, result.outputs.shape, result.buffers["running_mean"]
        (torch.Size([2, 2, 2, 2]), torch.Size([2, 2]), tensor([0.0500, 0.0500]))
    """

    jacobian: Tree
    outputs: Tree
    buffers: dict[str, Tensor]


class SettledCalls:
    """What the calls of one door have settled, by the kind of their only argument.

    They differentiate each sample by parameters, by that argument, or by both, and return new
    tensors; ``flat``, one matrix.
    """

    def __init__(self, independence: Independence, flat: bool) -> None:
        self._independence, self._flat = independence, flat
        self._by_kind = Recent[tuple[ModuleState, SettledBatch]](MOST_KINDS)

    @classmethod
    def of(
        cls, options: ModuleOptions, argnums: Argnums, flat: bool, beside: Sequence[Any]
    ) -> Self | None:
        """Those of a door; None where its results are others, as options ``beside`` these say."""
        others = options.outputs, options.memory, options.chunk_size, *beside
        if any(x is not None and x is not False for x in others):
            return None
        # of another order, or a tuple of one, the tree is another one
        is_known = argnums in (*POSITIONS.values(), (*POSITIONS.values(),))
        if not is_known or options.batching != Batching():
            return None
        return cls(options.independence, flat)

    def jacobian(self, state: ModuleState, arguments: Arguments) -> Tree | None:
        """The Jacobian of a call, where one of its kind has settled all but the numbers."""
        args, kwargs = arguments
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return None
        x, independence = args[0], self._independence
        known = self._by_kind.get(_kind_of(x))
        if known is None or known[0] is not state or not is_undisturbed():
            return None
        settled = known[1]
        alone = KnownCalls() if settled.is_alone else None  # with which nothing is compared
        calls = alone or independence.known_at_next(state, settled.kind)
        if calls is None or settled.misses >= MOST_MISSES:
            return None
        compared = settled.learned if independence.independent is True else calls
        make = settled.matrix if self._flat else settled.blocks
        made = make(state, x, compared.signatures)
        if made is None:
            return None
        calls.count += 1
        if self._flat or not settled.names:
            return made if self._flat else made[0]
        jacobian = dict(zip(settled.names, made, strict=False))
        return (jacobian, made[-1]) if settled.by_inputs else jacobian

    def learn(self, call: ModuleCall, sampled: SampledJacobian, result: Evaluation) -> None:
        """Keep what a call has shown for later ones of its kind, if these need nothing else."""
        args, kwargs = call.arguments
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor or sampled.settles is None:
            return
        before = self._by_kind.get(_kind_of(args[0]))
        if before is not None and before[0] is call.state and before[1].misses >= MOST_MISSES:
            return
        output, _ = result.value_and_aux()
        if settled := sampled.settles(sampled.batch, call.state, result.call, output):
            self._by_kind.put(_kind_of(args[0]), (call.state, settled))


def _kind_of(x: Tensor) -> Hashable:
    """Equal for tensors of which the same is learned."""
    return x.shape, x.dtype, x.device


def call_of(
    options: ModuleOptions,
    argnums: Argnums,
    inputs: Key | Sequence[Key] | None,
    with_buffers: bool,
    create_graph: bool,
    state: ModuleState,
    arguments: Arguments,
) -> ModuleCall:
    """One call, by what the user has said about all calls."""
    choice = InputChoice.of(options.api, state.module, inputs, arguments)
    rest = with_buffers, create_graph, options.independence, options.outputs
    return ModuleCall(options.api, state, arguments, argnums, choice, *rest)


def jacobian_of(
    call: ModuleCall,
    strategy: Strategy,
    sink: Sink,
    batching: Batching | None,
    settled: SettledCalls | None = None,
) -> Evaluation:
    """The Jacobian of every sample of a call; of the call as a whole, without ``batching``.

    What it has ``settled`` for later calls is kept there.
    """
    if batching is None and (by_sample := by_samples(call, strategy, sink)):
        return by_sample
    call = call.with_samples(batching, keeps_all=call.with_buffers)
    if batching is None:
        with call.undisturbed():
            return evaluate(call.api, call.flat_call(), strategy, sink)
    batch = call.batch(batching)
    with call.undisturbed():
        call.check_independent(batch)
        sampled = SampledJacobian(batch, sink)
        result = sampled.by(strategy)
    if settled is not None:
        settled.learn(call, sampled, result)
    return result


def packed(evaluation: Evaluation, flat: bool, full_output: bool) -> Tree:
    """The Jacobian, as one matrix or as a tree; and what comes beside it."""
    jacobian = evaluation.blocks[0][0] if flat else evaluation.jacobian()
    return ModuleResult(jacobian, *evaluation.value_and_aux()) if full_output else jacobian


def by_samples(call: ModuleCall, strategy: Strategy, sink: Sink) -> Evaluation | None:
    """The Jacobian of all outputs of a batch in the parameters, from that of each sample.

    Row ``[b, *out]`` depends on sample b alone, so one cotangent serves the rows of all samples.
    Batches are compared at every call: nobody has said that samples are independent.

    Returns:
        None where they are not, where it would not pay, or where it can't be told.
    """
    if not (isinstance(strategy, Auto) and _may_pay(call) and type(sink) is type(NEW_TENSORS)):
        return None
    if sink.copies or not is_outermost():
        return None
    kind = call.flat_call().call_kind
    if _coupled().get(kind.version, kind.kind):
        return None
    try:
        few = None if strategy.memory is None else _sizes(call).pop()
        every_call = Independence("always", at_once=few, is_thorough=True)
        independent = replace(call, independence=every_call)
        result = jacobian_of(independent, strategy, sink, Batching())
        if _has_batch(call, result):
            return result
        note("the batch is differentiated as a whole: outputs do not have it in front")
    except Exception as error:  # the call as a whole tells what is wrong, if anything is
        if is_out_of_memory(error):
            raise
        note("the batch is differentiated as a whole: %s", error)
    _coupled().put(kind.version, kind.kind, True)
    return None


def _may_pay(call: ModuleCall) -> bool:
    """May it be a batch of many samples, differentiated by parameters alone?"""
    if call.argnums != POSITIONS["params"] or call.with_buffers or call.create_graph:
        return False
    sizes = _sizes(call)
    return call.asked is None and len(sizes) == 1 and min(sizes) >= FEWEST


def _sizes(call: ModuleCall) -> set[int]:
    """How many samples the tensors of the call hold, if they have the batch in front."""
    return {x.shape[0] if x.dim() else 0 for x in filter(is_tensor, flatten(call.arguments)[0])}


def _has_batch(call: ModuleCall, result: Evaluation) -> bool:
    """Has every output of the batch as a whole the samples in front?"""
    shapes = [out.shape for out in result.outputs]
    if result.call.output_shapes == shapes:
        return True
    every = call.flat_call()  # the samples were evaluated alone, or a few at once
    with call.undisturbed():
        every(*map(Tensor.clone, every.primals))
    return every.output_shapes == shapes


@cache
def _coupled() -> Remembered[bool]:
    """Calls of modules whose samples can't be taken apart."""
    return Remembered()
