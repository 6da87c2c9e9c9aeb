"""Samples under vmap, of a kind that was evaluated before."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from jacfunc._assembly import owned, unit_seeds
from jacfunc._errors import Refused
from jacfunc._lending import ModuleState
from jacfunc._linear_map import linearize
from jacfunc._remembered import CallKind
from jacfunc._samples import SampledCall
from jacfunc._settled.batch import SettledBatch
from jacfunc._torch import inside_derivative, run_as_written, sweep_batch, untracked
from jacfunc._types import Leaves, Tree


class SettledSamples(SettledBatch):
    """Samples that were evaluated under vmap, each at the parameters, all rows of all at once."""

    exact_kind: CallKind | None = None
    """Of the earlier call."""

    @classmethod
    def under_vmap(
        cls, batch: SampledCall, state: ModuleState, call: object, output: Tree
    ) -> Self | None:
        """What a call by parameters alone has settled; None if it returned no single tensor."""
        if type(output) is not Tensor or batch.differentiates != (True, False):
            return None
        settled = cls(batch, tuple(state.point), output, is_watched=False, by_layers=False)
        settled.exact_kind = getattr(call, "exact_kind", None)
        return settled

    def blocks(self, state: ModuleState, x: Tensor, compared: Container[int]) -> Leaves | None:
        return None if state.hooks() else self._lent(state, x, lambda: self._swept(state, x))

    def _swept(self, state: ModuleState, x: Tensor) -> Leaves:
        params, (shape, dtype) = tuple(state.point.values()), self.output

        def of_one(leaves: Leaves) -> tuple[Leaves, Leaves]:
            call = _SampleCall(state, self.names, leaves[0], self.exact_kind)
            linearization = linearize(call, params)
            (out,) = linearization.outputs
            if (out.shape, out.dtype) != (shape[1:], dtype):
                raise Refused("it returns another output")
            return linearization.pull_batch(unit_seeds((out,), 0, out.numel())), ()

        products = owned(sweep_batch(of_one, (x,), "error", (0,))[0])
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
        exact_kind: of an earlier call: what is known of that one holds for this one.
    """

    state: ModuleState
    names: Sequence[str]
    x: Tensor
    exact_kind: CallKind | None

    @property
    def functions(self) -> list[Any]:
        """What runs when it is called."""
        return self.state.functions

    def __call__(self, *params: Tensor) -> tuple[Leaves, Leaves]:
        state, batch = self.state, self.x.clone().unsqueeze(0)
        chosen = dict(zip(self.names, params, strict=True))
        with state.lent_for_evaluation(chosen, (batch,)):
            out = run_as_written(state.module, batch)
            if inside_derivative():  # where no graph is looked at
                with untracked():
                    state.check_fresh((out,))
        if type(out) is not Tensor or out.shape[:1] != (1,):
            raise Refused("it returns another output")
        return (out.squeeze(0),), ()
