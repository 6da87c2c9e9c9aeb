"""The watch of whoever pulls back or maps, and an evaluation under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from jacfunc._errors import Refused
from jacfunc._faults.callers import CUT_OFF
from jacfunc._faults.forward import FAULTY, PushContext, check_push, check_pushed
from jacfunc._faults.lookups import tensors_of
from jacfunc._faults.watch import Watch, name_of, unwatched
from jacfunc._lock import alone
from jacfunc._memory import keep_heap
from jacfunc._remembered import CallKind
from jacfunc._torch import Pull, is_batched, is_pushing
from jacfunc._types import LeafFunction, Leaves


class NestedWatch(Watch):
    """Watches a function for what its graph does not show, and what is pushed by others for faults.

    A push by :mod:`torch.func`, inside the function or outside of the derivative, meets the table
    of forward mode here.
    """

    def pushed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call while tangents pass through."""
        name = name_of(func)
        if name not in FAULTY and not isinstance(func, OpOverload):
            return super().pushed(func, args, kwargs)
        # vmaps of tangents alone do no harm
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
    """Evaluate at copies of the primals; watched, unless it met nothing when last called so.

    A watch costs a tenth of a small Jacobian, and what it looks for hardly depends on numbers;
    but a function that may catch errors is watched at every call. ``call`` says what is called,
    where ``func`` does not. Outside of what is pulled back on a plain graph nothing is pushed.
    """
    keep_heap()
    call = func if call is None else call
    kind: CallKind | None = None
    if getattr(call, "is_told_by_kind", False):
        kind = call.call_kind.among(pull.around)
    is_pushed = pull.level is not None and is_pushing()
    runs_alone = None if kind is None or is_pushed else unwatched().get(kind.version, kind.kind)
    if runs_alone is not None:
        if not runs_alone:
            return func(*copies)
        with alone():
            return func(*copies)
    shares = bool(getattr(call, "may_share_module", False))
    with alone() if shares else nullcontext(), NestedWatch(pull, primals=copies) as watch:
        found = func(*copies)
    watch.check_copies(primals)
    if watch.has_cut_off and not all(out.requires_grad for out in found[0]):
        raise Refused(CUT_OFF)
    if kind is None:
        return found
    # modules are evaluated alone, and other functions that draw are watched, to draw alone
    draws = watch.drew and call.state is None
    if not (watch.met or draws or any(map(_may_catch, call.functions))):
        unwatched().put(kind.version, kind.kind, shares)
    return found


def _may_catch(function: Any) -> bool:
    """Could it catch an error? Of what is not Python's nobody knows."""
    code = getattr(function, "__code__", None)
    return code is None or bool(code.co_exceptiontable)
