"""A module evaluated with a batch as a whole: what must hold of it, and tangents pushed with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import sub
from typing import Any

import torch
from torch import Tensor

from jacfunc._calls import FlatCall
from jacfunc._errors import Refused
from jacfunc._factored import FactoredJacobian
from jacfunc._faults import is_unwatched
from jacfunc._layouts import OperationRecorder
from jacfunc._linear_map import JacobianOperator, graph_number, narrowed, push_on_graph
from jacfunc._log import note
from jacfunc._modules import FunctionAsModule, ModuleAtBatch
from jacfunc._remembered import MOST_KINDS, Remembered
from jacfunc._samples import SampledCall
from jacfunc._torch import is_traced, untracked
from jacfunc._types import LeafFunction, Leaves

ITERATED = 1 / 4
"""The power of the rounding by which outputs of a sample may differ from those of the sample alone:
what is iterated for a batch goes on for its worst sample."""


def multiplied(jacobian: FactoredJacobian, tangents: Leaves) -> Leaves:
    """Every sample's J, a row after the other, times tangents of the parameters."""
    products, vector = [], torch.cat([v.flatten() for v in tangents])
    for number, out in enumerate(jacobian.outputs):
        columns = []
        for row in range(out[0].numel()):
            blocks = jacobian.rows(row, row + 1, number)
            flat = torch.cat([block.flatten(2) for block in blocks], 2)
            columns.append(flat @ vector)
        products.append(torch.cat(columns, 1).reshape(out.shape))
    return tuple(products)


def check_shapes(at_batch: ModuleAtBatch, outputs: Leaves) -> None:
    """Raise ValueError unless the batch is in front of outputs, and there alone."""
    for out in outputs:
        if not out.dim() or out.shape[0] != at_batch.size:
            raise ValueError(
                f"{at_batch.api}: every output must have the batch in front, got shape "
                f"{tuple(out.shape)} for a batch of {at_batch.size}. Use a module that transposes "
                "it, or that returns other outputs alone; a lone sample needs a batch of one."
            )
    if at_batch.size == 1 or not any(at_batch.size in out.shape[1:] for out in outputs):
        return
    call, batch = at_batch.call, at_batch.batch
    fewer = narrowed(batch.samples.leaves, batch.samples.dims, 0, at_batch.size - 1)
    flat = call.flat_call(fewer)
    with at_batch.undisturbed():
        try:
            fewer_outputs, _ = flat(*map(Tensor.clone, flat.primals))
        except Exception as error:  # a module may take batches of one size
            note("whether outputs have a dimension of other samples was not seen: %s", error)
            return
    for out, smaller in zip(outputs, fewer_outputs, strict=True):
        if out.shape[1:] != smaller.shape[1:]:
            raise ValueError(
                f"{at_batch.api}: outputs of a sample must have the same shape in every batch, got "
                f"shape {tuple(out.shape)} for {at_batch.size} samples and {tuple(smaller.shape)} "
                f"for {at_batch.size - 1}. Use a module that returns what belongs to each sample."
            )


def check_alone(batch: SampledCall, outputs: Leaves, instead: str) -> None:
    """Raise Refused unless each sample's outputs are those of the sample alone.

    Args:
        instead: what to do then, in words.
    """
    try:
        batch.check_alone(outputs, power=ITERATED)
    except Refused as refusal:
        raise Refused(
            f"{batch.api}: products evaluate the batch as a whole, in which each sample must be "
            "as it is alone, got a module that looks at numbers of the batch and goes another way "
            f"with a sample. {instead}"
        ) from refusal


def check_changed(at_batch: ModuleAtBatch, operations: Sequence[Any]) -> None:
    """Refuse samples that depend on each other, where other operations are called than at first.

    The first evaluation is taken as it is: products may be those of coupled samples, and cost too
    little for a comparison. Batches are compared at every call, if that is insisted on. Graphs do
    not count: those of evaluations that push tangents are others.
    """
    call, batch, independence = at_batch.call, at_batch.batch, at_batch.call.independence
    if independence.independent is True or is_traced():
        return
    if independence.independent == "always":
        call.check_independent(batch)
    module = (call.state.origin or call.state).module
    owner = module.func if isinstance(module, FunctionAsModule) else module
    signature = hash(tuple(operations))
    known = _signatures().get_or_make(owner, batch.kind.kind, set)
    if known and signature not in known:
        independence.compare(at_batch.api, lambda: call.subject(batch.samples))
    if len(known) >= MOST_KINDS:
        known.clear()
    known.add(signature)


@cache
def _signatures() -> Remembered[set[int]]:
    """Operations of modules and functions, whatever their state, that evaluations have called."""
    return Remembered()


def by_samples(at_batch: ModuleAtBatch, calls: list[FlatCall]) -> LeafFunction:
    """The module as a function of its parameters that calls it for each sample, under vmap.

    ``calls`` then holds the call of a sample.
    """
    batch = at_batch.batch

    def of_one(params: Leaves, data: Leaves) -> tuple[Leaves, Leaves]:
        call = batch.call_of(data)
        outputs, extras = call(*params)
        calls[:] = [call]
        return outputs, extras

    def of_all(*params: Tensor) -> tuple[Leaves, Leaves]:
        return batch.samples.map(of_one, params, [None] * len(params))

    return of_all


@dataclass(eq=False)
class Recorded:
    """A leaf function whose operations are recorded, inside of all that watches them.

    A watch may call others in their place, or some of its own.

    Args:
        call: the function.
        recorder: of the last evaluation.
        writes: how often that wrote into each of the primals.
    """

    call: Any
    recorder: OperationRecorder = field(default_factory=OperationRecorder)
    writes: tuple[int, ...] = ()

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        self.recorder = OperationRecorder()
        with untracked():
            ends, versions = [x.grad_fn for x in primals], _versions(primals)
        with self.recorder:
            result: tuple[Leaves, Leaves] = self.call(*primals)
        with untracked():
            self.writes = tuple(map(sub, _versions(primals), versions))
            self.recorder.graph = graph_number(result[0], ends)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)


def _versions(primals: Leaves) -> list[int]:
    """How often torch has written into each."""
    return [0 if x.is_inference() else x._version for x in primals]


@dataclass(frozen=True)
class InPlaceOf:
    """A leaf function that evaluates a call in a way of its own, and is watched as the call is."""

    func: LeafFunction
    call: Any

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        return self.func(*primals)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)


def pushing_operator(
    operator: JacobianOperator, tangents: Leaves
) -> tuple[JacobianOperator, list[Tensor]] | None:
    """An operator whose evaluation also pushes tangents, and the list of their products then.

    None for calls of a kind that must be watched: two evaluations are watched better than one.
    """
    call, products = operator.func, list[Tensor]()
    is_known = is_unwatched(call, (torch.is_grad_enabled(), False, 1))
    if not is_known or _are_split().get(*_kind_of(call)):
        return None

    def func(*copies: Tensor) -> tuple[Leaves, Leaves]:
        outputs, products[:], extras = push_on_graph(call, copies, tangents)
        return outputs, extras

    return JacobianOperator(InPlaceOf(func, call), operator.primals), products


def split(call: Any) -> None:
    """Evaluate calls of this kind twice from now on: to push tangents, and to keep a graph."""
    _are_split().put(*_kind_of(call), True)


@cache
def _are_split() -> Remembered[bool]:
    """Calls that are evaluated twice."""
    return Remembered()


def _kind_of(call: Any) -> tuple[Any, Any]:
    """The version of what is called, and the kind of the call."""
    return call.exact_kind.version, call.exact_kind.kind
