"""The Jacobian of a call of a module; of a whole batch by samples, where these are independent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from jacfunc._assembly import NEW_TENSORS, Sink
from jacfunc._calls import FlatCall, OneTensor
from jacfunc._errors import is_out_of_memory
from jacfunc._lending import ModuleState
from jacfunc._log import note
from jacfunc._modules.batch import SampledJacobian
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.independence import Independence
from jacfunc._modules.inputs import POSITIONS, InputChoice, Key
from jacfunc._modules.options import Batching, ModuleOptions
from jacfunc._modules.settled import SettledCalls
from jacfunc._planning import Auto, pulls_all_rows
from jacfunc._remembered import Remembered
from jacfunc._settled import settled_by
from jacfunc._torch import is_outermost
from jacfunc._trees import Arguments, Given, flatten
from jacfunc._trials import IN_FRONT, batch_norms
from jacfunc._types import Argnums, Tree, is_tensor
from jacfunc.strategies import Evaluation, Strategy, evaluate

FEWEST = 16
"""Samples from which on it pays to look at each alone."""

WANTS_GRADIENTS = "One of the differentiated Tensors does not require grad"
"""What torch says where a gradient by a constant is asked for."""


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

    What it has ``settled`` for later calls is kept there. Where a backward pass of the user's own
    takes a gradient by parameters that are constants here, they require one from then on.
    """
    constants = call.state.constants
    try:
        return _jacobian_of(call, strategy, sink, batching, settled)
    except Exception as error:
        if constants.require_grad or WANTS_GRADIENTS not in str(error):
            raise
        note("a backward pass takes gradients by constants: %s", error)
    constants.require_grad = True
    return _jacobian_of(call, strategy, sink, batching, settled)


def _jacobian_of(
    call: ModuleCall,
    strategy: Strategy,
    sink: Sink,
    batching: Batching | None,
    settled: SettledCalls | None,
) -> Evaluation:
    if batching is None and (by_sample := by_samples(call, strategy, sink)):
        return by_sample
    call = call.with_samples(batching, keeps_all=call.with_buffers)
    if batching is None:
        with call.undisturbed():
            result = evaluate(call.api, call.flat_call(), strategy, sink)
        if settled is not None:
            _settle_one(settled, call, strategy, result)
        return result
    batch = call.batch(batching)
    with call.undisturbed():
        call.check_independent(batch)
        sampled = SampledJacobian(batch, sink, settled is not None and settled.takes_second(call))
        result = sampled.by(strategy)
    if settled is not None:
        settled.learn(call, sampled, result)
    return result


def _settle_one(
    settled: SettledCalls, call: ModuleCall, strategy: Strategy, result: Evaluation
) -> None:
    """Keep what a call of a whole batch has shown, if that is one sample."""
    given, outputs = Given.of(call.arguments), result.outputs
    if given is None or batch_norms(call.state):
        return
    if any(x.shape[:1] != (1,) for x in (*given.tensors, *outputs)):
        return
    if not isinstance(result.call, FlatCall) or not pulls_all_rows(strategy, result.call.call_kind):
        return
    with suppress(ValueError):  # of modules that have no samples in front
        sampled = SampledJacobian(call.batch(Batching()))
        sampled.settles = partial(settled_by, by_layers=False)
        settled.learn(call, sampled, result)


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
        if independent.with_samples(Batching()).output_dims == IN_FRONT:
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
    assert not isinstance(result.call, OneTensor)  # which is a function's
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
