"""Samples under vmap, of a kind that was evaluated before."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Self

import torch
from torch import Tensor

from jacfunc._assembly import owned, unit_seeds
from jacfunc._calls import BARE, OneTensor
from jacfunc._errors import Refused
from jacfunc._lending import ModuleState
from jacfunc._linear_map import linearize
from jacfunc._remembered import CallKind
from jacfunc._samples import SampledCall
from jacfunc._settled.batch import SettledBatch
from jacfunc._settled.repeated import blocks_of
from jacfunc._settled.sweeps import Beside, Work
from jacfunc._settled.works import KnownWork
from jacfunc._torch import inside_derivative, run_as_written, sweep_batch, untracked
from jacfunc._trees import Given, flatten
from jacfunc._types import Leaves, Tree


class SettledSamples(SettledBatch):
    """Samples that were evaluated under vmap, each at the parameters, all rows of all at once."""

    exact_kind: Hashable = None
    """Of the earlier call, if there is one. It is of this module, which it does not keep alive."""

    @classmethod
    def under_vmap(
        cls, batch: SampledCall, state: ModuleState, call: object, output: Tree
    ) -> Self | None:
        """What a call by parameters alone has settled; None if it returned no single tensor."""
        returned = OneTensor.of(output)
        if returned is None or batch.differentiates != (True, False):
            return None
        how: Any = tuple(state.point), flatten(output)[0][0], False, False, (), returned
        settled = cls(batch, *how)
        settled.works[blocks_of] = KnownWork(blocks_of)
        exact_kind: CallKind | None = getattr(call, "exact_kind", None)
        settled.exact_kind = exact_kind and exact_kind.kind
        return settled

    def result(
        self,
        state: ModuleState,
        given: Given,
        compared: Container[int],
        work: Work,
        beside: Leaves | Beside = (),
        api: str = "",
    ) -> Leaves | None:
        """The blocks; None of other works, and where the call must be taken anew."""
        if work is not blocks_of or state.hooks():
            return None
        result = self._lent(state, given, partial(self._swept, state, given))
        self.works[work].calls += result is not None
        return result

    def _swept(self, state: ModuleState, given: Given) -> Leaves:
        params, (shape, dtype) = tuple(state.point.values()), self.output

        kind = self.exact_kind
        exact_kind = None if kind is None else CallKind(state.module, kind, state.version)

        def of_one(leaves: Leaves) -> tuple[Leaves, Leaves]:
            call = _SampleCall(state, self.names, leaves, given, self.returned, exact_kind)
            linearization = linearize(call, params)
            (out,) = linearization.outputs
            if (out.shape, out.dtype) != (shape[1:], dtype):
                raise Refused("it returns another output")
            return linearization.pull_batch(unit_seeds((out,), 0, out.numel())), ()

        tensors = given.tensors
        products = owned(sweep_batch(of_one, tensors, "error", (0,) * len(tensors))[0])
        return tuple([self._block(rows) for rows in products])

    def _block(self, rows: Tensor) -> Tensor:
        """The block ``[B, *out, *param]`` of rows ``[B, K, *param]``."""
        shape, dtype = self.output
        block = rows if len(shape) == 2 else rows[:, 0]
        if len(shape) > 2:
            block = rows.unflatten(1, shape[1:])
        return block if block.dtype == dtype else block.to(torch.promote_types(block.dtype, dtype))


@dataclass(eq=False)
class _SampleCall:
    """The module at one sample, as a function of its parameters.

    Args:
        names: of the parameters.
        leaves: the tensors of the sample.
        given: the tensors of all samples.
        returned: the tree in which the module returns one tensor.
        exact_kind: of an earlier call: what is known of that one holds for this one.
    """

    state: ModuleState
    names: Sequence[str]
    leaves: Leaves
    given: Given
    returned: OneTensor
    exact_kind: CallKind | None

    @property
    def functions(self) -> list[Any]:
        """What runs when it is called."""
        return self.state.functions

    def __call__(self, *params: Tensor) -> tuple[Leaves, Leaves]:
        state = self.state
        batch = tuple(map(Tensor.unsqueeze, map(Tensor.clone, self.leaves), repeat(0)))
        chosen = dict(zip(self.names, params, strict=True))
        with state.lent_for_evaluation(chosen, batch):
            given = self.given
            called = state.module if given.merge is None else given.called(state.module)
            output = run_as_written(called, *batch)
            out = output if self.returned is BARE else self.returned.tensor_in(output)
            if inside_derivative():  # where no graph is looked at
                with untracked():
                    state.check_fresh((out,))
        if type(out) is not Tensor or out.shape[:1] != (1,):
            raise Refused("it returns another output")
        return (out.squeeze(0),), ()
