"""The call of a function, of which some outputs are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._calls import FlatCall
from jacfunc._linear_map import Samples, narrowed
from jacfunc._outputs.by_value import ByValue
from jacfunc._outputs.choice import Numbered, OutputChoice, OwnNumbers, Returned
from jacfunc._remembered import CallKind
from jacfunc._samples import FirstSamples, SampledCall
from jacfunc._torch import is_outermost
from jacfunc._trees import Split
from jacfunc._types import Blocks, Leaves, Tree

Asked = OutputChoice | ByValue
"""What outputs a user asks for, before there is a call."""


@dataclass(frozen=True, eq=False)
class ChosenOutputs:
    """The outputs of one call that are asked for, as they are now known.

    Args:
        is_of_samples: do the choice's tensors hold something for each sample?
        lead: how many dimensions are in front of outputs of the whole call: those of samples.
        keeps_all: are all outputs returned beside them?
    """

    api: str
    choice: OutputChoice
    is_of_samples: bool
    lead: int
    keeps_all: bool = False

    @classmethod
    def of_call(
        cls, api: str, asked: Asked, keeps_all: bool, returned: Callable[[], Tree]
    ) -> ChosenOutputs:
        """The outputs that are asked for of a call as a whole.

        Args:
            returned: evaluates the call; it is called if the choice depends on values.
        """
        if isinstance(asked, ByValue):
            leaves = tuple([leaf.unsqueeze(0) for leaf in Split.of(returned()).leaves])
            asked = OwnNumbers(asked.numbers_of(api, leaves)[0])
        return cls(api, asked, asked.is_of_samples(api, None, list), 0, keeps_all)

    @classmethod
    def of_batch(
        cls, batch: SampledCall, asked: Asked, keeps_all: bool = False, at_once: int | None = None
    ) -> ChosenOutputs:
        """The outputs that are asked for of each sample of a batch.

        Args:
            at_once: how many samples are evaluated at once, if the choice depends on values.

        Raises:
            ValueError: if what is asked for does not fit the samples.
            NotImplementedError: if it depends on outputs that are drawn at random.
        """
        api = batch.api
        if isinstance(asked, ByValue):
            asked = OwnNumbers(_numbers_of(batch, asked, at_once or max(1, batch.size)))
        is_of_samples = asked.is_of_samples(api, batch.size, partial(_ranks, batch))
        return cls(api, asked, is_of_samples, 1, keeps_all)

    def among(self, kind: CallKind) -> CallKind:
        """A kind of call, with these outputs."""
        return kind.among("outputs", self.choice.kind, self.keeps_all)

    def of_whole(
        self, call_of: Callable[[Leaves | None], FlatCall], leaves: Leaves | None
    ) -> ChosenCall:
        """The whole call with these outputs alone.

        Args:
            leaves: the tensors of the call, and behind them those of the choice; None for the
                tensors that both have already.
        """
        count = len(self.choice.tensors)
        if leaves is None:
            return ChosenCall(call_of(None), self, self.choice.tensors, self.lead)
        split = len(leaves) - count
        return ChosenCall(call_of(leaves[:split]), self, leaves[split:], self.lead)

    def without_own(self, samples: Samples) -> Samples:
        """The data of samples without the tensors of the choice."""
        count = len(samples.leaves) - len(self.choice.tensors)
        return replace(samples, leaves=samples.leaves[:count], dims=samples.dims[:count])

    def of_samples(self, batch: SampledCall) -> SampledCall:
        """A call at many samples with these outputs alone; the choice's tensors are data of it."""
        every, count, whole = batch.samples, len(batch.samples.leaves), batch.whole
        tensors = self.choice.tensors
        dims = [*every.dims, *[0 if self.is_of_samples else None] * len(tensors)]
        samples = replace(every, leaves=(*every.leaves, *tensors), dims=dims)

        def call_of(leaves: Leaves) -> FlatCall:
            return ChosenCall(batch.call_of(leaves[:count]), self, leaves[count:], 0)

        def whole_of(leaves: Leaves) -> tuple[FlatCall, Mapping[int, int]]:
            assert whole is not None
            call, places = whole(leaves[:count])
            return ChosenCall(call, self, leaves[count:], 1), places

        return replace(
            batch,
            call_of=call_of,
            samples=samples,
            kind=self.among(batch.kind),
            whole=whole and whole_of,
        )


def _ranks(batch: SampledCall) -> list[int]:
    """How many dimensions the outputs of one sample have."""
    call = batch.call_of_sample(0)
    with torch.no_grad():
        call(*map(Tensor.clone, call.primals))
    return list(map(len, call.output_shapes))


def _numbers_of(batch: SampledCall, asked: ByValue, at_once: int) -> Tensor:
    """The numbers ``[B, R]`` of the outputs that the samples' values choose."""
    before, every = batch.random_state(), []
    for start in range(0, max(1, batch.size), at_once):
        stop = min(start + at_once, batch.size)
        every.append(asked.numbers_of(batch.api, _evaluated(batch, start, stop), start))
    if before.has_changed():
        raise NotImplementedError(
            f"{batch.api}: with {type(asked).__name__} outputs must be the same each time, got a "
            "module that draws random numbers. Pass the numbers of outputs [B, R]."
        )
    return torch.cat(every)


def _evaluated(batch: SampledCall, start: int, stop: int) -> Leaves:
    """The outputs of the samples from start to stop."""
    if is_outermost():
        return batch.factors(start, stop)[0].outputs
    every = batch.samples  # inside a transform there is one way to evaluate all of them
    samples = replace(every, leaves=narrowed(every.leaves, every.dims, start, stop))
    return FirstSamples(batch.call_of, samples, batch.random_state()).outputs(stop - start)


class ChosenCall(FlatCall):
    """A call whose outputs are those that are asked for: one leaf ``[*lead, R]``.

    Extras begin with all outputs, if these are kept; else its value is the outputs asked for.
    """

    def __init__(self, call: FlatCall, chosen: ChosenOutputs, own: Leaves, lead: int) -> None:
        vars(self).update(vars(call))
        self.chosen, self.own, self._lead = chosen, own, lead
        self._count = 0
        self._rows_shape = torch.Size()

    @property
    def call_kind(self) -> CallKind:
        return self.chosen.among(super().call_kind)

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        every, extras = super().__call__(*primals)
        rows = self.chosen.choice.of(self.returned(every, self._lead), self.own)
        self._rows_shape, self._count = rows.shape, len(every) if self.chosen.keeps_all else 0
        return (rows,), (*every[: self._count], *extras)

    def returned(self, leaves: Leaves, lead: int) -> Returned:
        """Leaves like the outputs, of which some are chosen."""
        align = super().aligned_outputs
        return Returned(self.chosen.api, leaves, lead, lambda tree: align("outputs", tree))

    def of_every_output(self) -> FlatCall:
        """The call with all outputs, with the trees of its last evaluation."""
        every = FlatCall.__new__(FlatCall)
        vars(every).update(vars(self))
        return every

    def all_and_others(self, extras: Leaves) -> tuple[Leaves, Leaves]:
        """All outputs, which are kept in front of the other extras; and the other extras."""
        return extras[: self._count], extras[self._count :]

    def rows_of(self, leaves: Leaves, lead: int) -> Tensor:
        """The part ``[*lead, R]`` of leaves ``[*lead, *out]`` like all outputs."""
        return self.chosen.choice.of(self.returned(leaves, lead), self.chosen.choice.tensors)

    def spread(self, rows: Tensor, like: Leaves) -> Leaves:
        """Leaves like all outputs, with ``rows [B, R]`` where these are asked for, else zero."""
        choice = self.chosen.choice
        assert isinstance(choice, Numbered)
        zeros = tuple(map(torch.zeros_like, like))
        return choice.completed(self.returned(zeros, self.chosen.lead), choice.tensors, rows)

    def check_once(self, every: Leaves) -> None:
        """Refuse sums of outputs, and outputs of which one is asked for twice."""
        choice, api = self.chosen.choice, self.chosen.api
        if not isinstance(choice, Numbered):
            raise TypeError(
                f"{api}: outputs must be numbers, a slice, TopK or Sampled, in which a loss has a "
                "second derivative, got cotangents. For the sum of Jᵀ c cᵀ J over cotangents c "
                "call jacfunc.ggn(module, None, outputs=c)."
            )
        row = self.returned(every, self.chosen.lead).row
        numbers = choice.numbers(api, row.shape[-1], choice.tensors, row.device).sort(-1).values
        if bool((numbers[..., 1:] == numbers[..., :-1]).any()):
            raise ValueError(
                f"{api}: outputs must name each output of a sample once, got one of them twice. "
                "Leave the second out."
            )

    def value(self, outputs: Leaves, extras: Leaves) -> tuple[Tree, Tree]:
        if self.chosen.keeps_all:
            return super().value(*self.all_and_others(extras))
        return outputs[0], self._beside.merge(extras)[1] if self._beside else None

    def jacobian(self, blocks: Blocks) -> Tree:
        return self.input_tree(blocks[0])

    @property
    def output_shapes(self) -> list[torch.Size]:
        return [self._rows_shape]

    def output_tree(self, values: Sequence[Any]) -> Tree:
        return values[0]

    def aligned_outputs(self, name: str, tree: Tree) -> Leaves:
        return (tree,)

    def output_paths(self) -> list[str]:
        return ["outputs"]
