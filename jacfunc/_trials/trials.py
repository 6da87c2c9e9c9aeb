"""What a module does with samples, as trials tell: where outputs hold them, what they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from jacfunc._calls import FlatCall, OneTensor
from jacfunc._errors import is_out_of_memory
from jacfunc._lending import ModuleState
from jacfunc._linear_map import Dims, Samples, one_sample
from jacfunc._log import note
from jacfunc._remembered import Remembered
from jacfunc._samples import Subject
from jacfunc._torch import run_as_written
from jacfunc._trees import Arguments, Split, flatten, map_tensors, unflatten
from jacfunc._types import Leaves, Tree, is_differentiable


@dataclass(frozen=True)
class OutputDims:
    """For each leaf of the output the dimension of the samples; none if they are in front of all.

    States of recurrent layers have them in dimension 1, wherever the inputs have them.
    """

    dims: tuple[int, ...] = ()

    @classmethod
    def of(cls, returned: Callable[[int], Tree]) -> OutputDims:
        """From what a module returns for one sample, and, where that does not tell, for two.

        An output that has as many in front as there are samples has them there.
        """
        one = flatten(returned(1))[0]
        if not any(isinstance(out, Tensor) and 1 in out.shape[1:] for out in one):
            return IN_FRONT
        every = tuple(map(_dim_of, one, flatten(returned(2))[0]))
        return cls(every if any(every) else ())

    def in_front(self, output: Tree) -> Tree:
        """The output with the samples in front."""
        return self._each(output, lambda leaf, dim: leaf.movedim(dim, 0)) if self.dims else output

    def as_returned(self, output: Tree) -> Tree:
        """The output with the samples where the module has them, from one with them in front."""
        return self._each(output, lambda leaf, dim: leaf.movedim(0, dim)) if self.dims else output

    def _each(self, output: Tree, move: Callable[[Tensor, int], Tensor]) -> Tree:
        leaves, spec = flatten(output)
        pairs = zip(leaves, self.dims, strict=True)
        return unflatten(spec, [move(leaf, dim) if dim else leaf for leaf, dim in pairs])


IN_FRONT = OutputDims()


@dataclass(frozen=True)
class BatchOutputs:
    """What the module returned for all samples: leaves ``[B, *out]``, and how they are a tree."""

    leaves: Leaves
    extras: Leaves
    call: FlatCall | OneTensor
    dims: OutputDims = IN_FRONT

    def tree(self, leaves: Leaves) -> Tree:
        """What the module returns, with other leaves in it."""
        return self.dims.as_returned(self.call.value(leaves, self.extras)[0])

    @property
    def are_in_front(self) -> bool:
        """Does the module itself return the samples in front?"""
        return not self.dims.dims


def of_one(api: str, output: Tree) -> Tree:
    """What a module returned for a batch of one, without the batch, which a loss does not have."""
    return map_tensors(partial(_without_batch, api), output)


def _without_batch(api: str, output: Tensor) -> Tensor:
    """One output without the batch."""
    if output.dim() and output.shape[0] != 1:
        raise ValueError(
            f"{api}: per_sample needs every output to have the batch in front, got shape "
            f"{tuple(output.shape)} for a batch of one. Use a module that transposes it, or "
            "that returns other outputs alone."
        )
    return output.squeeze(0)


def _dim_of(one: object, two: object) -> int:
    """The first dimension that has one entry for one sample, and two for two."""
    if not (isinstance(one, Tensor) and isinstance(two, Tensor)):
        return 0
    sizes = zip(one.shape, two.shape, strict=False)
    return next((dim for dim, pair in enumerate(sizes) if pair == (1, 2)), 0)


@cache
def _known_dims() -> Remembered[OutputDims]:
    """Where outputs hold the samples, by the version of a module and the kind of call."""
    return Remembered()


@dataclass(frozen=True)
class Trials:
    """Evaluations of a module that are made once for calls of a kind, to see what it does.

    Args:
        split: the call's arguments.
        evaluate: what the module returns for tensors in the place of those of the call; before
            that it calls a function, of which nothing stays that it sets on the module.
    """

    api: str
    state: ModuleState
    split: Split
    evaluate: Callable[[Leaves, Callable[[], object]], Tree]

    def output_dims(self, leaves: Leaves, dims: Dims) -> OutputDims:
        """Where the outputs hold the samples that the leaves hold in these dimensions."""

        def make() -> OutputDims:
            own = one_sample(leaves, dims, 0)
            kinds = replace(self.split, leaves=own).kinds  # the same for a batch of any size
            return _known_dims().get_or_make(version, (kinds, *dims), lambda: self._dims(own, dims))

        version, kind = self.state.version, (self.split.kinds, tuple(dims))
        return _known_dims().get_or_make(version, kind, make)

    def _dims(self, own: Leaves, dims: Dims) -> OutputDims:
        def returned(count: int) -> Tree:
            pairs = zip(own, dims, strict=True)
            batch = [x if dim is None else torch.stack([x] * count, dim) for x, dim in pairs]
            return self.evaluate(tuple(batch), int)

        try:
            return OutputDims.of(returned)
        except Exception as error:  # the call itself tells what is wrong, if anything is
            is_told = type(error) is RuntimeError and str(error).startswith(f"{self.api}: ")
            if is_told or is_out_of_memory(error):
                raise
            note("where outputs hold the samples was not seen: %s", error)
            return IN_FRONT

    def check_norms(self, names: tuple[str, ...], leaves: Leaves) -> None:
        """Refuse the batch normalizations with these names, if the module calls one.

        Raises:
            ValueError: if it does.
        """
        kind = names, self.split.kinds
        if _unused_norms().get(self.state.version, kind):
            return
        if called := self._called(names, leaves):
            raise ValueError(
                f"{self.api}: per_sample needs samples that do not depend on each other, got batch "
                f"normalization over the batch in {called[0] or 'the module'}. "
                "Call module.eval(), or leave per_sample out."
            )
        _unused_norms().put(self.state.version, kind, True)

    def _called(self, names: Sequence[str], leaves: Leaves) -> list[str]:
        """Which of these submodules an evaluation calls; those of TorchScript do not tell."""
        parts = self.state.parts
        called = [name for name in names if parts[name].is_scripted]
        if called:
            return called

        def watch() -> None:
            for name in names:
                parts[name].module.register_forward_pre_hook(partial(_note_call, called, name))

        try:
            self.evaluate(leaves, watch)
        except Exception:
            if not called:
                raise
        return called


def _note_call(called: list[str], name: str, *_: Any) -> None:
    called.append(name)


def batch_norms(state: ModuleState) -> tuple[str, ...]:
    """The names of batch normalizations that take the batch for their statistics."""
    return _norms().get_or_make(state.origin or state, None, lambda: tuple(_over_batch(state)))


def _over_batch(state: ModuleState) -> Iterator[str]:
    for name, part in state.parts.items():
        module = part.module
        scripted = str(module.original_name) if part.is_scripted else ""
        is_norm = isinstance(module, _BatchNorm) or "BatchNorm" in scripted
        if is_norm and (module.training or part.buffers.get("running_mean") is None):
            yield name


@cache
def _norms() -> Remembered[tuple[str, ...]]:
    """The names of such normalizations in a state."""
    return Remembered()


@cache
def _unused_norms() -> Remembered[bool]:
    """Kinds of calls of a module that call none of these."""
    return Remembered()


def subject_of(
    state: ModuleState,
    merge: Callable[[Leaves], Arguments],
    in_front: Callable[[Tree], Tree],
    samples: Samples,
    width: int,
    by_inputs: bool,
) -> Subject:
    """What is compared: a module at a batch, with all parameters but TorchScript's."""
    values = _compared_parameters(state)

    def whole(params: Leaves, leaves: Leaves) -> Leaves:
        args, kwargs = merge(leaves)
        with state.lent_for_evaluation(dict(zip(values, params, strict=True))):
            output = run_as_written(state.module, *args, **kwargs)
        return tuple(filter(is_differentiable, flatten(in_front(output))[0]))

    params = tuple(values.values())
    return Subject(whole, params, samples, width, by_inputs, state.as_evaluated)


def _compared_parameters(state: ModuleState) -> dict[str, Tensor]:
    """All differentiable parameters but TorchScript's, with the values to differentiate at."""
    parts = [part for part in state.parts.values() if part.is_scripted]
    scripted = {id(param) for part in parts for param in part.params.values()}
    return {
        name: state.point.get(name, param)
        for name, param in state.params.items()
        if is_differentiable(param) and id(param) not in scripted
    }
