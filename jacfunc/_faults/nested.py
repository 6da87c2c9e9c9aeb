"""The watch of a function that is pulled back or vmapped, and evaluations under this watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import BuiltinFunctionType
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from jacfunc._errors import Refused
from jacfunc._faults.callers import CUT_OFF
from jacfunc._faults.forward import FAULTY, PushContext, check_push, check_pushed
from jacfunc._faults.leaving import check_stays_in_torch
from jacfunc._faults.lookups import tensors_of
from jacfunc._faults.watch import Watch, name_of, unwatched, watch_on
from jacfunc._lock import alone
from jacfunc._memory import keep_heap
from jacfunc._torch import Pull, is_batched, is_pushing
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
        if name not in FAULTY and not isinstance(func, OpOverload):
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
) -> tuple[Leaves, Leaves]:
    """``func(*copies)``, watched unless an earlier call of this kind showed nothing to watch for.

    A watch costs a tenth of a small Jacobian, and what it looks for hardly depends on numbers. But
    a function that may catch errors is watched in every call.

    Args:
        func: takes copies of the primals, returns outputs and extras.
        pull: the pullback that the evaluation is for.
        call: says what is called and of what kind the call is, if ``func`` does not.
    """
    keep_heap()
    watch_on()
    call = func if call is None else call
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
        constants = [number for number, out in enumerate(outputs) if not out.requires_grad]
        if constants:
            watch.stays_watched = True
            check_stays_in_torch(func, primals, outputs, constants)
    # a function that draws is watched, so that it draws alone; a module is evaluated alone anyway
    draws = is_known and watch.drew and call.state is None
    if is_known and not (watch.stays_watched or draws or any(map(_may_catch, call.functions))):
        unwatched().put(version, kind, shares)
    return outputs, extras


def _may_catch(function: Any) -> bool:
    """May the function catch an error?

    Torch's own functions in C++ do not. Of others that are not Python nothing tells, so they may.
    """
    if type(function) is BuiltinFunctionType and function.__module__ == "torch":
        return False
    code = getattr(function, "__code__", None)
    return code is None or bool(code.co_exceptiontable)
