"""Options of the doors for modules, and checks of a call, before anything is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, ClassVar, Self, TypeAlias, TypedDict

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from jacfunc._arguments import check_chunk_size, check_flags, check_memory, check_randomness
from jacfunc._calls import CUT_OFF
from jacfunc._lending import CurrentState, ModuleState, Select
from jacfunc._memory import Budget
from jacfunc._modules.function import FunctionAsModule, FunctionState, check_called
from jacfunc._modules.independence import FEW_CALLS, Independence, Independent
from jacfunc._outputs import Asked, Outputs, choice_of
from jacfunc._remembered import Remembered
from jacfunc._torch import inside_derivative
from jacfunc._trees import Arguments, Split, check_batch, flatten, sample_dims
from jacfunc._types import Memory, Randomness, Tree, is_differentiable


@dataclass(frozen=True)
class Batching:
    """Which dimensions of the inputs hold the samples, and how samples draw random numbers."""

    in_dims: Tree = 0
    randomness: Randomness = "error"


class SampleOptions(TypedDict, total=False):
    """What all doors for the samples of a module take by keyword."""

    select: Select
    in_dims: Tree
    randomness: Randomness
    chunk_size: int | None
    memory: Memory
    independent: Independent


class RowOptions(SampleOptions, total=False):
    """What the doors take that ask for rows of a Jacobian."""

    outputs: Outputs


@dataclass(frozen=True)
class ModuleOptions:
    """A module, and what a user has said about all calls of it: read here for every door.

    Args:
        batching: of the samples of each call; None for calls that are taken as a whole.
        memory: bytes that a call may take; None for no limit.
        copy: are later answers computed from copies, or else from the tensors themselves?
        stays: are all calls made at the parameters of the first, whatever becomes of the module?
        outputs: which outputs are asked for; None for all.
    """

    api: str
    module: Callable[..., Any]
    select: Select
    batching: Batching | None
    chunk_size: int | None
    memory: int | None
    independence: Independence
    copy: bool = True
    stays: bool = False
    outputs: Asked | None = None
    takes_functions: ClassVar[bool] = False

    @classmethod
    def read(
        cls,
        api: str,
        module: Callable[..., Any],
        select: Select,
        batching: Batching | None,
        chunk_size: int | None,
        memory: Memory,
        independent: Independent,
        at_once: int | None = None,
        by_rows: bool = True,
        copy: bool = True,
        stays: bool = False,
        outputs: Outputs | Asked = None,
    ) -> Self:
        """The options of a door, checked; for ``at_once`` and ``by_rows`` see Independence.

        Raises:
            TypeError, ValueError: options that do not fit.
        """
        (check_called if cls.takes_functions else check_module)(api, module)
        if chunk_size is not None:
            check_chunk_size(api, chunk_size)
        check_flags(api, copy=copy)
        nbytes = None if memory is None else check_memory(api, memory)
        if batching is not None:
            check_randomness_option(api, batching.randomness)
        few = at_once if nbytes is None else at_once or FEW_CALLS
        by_all_rows = by_rows and outputs is None
        return cls(
            *(api, module, select, batching, chunk_size, nbytes),
            Independence.of(api, independent, few, by_all_rows),
            copy,
            stays,
            None if outputs is None else choice_of(api, outputs),
        )

    @cached_property
    def current(self) -> CurrentState:
        """The state of the module from call to call."""
        assert isinstance(self.module, nn.Module)
        kind = FunctionState if isinstance(self.module, FunctionAsModule) else ModuleState
        return CurrentState(self.api, self.module, self.select, self.stays, kind)

    def kept(self, data: Tree, budget: Budget) -> tuple[ModuleState, Tree]:
        """The state at a call that begins, and its data, for answers that come later."""
        with budget.keeping():
            return self.current.kept(data, self.copy)


StateCheck: TypeAlias = Callable[[str, ModuleState], None]


@cache
def _passed() -> Remembered[bool]:
    """The states that a check has passed."""
    return Remembered()


def _once_for_a_state(check: StateCheck) -> StateCheck:
    """The check, which is not made again of a state that has passed it: states do not change.

    A copy passes if the state that it was made from does: it has the same parts.
    """

    @wraps(check)
    def once(api: str, state: ModuleState) -> None:
        origin = state.origin or state
        if not _passed().get(origin, check):
            check(api, state)
            _passed().put(origin, check, True)

    return once


def check_module(api: str, module: object) -> None:
    """Refuse what is no module: functions have doors of their own."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{api}: module must be an nn.Module, got {type(module).__name__}. "
            "For a function use jacfunc.jacobian."
        )


def check_randomness_option(api: str, randomness: object) -> None:
    """Refuse another word than those that vmap knows."""
    check_randomness(api, randomness, "Let all samples draw the same numbers, or each its own.")


def batching_of(
    api: str, per_sample: bool, in_dims: Tree, randomness: Randomness
) -> Batching | None:
    """How samples lie in a batch; None for a call as a whole, of which there are no dimensions."""
    check_randomness_option(api, randomness)
    if per_sample:
        return Batching(in_dims, randomness)
    if type(in_dims) is not int or in_dims != 0:
        raise ValueError(
            f"{api}: in_dims must come with per_sample=True, got {in_dims!r} without it. Pass "
            "per_sample=True, or leave in_dims out."
        )
    return None


def check_call(api: str, create_graph: bool) -> None:
    """Refuse a detached result inside another derivative."""
    if not create_graph and inside_derivative():
        raise ValueError(CUT_OFF.format(api=api))


@_once_for_a_state
def check_devices(api: str, state: ModuleState) -> None:
    """Refuse modules on several devices."""
    for name, part in state.parts.items():
        module = part.module
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"{api}: a module must run on one device, got DataParallel over "
                f"{len(module.device_ids)} in {name or 'the module'}. Pass module.module instead."
            )


def check_module_inputs(api: str, inputs: Tree) -> None:
    """Refuse inputs to differentiate by of which none is differentiable."""
    leaves = flatten(inputs)[0]
    if leaves and not any(map(is_differentiable, leaves)):
        kinds = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves})
        raise TypeError(
            f"{api}: with wrt='inputs' these must hold at least one floating point tensor to "
            f"differentiate, got {', '.join(kinds)}. Pass wrt='params', or floating point inputs."
        )


@_once_for_a_state
def check_parameters(api: str, state: ModuleState) -> None:
    """Refuse chosen parameters of TorchScript, whose compiled code may take them for constants."""
    for part in state.parts.values():
        if part.is_scripted:
            own = {id(param) for param in part.params.values()}
            if name := next((n for n in state.point if id(state.params[n]) in own), None):
                raise ValueError(
                    f"{api}: parameters must be those of Python modules, got {name} of "
                    "TorchScript. Pass wrt='inputs', or the module that it was made from."
                )


def dims_of_samples(
    api: str, in_dims: Tree, arguments: Arguments, split: Split
) -> tuple[list[int | None], list[int | None]]:
    """The dimension of the samples in each leaf of the arguments, and in each tensor, checked."""
    check_packed(api, arguments)
    every_dim = sample_dims(api, in_dims, arguments, split)
    dims = [d for d, is_leaf in zip(every_dim, split.is_chosen, strict=True) if is_leaf]
    check_batch(api, split.leaves, dims)
    return every_dim, dims


def check_packed(api: str, arguments: Arguments) -> None:
    """Refuse packed sequences, whose rows are steps of samples, not samples."""
    args, kwargs = arguments
    if any(isinstance(x, PackedSequence) for x in (*args, *kwargs.values())):
        raise ValueError(
            f"{api}: per_sample needs inputs with a dimension of samples, got a PackedSequence. "
            "Pass padded tensors and lengths, and pack them in the module."
        )


def check_batch_first(api: str, state: ModuleState, dims: Sequence[int | None]) -> None:
    """Refuse samples in front of the inputs of a recurrent layer that has the steps there."""
    is_behind = getattr(state.parts[""].module, "batch_first", True) is False
    if is_behind and all(dim is None or dim == 0 for dim in dims):
        raise ValueError(
            f"{api}: per_sample needs a module with the batch in front, got batch_first=False. "
            "Pass in_dims=1, use batch_first=True, or leave per_sample out."
        )
