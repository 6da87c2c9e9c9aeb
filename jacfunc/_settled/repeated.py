"""One more evaluation of a batch, of which earlier ones have shown all but the numbers."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import reduce
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from jacfunc._assembly import empty, owned, shared_units
from jacfunc._errors import UnseenWrite
from jacfunc._factored import (
    UNSEEN_WRITE,
    Derived,
    Direct,
    FactoredJacobian,
    LearnedUses,
    Use,
    UseRecorder,
    graph_behind,
    use_recorder,
)
from jacfunc._layouts import OperationRecorder, WhatWasSeen
from jacfunc._linear_map import (
    Anchor,
    Graph,
    LeadsOut,
    differentiable_alias,
    graph_number,
    map_of_graph,
    writable_copy,
)
from jacfunc._settled.following import Following, PlainRecorder, Reads
from jacfunc._torch import Graphs, Pull
from jacfunc._traces import Sources
from jacfunc._types import Leaves

_VERSION = attrgetter("_version")


class RepeatedEvaluation:
    """What a function of parameters and of tensors with samples in front gets, and its graph.

    It is made while autograd records. The function is called with ``handles`` and ``tensors``; of
    what it returns :meth:`jacobian` is the Jacobian.

    Args:
        params: what all samples share, and it is differentiated by.
        tensors: those of all samples.
        learned: what earlier evaluations have shown.
        by_layers: are operations looked for that use parameters? Else these are differentiated as
            they are, which one sample alone allows.
        inputs: numbers of the tensors that it is differentiated by, too.
        sources: where the tensors that a sweep may read are kept, if they are.
        reads: what is known of operations that use parameters; by layers they are looked for else.
    """

    recorder: OperationRecorder
    is_batchable = True
    """Are many cotangents pulled back at once?"""
    splits = False
    """Do nodes of a user's own take them one by one then?"""

    def __init__(
        self,
        params: Leaves,
        tensors: Leaves,
        learned: LearnedUses,
        by_layers: bool,
        inputs: tuple[int, ...],
        sources: Sources | None = None,
        reads: Reads | None = None,
    ) -> None:
        count, self._size, self._learned = len(params), tensors[0].shape[0], learned
        self._lent = lent = learned.lent if by_layers else reads.lent if reads else set[int]()
        self.is_watched = reads is None or reads.is_watched
        primals = map(Tensor.clone, params) if any(map(Tensor.is_inference, params)) else params
        self.handles = anchors = [*map(Tensor.requires_grad_, map(Tensor.detach, primals))]
        if lent and reads is None:  # rules pull back to what each use gets
            self.handles = [*map(Tensor.view_as, anchors, anchors)]
        if len(lent) < count:
            pairs = enumerate(zip(self.handles, anchors, strict=True))
            self.handles = [own if n in lent else writable_copy(x) for n, (own, x) in pairs]
        self.tensors: Leaves = ()  # no comprehensions here, as every settled call makes these
        for n, x in enumerate(tensors):
            own = writable_copy(differentiable_alias(x, False)) if n in inputs else x.clone()
            self.tensors += (own,)
        self.primals: Leaves = (*self.handles, *map(self.tensors.__getitem__, inputs))
        # a leaf stands for itself, as its node is made where it is used
        self.starts: dict[Any, int] = {x.grad_fn or id(x): n for n, x in enumerate(self.primals)}
        self.first = Graphs.num_nodes()
        if by_layers and reads is None:
            self.recorder = use_recorder(anchors, self.handles, self.starts, learned, self._size)
        else:
            self.recorder = self._recorder(sources, reads)
        if sources is not None:
            self.recorder.kinds, self.recorder.arguments = sources.kinds, sources.arguments
            by_uses = reads.operations if reads else learned.uses
            # without layers autograd has saved what a sweep reads
            self.recorder.wanted = by_uses if by_layers else () if reads or not count else None
            self._versions = [*map(_VERSION, self.handles)]
        # the function may write into these; where uses are known, nothing is pulled back
        if reads is None:
            self._params = (*params, *[tensors[n][0] for n in inputs])
            self._direct = [] if by_layers else [Direct(number, None) for number in range(count)]
            self._direct += map(Direct, range(count, len(self.primals)))
            direct = [self.primals[each.number] for each in self._direct]
            self._anchors = [*map(Anchor.behind, direct)]

    def _recorder(self, sources: Sources | None, reads: Reads | None) -> PlainRecorder:
        """What records operations where no use of a parameter is looked for."""
        ids = {*map(id, map(self.handles.__getitem__, self._lent))}
        if sources is None or reads is None or reads.steps is None:
            return PlainRecorder(ids, reads and reads.operations)
        return Following(reads.steps, ids, reads.operations)

    def check_unwritten(self) -> None:
        """Look whether a parameter that is no copy was written into, where sources are kept.

        Raises:
            UnseenWrite: if one was.
        """
        now, before = [*map(_VERSION, self.handles)], self._versions
        if now != before and any(now[n] != before[n] for n in self._lent):
            raise UnseenWrite(UNSEEN_WRITE)

    def reads(self, arguments: Mapping[int, Sequence[Tensor]]) -> Reads:
        """Operations that have read parameters, by the tensors that operations got, by numbers."""
        if isinstance(self.recorder, UseRecorder):
            uses = [use.key[0] for use in self.recorder.uses]
            return Reads({n: self._learned.uses[n].func for n in uses}, self._lent)
        versions = [handle._version for handle in self.handles]
        written = [n for n, version in enumerate(versions) if version != self._versions[n]]
        return Reads.of(self.recorder.operations, arguments, self.handles, written)

    def pull(self, around: tuple[Any, ...]) -> Pull:
        """The pullback that follows, as a watch of the evaluation must know it."""
        return Pull(None, around, LeadsOut(self.starts, grad_mode=False, has_left=False))

    def jacobian(
        self, out: Tensor, as_evaluated: Callable[[], None] | None
    ) -> FactoredJacobian | None:
        """The Jacobian of what the function returned; None if parameters are used otherwise.

        An operation may raise an error, if it is not what was known of it. What was evaluated is
        put back ``as_evaluated`` before each pullback.
        """
        recorder, uses, derived = self.recorder, list[Use](), dict[int, Derived]()
        if isinstance(recorder, UseRecorder):
            unruled, uses, derived = recorder.finish(), recorder.uses, recorder.derived.by_number
            graph, met = graph_behind((out,), recorder, self.starts)
            others, count = met - {direct.number for direct in self._direct}, len(self._params)
            if self._learned.learn(count, others, unruled.numbers, unruled.written) or others:
                return None
        else:
            graph = Graph.back_to(set(self.starts), (out,))
            recorder.graph = graph_number((out,), self.starts)
        if graph.leads_out and self.handles:
            return None
        targets = [*(use.anchor for use in uses), *self._anchors]
        linearization = map_of_graph((out,), (), targets, graph, False, as_evaluated)
        if not linearization.is_batchable:
            return None
        linearization.is_batchable, linearization.splits = self.is_batchable, self.splits
        how = self._size, uses, self._direct, self._params, linearization, derived
        return FactoredJacobian(
            *how,
            signature=recorder.signature,
            moves_samples=recorder.moves_samples,
            moves_unseen=recorder.moves_unseen,
            reads_values=recorder.reads_values,
            apart=recorder.apart,
        )


def knows(learned: LearnedUses, seen: WhatWasSeen, compared: Container[int]) -> bool:
    """Does what was learned of many samples hold for an evaluation with these operations?

    Args:
        compared: signatures of evaluations after which batches were compared.
    """
    if seen.moves_samples and learned.moves_anew(seen):  # asked of few: most move none
        return False
    return knows_signature(learned, seen.signature, compared, seen.reads_values)


def knows_signature(
    learned: LearnedUses, signature: int, compared: Container[int], reads_values: bool = False
) -> bool:
    """As :func:`knows`, of operations that move no samples; does Python read numbers of them?"""
    if learned.moves_samples or learned.others or (learned.mixes and not reads_values):
        return False
    return signature in learned.signatures and signature in compared


def blocks_of(jacobian: FactoredJacobian, seeds: Leaves = ()) -> Leaves:
    """Blocks ``[B, *out, *primal]`` of the only output, from one sweep of all its rows."""
    outputs, params = jacobian.linearization.outputs, jacobian.params
    (out,), seeds = outputs, shared_units(outputs)
    dtypes = [torch.promote_types(x.dtype, out.dtype) for x in params]
    if jacobian.uses:
        lead = jacobian.size, len(seeds[0])
        blocks = list(map(empty, params, [(*lead, *x.shape) for x in params], dtypes))
        _write(jacobian, seeds, blocks)
    else:
        rows = _rows(jacobian, seeds)
        blocks = [x.to(dtype) for x, dtype in zip(rows, dtypes, strict=True)]
    if out.dim() == 2:
        return tuple(blocks)
    return tuple([x.unflatten(1, out.shape[1:]) if out.dim() > 1 else x[:, 0] for x in blocks])


def matrix_of(jacobian: FactoredJacobian, seeds: Leaves = ()) -> Leaves:
    """The Jacobian ``[B, M, N]`` of the only output, from one sweep, written without a copy."""
    (out,), seeds = jacobian.linearization.outputs, shared_units(jacobian.linearization.outputs)
    widths = [x.numel() for x in jacobian.params]
    dtypes = {x.dtype for x in (*jacobian.params, out)}
    lead = jacobian.size, len(seeds[0])
    matrix = empty(out, (*lead, sum(widths)), reduce(torch.promote_types, dtypes))
    pairs = zip(matrix.split(widths, 2), jacobian.params, strict=True)
    _write(jacobian, seeds, [part.view(*lead, *x.shape) for part, x in pairs])
    return (matrix,)


def _write(jacobian: FactoredJacobian, seeds: Leaves, places: Sequence[Tensor]) -> None:
    """Write the rows of these seeds into places ``[B, K, *primal]``."""
    if jacobian.uses:
        jacobian.write_rows(seeds, lambda: places)
        return
    for place, rows in zip(places, _rows(jacobian, seeds), strict=True):
        place.copy_(rows)


def _rows(jacobian: FactoredJacobian, seeds: Leaves) -> list[Tensor]:
    """Rows ``[B, K, *primal]`` where no operation with a rule uses a parameter, in own memory."""
    products = owned(jacobian.linearization.pull_batch(seeds), seeds)
    pairs = zip(jacobian.direct, products, strict=True)
    return [x.unsqueeze(0) if d.dim is None else x.movedim(d.dim + 1, 0) for d, x in pairs]
