"""The watch of a function that is pulled back or vmapped, and evaluations under this watch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import LeftTorch, Refused
from jacfunc._faults.callers import CUT_OFF
from jacfunc._faults.forward import FAULTY, PushContext, check_push, check_pushed
from jacfunc._faults.lookups import tensors_of
from jacfunc._faults.watch import Watch, name_of, unwatched, watch_on
from jacfunc._lock import alone
from jacfunc._memory import keep_heap
from jacfunc._torch import Pull, RandomState, is_batched, is_pushing, lacks_forward_kernel
from jacfunc._types import LeafFunction, Leaves


class NestedWatch(Watch):
    """A :class:`Watch` that also refuses faults of forward mode, if torch pushes tangents.

    ``torch.func`` may do so inside the function, or around the derivative.
    """

    def pushed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call in forward mode.

        Raises:
            Refused: if its tangents would be wrong.
        """
        name = name_of(func)
        if name not in FAULTY and not lacks_forward_kernel(func):
            return super().pushed(func, args, kwargs)
        # a vmap of tangents alone does no harm
        is_mapped = any(map(is_batched, tensors_of(args, kwargs)))
        check_push(func, name, args, kwargs, PushContext(int(is_mapped), keeps_graph=True))
        result = super().pushed(func, args, kwargs)
        check_pushed(name, result)
        return result


def watched_once(
    func: LeafFunction,
    copies: Sequence[Tensor],
    primals: Leaves,
    pull: Pull,
    call: Any = None,
    again: LeafFunction | None = None,
    count: Callable[[], int] | None = None,
) -> tuple[Leaves, Leaves]:
    """``func(*copies)``, watched unless an earlier call of this kind showed nothing to watch for.

    A watch costs a tenth of a small Jacobian, and what it looks for hardly depends on numbers. But
    a function that may catch errors is watched in every call.

    Args:
        func: takes copies of the primals, returns outputs and extras.
        pull: the pullback that the evaluation is for.
        call: says what is called and of what kind the call is, if ``func`` does not.
        again: evaluates ``func`` once more, where ``call`` is given and ``func`` keeps something.
        count: how many outputs ``again`` returns, if not all; what follows are their derivatives.
    """
    keep_heap()
    around = watch_on()
    if call is None:
        call = again = func
    try:
        return _watched_once(func, copies, primals, pull, call, again, count)
    finally:
        # what is inside a derivative that the function takes is looked at there
        for watch, leaves_torch in around:
            watch.leaves_torch = leaves_torch


def _watched_once(
    func: LeafFunction,
    copies: Sequence[Tensor],
    primals: Leaves,
    pull: Pull,
    call: Any,
    again: LeafFunction | None,
    count: Callable[[], int] | None,
) -> tuple[Leaves, Leaves]:
    _, kind, version = getattr(call, "exact_kind", None) or (None, None, None)
    is_known, kind = version is not None, (kind, pull.around)
    is_pushed = pull.level is not None and is_pushing()
    runs_alone = unwatched().get(version, kind) if is_known and not is_pushed else None
    if runs_alone is not None:
        if not runs_alone:
            return func(*copies)
        with alone():
            return func(*copies)
    shares = bool(getattr(call, "may_share_module", False))
    with alone() if shares else nullcontext(), NestedWatch(pull, primals=copies) as watch:
        outputs, extras = func(*copies)
    watch.check_copies(primals)
    if watch.has_cut_off and not all(out.requires_grad for out in outputs):
        raise Refused(CUT_OFF)
    if watch.leaves_torch:
        values = outputs if count is None else outputs[: count()]
        constants = [number for number, out in enumerate(values) if not out.requires_grad]
        if constants:
            if again is None:
                raise Refused("it leaves torch, by NumPy or Python numbers, and returns constants")
            watch.stays_watched = True
            check_stays_in_torch(again, primals, values, constants)
    note_unwatched(call, pull.around, watch, shares)
    return outputs, extras


def note_unwatched(call: Any, around: Hashable, watch: Watch, shares: bool = False) -> None:
    """Note that calls of this kind need no watch, if this one has shown nothing to watch for.

    Args:
        call: says what was called and of what kind the call is, if it knows.
        around: equal for derivatives of whose watches one tells about all.
        shares: must such calls run alone, for a module?
    """
    _, kind, version = getattr(call, "exact_kind", None) or (None, None, None)
    if version is None or watch.stays_watched or watch.leaves_torch:
        return
    if any(map(_may_catch, call.functions)):
        return
    # a function that draws is watched, so that it draws alone; a module is evaluated alone anyway
    if not (watch.drew and call.state is None):
        unwatched().put(version, (kind, around), shares)


def is_unwatched(call: Any, around: Hashable) -> bool:
    """Has an earlier call of this kind, for the same pullback, shown nothing to watch for?"""
    return runs_alone(call, around) is not None


def runs_alone(call: Any, around: Hashable) -> bool | None:
    """Must a call that needs no watch run alone, for a module? None where it is watched."""
    _, kind, version = getattr(call, "exact_kind", None) or (None, None, None)
    return None if version is None else unwatched().get(version, (kind, around))


def check_stays_in_torch(
    func: LeafFunction, primals: Leaves, outputs: Leaves, constants: Sequence[int]
) -> None:
    """Refuse outputs that torch takes for constants, if they change with the primals.

    What a function computes by NumPy or from Python numbers comes back without a graph, and its
    derivative would be zero. So has a constant by its nature: a function that leaves torch is
    evaluated beside the point, and only an output that changes there is refused. What ``detach()``
    or ``torch.no_grad()`` cut off stays a constant.

    Args:
        func: of the primals, returns outputs and extras; it has left torch.
        constants: the numbers of the outputs without a graph, or without tangents.

    Raises:
        LeftTorch: if one of them has another value on both sides of the point.
    """
    random_state = RandomState(primals)
    # a number that changes by less than its own rounding does not show it
    size = max(torch.finfo(x.dtype).eps for x in (*primals, *outputs)) ** 0.5

    def beside(step: int) -> list[Tensor]:
        random_state.repeat()
        with torch.no_grad():
            evaluated, _ = func(*_moved(primals, step * size))
        return [evaluated[number] for number in constants]

    with random_state.kept():
        # at the point last: a call keeps what its last evaluation returned beside tensors
        sides = zip(beside(1), beside(-1), beside(0), strict=True)
        for number, (above, below, same) in zip(constants, sides, strict=True):
            # one that changes by itself tells nothing, nor does a step to one side
            if torch.equal(same, outputs[number]) and not (
                torch.equal(same, above) or torch.equal(same, below)
            ):
                raise LeftTorch(
                    "func must compute its outputs by torch, got one that went through NumPy or a "
                    "Python number and lost its graph: its derivative would be zero, though its "
                    "value changes. Compute it by torch, write a torch.autograd.Function, or "
                    "return it beside the outputs with has_aux=True."
                )


def _moved(primals: Leaves, step: float) -> list[Tensor]:
    """Copies of the primals, each entry moved by up to so much of its size, and of 1."""
    moved = []
    for primal in map(Tensor.detach, primals):
        # no entry moves as its neighbours do, but all to one side, so that a step at 0 is taken
        # once; none is drawn at random, which vmap refuses
        places = torch.arange(1, 1 + primal.numel(), device=primal.device).view(primal.shape)
        moved.append(primal + step * (1 + primal.abs()) * (2 + places.cos()).to(primal.dtype))
    return moved


def _may_catch(function: Any) -> bool:
    """May the function catch an error?

    Torch's own functions in C++ do not. Of others that are not Python nothing tells, so they may.
    """
    if type(function) is BuiltinFunctionType and function.__module__ == "torch":
        return False
    code = getattr(function, "__code__", None)
    return code is None or bool(code.co_exceptiontable)
